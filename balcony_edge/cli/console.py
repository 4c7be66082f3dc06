"""What all verbs show people with: the two consoles and a progress bar that keeps out of the way of programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from balcony_edge.device.profile import DeviceProfile

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)
#: One colour per exit from the shallowest to the deepest; the deepest is the terminal's own.
DEPTH_STYLES = ("red", "yellow", "green", "cyan", "blue", "magenta")


def depth_styles(exit_layers: tuple[int, ...]) -> dict[int, str]:
    """Exit layer → style of its tokens."""
    shallow = exit_layers[:-1]
    return {**dict(zip(shallow, DEPTH_STYLES * len(shallow), strict=False)), exit_layers[-1]: "default"}


def write_text(text: str, style: str = "") -> None:
    """Write a part of a reply to stdout as it is: coloured on a terminal, and unchanged in a file or a pipe."""
    if stdout.is_terminal:
        stdout.print(Text(text, style), end="", soft_wrap=True)
    else:
        sys.stdout.write(text)
        sys.stdout.flush()


def say_doubts(path: Path, profile: DeviceProfile) -> None:
    """Say on stderr why a profile's numbers may be off: neighbours that were busy, intervals that are wide."""
    for doubt in profile.doubts:
        stderr.print(f"{path}: {doubt}", style="yellow", markup=False, soft_wrap=True)


def counted(count: int, noun: str) -> str:
    """``1 switch``, ``2 switches``."""
    plural = f"{noun}es" if noun.endswith(("ch", "s", "x")) else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr; yields a function that takes the present step and the share of work done (0 to 1).

    Where stderr is not a terminal there is no bar: rich would write an empty line in its place.
    """
    columns = (TextColumn("{task.description:<22}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def report(step: str, done: float) -> None:
            progress.update(task, description=step, completed=done)

        yield report


@contextmanager
def native_stderr_dropped() -> Iterator[None]:
    """What native libraries write to stderr is dropped; Python's own messages still reach it.

    TensorRT prints "Internal Error" for each question that no GPU driver answers, and builds without one all the same; what
    matters comes through its logger.
    """
    with Path(os.devnull).open("wb") as nowhere, os.fdopen(os.dup(2), "w", encoding="utf-8") as kept:
        before, sys.stderr = sys.stderr, kept
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)
            sys.stderr = before
