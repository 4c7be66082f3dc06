"""``balcony-edge extract``: one exit as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from balcony_edge.cli.console import stderr, stdout, warn
from balcony_edge.errors import InputError


def extract(
    model: Annotated[
        str, typer.Argument(help="The base model: Hugging Face directory, GGUF file, hub name, or 'demo'.")
    ],
    exit_: Annotated[str, typer.Option("--exit", help="Exit to extract: a layer (14) or a depth factor (0.5x).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    balconies: Annotated[
        Path | None, typer.Option(help="Directory of trained balconies (default: an untrained copy of the last layer).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write the sub-model of an exit: its layers, the balcony as the last one, norm and head, as a plain checkpoint.

    A warning says if an engine must read the kinds of its layers from config.json.
    Weights keep the checkpoint's type; those of a GGUF file become float32.
    """
    from balcony_export.model.balcony import parse_exits
    from balcony_export.model.balcony_files import refuse_missing
    from balcony_export.model.checkpoint import load_model, load_tokenizer
    from balcony_export.model.exits import ExitModel
    from balcony_export.output import refuse_existing
    from balcony_export.variants.extract import extract as write
    from balcony_export.variants.extract import layout_warning

    refuse_existing(output)
    refuse_missing(balconies)
    loaded = load_model(model, keep_dtype=True)
    exits = parse_exits(exit_, loaded.config.num_hidden_layers, "--exit")
    if len(exits) != 1:
        raise InputError(f"--exit {exit_}: extract writes one exit: name one, and run it again for others")
    (exit_layer,) = exits
    if balconies is None and exit_layer < loaded.config.num_hidden_layers:
        stderr.print("[yellow]The last layer is an untrained copy: give --balconies.[/]")
    small = write(ExitModel.open(loaded, exits, balconies), load_tokenizer(model), exit_layer, output)
    if (warning := layout_warning(loaded.config, small.config)) is not None:
        warn(warning)
    parameters = sum(p.numel() for p in small.parameters())
    facts = {"checkpoint": str(output), "layers": small.config.num_hidden_layers, "parameters": parameters}
    if as_json:
        print(json.dumps(facts))  # noqa: T201 - programs read this
        return
    size = f"{facts['layers']} layers, {parameters / 1e6:.1f} M parameters"
    stdout.print(f"[bold]{escape(str(output))}[/]: {size}, equal to exit {exit_layer}")
