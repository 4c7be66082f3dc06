"""Figures of benchmarks/serving/streams.py: prices on a machine whose speed changes, and rates of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_edge.control.company.prices import RoundEntry, RoundPrices
from benchmarks.serving import streams
from benchmarks.serving.simulated import INT4


def test_a_price_is_compared_within_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle of the second round on everything takes twice as long, and the prices stay right."""
    prices, ones = RoundPrices(INT4), (1,) * len(INT4.exits)
    calls = 0

    def measured(_: Any, exits: Sequence[int]) -> float:
        nonlocal calls
        calls += 1
        entries = [RoundEntry(INT4.exits.index(layer), ones, ones, streams.PROMPT_TOKENS) for layer in exits]
        return prices.round_ms(entries) * (1 if calls < 8 else 2)

    monkeypatch.setattr(streams, "_round_ms", measured)
    llm: Any = SimpleNamespace(costs=INT4, exit_layers=INT4.exits)
    assert streams.mixed(llm, 3)["predicted_of_measured"] == {"each exit": 1.0, "two and two": 1.0}


class OneAtATime:
    """Replies that never overlap: 1 ms a token, however many ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def stream(self, ids: list[int], max_new_tokens: int, **_: Any) -> Iterator[int]:
        with self._lock:
            for token in range(max_new_tokens):
                time.sleep(0.001)
                yield token


def test_replies_one_after_another_are_no_faster_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "prompts", lambda _, count, __: [[3]] * count)
    llm: Any = OneAtATime()
    assert streams.rate(llm, 4, "threads", 0) <= 1000


def test_a_figure_beyond_its_bar_is_not_rounded_onto_it() -> None:
    measured = {
        "exact": {"kl_in_company": 9.02e-4, "kl_alone": 4.5e-4},  # 2.004
        "soak": {"members_in_use": 0, "memory_mb": [400.0, 408.1]},  # 1.0203
    }
    held = streams.bars(measured)
    assert not held["KL in company / alone"]["holds"] and not held["memory, late / early"]["holds"]
    exactly = {"exact": {"kl_in_company": 9e-4, "kl_alone": 4.5e-4}}
    assert streams.bars(exactly)["KL in company / alone"]["holds"]
