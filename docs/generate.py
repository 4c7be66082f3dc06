"""Write the generated pages: docs/cli.md from every verb's ``--help``, docs/budget-file.md from the fields of `Budget`, and
docs/errors.md from the bad inputs that the tests run.

python docs/generate.py [--check]

With ``--check`` nothing is written: the program exits with 1 and names the pages that are out of date.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
CLI = """\
# Command line

*Written by `python docs/generate.py` from the verbs' own `--help`; a test fails when it is stale.*

A problem is one line on stderr and exit code 1; a usage error is 2 and Ctrl-C 130 (0 where it ends a server).
With `--json` a verb writes one JSON document to stdout and nothing else there. Environment variables change only the
looks (`NO_COLOR`, `COLUMNS`), except those that `accelerate launch` sets for `train`, `BALCONY_EDGE_API_KEY` and
systemd's (`NOTIFY_SOCKET`, `WATCHDOG_USEC`) of `serve`, and those that libraries read: `HF_HOME`, `HF_TOKEN` and
`HF_HUB_OFFLINE` for hub names, `CUDA_VISIBLE_DEVICES`.
"""
BUDGET_FILE = """\
# Budget files

*Written by `python docs/generate.py` from the fields of `balcony_edge.Budget`; a test fails when it is stale.*

A budget file says what a reply may cost. It is TOML. Every key is optional, and an unknown key is refused. An empty file
asks for nothing: full depth, no target. `balcony_edge.Budget(...)` takes the same keys as arguments.

```toml
tpot_ms = 40
ttft_ms = 500
probability = 0.9
```

    balcony-edge budget check profiles/voice.toml --bundle bundle/
    balcony-edge budget schema > budget.schema.json      # JSON Schema, for editors

The files in `profiles/` are examples for interactive chat, voice, reading, battery, a closed case, a shared GPU, three
power modes of a Jetson Orin Nano, a Raspberry Pi class CPU and full depth. A comment at the top of each says what it is for.
[controller.md](controller.md) explains how a budget is held, and what happens
[when it cannot be held](controller.md#when-a-target-cannot-be-met).
"""
RULES = """\
## Rules between keys

- `deadline_s` and `expected_tokens` need each other, and `ttft_ms` must end before the deadline.
- `exit_layer` leaves no choice of depth. It excludes `tpot_ms`, `ttft_ms`, `deadline_s`, `min_exit`, `max_exit`,
  `min_agreement`, `energy_j_per_token` and `memory_mb`. Ceilings on power, temperature and utilization are then held by
  pace alone.
- Every `policy` except `plain` excludes `exit_layer`. `lossless` also excludes `max_exit`, and `confident` needs a bundle with
  thresholds (`balcony-edge calibrate`). [policies.md](policies.md) describes the policies.
- `min_exit` is at most `max_exit`, `min_pace_tps` at most `max_pace_tps`, and `temperature_c` below `critical_temperature_c`.
- `max_pace_tps` must leave time for `tpot_ms` and for the deadline. `pacing = false` excludes both bounds of the pace.
- `power_window_s` needs `power_w`; `power_rail` needs `power_w` or `energy_j_per_token`.
"""
ERRORS = """\
# Errors

*Written by `python docs/generate.py` from `tests/support/refusals.py`; a test runs every line of the table, and another one
fails when this page is stale.*

An error that the user can cure is one line on stderr: what was given, what is allowed, what to do. The exit code is 1, or 2 for
usage and 130 for Ctrl-C. In Python the same line is the message of a `balcony_edge.BalconyError`
([the classes](python-api.md#errors)); anything else that is raised is a bug and keeps its traceback.

A command that fails leaves no half-written file or directory behind, traces excepted, which keep what was recorded until then.
That includes a full disk and Ctrl-C. An export that was killed leaves a hidden
directory next to its output (`.bundle.partial-1f2e3d4c`), which the next one with the same output removes.

In this table `…` stands for text that depends on the machine or the file.
"""


def cli_page() -> str:
    """The command line: one section per verb."""
    # read when typer and rich are imported, so before that: the same width and no colour everywhere
    os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    from typer.main import get_command  # noqa: PLC0415 - after the width is set
    from typer.testing import CliRunner  # noqa: PLC0415 - likewise

    from balcony_edge.cli import app  # noqa: PLC0415 - likewise

    def help_of(*verb: str) -> str:
        result = CliRunner().invoke(app, [*verb, "--help"], prog_name="balcony-edge")
        lines = [line.rstrip() for line in result.output.strip().splitlines()]
        return "\n".join(["```text", *lines, "```"])

    verbs = getattr(get_command(app), "commands")  # noqa: B009 - a group, which typer's types do not say
    words = [
        line for verb in verbs for line in ((verb,), *((verb, sub) for sub in getattr(verbs[verb], "commands", ())))
    ]
    sections = [f"## balcony-edge {' '.join(line)}\n\n{help_of(*line)}" for line in words]
    return "\n\n".join([CLI.rstrip(), help_of(), *sections]) + "\n"


def allowed(schema: dict[str, Any]) -> str:
    """The values that a field takes, in words: ``number, above 0 and at most 1``."""
    schema = next((choice for choice in schema.get("anyOf", []) if choice.get("type") != "null"), schema)
    if "enum" in schema:
        return ", ".join(f'`"{value}"`' for value in schema["enum"])
    kind = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "string": "text"}
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    bounds = " and ".join(f"{word} {schema[bound]:,}" for bound, word in words.items() if bound in schema)
    return ", ".join(filter(None, (kind[schema["type"]], bounds)))


def shown(default: Any) -> str:
    """A default as a budget file writes it; nothing for a key that has none."""
    if default is None:
        return ""
    return f"`{str(default).lower()}`" if not isinstance(default, str) else f'`"{default}"`'


def budget_page() -> str:
    """Budget files: one row per key."""
    from balcony_edge.budget import Budget  # noqa: PLC0415 - pydantic takes a while to import

    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in Budget.model_json_schema()["properties"].items():
        meaning = " ".join(field["description"].split()).replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{name}` | {allowed(field)} | {shown(field.get('default'))} | {meaning} |")
    return "\n".join([BUDGET_FILE, "## Keys", "", *rows, "", RULES])


def errors_page() -> str:
    """Errors: one row per bad input that has a description."""
    sys.path.insert(0, str(DOCS.parent))  # the tests are not installed
    from tests.support.refusals import REFUSALS  # noqa: PLC0415 - found only now

    rows = ["| given | message |", "|---|---|"]
    for refusal in REFUSALS:
        if refusal.given is not None:
            # a message with backticks of its own needs a longer fence
            fence = "``" if "`" in refusal.message else "`"
            message = refusal.message.replace("|", "\\|")
            rows.append(
                f"| {refusal.given} | {fence}{' ' * (len(fence) - 1)}{message}{' ' * (len(fence) - 1)}{fence} |"
            )
    return "\n".join([ERRORS, *rows, ""])


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_page, "budget-file.md": budget_page, "errors.md": errors_page}


def main() -> None:
    """Write the pages, or check them."""
    stale = []
    for name, page in PAGES.items():
        file, text = DOCS / name, page()
        if "--check" not in sys.argv[1:]:
            file.write_text(text, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(f"docs/{name}")
    if stale:
        raise SystemExit(f"{', '.join(stale)}: out of date; run `python docs/generate.py`")


if __name__ == "__main__":
    main()
