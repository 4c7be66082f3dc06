"""The method of measurement: interleaved rounds, medians, ratios within a round.

Owns what makes figures of a noisy machine comparable. Every round runs every case once, every other round in reverse order,
so that another program's burst and a drifting clock hit all cases alike. The first round is discarded, because it packs
weights, touches memory and fills caches. A ratio is taken within each round, and the median of the ratios counts. This
module does not know about models.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

from balcony_edge.control.verdict import nearest_rank

Key = TypeVar("Key")
Sample = TypeVar("Sample")


def interleave(cases: Mapping[Key, Callable[[], Sample]], rounds: int) -> dict[Key, list[Sample]]:
    """Run every case once per round; returns its samples in the order of the rounds, without the warm-up round."""
    samples: dict[Key, list[Sample]] = {key: [] for key in cases}
    for number in range(rounds + 1):
        order = list(cases)[:: 1 if number % 2 else -1]
        for key in order:
            sample = cases[key]()
            if number:
                samples[key].append(sample)
    return samples


def ratio(numerator_ms: Iterable[float], denominator_ms: Iterable[float]) -> float:
    """Median over the rounds of ``numerator / denominator``."""
    return median(above / below for above, below in zip(numerator_ms, denominator_ms, strict=True))


def p95(values: Sequence[float]) -> float:
    """The smallest of the values that 95 % of them do not exceed."""
    return nearest_rank(sorted(values), 0.95)


def bar(value: float, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    """A figure with its limit, and whether it holds: ``value``, ``limit``, ``holds``."""
    holds = value >= limit if at_least else value <= limit
    return {"value": value, "limit": f"{'>=' if at_least else '<='} {limit:g}", "holds": holds}


def print_bars(bars: Mapping[str, Mapping[str, Any]]) -> int:
    """Print the bars on stderr; returns the exit code: 1 if one is missed."""
    for name, held in bars.items():
        print(f"  {'holds ' if held['holds'] else 'MISSED'}  {name}: {held['value']} {held['limit']}", file=sys.stderr)
    return 0 if all(held["holds"] for held in bars.values()) else 1


class Neighbours:
    """CPU use of other programs during a run; repeat a run in which they took more than a few percent."""

    def __init__(self) -> None:
        self._before = _cpu_seconds()

    def report(self) -> dict[str, Any]:
        """Shares since the object was made: ``others_cpu_share`` of all CPU time, ``load_1m``."""
        total, busy, own = (late - early for early, late in zip(self._before, _cpu_seconds(), strict=True))
        share = round(max(busy - own, 0.0) / total, 3) if total > 0 else None
        return {"others_cpu_share": share, "load_1m": round(os.getloadavg()[0], 2)}


def _cpu_seconds() -> tuple[float, float, float]:
    """``(all, busy, ours)`` seconds of all CPUs since boot; time stolen by the host counts as busy."""
    from balcony_runtime.sensors.system import cpu_seconds  # noqa: PLC0415 - :mod:`.engine.memory` counts what is imported

    idle, *busy = cpu_seconds()
    return idle + sum(busy), sum(busy), sum(os.times()[:4])


def aligned(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of a table as lines, each column as wide as its widest cell."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
