"""How a reading follows our own busy share: what others take, what we add, how late the gauge is, and how it averages.

Owns the filter behind ceilings on watts and utilization. It knows no budget: :mod:`.governor` asks which busy share leads to
a limit. Watts and utilization are taken as affine in the busy share of the time that the gauge is showing:

    value(t) = base + gain × share between t - delay - average and t - delay

Gauges differ by seconds: RAPL counts what was, NVML averages over one second, INA3221 over as much as it was told to, and a
battery gauge shows a new value every one to ten seconds. Matched against the wrong time a filter learns that our share has
no effect, and the pace swings between all and nothing. So one Kalman filter runs for each kind of gauge in ``GAUGES``; the one
that predicted best is believed. While the share stands still they all say the same, and it does not matter which.

A gauge that shows the same value again and again has nothing new: only its changes are learned from, unless it stands still
for ``STILL_S``. Between two values the filter says what we draw now (:meth:`Load.at`).
"""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

#: Readings are averaged over so long before the filter sees them: a sample of watts falls into a step or between two.
AVERAGE_S = 0.5
#: Noise of an averaged reading, and what base and gain may gain from one to the next, in units of the ceiling.
READING_VARIANCE, BASE_VARIANCE, GAIN_VARIANCE = 0.02**2, 0.02**2, 0.005**2
#: (delay, average) in seconds of the gauges that are told apart.
GAUGES = (
    *((delay, average) for delay in (0.0, 0.5, 1.0, 2.0) for average in (0.0, 1.0, 2.0)),
    (0.0, 5.0),
    (0.0, 10.0),
)
#: Share of the past in the squared error by which gauges are compared, and what another must undercut.
ERROR_MEMORY, BETTER = 0.93, 0.6
#: A gauge that showed its last value for so long shows what is at that moment, not a mean of what was since.
HELD_S = 0.9
#: A gauge whose value has not changed for so long measures what does not change: longer than any battery gauge is silent.
STILL_S = 12.0
#: What is remembered of our busy seconds: the longest delay and average, at this distance.
PAST_S, PAST_STEP_S = 13.0, 0.2
#: Least span of a value that a gauge shows once in a while.
INSTANT_S = 0.1
#: No device that this is for draws so many watts: a broken sensor or counter.
MOST_W = 1e5


class Counter(NamedTuple):
    """Energy counters of the parts of a rail, summed, and when they were read."""

    joules: float
    time_s: float
    sources: tuple[str, ...]

    def mean_w(self, before: Counter | None) -> float | None:
        """Average power since an earlier reading, over the counters' own times; None where the two do not compare."""
        if before is None or before.sources != self.sources:
            return None
        seconds, joules = self.time_s - before.time_s, self.joules - before.joules
        mean_w = joules / seconds if seconds > 0 else math.nan
        return mean_w if 0 <= mean_w < MOST_W else None


class Sample(NamedTuple):
    """One reading of a quantity: its value, our own part where that is known, and the energy counter behind it."""

    value: float
    own: float | None = None
    counter: Counter | None = None


class Fit(NamedTuple):
    """What one kind of gauge would mean, in units of the load's scale; the variances are of base and gain."""

    base: float = 0.5
    gain: float = 0.5
    base_variance: float = 1.0
    covariance: float = 0.0
    gain_variance: float = 1.0
    error: float = 0.0  # squared innovations, with forgetting

    def learn(self, share: float, value: float, own: float | None) -> Fit:
        """With a reading; ``own`` is our part of it, where that is known."""
        innovation = value - self.base - self.gain * share
        drifted = self._replace(
            base_variance=self.base_variance + BASE_VARIANCE,
            gain_variance=self.gain_variance + GAIN_VARIANCE,
            error=ERROR_MEMORY * self.error + innovation * innovation,
        )
        if own is None:
            return drifted._observe(1.0, share, value)
        return drifted._observe(1.0, 0.0, max(value - own, 0.0))._observe(0.0, share, own)

    def _observe(self, per_base: float, per_gain: float, value: float) -> Fit:
        """A Kalman update with ``value = per_base × base + per_gain × gain + noise``."""
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
    """One quantity, what was learned of it, and the readings since the last update.

    Attributes:
        scale: what 1 means; the ceiling when the filter was made.
        fits: one for each of ``GAUGES``.
        best: index of the one that is believed.
        past: (time, our busy seconds), oldest first.
        shown, shown_s, held_s: the value that the gauge shows, since when, and how long it showed the one before.
        since_s: when the average at hand began.
        counter: the energy counters then; None where there is none.
        total, own, samples, changes: sums of the samples since then and of our own part of them, their number, and how
            many differed from the one before.
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

    def see(self, sample: Sample, now_s: float, busy_s: float) -> Load:
        """With one more reading, taken when we had been busy for ``busy_s`` in all; learns when half a second is full."""
        if now_s < self.since_s or now_s < self.shown_s:  # another clock
            return self.restarted()._replace(shown_s=-math.inf, past=()).see(sample, now_s, busy_s)
        after = self._remembering(now_s, busy_s)
        if sample.value != self.shown:
            held_s = now_s - self.shown_s if math.isfinite(self.shown_s) else 0.0
            after = after._replace(shown=sample.value, shown_s=now_s, held_s=held_s, changes=self.changes + 1)
        if not math.isfinite(self.since_s):
            return after._replace(since_s=now_s, counter=sample.counter)
        total, samples = self.total + sample.value, self.samples + 1
        # of all samples or of none: a part of them would be too little
        own = None if sample.own is None or (self.samples and self.own is None) else (self.own or 0.0) + sample.own
        if now_s - self.since_s < AVERAGE_S:
            return after._replace(total=total, own=own, samples=samples)
        ends_s, span_s, value = now_s, now_s - self.since_s, total / samples
        counted_w = None if sample.counter is None else sample.counter.mean_w(self.counter)
        news = after.changes > 0 or now_s - after.shown_s >= STILL_S
        if after.changes and after.held_s >= HELD_S:
            ends_s, span_s, value = after.shown_s, INSTANT_S, after.shown
            own, samples = sample.own, 1
        elif counted_w is not None:  # samples only hit or miss a step
            news = news or abs(counted_w - value) > 0.02 * value
            value = counted_w
        if news:
            after = after._learned(
                value / self.scale, None if own is None else own / samples / self.scale, ends_s, span_s
            )
        return after.restarted()._replace(since_s=now_s, counter=sample.counter)

    def restarted(self) -> Load:
        """Without the readings of an average that is not full."""
        return self._replace(since_s=-math.inf, total=0.0, own=None, samples=0, changes=0)

    def share(self, begin_s: float, end_s: float) -> float:
        """Our busy share between two times; before the first that is known we did nothing."""
        if end_s <= begin_s:
            return 0.0
        return min(max((self._busy_s(end_s) - self._busy_s(begin_s)) / (end_s - begin_s), 0.0), 1.0)

    def share_within(self, limit: float) -> float:
        """Busy share that leads to ``limit``; negative where others alone exceed it."""
        fit = self.fits[self.best]
        return (limit / self.scale - fit.base) / max(fit.gain, 0.02)

    def at(self, share: float) -> float:
        """The quantity at a busy share."""
        fit = self.fits[self.best]
        return self.scale * (fit.base + fit.gain * share)

    def _remembering(self, now_s: float, busy_s: float) -> Load:
        past = self.past
        if past and now_s - past[-1][0] < PAST_STEP_S and len(past) > 1:
            past = past[:-1] if past[-1][0] - past[-2][0] < PAST_STEP_S else past
        oldest = bisect.bisect_left(past, (now_s - PAST_S,))
        return self._replace(past=(*past[max(oldest - 1, 0) :], (now_s, busy_s)))

    def _busy_s(self, time_s: float) -> float:
        """Our busy seconds at a time, between those that are known on a line."""
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
