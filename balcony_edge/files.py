"""Writing a file or a directory so that a reader sees the old or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from balcony_edge.errors import BalconyError

try:
    import fcntl
except ImportError:  # Windows: names are unique there too, and what a killed writer left stays
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock of a directory and hold it, where its file system has locks.

    The lock belongs to the open directory: the system frees it when its owner ends, and threads of one process exclude one
    another. A process id says neither: containers that share a volume have the same ones.
    """
    lock = _lock(path, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


@contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """Make a directory next to ``target``, to be renamed to it; what is left under its name at the end is removed.

    Its name is unique and it is locked until the end, so that other writers leave it alone. Directories of killed
    writers have no lock any more and are removed first.

    Raises:
        OSError: the directory cannot be made.
    """
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.iterdir():
        if leftover.name.startswith(prefix) and (lock := _lock(leftover, wait=False)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            _unlock(lock)
    part = target.with_name(f"{prefix}{secrets.token_hex(4)}")
    while True:
        part.mkdir()
        lock = _lock(part, wait=True)
        if part.exists():
            break
        _unlock(lock)  # another writer took it for a leftover before it was locked
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _unlock(lock)


def write_atomically(path: Path, content: bytes, error_class: type[BalconyError], cure: str) -> None:
    """Write under a unique name next to ``path``, flush it to the disk and rename it.

    Args:
        path: what to write or replace.
        content: all of it.
        error_class: raised where the disk refuses; its message ends in ``cure``.
        cure: what to do then.
    """
    try:
        with partial_directory(path.absolute()) as part:
            temporary = part / path.name
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise error_class(f"{path}: cannot be written ({error.strerror}): {cure}") from error


def _lock(path: Path, *, wait: bool) -> int | None:
    """The open directory with its lock; None where somebody else holds it, it is gone, or there are no locks."""
    if fcntl is None:
        return None
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
    return None


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
