"""Reading attributes of sysfs: small files that a driver answers, each read with one system call.

Not through Python's buffered files: a powered-down Tegra zone answers EAGAIN, which a buffered read turns into a TypeError.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from balcony_runtime.sensors.base import Absence

#: What a read may raise: the kernel's refusal, or text that is no number.
ATTRIBUTE_ERRORS = (OSError, ValueError)

_REASONS = {
    errno.ENOENT: "it is not there (any more)",
    errno.ENODEV: "the device is gone",
    errno.EAGAIN: "the driver has no value now; a Tegra GPU that is powered down answers so",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


def read_text(path: Path) -> str:
    """The attribute's text without white space around it.

    Raises:
        OSError: it is not there, not readable, or its driver has no value.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096).decode(errors="replace").strip("\0 \n\t")
    finally:
        os.close(descriptor)


def read_number(path: Path) -> int:
    """The attribute as a number, in the driver's unit (hwmon: mV, mA, µW, m°C).

    Raises:
        OSError: as :func:`read_text`.
        ValueError: it holds something else.
    """
    value = int(read_text(path))
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{path}: holds a number that no driver prints")
    return value


def text_or_none(path: Path) -> str | None:
    """The attribute's text, or None where it cannot be read or is empty."""
    try:
        return read_text(path) or None
    except OSError:
        return None


def number_or_none(path: Path) -> int | None:
    """The attribute as a number, or None where there is none."""
    try:
        return read_number(path)
    except ATTRIBUTE_ERRORS:
        return None


def absence(part: str, error: OSError | ValueError, cure: str = "") -> Absence:
    """Why ``part`` could not be read, in words."""
    if isinstance(error, OSError):
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        return Absence(part, f"{reason} ({error.filename})" if error.filename else reason, cure)
    return Absence(part, f"its file holds no number: {error}", cure)


def entries(directory: Path) -> list[Path]:
    """Entries of a directory, sorted by name; none where it does not exist."""
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def numbered(directory: Path, stem: str) -> list[Path]:
    """Entries ``stem0``, ``stem1``, ..., ``stem10`` of a directory in this order; none where it does not exist."""
    pattern = re.compile(rf"{re.escape(stem)}(\d+)")
    matches = [(match, path) for path in entries(directory) if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches)]


def unique(name: str, taken: set[str]) -> str:
    """``name``, or ``name.2``, ``name.3`` where several parts of a device share a label; the result is then taken."""
    result, count = name, 1
    while result in taken:
        count += 1
        result = f"{name}.{count}"
    taken.add(result)
    return result
