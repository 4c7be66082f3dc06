"""Cost of the sensors during decoding: one look, the sampling threads' CPU time, and the delays of Python code.

    python benchmarks/control/sensors.py [--sysfs ROOT] [--seconds 20] [--resident-mb 500]

Sampling runs in threads of this process. So it costs CPU time, and it delays the decode loop while such a thread holds
Python's lock. The CPU time is that of the whole process while its main thread sleeps. The delay is measured with a loop
whose iterations take 20 µs of Python: the share of iterations above 1 ms, with and without sampling, in alternation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

from balcony_edge.control.verdict import nearest_rank
from balcony_runtime.sensors import Sensors, device_sources

RATE_HZ = 5.0


def look_us(sensors: Sensors) -> list[float]:
    """Times of many calls of ``latest()`` in microseconds, sorted."""
    times = []
    for _ in range(2000):
        began = time.perf_counter_ns()
        sensors.latest()
        times.append((time.perf_counter_ns() - began) / 1000)
    return sorted(times)


def hiccups(seconds: float) -> float:
    """Share of iterations of a Python loop that took longer than 1 ms."""
    late = count = 0
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        sum(range(1000))
        late += time.perf_counter() - began > 1e-3
        count += 1
    return late / count


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sysfs", type=Path, default=Path("/sys"))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--resident-mb", type=int, default=500)
    arguments = parser.parse_args()
    # Private pages of 4 KiB, which the kernel has to count when the memory sensor reads.
    ballast = bytearray(b"w") * (arguments.resident_mb * 1_000_000)
    shares: list[float] = []
    loops: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(3):
        loops["without"].append(hiccups(arguments.seconds / 10))
        with Sensors(device_sources(arguments.sysfs), rate_hz=RATE_HZ) as sensors:
            loops["with"].append(hiccups(arguments.seconds / 10))
            busy, began = time.process_time(), time.perf_counter()
            time.sleep(arguments.seconds / 5)
            shares.append((time.process_time() - busy) / (time.perf_counter() - began))
            looks = look_us(sensors)
            parts, health = len(sensors.latest()), sensors.health()
    report = {
        "benchmark": "sensors",
        "rate_hz": RATE_HZ,
        "readings": parts,
        "latest_us_p50": round(median(looks), 2),
        "latest_us_p99": round(nearest_rank(looks, 0.99), 2),
        "cpu_share_of_one_core": round(median(shares), 5),
        "iterations_above_1_ms": {name: round(median(values), 6) for name, values in loops.items()},
        "read_ms": {source.source: round(source.read_ms or 0.0, 3) for source in health},
        "resident_mb": len(ballast) // 1_000_000,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
