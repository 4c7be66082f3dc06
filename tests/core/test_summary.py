"""The summary of a simulated reply, by hand."""

from __future__ import annotations

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.decision import Decision
from balcony_edge.simulation.simulate import SimulatedToken, summary


def test_a_summary_by_hand() -> None:
    """The first token has no gap: two tokens in the 0.4 s after it, 100 and 300 ms."""
    made = ((0.5, 500.0, 8.0, 40.0, 14), (0.6, 100.0, 4.0, 42.0, 30), (0.9, 300.0, 4.0, 41.0, 14))
    tokens = [
        SimulatedToken(time_s, gap_ms, gap_ms, 1.0, watts, celsius, Decision(exit_layer))
        for time_s, gap_ms, watts, celsius, exit_layer in made
    ]
    found = summary(tokens, Budget(tpot_ms=200))
    assert found.pop("tokens_per_exit") == {"14": 2, "30": 1}
    assert found == pytest.approx({
        "tokens": 3,
        "seconds": 0.9,
        "ttft_ms": 500.0,
        "tokens_a_second": 5.0,
        "tpot_mean_ms": 200.0,
        "late_tokens": 1,
        "missed_deadline": None,
        "mean_exit": 58 / 3,
        "exit_switches": 2,
        "mean_w": (8 * 0.5 + 4 * 0.4) / 0.9,
        "max_c": 42.0,
        "infeasible_tokens": 0,
    })  # fmt: skip
    # tokens after the expected ones are free of the deadline
    due = [Budget(deadline_s=0.7, expected_tokens=count) for count in (2, 3)]
    assert [summary(tokens, budget)["missed_deadline"] for budget in due] == [False, True]
    # a run that ended in time before the expected tokens tells nothing
    assert summary(tokens, Budget(deadline_s=1.0, expected_tokens=4))["missed_deadline"] is None
    assert summary(tokens, Budget(deadline_s=0.7, expected_tokens=4))["missed_deadline"] is True
