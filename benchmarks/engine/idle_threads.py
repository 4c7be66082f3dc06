"""What the engine's idle threads cost: they spin until the next pass, or they sleep.

    python -m benchmarks.engine.idle_threads BUNDLE [--rounds 5] [--pace 10] [--utilization 0.3]

Every sample is a process of its own that streams one reply, with threads that spin (``load(spin=True)``) or sleep
(``spin=False``), under each of three budgets:

    full   full depth, as fast as it can
    pace   at most so many tokens a second
    share  a ceiling of the utilization of the CPUs (``cpu_utilization``)

Figures are medians over interleaved rounds: ``tps``, tokens a second; ``cpu_ms``, CPU time of the process for each token in ms;
``cpu_share``, its share of the time of all CPUs, which ``share`` must hold. The first seconds of a reply do not count, because
the controller learns in them.

The output ends with one JSON line: ``cases``: budget, threads → these figures, ``ratios``: budget → sleeping over spinning, the
median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median

from balcony_edge.device.machine import available_cpus, cpu_name
from benchmarks.rounds import Neighbours, aligned, interleave, ratio

#: Seconds of a reply that do not count. With threads that spin, a ceiling of utilization is reached in 20.
SETTLING_S = {"full": 2.0, "pace": 2.0, "share": 25.0}
#: Seconds that count.
COUNTED_S = 6.0
FIGURES = ("tps", "cpu_ms", "cpu_share")
#: The process: bundle, budget, whether threads spin, seconds that settle and that count, CPUs; prints the figures.
CHILD = """
import json, sys, time
import balcony_edge
path, budget, spin, settling_s, counted_s, cpus = json.loads(sys.argv[1])
with balcony_edge.load(path, budget=balcony_edge.Budget(**budget), spin=spin) as llm:
    stream = llm.stream([5, 6, 7, 8], max_new_tokens=llm.engine.max_length - 4, ignore_eos=True)
    begin = time.monotonic()
    while time.monotonic() < begin + settling_s:
        next(stream)
    begin, before, count = time.monotonic(), time.process_time(), 0
    while time.monotonic() < begin + counted_s:
        next(stream)
        count += 1
    took_s, busy_s = time.monotonic() - begin, time.process_time() - before
    stream.close()
print(json.dumps({"tps": count / took_s, "cpu_ms": 1e3 * busy_s / count, "cpu_share": busy_s / took_s / cpus}))
"""


def measured(bundle: Path, budget: dict[str, float], spin: bool, settling_s: float) -> dict[str, float]:
    """Figures of one process."""
    asked = json.dumps([str(bundle), budget, spin, settling_s, COUNTED_S, available_cpus()])
    done = subprocess.run([sys.executable, "-c", CHILD, asked], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pace", type=float, default=10.0, help="tokens a second of `pace`")
    parser.add_argument("--utilization", type=float, default=0.3, help="ceiling of `share`")
    options = parser.parse_args()
    neighbours, bundle = Neighbours(), options.bundle.resolve()
    budgets = {"full": {}, "pace": {"max_pace_tps": options.pace}, "share": {"cpu_utilization": options.utilization}}
    samples = interleave(
        {
            (name, spin): partial(measured, bundle, budget, spin, SETTLING_S[name])
            for name, budget in budgets.items()
            for spin in (True, False)
        },
        options.rounds,
    )
    series = {case: {figure: [one[figure] for one in found] for figure in FIGURES} for case, found in samples.items()}
    cases = {
        f"{name}, threads {'spin' if spin else 'sleep'}": {
            figure: round(median(values), 3) for figure, values in found.items()
        }
        for (name, spin), found in series.items()
    }
    ratios = {
        name: {figure: round(ratio(series[name, False][figure], series[name, True][figure]), 3) for figure in FIGURES}
        for name in budgets
    }
    print("\n".join(aligned([["", *FIGURES], *([name, *found.values()] for name, found in cases.items())])))
    document = {"benchmark": "idle_threads", "cpu": cpu_name(), "rounds": options.rounds, **neighbours.report()}
    print(json.dumps({**document, "cases": cases, "ratios": ratios}))


if __name__ == "__main__":
    main()
