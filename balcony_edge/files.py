"""Writing a file or a directory so that a reader sees the old or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from balcony_edge.errors import BalconyError


def partial_directory(target: Path) -> Path:
    """The name beside ``target`` under which this process makes it; what killed writers left of it is removed."""
    prefix = f".{target.name}.partial-"
    mine = target.with_name(f"{prefix}{os.getpid()}")
    for leftover in target.parent.glob(f"{prefix}*"):
        # our own number was that of a writer that was killed: in a container numbers come again
        if leftover == mine or not _runs(leftover.name.removeprefix(prefix)):
            shutil.rmtree(leftover, ignore_errors=True)
    return mine


def _runs(pid: str) -> bool:
    """Whether there is a process of this number; a text that is no number names none."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    return True


def require_writable(directory: Path, given: str, error_class: type[BalconyError], cure: str) -> None:
    """Refuse a directory that cannot be written, or made; cheap, so that it comes before the work whose result goes there.

    Args:
        directory: where to write; directories that are missing on the way to it are made when it is written.
        given: how the message calls it.
        error_class: raised where it cannot be written; its message ends in ``cure``.
        cure: what to do then.
    """
    place = directory.absolute()
    nearest = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise error_class(f"{given}: cannot be written ({nearest} is not a directory): {cure}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise error_class(f"{given}: cannot be written ({nearest} is read-only): {cure}")


def write_atomically(path: Path, content: bytes, error_class: type[BalconyError], cure: str) -> None:
    """Write under a temporary name next to ``path``, flush it to the disk and rename it.

    Args:
        path: what to write or replace; directories that are missing on the way to it are made.
        content: all of it.
        error_class: raised where the disk refuses; its message ends in ``cure``.
        cure: what to do then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise error_class(f"{path}: cannot be written ({error.strerror}): {cure}") from error
    finally:
        with contextlib.suppress(OSError):  # a read-only directory refuses this, too
            temporary.unlink(missing_ok=True)
