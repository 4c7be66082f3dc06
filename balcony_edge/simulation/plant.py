"""The plant, a simulated device: true costs, a changing load, power, heat, a battery, and sensors that sample them.

:class:`SimulatedDevice` is the device; :class:`Plant` has one sequence on it, and :mod:`.company` several.

Owns the physics for trying a budget without the device. It knows no budget and no controller: it runs the step that it is told
to run and returns the step's time. Time is simulated and passes as fast as Python computes.

The physics: a step takes its price times the load times noise. The device draws ``idle_w``, and ``busy_w`` more while a step
runs. Heat follows one resistance and one time constant, ``dT/dt = (ambient + R × P - T) / tau``. Above ``throttle_c`` (until
3 °C below it) every step takes ``throttle_factor`` times as long.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from balcony_edge.budget import Rail
from balcony_edge.control.catching_up import IDLE_ROWS, PORTION_MEMORY
from balcony_edge.control.decision import CatchUp
from balcony_edge.device.costs import CostModel
from balcony_edge.device.readings import Reading

#: Seconds between two samples of the simulated sensors.
SAMPLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Physics:
    """Constants of a simulated device; the defaults are close to a small board at 25 °C.

    Attributes:
        idle_w, busy_w: power without a step, and the power that a running step adds.
        rail: rail of that power.
        ambient_c, kelvin_per_watt, tau_s: ambient temperature, thermal resistance and time constant of the heat sink.
        throttle_c, throttle_factor: temperature at which clocks fall, and the factor by which steps then take longer.
        battery_j, charge: capacity (0: no battery), and charge at the start (0 to 1).
        others_utilization: share of the CPUs that other processes keep busy.
        step_utilization: share of the CPUs that a running step keeps busy.
        own_known: whether the sensors report this process's share of utilization.
        base_memory_bytes, row_bytes: memory of the process, and the memory that every row through a stage adds.
        noise: standard deviation of log(step / expected).
        gauge_delay_s, gauge_average_s, gauge_period_s: age of the power gauge's value, time over which it averages, and time
            between two of its values (below 0.1: a new value at every sample, 10 times a second). NVML averages over a second;
            battery gauges change every 1 to 10 s.
    """

    idle_w: float = 2.0
    busy_w: float = 6.0
    rail: Rail = "board"
    ambient_c: float = 25.0
    kelvin_per_watt: float = 6.0
    tau_s: float = 40.0
    throttle_c: float = 95.0
    throttle_factor: float = 1.6
    battery_j: float = 0.0
    charge: float = 1.0
    others_utilization: float = 0.0
    step_utilization: float = 1.0
    own_known: bool = False
    base_memory_bytes: int = 200_000_000
    row_bytes: int = 12_000
    noise: float = 0.02
    gauge_delay_s: float = 0.0
    gauge_average_s: float = 0.0
    gauge_period_s: float = 0.0


#: Least and most value of each number of :class:`Physics`.
RANGES: dict[str, tuple[float, float]] = {
    "idle_w": (0, 1e5),
    "busy_w": (0, 1e5),
    "ambient_c": (-60, 100),
    "kelvin_per_watt": (0, 1e3),
    "tau_s": (1e-2, 1e6),
    "throttle_c": (-60, 1e3),
    "throttle_factor": (1, 1e3),
    "battery_j": (0, 1e12),
    "charge": (0, 1),
    "others_utilization": (0, 1),
    "step_utilization": (0, 1),
    "own_known": (0, 1),
    "base_memory_bytes": (0, 2**50),
    "row_bytes": (0, 2**40),
    "noise": (0, 2),
    "gauge_delay_s": (0, 60),
    "gauge_average_s": (0, 60),
    "gauge_period_s": (0, 60),
}


class SimulatedDevice:
    """Time, power, heat and sensors of a device on which steps run.

    Args:
        costs: true prices.
        physics: constants of the device.
        load: function from seconds since the start to a slowdown.
        seed: seed of the noise.
    """

    def __init__(self, costs: CostModel, physics: Physics, load: Callable[[float], float], seed: int = 0) -> None:
        self.costs, self.physics, self._load = costs, physics, load
        self._random = random.Random(seed)
        self.now_s, self.busy_s = 0.0, 0.0
        self.joules, self.celsius = 0.0, physics.ambient_c + physics.kelvin_per_watt * physics.idle_w
        self.charge, self.throttled, self.rows_run = physics.charge, False, 0
        self._sampled_s, self._sampled_j, self._sampled_busy_s = 0.0, 0.0, 0.0
        self._used_s, self._own_s = 0.0, 0.0  # sums of utilization over time
        self._past: list[tuple[float, float]] = []  # (time, joules) of every sample so far
        self._shown_s, self._shown_w, self._summed_j = -math.inf, physics.idle_w, 0.0
        self.readings = self._sample(physics.idle_w, 0.0)

    @property
    def empty(self) -> bool:
        """Whether it has a battery, and nothing is left in it."""
        return self.physics.battery_j > 0 and self.charge <= 0

    def work(self, price_ms: float) -> None:
        """Run something of that price."""
        factor = self._load(self.now_s) * (self.physics.throttle_factor if self.throttled else 1.0)
        self._pass(price_ms * factor * math.exp(self._random.gauss(0, self.physics.noise)) / 1000, busy=True)

    def wait(self, seconds: float) -> None:
        """Do nothing for some time."""
        self._pass(seconds, busy=False)

    def _pass(self, seconds: float, *, busy: bool) -> None:
        """Let time pass; the sensors sample meanwhile."""
        physics = self.physics
        while seconds > 0:
            span_s = max(min(seconds, self._sampled_s + SAMPLE_S - self.now_s), 1e-9)
            watts = physics.idle_w + (physics.busy_w if busy else 0.0)
            self.joules += watts * span_s
            steady_c = physics.ambient_c + physics.kelvin_per_watt * watts
            self.celsius = steady_c + (self.celsius - steady_c) * math.exp(-span_s / physics.tau_s)
            self.throttled = self.celsius > physics.throttle_c - (3.0 if self.throttled else 0.0)
            if physics.battery_j:
                self.charge = max(self.charge - watts * span_s / physics.battery_j, 0.0)
            self.busy_s += span_s if busy else 0.0
            self.now_s += span_s
            seconds -= span_s
            if self.now_s >= self._sampled_s + SAMPLE_S - 1e-9:
                elapsed_s = self.now_s - self._sampled_s
                self.readings = self._sample(
                    (self.joules - self._sampled_j) / elapsed_s, (self.busy_s - self._sampled_busy_s) / elapsed_s
                )
                self._sampled_s, self._sampled_j, self._sampled_busy_s = self.now_s, self.joules, self.busy_s

    def _sample(self, watts: float, share: float) -> tuple[Reading, ...]:
        """Readings of the sensors over the last ``SAMPLE_S``."""
        physics, now_s = self.physics, self.now_s
        watts, joules = self._gauge(watts)
        own = physics.step_utilization * share
        used = min(physics.others_utilization + own, 1.0)
        self._used_s += used * (now_s - self._sampled_s)
        self._own_s += own * (now_s - self._sampled_s)
        readings = [
            Reading(
                f"plant:{physics.rail}",
                physics.rail,
                now_s,
                watts=watts,
                joules=joules,
                celsius=self.celsius,
                throttled=self.throttled,
            ),
            Reading(
                "plant:cpu",
                "cpu",
                now_s,
                utilization=used,
                own_utilization=own if physics.own_known else None,
                busy_s=self._used_s,
                own_busy_s=self._own_s if physics.own_known else None,
            ),
            Reading("plant:gpu", "gpu", now_s, utilization=used, busy_s=self._used_s),
            Reading(
                "plant:process",
                "process",
                now_s,
                memory_bytes=physics.base_memory_bytes + self.rows_run * physics.row_bytes,
            ),
        ]
        if physics.battery_j:
            readings.append(Reading("plant:battery", "battery", now_s, charge=self.charge, charging=False))
        return tuple(readings)

    def _gauge(self, watts: float) -> tuple[float, float]:
        """The power gauge's value and joules: those of a counter, or the sum of a slow gauge's values, as the sampler sums."""
        physics, now_s, before_w = self.physics, self.now_s, self._shown_w
        if not (physics.gauge_delay_s or physics.gauge_average_s or physics.gauge_period_s):
            return watts, self.joules
        self._past.append((now_s, self.joules))
        if now_s >= self._shown_s + physics.gauge_period_s - 1e-9:
            end_s = now_s - physics.gauge_delay_s
            begin_s = end_s - max(physics.gauge_average_s, SAMPLE_S)
            self._shown_s = now_s
            self._shown_w = (self._joules_at(end_s) - self._joules_at(begin_s)) / (end_s - begin_s)
        self._summed_j += (before_w + self._shown_w) / 2 * SAMPLE_S
        return self._shown_w, self._summed_j

    def _joules_at(self, time_s: float) -> float:
        """Joules at a time, interpolated between samples; before the start the device was idle."""
        if time_s <= 0:
            return time_s * self.physics.idle_w
        place = bisect.bisect_right(self._past, (time_s, math.inf))
        if place == len(self._past):
            return self._past[-1][1]
        (begin_s, begin_j), (end_s, end_j) = self._past[place - 1 : place + 1]
        return begin_j + (end_j - begin_j) * (time_s - begin_s) / (end_s - begin_s)


class Plant(SimulatedDevice):
    """One sequence on a simulated device.

    Args:
        costs: true prices.
        physics: constants of the device.
        load: function from seconds since the start to a slowdown.
        prompt_tokens: number of rows of the prompt, which the first step runs.
        seed: seed of the noise.
    """

    def __init__(
        self,
        costs: CostModel,
        physics: Physics,
        load: Callable[[float], float],
        *,
        prompt_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(costs, physics, load, seed)
        self._new = prompt_tokens
        self.length = 0
        self._stages = [0] * len(costs.exits)
        self._balconies = [0] * (len(costs.exits) - 1)
        self.emitted_s = self._portion_s = 0.0

    def rows_due(self) -> tuple[list[int], list[int]]:
        """Number of rows that each stage and each balcony would run at the next step."""
        total = self.length + self._new
        return [total - cursor for cursor in self._stages], [*(total - cursor for cursor in self._balconies), 1]

    @property
    def pending_rows(self) -> int:
        """Number of rows that the deepest stage has not taken in yet."""
        return self.length - self._stages[-1]

    def step(
        self, exit_layer: int, catch_up: CatchUp | None = None, *, period_ms: float = 0.0, idle_ms: float = 0.0
    ) -> tuple[float, float]:
        """Catch up, run one step, and wait until its token is due; ``idle_ms`` of the wait go to the backlog.

        Returns:
            ``(gap since the previous token, step with its catch-up)``, ms.
        """
        begin_s = self.now_s
        if catch_up is not None:
            self.work(self._run(catch_up.stage, catch_up.rows, balcony=catch_up.balcony))
        index = self.costs.exits.index(exit_layer)
        price_ms = self.costs.steps_ms(*self.rows_due(), self.length + self._new - 1)[index]
        self.length += self._new
        self._new = 1
        self._stages[: index + 1] = [self.length] * (index + 1)
        self.rows_run = sum(self._stages)
        if index < len(self._balconies):
            self._balconies[index] = self.length
        self.work(price_ms)
        step_ms = (self.now_s - begin_s) * 1000
        due_s = self.emitted_s + period_ms / 1000
        self._work_off(min(due_s, self.now_s + idle_ms / 1000), step_ms / 1000)
        self.wait(due_s - self.now_s)
        gap_ms, self.emitted_s = (self.now_s - self.emitted_s) * 1000, self.now_s
        return gap_ms, step_ms

    def _run(self, stage: int, rows: int, *, balcony: bool) -> float:
        """Run pending rows through one graph and return the price. Asking for more rows than are ready is a bug."""
        cursors = self._balconies if balcony else self._stages
        ready = self._stages[stage] if balcony else self._stages[stage - 1] if stage else self.length
        if not 0 < rows <= ready - cursors[stage]:
            raise AssertionError(f"{rows} rows of stage {stage} asked for, {ready - cursors[stage]} are ready")
        cursors[stage] += rows
        self.rows_run = sum(self._stages)
        unit = (self.costs.balconies if balcony else self.costs.stages)[stage]
        return unit.pass_ms(rows, self.length, 1 if balcony else None)

    def _work_off(self, until_s: float, portion_s: float) -> None:
        """Run portions of the backlog as the decode loop does: each if there is time for one as long as the one before.

        ``portion_s`` is the time that the first counts as, unless the last one of all took longer: that of the step.
        """
        portion_s = max(portion_s, self._portion_s)
        self._portion_s -= self._portion_s / PORTION_MEMORY
        while self.now_s + portion_s <= until_s and (price_ms := self._portion()):
            begin_s = self.now_s
            self.work(price_ms)
            portion_s = self._portion_s = self.now_s - begin_s

    def _portion(self) -> float:
        """Run at most ``IDLE_ROWS`` pending rows, shallowest stage first and balconies last, and return their price."""
        left, price_ms = IDLE_ROWS, 0.0
        for balcony, cursors in ((False, self._stages), (True, self._balconies)):
            for index, done in enumerate(cursors):
                ready = self._stages[index] if balcony else self._stages[index - 1] if index else self.length
                if rows := min(ready - done, left):
                    price_ms += self._run(index, rows, balcony=balcony)
                    left -= rows
        return price_ms
