"""``balcony-edge budget``: the schema of budget files, and a check of one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from balcony_edge.budget import Budget, load_budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.cli.console import stdout
from balcony_edge.errors import BudgetError

app = typer.Typer(help="Print the schema of budget files, or check one.", no_args_is_help=True)


@contextlib.contextmanager
def named_refusal(name: object) -> Iterator[None]:
    """Let a budget that is refused inside be refused with the name of its file or class; None for no name."""
    try:
        yield
    except BudgetError as error:
        raise BudgetError(str(error) if name is None else f"{name}: {error}") from None


def asked_budget(file: Path | None, tpot_ms: float | None) -> Budget:
    """The budget of verbs that try one: that of a budget file, or one whose only target is the time between two tokens.

    Raises:
        BudgetError: both or neither are given, or the budget is refused.
    """
    if (file is None) == (tpot_ms is None):
        both = "both" if file is not None else "neither"
        raise BudgetError(f"{both} of --budget and --tpot-ms: a budget is a file or a target: give one of the two")
    return Budget(tpot_ms=tpot_ms) if file is None else load_budget(file)


@app.command()
def schema() -> None:
    """Print the JSON Schema of budget files, for editors."""
    print(json.dumps(Budget.model_json_schema(), indent=2))  # noqa: T201 - output for an editor


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Budget file (profiles/*.toml).")],
    bundle: Annotated[Path | None, typer.Option(help="Bundle: also show which of its exits the budget allows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Read a budget file and say what it asks for; an error in it is one line and exit code 1."""
    budget = load_budget(file)
    exits: tuple[int, ...] | None = None
    if bundle is not None:
        manifest = Bundle.open(bundle, verify_hashes=False).manifest
        with named_refusal(file):
            fitted = budget.for_bundle(manifest.agreement, calibrated=manifest.confidence is not None)
            exits = fitted.allowed_exits(manifest.exit_layers)
    asked = budget.model_dump(exclude_unset=True)  # includes keys that the file sets to their defaults
    if as_json:
        print(json.dumps({"budget": asked, "exits": exits}))  # noqa: T201 - for programs
        return
    for key, value in asked.items():
        stdout.print(f"{key} = {json.dumps(value)}", markup=False)
    stdout.print(_meaning(budget), soft_wrap=True)
    if exits is not None:
        stdout.print(f"allows exits {', '.join(map(str, exits))}")


def _meaning(budget: Budget) -> str:
    """Meaning of a budget in one sentence."""
    if budget.exit_layer is not None:
        return f"asks for exit {budget.exit_layer} at every token"
    if budget.policy == "lossless":
        return "asks for the full model's own tokens, drafted at a shallow exit when that is faster"
    if budget.has_target:
        return "asks for the deepest exit that meets every target and ceiling"
    depth = "full depth" if budget.max_exit is None else "the deepest exit that its bounds allow"
    way = {
        "speculative": ", drafted at a shallow exit when that is faster",
        "confident": ", or a shallow exit that is confident enough",
    }.get(budget.policy, "")
    if way and budget.max_exit is not None:
        way += " (only if the bounds allow full depth)"
    return f"asks for {depth} at every token{way}; no target and no ceiling"
