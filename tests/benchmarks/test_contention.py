"""The competitor of benchmarks/control/contention.py that is chosen by trial."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.control import contention


@pytest.mark.parametrize(("slowed_ms", "nice", "slowdown"), [((12, 17, 19), 6, 1.7), ((19, 20), 8, 1.9)])
def test_the_slowdown_is_that_of_the_chosen_competitor(
    monkeypatch: pytest.MonkeyPatch, slowed_ms: tuple[float, ...], nice: int, slowdown: float
) -> None:
    """Target 20 ms, idle 10 ms; in the second case the weakest competitor is too strong already, and it runs."""
    times = iter((10, *slowed_ms))
    monkeypatch.setattr(contention, "_typical_ms", lambda *_: next(times))
    monkeypatch.setattr(contention, "competitor", lambda *_: nullcontext(0.0))
    llm: Any = SimpleNamespace(exit_layers=(2, 5))
    assert contention._choose_nice(llm, 20.0) == (nice, pytest.approx(slowdown))
