"""``balcony-edge average``: the mean of the balconies of several training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from balcony_edge.cli.console import stdout


def average(
    directories: Annotated[
        list[Path], typer.Argument(help="Directories that train wrote, the last run last.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
) -> None:
    """Write the mean of the balconies of several runs that started from one another.

    It is often better than the last of them: measure both with export --evaluate. A next run may start from it.
    """
    from balcony_export.model.averaging import average as write

    exits = write(directories, output)
    means = f"means of {len(directories)} runs for exits {', '.join(map(str, exits))}"
    stdout.print(f"[bold]{escape(str(output))}[/]: {means}", soft_wrap=True)
