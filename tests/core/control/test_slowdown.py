"""The slowdown filter: the Kalman update, outliers, changes of load, noise, ramps."""

from __future__ import annotations

import math
import random

import pytest

from balcony_edge.control.slowdown import (
    CATCH_UP_VARIANCE,
    DECAY_TOKENS,
    EXIT_VARIANCE,
    NOISE_FLOOR,
    OFFSET_DECAY,
    PROCESS_VARIANCE,
    Slowdown,
)


def test_filter_update_is_the_kalman_one() -> None:
    before = Slowdown(mean=0.1, variance=0.0003, noise_variance=0.0004).for_exits(2)
    after = before.update(1, 0.12, noise_scale=1.0)
    prior, total = 0.0004, 0.0004 + EXIT_VARIANCE + 0.0004
    assert after.mean == pytest.approx(0.1 + prior / total * 0.02)
    assert after.variance == pytest.approx(prior * (1 - prior / total))
    assert after.offsets == pytest.approx((0.0, EXIT_VARIANCE / total * 0.02, 0.0))
    assert after.offset_variances[0] == pytest.approx(EXIT_VARIANCE)
    assert after.offset_variances[1] == pytest.approx(EXIT_VARIANCE * (1 - EXIT_VARIANCE / total))
    assert after.offset_variances[2] == pytest.approx(CATCH_UP_VARIANCE)
    assert after.surprise == 0


# One deviation of a sample at exit 1 is 0.08: the square root of 0.0015 + 0.0001 of the device, 0.0016 of the exit and
# 0.0032 of the sample, which is twice as noisy as usual.
HALF_SURE = Slowdown(
    mean=0.1,
    variance=0.0015,
    process_variance=0.0001,
    noise_variance=0.0016,
    offsets=(0.0, 0.05, 0.0),
    offset_variances=(EXIT_VARIANCE, 0.0016, CATCH_UP_VARIANCE),
    drift=1.0,
)


def half_sure(deviations: float, before: Slowdown = HALF_SURE) -> Slowdown:
    """The filter after a sample that is so many deviations slower than expected."""
    return before.update(1, 0.15 + 0.08 * deviations, noise_scale=2.0)


def test_a_sample_teaches_device_exit_and_noise_by_hand() -> None:
    after = half_sure(2)  # an innovation of 0.16: a quarter to the device, a quarter to the exit
    assert after.mean == pytest.approx(0.1 + 0.04)
    assert after.offsets == pytest.approx((0.0, 0.05 + 0.04, 0.0))
    assert after.variance == after.offset_variances[1] == pytest.approx(0.75 * 0.0016)
    assert after.noise_variance == pytest.approx(0.0016 + ((0.08**2 + 0.5 * 0.0032) / 2 - 0.0016) / 4)
    assert after.process_variance == pytest.approx(0.3 * 0.0001 + 0.7 * 0.04**2)
    assert (after.surprise, after.age) == (0, 1)
    assert after.drift == pytest.approx(0.8 * 1.0 + 2)
    surplus = math.exp(0.31) - 1
    assert after.ratio_mean == pytest.approx(1 + surplus / 64)
    assert after.ratio_variance == pytest.approx(63 / 64 * (0.09 + surplus**2 / 64))


@pytest.mark.parametrize("side", [1, -1])
def test_an_outlier_moves_nothing_but_the_doubt(side: int) -> None:
    after = half_sure(2.6 * side)
    assert after.surprise == side
    assert (after.mean, after.offsets, after.drift) == (HALF_SURE.mean, HALF_SURE.offsets, HALF_SURE.drift)
    assert after.variance == pytest.approx(0.0016)  # as after any token
    clipped = ((2.5 * 0.08) ** 2 - 2 * 0.0016) / 2  # the noise sees it at the limit of what is no surprise
    assert after.noise_variance == pytest.approx(0.0016 + 0.05 * (clipped - 0.0016))
    ratio = math.exp(0.15 + 0.08 * 2.6 * side)
    assert after.ratio_mean == pytest.approx(1 + (ratio - 1) / 64)
    assert after.ratio_variance == pytest.approx(63 / 64 * (0.09 + (ratio - 1) ** 2 / 64))


@pytest.mark.parametrize("side", [1, -1])
def test_outliers_on_opposite_sides_are_no_change_of_load(side: int) -> None:
    after = half_sure(-8.0 * side, half_sure(2.6 * side))
    assert (after.mean, after.surprise) == (HALF_SURE.mean, -side)


@pytest.mark.parametrize(
    ("before", "deviations", "surprise"),
    [
        (HALF_SURE._replace(surprise=1), 4.0, 1),
        (HALF_SURE._replace(surprise=-1), -4.0, -1),
        (HALF_SURE._replace(drift=5.0), 2.0, 0),  # 0.8 × 5 + 2 is above the limit of the drift
        (HALF_SURE._replace(drift=-5.0), -2.0, 0),
    ],
    ids=["slower", "faster", "drift up", "drift down"],
)
def test_a_change_of_load_makes_the_past_count_little(before: Slowdown, deviations: float, surprise: int) -> None:
    after = half_sure(deviations, before)
    innovation = 0.08 * deviations
    total = innovation**2 + 0.0016 + 0.0032
    assert after.mean == pytest.approx(0.1 + innovation**2 / total * innovation)
    assert after.variance == pytest.approx(innovation**2 * (1 - innovation**2 / total))
    assert after.process_variance == PROCESS_VARIANCE
    assert (after.surprise, after.drift) == (surprise, 0.0)


def test_a_drift_that_turns_round_is_no_change_of_load() -> None:
    after = half_sure(2.0, HALF_SURE._replace(drift=-5.0))
    assert after.mean == pytest.approx(0.14) and after.drift == pytest.approx(0.8 * -5 + 2)


def test_a_broken_clock_counts_as_a_factor_of_a_thousand() -> None:
    for sign in (1, -1):
        after = half_sure(1e9 * sign, half_sure(1e9 * sign))
        assert abs(after.mean + after.offsets[1]) == pytest.approx(math.log(1000), rel=0.01)


def test_the_first_samples_of_noise_weigh_the_same_and_later_ones_a_twentieth() -> None:
    slowdown, weights = Slowdown().for_exits(1), []
    for _ in range(20):
        slowdown = slowdown.update(0, 0.0, 1.0)
        weights.append(slowdown.noise_rate)
    assert weights == pytest.approx([1 / max(min(count, 20), 5) for count in range(5, 25)])


def test_offsets_are_kept_for_as_many_exits_only() -> None:
    assert HALF_SURE.for_exits(2) is HALF_SURE
    fresh = HALF_SURE.for_exits(3)
    assert fresh.offsets == (0.0,) * 4
    assert fresh.offset_variances == (EXIT_VARIANCE, EXIT_VARIANCE, EXIT_VARIANCE, CATCH_UP_VARIANCE)


def learned(factor: float = 1.0, tokens: int = 60, noise: float = 0.0, seed: int = 0) -> Slowdown:
    """A filter after some tokens at one exit under a steady load."""
    slowdown, rng = Slowdown().for_exits(1), random.Random(seed)
    for _ in range(tokens):
        slowdown = slowdown.update(0, math.log(factor) + rng.gauss(0, noise), 1.0)
    return slowdown


@pytest.mark.parametrize("ratio", [50.0, 3.0, 0.1])
def test_one_outlier_does_not_throw_the_filter(ratio: float) -> None:
    before = learned()
    after = before.update(0, math.log(ratio), 1.0)
    assert after.mean == before.mean
    assert after.update(0, 0.0, 1.0).factor == pytest.approx(1.0, abs=0.01)


def test_a_step_in_which_the_process_was_stopped_is_no_part_of_the_mean() -> None:
    before = learned(noise=0.03)
    after = before.update(0, math.log(1e5), 1.0)  # half an hour instead of 20 ms
    assert after.ratio_mean == before.ratio_mean and after.ratio_variance <= before.ratio_variance


@pytest.mark.parametrize("ratio", [3.0, 1.3, 0.5])
def test_two_surprises_in_a_row_are_a_change_of_load(ratio: float) -> None:
    slowdown = learned()
    for _ in range(2):
        slowdown = slowdown.update(0, math.log(ratio), 1.0)
    assert math.exp(slowdown.mean + slowdown.offsets[0]) == pytest.approx(ratio, rel=0.03)


def test_noise_is_learned() -> None:
    for noise in (0.03, 0.1, 0.3):
        estimates = [math.sqrt(learned(tokens=400, noise=noise, seed=seed).noise_variance) for seed in range(8)]
        assert sum(estimates) / 8 == pytest.approx(noise, rel=0.15)


def test_slow_ramp_is_followed() -> None:
    slowdown = learned()
    for token in range(200):
        slowdown = slowdown.update(0, 0.005 * token, 1.0)
    assert slowdown.mean + slowdown.offsets[0] == pytest.approx(0.005 * 199, abs=0.03)


@pytest.mark.parametrize(("noise", "factor", "tokens"), [(0.02, 1.3, 3), (0.1, 1.7, 4), (0.2, 1.5, 8), (0.2, 1.3, 16)])
def test_an_estimate_comes_down_soon_after_a_load_goes_away(noise: float, factor: float, tokens: int) -> None:
    """Median over runs of the tokens until the estimate is within a third of the way; noise sets how soon that can be."""
    needed = []
    for seed in range(31):
        slowdown, rng = learned(factor, 100, noise, seed), random.Random(1000 + seed)
        count = 0
        while slowdown.mean + slowdown.offsets[0] > math.log(factor) / 3 and count < 100:
            slowdown = slowdown.update(0, rng.gauss(0, noise), 1.0)
            count += 1
        needed.append(count)
    assert sorted(needed)[15] <= tokens


def test_mean_and_variance_of_the_ratio_remember_bursts() -> None:
    slowdown, rng = Slowdown().for_exits(1), random.Random(5)
    for token in range(2000):
        slowdown = slowdown.update(0, math.log(2.0 if token % 50 < 10 else 1.0) + rng.gauss(0, 0.02), 1.0)
    assert slowdown.ratio_mean == pytest.approx(1.2, abs=0.1)  # a fifth of the tokens at twice the time
    assert slowdown.ratio_variance == pytest.approx(0.16, rel=0.3)


def test_a_pause_leaves_doubt_and_no_more() -> None:
    sure = Slowdown(mean=0.3, variance=1e-6, surprise=1, drift=3.0, noise_variance=0.05**2)
    rested = sure.rested()
    assert (rested.variance, rested.surprise, rested.drift) == (0.05**2, 0, 0.0)
    assert (rested.mean, rested.noise_variance) == (0.3, 0.05**2)
    assert Slowdown(variance=0.2**2).rested().variance == 0.2**2  # what was less sure stays so


def test_silence_does_not_make_the_filter_blind() -> None:
    slowdown = Slowdown().for_exits(2)
    for _ in range(500):
        slowdown = slowdown.update(0, 0.0, 1.0)
    assert slowdown.noise_variance == NOISE_FLOOR


def test_what_was_learned_of_an_unused_exit_is_forgotten_bit_by_bit() -> None:
    slowdown = Slowdown(variance=1e-6, noise_variance=0.02**2, offsets=(0.3, 0.0, 0.2), offset_variances=(1e-6,) * 3)
    for _ in range(DECAY_TOKENS - 1):
        slowdown = slowdown.update(1, 0.0, 1.0)
    assert slowdown.offsets == (0.3, 0.0, 0.2)  # all at once, after DECAY_TOKENS
    for _ in range(DECAY_TOKENS):
        slowdown = slowdown.update(1, 0.0, 1.0)
    kept = 1 - OFFSET_DECAY
    assert slowdown.offsets == pytest.approx((0.3 * kept, 0.0, 0.2 * kept))
    assert slowdown.offset_variances[0] == pytest.approx(EXIT_VARIANCE + (1e-6 - EXIT_VARIANCE) * kept)
    assert slowdown.offset_variances[1] < 1e-6  # the one in use is not forgotten
    assert slowdown.offset_variances[2] == pytest.approx(CATCH_UP_VARIANCE + (1e-6 - CATCH_UP_VARIANCE) * kept)


def test_catching_up_has_the_last_offset() -> None:
    """A caller may count it from the end, as -1."""
    last, counted = (HALF_SURE.update(index, 0.2, 1.0) for index in (-1, 2))
    assert last == counted and last.offsets[2] > 0
