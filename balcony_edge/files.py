"""Writing a file or a directory so that a reader sees the old or the new one, never a part."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from balcony_edge.errors import BalconyError


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Wait for the lock of a file or directory and hold it; False where its file system has no locks.

    The lock belongs to the open file: the system frees it when its owner ends, and threads of one process exclude one
    another. A process id says neither: containers that share a volume have the same ones.
    """
    with _opened(path) as descriptor:
        yield _lock(descriptor, fcntl.LOCK_EX)


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
        if leftover.name.startswith(prefix):
            _remove_unlocked(leftover)
    part, descriptor = _owned(target.with_name(f"{prefix}{secrets.token_hex(4)}"))
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(descriptor)


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


def _owned(part: Path) -> tuple[Path, int]:
    """Make a directory and lock it; again where another writer took it for a leftover before it was locked."""
    while True:
        part.mkdir()
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(part, os.O_RDONLY)
            _lock(descriptor, fcntl.LOCK_EX)
            if part.exists():
                return part, descriptor
            os.close(descriptor)


def _remove_unlocked(leftover: Path) -> None:
    with contextlib.suppress(OSError), _opened(leftover) as descriptor:
        if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """Whether the lock is ours; False where somebody else holds it or the file system has none."""
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        return False
    return True
