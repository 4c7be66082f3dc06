"""Sampling in the background: readings are always available, even if a sensor hangs.

Each source has a daemon thread of its own. A read of sysfs or NVML can hang in the kernel (an I²C bus that does not answer, a
GPU off the bus), and such a thread cannot be interrupted. A single thread would need a watchdog, a second thread to replace it,
and a rule about which of the two may write. With one thread each, a hung source does not affect the others; its readings age
until they are too old to be shown. Reading the results takes no lock: a thread publishes a finished tuple by one assignment.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

from balcony_edge.closing import Closing
from balcony_edge.device.readings import STALE_S, Reading
from balcony_edge.errors import InputError
from balcony_runtime.sensors.base import Absence, Source, SourceSample
from balcony_runtime.sensors.plausible import Plausibility

#: Highest sampling rate: that of the controller's slow loop (``governor.TICK_S``); most drivers average over 100 ms and more.
MAX_RATE_HZ = 10.0
#: Longest time between two discoveries. A source without readings is tried again after 2, 4, 8, 16 … periods, and
#: at last this often, because opening NVML without a driver starts a program that tries to load it.
REDISCOVER_S = 10.0
#: Longest pause between two readings, in seconds, after which a sum is shown at once, and over which it grows: the
#: mean of both ends is an estimate, and a part may have been absent for hours.
SUM_PAUSE_S, MOST_SUMMED_S = 2.0, 60.0


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """State of one source.

    Attributes:
        source: name of the source.
        state: ``present``: it gives readings; ``absent``: it answers, but without readings; ``hung``: it has not returned from
            a read; ``starting``: it has not answered yet.
        age_s: seconds since its last answer; None before the first.
        read_ms: duration of its last read; None before the first.
        samples: number of answers so far.
        dropped: number of impossible values that were dropped.
        last_dropped: the last of these, in words.
        absences: missing parts with reasons, as of its last answer.
    """

    source: str
    state: Literal["starting", "present", "absent", "hung"]
    age_s: float | None
    read_ms: float | None
    samples: int
    dropped: int
    last_dropped: str
    absences: tuple[Absence, ...]


class Sensors(Closing):
    """Samples sources in the background; :meth:`latest` returns their latest readings.

    A context manager: entering starts the threads, leaving stops them.

    Example:
        with Sensors(device_sources(), rate_hz=5) as sensors:
            readings = sensors.latest()
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        rate_hz: float = 5.0,
        stale_s: float = STALE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is read and no thread runs before :meth:`start`.

        Args:
            sources: sources to read, most trusted first, which is the order of :meth:`latest`. Their threads close them.
            rate_hz: reads of each source per second, at most ``MAX_RATE_HZ``.
            stale_s: age above which readings are not shown; longer than one period.
            clock: monotonic clock for the times of readings.

        Raises:
            InputError: a number is out of range.
        """
        if not 0 < rate_hz <= MAX_RATE_HZ:
            raise InputError(f"rate_hz = {rate_hz}: must be above 0 and at most {MAX_RATE_HZ:g} reads a second: give 5")
        if not 1 / rate_hz < stale_s < math.inf:
            period = f"{1 / rate_hz:g} s at {rate_hz:g} Hz"
            raise InputError(f"stale_s = {stale_s}: must be above one period, {period}: give a longer time")
        self._stale_s = stale_s
        self._clock = clock
        self._stop = threading.Event()
        owner = weakref.ref(self)
        self._channels = tuple(_Channel(source, 1 / rate_hz, clock, self._stop, owner) for source in sources)

    def start(self, *, probe_s: float = 1.0) -> Self:
        """Start sampling, once, and wait until every source has answered for the first time, at most ``probe_s``.

        Raises:
            InputError: sampling was started, or closed, before.
        """
        if self._stop.is_set() or any(channel.thread.ident is not None for channel in self._channels):
            raise InputError("these sensors were started or closed before: make others with Sensors(device_sources())")
        try:
            for channel in self._channels:
                channel.thread.start()
            deadline_s = time.monotonic() + probe_s
            for channel in self._channels:
                channel.answered.wait(max(0.0, deadline_s - time.monotonic()))
        except BaseException:  # Ctrl-C, or no more threads: a `with` block that is not entered closes nothing
            self.close()
            raise
        return self

    def latest(self) -> tuple[Reading, ...]:
        """The newest reading of every part, in the order of the sources, without readings older than the stale limit.

        It takes no lock and never waits: any thread may call it in every decode step.
        """
        oldest_s = self._clock() - self._stale_s
        return tuple(
            reading for channel in self._channels for reading in channel.readings if reading.time_s >= oldest_s
        )

    def health(self) -> tuple[SourceHealth, ...]:
        """State of each source, in their order."""
        now_s = self._clock()
        return tuple(channel.health(now_s, self._stale_s) for channel in self._channels)

    def close(self, *, timeout_s: float = 1.0) -> None:
        """Stop sampling and wait for the threads, ``timeout_s`` in all; a hung thread is left and ends with the process."""
        self._stop.set()
        deadline_s = time.monotonic() + timeout_s
        for channel in self._channels:
            if channel.thread.ident is not None:
                channel.thread.join(max(0.0, deadline_s - time.monotonic()))

    def __enter__(self) -> Self:
        return self.start()


class _Summed(NamedTuple):
    """The last value of a quantity, and its sum over time."""

    time_s: float
    value: float
    total: float


#: Field → field of its sum over time.
_SUMS = {"watts": "joules", "utilization": "busy_s", "own_utilization": "own_busy_s"}


class _Channel:
    """One source, its thread, and its last results. Only the thread writes them, each by one assignment."""

    def __init__(
        self,
        source: Source,
        period_s: float,
        clock: Callable[[], float],
        stop: threading.Event,
        owner: Callable[[], Sensors | None],
    ) -> None:
        self._source = source
        self._period_s = period_s
        self._clock = clock
        self._stop, self._owner = stop, owner
        self._plausibility = Plausibility()
        self._summed: dict[tuple[str, str], _Summed] = {}
        self.readings: tuple[Reading, ...] = ()
        self._absences: tuple[Absence, ...] = ()
        self._samples = 0
        self._asked_s: float | None = None  # set while the source is being read
        self._answered_s: float | None = None
        self._read_ms: float | None = None
        self.answered = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"sensors-{source.name}", daemon=True)

    def _run(self) -> None:
        due_s, pause_s = -math.inf, self._period_s
        try:
            while not self._stop.is_set() and self._owner() is not None:  # nobody closes what was collected
                asked_s = self._asked_s = self._clock()
                discover = not self.readings or asked_s >= due_s
                if discover:
                    due_s = asked_s + REDISCOVER_S
                self._read(discover)
                self._answered_s = self._clock()
                self._read_ms = (self._answered_s - asked_s) * 1000
                self._asked_s = None
                self._samples += 1
                self.answered.set()
                pause_s = self._period_s if self.readings else min(2 * pause_s, REDISCOVER_S)
                self._stop.wait(max(0.0, asked_s + pause_s - self._clock()))
        finally:
            self._source.close()

    def _read(self, discover: bool) -> None:
        """Read the source and publish what it gives."""
        try:
            if discover:
                self._source.discover()
            self._publish(self._source.read(self._clock()))
        except Exception as error:  # a source may raise or return anything: health() reports it
            why = f"{type(error).__name__}: {error}"
            self._publish(SourceSample(absences=(Absence(self._source.name, why),)))

    def _publish(self, sample: SourceSample) -> None:
        cleaned = (self._plausibility.clean(reading) for reading in sample.readings)
        self._absences = sample.absences
        self.readings = tuple(self._with_sums(reading) for reading in cleaned if reading is not None)

    def _with_sums(self, reading: Reading) -> Reading:
        """The reading with the sums of its watts and shares over time, unless the part has an energy counter of its own.

        A consumer that reads less often than the sampler would otherwise see only single moments, such as those between steps.
        """
        counts = reading.joules is not None or self._plausibility.counts(reading.source)
        sums = {
            total: self._sum(reading, field)
            for field, total in _SUMS.items()
            if getattr(reading, field) is not None and not (counts and total == "joules")
        }
        return replace(reading, **sums) if sums else reading  # type: ignore[arg-type]  # the fields are numbers or None

    def _sum(self, reading: Reading, field: str) -> float | None:
        key, value = (reading.source, field), getattr(reading, field)
        before = self._summed.get(key)
        total, passed_s = 0.0, 0.0
        if before is not None:
            passed_s = reading.time_s - before.time_s
            total = before.total + (before.value + value) / 2 * min(passed_s, MOST_SUMMED_S)
        self._summed[key] = _Summed(reading.time_s, value, total)
        # After a long pause the value meanwhile is an estimate: one reading without a sum says so.
        return total if passed_s <= SUM_PAUSE_S else None

    def health(self, now_s: float, stale_s: float) -> SourceHealth:
        asked_s, answered_s = self._asked_s, self._answered_s
        state: Literal["starting", "present", "absent", "hung"] = "present" if self.readings else "absent"
        if asked_s is not None and now_s - asked_s > stale_s:
            state = "hung"
        elif answered_s is None:
            state = "starting"
        return SourceHealth(
            source=self._source.name,
            state=state,
            age_s=None if answered_s is None else now_s - answered_s,
            read_ms=self._read_ms,
            samples=self._samples,
            dropped=self._plausibility.dropped,
            last_dropped=self._plausibility.last_dropped,
            absences=self._absences,
        )
