"""The benchmark of peers: its arithmetic, its worker processes on a tiny model, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError, VerificationError
from balcony_runtime.engine import Engine
from benchmarks import peers
from benchmarks.peer_workers import install
from benchmarks.peer_workers.process import Worker

PYTHON = Path(sys.executable)
PREFIX = 4


def worker(module: str, model: Path, **options: Any) -> Worker:
    return Worker(PYTHON, module, model, {"max_length": 512, **options}, threads=1, huge_pages=False)


@pytest.mark.slow
def test_workers_agree_with_hand_computations(
    tiny: Any, tiny_checkpoint: Path, tiny_engine: Engine, tmp_path: Path
) -> None:
    """transformers as the reference, ours at full depth equal to it, and an exit's KL as computed here."""
    windows = [[5, 9, 2, 7, 30, 11, 8], [40, 3, 3, 12, 17, 25, 6]]
    request = {"windows": windows, "first": PREFIX, "reference": str(tmp_path / "reference"), "variant": None}
    prompt = [5, 9, 2, 7]
    with worker("transformers_torch", tiny_checkpoint, precision="float32") as reference:
        itself = reference.ask(do="score", write=True, **request)
        theirs = reference.ask(do="generate", variant=None, prompt=prompt, steps=5)
    exit_layer, full = tiny_engine.exit_layers[0], tiny_engine.exit_layers[-1]
    with worker("balcony", tiny.path, precision="float32") as ours:
        deep = ours.ask(do="score", write=False, **request)
        shallow = ours.ask(do="score", write=False, **request | {"variant": exit_layer})
        reply = ours.ask(do="generate", variant=full, prompt=prompt, steps=5)
        memory = ours.ask(do="memory")
        assert ours.load_s > 0
        assert ours.config["precision"] == "float32"
        assert 0 <= ours.idle_cpu < 10

    assert itself["agreement"] == deep["agreement"] == 1
    assert max(map(abs, [*itself["kl"], *deep["kl"]])) < 1e-6  # float32 log-probabilities in the file

    kl, hits = [], 0
    for window in windows:
        sequence = tiny_engine.new_sequence(max_length=len(window))
        rows = torch.from_numpy(sequence.advance(exit_layer, window, num_logits=len(window) - PREFIX + 1)[0])
        with torch.no_grad():
            wanted = tiny.model(torch.tensor([window])).logits[0, PREFIX - 1 :]
        p, q = wanted.double().log_softmax(-1), rows.double().log_softmax(-1)
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        hits += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert shallow["kl"] == pytest.approx(kl, rel=1e-3)
    assert min(kl) > 0.01
    assert shallow["agreement"] == pytest.approx(hits / 8)

    assert reply["tokens"] == theirs["tokens"]
    assert len(reply["tokens"]) == 6
    assert len(reply["step_ms"]) == 5
    assert min(reply["step_ms"]) > 0
    assert 0 < memory["added_mb"] <= memory["private_mb"] <= memory["peak_rss_mb"]


def test_a_worker_that_ends_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="balcony nothing: ended while it was asked to load"):
        worker("balcony", tmp_path / "nothing")


def row(
    name: str, bundle: str | None, kl: float, decode_ms: list[float], prefill_ms: list[float], megabytes: float = 90.0
) -> dict[str, Any]:
    times = {"decode_32": decode_ms, "decode_512": decode_ms, "prefill_512": prefill_ms}
    return {
        "name": name, "bundle": bundle, "kl": kl, "weights_mb": megabytes, "load_s": 0.6, "loaded_mb": 20.0,
        "config": {"packed": "here"}, "_ms": times,
    }  # fmt: skip


def test_ratios_are_taken_within_a_round_and_judged_by_their_bars() -> None:
    """A burst that hits both sides of one round leaves the ratio as it is."""
    rows = [
        row("ours", "b", 0.25, [5.0, 50.0, 5.0], [100.0, 100.0, 100.0]),
        row("ours, exit 2", "b", 1.5, [1.0, 1.0, 1.0], [10.0, 10.0, 10.0]),
        row("llama.cpp Q4_0", None, 0.3, [4.0, 40.0, 4.0], [50.0, 50.0, 50.0]),
        row("ONNX Runtime GenAI int4", None, 0.6, [10.0, 100.0, 10.0], [50.0, 200.0, 200.0]),
    ]
    found = peers.ratios(rows, {"ours"})
    assert [(r["ours"], r["peer"], r["decode_32"], r["prefill_512"]) for r in found] == [
        ("ours", "llama.cpp Q4_0", 0.8, 0.5),
        ("ours", "ONNX Runtime GenAI int4", 2.0, 2.0),
    ]
    assert found[0]["kl_difference"] == pytest.approx(-0.05)
    assert all("_ms" not in r for r in rows)
    bars = peers.bars(rows, found, [], {"ours"})
    assert {name.removeprefix("ours / "): bar["holds"] for name, bar in bars.items()} == {
        "llama.cpp Q4_0: decode_32": False,
        "llama.cpp Q4_0: decode_512": False,
        "llama.cpp Q4_0: prefill_512": False,
        "llama.cpp Q4_0: kl_difference": True,
        "llama.cpp Q4_0: weights": True,
        "ONNX Runtime GenAI int4: decode_32": True,
        "ONNX Runtime GenAI int4: decode_512": True,
        "ONNX Runtime GenAI int4: prefill_512": True,
        "ONNX Runtime GenAI int4: kl_difference": True,
        "ONNX Runtime GenAI int4: weights": True,
        "ours: load_s": False,
        "ours: loaded_mb": True,
    }
    assert peers.bars(rows, found, [], set()) == {}


def test_an_exit_is_judged_by_the_bytes_that_it_reads() -> None:
    times = [100.0, 100.0, 100.0]
    rows = [
        row("ours", "b", 0.25, [5.0, 50.0, 5.0], times, 90.0),
        row("ours, exit 2", "b", 1.5, [2.5, 25.0, 2.0], times, 45.0),
        row("ours, exit 1", "b", 2.5, [2.5, 25.0, 2.5], times, 30.0),
        row("other", "c", 0.25, [5.0, 5.0, 5.0], times, 80.0),
        row("a peer", None, 0.3, [4.0, 40.0, 4.0], times),
    ]
    exits = peers.exit_speedups(rows)
    assert [(e["name"], e["bytes"], e["decode_32"], e["decode_512_of_bytes"]) for e in exits] == [
        ("ours, exit 2", 2.0, 2.0, 1.0),
        ("ours, exit 1", 3.0, 2.0, 0.667),
    ]
    bars = peers.bars(rows, [], exits, set())
    assert {name: bar["holds"] for name, bar in bars.items() if name.endswith("decode_32_of_bytes")} == {
        "ours, exit 2: decode_32_of_bytes": True,
        "ours, exit 1: decode_32_of_bytes": False,
    }


def test_prompts_differ_and_windows_do_not_overlap_them(tiny: Any, tmp_path: Path) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "the", "balcony"]
    order = np.random.default_rng(0).integers(len(words), size=2000)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words[index] for index in order), encoding="utf-8")
    bundle = Bundle.open(tiny.path)
    text = peers.read_text(path, bundle, prompts=3, longest=8, windows=2)
    ids = tiny.tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    assert [token for prompt in text.prompts for token in prompt] == ids[:24]
    assert [len(window) - peers.WINDOW_PREFIX + 1 for window in text.windows] == [peers.WINDOW_ROWS] * 2
    assert text.windows[0] == ids[24 : 24 + len(text.windows[0])]
    assert text.windows[0] != text.windows[1]

    path.write_text("the fox", encoding="utf-8")
    with pytest.raises(InputError, match=r"text\.txt: has \d+ tokens, but 598 are needed: give a longer text"):
        peers.read_text(path, bundle, prompts=3, longest=8, windows=2)
    with pytest.raises(InputError, match="cannot be read"):
        peers.read_text(tmp_path / "absent", bundle, prompts=1, longest=8, windows=1)


def test_memory_is_that_after_a_prompt_of_512_whatever_the_contexts_are(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With shorter contexts `peak_rss_mb` was that of a prompt of the longest of them."""

    def read_text(path: Path, bundle: Bundle, prompts: int, longest: int, windows: int) -> peers.Text:
        raise InputError(f"prompts of {longest}")

    monkeypatch.setattr(install, "missing", lambda _: [])
    monkeypatch.setattr(peers, "read_text", read_text)
    monkeypatch.setattr(peers, "SHORT", 64)
    monkeypatch.setattr(peers, "WINDOW_ROWS", 8)
    monkeypatch.setattr(sys, "argv", ["peers.py", str(tiny.path), "--text", "t", "--contexts", "8,16"])
    assert peers.main() == 1
    assert capsys.readouterr().err == "error: prompts of 64\n"


def test_every_peer_has_a_worker_and_requirements() -> None:
    directory = Path(install.__file__).parent
    for model in install.PEER_MODELS:
        assert (directory / f"{install.WORKERS[model.peer]}.py").is_file()
        lines = (directory / "requirements" / f"{model.peer}.txt").read_text(encoding="utf-8").splitlines()
        assert all("==" in line for line in lines if not line.startswith("#"))
        assert "precision" in model.options
    assert peers.REFERENCE in [model.name for model in install.PEER_MODELS]


def test_what_is_not_installed_is_named(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "CACHE", tmp_path)
    text = tmp_path / "text.txt"
    monkeypatch.setattr(sys, "argv", ["peers.py", str(tiny.path), "--text", str(text), "--peers", "transformers"])
    assert peers.main() == 1
    assert capsys.readouterr().err == (
        "error: transformers: is not installed: run with --install first, or name others with --peers\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one bundle, or --install"),
        (["bundle"], "--text: measuring needs a text"),
        (["bundle", "--peers", "vllm"], "vllm: give some of llama-cpp,"),
        (["bundle", "--text", "t", "--contexts", "32,many"], "32,many: give numbers of tokens from 1 on"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        peers.main()
    assert message in capsys.readouterr().err


def test_the_picture_shows_contexts_from_three_on(tmp_path: Path) -> None:
    figure_module = pytest.importorskip("matplotlib.figure", reason="pictures are an extra: pip install '.[plot]'")
    from benchmarks.peer_workers import plot

    speeds = {"decode_32_tps": 100.0, "decode_512_tps": 50.0, "decode_2048_tps": 20.0}
    full = {"name": "full", "bundle": "b", "exit_layer": 30, "kl": 0.2, **speeds}
    shallow = {"name": "exit", "bundle": "b", "exit_layer": 14, "kl": 1.2, "decode_32_tps": 160.0}
    peer = {"name": "peer", "bundle": None, "exit_layer": None, "kl": 0.3, **dict.fromkeys(speeds, 10.0)}
    document = {"cases": [full, shallow, peer], "threads": 2, "cpu": "a CPU"}
    axes = figure_module.Figure().add_subplot()
    plot._over_context(axes, document, [32, 512, 2048])
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {"full": [10.0, 20.0, 50.0], "peer": [100.0, 100.0, 100.0]}  # not the exit: it has one context
    plot.plot(document, tmp_path / "wide.png")
    del full["decode_2048_tps"]
    plot.plot(document, tmp_path / "narrow.png")
    headers = [(tmp_path / name).read_bytes()[16:20] for name in ("wide.png", "narrow.png")]
    assert [int.from_bytes(width) for width in headers] == [1680, 1080]
    figure = figure_module.Figure()
    plot._over_quality(figure.add_subplot(), document, 512)  # after the shortest of long contexts no exit is measured
    assert len(figure.axes[0].texts) == 2


def test_names_of_points_that_are_close_do_not_meet() -> None:
    """In a corner, next to each other, and one on another: no name over a name, a point, or the edge."""
    figure_module = pytest.importorskip("matplotlib.figure", reason="pictures are an extra: pip install '.[plot]'")
    from matplotlib import text as text_module

    from benchmarks.labels import name_points

    figure = figure_module.Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    points = [(0.0, 0.0), (0.01, 0.0), (0.02, 0.01), (1.0, 1.0), (0.5, 0.5), (0.5, 0.5)]
    axes.plot(*zip(*points, strict=True), "o")
    name_points(axes, points, [f"a rather long name {number}" for number in range(len(points))])
    figure.draw_without_rendering()
    # of the text alone: an annotation's own extent includes the line that leads to its point
    boxes = [text_module.Text.get_window_extent(text) for text in axes.texts]
    middles = axes.transData.transform(points)
    assert len(boxes) == len(points)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        assert not any(box.contains(*middle) for middle in middles)
        assert axes.get_window_extent().containsx(box.x0) and axes.get_window_extent().containsx(box.x1)
