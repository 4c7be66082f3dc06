"""The picture of :mod:`benchmarks.control.controller`: a square wave, a power budget and a temperature ceiling over time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from balcony_edge.budget import Budget
from balcony_edge.simulation.loads import parse_load
from balcony_edge.simulation.plant import Physics, Plant
from balcony_edge.simulation.simulate import SimulatedToken, simulate
from benchmarks.control.controller import COSTS, DEVICE, SETTLING_S, TARGET_MS, oracle
from benchmarks.control.controller_limits import WINDOW_S

SQUARE = "square:high=1.7,period_s=6"
POWER_W, LIMIT_C = 4.4, 55.0


def plot(path: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    upper, lower = figure.subplots(2, 2, width_ratios=(2, 1.4), squeeze=True)
    run = simulate(COSTS, Plant(COSTS, DEVICE, parse_load(SQUARE)), Budget(tpot_ms=TARGET_MS), tokens=10**6, seconds=18)
    _gaps(upper[0], run[1:])  # the first gap is the prefill's
    _exits(lower[0], run)
    load = "square:high=1.5,period_s=20"
    budget = Budget(power_w=POWER_W, min_pace_tps=20)
    run = simulate(COSTS, Plant(COSTS, DEVICE, parse_load(load)), budget, tokens=10**6, seconds=60)
    times = [token.time_s for token in run]
    upper[1].plot(times, _mean_watts(run), color="C0", label="watts, mean of 5 s")
    upper[1].axhline(POWER_W, color="0.3", linestyle="--", label="budget")
    # A mean is drawn at its end, so the first one that counts is a window later than the settling.
    upper[1].axvspan(0, SETTLING_S + WINDOW_S, color="0.9", label="settling, not counted")
    upper[1].set_ylim(bottom=0)
    upper[1].set_title(f"power_w = {POWER_W:g}, load {load}", fontsize=9)
    budget = Budget(temperature_c=LIMIT_C, min_pace_tps=20)
    run = simulate(COSTS, Plant(COSTS, Physics(tau_s=40), parse_load("idle")), budget, tokens=10**6, seconds=300)
    times = [token.time_s for token in run]
    lower[1].plot(times, [token.celsius for token in run], color="C3", label="°C")
    lower[1].axhline(LIMIT_C, color="0.3", linestyle="--", label="ceiling")
    lower[1].set_title(f"temperature_c = {LIMIT_C:g}, one time constant of 40 s", fontsize=9)
    for axes in (*upper, *lower):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.set_xlabel("seconds")
    lower[0].legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))  # outside, where no line is
    figure.savefig(path, dpi=110)


def _gaps(axes: Any, run: list[SimulatedToken]) -> None:
    late = [token.latency_ms > TARGET_MS for token in run]
    for which, color, label in ((False, "C0", "in time"), (True, "C3", "late")):
        points = [(t.time_s, t.latency_ms) for t, is_late in zip(run, late, strict=True) if is_late is which]
        axes.plot(*zip(*points, strict=True), ".", color=color, markersize=3, label=label)
    axes.axhline(TARGET_MS, color="0.3", linestyle="--", label="target")
    axes.set_ylabel("milliseconds a token")
    axes.set_ylim(0, 2 * TARGET_MS)
    axes.set_title(f"tpot_ms = {TARGET_MS:g}, load {SQUARE}", fontsize=9)


def _exits(axes: Any, run: list[SimulatedToken]) -> None:
    axes.step(
        [t.time_s for t in run], [t.decision.exit_layer for t in run], where="post", color="C0", label="controller"
    )
    best = oracle(SQUARE, 0, len(run))
    times = itertools.accumulate(gap / 1000 for _, gap in best)
    axes.step(
        list(times), [layer for layer, _ in best], where="post", color="C2", alpha=0.6, label="oracle (knows the load)"
    )
    axes.set_yticks(COSTS.exits)
    axes.set_ylabel("exit layer")


def _mean_watts(run: list[SimulatedToken]) -> list[float]:
    values, joules, seconds, begin = [], 0.0, 0.0, 0
    for token in run:
        joules, seconds = joules + token.watts * token.latency_ms / 1000, seconds + token.latency_ms / 1000
        while seconds > WINDOW_S:
            first = run[begin]
            joules, seconds = joules - first.watts * first.latency_ms / 1000, seconds - first.latency_ms / 1000
            begin += 1
        values.append(joules / seconds)
    return values
