"""``balcony-edge verify``: compare a bundle with the model that it was exported from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.cli.console import progress_bar, stdout
from balcony_edge.cli.options import use_threads


def verify(
    bundle: Annotated[Path, typer.Argument(help="Directory that `balcony-edge export` wrote.")],
    against: Annotated[str, typer.Option(help="Model that the bundle was exported from.")],
    balconies: Annotated[Path | None, typer.Option(help="Balconies that it was exported with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compare logits of every exit with PyTorch: prefill, decode, and backbone.onnx. Exit code 1 if a bound is exceeded."""
    from balcony_export.model.balcony_files import refuse_missing
    from balcony_export.model.checkpoint import load_model, load_tokenizer
    from balcony_export.model.exits import ExitModel
    from balcony_export.verify import require_all_passed
    from balcony_export.verify import verify as run_checks

    manifest = Bundle.open(bundle).manifest
    layers, kind = manifest.exit_layers[:-1], manifest.exits[0].module
    refuse_missing(balconies)
    use_threads()
    with progress_bar() as progress:
        progress("loading the model", 0.1)
        exits = ExitModel.open(load_model(against), layers, balconies, kind)
        progress("comparing", 0.4)
        checks = run_checks(bundle, exits, load_tokenizer(against))
    if as_json:
        facts = [{**asdict(check), "passed": check.passed} for check in checks]
        for one in facts:  # JSON has no NaN
            one["max_difference"] = one["max_difference"] if math.isfinite(one["max_difference"]) else None
        print(json.dumps(facts))  # noqa: T201 - for programs
    else:
        table = Table("exit", "phase", "prompts", "largest difference", "bound", "same argmax", "")
        for check in checks:
            verdict = "[green]pass[/]" if check.passed else "[red]FAIL[/]"
            row = (
                check.exit_layer,
                check.phase,
                check.prompts,
                f"{check.max_difference:.1e}",
                f"{check.tolerance:.0e}",
            )
            table.add_row(*map(str, row), f"{check.agreement:.1%}", verdict)
        stdout.print(table)
    require_all_passed(checks, bundle, manifest.model.name)
