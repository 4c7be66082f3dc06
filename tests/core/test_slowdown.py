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
    slowdown = Slowdown(variance=1e-6, noise_variance=0.02**2, offsets=(0.3, 0.0, 0.0), offset_variances=(1e-6,) * 3)
    for _ in range(DECAY_TOKENS):
        slowdown = slowdown.update(1, 0.0, 1.0)
    assert slowdown.offsets[0] == pytest.approx(0.3 * (1 - OFFSET_DECAY))
    assert slowdown.offset_variances[0] > 1e-6
