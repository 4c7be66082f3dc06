"""Write docs/cli.md from the ``--help`` of every verb; with ``--check``, only say whether it is up to date.

python docs/generate_cli.py [--check]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """\
# Command line

*Written by `python docs/generate_cli.py` from the verbs' own `--help`; a test fails when it is stale.*

A problem is one line on stderr and exit code 1; a usage error is 2 and Ctrl-C 130. With `--json` a verb writes one JSON
document to stdout and nothing else there. Environment variables change nothing but the looks (`NO_COLOR`, `COLUMNS`),
except those that `accelerate launch` sets for `train`.
"""


def page() -> str:
    """The whole page."""
    # read when typer and rich are imported, so before that: the same width and no colour everywhere
    os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    from typer.main import get_command  # noqa: PLC0415 - after the width is set
    from typer.testing import CliRunner  # noqa: PLC0415 - likewise

    from balcony_edge.cli import app  # noqa: PLC0415 - likewise

    def help_of(*verb: str) -> str:
        result = CliRunner().invoke(app, [*verb, "--help"], prog_name="balcony-edge")
        lines = [line.rstrip() for line in result.output.strip().splitlines()]
        return "\n".join(["```text", *lines, "```"])

    verbs = list(getattr(get_command(app), "commands"))  # noqa: B009 - a group, which typer's types do not say
    sections = [f"## balcony-edge {verb}\n\n{help_of(verb)}" for verb in verbs]
    return "\n\n".join([INTRODUCTION.rstrip(), help_of(), *sections]) + "\n"


def main() -> None:
    """Write the page, or check it."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit("docs/cli.md is stale: run `python docs/generate_cli.py`")


if __name__ == "__main__":
    main()
