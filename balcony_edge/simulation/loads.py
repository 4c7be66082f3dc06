"""Loads: the slowdown of a device over time, generated from one line of text or read from a recorded run.

A load is a function from seconds since the start to a slowdown. Owns the names of loads and their parameters; :mod:`.plant`
applies them.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from balcony_edge.errors import InputError

Load = Callable[[float], float]

#: Name → its parameters and their defaults.
PARAMETERS: dict[str, dict[str, float]] = {
    "idle": {},
    "constant": {"high": 1.5},
    "step": {"high": 1.7, "at_s": 2.0},
    "ramp": {"high": 2.0, "from_s": 1.0, "to_s": 9.0},
    "square": {"high": 1.7, "period_s": 4.0},
    "bursts": {"high": 2.0, "mean_s": 0.2, "every_s": 1.0, "seed": 0.0},
}

#: Ranges of the parameters. With a larger slowdown or a shorter time a simulation would not end.
TIMES = (1e-3, 1e6)
RANGES = {"high": (1e-3, 1e3), "seed": (0, 2**53), "at_s": (0, 1e6), "from_s": (0, 1e6)}


def parse_load(text: str) -> Load:
    """A load from ``name`` or ``name:key=value,...``, e.g. ``square:high=1.7,period_s=4``.

    Raises:
        InputError: the name or a key is unknown, or a value is not a number in its range.
    """
    name, _, rest = text.partition(":")
    if name not in PARAMETERS:
        raise InputError(f"load {name!r}: must be one of {', '.join(PARAMETERS)}, or the file of a recorded trace")
    ranges = {key: RANGES.get(key, TIMES) for key in PARAMETERS[name]}
    given = numbers(f"load {text!r}", filter(None, rest.split(",")), ranges, "square:high=1.7,period_s=4")
    return _generated(name, PARAMETERS[name] | given)


def numbers(
    given: str, words: Iterable[str], ranges: Mapping[str, tuple[float, float]], example: str
) -> dict[str, float]:
    """Key → number of words ``key=number``; an error begins with ``given`` and ends with ``example``.

    Raises:
        InputError: a key is unknown, or a value is not a number in its range.
    """
    found = {}
    for key, _, number in (word.partition("=") for word in words):
        if key not in ranges:
            raise InputError(f"{given}: must be one of {', '.join(ranges) or 'none'}, as key=value, e.g. {example}")
        try:
            found[key] = float(number)
        except ValueError:
            found[key] = math.nan
        least, most = ranges[key]
        if not least <= found[key] <= most:
            raise InputError(f"{given}: {key} must be {least:g} to {most:g}, e.g. {example}")
    return found


def _generated(name: str, values: dict[str, float]) -> Load:
    high = values.get("high", 1.0)
    if name == "step":
        return lambda time_s: high if time_s >= values["at_s"] else 1.0
    if name == "ramp":
        begin_s, length_s = values["from_s"], max(values["to_s"] - values["from_s"], 1e-9)
        return lambda time_s: 1.0 + (high - 1.0) * min(max((time_s - begin_s) / length_s, 0.0), 1.0)
    if name == "square":
        return lambda time_s: high if time_s % values["period_s"] >= values["period_s"] / 2 else 1.0
    if name == "bursts":
        return _bursts(high, values["mean_s"], values["every_s"], int(values["seed"]))
    return lambda _: high


def _bursts(high: float, mean_s: float, every_s: float, seed: int) -> Load:
    """Bursts of exponential length at exponential intervals (a Poisson process), generated as time advances."""
    chance = random.Random(seed)
    edges = [chance.expovariate(1 / every_s)]  # bursts last from each even edge to the next

    def load(time_s: float) -> float:
        while edges[-1] <= time_s:
            mean = mean_s if len(edges) % 2 else every_s
            edges.append(edges[-1] + chance.expovariate(1 / mean))
        return high if bisect.bisect_right(edges, time_s) % 2 else 1.0

    return load


def recorded(times_s: Sequence[float], slowdowns: Sequence[float]) -> Load:
    """The slowdowns of a recorded run. Each holds until the next; the first also holds before, the last after.

    They are limited to the range of generated loads: with a larger slowdown a simulation would not end.
    """
    least, most = RANGES["high"]
    kept = [min(max(slowdown, least), most) for slowdown in slowdowns]

    def load(time_s: float) -> float:
        return kept[max(bisect.bisect_right(times_s, time_s) - 1, 0)]

    return load
