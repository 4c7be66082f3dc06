"""Output directories that appear complete or not at all.

Owns the cleanup when writing fails or is interrupted, and the refusal of a target that cannot be made.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from balcony_edge.errors import InputError
from balcony_edge.files import exists, partial_directory, require_writable, sync_all


def refuse_existing(output: Path) -> None:
    """Refuse an output that exists or cannot be made; cheap enough to call before the work begins.

    Raises:
        InputError: The output exists or cannot be made.
    """
    try:
        if exists(output) or output.is_symlink():
            raise InputError(f"{output}: already exists: name another directory, or remove it first")
    except OSError as error:  # a name that is too long, or a directory that may not be entered
        raise InputError(f"{output}: cannot be written ({error.strerror}): name another place") from error
    require_writable(output.absolute().parent, str(output), InputError, "name another place")


@contextmanager
def fresh_directory(output: Path) -> Iterator[Path]:
    """A directory of a temporary name next to ``output``, renamed to it at the end and removed if anything fails.

    Leftovers of killed writers of the same output are removed first.

    Raises:
        InputError: The output exists or cannot be written.
    """
    refuse_existing(output)
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with partial_directory(output.absolute()) as directory:
            with _interrupts_kept():
                yield directory
                # Windows cannot rename a directory with a mapped file. Graphs are cycles, so only the collector unmaps theirs.
                gc.collect()
            sync_all(directory)
            directory.rename(output)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{output}: cannot be written ({reason}): free space or name another place") from error


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` again at the end: Python drops one that hits a finalizer, and tracing runs many of those."""
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt
