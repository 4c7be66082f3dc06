"""Whether a budget was held: for each key the asked value, the reached value, and the margin between them.

Owns the judgement of a reply after it has ended, from its gaps and readings; it steers nothing. A key without measurements
has a verdict that says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.observed import hottest_c, newest, unseen, utilization, watts
from balcony_edge.control.response import Sample
from balcony_edge.device.readings import Reading

#: Seconds between the readings that are kept: the slow loop reads them at the same distance.
KEPT_S = 0.1


#: Error of the mean pace that is allowed, because clocks and sleeps are not exact.
PACE_TOLERANCE = 0.01
_PACES = ("min_pace_tps", "max_pace_tps")


class Verdict(NamedTuple):
    """One key of a budget.

    Example:
        missed = [verdict.key for verdict in reply.verdicts if verdict.held is False]

    Attributes:
        key: name of the key.
        asked: value of the key.
        reached: value of the reply, in the unit of the key; None if it was not measured.
        held: whether ``reached`` is within ``asked``; None if it was not measured, or not to the end.
        margin: share of ``asked`` that was left free, negative if the key was missed; None if it was not measured.
        how: description of ``reached`` ("mean", "highest").
    """

    key: str
    asked: float
    reached: float | None
    held: bool | None
    margin: float | None
    how: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return self._asdict()


def nearest_rank(ascending: Sequence[float], share: float) -> float:
    """The smallest of some values that a share of them does not exceed."""
    return ascending[max(math.ceil(share * len(ascending) - 1e-9), 1) - 1]  # 0.9 x 10 must be 9, also rounded


class _Seen(NamedTuple):
    """Readings of the sensors at one time."""

    now_s: float
    power: Sample | None
    cpu: Sample | None
    gpu: Sample | None
    hottest_c: float | None
    battery: Reading | None
    memory_mb: float | None


class Watch:
    """Follows one reply, and begins anew when its budget is replaced."""

    def __init__(self) -> None:
        self._budget: Budget | None = None
        self._from_start, self._senses = True, False
        self._gaps_ms: list[float] = []
        self._elapsed_s: list[float] = []
        self._seen: list[_Seen] = []
        self._looked: tuple[Sequence[Reading], float] = (), 0.0  # readings of the last of them, and their time

    def token(
        self,
        budget: Budget,
        now_s: float,
        latency_ms: float,
        readings: Sequence[Reading],
        *,
        first: bool,
        elapsed_s: float | None = None,
    ) -> None:
        """Record one token.

        Args:
            budget: budget of its decision.
            now_s: time of the readings.
            latency_ms: gap to the previous token; for the first token, time since the request.
            readings: latest reading of every sensor; empty if the budget needs none.
            first: whether it is the first token of the reply.
            elapsed_s: time since the request, with what the reader took for tokens, which no gap has; None if it took none.
        """
        if budget is not self._budget:
            self._budget, self._from_start, self._senses = budget, first, budget.needs_sensors
            self._gaps_ms, self._elapsed_s, self._seen = [], [], []
        if elapsed_s is not None:
            self._elapsed_s.append(elapsed_s)
        self._gaps_ms.append(latency_ms)
        if not readings and not self._senses:
            return
        # Joules need the first reading after the prompt, however soon. Tokens that came with the first have its reading.
        needed = len(self._seen) == 1 and now_s > self._seen[0].now_s and budget.energy_j_per_token is not None
        if needed or not self._seen or now_s - self._seen[-1].now_s >= KEPT_S:
            self.saw(now_s, readings)

    def saw(self, now_s: float, readings: Sequence[Reading]) -> None:
        """Keep the readings; also called when no token follows because the device is too hot."""
        if self._budget is not None and (readings or self._budget.needs_sensors):
            self._seen.append(_seen(self._budget, now_s, readings))
            self._looked = readings, now_s

    def verdicts(self) -> tuple[Verdict, ...]:
        """Verdicts for every target of the last token's budget, in the order of the budget's keys."""
        budget = self._budget
        if budget is None:
            return ()
        judges: dict[str, Callable[[Budget], tuple[float | None, str]]] = {
            "tpot_ms": self._tpot,
            "ttft_ms": lambda _: (self._gaps_ms[0] if self._from_start else None, "first token"),
            "deadline_s": self._deadline,
            "min_pace_tps": self._pace,
            "max_pace_tps": self._most_pace,
            "power_w": lambda b: (self._most_w(b.power_window_s), f"highest mean of {b.power_window_s:g} s"),
            "energy_j_per_token": lambda _: (self._joules(), "mean"),
            "temperature_c": lambda _: (self._most("hottest_c"), "highest"),
            "critical_temperature_c": lambda _: (self._most("hottest_c"), "highest"),
            "gpu_utilization": lambda _: (_mean([one.gpu for one in self._seen]), "mean"),
            "cpu_utilization": lambda _: (_mean([one.cpu for one in self._seen]), "mean"),
            "battery_floor_percent": lambda _: (self._least_percent(), "lowest"),
            "memory_mb": lambda _: (self._most("memory_mb"), "highest"),
        }
        found, gone = [], unseen(budget, *self._looked)
        for key, judge in judges.items():
            asked = getattr(budget, key)
            if asked is None:
                continue
            reached, how = judge(budget)
            at_least = key in ("min_pace_tps", "battery_floor_percent")
            margin = None if reached is None else (reached - asked if at_least else asked - reached) / asked
            held = None if margin is None else margin >= (-PACE_TOLERANCE if key in _PACES else 0)
            if key == "critical_temperature_c" and margin is not None:
                held = margin > 0  # the reply ends as soon as the limit is reached
            if held and key in gone:
                held = None  # the sensor has gone
            found.append(Verdict(key, asked, reached, held, margin, how if reached is not None else "not measured"))
        return tuple(found)

    @property
    def _later_ms(self) -> list[float]:
        """Gaps between tokens, without the time of the reply's first token."""
        return self._gaps_ms[1:] if self._from_start else self._gaps_ms

    def _tpot(self, budget: Budget) -> tuple[float | None, str]:
        gaps = sorted(self._later_ms)
        if not gaps:
            return None, ""
        return nearest_rank(gaps, budget.probability), f"{budget.probability * 100:g} % of the gaps within"

    def _deadline(self, budget: Budget) -> tuple[float | None, str]:
        if not self._from_start:
            return None, ""
        counted = self._gaps_ms[: budget.expected_tokens or None]
        elapsed_s = self._elapsed_s[: len(counted)] or [sum(counted) / 1000]
        return elapsed_s[-1], f"{len(counted)} tokens"

    def _pace(self, _: Budget) -> tuple[float | None, str]:
        gaps = self._later_ms
        return (1000 * len(gaps) / sum(gaps) if gaps and sum(gaps) else None), "mean"

    def _most_pace(self, budget: Budget) -> tuple[float | None, str]:
        reached, how = self._pace(budget)
        gaps = len(self._elapsed_s) - 1
        if reached is not None and gaps > 0:  # a wait is from token to token: the reader's time is part of it
            reached = min(reached, gaps / max(self._elapsed_s[-1] - self._elapsed_s[0], 1e-9))
        return reached, how

    def _most(self, field: str) -> float | None:
        values: list[float] = [value for seen in self._seen if (value := getattr(seen, field)) is not None]
        return max(values, default=None)

    def _least_percent(self) -> float | None:
        # a floor is for a battery that drains
        charges = [seen.battery.charge for seen in self._seen if seen.battery is not None and not seen.battery.charging]
        least = min((charge for charge in charges if charge is not None), default=None)
        return None if least is None else round(100 * least, 9)  # 100 x 0.29 is below 29

    def _most_w(self, window_s: float) -> float | None:
        """Highest mean power over a window; the mean of the whole reply if that is shorter."""
        seen = [(one.now_s, one.power) for one in self._seen if one.power is not None]
        # Sums up to each reading: windows of minutes over a long reply would otherwise take seconds.
        sums = [0.0, *accumulate(power.value for _, power in seen)]
        means: list[float] = []
        begin = 0
        for end, (now_s, power) in enumerate(seen):
            while begin < end and now_s - seen[begin + 1][0] >= window_s:
                begin += 1
            begin_s, first = seen[begin]
            if now_s - begin_s >= window_s or (end == len(seen) - 1 and not means):
                counted = None if power.counter is None else power.counter.mean(first.counter)
                means.append((sums[end + 1] - sums[begin]) / (end + 1 - begin) if counted is None else counted)
        return max(means, default=None)

    def _joules(self) -> float | None:
        after_prompt = self._seen[1:] if self._from_start and len(self._seen) > 1 else self._seen
        mean_w, gaps, waits = _mean([one.power for one in after_prompt]), self._later_ms, len(self._elapsed_s) - 1
        if mean_w is None or not gaps:
            return None
        # From token to token, as the watts are: the reader's time is part of both.
        told_s = (self._elapsed_s[-1] - self._elapsed_s[0]) / waits if waits > 0 else 0.0
        return mean_w * max(sum(gaps) / 1000 / len(gaps), told_s)


def _seen(budget: Budget, now_s: float, readings: Sequence[Reading]) -> _Seen:
    memory = newest(readings, "process", "memory_bytes", now_s, math.inf)
    return _Seen(
        now_s,
        watts(readings, budget.power_rail, now_s),
        utilization(readings, "cpu", now_s),
        utilization(readings, "gpu", now_s),
        hottest_c(readings, now_s),
        newest(readings, "battery", "charge", now_s, 1.0),
        None if memory is None else (memory.memory_bytes or 0) / 1e6,
    )


def _mean(samples: Sequence[Sample | None]) -> float | None:
    """Mean of what was measured, by the counter if there is one, because samples only hit or miss a step."""
    found = [one for one in samples if one is not None]
    if not found:
        return None
    last = found[-1].counter
    counted = None if last is None else last.mean(found[0].counter)
    return sum(one.value for one in found) / len(found) if counted is None else counted
