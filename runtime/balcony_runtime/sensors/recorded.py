"""A recorded trace as a source: replays a device's readings at the recorded pace.

It is for trying a budget against another device's readings. The reader provides the time: with a simulated clock hours pass in
seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from balcony_edge.device.readings import Reading
from balcony_edge.errors import InputError
from balcony_runtime.sensors.base import Absence, NothingOpen, SourceSample


def load_readings(path: Path) -> Iterator[Reading]:
    """Readings of a JSON Lines file, one by one.

    A line is a reading as :meth:`Reading.to_dict` writes it, or an object with a list of them in ``readings``, as in the traces
    of ``balcony-edge run --trace``; a line without readings is skipped.

    Raises:
        InputError: the file cannot be read, or a line is not JSON or not a reading; the message names file and line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    values: Any = json.loads(line) if line.strip() else {}
                    if isinstance(values, dict) and "source" not in values:
                        values = values.get("readings") or []
                    for reading in values if isinstance(values, list) else [values]:
                        yield Reading.from_dict(reading)
                except (ValueError, RecursionError, InputError) as error:  # the first are Python's own bounds
                    raise InputError(f"{path}: line {number}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise InputError(f"{path}: {reason}: give a JSON Lines file of readings") from error


class Recorded(NothingOpen):
    """Replays readings. Each is the latest of its source from its own time on; time counts from the first read."""

    name = "trace"

    def __init__(self, readings: Iterable[Reading]) -> None:
        """Take readings in the order of their time; each is drawn when its time comes, so a file is not loaded whole."""
        self._readings = iter(readings)
        self._next = next(self._readings, None)
        self._shift_s: float | None = None
        self._latest: dict[str, Reading] = {}

    def discover(self) -> None:
        """There is nothing to look for."""

    def read(self, now_s: float) -> SourceSample:
        """The newest reading of every source, with its time on the reader's clock; a source without new readings ages."""
        if self._shift_s is None:
            self._shift_s = now_s - self._next.time_s if self._next else 0.0
        while self._next is not None and self._next.time_s + self._shift_s <= now_s:
            moved = replace(self._next, time_s=self._next.time_s + self._shift_s)
            self._latest[moved.source] = moved
            self._next = next(self._readings, None)
        ended = () if self._next is not None else (Absence(self.name, "the trace has ended"),)
        return SourceSample(tuple(self._latest.values()), ended)
