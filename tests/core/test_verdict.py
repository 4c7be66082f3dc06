"""Verdicts: what a reply came to, key by key, against hand computations."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.verdict import Verdict, Watch
from balcony_edge.device.readings import Reading

EVERYTHING = Budget(
    tpot_ms=30,
    ttft_ms=100,
    deadline_s=2.0,
    expected_tokens=10,
    probability=0.8,
    min_pace_tps=20,
    max_pace_tps=50,
    power_w=5,
    power_window_s=1.0,
    energy_j_per_token=0.2,
    temperature_c=60,
    critical_temperature_c=90,
    gpu_utilization=0.5,
    cpu_utilization=0.4,
    battery_floor_percent=20,
    memory_mb=100,
)


def judged(
    budget: Budget, gaps_ms: list[float], readings: Callable[[float], tuple[Reading, ...]] = lambda now_s: ()
) -> dict[str, Verdict]:
    watch, now_s = Watch(), 1000.0
    for place, gap_ms in enumerate(gaps_ms):
        now_s += gap_ms / 1000
        watch.token(budget, now_s, gap_ms, readings(now_s), first=place == 0)
    return {verdict.key: verdict for verdict in watch.verdicts()}


def a_device(now_s: float) -> tuple[Reading, ...]:
    """4 W, in the second from 1000.5 on 6 W; the counter agrees."""
    hot = 1000.5 <= now_s < 1001.5
    joules = 4 * now_s + 2 * min(max(now_s - 1000.5, 0.0), 1.0)
    return (
        Reading("a", "board", now_s, watts=6.0 if hot else 4.0, joules=joules, celsius=70.0 if hot else 50.0),
        Reading("b", "gpu", now_s, utilization=0.3),
        Reading("c", "cpu", now_s, utilization=0.6 if hot else 0.5),
        Reading("d", "battery", now_s, charge=0.19 if hot else 0.3),
        Reading("e", "process", now_s, memory_bytes=80_000_000),
    )


def test_every_key_has_its_verdict() -> None:
    found = judged(EVERYTHING, [150.0, *[25.0] * 16, *[45.0] * 4, *[25.0] * 80], a_device)
    assert list(found) == [key for key in Budget.model_fields if key in found]
    reached = {key: verdict.reached for key, verdict in found.items()}
    assert reached["tpot_ms"] == 25.0  # 96 of 100 gaps
    assert reached["ttft_ms"] == 150.0
    assert reached["deadline_s"] == pytest.approx((150 + 9 * 25) / 1000)
    mean_s = (96 * 25 + 4 * 45) / 100 / 1000
    assert reached["min_pace_tps"] == reached["max_pace_tps"] == pytest.approx(1 / mean_s)
    assert reached["power_w"] == pytest.approx(6.0, rel=0.05)  # a window of a second within the hot one
    assert reached["energy_j_per_token"] == pytest.approx((4 + 2 * 1.0 / 2.73) * mean_s, rel=0.05)
    assert (reached["temperature_c"], reached["critical_temperature_c"]) == (70.0, 70.0)
    assert reached["gpu_utilization"] == pytest.approx(0.3)
    assert 0.5 < (reached["cpu_utilization"] or 0) < 0.6
    assert reached["battery_floor_percent"] == pytest.approx(19.0)
    assert reached["memory_mb"] == 80.0
    missed = {key for key, verdict in found.items() if not verdict.held}
    assert missed == {"ttft_ms", "power_w", "temperature_c", "cpu_utilization", "battery_floor_percent"}
    assert found["ttft_ms"].margin == pytest.approx(-0.5)
    assert found["memory_mb"].margin == pytest.approx(0.2)
    assert found["battery_floor_percent"].margin == pytest.approx(-0.05)


@pytest.mark.parametrize(
    ("late", "probability", "held"),
    [(2, 0.8, True), (3, 0.8, False), (1, 0.9, True), (2, 0.9, False), (1, 0.95, False)],
)
def test_a_gap_is_held_where_the_asked_share_is_in_time(late: int, probability: float, held: bool) -> None:
    found = judged(Budget(tpot_ms=30, probability=probability), [500.0, *[20.0] * (10 - late), *[31.0] * late])
    assert found["tpot_ms"].held is held
    assert found["tpot_ms"].how == f"{probability * 100:g} % of the gaps within"


def test_what_nothing_measures_has_no_verdict() -> None:
    found = judged(EVERYTHING, [50.0, 20.0])
    blind = {key for key, verdict in found.items() if verdict.held is None}
    assert blind == {
        "power_w", "energy_j_per_token", "temperature_c", "critical_temperature_c", "gpu_utilization", "cpu_utilization",
        "battery_floor_percent", "memory_mb",
    }  # fmt: skip
    assert {found[key].how for key in blind} == {"not measured"}
    assert judged(Budget(tpot_ms=30), [50.0])["tpot_ms"].held is None  # one token has no gap
    assert Watch().verdicts() == ()
    assert judged(Budget(), [50.0, 20.0]) == {}


def test_a_new_budget_begins_anew() -> None:
    watch, first, second = Watch(), Budget(tpot_ms=30, ttft_ms=100), Budget(tpot_ms=10, ttft_ms=100)
    for place, gap_ms in enumerate([50.0, 20.0, 20.0]):
        watch.token(first, place / 10, gap_ms, (), first=place == 0)
    assert [verdict.held for verdict in watch.verdicts()] == [True, True]
    for place in range(3):
        watch.token(second, 1 + place / 10, 20.0, (), first=False)
    tpot, ttft = watch.verdicts()
    assert (tpot.held, tpot.reached, ttft.held) == (False, 20.0, None)  # the first token was another budget's


def test_without_a_counter_samples_are_averaged() -> None:
    def plain(now_s: float) -> tuple[Reading, ...]:
        return (Reading("a", "cpu", now_s, watts=4.0 if round(now_s * 10) % 2 else 8.0),)

    found = judged(Budget(power_w=5, power_rail="cpu"), [100.0] * 101, plain)
    assert found["power_w"].reached == pytest.approx(6.0, rel=0.03)
