"""How a reading follows our own busy share: the load of others, our part, and the gauge's delay and averaging.

Owns the filter for ceilings on watts and utilization. It does not know the budget: :mod:`.governor` asks which busy share
leads to a limit. Watts and utilization are taken as affine in the busy share of the time that the gauge shows:

    value(t) = base + gain × share between t - delay - average and t - delay

Gauges differ by seconds. RAPL counts past energy, NVML averages over one second, and INA3221 averages over a time that can
be set. A battery gauge shows a new value every one to ten seconds. A filter that matches readings with the wrong time
learns that our share has no effect, and the pace swings between full and nothing.

So one Kalman filter runs for each kind of gauge in ``GAUGES``, and the one that predicted best is used. While the share
does not change, they all give the same value, so the choice does not matter.

A gauge that repeats its value gives no new information. Only its changes are learned from, unless the value stays the same
for ``STILL_S``. Between two values the filter gives the present power (:meth:`Load.at`).
"""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

#: Time over which readings are averaged for the filter, because a sample of watts falls into a step or between two.
AVERAGE_S = 0.5
#: Noise of an averaged reading, and drift of base and gain from one reading to the next, in units of the ceiling.
READING_VARIANCE, BASE_VARIANCE, GAIN_VARIANCE = 0.02**2, 0.02**2, 0.005**2
#: (delay, average) in seconds of each kind of gauge.
GAUGES = (
    *((delay, average) for delay in (0.0, 0.5, 1.0, 2.0) for average in (0.0, 1.0, 2.0)),
    (0.0, 5.0),
    (0.0, 10.0),
)
#: Weight of the past in the squared error by which gauges are compared, and the factor by which another must be better.
ERROR_MEMORY, BETTER = 0.93, 0.6
#: A gauge that showed its previous value for at least this time shows instants, not means.
HELD_S = 0.9
#: A value that has not changed for this time is really constant. No battery gauge is silent for longer.
STILL_S = 12.0
#: Length of the history of our busy seconds (more than the longest delay plus average), and the distance of its entries.
PAST_S, PAST_STEP_S = 13.0, 0.2
#: Shortest span of a value that a gauge shows once in a while.
INSTANT_S = 0.1
#: Upper bound of plausible power. No supported device draws more, so a higher value means a broken sensor or counter.
MOST_W = 1e5


class Counter(NamedTuple):
    """Sum of a quantity over time (joules, or busy seconds) for all parts of a rail, and the time of their reading."""

    total: float
    time_s: float
    sources: tuple[str, ...]

    def mean(self, before: Counter | None) -> float | None:
        """Average since an earlier reading, over the counters' own times; None if the two cannot be compared."""
        if before is None or before.sources != self.sources:
            return None
        seconds, grown = self.time_s - before.time_s, self.total - before.total
        mean = grown / seconds if seconds > 0 else math.nan
        return mean if 0 <= mean < MOST_W else None


class Sample(NamedTuple):
    """One reading of a quantity: its value, our own part of it if that is known, and the counters of both if there are any."""

    value: float
    own: float | None = None
    counter: Counter | None = None
    own_counter: Counter | None = None


class Fit(NamedTuple):
    """Estimate under the assumption of one kind of gauge, in units of the load's scale."""

    base: float = 0.5
    gain: float = 0.5
    base_variance: float = 1.0
    covariance: float = 0.0
    gain_variance: float = 1.0
    error: float = 0.0  # squared innovations, with forgetting

    def learn(self, share: float, value: float, own: float | None) -> Fit:
        """Return the estimate after a reading; ``own`` is our part of it, or None if that is unknown."""
        # One wrong reading moves the gain so far that our share falls to nearly nothing, and then no reading corrects it.
        # Half of the estimate more: the scale can be nearly 0, that of a rail which drew nothing at first.
        expected = self.base + self.gain * share
        value = min(value, 1.5 * expected + 2 * (1 + self.deviation(share)))
        innovation = value - expected
        drifted = self._replace(
            base_variance=self.base_variance + BASE_VARIANCE,
            gain_variance=self.gain_variance + GAIN_VARIANCE,
            error=ERROR_MEMORY * self.error + innovation * innovation,
        )
        if own is None:
            return drifted._observe(1.0, share, value)
        return drifted._observe(1.0, 0.0, max(value - own, 0.0))._observe(0.0, share, own)

    def deviation(self, share: float) -> float:
        """Deviation of the estimate at a busy share."""
        variance = self.base_variance + 2 * share * self.covariance + share * share * self.gain_variance
        return math.sqrt(max(variance, 0.0))

    def _observe(self, per_base: float, per_gain: float, value: float) -> Fit:
        """Return the estimate after a Kalman update with ``value = per_base × base + per_gain × gain + noise``."""
        to_base = self.base_variance * per_base + self.covariance * per_gain
        to_gain = self.covariance * per_base + self.gain_variance * per_gain
        total = per_base * to_base + per_gain * to_gain + READING_VARIANCE
        innovation = value - per_base * self.base - per_gain * self.gain
        return self._replace(
            base=max(self.base + to_base / total * innovation, 0.0),
            gain=max(self.gain + to_gain / total * innovation, 0.0),
            base_variance=self.base_variance - to_base * to_base / total,
            covariance=self.covariance - to_base * to_gain / total,
            gain_variance=self.gain_variance - to_gain * to_gain / total,
        )


class Load(NamedTuple):
    """One quantity: its learned response, and the readings since the last update.

    Attributes:
        scale: value that counts as 1; the ceiling at the time when the filter was made.
        fits: one estimate for each of ``GAUGES``.
        best: index of the estimate in use.
        past: pairs of (time, our busy seconds), oldest first.
        shown, shown_s, held_s: value that the gauge shows, the time since which it does, and the duration of the previous
            value.
        since_s: start of the present average.
        counter, own_counter: counters of the quantity and of our own part at that start; None if there are none.
        total, own: sum of the samples since then, and sum of our own part of them.
        samples, changes: number of these samples, and number of those that differed from the previous one.
    """

    scale: float
    fits: tuple[Fit, ...] = (Fit(),) * len(GAUGES)
    best: int = 0
    past: tuple[tuple[float, float], ...] = ()
    shown: float = math.nan
    shown_s: float = -math.inf
    held_s: float = 0.0
    since_s: float = -math.inf
    counter: Counter | None = None
    total: float = 0.0
    own: float | None = None
    samples: int = 0
    changes: int = 0
    own_counter: Counter | None = None

    def see(self, sample: Sample, now_s: float, busy_s: float) -> Load:
        """Return the load after one more reading, taken when we had been busy for ``busy_s`` in total.

        It learns each time the readings cover half a second.
        """
        if self.past and now_s < self.past[-1][0]:  # another clock
            unseen = self.restarted()._replace(shown=math.nan, shown_s=-math.inf, past=())
            return unseen.see(sample, now_s, busy_s)
        after = self._remembering(now_s, busy_s)
        if sample.value != self.shown:
            # A value that nobody looked at in between was not held, if there is a counter that knows better.
            looked = sample.counter is None or (bool(self.past) and self.past[-1][0] > self.shown_s)
            held_s = now_s - self.shown_s if looked and math.isfinite(self.shown_s) else 0.0
            after = after._replace(shown=sample.value, shown_s=now_s, held_s=held_s, changes=self.changes + 1)
        if not math.isfinite(self.since_s):
            return after._begun(sample, now_s)
        total, samples = self.total + sample.value, self.samples + 1
        # Our part must be known for all samples or for none: the sum over only some of them would be too small.
        own = None if sample.own is None or (self.samples and self.own is None) else (self.own or 0.0) + sample.own
        if now_s - self.since_s < AVERAGE_S:
            return after._replace(total=total, own=own, samples=samples)
        ends_s, span_s, value = now_s, now_s - self.since_s, total / samples
        counted = None if sample.counter is None else sample.counter.mean(self.counter)
        news = after.changes > 0 or now_s - after.shown_s >= STILL_S
        if after.changes and after.held_s >= HELD_S:
            ends_s, span_s, value = after.shown_s, INSTANT_S, after.shown
            own, samples = sample.own, 1
        elif counted is not None:  # a counter is better than samples, which only hit or miss a step
            news = news or abs(counted - value) > 0.02 * value
            value = counted
            counted_own = None if sample.own_counter is None else sample.own_counter.mean(self.own_counter)
            if own is not None and counted_own is not None:
                own, samples = counted_own, 1
        if news:
            after = after._learned(
                value / self.scale, None if own is None else own / samples / self.scale, ends_s, span_s
            )
        return after.restarted()._begun(sample, now_s)

    def _begun(self, sample: Sample, now_s: float) -> Load:
        """Return the load at the start of an average."""
        return self._replace(since_s=now_s, counter=sample.counter, own_counter=sample.own_counter)

    def restarted(self) -> Load:
        """Return the load without the readings of an unfinished average."""
        return self._replace(since_s=-math.inf, total=0.0, own=None, samples=0, changes=0)

    def share(self, begin_s: float, end_s: float) -> float:
        """Our busy share between two times; it is 0 before the first known time."""
        if end_s <= begin_s:
            return 0.0
        return min(max((self._busy_s(end_s) - self._busy_s(begin_s)) / (end_s - begin_s), 0.0), 1.0)

    def share_within(self, limit: float) -> float:
        """Busy share that leads to ``limit``; negative if the load of others alone exceeds it."""
        fit = self.fits[self.best]
        return (limit - self.scale * fit.base) / max(self.scale * fit.gain, 0.02 * limit)

    def at(self, share: float) -> float:
        """Value of the quantity at a busy share."""
        fit = self.fits[self.best]
        return self.scale * (fit.base + fit.gain * share)

    def least_at(self, share: float) -> float:
        """Value of the quantity at a busy share, less a deviation of the estimate."""
        return self.at(share) - self.scale * self.fits[self.best].deviation(share)

    def _remembering(self, now_s: float, busy_s: float) -> Load:
        past = self.past
        if len(past) > 1 and max(now_s - past[-1][0], past[-1][0] - past[-2][0]) < PAST_STEP_S:
            past = past[:-1]
        oldest = bisect.bisect_left(past, (now_s - PAST_S,))
        return self._replace(past=(*past[max(oldest - 1, 0) :], (now_s, busy_s)))

    def _busy_s(self, time_s: float) -> float:
        """Our busy seconds at a time, interpolated linearly between known times."""
        past = self.past
        place = bisect.bisect_right(past, (time_s, math.inf))
        if place == 0 or place == len(past):
            return past[0 if place == 0 else -1][1]
        (begin_s, begin), (end_s, end) = past[place - 1], past[place]
        return begin + (end - begin) * (time_s - begin_s) / (end_s - begin_s)

    def _learned(self, value: float, own: float | None, ends_s: float, span_s: float) -> Load:
        fits = []
        for fit, (delay_s, average_s) in zip(self.fits, GAUGES, strict=True):
            end_s = ends_s - delay_s
            begin_s = end_s - (span_s + average_s if span_s > INSTANT_S else max(average_s, span_s))
            fits.append(fit.learn(self.share(begin_s, end_s), value, own))
        best = min(range(len(fits)), key=lambda index: fits[index].error)
        if fits[best].error >= BETTER * fits[self.best].error:
            best = self.best
        return self._replace(fits=tuple(fits), best=best)
