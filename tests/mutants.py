"""Mistakes on purpose: each is put into a copy of the code, and the tests that it names must fail.

    python tests/mutants.py [--only WORD ...]

Owns the list and the loop. A mutant is one place in one file with another text; the tests are those that are about it, so that
a run takes minutes. ``make test-deep`` runs all of them and prints the share that was found. A mutant whose text is no longer
in its file is an error: the list follows the code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("balcony_edge", "runtime", "export", "tests", "profiles", "benchmarks", "pyproject.toml")


class Mutant(NamedTuple):
    """One mistake."""

    what: str
    file: str
    old: str
    new: str
    tests: str


CONTROL = "tests/core/test_controller.py tests/core/test_simulate.py"
WAY = "tests/core/test_catching_up.py"
GAUGE = "tests/core/test_response.py tests/core/test_governor.py"
GOVERN = "tests/core/test_governor.py tests/core/test_simulate.py"
FILTER = "tests/core/test_slowdown.py"

MUTANTS = (
    # the controller
    Mutant(
        "up without the hysteresis",
        "balcony_edge/control/controller.py",
        "price <= room * free",
        "price <= room",
        CONTROL,
    ),
    Mutant(
        "no dwell",
        "balcony_edge/control/controller.py",
        "state.tokens_since_switch >= budget.dwell_tokens",
        "True",
        CONTROL,
    ),
    Mutant(
        "a ceiling is left without its dwell",
        "balcony_edge/control/controller.py",
        "may_rise = may_rise and seen.now_s - state.switched_s >= CEILING_DWELL_S",
        "pass",
        CONTROL,
    ),
    Mutant(
        "a deadline priced at the present context",
        "balcony_edge/control/controller.py",
        "middle = seen.context_length + remaining // 2",
        "middle = seen.context_length",
        CONTROL,
    ),
    Mutant(
        "a deadline forgets the bursts",
        "balcony_edge/control/controller.py",
        "math.sqrt(slowdown.ratio_variance * BURST_TOKENS * remaining)",
        "0.0",
        CONTROL,
    ),
    Mutant(
        "a deadline does not react",
        "balcony_edge/control/controller.py",
        "max(slowdown.ratio_mean, slowdown.factor, 1e-6)",
        "max(slowdown.ratio_mean, 1e-6)",
        CONTROL,
    ),
    Mutant(
        "the mean of the ratio is left out",
        "balcony_edge/control/controller.py",
        "max(slowdown.ratio_mean, slowdown.factor, 1e-6)",
        "max(slowdown.factor, 1e-6)",
        CONTROL,
    ),
    Mutant(
        "the first token pays for its backlog",
        "balcony_edge/control/controller.py",
        "room_ms = [math.inf if first else spike_ms]",
        "room_ms = [spike_ms]",
        CONTROL,
    ),
    Mutant(
        "a backlog may make any spike", "balcony_edge/control/controller.py", "SPIKE = 2.0", "SPIKE = 20.0", CONTROL
    ),
    Mutant(
        "the wait forgets that it is late",
        "balcony_edge/control/controller.py",
        "(1 - PACE_MARGIN) * 1000 * max(seen.left_s, 0.0) / seen.remaining",
        "1e9",
        CONTROL,
    ),
    Mutant(
        "no jitter margin in the pace",
        "balcony_edge/control/controller.py",
        "_needed_tps(budget, seen) / (1 - PACE_MARGIN)",
        "_needed_tps(budget, seen)",
        CONTROL,
    ),
    Mutant(
        "a switch is not charged",
        "balcony_edge/control/controller.py",
        "price_ms + costs.switch_ms)",
        "price_ms)",
        CONTROL,
    ),
    Mutant(
        "a sprint that comes no closer goes on",
        "balcony_edge/control/catching_up.py",
        "_tokens(costs, outlook, seen, consumers, base) < math.inf",
        "True",
        WAY,
    ),
    Mutant(
        "critical heat of another budget",
        "balcony_edge/control/governor.py",
        "limit_c is not None and self.critical_c >= limit_c",
        "True",
        GAUGE,
    ),
    Mutant(
        "no doubt after a pause",
        "balcony_edge/control/slowdown.py",
        "max(self.variance, PAUSE_VARIANCE)",
        "self.variance",
        f"{FILTER} {CONTROL}",
    ),
    # the way back
    Mutant(
        "a sprint is never begun", "balcony_edge/control/catching_up.py", "if not may_sprint or (", "if True or (", WAY
    ),
    Mutant(
        "a late token without credit",
        "balcony_edge/control/catching_up.py",
        "room_ms * OVERDRAFT if credit else room_ms",
        "room_ms * OVERDRAFT",
        WAY,
    ),
    Mutant(
        "late tokens cost no credit",
        "balcony_edge/control/catching_up.py",
        "* (1 - probability) - late",
        "* (1 - probability)",
        WAY,
    ),
    Mutant("sprints never wait", "balcony_edge/control/catching_up.py", "wait=FIRST_WAIT << doublings", "wait=0", WAY),
    Mutant(
        "a chunk larger than what is ready",
        "balcony_edge/control/catching_up.py",
        "min(consumer.ready, most)",
        "most",
        f"{WAY} tests/core/test_controller_properties.py",
    ),
    Mutant(
        "a sprint of any length",
        "balcony_edge/control/catching_up.py",
        "if base < chosen and not won >",
        "if False and not won >",
        WAY,
    ),
    # the filter
    Mutant(
        "one outlier moves the filter",
        "balcony_edge/control/slowdown.py",
        "if side and side != surprise:",
        "if False:",
        FILTER,
    ),
    Mutant(
        "a change of load is an outlier for ever",
        "balcony_edge/control/slowdown.py",
        "changed = bool(side) or",
        "changed = False and",
        FILTER,
    ),
    Mutant("the drift is not watched", "balcony_edge/control/slowdown.py", "abs(drift) > DRIFT_LIMIT", "False", FILTER),
    Mutant(
        "offsets are never forgotten",
        "balcony_edge/control/slowdown.py",
        "kept = 0, 1 - OFFSET_DECAY",
        "kept = 0, 1.0",
        FILTER,
    ),
    Mutant(
        "noise may vanish",
        "balcony_edge/control/slowdown.py",
        "max(noise_variance + noise_rate * (sample - noise_variance), NOISE_FLOOR)",
        "noise_variance + noise_rate * (sample - noise_variance)",
        FILTER,
    ),
    Mutant(
        "the plain mean leaves bursts out",
        "balcony_edge/control/slowdown.py",
        "ratio_mean += step",
        "ratio_mean += 0.0 * step",
        f"{FILTER} {CONTROL}",
    ),
    # the slow loop
    Mutant(
        "the integral grows while something else binds",
        "balcony_edge/control/governor.py",
        '(output < 1 and "temperature_c" in before.binding)',
        "output < 1",
        GOVERN,
    ),
    Mutant(
        "the integral winds up below 0",
        "balcony_edge/control/governor.py",
        "min(max(integral + error * min(span_s, 1.0) / INTEGRAL_S, 0.0), 1.0)",
        "min(integral + error * min(span_s, 1.0) / INTEGRAL_S, 1.0)",
        GOVERN,
    ),
    Mutant(
        "out of reach at once",
        "balcony_edge/control/governor.py",
        "max(SETTLING_S, budget.power_window_s)",
        "0.0",
        GOVERN,
    ),
    Mutant(
        "a share comes back at once",
        "balcony_edge/control/governor.py",
        "before.share + 0.1)",
        "before.share + 1.0)",
        GOVERN,
    ),
    Mutant(
        "a share falls to nothing at once",
        "balcony_edge/control/governor.py",
        "max(share, before.share / 2)",
        "share",
        GOVERN,
    ),
    Mutant(
        "the ceiling has no dwell",
        "balcony_edge/control/governor.py",
        "now_s - governor.changed_s >= CEILING_DWELL_S",
        "True",
        GOVERN,
    ),
    Mutant(
        "joules a token ignore the pace",
        "balcony_edge/control/governor.py",
        "gap_s = max(demand.step_s[index], slowest_s)",
        "gap_s = demand.step_s[index]",
        GOVERN,
    ),
    Mutant(
        "the filter of another rail is kept",
        "balcony_edge/control/governor.py",
        "before.power if before.rail == budget.power_rail else None",
        "before.power",
        GOVERN,
    ),
    Mutant(
        "a full battery takes depth away",
        "balcony_edge/control/governor.py",
        "elif not charge.charging:",
        "else:",
        GOVERN,
    ),
    Mutant(
        "no margin below a share of the CPUs",
        "balcony_edge/control/governor.py",
        "limit * (1 - PACE_MARGIN / 2)",
        "limit * 1.2",
        GOVERN,
    ),
    Mutant(
        "hopeless is not said",
        "balcony_edge/control/governor.py",
        "short = short or (hopeless and share <= LEAST_SHARE)",
        "pass",
        GAUGE,
    ),
    # readings
    Mutant(
        "only the first part of a rail counts",
        "balcony_edge/control/observed.py",
        "value = sum(reading.watts or 0.0 for reading in found)",
        "value = found[0].watts or 0.0",
        GOVERN,
    ),
    Mutant(
        "old readings count", "balcony_edge/control/observed.py", "now_s - reading.time_s <= STALE_S", "True", GOVERN
    ),
    Mutant("nonsense degrees count", "balcony_edge/control/observed.py", "LEAST_C <= value <= MOST_C", "True", GOVERN),
    Mutant(
        "a gauge is always instant",
        "balcony_edge/control/response.py",
        "best = min(range(len(fits)), key=lambda index: fits[index].error)",
        "best = 0",
        GAUGE,
    ),
    Mutant(
        "a gauge that repeats itself is believed",
        "balcony_edge/control/response.py",
        "news = after.changes > 0 or now_s - after.shown_s >= STILL_S",
        "news = True",
        GAUGE,
    ),
    Mutant(
        "another clock keeps the past",
        "balcony_edge/control/response.py",
        "if now_s < self.since_s or now_s < self.shown_s:",
        "if False:",
        GAUGE,
    ),
    Mutant(
        "our own part is taken for others'", "balcony_edge/control/response.py", "max(value - own, 0.0)", "value", GAUGE
    ),
    # verdicts
    Mutant(
        "the first token is a gap",
        "balcony_edge/control/verdict.py",
        "self._gaps_ms[1:] if self._from_start",
        "self._gaps_ms if self._from_start",
        "tests/core/test_verdict.py",
    ),
    Mutant(
        "one gap too many is in time",
        "balcony_edge/control/verdict.py",
        "max(math.ceil(budget.probability * len(gaps) - 1e-9), 1) - 1",
        "max(math.ceil(budget.probability * len(gaps) - 1e-9), 1) - 2",
        "tests/core/test_verdict.py",
    ),
    Mutant(
        "a floor is taken for a ceiling",
        "balcony_edge/control/verdict.py",
        'key in ("min_pace_tps", "battery_floor_percent")',
        "False",
        "tests/core/test_verdict.py",
    ),
    # the runtime
    Mutant(
        "a refused draft is kept",
        "runtime/balcony_runtime/decoding/speculate.py",
        "sequence.rollback(begin + len(tokens))",
        "sequence.rollback(begin + len(tokens) + 1)",
        "tests/runtime/test_speculate.py",
    ),
    Mutant(
        "drafts after a refused one were judged",
        "runtime/balcony_runtime/decoding/speculate.py",
        "tried = min(kept + 1, planned.drafts)",
        "tried = planned.drafts",
        "tests/runtime/test_speculate.py",
    ),
    Mutant(
        "a round pays for one row of the head",
        "runtime/balcony_runtime/decoding/speculate.py",
        "return whole_ms + costs.head.pass_ms(drafts + 1, context_length) - costs.head.pass_ms(1, context_length)",
        "return whole_ms",
        "tests/runtime/test_speculate.py",
    ),
    Mutant(
        "watts are summed up over a pause",
        "runtime/balcony_runtime/sensors/sampler.py",
        "SUM_PAUSE_S = 2.0",
        "SUM_PAUSE_S = 1e9",
        "tests/runtime/sensors/test_sampler.py",
    ),
    Mutant(
        "an absent source is asked at the full rate",
        "runtime/balcony_runtime/sensors/sampler.py",
        "min(2 * pause_s, REDISCOVER_S)",
        "self._period_s",
        "tests/runtime/sensors/test_sampler.py",
    ),
    # training
    Mutant(
        "a token drawn evenly represents itself",
        "export/balcony_export/train/loss.py",
        "offset[len(chosen) :] = math.log(len(others) / count)",
        "pass",
        "tests/export/test_distill_parts.py",
    ),
    Mutant(
        "attention sees one key too many",
        "export/balcony_export/train/attention.py",
        ".triu(1)",
        ".triu(2)",
        "tests/export/test_distill_parts.py",
    ),
)


def survives(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests pass with the mistake in."""
    file = copy / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.file}: {mutant.old!r} is there {text.count(mutant.old)} times: mend the list ({mutant.what})"
        )
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return passes(mutant.tests, copy)
    finally:
        file.write_text(text, encoding="utf-8")


def passes(tests: str, copy: Path) -> bool:
    """Whether tests pass in the copy; one that hangs does not."""
    paths = os.pathsep.join(map(str, (copy, copy / "export", copy / "runtime")))
    if absent := [test for test in tests.split() if not (copy / test).exists()]:
        raise SystemExit(f"{absent[0]}: is not there: mend the list")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    try:
        done = subprocess.run(
            command, check=False, cwd=copy, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        raise SystemExit(f"{tests}: pytest ended with {done.returncode}:\n{done.stdout.decode()[-2000:]}")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Put mistakes into the code and see tests fail.")
    parser.add_argument("--only", nargs="+", default=[], help="words of the mutants to run")
    words = parser.parse_args().only
    chosen = [
        mutant for mutant in MUTANTS if not words or any(word in f"{mutant.what} {mutant.file}" for word in words)
    ]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for tests in sorted({mutant.tests for mutant in chosen}):
            if not passes(tests, copy):
                raise SystemExit(f"{tests}: fail without a mistake: mend them first")
        for mutant in chosen:
            alive = survives(mutant, copy)
            survivors += [mutant.what] if alive else []
            print(f"{'SURVIVES' if alive else 'found   '}  {mutant.file}: {mutant.what}", flush=True)  # noqa: T201
    found = len(chosen) - len(survivors)
    score = round(found / max(len(chosen), 1), 3)
    print(json.dumps({"mutants": len(chosen), "found": found, "score": score, "survivors": survivors}))  # noqa: T201
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
