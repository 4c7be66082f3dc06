"""The filter between readings and our busy share, one reading at a time: what it learns, from which time, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest

from balcony_edge.control.response import (
    BASE_VARIANCE,
    BETTER,
    GAIN_VARIANCE,
    GAUGES,
    PAST_S,
    READING_VARIANCE,
    STILL_S,
    Counter,
    Fit,
    Load,
    Sample,
)

SCALE = 5.0


def kalman(fit: Fit, observations: list[tuple[list[float], float]]) -> list[float]:
    """Base, gain, variances and covariance after a drift and observations (row, value), by matrices."""
    mean = np.array([fit.base, fit.gain])
    spread = np.array([[fit.base_variance, fit.covariance], [fit.covariance, fit.gain_variance]])
    spread += np.diag([BASE_VARIANCE, GAIN_VARIANCE])
    for row, value in observations:
        h = np.array(row)
        weight = spread @ h / (h @ spread @ h + READING_VARIANCE)
        mean = np.maximum(mean + weight * (value - h @ mean), 0)
        spread = spread - np.outer(weight, h @ spread)
    return [*mean, spread[0, 0], spread[0, 1], spread[1, 1]]


@pytest.mark.parametrize("fit", [Fit(), Fit(0.3, 0.9, 0.04, -0.01, 0.09, error=0.2)])
@pytest.mark.parametrize(
    ("share", "value", "own"), [(0.25, 0.8, None), (0.25, 0.8, 0.3), (1.0, 0.2, 0.5), (0.5, 0.01, None)]
)
def test_a_reading_is_a_kalman_update(fit: Fit, share: float, value: float, own: float | None) -> None:
    after = fit.learn(share, value, own)
    # With our own part known, the rest of the reading is the base, and our part is the gain at our share.
    rows = [([1.0, share], value)] if own is None else [([1.0, 0.0], max(value - own, 0)), ([0.0, share], own)]
    assert list(after[:5]) == pytest.approx(kalman(fit, rows))
    assert after.error == pytest.approx(0.93 * fit.error + (value - fit.base - fit.gain * share) ** 2)


def test_base_and_gain_are_never_negative() -> None:
    sure = Fit(0.1, 0.1, 1.0, 0.0, 1.0)
    for own in (None, 0.0):
        for share in (0.0, 1.0):
            after = sure.learn(share, 0.0, own)
            assert after.base >= 0 and after.gain >= 0
    assert Fit(0.1, 0.9, 1.0, 0.9, 1.0).learn(0.0, -9.0, None)[:2] == (0.0, 0.0)


@pytest.mark.parametrize("spike", [25.0, 400.0])
def test_one_wrong_reading_is_forgotten_within_seconds(spike: float) -> None:
    """600 W for 12: our part would then count as dozens of ceilings, and tokens so slow that nothing shows the contrary."""
    fit = Fit()
    for share in (0.0, 1.0, 0.6, 0.5, 0.7, 0.6) * 4:
        fit = fit.learn(share, 0.25 + 1.25 * share, None)
    fit = fit.learn(0.6, spike, None)
    for _ in range(10):
        share = min(max((1 - fit.base) / max(fit.gain, 0.02), 0.05), 1.0)
        fit = fit.learn(share, 0.25 + 1.25 * share, None)
    assert (1 - fit.base) / fit.gain == pytest.approx(0.6, abs=0.05)


def test_a_rail_that_draws_nothing_at_first_is_learned_within_seconds() -> None:
    """As a Jetson's GPU. Its first watts are the scale of a budget of joules, so 8 W are 8,000 units."""
    load = Load(1e-3)
    for tick in range(300):  # idle for a second, then at full share
        load = load.see(Sample(0.0 if tick < 10 else 8.0), tick / 10, max(tick - 9, 0) / 10)
    assert load.at(1.0) == pytest.approx(8, rel=0.05)


def busy_s(time_s: float) -> float:
    """Our busy seconds: nothing, then a share of 0.8 from 0.3 s on."""
    return 0.8 * max(time_s - 0.3, 0.0)


def fed(
    samples: Iterable[tuple[float, Sample]], load: Load | None = None, busy: Callable[[float], float] = busy_s
) -> Load:
    """A load that has seen samples at their times."""
    load = load or Load(SCALE)
    for now_s, sample in samples:
        load = load.see(sample, now_s, busy(now_s))
    return load


def steady(value: float, begin: int, end: int) -> list[tuple[float, Sample]]:
    """The same value every 0.1 s, in tenths of a second."""
    return [(tick / 10, Sample(value)) for tick in range(begin, end)]


def expected(ends_s: float, span_s: float, value: float, own: float | None = None, instant: bool = False) -> list[Fit]:
    """What each gauge's filter has after its first lesson, for a gauge that averages over ``span_s`` until ``ends_s``."""
    fits = []
    for delay_s, average_s in GAUGES:
        end_s = ends_s - delay_s
        begin_s = end_s - (max(average_s, span_s) if instant else average_s + span_s)
        share = (busy_s(end_s) - busy_s(begin_s)) / (end_s - begin_s)
        fits.append(Fit().learn(share, value / SCALE, own))
    return fits


def assert_learned(load: Load, fits: list[Fit]) -> None:
    assert np.array(load.fits) == pytest.approx(np.array(fits))


def test_half_a_second_of_readings_is_one_lesson() -> None:
    samples = [(tick / 10, Sample(float(value))) for tick, value in enumerate((9, 3, 4, 5, 6, 7))]
    before = fed(samples[:-1])
    assert before.fits == Load(SCALE).fits
    load = fed(samples[-1:], before)
    assert_learned(load, expected(0.5, 0.5, 5.0))  # the first reading only begins the average
    assert (load.since_s, load.samples, load.total) == (0.5, 0, 0.0)
    again = fed([(0.5 + tick / 10, Sample(float(value))) for tick, value in ((1, 2), (2, 8), (3, 2), (4, 8))], load)
    assert (again.since_s, again.samples, again.total, again.fits) == (0.5, 4, 20.0, load.fits)


def test_a_first_value_that_does_not_change_is_an_average() -> None:
    assert_learned(fed(steady(3.0, 0, 6)), expected(0.5, 0.5, 3.0))


@pytest.mark.parametrize(
    ("parts", "own"),
    [
        ((9.0, 0.5, 1.0, 1.5, 2.0, 2.5), 1.5),
        ((None, 0.5, 1.0, 1.5, 2.0, 2.5), 1.5),  # that reading only begins the average
        ((9.0, None, 1.0, 1.5, 2.0, 2.5), None),
        ((9.0, 0.5, 1.0, None, 2.0, 2.5), None),
        ((9.0, 0.5, 1.0, 1.5, 2.0, None), None),
    ],
)
def test_our_part_is_known_for_all_readings_or_for_none(parts: tuple[float | None, ...], own: float | None) -> None:
    load = fed((tick / 10, Sample(3.0 + tick, part)) for tick, part in enumerate(parts))
    assert_learned(load, expected(0.5, 0.5, 6.0, None if own is None else own / SCALE))


def test_a_counter_says_more_than_samples() -> None:
    def counted(watts: float, source: str = "a") -> Load:
        joules = [
            (tick / 10, Counter(100 + watts * tick / 10, tick / 10, (source if tick else "a",))) for tick in range(6)
        ]
        return fed((now_s, Sample(8.0, counter=counter)) for now_s, counter in joules)

    assert_learned(counted(4.0), expected(0.5, 0.5, 4.0))
    assert_learned(counted(4.0, source="b"), expected(0.5, 0.5, 8.0))  # the counters do not compare


@pytest.mark.parametrize(("watts", "news"), [(3.0, False), (3.05, False), (3.07, True), (2.93, True), (2.95, False)])
def test_a_counter_that_leaves_a_still_value_is_news(watts: float, news: bool) -> None:
    def sample(tick: int) -> tuple[float, Sample]:
        joules = 3.0 * min(tick, 5) / 10 + watts * max(tick - 5, 0) / 10
        return tick / 10, Sample(3.0, counter=Counter(joules, tick / 10, ("a",)))

    first = fed(sample(tick) for tick in range(6))
    second = fed((sample(tick) for tick in range(6, 11)), first)
    assert (second.fits != first.fits) is news
    if news:
        share = 0.8  # of the half second
        assert second.fits[0] == pytest.approx(first.fits[0].learn(share, watts / SCALE, None))


def test_a_gauge_that_holds_its_value_shows_instants() -> None:
    first = fed(steady(3.0, 0, 11))
    assert_learned(first, expected(0.5, 0.5, 3.0))  # the second half second brought nothing new
    later = [
        (tick / 10, Sample(4.0, own=0.1 * tick, counter=Counter(tick, tick / 10, ("a",)))) for tick in range(11, 16)
    ]
    load = fed(later, first)
    assert load.held_s == pytest.approx(1.1)
    for (delay_s, average_s), before, after in zip(GAUGES, first.fits, load.fits, strict=True):
        end_s = 1.1 - delay_s
        begin_s = end_s - max(average_s, 0.1)
        share = (busy_s(end_s) - busy_s(begin_s)) / (end_s - begin_s)
        assert after == pytest.approx(before.learn(share, 4.0 / SCALE, 1.5 / SCALE))


def test_a_gauge_that_held_its_value_for_less_shows_averages() -> None:
    first = fed([*steady(3.0, 0, 8), *steady(4.0, 8, 11)])
    # 3, 3, 4, 4 and 4 W in the second half second
    assert first.fits[0] == pytest.approx(expected(0.5, 0.5, 3.0)[0].learn(0.8, 3.6 / SCALE, None))


def test_a_value_that_does_not_change_counts_after_a_while() -> None:
    load = fed(steady(3.0, 0, 6))
    silent = fed(steady(3.0, 6, round(10 * STILL_S)), load)
    assert silent.fits == load.fits and silent.since_s == pytest.approx(STILL_S - 0.5)
    assert fed(steady(3.0, round(10 * STILL_S), round(10 * STILL_S) + 1), silent).fits != load.fits


def test_an_earlier_time_is_another_clock() -> None:
    load = fed(steady(3.0, 0, 30))
    for before in (load, load.restarted()):  # the slow loop restarts its loads before they see the earlier time
        after = before.see(Sample(3.0), 1.0, 7.0)
        assert (after.past, after.since_s, after.shown_s, after.held_s) == (((1.0, 7.0),), 1.0, 1.0, 0.0)
        assert after.fits == load.fits


def test_our_share_is_between_nothing_and_all() -> None:
    load = Load(1.0, past=((10.0, 4.0), (12.0, 5.0), (13.0, 7.0)))
    assert load.share(10.0, 12.0) == 0.5
    assert load.share(9.0, 10.0) == 0.0
    assert load.share(11.0, 12.5) == pytest.approx((6.0 - 4.5) / 1.5)
    assert load.share(12.0, 13.0) == 1.0  # two seconds in one: a clock is wrong
    assert load.share(8.0, 12.0) == 0.25  # nothing is known of the first two seconds
    assert load.share(13.0, 15.0) == 0.0
    assert load.share(12.0, 12.0) == load.share(12.0, 11.0) == 0.0
    assert Load(1.0, past=((10.0, 4.0), (12.0, 3.0))).share(10.0, 12.0) == 0.0


def test_value_and_share_are_each_others_answers() -> None:
    load = Load(SCALE, fits=(Fit(0.2, 0.5), *Load(SCALE).fits[1:]))
    assert load.at(0.4) == pytest.approx(2.0)
    assert load.share_within(2.0) == pytest.approx(0.4)
    assert load.share_within(0.5) == pytest.approx(-0.2)
    # a device on which our load has no effect: the share is not divided by 0
    assert Load(SCALE, fits=(Fit(0.2, 0.0),)).share_within(2.0) == pytest.approx((2.0 - 0.2 * SCALE) / (0.02 * 2.0))
    # the first ceiling was 300 W, and this one is 6 W: of 3 W and 2.5 W more when busy nothing has to wait
    assert Load(300.0, fits=(Fit(3 / 300, 2.5 / 300),)).share_within(6.0) == pytest.approx(1.2)
    assert load._replace(best=1).at(0.4) == pytest.approx(SCALE * 0.7)


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ((0.0, 0.1, 0.2), (0.0, 0.2)),
        ((0.0, 0.2, 0.25), (0.0, 0.2, 0.25)),  # the last one is always there
        ((-0.1, 0.0, 0.2), (-0.1, 0.0, 0.2)),
    ],
)
def test_an_entry_goes_if_it_is_near_to_both_others(times: tuple[float, ...], kept: tuple[float, ...]) -> None:
    load = fed((time_s, Sample(1.0)) for time_s in times)
    assert tuple(time_s for time_s, _ in load.past) == kept


def test_the_past_has_entries_of_thirteen_seconds_and_few_of_them() -> None:
    load = fed(steady(3.0, 0, 301), busy=lambda time_s: time_s / 2)
    times = [time_s for time_s, _ in load.past]
    steps = [late - early for early, late in pairwise(times)]
    assert min(steps[:-1]) >= 0.2 - 1e-9 and max(steps) <= 0.3 + 1e-9 and times[-1] == 30.0
    assert times[0] < 30.0 - PAST_S <= times[1]  # one more, so that the oldest span is whole
    assert all(busy == time_s / 2 for time_s, busy in load.past)
    assert load.share(30.0 - PAST_S, 30.0) == pytest.approx(0.5)


@pytest.mark.parametrize(("error", "best"), [(BETTER - 0.01, 3), (BETTER + 0.01, 0)])
def test_another_gauge_is_used_only_where_it_is_clearly_better(error: float, best: int) -> None:
    fits = [Fit(error=1.0)] * len(GAUGES)
    fits[3] = Fit(error=error)
    # idle at 0.5 of the scale: just what all of them predict
    load = fed(steady(0.5 * SCALE, 0, 6), Load(SCALE, fits=tuple(fits)), busy=lambda _: 0.0)
    assert load.best == best
    assert load.fits[3].error == pytest.approx(0.93 * error)


def test_a_restarted_load_keeps_what_it_knows() -> None:
    load = fed([*steady(3.0, 0, 6), (0.6, Sample(4.0, own=1.0))])
    rested = load.restarted()
    assert (rested.since_s, rested.total, rested.own, rested.samples, rested.changes) == (-math.inf, 0.0, None, 0, 0)
    assert (rested.fits, rested.past, rested.shown) == (load.fits, load.past, 4.0)
