"""The words of a decision: one sentence that does not contradict itself."""

from __future__ import annotations

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.decision import Decision, Stayed, device_words
from balcony_edge.control.governor import Governor

BUDGET = Budget(tpot_ms=160, temperature_c=78)


@pytest.mark.parametrize(
    ("period_ms", "reason"),
    [
        (0.0, "deepest exit within 160 ms (p=0.99)"),
        (150.0, "deepest exit within 160 ms (p=0.99); limited by temperature_c, paced to 6.7 tokens a second"),
        (
            1000.0,
            "deepest exit within its ceilings (p=0.99); limited by temperature_c, paced to 1.0 tokens a second, "
            "which gives up tpot_ms = 160",
        ),
    ],
)
def test_a_pace_below_the_target_does_not_claim_the_target(period_ms: float, reason: str) -> None:
    governor = Governor()._replace(binding=("temperature_c",) if period_ms else ())
    words = (Stayed(BUDGET), *device_words(governor, BUDGET, period_ms))
    decision = Decision(30, 5.0, 5.0, 0.99, period_ms=period_ms, words=words)
    assert decision.reason == reason
