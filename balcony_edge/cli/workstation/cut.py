"""``balcony-edge cut``: a model with narrower MLPs or rounded weights, as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from balcony_edge.cli.console import progress_bar, stdout
from balcony_edge.cli.options import use_threads
from balcony_edge.errors import InputError

if TYPE_CHECKING:
    from balcony_export.quantize.blocks import Scheme


def cut(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, GGUF file, hub name, or 'demo'.")],
    calibration: Annotated[
        list[Path],
        typer.Option(help="Text (as for train) on which neurons are chosen and weights are rounded; repeatable."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    mlp: Annotated[int | None, typer.Option(min=1, help="Number of neurons that every MLP keeps.")] = None,
    tune_steps: Annotated[
        int, typer.Option(min=0, help="Number of steps in which the narrower model learns from the uncut one.")
    ] = 0,
    precision: Annotated[
        str | None,
        typer.Option(help="Round the backbone as export with this --precision does (int4 and its differences)."),
    ] = None,
    balconies: Annotated[
        Path | None, typer.Option(help="Balconies of MODEL, to cut with it: train --start begins from them.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write a smaller model as a float32 checkpoint: with narrower MLPs, with weights that int4 holds, or with both.

    Train its balconies with `train OUTPUT --teacher MODEL`. Balconies that were cut with it are in OUTPUT/balconies.
    """
    from balcony_export.data.corpus import build_corpus
    from balcony_export.data.documents import files_in, refuse_unreadable
    from balcony_export.model.architecture import longest_context
    from balcony_export.model.balcony_files import load_balconies, refuse_missing
    from balcony_export.model.checkpoint import load_model, load_tokenizer
    from balcony_export.model.exits import ExitModel
    from balcony_export.output import refuse_existing
    from balcony_export.quantize.gptq import CALIBRATION_LENGTH, first_rows
    from balcony_export.train.tune import closeness, tune
    from balcony_export.variants.cut import BALCONIES, narrow, round_backbone, save_cut

    refuse_existing(output)
    scheme = _scheme(mlp, tune_steps, precision)
    refuse_missing(balconies)
    refuse_unreadable(files_in(calibration))
    use_threads(threads)
    with progress_bar() as progress:
        progress("loading the model", 0.0)
        tokenizer = load_tokenizer(model)
        uncut, loaded = (load_model(model, attn_implementation=None) for _ in range(2))
        teacher = ExitModel(uncut)
        exits = ExitModel(loaded, load_balconies(balconies, loaded) if balconies is not None else None)
        length = min(CALIBRATION_LENGTH, longest_context(loaded.config))
        corpus = build_corpus(calibration, tokenizer, seq_len=length, held_out_rows=8)
        rows = first_rows(corpus)
        if mlp is not None:
            progress("choosing neurons", 0.1)
            narrow(exits, mlp, rows)
            tune(
                exits, teacher, corpus, tune_steps,
                report=lambda done, loss: progress(f"tuning, KL {loss:.3f}", 0.2 + 0.5 * done / tune_steps),
            )  # fmt: skip
        if scheme is not None:
            progress("rounding", 0.7)
            round_backbone(exits, scheme, rows)
        progress("comparing", 0.9)
        found = closeness(exits, teacher, corpus.held_out)
        save_cut(exits, tokenizer, output)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    if as_json:
        facts = {"checkpoint": str(output), "parameters": parameters, **found._asdict()}
        print(json.dumps(facts))  # noqa: T201 - programs read this
        return
    stdout.print(
        f"[bold]{escape(str(output))}[/]: {parameters / 1e6:.1f} M parameters, KL to the uncut model {found.kl:.3f}, "
        f"same next token {found.agreement:.0%} (held-out text)"
    )
    if balconies is not None:
        stdout.print(f"[bold]{escape(str(output / BALCONIES))}[/]: {len(exits.balconies)} balconies, cut with it")


def _scheme(mlp: int | None, tune_steps: int, precision: str | None) -> Scheme | None:
    """The scheme of the rounding, if any, after refusing options that cut nothing."""
    from balcony_export.quantize.blocks import parse_precision
    from balcony_export.variants.cut import refuse_other_than_int4

    if mlp is None and precision is None:
        raise InputError("nothing to cut: give --mlp NEURONS, --precision int4, or both")
    if tune_steps and mlp is None:
        raise InputError(f"--tune-steps {tune_steps} without --mlp: only a narrower model is tuned: leave it out")
    scheme = None if precision is None else parse_precision(precision)
    if isinstance(scheme, str):
        raise InputError(f"--precision {precision}: rounds nothing: give int4, or leave it out")
    if scheme is not None:
        refuse_other_than_int4(scheme)
    return scheme
