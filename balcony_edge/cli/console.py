"""Output of all verbs to people: the two consoles, the colours of exits, and a progress bar that programs do not see."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Column


class _Screen(Console):
    """A console that shows control characters as symbols: texts from strangers' files must not command the terminal."""

    @property
    def is_terminal(self) -> bool:
        """Whether its stream is a terminal.

        rich takes every file for one with FORCE_COLOR, which many CI services set: a reply in a file would get colours.
        """
        return super().is_terminal and (bool(self._force_terminal) or self.file.isatty())

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        parts = (part if part.control else Segment(visible(part.text), part.style) for part in buffer)
        return super()._render_buffer(parts)


if os.environ.get("COLUMNS", "").strip() == "0":
    del os.environ["COLUMNS"]  # unknown, as to shutil.get_terminal_size; rich and typer would cut all text to nothing
#: Without emoji codes: a name such as a:key:b is shown as it is.
stdout = _Screen(highlight=False, emoji=False)
stderr = _Screen(stderr=True, highlight=False, emoji=False)
#: Control characters except newline and tab → their symbols, or the replacement character for those without.
_CONTROLS = {
    code: 0x2400 + code if code < 0x20 else 0x2421 if code == 0x7F else 0xFFFD
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}
#: Colours of the exits from the shallowest on; the full depth has the terminal's own colour.
DEPTH_STYLES = ("red", "yellow", "green", "cyan", "blue", "magenta")


def depth_styles(exit_layers: tuple[int, ...]) -> dict[int, str]:
    """Exit layer → style of its tokens."""
    shallow = exit_layers[:-1]
    return {**dict(zip(shallow, DEPTH_STYLES * len(shallow), strict=False)), exit_layers[-1]: "default"}


def warn(line: str) -> None:
    """Print a line on stderr that the user should see, and that stops nothing."""
    stderr.print(line, style="yellow", markup=False, soft_wrap=True)


def folded(header: str) -> Column:
    """Column of a table that breaks long words: 80 columns would cut battery_floor_percent."""
    return Column(header, overflow="fold")


def visible(text: str) -> str:
    """Text for a terminal: control characters become symbols, because a reply must not command the terminal."""
    return text.translate(_CONTROLS)


class VisibleLines(logging.Formatter):
    """Log records as their texts, for a terminal: they name what is in files and requests of strangers."""

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record, and its traceback if it has one."""
        return visible(super().format(record))


def write_text(text: str, style: str = "") -> None:
    """Write a part of a reply to stdout: coloured on a terminal, and unchanged to a file or a pipe."""
    if stdout.is_terminal:
        part = Segment(visible(text), Style.parse(style))  # a Text would have spaces instead of tabs
        stdout.print(Segments([part]), end="", soft_wrap=True)
    else:
        print(text, end="", flush=True)  # noqa: T201 - unlike sys.stdout, it may be closed


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar on stderr; yields a function that takes the current step and the share of work done (0 to 1).

    A terminal that cannot move its cursor (``TERM=dumb``, as with some screen readers) gets a line for each step. If stderr is
    not a terminal, there is neither: rich would write an empty line instead.
    """
    if stderr.is_terminal and not stderr.is_interactive:
        told = ""

        def tell(step: str, done: float) -> None:
            nonlocal told
            if step != told:
                stderr.print(f"{done:4.0%} {step}", markup=False, soft_wrap=True)
            told = step

        yield tell
        return
    step_column = TextColumn("{task.description:<22}", markup=False)  # a step may be the name of a file
    columns = (step_column, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def report(step: str, done: float) -> None:
            progress.update(task, description=step, completed=done)

        yield report


@contextmanager
def native_stderr_dropped() -> Iterator[None]:
    """Drop the stderr output of native libraries; Python's own messages still appear.

    Without a GPU driver TensorRT prints "Internal Error" for each query to it, although it can build without one. Errors that
    matter come through its logger.
    """
    with Path(os.devnull).open("wb") as nowhere, os.fdopen(os.dup(2), "w", encoding="utf-8") as kept:
        before, sys.stderr = sys.stderr, kept
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)
            sys.stderr = before
