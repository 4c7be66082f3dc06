"""``balcony-edge export``: from a Hugging Face model and its balconies to a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import EnginePrecision, Manifest, one_line
from balcony_edge.cli.console import progress_bar, stderr, stdout
from balcony_edge.cli.options import use_threads
from balcony_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from balcony_export.quantize.blocks import Scheme


def export(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, GGUF file, hub name, or 'demo'.")],
    exits: Annotated[str, typer.Option(help="Exit layers (14,17,20) or depth factors (0.5x,0.6x,0.7x).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    balconies: Annotated[
        Path | None, typer.Option(help="Directory of trained balconies (default: untrained copies of the last layer).")
    ] = None,
    exit_module: Annotated[
        Literal["decoder", "attention", "mlp", "none", "dense"] | None,
        typer.Option(
            help="Without --balconies: module of an exit before its norm (default: decoder). none: early exit, for LayerSkip "
            "and Sorted checkpoints. dense: a dense MLP instead of experts."
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, fp16, int8 or int4. int8 and int4 are for CPUs and may be followed by block=, down=, sym or asym, "
            "positive, head=, kv= and level=, as in int4,block=64."
        ),
    ] = "fp32",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Text (as for train) for rounding to int8 and int4 by GPTQ; repeatable."),
    ] = None,
    quality_budget: Annotated[
        str | None,
        typer.Option(help="Instead of --precision: kl=0.02 selects the fastest one within 0.02 nats of the model."),
    ] = None,
    evaluate: Annotated[
        list[Path] | None,
        typer.Option(help="Text (as for eval) on which each exit is measured, for the manifest; repeatable."),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Largest number of tokens of a sequence (default: the model's, at most 8192).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model (default: from MODEL).")] = None,
    check: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare the bundle with the model. --no-verify needs less memory."),
    ] = True,
    tensorrt: Annotated[
        Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"] | None,
        typer.Option(
            help="Also build TensorRT-RTX engines of this precision, as `balcony-edge build` does by default."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Export a model as a bundle: one shared backbone, one exit per balcony and the full depth."""
    from balcony_export.export import ExportOptions, export_bundle
    from balcony_export.model.balcony import parse_exits
    from balcony_export.model.balcony_files import refuse_missing
    from balcony_export.model.checkpoint import load_model, load_tokenizer, model_name
    from balcony_export.model.exits import ExitModel
    from balcony_export.output import refuse_existing
    from balcony_export.precision import Judge, QualityBudget, export_within, parse_budget
    from balcony_export.quantize.blocks import parse_precision
    from balcony_export.verify import ParityCheck, require_all_passed, verify

    refuse_existing(output)
    scheme = parse_precision(precision)
    if exit_module is not None and balconies is not None:
        raise InputError("--exit-module with --balconies: the balconies have a kind of their own: leave it out")
    if tensorrt is not None:
        _refuse_engines(scheme, quality_budget)
    kl = None if quality_budget is None else parse_budget(quality_budget)
    _refuse_mismatches(kl, scheme, calibration, evaluate)
    refuse_missing(balconies)
    use_threads()
    with progress_bar() as progress:
        tokenizer = load_tokenizer(model)
        rows, texts = _read_texts(tokenizer, calibration, evaluate)  # first, because loading may take minutes
        progress("loading the model", 0.0)
        # running the model needs float32; only writing it needs the checkpoint's own type, half the memory
        loaded = load_model(model, keep_dtype=not (check or calibration or evaluate or exit_module == "dense"))
        layers = parse_exits(exits, loaded.config.num_hidden_layers)
        _refuse_recurrent(loaded, tensorrt)
        opened = ExitModel.open(loaded, layers, balconies, exit_module or "decoder")
        # an early exit through the model's own norm has nothing of its own to train
        trained = balconies is not None or exit_module == "none"
        checks: list[ParityCheck] = []
        label = one_line(name) if name else model_name(model)
        judge = Judge(opened, tokenizer, texts, name=label) if evaluate else None

        def verified(directory: Path) -> None:
            if judge is not None and kl is None:
                judge.measure(directory)
            if check:
                checks.extend(verify(directory, opened, tokenizer))
                require_all_passed(checks, directory, label)

        options = ExportOptions(label, trained, scheme, rows, context_length)
        if kl is not None and judge is not None:
            budget = QualityBudget(kl, judge, stderr.print)
            export_within(budget, opened, tokenizer, output, options, check=verified, progress=progress)
        else:
            export_bundle(
                opened, tokenizer, output, options, check=verified if check or judge else None, progress=progress
            )
    _warn(trained, scheme)
    # The bundle is complete, also without engines.
    try:
        _report(output, Bundle.open(output, verify_hashes=False).manifest, checks, as_json)
    finally:  # engines are built even if nobody reads stdout any more
        _build_engines(output, tensorrt)


def _refuse_recurrent(loaded: PreTrainedModel, tensorrt: str | None) -> None:
    from balcony_export.model.architecture import describe

    if tensorrt is not None and describe(loaded, "").recurrent:
        raise InputError("--tensorrt: the model has recurrent layers, for which there are no graphs: leave it out")


def _build_engines(output: Path, precision: EnginePrecision | None) -> None:
    from balcony_edge.cli.workstation.build import BuildOptions, build_into

    if precision is not None:
        build_into(output, BuildOptions("rtx", precision, "fused"), {})


def _read_texts(
    tokenizer: PreTrainedTokenizerBase, calibration: list[Path] | None, evaluate: list[Path] | None
) -> tuple[list[list[int]], dict[str, list[tuple[int, ...]]]]:
    """Tokens of the text to round by, and of each text to measure on."""
    from balcony_export.precision import read_judged_texts
    from balcony_export.quantize.gptq import calibration_rows

    rows = calibration_rows(calibration, tokenizer) if calibration else []
    return rows, read_judged_texts(evaluate or [], tokenizer)


def _refuse_mismatches(
    kl: float | None, scheme: str | Scheme, calibration: list[Path] | None, evaluate: list[Path] | None
) -> None:
    """Refuse text that nothing uses, and missing text that a budget or an int8 cache needs."""
    from balcony_export.quantize.kv_cache import require_text

    if kl is not None:
        if scheme != "float32" or not evaluate:
            raise InputError(
                "--quality-budget: needs --evaluate TEXT and replaces --precision: add the one, drop the other"
            )
    elif isinstance(scheme, str):
        if calibration:
            raise InputError("--calibration with a float precision: only int8 and int4 are rounded: leave it out")
    elif scheme.kv_bits == 8:
        require_text(calibration)


def _refuse_engines(scheme: str | Scheme, quality_budget: str | None) -> None:
    """Refuse what engines cannot be built from, and a machine without their builder, before the work."""
    from balcony_runtime.backends.accelerator.tensorrt_builder import import_tensorrt

    if not isinstance(scheme, str) or quality_budget is not None:
        raise InputError(
            "--tensorrt with --quality-budget or an int precision: engines are built from fp32 or fp16: name one"
        )
    import_tensorrt("rtx")


def _warn(trained: bool, scheme: Literal["float32", "float16"] | Scheme) -> None:
    """Warn about weaknesses of the bundle."""
    if not trained:
        stderr.print(
            "[yellow]The balconies are untrained copies of the last layer, so the exits below the full depth give nonsense. "
            "Train balconies with `balcony-edge train` and export with --balconies.[/]"
        )
    if not isinstance(scheme, str) and scheme.unpacks:
        stderr.print(
            f"[yellow]{scheme}: at level 1 ONNX Runtime unpacks 8-bit weights at every token (15 times slower on the demo "
            "model): use int4 with head=4, or level=4.[/]"
        )


def _report(output: Path, manifest: Manifest, checks: list, as_json: bool) -> None:  # type: ignore[type-arg]
    size = sum(file.bytes for file in manifest.files.values())
    if as_json:
        document = {
            "bundle": str(output),
            "exits": list(manifest.exit_layers),
            "bytes": size,
            "fingerprint": manifest.fingerprint,
            "verified": bool(checks) or None,
        }
        print(json.dumps(document))  # noqa: T201 - programs read this
        return
    checked = "not verified"
    if checks:
        exact = [check.max_difference for check in checks if check.exact]
        worst = max(exact or [check.max_difference for check in checks])
        unit = "of the largest logit" if exact else "nats"
        checked = f"verified on {checks[0].prompts} prompts, largest difference {worst:.1e} {unit}"
    stdout.print(
        f"[bold]{escape(str(output))}[/]: {escape(manifest.model.name)}, exits {', '.join(map(str, manifest.exit_layers))}, "
        f"{size / 1e6:.0f} MB, {checked}"
    )
    for exit_ in manifest.exits:
        for text, quality in exit_.quality.text.items() if exit_.quality is not None else ():
            stdout.print(
                f"exit {exit_.exit_layer} on {escape(text)}: KL {quality.kl.value:.4f}, agreement "
                f"{quality.agreement.value:.1%}, perplexity {quality.perplexity.value:.2f}"
            )
