"""What operators read from the metrics."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from balcony_edge.control.governor import LEAST_PACE_TPS
from balcony_runtime.serve.http.server import Server
from balcony_runtime.serve.work.metrics import _DURATIONS, _FIRST, _GAPS, _PER_TOKEN
from balcony_runtime.serve.work.service import Limits
from tests.serve.client import CHAT, HELLO, metric


def test_a_histogram_reaches_as_far_as_its_times() -> None:
    """Prometheus shows no quantile above the last bucket, so that an alarm above it never rings."""
    assert min(_DURATIONS[-1], _FIRST[-1]) >= Limits().request_s
    assert min(_PER_TOKEN[-1], _GAPS[-1]) >= 2 / LEAST_PACE_TPS, "what a ceiling leaves"


def test_the_share_of_late_tokens_is_one_of_tokens_with_a_target(serve: Callable[..., Server]) -> None:
    """Requests without one also have gaps."""
    url = serve(name="tiny").url
    for budget in ({"tpot_ms": 5000}, {"tpot_ms": 0.001}, {}):
        asked = HELLO | {"ignore_eos": True, "budget": budget}
        assert httpx.post(url + CHAT, json=asked, timeout=60).status_code == 200
    names = ("token_gap_seconds_count", "timed_tokens_total", "late_tokens_total")
    assert [metric(url, f"balcony_{name}") for name in names] == [15, 10, 5]
