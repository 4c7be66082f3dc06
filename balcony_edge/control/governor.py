"""The slow loop: ceilings on watts, joules, degrees, utilization, charge and memory become a busy share and a depth.

Pure, and run at most ten times a second. Depth alone cannot hold watts: an unpaced loop keeps the device busy at every
exit. So what is governed is our **busy share**, the part of the time in which a step runs; from it follow pace (share /
cost of a step) and, where the pace would fall below what is asked of it, depth. This module owns that arithmetic. It does
not know what a step costs (it is told) nor which exit a token takes (it says the deepest that may be taken).

Watts and utilization are taken as affine in the busy share (:mod:`.response`), and learned from readings and from the
share that really was; so what others do is told apart from what we do, and there is no integrator that could wind up
while another limit holds the share: the filter is fed with what was done, not with what was asked. Degrees answer too
slowly for that; a PI controller holds them, whose integral stands still while its output is not what limits the
share.

A quantity that is asked for and not seen (absent, older than three seconds, or nonsense) is not held, and that is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.observed import hottest_c, newest, unseen, utilization, watts
from balcony_edge.control.response import Load
from balcony_edge.device.readings import Reading, Scope

#: Least seconds between two ticks of the loop, and between two changes of the deepest exit allowed.
TICK_S, CEILING_DWELL_S = 0.1, 1.0
#: A pause between replies after which ramps and half-filled averages begin anew: four of those averages.
PAUSE_S = 2.0
#: Pace below which a stream is taken for hung, where the budget names none.
LEAST_PACE_TPS = 1.0
#: Least busy share that is ever asked for: a hundredth, so that a pace follows from it.
LEAST_SHARE = 0.01
#: A latency target is kept under pacing with so much of it free for jitter.
PACE_MARGIN = 0.05
#: PI controller: full share 5 °C below the set point when the integral is empty, which fills in 30 s; the set point is
#: half a degree below the ceiling.
DEGREES_PER_SHARE, INTEGRAL_S, DEGREES_FREE = 5.0, 30.0, 0.5
#: How far above its floor the charge, and below its ceiling the memory, begins to take depth away.
CHARGE_RAMP, MEMORY_RAMP = 0.10, 0.05
#: Seconds for which a ceiling must be out of reach before that is reported: the filter has learned by then.
SETTLING_S = 5.0


class Governor(NamedTuple):
    """State and result of the slow loop.

    Attributes:
        ticked_s: when it ran last.
        power, cpu, gpu: what was learned of each; None before the first reading.
        rail: whose power it is.
        average_w: average power over the budget's window.
        integral: of the temperature controller, as a busy share.
        share: busy share that is allowed, 0 to 1.
        ceiling: index of the deepest exit that may be taken.
        changed_s: when ``ceiling`` changed.
        short_s: since when a ceiling is out of reach; infinite where none is.
        binding: keys of the budget that limit share or depth.
        lost: keys that are not held, because nothing measures them at the moment.
        infeasible: what cannot be met, for how long it had to be; empty where all is.
        critical_c: degrees of the hottest sensor where they reach the critical temperature, else None.
    """

    ticked_s: float = -math.inf
    power: Load | None = None
    cpu: Load | None = None
    gpu: Load | None = None
    rail: str = ""
    average_w: float = math.nan
    integral: float = 0.0
    share: float = 1.0
    ceiling: int = 1 << 30
    changed_s: float = -math.inf
    short_s: float = math.inf
    binding: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    infeasible: tuple[str, ...] = ()
    critical_c: float | None = None

    def critical(self, budget: Budget) -> bool:
        """Whether the device is as hot as this budget calls critical."""
        limit_c = budget.critical_temperature_c
        return self.critical_c is not None and limit_c is not None and self.critical_c >= limit_c

    def unseen(self, budget: Budget) -> tuple[str, ...]:
        """Keys of a budget that are not held; the last tick may have been for another one."""
        return tuple(key for key in self.lost if getattr(budget, key) is not None)


class Demand(NamedTuple):
    """What the slow loop is told at a tick.

    Attributes:
        budget: the ceilings.
        now_s, busy_s: the clock of the run, and our busy seconds on it.
        readings: the latest of every sensor.
        step_s: expected seconds of a step at each exit, as the device is now.
        lowest, highest: indices of the exits that the budget allows.
        pace_tps: tokens a second that latency targets need; 0 without any.
        begins: whether a reply begins.
    """

    budget: Budget
    now_s: float
    busy_s: float
    readings: Sequence[Reading]
    step_s: Sequence[float]
    lowest: int
    highest: int
    pace_tps: float
    begins: bool = False


def least_pace_tps(budget: Budget, pace_tps: float) -> float:
    """Tokens a second below which pacing may not go: with ``priority = latency`` also what latency targets need."""
    least = LEAST_PACE_TPS if budget.min_pace_tps is None else budget.min_pace_tps
    if budget.max_pace_tps is not None:
        least = min(least, budget.max_pace_tps)
    return max(least, pace_tps) if budget.priority == "latency" else least


def govern(before: Governor, demand: Demand) -> Governor:
    """One tick."""
    budget, now_s = demand.budget, demand.now_s
    rested = (demand.begins and now_s - before.ticked_s > PAUSE_S) or now_s < before.ticked_s
    if rested:  # or another clock
        before = _rested(before)._replace(changed_s=min(before.changed_s, now_s - CEILING_DWELL_S))
    before, power_share = _power(before, demand)
    cpu, cpu_share = _utilized(before.cpu, demand, "cpu", budget.cpu_utilization)
    gpu, gpu_share = _utilized(before.gpu, demand, "gpu", budget.gpu_utilization)
    integral, critical_c, heat_share = _temperature(before, demand)
    charge_left = _charge_left(demand)
    cap, caps = _depth(demand, before.power, charge_left)
    found = {
        "power_w": power_share,
        "cpu_utilization": cpu_share,
        "gpu_utilization": gpu_share,
        "temperature_c": heat_share,
        # at the floor the pace falls as far as it may
        "battery_floor_percent": LEAST_SHARE if charge_left is not None and charge_left <= 0 else None,
    }
    shares = {key: share for key, share in found.items() if share is not None}
    share = wanted = min([1.0, *shares.values()])
    # up by a tenth at a time, so that a reading that is too low lets no burst through; down by half: no gap is hung
    share = max(share if rested else min(max(share, before.share / 2), before.share + 0.1), LEAST_SHARE)
    binding = [key for key, value in shares.items() if value <= share + 0.02 and share < 1]
    after = before._replace(
        ticked_s=now_s,
        cpu=cpu,
        gpu=gpu,
        integral=integral,
        share=share,
        lost=unseen(budget, demand.readings, now_s),
        critical_c=critical_c,
    )
    return _settle(after, demand, cap, list(dict.fromkeys([*binding, *caps])), hopeless=wanted <= 0)


def _rested(governor: Governor) -> Governor:
    """After a pause between replies: what was learned of the device stays, what was under way is over."""

    def restarted(load: Load | None) -> Load | None:
        return load and load.restarted()

    power, cpu, gpu = restarted(governor.power), restarted(governor.cpu), restarted(governor.gpu)
    return governor._replace(power=power, cpu=cpu, gpu=gpu, short_s=math.inf, infeasible=())


def _settle(governor: Governor, demand: Demand, cap: int, binding: list[str], hopeless: bool) -> Governor:
    """Depth from the share and the caps, with a dwell; and whether something is out of reach.

    ``hopeless``: a ceiling would not be held without us either.
    """
    budget, now_s, step_s = demand.budget, demand.now_s, demand.step_s
    least_tps = LEAST_PACE_TPS if budget.min_pace_tps is None else budget.min_pace_tps
    needed_tps = max(demand.pace_tps / (1 - PACE_MARGIN), least_tps) if budget.pacing else math.inf
    ceiling, share = governor.ceiling, governor.share
    wanted = demand.lowest
    for index in range(min(cap, demand.highest), demand.lowest, -1):
        # going deeper wants a tenth more than staying does
        free = 1.1 if index > ceiling else 1.0
        if share >= 1 or share >= needed_tps * step_s[index] * free:
            wanted = index
            break
    if wanted != ceiling and now_s - governor.changed_s >= CEILING_DWELL_S:
        changed_s = now_s if ceiling <= demand.highest else governor.changed_s
        governor = governor._replace(ceiling=wanted, changed_s=changed_s)
    floor_tps = least_pace_tps(budget, demand.pace_tps)
    short = share < 1 and (not budget.pacing or share < floor_tps * step_s[demand.lowest])
    short = short or (hopeless and share <= LEAST_SHARE)
    late = share < 1 and share < demand.pace_tps * step_s[demand.lowest]
    out = list(binding) if short else ["latency"] if late else []
    at_once = [
        key
        for key in binding
        if key in {"battery_floor_percent", "memory_mb", "energy_j_per_token"} and cap < demand.lowest
    ]
    short_s = min(governor.short_s, now_s) if out else math.inf
    settled = now_s - short_s >= max(SETTLING_S, budget.power_window_s)
    return governor._replace(short_s=short_s, binding=tuple(binding), infeasible=(*(out if settled else ()), *at_once))


def _power(before: Governor, demand: Demand) -> tuple[Governor, float | None]:
    """What was learned of the power, and the share that ``power_w`` allows."""
    budget, now_s = demand.budget, demand.now_s
    if budget.power_w is None and budget.energy_j_per_token is None:
        return before, None
    sample = watts(demand.readings, budget.power_rail, now_s)
    if sample is None:
        return before, None
    load = before.power if before.rail == budget.power_rail else None
    load = (load or Load(budget.power_w or max(sample.value, 1e-3))).see(sample, now_s, demand.busy_s)
    after = before._replace(power=load, rail=budget.power_rail)
    if budget.power_w is None:
        return after, None
    # what we draw now, as the filter has it: the gauge may be seconds late
    average_w = drawn_w = load.at(load.share(before.ticked_s, now_s))
    if math.isfinite(before.average_w) and math.isfinite(before.ticked_s):
        kept = math.exp(-max(now_s - before.ticked_s, 0.0) / budget.power_window_s)
        average_w = kept * before.average_w + (1 - kept) * drawn_w
    # what the window's average has too much or too little is given back over the next one
    aim_w = budget.power_w * 0.99
    aim_w += min(max(0.5 * (aim_w - average_w), -0.1 * aim_w), 0.1 * aim_w)
    return after._replace(average_w=average_w), load.share_within(aim_w)


def _utilized(
    before: Load | None, demand: Demand, scope: Scope, limit: float | None
) -> tuple[Load | None, float | None]:
    """What was learned of the use of CPUs or GPU, and the share that its ceiling allows."""
    sample = None if limit is None else utilization(demand.readings, scope, demand.now_s)
    if limit is None or sample is None:
        return before, None
    load = (before or Load(limit)).see(sample, demand.now_s, demand.busy_s)
    return load, load.share_within(limit * (1 - PACE_MARGIN / 2))


def _temperature(before: Governor, demand: Demand) -> tuple[float, float | None, float | None]:
    """The integral, the degrees if they are critical, and the share that ``temperature_c`` allows."""
    limit_c, critical_c = demand.budget.temperature_c, demand.budget.critical_temperature_c
    asked = limit_c is not None or critical_c is not None
    degrees_c = hottest_c(demand.readings, demand.now_s) if asked else None
    if degrees_c is None:
        return before.integral, None, None
    critical = degrees_c if critical_c is not None and degrees_c >= critical_c else None
    if limit_c is None:
        return before.integral, critical, None
    error = (limit_c - DEGREES_FREE - degrees_c) / DEGREES_PER_SHARE
    integral = before.integral
    span_s = demand.now_s - before.ticked_s
    output = error + integral
    # anti-windup: it grows only while degrees, and nothing else, hold the share below 1
    if math.isfinite(span_s) and (error < 0 or (output < 1 and "temperature_c" in before.binding)):
        integral = min(max(integral + error * min(span_s, 1.0) / INTEGRAL_S, 0.0), 1.0)
    return integral, critical, error + integral


def _depth(demand: Demand, power: Load | None, charge_left: float | None) -> tuple[int, list[str]]:
    """The deepest index that charge, memory and energy allow (below ``lowest`` if there is none), and what caps it."""
    caps = {
        "battery_floor_percent": _on_a_ramp(demand, charge_left),
        "memory_mb": _on_a_ramp(demand, _memory_left(demand)),
        "energy_j_per_token": _affordable(demand, power),
    }
    found = {key: cap for key, cap in caps.items() if cap is not None}
    return min([demand.highest, *found.values()]), list(found)


def _on_a_ramp(demand: Demand, room: float | None) -> int | None:
    """The deepest index for a share of the room below a limit that is still free; None where all depth is allowed."""
    if room is None or room >= 1:
        return None
    return demand.lowest - 1 if room <= 0 else demand.lowest + int(room * (demand.highest - demand.lowest + 1))


def _charge_left(demand: Demand) -> float | None:
    """Charge above the floor, in ramps; None without a floor, a reading, or a need while charging."""
    floor_percent = demand.budget.battery_floor_percent
    reading = None if floor_percent is None else newest(demand.readings, "battery", "charge", demand.now_s, 1.0)
    if floor_percent is None or reading is None or reading.charging:
        return None
    return ((reading.charge or 0.0) - floor_percent / 100) / CHARGE_RAMP


def _memory_left(demand: Demand) -> float | None:
    """Memory below the ceiling, in ramps; None without a ceiling or a reading."""
    ceiling_mb = demand.budget.memory_mb
    reading = None if ceiling_mb is None else newest(demand.readings, "process", "memory_bytes", demand.now_s, math.inf)
    if ceiling_mb is None or reading is None:
        return None
    return (1 - (reading.memory_bytes or 0) / (ceiling_mb * 1e6)) / MEMORY_RAMP


def _affordable(demand: Demand, power: Load | None) -> int | None:
    """The deepest index whose tokens take no more energy than allowed; None where all are, or nothing measures power."""
    budget, most_j = demand.budget, demand.budget.energy_j_per_token
    if most_j is None or power is None or watts(demand.readings, budget.power_rail, demand.now_s) is None:
        return None
    slowest_s = 0.0 if budget.max_pace_tps is None else 1 / budget.max_pace_tps
    for index in range(demand.highest, demand.lowest - 1, -1):
        gap_s = max(demand.step_s[index], slowest_s)
        if power.at(demand.step_s[index] / gap_s) * gap_s <= most_j:
            return None if index == demand.highest else index
    return demand.lowest - 1
