"""Writing a file or a directory so that a reader sees the old or the new one, never a part of it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from balcony_edge.errors import BalconyError, shown

try:
    import fcntl
except ImportError:
    # Windows has no locks of this kind. Names are unique there as well; leftovers of a killed writer stay.
    fcntl = None  # type: ignore[assignment]


#: Part of the names of directories that are not complete.
PARTIAL = ".partial-"
#: Mounts of this process (proc_pid_mountinfo(5)). A file can be one, as with Docker's `-v ./profile.json:/profile.json`.
_MOUNTS = Path("/proc/self/mountinfo")
#: Whether the system replaces and removes files that are read-only: Windows does neither.
_REPLACES_READ_ONLY = os.name != "nt"


@contextmanager
def locked(path: Path, taken: BalconyError | None = None) -> Iterator[None]:
    """Hold the lock of a directory, if its file system has locks. Wait for it, or raise ``taken`` if it is held elsewhere.

    The lock belongs to the open directory: the system frees it when its owner ends, and threads of one process exclude one
    another. A file with a process id would do neither: containers that share a volume use the same ids.
    """
    try:
        lock = _lock(path, wait=taken is None)
    except BlockingIOError:
        assert taken is not None
        raise taken from None
    try:
        yield
    finally:
        _unlock(lock)


@contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """Make a directory next to ``target``, which the caller renames to it; otherwise it is removed at the end.

    Its name is unique and it is locked until the end, so that other writers leave it alone. Directories of killed
    writers are no longer locked and are removed first.

    Raises:
        OSError: the directory cannot be made.
    """
    prefix = f".{target.name[-57:]}{PARTIAL}"  # file systems take 255 bytes, and a character has up to four
    remove_leftovers(target.parent, prefix)
    while True:
        part = target.with_name(f"{prefix}{secrets.token_hex(4)}")
        part.mkdir()
        lock = _lock(part, wait=True)
        if part.exists():
            break
        # Another writer removed it as a leftover before it was locked. A third one may still be about to remove this name.
        _unlock(lock)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _unlock(lock)


def remove_leftovers(directory: Path, prefix: str) -> None:
    """Remove what killed writers have left in a directory: partial directories that nobody holds.

    Their names begin with ``prefix`` and contain :data:`PARTIAL`.
    """
    for leftover in directory.iterdir():
        if leftover.name.startswith(prefix) and PARTIAL in leftover.name:
            with contextlib.suppress(BlockingIOError):  # its writer is at work
                if (lock := _lock(leftover, wait=False)) is not None:
                    shutil.rmtree(leftover, ignore_errors=True)
                    _unlock(lock)


def expanded(path: str | Path) -> Path:
    """The path with the home directory for its ``~``; as in a shell, ``~name`` of no user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - that of Path raises an error for no user


def require_path(value: object, what: str, error_class: type[BalconyError], cure: str) -> None:
    """Refuse what is no path, such as the None of a variable that is not set."""
    if not isinstance(value, str | os.PathLike):
        raise error_class(f"{what} of type {type(value).__name__}: {cure}")
    if "\0" in os.fsdecode(value):  # Python refuses it with a ValueError, and only where a file is opened
        raise error_class(f"{what} {shown(value)}: has a NUL character, which no name of a file may have: {cure}")


def visible(directory: Path, *endings: str) -> list[Path]:
    """What is in a directory under names with some endings, in order, without the hidden ``._X`` of a Mac and ``.#X`` of Emacs.

    Raises:
        OSError: the directory cannot be read. ``glob`` would find nothing in it.
    """
    names = (path for path in directory.iterdir() if not path.name.startswith("."))
    return sorted(path for path in names if path.name.endswith(endings))


def exists(path: Path) -> bool:
    """Whether a path is there. From Python 3.14 on ``Path.exists`` also says no where the system refuses to look.

    Raises:
        OSError: the name is too long, or a directory may not be entered.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last one: a NUL in the name
        return False
    return True


def require_writable(directory: Path, given: str, error_class: type[BalconyError], cure: str) -> None:
    """Refuse a directory that cannot be written or made. The check is cheap: call it before the work whose result goes there.

    Args:
        directory: place to write to; missing parent directories do not matter, since writing makes them.
        given: name of the place in the message, as the user gave it.
        error_class: exception to raise if the place cannot be written; its message ends in ``cure``.
        cure: advice to the user.
    """
    place = directory.absolute()
    # A drive or a share of Windows may be missing as a whole.
    nearest = next((path for path in (place, *place.parents) if os.path.lexists(path)), Path(place.anchor))
    if not nearest.is_dir():
        raise error_class(f"{given}: cannot be written ({nearest} is not a directory): {cure}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise error_class(f"{given}: cannot be written ({nearest} is read-only): {cure}")


def require_writable_file(path: Path, given: str, error_class: type[BalconyError], cure: str) -> None:
    """Refuse a file that cannot be written or made; arguments as for :func:`require_writable`."""
    require_writable(_target(path, given, error_class, cure).parent, given, error_class, cure)


def _target(path: Path, given: str, error_class: type[BalconyError], cure: str) -> Path:
    """The file behind the links of a path; a directory, a device or a pipe is refused, because it cannot be replaced."""
    target = Path(os.path.realpath(path))
    try:
        there = exists(target)
        if target.is_dir():
            raise error_class(f"{given}: is a directory: name a file in it")
        if there and not target.is_file():
            raise error_class(f"{given}: cannot be written (it is not a regular file): {cure}")
        if there and not _REPLACES_READ_ONLY and not target.stat().st_mode & stat.S_IWRITE:
            raise error_class(f"{given}: cannot be replaced (it is read-only): {cure}")
        if there and _is_mounted(target):
            raise error_class(f"{given}: cannot be replaced (it is a mount of its own): mount its directory instead")
    except OSError as error:  # a name that is too long, or a directory that may not be entered
        raise error_class(f"{given}: cannot be written ({error.strerror}): {cure}") from error
    return target


def _is_mounted(target: Path) -> bool:
    """Whether a path is a mount, which the system lets no other file replace; False if it does not list mounts."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        return False
    # the kernel writes what would end a field or a line as an octal number
    name = re.sub(r"[ \t\n\\]", lambda found: f"\\{ord(found[0]):03o}", str(target))
    return any(line.split(" ")[4:5] == [name] for line in lines)


def write_atomically(path: Path, content: bytes, error_class: type[BalconyError], cure: str) -> None:
    """Write under a temporary name next to the file, flush it to the disk and rename it.

    Args:
        path: file to write or replace, behind its links; missing parent directories are made.
        content: complete content of the file.
        error_class: exception to raise if the file cannot be written; its message ends in ``cure``.
        cure: advice to the user.
    """
    with atomic_file(path, error_class, cure) as file:
        file.write(content)


def write_together(contents: Mapping[Path, bytes], error_class: type[BalconyError], cure: str) -> None:
    """Write several files that belong together: all are on the disk under other names before the first is replaced.

    They are replaced in their order. Other arguments are those of :func:`write_atomically`.
    """
    with contextlib.ExitStack() as held:
        for path, content in reversed(list(contents.items())):
            file = held.enter_context(atomic_file(path, error_class, cure))
            file.write(content)
            _flush(file)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def sync_all(directory: Path) -> None:
    """Wait until all files of a directory are on the disk. Before it gets its final name: power may be lost."""
    for path in directory.rglob("*"):
        if path.is_file():
            sync(path)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def atomic_file(path: Path, error_class: type[BalconyError], cure: str) -> Iterator[BinaryIO]:
    """A file under a temporary name next to that of ``path``, which replaces it at the end of the block, on the disk.

    An error or an interrupt in the block leaves ``path`` as it was; arguments are those of :func:`write_atomically`.
    """
    target = _target(path, str(path), error_class, cure)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_directory(target) as part:
            temporary = part / target.name
            with temporary.open("wb") as file:
                with contextlib.suppress(OSError):  # a file that only its owner may read stays one
                    shutil.copymode(target, temporary)
                yield file
                _flush(file)
            temporary.replace(target)
    except OSError as error:
        raise error_class(f"{path}: cannot be written ({error.strerror}): {cure}") from error


def _lock(path: Path, *, wait: bool) -> int | None:
    """Descriptor of the locked directory; None if the directory is gone or locks do not exist.

    Raises:
        BlockingIOError: someone else holds the lock, and ``wait`` is false.
    """
    if fcntl is None:
        return None
    # NFS locks a file only if it is open for writing (flock(2)); elsewhere that could make an overlay copy all weights.
    for flags in (os.O_RDONLY, os.O_RDWR):
        try:
            descriptor = os.open(path, flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BaseException:
                os.close(descriptor)
                raise
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno != errno.EBADF:
                return None
        else:
            return descriptor
    return None


def _unlock(lock: int | None) -> None:
    if lock is not None:
        # a process that was forked meanwhile also has the descriptor, and would keep the lock
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)
