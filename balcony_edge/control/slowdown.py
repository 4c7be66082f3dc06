"""The slowdown filter: how many times slower than its profile the device is at the moment, and how certain that is.

Owns the estimate only; it does not know targets, exits or clocks. The slowdown is measured / predicted of a step. It is
filtered as in ALERT (Wan et al., USENIX ATC'20): a Kalman filter whose process noise follows its own corrections.
Differences from ALERT:

- The filter runs on the logarithm. A slowdown is a factor: its noise is the same share at every load, and it is never
  negative.
- One surprising sample counts as an outlier. Two in a row on the same side, or many smaller ones, count as a change of
  load.
- The measurement noise is also estimated.
- Every exit, and catching up, has a learned offset. Without it the controller would oscillate around an exit that is too
  cheap in the device profile.

The filter excludes outliers. Mean and variance of the plain ratio include them, because they describe the time of many
tokens together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

#: Weight of the past in the process noise, as in ALERT.
ADAPTATION = 0.3
#: Variance that the slowdown gains per token at rest: 1 % a token lets a slow ramp through.
PROCESS_VARIANCE = 0.01**2
#: Weight of a new sample in the noise estimate: about 20 tokens, which is shorter than a reply and longer than a burst.
NOISE_RATE = 0.05
#: Smallest noise: 2 %, the timer and scheduler jitter of a decode step. Without it, a quiet stretch would make the filter
#: too certain.
NOISE_FLOOR = 0.02**2
#: Weight of a new sample in mean and variance of the plain ratio: about 60 tokens, so that one burst is remembered until
#: the next.
RATIO_RATE = 1 / 64
#: Number of deviations from the prediction beyond which a sample is surprising (1.2 % of normal samples).
SURPRISE = 2.5
#: Weight of the past in the drift, a leaky sum of normalised innovations (CUSUM with forgetting): about five tokens.
DRIFT_DECAY = 0.8
#: Drift beyond which the load has changed: 3.3 of its deviations 1 / sqrt(1 - DRIFT_DECAY²). This happens by chance once
#: in 1,000 tokens at rest.
DRIFT_LIMIT = 5.5
#: Error of a profile between two exits: additive costs miss cache effects; 8 % as a first estimate.
EXIT_VARIANCE = 0.08**2
#: Error of a profile between steps with and without catch-up: the price of a further row varies most (4 % to 50 % of the
#: first row).
CATCH_UP_VARIANCE = 0.25**2
#: Index of a step with catch-up, next to those of the exits; also of its room in an outlook.
WITH_CATCH_UP = -1
#: Share of its offset that an unused exit forgets in ``DECAY_TOKENS``. After some 250 tokens the exit is tried again.
OFFSET_DECAY, DECAY_TOKENS = 1 / 16, 16
#: Smallest variance after a pause between two replies, so that another load is noticed within two tokens.
PAUSE_VARIANCE = 0.05**2
#: A factor of a thousand either way is a broken clock or a suspended process: log samples are clipped there.
LOG_SLOWDOWN_LIMIT = math.log(1000)


class Slowdown(NamedTuple):
    """log(measured / predicted) of a step at exit ``i`` is about ``mean + offsets[i]``.

    Attributes:
        mean, variance: mean and variance of the device's log slowdown.
        process_variance: growth of ``variance`` per token.
        noise_variance: variance of one measurement's noise.
        offsets, offset_variances: errors of the profile: one entry per exit, and a last entry for steps with catch-up at
            any exit; empty until the first decision.
        surprise: side (-1, 1) of the last measurement if that was surprising, else 0.
        drift: leaky sum of normalised innovations.
        age: updates since the last decay of the offsets.
        ratio_mean, ratio_variance: mean and variance of measured / predicted, outliers included, over about 60 tokens.
        noise_rate: weight of a new sample in the noise estimate. It is the weight in a plain mean of all samples so far
            until it falls to ``NOISE_RATE``.
    """

    # At first the profile may be wrong by 20 % (another power mode, another clock) and a sample by 10 %.
    mean: float = 0.0
    variance: float = 0.2**2
    process_variance: float = PROCESS_VARIANCE
    noise_variance: float = 0.1**2
    offsets: tuple[float, ...] = ()
    offset_variances: tuple[float, ...] = ()
    surprise: int = 0
    drift: float = 0.0
    age: int = 0
    ratio_mean: float = 1.0
    ratio_variance: float = 0.3**2
    noise_rate: float = 1 / 4

    @property
    def factor(self) -> float:
        """Factor by which the device is slower than its profile."""
        return math.exp(self.mean)

    @property
    def deviation(self) -> float:
        """Deviation of the logarithm of the next measurement."""
        return math.sqrt(self.variance + self.noise_variance)

    def luck(self, quantile: float) -> float:
        """Factor by which a margin of so many deviations is wider than the noise that every device has needs."""
        return math.exp(quantile * max(self.deviation - math.sqrt(NOISE_FLOOR), 0.0))

    def rested(self) -> Slowdown:
        """Return the filter after a pause, in which the load may have changed."""
        return self._replace(variance=max(self.variance, PAUSE_VARIANCE), surprise=0, drift=0.0)

    def moved(self, other: Slowdown) -> Slowdown:
        """Return the filter with another's mean and variance: of the same device, but with offsets of other steps."""
        return self._replace(mean=other.mean, variance=other.variance)

    def for_exits(self, count: int) -> Slowdown:
        """Return the filter with offsets for this many exits; offsets for another number are dropped."""
        if len(self.offsets) == count + 1:
            return self
        return self._replace(offsets=(0.0,) * (count + 1), offset_variances=_resting_variances(count + 1))

    def update(self, index: int, log_ratio: float, noise_scale: float) -> Slowdown:
        """Return the filter after a step.

        Args:
            index: index of the step's offset.
            log_ratio: log(measured / predicted).
            noise_scale: factor by which the sample is noisier than usual.
        """
        # All fields at once and no further call: a pass leaves the caches cold, where each costs a microsecond (docs/LOG.md,
        # "Python's share of a step, once more").
        (
            mean,
            variance,
            process_variance,
            noise_variance,
            offsets,
            offset_variances,
            surprise,
            drift,
            age,
            ratio_mean,
            ratio_variance,
            noise_rate,
        ) = self
        if not -LOG_SLOWDOWN_LIMIT <= log_ratio <= LOG_SLOWDOWN_LIMIT:
            log_ratio = math.copysign(LOG_SLOWDOWN_LIMIT, log_ratio)
        # Mean and variance of the plain ratio, exponentially weighted (West 1979). A step in which the process was stopped
        # says nothing about other steps; deadlines would be held by the shallowest exit for 500 tokens.
        surplus = math.exp(log_ratio) - ratio_mean if log_ratio < LOG_SLOWDOWN_LIMIT else 0.0
        step = RATIO_RATE * surplus
        ratio_mean += step
        ratio_variance = (1 - RATIO_RATE) * (ratio_variance + step * surplus)
        innovation = log_ratio - mean - offsets[index]
        prior, offset_variance = variance + process_variance, offset_variances[index]
        noise = noise_variance * noise_scale
        expected = prior + offset_variance + noise
        limit = SURPRISE**2 * expected
        side = 0 if innovation * innovation <= limit else 1 if innovation > 0 else -1
        if side and side != surprise:  # an outlier, unless the next sample confirms it
            sample = (limit - prior - offset_variance) / noise_scale
            return self._replace(
                variance=prior,
                noise_variance=noise_variance + NOISE_RATE * (sample - noise_variance),
                surprise=side,
                ratio_mean=ratio_mean,
                ratio_variance=ratio_variance,
            )
        # The innovation is bounded here, so that a single sample that is not an outlier cannot exceed the limit alone.
        drift = DRIFT_DECAY * drift + innovation / math.sqrt(expected)
        changed = bool(side) or abs(drift) > DRIFT_LIMIT
        if changed:  # earlier knowledge does not count any more
            prior = max(prior, innovation * innovation)
        total = prior + offset_variance + noise
        gain, offset_gain = prior / total, offset_variance / total
        correction = gain * innovation
        residual = (1 - gain - offset_gain) * innovation
        # With K the sum of the gains, E[residual²] = (1 - K) noise. Adding K noise makes it unbiased and not negative.
        sample = (residual * residual + (gain + offset_gain) * noise) / noise_scale
        noise_variance += noise_rate * (sample - noise_variance)
        adapted = PROCESS_VARIANCE
        if not changed:
            adapted = ADAPTATION * process_variance + (1 - ADAPTATION) * correction * correction
        errors, doubts, age = list(offsets), list(offset_variances), (age + 1) % DECAY_TOKENS
        errors[index] += offset_gain * innovation
        doubts[index] *= 1 - offset_gain
        if not age:
            _decay(errors, doubts, index % len(errors))
        noise_rate /= 1 + noise_rate
        return Slowdown(
            mean + correction,
            (1 - gain) * prior,
            adapted if adapted > PROCESS_VARIANCE else PROCESS_VARIANCE,
            noise_variance if noise_variance > NOISE_FLOOR else NOISE_FLOOR,
            tuple(errors),
            tuple(doubts),
            side,
            0.0 if changed else drift,
            age,
            ratio_mean,
            ratio_variance,
            noise_rate if noise_rate > NOISE_RATE else NOISE_RATE,
        )


def _decay(offsets: list[float], variances: list[float], used: int) -> None:
    """Let all offsets but that of the last step forget a part, as they do every ``DECAY_TOKENS``."""
    kept = 1 - OFFSET_DECAY
    for other, at_rest in enumerate(_resting_variances(len(offsets))):
        if other != used:
            offsets[other] *= kept
            variances[other] = at_rest + (variances[other] - at_rest) * kept


def _resting_variances(count: int) -> tuple[float, ...]:
    return (*(EXIT_VARIANCE,) * (count - 1), CATCH_UP_VARIANCE)
