"""The slow loop: turns ceilings on watts, joules, degrees, utilization, charge and memory into a busy share and a depth.

Pure, and run at most ten times a second. Depth alone cannot hold watts, because an unpaced loop keeps the device busy at
every exit. So the slow loop governs our **busy share**, the part of the time in which a step runs. The pace follows from
it (share / cost of a step). If the pace would fall below the pace asked for, the depth is reduced.

This module owns that arithmetic. It is told what a step costs, and it does not choose the exit of a token: it only names
the deepest exit that may be taken.

Watts and utilization are taken as affine in the busy share (:mod:`.response`). They are learned from readings and from the
actual share, which separates our load from the load of other programs. The filter sees the share that was used, not the
share that was asked for. So it has no integrator that could wind up while another limit holds the share.

Degrees respond too slowly for that. A PI controller holds them; its integral does not change while another quantity limits
the share.

A quantity with a ceiling but without a usable reading (absent, older than two seconds, or nonsense) is not held, and the
reason of the token says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.observed import hottest_c, newest, unseen, utilization, watts
from balcony_edge.control.response import Load
from balcony_edge.device.readings import Reading, Scope

#: Shortest time between two ticks of the loop, and between two changes of the deepest exit allowed.
TICK_S, CEILING_DWELL_S = 0.1, 1.0
#: Pause between replies after which ramps and half-filled averages begin anew: four of those averages.
PAUSE_S = 2.0
#: Pace below which a stream looks hung to its reader; used if the budget names no pace.
LEAST_PACE_TPS = 1.0
#: Smallest busy share: a hundredth, or less where steps are so fast that a hundredth is more than the slowest pace. It is
#: above 0, so that a pace always follows from it.
LEAST_SHARE, NEARLY_NOTHING = 0.01, 1e-9
#: Share of a latency target that is left free for jitter under pacing.
PACE_MARGIN = 0.05
#: Share by which a pace ends before a target of the same gap: sleeps last a little longer than asked for. It is below the error
#: of a pace that verdicts allow.
EVEN_MARGIN = 0.009
#: PI controller: with an empty integral, the full share is allowed 5 °C below the set point. The integral fills in 30 s.
#: The set point is half a degree below the ceiling.
DEGREES_PER_SHARE, INTEGRAL_S, DEGREES_FREE = 5.0, 30.0, 0.5
#: Distances at which depth begins to be reduced: of the charge above its floor, and of the memory below its ceiling.
CHARGE_RAMP, MEMORY_RAMP = 0.10, 0.05
#: Time for which a ceiling must be out of reach before that is reported. The filter has learned by then.
SETTLING_S = 5.0


class Governor(NamedTuple):
    """State and result of the slow loop.

    Attributes:
        ticked_s: time of the last tick.
        power, cpu, gpu: learned response of each quantity; None before the first reading.
        rail: power rail that ``power`` belongs to.
        average_w: average power over the budget's window.
        integral: integral of the temperature controller, as a busy share.
        share: busy share that is allowed, 0 to 1.
        ceiling: index of the deepest exit that may be taken.
        changed_s: time of the last change of ``ceiling``.
        short_s: time since which a ceiling is out of reach; infinite if none is.
        binding: keys of the budget that limit share or depth.
        lost: keys that are not held because no sensor measures them at the moment.
        infeasible: keys that have been out of reach for long enough to be reported; empty if all can be met.
        critical_c: degrees of the hottest sensor if they reach the critical temperature, else None.
        asked: ceilings of the last tick, which may have been for another budget.
        pace_tps: tokens a second that the share leaves at the shallowest exit.
        begun_s: end of the last pause after which there were watts from before it.
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
    asked: tuple[tuple[str, float], ...] = ()
    pace_tps: float = 0.0
    begun_s: float = -math.inf

    def critical(self, budget: Budget) -> bool:
        """Whether the device has reached the critical temperature of this budget."""
        limit_c = budget.critical_temperature_c
        return self.critical_c is not None and limit_c is not None and self.critical_c >= limit_c

    def out_of_reach(self, budget: Budget, needs_tps: float) -> tuple[str, ...]:
        """Keys of this budget that cannot be met; the last tick may have been for another one, or for several together.

        ``needs_tps`` is :func:`needed_tps` of its reply.
        """
        if not self.infeasible:
            return ()
        own = {key: getattr(budget, key) == value for key, value in self.asked}
        own["latency"] = needs_tps > self.pace_tps
        return tuple(key for key in self.infeasible if own.get(key))

    def saves(self, budget: Budget) -> bool:
        """Whether depth saves joules, charge or memory, which pending rows in a wait would take."""
        ramps = (budget.battery_floor_percent, "battery_floor_percent"), (budget.memory_mb, "memory_mb")
        limits = any(value is not None and key in self.binding for value, key in ramps)
        return limits or budget.energy_j_per_token is not None

    def affordable_ms(self, budget: Budget) -> float:
        """Longest step within ``energy_j_per_token``, with the pause after it; infinite if no sensor measures that."""
        most_j, power = budget.energy_j_per_token, self.power
        if most_j is None or power is None or "energy_j_per_token" in self.lost:
            return math.inf
        idle_w, own_w = power.at(0.0), max(power.at(1.0) - power.at(0.0), 1e-9)
        slowest_s = 0.0 if budget.max_pace_tps is None else 1 / budget.max_pace_tps
        return 1000 * min(most_j / (idle_w / self.share + own_w), (most_j - idle_w * slowest_s) / own_w)

    def unseen(self, budget: Budget) -> tuple[str, ...]:
        """Keys of this budget that are not held; the last tick may have been for another budget."""
        return tuple(key for key in self.lost if getattr(budget, key) is not None)


class Demand(NamedTuple):
    """Input of one tick of the slow loop.

    Attributes:
        budget: budget with the ceilings.
        now_s, busy_s: present time on the clock of the run, and our busy seconds so far.
        readings: latest reading of every sensor.
        step_s: expected seconds of a step at each exit, on the device as it is now.
        lowest, highest: indices of the shallowest and deepest exit that the budget allows.
        pace_tps: tokens a second that the latency targets need; 0 without a latency target.
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


def slowest_tps(budget: Budget) -> float:
    """Smallest pace in tokens a second that a ceiling may leave."""
    least = LEAST_PACE_TPS if budget.min_pace_tps is None else budget.min_pace_tps
    return least if budget.max_pace_tps is None else min(least, budget.max_pace_tps)


def least_pace_tps(budget: Budget, pace_tps: float) -> float:
    """As :func:`slowest_tps`; with ``priority = latency`` it is also fast enough for the latency targets."""
    least = slowest_tps(budget)
    return max(least, pace_tps) if budget.priority == "latency" else least


def needed_tps(budget: Budget, made_tokens: int, elapsed_s: float) -> float:
    """Tokens a second that the latency targets need, ``elapsed_s`` after the request; 0 without any."""
    steady = 0.0 if budget.tpot_ms is None else 1000 / budget.tpot_ms
    left = (budget.expected_tokens or 0) - made_tokens
    if budget.deadline_s is None or left <= 0:
        return steady
    return max(steady, left / max(budget.deadline_s - elapsed_s, 1e-3))


def paced_ms(budget: Budget, share: float, step_ms: float, pace_tps: float) -> float:
    """Gap between two tokens that keeps to a busy share, unless it leaves too few a second; 0 where nothing is delayed."""
    if share >= 1 or not budget.pacing:
        return 0.0
    return min(step_ms / share, 1000 / least_pace_tps(budget, pace_tps / (1 - PACE_MARGIN)))


def unhurried_ms(budget: Budget, share: float, pace_tps: float) -> float:
    """Longest step after which the pause of a busy share leaves the pace asked for; infinite where nothing is delayed."""
    if share >= 1 or not budget.pacing:
        return math.inf
    return 1000 * share / max(pace_tps / (1 - PACE_MARGIN), slowest_tps(budget))


def govern(before: Governor, demand: Demand) -> Governor:
    """Run one tick of the slow loop."""
    budget, now_s = demand.budget, demand.now_s
    rested = (demand.begins and now_s - before.ticked_s > PAUSE_S) or now_s < before.ticked_s
    if rested:  # after a pause, or with another clock
        begun_s = before.begun_s if before.power is None else now_s
        before = _rested(before)._replace(changed_s=min(before.changed_s, now_s - CEILING_DWELL_S), begun_s=begun_s)
    before, power_share = _power(before, demand)
    cpu, cpu_share = _utilized(before.cpu, demand, "cpu", budget.cpu_utilization)
    gpu, gpu_share = _utilized(before.gpu, demand, "gpu", budget.gpu_utilization)
    integral, critical_c, heat_share = _temperature(before, demand)
    charge_left = _charge_left(demand)
    found = {
        "power_w": power_share,
        "cpu_utilization": cpu_share,
        "gpu_utilization": gpu_share,
        "temperature_c": heat_share,
        # At the floor the pace falls to the smallest one allowed.
        "battery_floor_percent": 0.0 if charge_left is not None and charge_left <= 0 else None,
    }
    shares = {key: share for key, share in found.items() if share is not None}
    room = min(shares.values(), default=math.inf)  # above 1: part of what the ceilings allow is free
    share = min(1.0, room)
    # The share rises by at most a tenth per tick, so that a reading that is too low does not allow a burst. It falls by
    # at most half, so that no gap looks like a hung stream.
    share = max(share if rested else min(max(share, before.share / 2), before.share + 0.1), _least_share(demand))
    caps = _depth(demand, before, charge_left, share)
    limiting = [key for key, value in shares.items() if value <= share + 0.02 and share < 1]
    after = before._replace(
        ticked_s=now_s,
        cpu=cpu,
        gpu=gpu,
        integral=integral,
        share=share,
        lost=unseen(budget, demand.readings, now_s),
        critical_c=critical_c,
    )
    warms = heat_share is not None and heat_share > integral  # below its set point, so it can be held
    return _settle(after, demand, room, limiting, caps, {"temperature_c"} if warms else set())


def _least_share(demand: Demand) -> float:
    """Smallest busy share: at the shallowest exit it is no more than the slowest pace."""
    return max(min(LEAST_SHARE, slowest_tps(demand.budget) * demand.step_s[demand.lowest]), NEARLY_NOTHING)


def _rested(governor: Governor) -> Governor:
    """State after a pause between replies: what was learned of the device is kept, running averages are dropped."""
    power, cpu, gpu = (load and load.restarted() for load in (governor.power, governor.cpu, governor.gpu))
    return governor._replace(power=power, cpu=cpu, gpu=gpu, short_s=math.inf, infeasible=())


def _settle(
    governor: Governor,
    demand: Demand,
    room: float,
    limiting: list[str],
    caps: Mapping[str, int],
    within: set[str],
) -> Governor:
    """Derive the depth from the share and the caps, with a dwell, and find what is out of reach.

    Args:
        governor: state with the new share.
        demand: input of the tick.
        room: busy share that the ceilings allow; above 1 if a part of them stays free, 0 or less if they are missed even
            without our load.
        limiting: keys that limit the share.
        caps: keys that limit the depth, with their deepest index; below ``lowest`` if they allow none.
        within: keys whose ceiling is not reached, although they limit the share.
    """
    budget, now_s, step_s = demand.budget, demand.now_s, demand.step_s
    needed_tps = max(demand.pace_tps / (1 - PACE_MARGIN), slowest_tps(budget)) if budget.pacing else math.inf
    ceiling, share = governor.ceiling, governor.share
    wanted = demand.lowest
    for index in range(min([demand.highest, *caps.values()]), demand.lowest, -1):
        # Going deeper needs a tenth more share than staying.
        free = 1.1 if index > ceiling else 1.0
        if (share >= 1 and room >= free) or share >= needed_tps * step_s[index] * free:
            wanted = index
            break
    if wanted != ceiling and now_s - governor.changed_s >= CEILING_DWELL_S:
        changed_s = now_s if ceiling <= demand.highest else governor.changed_s
        governor = governor._replace(ceiling=wanted, changed_s=changed_s)
    floor_tps = least_pace_tps(budget, demand.pace_tps)
    short = share < 1 and (not budget.pacing or share < floor_tps * step_s[demand.lowest])
    short = short or (room < floor_tps * step_s[demand.lowest] and share <= LEAST_SHARE)
    delays = budget.pacing and budget.priority == "limits"  # else no token is later than its latency target
    late = delays and share < 1 and share < demand.pace_tps * step_s[demand.lowest]
    out = [key for key in limiting if key not in within] if short else []
    out = out or (["latency"] if late else [])
    at_once = [key for key, deepest in caps.items() if deepest < demand.lowest]
    # The time to settle begins anew if a ceiling that is out of reach has another value than at the last tick. ``latency``
    # is no ceiling, so it never has.
    asked = budget.ceilings
    before = dict(governor.asked)
    same = all(before.get(key) == asked.get(key) for key in out)
    short_s = min(governor.short_s if same else math.inf, now_s) if out else math.inf
    settled = now_s - short_s >= max(SETTLING_S, budget.power_window_s)
    infeasible = tuple(dict.fromkeys((*(out if settled else ()), *at_once)))
    return governor._replace(
        short_s=short_s,
        binding=tuple(dict.fromkeys([*limiting, *caps])),
        asked=tuple(asked.items()),
        infeasible=infeasible,
        pace_tps=share / step_s[demand.lowest],
    )


def _power(before: Governor, demand: Demand) -> tuple[Governor, float | None]:
    """Update what is known about the power; return it with the share that ``power_w`` allows."""
    budget, now_s = demand.budget, demand.now_s
    if budget.power_w is None:  # the average is then not updated, so it may not be used later either
        before = before._replace(average_w=math.nan)
    if budget.power_w is None and budget.energy_j_per_token is None:
        return before, None
    sample = watts(demand.readings, budget.power_rail, now_s)
    if sample is None:  # the average would leave out a time that nobody measured
        return before._replace(average_w=math.nan), None
    load = before.power if before.rail == budget.power_rail else None
    average_before_w = before.average_w if load is not None else math.nan  # nor that of another rail
    load = (load or Load(budget.power_w or max(sample.value, 1e-3))).see(sample, now_s, demand.busy_s)
    after = before._replace(power=load, rail=budget.power_rail)
    if budget.power_w is None:
        return after, None
    # Use the filter's estimate of the present power, because the gauge may be seconds late.
    average_w = drawn_w = load.at(load.share(before.ticked_s, now_s))
    if math.isfinite(average_before_w) and math.isfinite(before.ticked_s):
        kept = math.exp(-max(now_s - before.ticked_s, 0.0) / budget.power_window_s)
        average_w = kept * average_before_w + (1 - kept) * drawn_w
    # If the window's average is too high, the next window makes up for it. It does not make up for one that is too low:
    # after a pause, windows of a whole reply would then be above the ceiling.
    aim_w = budget.power_w * 0.99
    aim_w += min(max(0.5 * (aim_w - average_w), -0.1 * aim_w), 0.0)
    return after._replace(average_w=average_w), load.share_within(aim_w)


def _utilized(
    before: Load | None, demand: Demand, scope: Scope, limit: float | None
) -> tuple[Load | None, float | None]:
    """Update what is known about the use of CPUs or GPU; return it with the share that its ceiling allows."""
    if limit is None or (sample := utilization(demand.readings, scope, demand.now_s)) is None:
        return before, None
    load = (before or Load(limit)).see(sample, demand.now_s, demand.busy_s)
    return load, load.share_within(limit * (1 - PACE_MARGIN / 2))


def _temperature(before: Governor, demand: Demand) -> tuple[float, float | None, float | None]:
    """Return the integral, the degrees if they are critical, and the share that ``temperature_c`` allows."""
    limit_c, critical_c = demand.budget.temperature_c, demand.budget.critical_temperature_c
    degrees_c = hottest_c(demand.readings, demand.now_s)
    if degrees_c is None:
        return before.integral, None, None
    critical = degrees_c if critical_c is not None and degrees_c >= critical_c else None
    if limit_c is None:
        return before.integral, critical, None
    error = (limit_c - DEGREES_FREE - degrees_c) / DEGREES_PER_SHARE
    integral = before.integral
    span_s = max(demand.now_s - before.ticked_s, 0.0)  # a clock may go back
    output = error + integral
    # Anti-windup: the integral grows only while the temperature is what holds the share below 1, so it stays below 1.
    if math.isfinite(span_s) and (error < 0 or (output < 1 and "temperature_c" in before.binding)):
        integral = max(integral + error * min(span_s, 1.0) / INTEGRAL_S, 0.0)
    return integral, critical, error + integral


def _depth(demand: Demand, before: Governor, charge_left: float | None, share: float) -> dict[str, int]:
    """Return the deepest index that charge, memory and energy allow, each if it limits the depth.

    The index is below ``lowest`` if no index is allowed.
    """
    caps = {
        "battery_floor_percent": _on_a_ramp(demand, charge_left),
        "memory_mb": _on_a_ramp(demand, _memory_left(demand)),
        "energy_j_per_token": _affordable(demand, before, share),
    }
    return {key: deepest for key, deepest in caps.items() if deepest is not None}


def _on_a_ramp(demand: Demand, room: float | None) -> int | None:
    """Deepest index for the free part of a ramp (``room``, 0 to 1); None if all depth is allowed."""
    if room is None or room >= 1:
        return None
    if room <= 0:
        return demand.lowest - 1
    deepest = demand.lowest + int(room * (demand.highest - demand.lowest + 1))
    return None if deepest >= demand.highest else deepest


def _charge_left(demand: Demand) -> float | None:
    """Charge above the floor, in ramps; None without a floor or a reading, and while the battery is charging."""
    floor_percent = demand.budget.battery_floor_percent
    reading = newest(demand.readings, "battery", "charge", demand.now_s, 1.0)
    if floor_percent is None or reading is None or reading.charging:
        return None
    return ((reading.charge or 0.0) - floor_percent / 100) / CHARGE_RAMP


def _memory_left(demand: Demand) -> float | None:
    """Memory below the ceiling, in ramps; None without a ceiling or a reading."""
    ceiling_mb = demand.budget.memory_mb
    reading = newest(demand.readings, "process", "memory_bytes", demand.now_s, math.inf)
    if ceiling_mb is None or reading is None:
        return None
    return (1 - (reading.memory_bytes or 0) / (ceiling_mb * 1e6)) / MEMORY_RAMP


def _affordable(demand: Demand, before: Governor, share: float) -> int | None:
    """Deepest index whose tokens take no more energy than allowed; None if all are allowed or power is not measured.

    Between two tokens the device idles for as long as a pace asks for, the one that follows from the busy share included. A
    deeper exit than before must leave a part of the energy free. The index is below ``lowest`` only if that is certain,
    because at first the power is a guess.
    """
    budget, most_j, power = demand.budget, demand.budget.energy_j_per_token, before.power
    if most_j is None or power is None or watts(demand.readings, budget.power_rail, demand.now_s) is None:
        return None
    slowest_s = 0.0 if budget.max_pace_tps is None else 1 / budget.max_pace_tps
    longest_s = 1 / least_pace_tps(budget, demand.pace_tps) if budget.pacing else 0.0
    for index in range(demand.highest, demand.lowest - 1, -1):
        gap_s = max(demand.step_s[index], slowest_s, min(demand.step_s[index] / share, longest_s))
        # The shallowest exit is taken in any case, so it needs nothing free.
        deeper = index > max(before.ceiling, demand.lowest)
        within_j = most_j * (1 - budget.hysteresis) if deeper else most_j
        busy = demand.step_s[index] / gap_s
        if power.at(busy) * gap_s <= within_j:
            return None if index == demand.highest else index
    # Watts from before a pause may be those of programs that have ended, and replies that are refused at once learn no others.
    known = demand.now_s - before.begun_s >= SETTLING_S
    return demand.lowest - (known and power.least_at(busy) * gap_s > most_j)
