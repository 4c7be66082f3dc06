"""Balconies: parsing exits, initialization, and the directory format with all kinds of damage."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from balcony_edge.errors import CheckpointError, InputError
from balcony_export.model.averaging import average
from balcony_export.model.balcony import KINDS, BalconyKind, init_balconies, parse_exits
from balcony_export.model.balcony_files import fingerprint, load_balconies, rows_seen, save_balconies, trained_exits
from balcony_export.model.checkpoint import load_model
from balcony_export.model.exits import ExitModel
from tests.support.command import invoke_here


@pytest.mark.parametrize(
    ("text", "layers", "exits"),
    [
        ("14,17,20", 30, (14, 17, 20)),
        ("0.5x,0.6x,0.7x", 30, (14, 17, 20)),  # the paper's names: (e + 1) / 30
        ("0.5x, 0.7x", 32, (15, 21)),
        ("1", 2, (1,)),
        ("14,0.7x", 30, (14, 20)),
        ("29", 30, (29,)),
    ],
)
def test_exits_are_parsed(text: str, layers: int, exits: tuple[int, ...]) -> None:
    assert parse_exits(text, layers) == exits


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("17,14", "14 comes after 17: write exits in ascending order"),
        ("14,14", "exit layer 14 is named twice"),
        ("14,0.5x", "exit layer 14 is named twice"),
        ("0", "exit layer 0: a model of 30 layers takes exits 1 to 29"),
        ("30", "exit layer 30: a model of 30 layers takes exits 1 to 29"),
        ("1.1x", "exit layer 32"),
        ("fourteen", "'fourteen' is not an exit"),
        ("14,", "'' is not an exit"),
        ("-3", "'-3' is not an exit"),
        ("0.5", "'0.5' is not an exit"),
        pytest.param("1" * 5000, "is not an exit", id="long number"),
        pytest.param("1" * 400 + "x", "is not an exit", id="long factor"),
    ],
)
def test_exits_that_make_no_sense_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_exits(text, 30)


@pytest.fixture
def model(make_tiny: Callable[..., Any]) -> Any:
    return make_tiny("llama")


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    balconies = init_balconies(model, (2, 3))
    for exit_layer, balcony in balconies.items():
        for parameter in balcony.parameters():
            parameter.data += exit_layer
    save_balconies(tmp_path / "balconies", balconies, fingerprint(model), {"step": 7})
    return tmp_path / "balconies"


def test_a_balcony_starts_as_the_last_layer_and_the_final_norm(model: Any) -> None:
    balcony = init_balconies(model, (2,))[2]
    for name, value in model.model.layers[-1].state_dict().items():
        assert torch.equal(balcony.layer.state_dict()[name], value)
    assert torch.equal(balcony.norm.weight, model.model.norm.weight)
    balcony.norm.weight.data.zero_()
    assert model.model.norm.weight.abs().sum() > 0, "a balcony must not share memory with the model"
    assert balcony.layer.self_attn.layer_idx == 4


def test_what_is_saved_is_loaded(model: Any, saved: Path) -> None:
    loaded = load_balconies(saved, model)
    assert list(loaded) == [2, 3]
    for exit_layer, balcony in loaded.items():
        wanted = (model.model.layers[-1].mlp.up_proj.weight + exit_layer).to(torch.bfloat16).float()
        assert torch.equal(balcony.layer.mlp.up_proj.weight, wanted)
        assert balcony.exit_layer == exit_layer
    assert list(load_balconies(saved, model, (3,))) == [3]
    stored = load_file(saved / "balcony_2.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert "norm.weight" in stored
    assert "layer.self_attn.q_proj.weight" in stored
    assert json.loads((saved / "balconies.json").read_text())["exits"]["2"]["training"] == {"step": 7}
    assert not list(saved.rglob("*partial*"))


def test_adding_exits_leaves_the_others_bit_equal(model: Any, saved: Path) -> None:
    before = {name: (saved / name).read_bytes() for name in ("balcony_2.safetensors", "balcony_3.safetensors")}
    entries = json.loads((saved / "balconies.json").read_text())["exits"]
    save_balconies(saved, init_balconies(model, (1,)), fingerprint(model))
    after = json.loads((saved / "balconies.json").read_text())["exits"]
    assert {name: (saved / name).read_bytes() for name in before} == before
    assert {key: after[key] for key in entries} == entries
    assert list(load_balconies(saved, model)) == [1, 2, 3]


def test_fingerprint_names_the_model_and_not_its_precision(
    model: Any, make_tiny: Callable[..., Any], tiny_checkpoint: Path
) -> None:
    base = fingerprint(model)
    assert fingerprint(load_model(tiny_checkpoint)) == base
    assert fingerprint(load_model(tiny_checkpoint, dtype=torch.bfloat16)) == base
    model.config.rms_norm_eps = float(torch.tensor(model.config.rms_norm_eps))  # as read from a GGUF file
    assert fingerprint(model) == base
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.05)
    assert fingerprint(model)["weights_sha256"] != base["weights_sha256"]
    assert fingerprint(model)["config_sha256"] == base["config_sha256"]
    whole, real = (
        fingerprint(make_tiny("llama", rope_parameters={"rope_theta": theta, "rope_type": "default"}))
        for theta in (1_000_000, 1_000_000.0)
    )
    assert whole == real, "as in Qwen 3's config.json, and as read from a GGUF file"
    other = fingerprint(make_tiny("llama", rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}))
    assert other["config_sha256"] != base["config_sha256"]


def _flip_byte(path: Path) -> None:
    content = bytearray((path / "balcony_3.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "balcony_3.safetensors").write_bytes(content)


def _norm(values: torch.Tensor) -> Callable[[Path], None]:
    """Replaces the norm, with a hash that fits."""

    def damage(path: Path) -> None:
        save_file(load_file(path / "balcony_3.safetensors") | {"norm.weight": values}, path / "balcony_3.safetensors")
        index = json.loads((path / "balconies.json").read_text())
        index["exits"]["3"]["sha256"] = hashlib.sha256((path / "balcony_3.safetensors").read_bytes()).hexdigest()
        (path / "balconies.json").write_text(json.dumps(index))

    return damage


def _edit(key: str, value: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        index = json.loads((path / "balconies.json").read_text())
        (path / "balconies.json").write_text(json.dumps(index | {key: value}))

    return damage


def _of_a_later_format(path: Path) -> None:
    """It has no module, and its exits are a list."""
    (path / "balconies.json").write_text(json.dumps({"format_version": 9, "exits": [2, 3]}))


def _train(path: Path) -> None:
    """A record that is a list."""
    index = json.loads((path / "balconies.json").read_text())
    index["exits"]["3"]["training"] = [7]
    (path / "balconies.json").write_text(json.dumps(index))


def _escape(path: Path) -> None:
    index = json.loads((path / "balconies.json").read_text())
    index["exits"]["3"]["file"] = "../outside.safetensors"
    (path / "balconies.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "balcony_3.safetensors").unlink(), r"balcony_3\.safetensors: is missing"),
        (_flip_byte, r"balcony_3\.safetensors: its sha256 differs"),
        (_norm(torch.full((32,), torch.nan)), r"balcony 3: norm\.weight has values that are not finite"),
        (_norm(torch.ones(8, dtype=torch.bfloat16)), r"norm\.weight is \(8,\), the base model needs \(32,\)"),
        (_edit("format_version", 9), "format 9"),
        (_of_a_later_format, "format 9"),
        (
            _edit("module", "lstm"),
            "module 'lstm': this version reads format 2 and modules decoder, attention, mlp, none, dense",
        ),
        (_edit("exits", []), "is damaged"),
        (_escape, "is damaged"),
        (_train, "is damaged"),
        (lambda path: (path / "balconies.json").unlink(), r"has no balconies\.json"),
        (lambda path: (path / "balconies.json").write_text("{"), "is damaged"),
    ],
)
def test_damaged_directories_are_named(model: Any, saved: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=words):
        load_balconies(saved, model)


def test_an_index_that_may_not_be_read_is_not_called_damaged(
    model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        CheckpointError, match=r"balconies\.json: cannot be read \(Permission denied\): make it readable"
    ):
        load_balconies(saved, model)


def test_an_exit_that_is_not_there_is_named(model: Any, saved: Path) -> None:
    with pytest.raises(CheckpointError, match="has no balcony for exit layer 4: it has 2, 3"):
        load_balconies(saved, model, (2, 4))


def test_another_base_model_is_refused_on_both_ways(make_tiny: Callable[..., Any], saved: Path) -> None:
    other = make_tiny("qwen3")
    with pytest.raises(CheckpointError, match=r"belong to another base model \(model_type is qwen3, they need llama\)"):
        load_balconies(saved, other)
    with pytest.raises(CheckpointError, match="belong to another base model"):
        save_balconies(saved, init_balconies(other, (1,)), fingerprint(other))
    assert not (saved / "balcony_1.safetensors").exists()


def test_a_directory_is_as_it_was_if_the_disk_is_full(model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file does not fit any more: the index and the tensors that it names stay together."""
    others, flush = init_balconies(model, (2, 3)), os.fsync
    for full_at in (1, 2, 3):
        calls = itertools.count(1)

        def sync(descriptor: int, calls: Iterator[int] = calls, full_at: int = full_at) -> None:
            if next(calls) == full_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", sync)
        with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
            save_balconies(saved, others, fingerprint(model))
        monkeypatch.setattr(os, "fsync", flush)
        assert load_balconies(saved, model)[3].layer.mlp.up_proj.weight.mean() > 2
        assert sorted(path.name for path in saved.iterdir()) == [
            "balconies.json", "balcony_2.safetensors", "balcony_3.safetensors"
        ]  # fmt: skip


def test_two_runs_write_into_one_directory_at_once(model: Any, tmp_path: Path) -> None:
    described = fingerprint(model)

    def write(exit_layer: int) -> None:
        for _ in range(6):
            save_balconies(tmp_path / "both", init_balconies(model, (exit_layer,)), described)

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(write, exit_layer) for exit_layer in (1, 2, 3)]:
            done.result(60)
    assert list(load_balconies(tmp_path / "both", model)) == [1, 2, 3]


def test_values_that_are_not_finite_are_never_written(model: Any, saved: Path) -> None:
    before = (saved / "balcony_2.safetensors").read_bytes()
    balconies = init_balconies(model, (2,))
    balconies[2].norm.weight.data[0] = float("inf")
    with pytest.raises(CheckpointError, match="not finite"):
        save_balconies(saved, balconies, fingerprint(model))
    assert (saved / "balcony_2.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_at_positions_are_those_of_the_whole_pass(
    name: str, kind: BalconyKind, make_tiny: Callable[..., Any]
) -> None:
    model = make_tiny(name)
    balcony = init_balconies(model, (2,), kind)[2].requires_grad_(True)
    hidden = torch.randn(2, 8, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    arguments = ExitModel(model).layer_arguments(8)
    where = torch.tensor([1, 7, 11])
    slopes = []
    whole, picked = balcony(hidden, **arguments).flatten(0, 1)[where], balcony.rows(hidden, where, **arguments)
    torch.testing.assert_close(picked, whole, rtol=1e-5, atol=1e-6)
    for out in (whole, picked):
        balcony.zero_grad()
        out.square().sum().backward()
        slopes.append(
            {name: value.grad.clone() for name, value in balcony.named_parameters() if value.grad is not None}
        )
    assert slopes[0].keys() == slopes[1].keys()
    for key, slope in slopes[0].items():
        torch.testing.assert_close(slopes[1][key], slope, rtol=1e-4, atol=1e-5)
    # no hook is left
    torch.testing.assert_close(balcony(hidden, **arguments).flatten(0, 1)[where], whole, rtol=0, atol=0)


def test_the_mean_of_runs(tmp_path: Path, make_tiny: Callable[..., Any]) -> None:
    model = make_tiny("llama")
    base, record = fingerprint(model), {"held_out_kl": 1.0, "corpus": "digest", "rows": 7}
    runs = []
    for number, factor in enumerate((1.0, 2.0, 6.0)):
        balconies = init_balconies(model, (2, 3))
        for value in itertools.chain.from_iterable(one.state_dict().values() for one in balconies.values()):
            value.mul_(factor)
        runs.append(tmp_path / f"run{number}")
        save_balconies(runs[-1], balconies, base, record | {"rows": (7, 9, 8)[number], "step": (7, 2, 0)[number]})
    done = invoke_here("average", *runs, "-o", tmp_path / "mean")
    assert done.returncode == 0 and "means of 3 runs for exits 2, 3" in done.stdout
    found = load_balconies(tmp_path / "mean", model)
    for exit_layer, balcony in init_balconies(model, (2, 3)).items():
        for name, value in balcony.state_dict().items():
            torch.testing.assert_close(found[exit_layer].state_dict()[name], 3 * value, rtol=0.01, atol=1e-6)
    training = json.loads((tmp_path / "mean/balconies.json").read_text())["exits"]["2"]["training"]
    assert "held_out_kl" not in training and len(set(training["mean_of"])) == 3
    assert rows_seen(tmp_path / "mean", (2, 3), "digest") == 9, "a run that starts from it goes on after them"
    assert trained_exits(tmp_path / "mean") == (2, 3), "not replaced unasked, though its last run kept its start"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["base"].update(weights_sha256="0" * 64), "has another base than"),
        (lambda index: index["exits"].pop("3"), "has another exits than"),
        (lambda index: index.update(layer=0), "has another layer than"),
        (lambda index: index["exits"]["2"].update(sha256="0" * 64), "its sha256 differs"),
    ],
)
def test_a_mean_of_what_is_not_alike_is_refused(
    change: Callable[[Any], Any], words: str, tmp_path: Path, make_tiny: Callable[..., Any]
) -> None:
    model = make_tiny("llama")
    for name in ("one", "two"):
        save_balconies(tmp_path / name, init_balconies(model, (2, 3)), fingerprint(model))
    index = json.loads((tmp_path / "one/balconies.json").read_text())
    change(index)
    (tmp_path / "one/balconies.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        average([tmp_path / "one", tmp_path / "two"], tmp_path / "mean")
    with pytest.raises(InputError, match="1 directory to average: give two or more"):
        average([tmp_path / "two"], tmp_path / "mean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_mean_of_balconies_without_a_record_is_written(tmp_path: Path, make_tiny: Callable[..., Any]) -> None:
    model = make_tiny("llama")
    for name in ("one", "two"):
        save_balconies(tmp_path / name, init_balconies(model, (2,)), fingerprint(model))
        index = json.loads((tmp_path / name / "balconies.json").read_text())
        del index["exits"]["2"]["training"]
        (tmp_path / name / "balconies.json").write_text(json.dumps(index))
    assert average([tmp_path / "one", tmp_path / "two"], tmp_path / "mean") == (2,)
