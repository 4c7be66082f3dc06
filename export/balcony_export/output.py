"""Directories that appear whole or not at all.

Owns what happens to a directory under construction when writing fails or is interrupted, and the refusal of a target that
cannot be made.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from balcony_edge.errors import InputError
from balcony_edge.files import partial_directory, require_writable


def refuse_existing(output: Path) -> None:
    """Refuse an output that exists or cannot be made; cheap, so that it comes before the work.

    Raises:
        InputError: one line.
    """
    if output.exists() or output.is_symlink():
        raise InputError(f"{output}: exists already: name a directory that does not, or remove it first")
    require_writable(output.absolute().parent, str(output), InputError, "name another place")


@contextmanager
def fresh_directory(output: Path) -> Iterator[Path]:
    """A directory of a temporary name next to ``output``, renamed to it at the end and removed when anything fails.

    Leftovers of a writer of the same name that was killed are removed first.
    """
    refuse_existing(output)
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with partial_directory(output.absolute()) as directory:
            with _heeding_interrupts():
                yield directory
            directory.rename(output)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{output}: cannot be written ({reason}): free space or name another place") from error


@contextmanager
def _heeding_interrupts() -> Iterator[None]:
    """Ctrl-C as ever, and once more at the end: an exception that a finalizer raises is dropped, and tracing runs many."""
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
