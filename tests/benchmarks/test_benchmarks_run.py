"""Benchmarks whose parts the suite does not run otherwise: each runs once on the tiny bundle, so that it still can."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.device.readings import Reading
from balcony_edge.errors import InputError, MissingDependencyError
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.decoding.speculate import DraftRound, Speculator, run_round
from benchmarks.control import policies
from benchmarks.engine import memory
from benchmarks.models import extracted
from benchmarks.paper import depth_vs_width, recipes


def test_a_policy_that_is_forced_teaches_the_others_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "TOKENS", 12)
    with balcony_edge.load(tiny.path) as llm:
        costs = measure_prices(llm.engine)
        auto, forced = (Speculator(llm.exit_layers, llm.engine.manifest.agreement) for _ in range(2))
        before = auto._round_ratio
        free = policies.Policy(Budget(policy="lossless"), policies.always_paying(costs), forced)
        found = policies._run(llm, free, [[5, 9, 17]])
        assert len(found.replies[0]) == 12 and found.made > 0 and forced._round_ratio != before
        assert auto._round_ratio == before
        run = policies._run(llm, policies.Policy(Budget(policy="lossless"), costs, auto), [[5, 9, 17]])
        assert run.replies == found.replies and llm._learned.speculator is auto
        policies._run(llm, free._replace(speculator=None), [[5, 9, 17]])
        assert llm._learned.speculator not in (auto, forced)


def test_drafts_are_counted_as_rounds_keep_them(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert policies.kept_in_rounds([False, True, True, False, True, False, True, True, True], 2) == [2, 1, 2]
    monkeypatch.setattr(policies, "TOKENS", 40)
    with balcony_edge.load(tiny.path) as llm:
        costs, full = measure_prices(llm.engine), llm.exit_layers[-1]
        prompt = llm.encode("the quick brown fox")
        reply = policies._run(llm, policies.Policy(Budget(), costs, None), [prompt]).replies[0]
        assert policies._hits(llm, full, [prompt], [reply])[0].tolist() == [True] * len(reply)
        for exit_layer, best in policies.best_drafts(llm, costs, [prompt], [reply]).items():
            planned = DraftRound(int(exit_layer), best["drafts"], 0.0, 0.0)
            sequence, kept = llm.engine.new_sequence(), []
            sampler = Sampler(SamplingParams(), np.array([prompt]), llm.engine.manifest.model.vocab_size)
            sequence.advance(full, prompt)
            while sequence.length - len(prompt) + 1 + planned.drafts <= len(reply):
                at = sequence.length - len(prompt)
                tokens, _, _ = run_round(sequence, np.array(reply[at : at + 1]), sampler, planned) or ([], [], 0)
                assert tokens[:-1] == reply[at + 1 : at + len(tokens)]
                kept.append(len(tokens) - 1)
            assert best["kept"] == round(sum(kept) / len(kept) / planned.drafts, 3)


def test_the_energy_of_a_policy_is_that_of_the_board(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "TOKENS", 4)
    counters = iter((10.0, 13.0))

    def readings(_: Any) -> tuple[Reading, ...]:
        joules = next(counters)
        late = Reading("battery:drain", "board", 0.0, joules=9.0)  # shows the load of policies before
        board = Reading("meter", "board", 0.0, joules=2 * joules)
        return late, Reading("rapl:package-0", "cpu", 0.0, joules=joules), board

    with balcony_edge.load(tiny.path) as llm:
        monkeypatch.setattr(type(llm), "readings", readings)
        asked = policies.Policy(Budget(exit_layer=2), measure_prices(llm.engine), None)
        assert policies._run(llm, asked, [[5, 9, 17]]).joules == 6.0


def test_the_first_token_is_timed_with_both_lengths_of_context(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "IDLE_REPEATS", 1)
    lengths: set[int | None] = set()
    make = balcony_edge.Engine.new_sequence

    def noted(engine: Any, **options: Any) -> Any:
        lengths.add(options.get("max_length"))
        return make(engine, **options)

    monkeypatch.setattr(balcony_edge.Engine, "new_sequence", noted)
    report = memory._idle_here(tiny.path)
    short = [length for length in lengths if length is not None and length < 60]
    assert None in lengths and len(short) == 1 and report["first_token_ratio"] > 0


def test_another_engine_is_told_the_length_of_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Recorder:
        version = "1"

        def __init__(self, python: Any, module: str, model: Path, options: dict[str, Any], **_: Any) -> None:
            seen.update(options)

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_: object) -> None: ...

        def ask(self, **_: Any) -> dict[str, Any]:
            return {"tokens": [1, 2]}

    monkeypatch.setattr(extracted, "Worker", Recorder)
    assert extracted.peer_replies("llama.cpp", "llama_cpp", Path("m"), [[1, 2, 3], [4]], 24) == ("1", [[1, 2], [1, 2]])
    assert seen == {"max_length": 27}


def test_missing_engines_are_told_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extracted, "python_of", lambda peer: tmp_path / peer)
    monkeypatch.setattr(extracted, "load_model", None)
    monkeypatch.setattr("sys.argv", ["extracted"])
    with pytest.raises(MissingDependencyError, match="llama-cpp, onnxruntime-genai: not installed: run `python"):
        extracted.main()


def test_replies_of_an_interrupted_run_are_not_taken_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run reads what has the final name; nor is a file of no replies written for a text without instructions."""

    def interrupted(model: Any, tokenizer: Any, data: Path, output: Path, tokens: int) -> None:
        output.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    bench = recipes.Bench.__new__(recipes.Bench)  # without the demo model
    bench.data, bench.work, bench.tokens, bench.corpora = tmp_path, tmp_path, 10, {}
    bench.model = bench.tokenizer = None
    with pytest.raises(InputError, match=r'has no \.jsonl file with "instruction"'):
        bench.corpus("sampled", 64)
    monkeypatch.setattr(recipes, "sample_replies", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.corpus("sampled", 64)
    assert not list(tmp_path.glob("sampled*.jsonl"))


def test_replies_to_another_text_or_of_another_length_are_sampled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an earlier run in the same directory would be taken for them."""
    sampled: list[int] = []

    def sample(model: Any, tokenizer: Any, data: Path, output: Path, tokens: int) -> None:
        sampled.append(tokens)
        output.write_text("replies", encoding="utf-8")

    monkeypatch.setattr(recipes, "sample_replies", sample)
    monkeypatch.setattr(recipes, "build_corpus", lambda files, *_, **__: files)
    bench = recipes.Bench.__new__(recipes.Bench)  # without the demo model
    bench.data, bench.work = tmp_path / "data", tmp_path
    bench.model = bench.tokenizer = None
    bench.data.mkdir()
    for tokens, text in ((10, "one"), (20, "one"), (20, "two"), (20, "two")):
        (bench.data / "text.jsonl").write_text(text, encoding="utf-8")
        bench.tokens, bench.corpora = tokens, {}
        bench.corpus("sampled", 64)
    assert sampled == [10, 20, 20]


def test_prompts_are_lines_of_json(tmp_path: Path) -> None:
    """`str.splitlines` also ends lines at U+2028, which JSON has in texts; a line without a text was the prompt "None"."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "one\u2028two"}\n\n{"instruction": "three"}\n{"text": "four"}\n', encoding="utf-8")
    llm: Any = SimpleNamespace(encode=lambda text, **_: [text])
    assert policies.read_prompts(llm, file, 2) == [["one\u2028two"], ["three"]]
    file.write_text('{"messages": []}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r'prompts\.jsonl:1: has neither an "instruction" nor a "text"'):
        policies.read_prompts(llm, file, 2)


def test_figures_are_printed_before_they_are_drawn(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory that is not there cost the figures of half an hour."""
    prompts, picture = tmp_path / "prompts.jsonl", tmp_path / "none" / "picture.png"
    prompts.write_text('{"text": "the fox"}\n', encoding="utf-8")
    row = {"of_plain": 1.0, "same_as_plain": 1.0}
    found = {f"speculative, {kind}": row for kind in ("auto", "forced")}

    def refused(*_: Any) -> None:
        raise FileNotFoundError(picture)

    monkeypatch.setattr(policies, "measure", lambda *_: (found, {}))
    monkeypatch.setattr(policies, "plot", refused)
    monkeypatch.setattr("sys.argv", ["policies", str(tiny.path), "--prompts", str(prompts), "--plot", str(picture)])
    with pytest.raises(FileNotFoundError):
        policies.main()
    assert json.loads(capsys.readouterr().out)["policies"] == found


def test_figure_2_can_decode_as_many_tokens_as_the_papers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Section 4.2: "prompt size of 32, output size of 2048"."""
    asked: list[int] = []

    def measured(rounds: int, tokens: int) -> dict[str, Any]:
        asked.append(tokens)
        return {}

    monkeypatch.setattr(depth_vs_width, "measure_speed", measured)
    monkeypatch.setattr("sys.argv", ["depth_vs_width", "--tokens", "2048"])
    depth_vs_width.main()
    assert asked == [json.loads(capsys.readouterr().out)["tokens"]] == [2048]


def test_no_prompt_of_the_extracted_exit_comes_twice() -> None:
    texts = extracted.texts(20)
    assert len(texts) == len(set(texts)) == 20
    assert len(set(extracted.texts(132))) == 132


def test_quality_needs_documents_to_judge_on(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first documents choose the neurons."""
    text = tmp_path / "few.jsonl"
    text.write_text('{"text": "the fox"}\n' * depth_vs_width.DOCUMENTS)
    monkeypatch.setattr(depth_vs_width, "demo_model_path", lambda: tmp_path)
    monkeypatch.setattr(depth_vs_width, "load_model", lambda _: make_tiny("llama"))
    monkeypatch.setattr(depth_vs_width, "load_tokenizer", lambda _: make_tokenizer())
    with pytest.raises(InputError, match=r"few\.jsonl: has 24 documents: give more than 24"):
        depth_vs_width.measure_quality(text, tmp_path, 0)
