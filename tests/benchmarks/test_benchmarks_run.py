"""Benchmarks whose parts the suite does not run otherwise: each runs once on the tiny bundle, so that it still can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.decoding.speculate import Speculator
from benchmarks.control import policies
from benchmarks.engine import memory
from benchmarks.models import extracted


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
