"""Reading attributes of sysfs: small files whose content comes from a driver, each read with one system call.

It does not use Python's buffered files: a powered-down Tegra zone answers EAGAIN, which a buffered read turns into a TypeError.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balcony_runtime.sensors.base import Absence
from balcony_runtime.sensors.plausible import MAX_WATTS

#: Exceptions of a read: the kernel refuses, or the text is not a number.
ATTRIBUTE_ERRORS = (OSError, ValueError)

_REASONS = {
    errno.ENOENT: "it does not exist (any more)",
    errno.ENODEV: "the device is gone",
    errno.EAGAIN: "the driver has no value now, as for a Tegra GPU that is powered down",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ETIMEDOUT: "it does not answer",
}
#: Time after which a driver counts as hung. A read takes microseconds, or some milliseconds over a slow bus.
PATIENCE_S = 0.3
#: Shortest sleep of a machine. Its two clocks are read one after the other, some ms apart on a busy machine.
LEAST_SLEEP_S = 0.5


def read_text(path: Path) -> str:
    """The attribute's text without surrounding white space.

    Raises:
        OSError: the attribute does not exist, is not readable, or its driver has no value.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        return os.read(descriptor, 4096).decode(errors="replace").strip("\0 \n\t")
    finally:
        os.close(descriptor)


def read_number(path: Path) -> int:
    """The attribute as a number, in the driver's unit (hwmon: mV, mA, µW, m°C).

    Raises:
        OSError: as :func:`read_text`.
        ValueError: the text is not a number.
    """
    value = int(read_text(path))
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{path}: has a number that no driver prints")
    return value


def text_or_none(path: Path) -> str | None:
    """The attribute's text, or None if it cannot be read or is empty."""
    try:
        return read_text(path) or None
    except OSError:
        return None


def number_or_none(path: Path) -> int | None:
    """The attribute as a number, or None if it cannot be read or is not one."""
    try:
        return read_number(path)
    except ATTRIBUTE_ERRORS:
        return None


def absence(part: str, error: OSError | ValueError, cure: str = "") -> Absence:
    """The reason why ``part`` could not be read, in words."""
    if isinstance(error, OSError):
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        return Absence(part, f"{reason} ({error.filename})" if error.filename else reason, cure)
    return Absence(part, f"its file does not contain a number: {error}", cure)


def asleep_s() -> float:
    """Seconds that the machine has slept since its start. Linux stops its monotonic clock meanwhile; counters may go on."""
    if (clock := getattr(time, "CLOCK_BOOTTIME", None)) is None:
        return 0.0
    return time.clock_gettime(clock) - time.clock_gettime(time.CLOCK_MONOTONIC)


@dataclass(slots=True)
class EnergyCounter:
    """An attribute that counts µJ, read as joules and watts.

    Attributes:
        path: attribute that counts.
        range_uj: value at which it starts again from 0; None if the driver does not tell.
    """

    path: Path
    range_uj: int | None = None
    _moved: bool = False
    _last_uj: int | None = None
    _last_s: float = 0.0
    _asleep_s: float = 0.0
    _total_uj: int = 0

    def advance(self, now_s: float) -> tuple[float, float | None]:
        """Read the counter: joules with wraps and restarts undone, and mean watts since the previous read.

        Watts are None at the first read, and at a restart or after a sleep: the energy around it is unknown.

        Raises:
            OSError: it has not changed since the first read, so it measures nothing; or as :func:`read_number`.
            ValueError: as :func:`read_number`.
        """
        raw, last_s, slept_s = read_number(self.path), self._last_s, asleep_s() - self._asleep_s
        known = self._last_uj is not None and slept_s < LEAST_SLEEP_S
        delta = raw - self._last_uj if self._last_uj is not None and known else 0
        if delta < 0:  # it has wrapped, or begun again: then the energy of a wrap is beyond what the time allows
            wrapped = (delta % self.range_uj) if self.range_uj else 0
            known = known and 0 < wrapped <= 1e6 * MAX_WATTS * (now_s - last_s)
            delta = wrapped if known else 0
        self._total_uj = raw if self._last_uj is None else self._total_uj + delta
        self._last_uj, self._last_s, self._moved = raw, now_s, self._moved or delta != 0
        self._asleep_s += slept_s
        watts = delta / 1e6 / (now_s - last_s) if known and now_s > last_s else None
        if watts is not None and not self._moved:
            raise OSError("its counter does not move: the firmware does not update it")
        return self._total_uj / 1e6, watts


def entries(directory: Path) -> list[Path]:
    """Entries of a directory, sorted by name; none if it does not exist."""
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def numbered(directory: Path, stem: str) -> list[Path]:
    """Entries ``stem0``, ``stem1``, ..., ``stem10`` of a directory in this order; none if it does not exist."""
    pattern = re.compile(rf"{re.escape(stem)}(\d+)")
    matches = [(match, path) for path in entries(directory) if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches)]


def unique(name: str, taken: set[str]) -> str:
    """``name``, or ``name.2``, ``name.3`` if several parts of a device share a label; the result is added to ``taken``."""
    result, count = name, 1
    while result in taken:
        count += 1
        result = f"{name}.{count}"
    taken.add(result)
    return result


class TimedReader:
    """Reads parts one after another in a thread, so that a part that hangs in the kernel does not block the others.

    A part that hangs keeps its thread and is left out until that thread returns. There are at most as many threads as parts
    that hang; if none hangs, one short-lived thread per pass.
    """

    def __init__(self) -> None:
        self._stuck: dict[Any, threading.Thread] = {}

    def read(self, ask: Callable[[Any], Any], parts: Sequence[Any]) -> dict[Any, Any]:
        """Part → result of ``ask`` for it, or the exception of :data:`ATTRIBUTE_ERRORS` that it raised."""
        self._stuck = {part: thread for part, thread in self._stuck.items() if thread.is_alive()}
        answers: dict[Any, Any] = {}
        left = [part for part in parts if part not in self._stuck]
        while left:
            found: dict[Any, Any] = {}
            abandoned = threading.Event()
            thread = threading.Thread(target=_ask_all, args=(ask, left, found, abandoned), daemon=True)
            thread.start()
            before = -1
            while len(found) > before and thread.is_alive():
                before = len(found)
                thread.join(PATIENCE_S)
            abandoned.set()
            answers |= {part: found[part] for part in left if part in found}
            left = [part for part in left if part not in answers]
            if left:
                self._stuck[left.pop(0)] = thread
        silent = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return {part: answers.get(part, silent) for part in parts}


def _ask_all(
    ask: Callable[[Any], Any], parts: Sequence[Any], found: dict[Any, Any], abandoned: threading.Event
) -> None:
    for part in parts:
        try:
            answer = ask(part)
        except ATTRIBUTE_ERRORS as error:
            answer = error
        if abandoned.is_set():
            return
        found[part] = answer
