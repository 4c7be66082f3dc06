"""The controller on the real model while another process takes the CPU: the second half of :mod:`.controller`.

Owns the competitor, the alignment of runs, and the definition of a late token. The competitor is a process pinned to one of
our CPUs. It sweeps an array (which takes cycles, cache and memory bandwidth) for a share of every 20 ms. The share follows
a load of :mod:`balcony_edge.simulation.loads` on a clock that both processes know.

The competitor's priority is chosen by trial so that the shallowest exit still holds the target under it. The target is the
time of full depth on an idle machine / 0.9. The slowed shallowest exit must cost no more than 0.9 of the target.

Each load is run under the controller, at the shallowest exit alone (twice) and at full depth alone, always from the same
moment of the load. A token is *late* if its gap exceeds the target and no token of the shallowest exit at that moment of
the load exceeded it: a gap that no exit could hold is not counted. ``late_steady`` is the share of late tokens more than
200 tokens after a step of the load. ``late_after_step`` is the largest number of late tokens among the 200 after a step
(loads without steps have only ``late_steady``). The second run at the shallowest exit is scored like the others: it shows
how much the same steps vary on this machine.

    python benchmarks/control/controller.py --real BUNDLE
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from balcony_edge.budget import Budget
from balcony_edge.simulation.loads import Load, parse_load
from balcony_runtime.llm import LLM

#: Name → load; its height above 1 is the competitor's share of each slice.
LOADS = {
    "square": "square:high=2,period_s=16",
    "bursts": "bursts:high=2,mean_s=0.3,every_s=2,seed=3",
    "ramp": "ramp:high=2,from_s=2,to_s=22",
}
SECONDS, QUICK_SECONDS = 32.0, 17.0
#: Tokens after a step of the load that are counted separately.
AFTER_STEP = 200
#: Length of the competitor's slice, and the nice values that are tried, weakest first.
SLICE_S, NICES = 0.02, (8, 6, 5, 4, 3, 2, 1, 0)
#: Share of the target that full depth takes on an idle machine, and that the slowed shallowest exit may take.
SHARE = 0.9
#: Probability asked of the controller. The bars allow 4 to 5 % late tokens, and the scheduler's slices make steps under a
#: competitor uneven.
PROBABILITY = 0.98
PROMPT = [17] * 32


class Gap(NamedTuple):
    """A token: the times of its request and its arrival on the load's clock, and its exit."""

    begin_s: float
    end_s: float
    exit_layer: int

    @property
    def ms(self) -> float:
        return (self.end_s - self.begin_s) * 1000


def compete(load: str, epoch_s: float, nice: int) -> None:
    """Run the competitor: busy for the load's share of every slice, until it is killed."""
    os.nice(nice)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    share_at, swept = parse_load(load), np.ones(2**20, np.float32)
    while True:
        now_s = time.monotonic() - epoch_s
        until_s = now_s + SLICE_S * (share_at(max(now_s, 0.0)) - 1)
        while time.monotonic() - epoch_s < until_s:
            swept *= 1.0
        rest_s = now_s + SLICE_S - (time.monotonic() - epoch_s)
        if rest_s > 0:
            time.sleep(rest_s)


@contextmanager
def competitor(load: str, nice: int) -> Iterator[float]:
    """Run a competing process; yields the time at which its load's clock starts, a second from now."""
    epoch_s = time.monotonic() + 1.0  # by then the competitor has started
    code = f"from benchmarks.control.contention import compete; compete({load!r}, {epoch_s!r}, {nice})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        time.sleep(max(epoch_s - time.monotonic(), 0.0))
        yield epoch_s
    finally:
        process.kill()
        process.wait()


def _run(llm: LLM, budget: Budget, seconds: float, epoch_s: float) -> list[Gap]:
    llm.budget = budget
    out: list[Gap] = []
    before_s: float | None = None
    for token in llm.stream(PROMPT, ignore_eos=True):
        now_s = time.monotonic() - epoch_s
        if before_s is not None:
            out.append(Gap(before_s, now_s, token.exit_layer))
        before_s = now_s
        if now_s > seconds:
            break
    return out


def _typical_ms(llm: LLM, exit_layer: int) -> float:
    """Median gap at an exit, with the context of the middle of a run."""
    llm.budget = Budget(exit_layer=exit_layer)
    stream = llm.stream(PROMPT * 12, max_new_tokens=60, ignore_eos=True)
    return median([token.latency_ms for token in stream][1:])


def _choose_nice(llm: LLM, target_ms: float) -> tuple[int, float]:
    """Find the strongest competitor under which the shallowest exit costs no more than its share; also its slowdown.

    If there is none, it is the weakest.
    """
    shallowest = llm.exit_layers[0]
    idle_ms, chosen, slowdown = _typical_ms(llm, shallowest), NICES[0], 1.0
    for nice in NICES:
        with competitor("constant:high=2", nice):
            slowed_ms = _typical_ms(llm, shallowest)
        if nice != NICES[0] and slowed_ms > SHARE * target_ms:
            break
        chosen, slowdown = nice, slowed_ms / idle_ms
    return chosen, slowdown


def _late(run: list[Gap], shallowest: list[Gap], target_ms: float) -> list[bool]:
    """For each token, whether it was late although the shallowest exit was in time at that moment of the load."""
    ends = [gap.end_s for gap in shallowest]

    def held(gap: Gap) -> bool:
        first = bisect_left(ends, gap.begin_s)
        meanwhile = shallowest[first : bisect_left(ends, gap.end_s) + 1]
        return all(other.ms <= target_ms for other in meanwhile)

    return [gap.ms > target_ms and held(gap) for gap in run]


def _steps_of(load: Load, seconds: float) -> list[float]:
    """Moments at which a load jumps by more than half."""
    moments = [index / 100 for index in range(int(seconds * 100))]
    return [b for a, b in itertools.pairwise(moments) if abs(load(b) - load(a)) > 0.5]


def _score(run: list[Gap], late: list[bool], steps: list[float]) -> dict[str, Any]:
    windows = [bisect_left([gap.end_s for gap in run], moment) for moment in steps]
    near = {index for first in windows for index in range(first, first + AFTER_STEP)}
    steady = [flag for index, flag in enumerate(late) if index not in near]
    return {
        "tokens": len(run),
        "late_steady": round(sum(steady) / max(len(steady), 1), 4),
        "late_after_step": max((sum(late[first : first + AFTER_STEP]) for first in windows), default=0),
        "depth": round(sum(gap.exit_layer for gap in run) / len(run), 2),
    }


def measure(bundle: Path, *, quick: bool) -> dict[str, Any]:
    """Measure item ``real`` of the JSON line: the target, the slowdown, and a row per load."""
    seconds = QUICK_SECONDS if quick else SECONDS
    rows = []
    with LLM.open(bundle, budget=Budget(tpot_ms=1000.0)) as llm:
        shallowest, full = llm.exit_layers[0], llm.exit_layers[-1]
        target_ms = _typical_ms(llm, full) / SHARE
        nice, slowdown = _choose_nice(llm, target_ms)
        budgets = {
            "shallowest": Budget(exit_layer=shallowest),
            "controller": Budget(tpot_ms=target_ms, probability=PROBABILITY),
            "full": Budget(exit_layer=full),
            "shallowest again": Budget(exit_layer=shallowest),
        }
        for name, load in LOADS.items():
            runs = {}
            for policy, budget in budgets.items():
                with competitor(load, nice) as epoch_s:
                    runs[policy] = _run(llm, budget, seconds, epoch_s)
            # A burst is not a step: it ends before 200 tokens are made.
            steps = [] if name == "bursts" else _steps_of(parse_load(load), seconds)
            scores = {
                policy: _score(run, _late(run, runs["shallowest"], target_ms), steps) for policy, run in runs.items()
            }
            missed = sum(gap.ms > target_ms for gap in runs["shallowest"]) / len(runs["shallowest"])
            rows.append(
                {
                    "load": name,
                    **scores["controller"],
                    "full": scores["full"],
                    "shallowest_again": scores["shallowest again"],
                    "shallowest_over_target": round(missed, 4),
                }
            )
    return {
        "bundle": str(bundle),
        "target_ms": round(target_ms, 2),
        "nice": nice,
        "slowdown": round(slowdown, 2),
        "loads": rows,
    }
