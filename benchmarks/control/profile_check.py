"""Check of device profiles: predictions of unseen steps, two profiles in a row, and the same loop timed outside.

    python -m benchmarks.control.profile_check BUNDLE [--quick] [--keep DIR]

Owns three figures and their bars, on one JSON line (exit code 1 if one is missed):

    held_out     50 steps at exits, contexts and pending rows that are not on the grid, drawn with a fixed seed: the profile's
                 price compared with the step's median. Median error <= 5 %, 95th percentile <= 15 %. The time of a full-depth
                 token in the same rounds, divided by its time in the profile (`drift`), is the machine's drift. Each error
                 is corrected by it.
    two_in_a_row Two profiles, each made in a process of its own, as a user makes them: the share of entries whose difference
                 is within both intervals, sqrt(u1² + u2²), after correction by their common factor (`drift`). At least 95 %.
    outside      Full-depth decode timed by a stopwatch around `next(stream)`, in rounds that alternate with the profiler's
                 own blocks, on a sequence of the same length: the ratio of the medians. 0.97 to 1.03.

Other programs that take CPU time affect all three; `others_cpu_share` says how much they took.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.device.profile import DeviceProfile
from balcony_runtime.llm import LLM
from balcony_runtime.profiler.cells import WARM_TOKENS, Bench, Key, prompt, switched
from balcony_runtime.profiler.grid import Grid
from balcony_runtime.profiler.results import fixed_ms
from benchmarks.rounds import Neighbours, p95

COMBINATIONS, ROUNDS = 50, 5
LONGEST, MOST_PENDING = 1500, 200
OUTSIDE_CONTEXT = 128


def main() -> int:
    """Run all three checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="directory in which to keep the two profiles")
    parser.add_argument("--quick", action="store_true", help="quick profiles and ten steps: checks only that it runs")
    arguments = parser.parse_args()
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory() as directory:
        paths = [(arguments.keep or Path(directory)) / f"{name}.json" for name in "ab"]
        for path in paths:
            verb = ["profile", str(arguments.bundle), "-o", str(path), *(["--quick"] if arguments.quick else [])]
            program = "from balcony_edge.cli import main; main()"
            subprocess.run([sys.executable, "-c", program, *verb], check=True, stdout=subprocess.DEVNULL)
        first, second = (DeviceProfile.load(path) for path in paths)
    with balcony_edge.load(arguments.bundle) as llm:
        result: dict[str, Any] = {
            "held_out": held_out(llm, second, 10 if arguments.quick else COMBINATIONS),
            "two_in_a_row": two_in_a_row(first, second),
            "outside": outside(llm),
            **neighbours.report(),
        }
    print(json.dumps(result))
    return 0 if all(part["met"] for part in result.values() if isinstance(part, dict)) else 1


def held_out(llm: LLM, profile: DeviceProfile, count: int) -> dict[str, Any]:
    """Compare the prices of steps with a backlog with their times; corrected by the machine's drift since the profile."""
    generator = random.Random(20261125)
    exits, typical = profile.costs.exits, {}
    for one in profile.entries:
        typical[Key(one.kind, one.exit_layer, one.from_exit, one.rows, one.context)] = one.timing.p50_ms
    costs = replace(profile.costs, overhead_ms=fixed_ms(typical))  # steps at fixed exits have no decision
    longest = min(LONGEST, llm.engine.manifest.model.context_length - MOST_PENDING - 2)
    combinations = [
        (generator.randrange(len(exits)), generator.randrange(1, longest), int(MOST_PENDING ** generator.random()))
        for _ in range(count)
    ]
    reference = min(profile.select("decode", exits[-1]), key=lambda entry: abs(entry.context - OUTSIDE_CONTEXT))
    bench = Bench(llm, Grid.make(llm.engine.manifest.model.context_length, quick=True, depths=(reference.context,)))
    key = Key("decode", exits[-1], context=reference.context)
    shares, drifts = [], []
    for index, context, pending in combinations:
        tokens = prompt(context + pending, llm.engine.manifest.model.vocab_size)
        sequence = llm.engine.new_sequence(max_length=len(tokens) + 2)
        sequence.advance(exits[-1], tokens[:context])
        sequence.catch_up()
        # The rows are pending after the next shallower exit; for the shallowest exit, in its balcony.
        before = exits[index - 1] if index else exits[-1]
        errors, now = [], []
        for number in range(ROUNDS + 1):
            # Decode once uncounted: tokens after a pass of many rows are slower (docs/LOG.md, "First steps are
            # slower").
            bench.decode(exits[-1], reference.context)
            now += bench.decode(exits[-1], reference.context)[key]
            found = switched(llm, sequence, before, exits[index], tokens, pending)
            price_ms = costs.step_ms(exits[index], found.stage_rows, found.balcony_rows, found.position)
            if number:
                errors.append(price_ms / found.latency_ms)
        drifts.append(median(now) / reference.timing.p50_ms)
        shares.append(median(errors) * drifts[-1] - 1)
    sizes = [abs(share) for share in shares]
    middle, high = median(sizes), p95(sizes)
    worst = max(range(count), key=sizes.__getitem__)
    return {
        "combinations": count,
        "median_error": round(middle, 4),
        "p95_error": round(high, 4),
        "bias": round(median(shares), 4),
        "drift": round(median(drifts), 4),
        "worst": {"exit_layer": exits[combinations[worst][0]], "context": combinations[worst][1],
                  "pending": combinations[worst][2], "error": round(shares[worst], 4)},
        "met": middle <= 0.05 and high <= 0.15,
    }  # fmt: skip


def two_in_a_row(first: DeviceProfile, second: DeviceProfile) -> dict[str, Any]:
    """Share of the entries that agree within their intervals, after correction by the machine's drift."""
    other = {entry.key: entry.timing for entry in second.entries}
    pairs = [(entry.timing, other[entry.key]) for entry in first.entries if entry.key in other and entry.timing.p50_ms]
    drift = median(b.p50_ms / a.p50_ms for a, b in pairs)

    def share_of(scale: float) -> float:
        agree = [abs(scale * a.p50_ms - b.p50_ms) <= math.hypot(a.uncertainty_ms, b.uncertainty_ms) for a, b in pairs]
        return sum(agree) / len(agree)

    share = share_of(drift)
    widths = [a.uncertainty_ms / a.p50_ms for a, _ in pairs]
    return {
        "entries": len(pairs),
        "drift": round(drift, 4),
        "agree": round(share, 3),
        "agree_with_drift": round(share_of(1.0), 3),
        "median_difference": round(median(abs(b.p50_ms / a.p50_ms / drift - 1) for a, b in pairs), 4),
        "median_uncertainty": round(median(widths), 4),
        "met": share >= 0.95,
    }


def outside(llm: LLM) -> dict[str, Any]:
    """Compare the profiler's decode blocks with a stopwatch, in alternation."""
    full, context = llm.exit_layers[-1], min(OUTSIDE_CONTEXT, llm.engine.manifest.model.context_length // 4)
    grid = Grid.make(llm.engine.manifest.model.context_length, quick=True, depths=(context,))
    bench = Bench(llm, grid)
    tokens = prompt(context + 1, llm.engine.manifest.model.vocab_size)
    sequence = llm.engine.new_sequence(max_length=context + grid.tokens + 1)
    sequence.advance(full, tokens[:context])
    inside: list[float] = []
    by_stopwatch: list[float] = []
    for number in range(2 * ROUNDS + 1):
        own = bench.decode(full, context)[Key("decode", full, context=context)]
        llm.budget = Budget(exit_layer=full)
        stream = llm.stream(tokens, max_new_tokens=grid.tokens, ignore_eos=True, sequence=sequence)
        gaps = []
        for _ in range(grid.tokens):
            begin_ns = time.perf_counter_ns()
            next(stream)
            gaps.append((time.perf_counter_ns() - begin_ns) / 1e6)
        sequence.rollback(context)
        if number:
            inside += own
            by_stopwatch += gaps[WARM_TOKENS:]
    ratio = median(inside) / median(by_stopwatch)
    return {
        "profiler_ms": round(median(inside), 3),
        "stopwatch_ms": round(median(by_stopwatch), 3),
        "ratio": round(ratio, 4),
        "met": 0.97 <= ratio <= 1.03,
    }


if __name__ == "__main__":
    sys.exit(main())
