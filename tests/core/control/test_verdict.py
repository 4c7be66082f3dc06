"""Verdicts: what a reply came to, key by key, against hand computations."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.response import Sample
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


@pytest.mark.parametrize(
    ("keys", "gap_ms", "key", "held", "margin"),
    [
        ({"tpot_ms": 20}, 20.0, "tpot_ms", True, 0.0),
        ({"tpot_ms": 20}, 20.1, "tpot_ms", False, -0.005),
        ({"min_pace_tps": 20}, 40.0, "min_pace_tps", True, 0.25),
        ({"min_pace_tps": 20}, 1000 / 19.81, "min_pace_tps", True, -0.0095),  # clocks are not exact: 1 % is allowed
        ({"min_pace_tps": 20}, 1000 / 19.79, "min_pace_tps", False, -0.0105),
        ({"max_pace_tps": 20}, 62.5, "max_pace_tps", True, 0.2),
        ({"max_pace_tps": 20}, 1000 / 20.19, "max_pace_tps", True, -0.0095),
        ({"max_pace_tps": 20}, 1000 / 20.21, "max_pace_tps", False, -0.0105),
    ],
)
def test_a_target_is_held_up_to_its_value(
    keys: dict[str, float], gap_ms: float, key: str, held: bool, margin: float
) -> None:
    verdict = judged(Budget(**keys), [100.0, *[gap_ms] * 9])[key]
    assert verdict.held is held
    assert verdict.margin == pytest.approx(margin, abs=1e-9)


@pytest.mark.parametrize(
    ("celsius", "ceiling_held", "critical_held"), [(89.9, True, True), (90.0, True, False), (90.1, False, False)]
)
def test_a_ceiling_is_held_up_to_its_value_and_a_critical_one_below(
    celsius: float, ceiling_held: bool, critical_held: bool
) -> None:
    heat = (Reading("t", "cpu", 1000.02, celsius=celsius),)
    for budget, held in (
        (Budget(temperature_c=90), ceiling_held),
        (Budget(critical_temperature_c=90), critical_held),
    ):
        (verdict,) = judged(budget, [20.0, 20.0], lambda _: heat).values()
        assert (verdict.reached, verdict.held, verdict.how) == (celsius, held, "highest")


@pytest.mark.parametrize(("percent", "held"), [(20, True), (19, False), (30, True)])
def test_a_charge_is_held_down_to_its_floor(percent: int, held: bool) -> None:
    charges = iter([0.5, percent / 100, 0.6])

    def battery(now_s: float) -> tuple[Reading, ...]:
        return (Reading("b", "battery", now_s, charge=next(charges)),)

    verdict = judged(Budget(battery_floor_percent=20), [100.0, 200.0, 200.0], battery)["battery_floor_percent"]
    assert (verdict.reached, verdict.held, verdict.how) == (pytest.approx(percent), held, "lowest")
    assert verdict.margin == pytest.approx((percent - 20) / 20)


@pytest.mark.parametrize("percent", [7, 28, 29, 57, 58])
def test_a_charge_at_its_floor_is_held_whatever_its_digits(percent: int) -> None:
    """Drivers tell whole percents, so a charge is at its floor for minutes. 29 % is 0.29, and 100 x 0.29 is below 29."""

    def battery(now_s: float) -> tuple[Reading, ...]:
        return (Reading("b", "battery", now_s, charge=percent / 100),)

    (verdict,) = judged(Budget(battery_floor_percent=percent), [100.0, 200.0], battery).values()
    assert (verdict.reached, verdict.held, verdict.margin) == (percent, True, 0.0)


def test_a_battery_that_charges_has_no_floor() -> None:
    """The controller holds nothing then."""

    def battery(now_s: float) -> tuple[Reading, ...]:
        return (Reading("b", "battery", now_s, charge=0.15, charging=True),)

    verdict = judged(Budget(battery_floor_percent=20), [100.0, 200.0], battery)["battery_floor_percent"]
    assert (verdict.reached, verdict.held) == (None, None)


def test_readings_are_kept_every_tenth_of_a_second() -> None:
    shares = iter([0.1, 0.9, 0.3, 0.9, 0.5])

    def gpu(now_s: float) -> tuple[Reading, ...]:
        return (Reading("g", "gpu", now_s, utilization=next(shares)),)

    watch, budget = Watch(), Budget(gpu_utilization=0.5)
    for now_s in (1.0, 1.0625, 1.125, 1.1875, 1.25):
        watch.token(budget, now_s, 62.5, gpu(now_s), first=now_s == 1.0)
    watch.saw(2.0, ())  # no readings are no zeros
    (verdict,) = watch.verdicts()
    assert (verdict.reached, verdict.held, verdict.how) == (pytest.approx(0.3), None, "mean")


def test_each_processor_is_judged_by_its_own_readings() -> None:
    def both(now_s: float) -> tuple[Reading, ...]:
        return (Reading("g", "gpu", now_s, utilization=0.2), Reading("c", "cpu", now_s, utilization=0.6))

    found = judged(Budget(gpu_utilization=0.5, cpu_utilization=0.5), [200.0] * 3, both)
    assert (found["gpu_utilization"].reached, found["gpu_utilization"].margin) == pytest.approx((0.2, 0.6))
    assert (found["cpu_utilization"].reached, found["cpu_utilization"].held) == (pytest.approx(0.6), False)


@pytest.mark.parametrize(
    ("window_s", "reached"),
    [
        (1.0, 10.0),  # seconds 2 to 3
        (2.0, 7.0),  # seconds 1 to 3 or 2 to 4
        (4.0, 5.5),
        (60.0, 5.5),  # longer than the reply: the mean of all of it
    ],
)
def test_the_highest_mean_power_over_the_window_by_the_counter(window_s: float, reached: float) -> None:
    """4 W, for one of four seconds 10 W; the samples of watts miss it."""

    def counted(now_s: float) -> tuple[Reading, ...]:
        passed_s = now_s - 1000.0
        joules = 4 * passed_s + 6 * min(max(passed_s - 2.0, 0.0), 1.0)
        return (Reading("a", "board", now_s, watts=4.0, joules=joules),)

    verdict = judged(Budget(power_w=5, power_window_s=window_s), [0.0, *[250.0] * 16], counted)["power_w"]
    assert verdict.reached == pytest.approx(reached)
    assert verdict.how == f"highest mean of {window_s:g} s"


def test_windows_of_minutes_look_at_each_reading_once() -> None:
    """A window for each of them took seconds of a reply of ten minutes, in which the server served nobody."""
    looks = 0

    class Looked(Sample):
        @property
        def value(self) -> float:  # type: ignore[override]
            nonlocal looks
            looks += 1
            return 5.0

    watch, budget = Watch(), Budget(power_w=5, power_window_s=10)
    for place in range(400):
        watch.token(budget, place / 10, 100.0, (), first=place == 0)
    watch._seen = [one._replace(power=Looked(5.0)) for one in watch._seen]
    (verdict,) = watch.verdicts()
    assert (verdict.reached, looks) == (5.0, len(watch._seen))


def test_the_highest_mean_power_over_the_window_by_samples() -> None:
    powers = iter([8.0, 4.0, 4.0, 4.0, 6.0, 8.0, 8.0, 2.0])

    def sampled(now_s: float) -> tuple[Reading, ...]:
        return (Reading("a", "board", now_s, watts=next(powers)),)

    verdict = judged(Budget(power_w=5, power_window_s=1), [0.0, *[500.0] * 7], sampled)["power_w"]
    assert verdict.reached == pytest.approx((6 + 8 + 8) / 3)  # three samples within a second
    assert verdict.held is False


def test_joules_of_a_token_are_watts_times_its_mean_gap() -> None:
    def board(now_s: float) -> tuple[Reading, ...]:
        return (Reading("a", "board", now_s, watts=6.0),)

    (verdict,) = judged(Budget(energy_j_per_token=0.2), [500.0, 20.0, 40.0], board).values()
    assert verdict.reached == pytest.approx(6 * 0.03)  # without the time to the first token
    assert (verdict.held, verdict.how) == (True, "mean")
    assert verdict.margin == pytest.approx(0.1)
    (lonely,) = judged(Budget(energy_j_per_token=0.2), [500.0], board).values()
    assert (lonely.reached, lonely.how) == (None, "not measured")


def test_a_deadline_counts_its_tokens_and_no_further_ones() -> None:
    budget = Budget(deadline_s=1, expected_tokens=4)
    (verdict,) = judged(budget, [400.0, *[200.0] * 9]).values()
    assert (verdict.reached, verdict.held, verdict.how) == (pytest.approx(1.0), True, "4 tokens")
    (early,) = judged(budget, [400.0, 100.0]).values()
    assert (early.reached, early.how) == (pytest.approx(0.5), "2 tokens")


def test_a_budget_set_within_a_reply_has_no_first_token() -> None:
    watch, late = Watch(), Budget(ttft_ms=100, deadline_s=1, expected_tokens=4, min_pace_tps=20)
    watch.saw(0.0, (Reading("t", "cpu", 0.0, celsius=50.0),))  # before any token: nothing to judge
    assert watch.verdicts() == ()
    watch.token(Budget(), 0.5, 500.0, (), first=True)
    for now_s in (0.6, 0.7):
        watch.token(late, now_s, 40.0, (), first=False)
    ttft, deadline, pace = watch.verdicts()
    assert (ttft.held, deadline.held) == (None, None)
    assert (pace.reached, pace.held) == (pytest.approx(25.0), True)  # both gaps are between tokens
    assert pace.to_dict() == {
        "key": "min_pace_tps", "asked": 20, "reached": 25.0, "held": True, "margin": 0.25, "how": "mean"
    }  # fmt: skip


def test_nothing_is_a_reading() -> None:
    def idle(now_s: float) -> tuple[Reading, ...]:
        return (
            Reading("p", "process", now_s, memory_bytes=0),
            Reading("c", "cpu", now_s, utilization=0.0),
            Reading("a", "board", now_s, watts=0.0),
        )

    found = judged(Budget(memory_mb=100, cpu_utilization=0.5, power_w=5), [100.0] * 3, idle)
    assert {key: verdict.reached for key, verdict in found.items()} == {
        "power_w": 0.0, "cpu_utilization": 0.0, "memory_mb": 0.0
    }  # fmt: skip
    assert all(verdict.held and verdict.margin == 1.0 for verdict in found.values())


def test_gaps_of_no_time_have_no_pace() -> None:
    assert judged(Budget(max_pace_tps=20), [100.0, 0.0, 0.0])["max_pace_tps"].held is None


def test_the_reading_that_ends_a_reply_counts_however_soon_it_comes() -> None:
    limit = Budget(critical_temperature_c=75.0)
    hot = (Reading("b", "board", 10.05, celsius=80.0),)
    for ends, held in ((True, False), (False, True)):
        watch = Watch()
        watch.token(limit, 10.0, 20.0, (Reading("b", "board", 10.0, celsius=50.0),), first=True)
        watch.saw(10.05, hot) if ends else watch.token(limit, 10.05, 20.0, hot, first=False)
        assert [verdict.held for verdict in watch.verdicts()] == [held]


def test_joules_of_later_tokens_leave_out_the_prompt() -> None:
    """The first reading is older than a prompt of ten seconds at 8 W; the tokens after it take 4 W."""

    def measured(now_s: float) -> tuple[Reading, ...]:
        joules = 8 * min(now_s, 1010.0) + 4 * max(now_s - 1010.0, 0.0)
        return (Reading("board", "board", now_s, watts=4.0, joules=joules),)

    watch, budget, now_s = Watch(), Budget(energy_j_per_token=0.25), 1000.0
    for place, gap_ms in enumerate([10_000.0, *[50.0] * 40]):
        # a token is told with the reading that its decision was made from, which is from before its step
        watch.token(budget, now_s, gap_ms, measured(now_s), first=place == 0)
        now_s += gap_ms / 1000
    (verdict,) = watch.verdicts()
    assert verdict.reached == pytest.approx(4.0 * 0.05, rel=0.01) and verdict.held


def test_joules_leave_out_the_prompt_of_a_reply_that_begins_with_forced_tokens() -> None:
    """A token that came with the first one has its reading, from before a prompt of ten seconds at 8 W."""

    def measured(now_s: float) -> tuple[Reading, ...]:
        joules = 8 * min(now_s, 1010.0) + 4 * max(now_s - 1010.0, 0.0)
        return (Reading("board", "board", now_s, watts=4.0, joules=joules),)

    watch, budget = Watch(), Budget(energy_j_per_token=0.25)
    for gap_ms in (10_000.0, 0.0):
        watch.token(budget, 1000.0, gap_ms, measured(1000.0), first=gap_ms > 0)
    for place in range(40):
        now_s = 1010.0 + 0.05 * place
        watch.token(budget, now_s, 50.0, measured(now_s), first=False)
    (verdict,) = watch.verdicts()
    assert verdict.reached == pytest.approx(4.0 * 0.05 * 40 / 41, rel=0.01) and verdict.held


def test_joules_of_a_token_have_its_readers_time() -> None:
    """Steps of 0.1 s at 8 W, and 0.9 s at 2 W in which the reader is at a token: 2.6 J from token to token."""

    def measured(now_s: float) -> tuple[Reading, ...]:
        whole, part = divmod(now_s - 1000.0, 1.0)
        joules = 2.6 * whole + 8 * min(part, 0.1) + 2 * max(part - 0.1, 0.0)
        return (Reading("board", "board", now_s, watts=8.0, joules=joules),)

    watch, budget = Watch(), Budget(energy_j_per_token=1.0)
    for place in range(20):
        now_s = 1000.0 + place
        watch.token(budget, now_s, 100.0, measured(now_s), first=place == 0, elapsed_s=place + 0.1)
    (verdict,) = watch.verdicts()
    assert (verdict.reached, verdict.held) == (pytest.approx(2.6), False)


@pytest.mark.parametrize(("most_w", "held"), [(15.0, None), (3.0, False)])
def test_a_sensor_that_goes_proves_nothing(most_w: float, held: bool | None) -> None:
    """What was measured before may show that a ceiling was not held, and not that it was."""

    def for_a_second(now_s: float) -> tuple[Reading, ...]:
        watts = (Reading("board", "board", now_s, watts=4.0),) if now_s < 1001 else ()
        return (*watts, Reading("cpu", "cpu", now_s, celsius=50.0))

    def a_battery_for_a_second(now_s: float) -> tuple[Reading, ...]:
        gauge = (Reading("battery:0", "battery", now_s, charge=0.25),) if now_s < 1001 else ()
        return (*gauge, Reading("cpu", "cpu", now_s, celsius=50.0))

    floor = judged(Budget(battery_floor_percent=20 if held is None else 30), [100.0] * 40, a_battery_for_a_second)
    assert (floor["battery_floor_percent"].reached, floor["battery_floor_percent"].held) == (25.0, held)
    found = judged(Budget(power_w=most_w, temperature_c=60), [100.0] * 40, for_a_second)
    assert (found["power_w"].reached, found["power_w"].held) == (4.0, held)
    assert found["temperature_c"].held is True
    nothing_else = judged(Budget(power_w=most_w), [100.0] * 40, lambda now_s: for_a_second(now_s)[:-1])
    assert (nothing_else["power_w"].reached, nothing_else["power_w"].held) == (4.0, held)
