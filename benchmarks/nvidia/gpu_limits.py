"""The controller's ceilings on a GPU: `power_w` and `gpu_utilization`, held by exits and pace while replies run.

    python -m benchmarks.nvidia.gpu_limits BUNDLE [--device auto] [--engines NAME] [--seconds 40]

First the idle GPU is measured, then one reply after another without a budget. Each ceiling then lies at a share of the way from
idle to that, for `--seconds`; the mean of the second half counts, when the controller has settled.

The last line is JSON: ``gpu``, ``idle`` and ``busy`` (``watts``, ``utilization``, ``tokens_per_s``), and ``runs`` (``key``,
``asked``, ``got``, ``held``, ``tokens_per_s``, ``exits``: tokens of each exit). Bar: ``got`` is at most 1.05 of ``asked``;
exit code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import balcony_edge
from balcony_edge import LLM, Budget
from balcony_edge.device.machine import this_device
from balcony_edge.device.readings import Reading
from balcony_edge.errors import DeviceError
from balcony_runtime.sensors import Sensors, device_sources

SHARES = (0.7, 0.4)
TOLERANCE = 1.05
PROMPT = "Write a long story about a river."
Look = Callable[[], Sequence[Reading]]


def gpu_reading(look: Look) -> Reading:
    """The reading of the GPU that the runtime uses.

    Raises:
        DeviceError: no sensor measures a GPU's power and utilization.
    """
    for reading in look():
        if reading.scope == "gpu" and reading.watts is not None and reading.utilization is not None:
            return reading
    raise DeviceError("no sensor gives the watts and utilization of a GPU: see `balcony-edge doctor`")


def run(llm: LLM, look: Look, budget: Budget | None, seconds: float) -> dict[str, Any]:
    """Reply for some seconds; means over the second half."""
    begin, exits, made = time.monotonic(), Counter[int](), 0
    watts, utilization = [], []
    while (now := time.monotonic()) < begin + seconds:
        for token in llm.stream(PROMPT, budget=budget, max_new_tokens=128, ignore_eos=True):
            now = time.monotonic()
            if now >= begin + seconds / 2:
                reading, made = gpu_reading(look), made + 1
                watts.append((now, reading.watts or 0.0))
                utilization.append((now, reading.utilization or 0.0))
                exits[token.exit_layer] += 1
            if now >= begin + seconds:
                break
    return {
        "watts": over_time(watts),
        "utilization": over_time(utilization),
        "tokens_per_s": made / (now - begin - seconds / 2),
        "exits": dict(sorted(exits.items())),
    }


def over_time(samples: Sequence[tuple[float, float]]) -> float:
    """Mean of a value over time, out of (second, value): samples are taken at tokens, which come unevenly."""
    spans = [(after - at, value) for (at, value), (after, _) in pairwise(samples)]
    whole = sum(span for span, _ in spans)
    return sum(span * value for span, value in spans) / whole if whole else fmean(v for _, v in samples)


def measure(llm: LLM, look: Look, seconds: float) -> dict[str, Any]:
    """All runs; the JSON document without the machine."""
    readings = []
    for _ in range(10):
        readings.append(gpu_reading(look))
        time.sleep(seconds / 80)
    idle = {
        "watts": fmean(r.watts or 0.0 for r in readings),
        "utilization": fmean(r.utilization or 0.0 for r in readings),
    }
    busy = run(llm, look, None, seconds / 2)
    runs = []
    for key, quantity in (("power_w", "watts"), ("gpu_utilization", "utilization")):
        for share in SHARES:
            asked = idle[quantity] + share * (busy[quantity] - idle[quantity])
            budget = Budget(power_w=asked, power_rail="gpu") if key == "power_w" else Budget(gpu_utilization=asked)
            found = run(llm, look, budget, seconds)
            got = found[quantity]
            entry = {"key": key, "asked": asked, "got": got, "held": got <= TOLERANCE * asked}
            runs.append({**entry, "tokens_per_s": found["tokens_per_s"], "exits": found["exits"]})
            print(f"{key} {asked:.3g}: {got:.3g} with {found['tokens_per_s']:.1f} tokens/s, exits {found['exits']}")
    return {"benchmark": "gpu_limits", "idle": idle, "busy": busy, "runs": runs}


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engines")
    parser.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()
    with Sensors(device_sources(), rate_hz=10) as sensors:
        time.sleep(1.0)
        gpu_reading(sensors.latest)  # says that there is no GPU before anything is loaded
        with balcony_edge.load(options.bundle, device=options.device, engines=options.engines) as llm:
            document = measure(llm, sensors.latest, options.seconds)
    print(json.dumps({**document, "gpu": [gpu.model_dump() for gpu in this_device().gpus]}))
    return 0 if all(run["held"] for run in document["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
