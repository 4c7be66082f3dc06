"""``balcony-edge eval``: quality of every exit on text and tasks, compared with the full model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from balcony_edge.bundle.bundle import Bundle, read_manifest
from balcony_edge.bundle.manifest import MANIFEST, Manifest, Quality, one_line
from balcony_edge.cli.console import progress_bar, stderr, stdout
from balcony_edge.cli.options import Engines, OnDevice, use_threads
from balcony_edge.errors import BundleError, InputError
from balcony_edge.files import exists, require_writable

if TYPE_CHECKING:
    from balcony_export.evaluate.report import Report
    from balcony_export.evaluate.scorer import BundleScorer, TorchScorer
    from balcony_runtime.backends.choose import DeviceName

#: Begins the name of the reference where exits are compared with the bundle's or model's own full depth.
OWN_DEPTH = "full depth of "


def evaluate(
    subject: Annotated[
        str, typer.Argument(metavar="MODEL_OR_BUNDLE", help="A bundle, or a model: directory, GGUF, hub name, 'demo'.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="For a bundle: model to compare with on text (default: the bundle's own full depth)."),
    ] = None,
    balconies: Annotated[
        Path | None,
        typer.Option(help="For a model: trained balconies (default: --exits are copies of the last layer)."),
    ] = None,
    exits: Annotated[
        str | None, typer.Option(help="Exit layers or depth factors to measure in addition to the full depth.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help='Text: JSON Lines with "text", .txt or .raw (WikiText); repeatable.')
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, separated by commas.")] = None,
    data: Annotated[Path | None, typer.Option(help="Directory with the files of the offline tasks.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Number of documents of each text and examples of each task (default: all)."),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per pass (default: the context, at most 1024).")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for evaluation.json and .md.")
    ] = None,
    record: Annotated[bool, typer.Option("--record/--no-record", help="Keep results in the bundle's manifest.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    device: OnDevice = "cpu",
    engines: Engines = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure perplexity, KL to the full model, agreement and task accuracy of every exit, with standard errors."""
    os.environ["TQDM_DISABLE"] = "1"  # before anything imports tqdm: lm-evaluation-harness's bars would tear ours
    from balcony_export.data.documents import refuse_unreadable
    from balcony_export.evaluate.report import write_report

    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else []
    if not text and not names:
        raise InputError("no text and no task is given: give --text FILE, --tasks NAMES, or both")
    idle = {
        f"--data {data} without --tasks: it has the files of tasks: name some, or": data is not None and not names,
        f"--window {window} without --text: tasks have windows of their own:": window is not None and not text,
        f"--model {model} without --text: only texts are compared with another model:": model is not None and not text,
    }
    for why, given in idle.items():
        if given:
            raise InputError(f"{why} leave it out")
    texts = _by_name(text or [])
    is_bundle = exists(Path(subject) / MANIFEST)
    if is_bundle and record and (device != "cpu" or engines is not None):
        raise InputError(
            "--device, --engines: a bundle keeps what its own graphs give on the CPU: give --no-record, too"
        )
    if output is not None:
        require_writable(output, f"--output {output}", InputError, "name another place")
    if Path(subject).name == MANIFEST:
        Bundle.open(subject)  # says what to give instead
    keeper = read_manifest(Path(subject)) if is_bundle and record else None
    if keeper is not None:
        require_writable(Path(subject), subject, BundleError, "make it writable, or give --no-record")
        _refuse_replacing(keeper, limit, texts)
    if is_bundle and balconies is not None:
        raise InputError(f"{subject} is a bundle, which has its own balconies: leave --balconies out")
    if not is_bundle:
        _refuse_for_a_model(subject, model, device, engines, balconies)
    _refuse_unknown(names, data)
    refuse_unreadable(texts.values(), chats=False)
    with progress_bar() as progress:
        progress("loading", 0.0)
        scorer = (
            _open_bundle(subject, exits, threads, device, engines)
            if is_bundle
            else _open_model(subject, balconies, exits, threads)
        )
        if not is_bundle and exits is not None and balconies is None:
            stderr.print("[yellow]The exits are untrained copies of the last layer: give --balconies.[/]")
        compare_with = None if model is None else partial(_open_model, model, None, None, threads)
        report = _measure(scorer, compare_with, texts, names, data, limit, window, progress)
    with ExitStack() as kept:  # each is kept, also after one that cannot be, or where nobody reads stdout any more
        if keeper is not None:
            kept.callback(_keep, Path(subject), keeper, report, limit)
        if output is not None:
            kept.callback(write_report, report, output)
        _show(report, as_json)  # first: results are shown even if they cannot be kept


def _refuse_unknown(tasks: list[str], data: Path | None) -> None:
    """Refuse names and files of tasks before a model is loaded, which may take minutes."""
    if tasks:
        from balcony_export.evaluate.tasks import refuse_unknown

        refuse_unknown(tasks, data)


def _refuse_for_a_model(
    subject: str, model: str | None, device: str, engines: str | None, balconies: Path | None
) -> None:
    from balcony_export.model.balcony_files import refuse_missing

    if model is not None:
        raise InputError(f"{subject} is a model, which is compared with its own full depth: leave --model out")
    if device != "cpu" or engines is not None:
        raise InputError(f"{subject} is a model, which runs in PyTorch: leave --device and --engines out")
    refuse_missing(balconies)


def _keep(bundle: Path, before: Manifest, report: Report, limit: int | None) -> None:
    """Record results in the bundle's manifest; tells which earlier ones leave it."""
    from balcony_edge.bundle.quality import record_quality

    _refuse_fewer_examples(before, limit, report.qualities)
    for lost in _dropped(before, report):
        stderr.print(f"[yellow]{lost}[/]", soft_wrap=True)
    record_quality(bundle, report.qualities, before.fingerprint)


def _refuse_replacing(manifest: Manifest, limit: int | None, names: Iterable[str]) -> None:
    """Refuse a quick run whose results would replace those on more documents."""
    if limit is None:
        return
    for quality in (exit_.quality for exit_ in manifest.exits if exit_.quality is not None):
        for name in names:
            if name in quality.text and (known := quality.text[name].documents) > limit:
                raise InputError(
                    f"--limit {limit}: the bundle has results on {known} documents of {name}, which this run would replace: "
                    "give --no-record, or leave --limit out"
                )


def _refuse_fewer_examples(manifest: Manifest, limit: int | None, measured: Mapping[int, Quality]) -> None:
    """The same for tasks, which tell their number of examples when they have run."""
    if limit is None:
        return
    recorded = [exit_.quality for exit_ in manifest.exits if exit_.quality is not None]
    for name, task in next(iter(measured.values())).tasks.items():
        known = max((quality.tasks[name].examples for quality in recorded if name in quality.tasks), default=0)
        if known > task.examples:
            raise InputError(
                f"{name}: the bundle has results on {known} examples, which these on {task.examples} would replace: give "
                "--no-record, or leave --limit out"
            )


def _dropped(manifest: Manifest, report: Report) -> Iterator[str]:
    """Texts whose results leave the manifest, because they were compared with another model."""
    measured = next(iter(report.qualities.values()))
    if not measured.text:
        return
    # a run with --exits leaves exits with other texts and another reference than the rest
    kept = [
        (name, one.reference) for exit_ in manifest.exits if (one := exit_.quality) is not None for name in one.text
    ]
    for name, reference in dict.fromkeys(pair for pair in kept if pair[1] != measured.reference):
        cure = "leave --model out" if reference.startswith(OWN_DEPTH) else "give --model"
        yield (
            f"{escape(name)}: results that were compared with {escape(reference)} are dropped, because these are "
            f"compared with {escape(measured.reference)}: {cure} to compare with the same"
        )


def _by_name(files: list[Path]) -> dict[str, Path]:
    """Name under which results are kept → file."""
    texts: dict[str, Path] = {}
    for path in files:
        if texts.setdefault(name := one_line(path.name), path) is not path:
            raise InputError(f"--text: two files have the name {name}, and results are kept by name: rename one")
    return texts


def _open_bundle(
    subject: str, exits: str | None, threads: int | None, device: DeviceName, engines: str | None
) -> BundleScorer:
    from balcony_export.evaluate.scorer import BundleScorer
    from balcony_export.model.balcony import parse_exits

    bundle = Bundle.open(subject)
    depth = bundle.manifest.model.num_layers
    layers = None if exits is None else (*parse_exits(exits, depth), depth)
    return BundleScorer(bundle, layers, threads, device, engines)


def _open_model(subject: str, balconies: Path | None, exits: str | None, threads: int | None) -> TorchScorer:
    from balcony_export.evaluate.scorer import TorchScorer
    from balcony_export.model.balcony import parse_exits
    from balcony_export.model.checkpoint import load_model, load_tokenizer, model_name
    from balcony_export.model.exits import ExitModel
    from balcony_export.model.gpu import move_to_gpu

    use_threads(threads)
    loaded = load_model(subject, attn_implementation=None)  # eager takes memory for the square of the window
    move_to_gpu(loaded)
    layers = None if exits is None else parse_exits(exits, loaded.config.num_hidden_layers)
    return TorchScorer(ExitModel.open(loaded, layers, balconies), load_tokenizer(subject), name=model_name(subject))


def _measure(
    scorer: BundleScorer | TorchScorer,
    compare_with: Callable[[], TorchScorer] | None,
    files: dict[str, Path],
    tasks: list[str],
    data: Path | None,
    limit: int | None,
    window: int | None,
    progress: Callable[[str, float], None],
) -> Report:
    from balcony_export.evaluate.report import build_report
    from balcony_export.evaluate.text import evaluate_text, tokenized_documents, window_of

    with closing(scorer):
        documents = {name: list(tokenized_documents(path, scorer.tokenizer, limit)) for name, path in files.items()}
        # What can be wrong is found before the tasks, which may take hours. A misspelt task is reported before the first one.
        reference = None if compare_with is None else compare_with()
        if documents:
            window_of(scorer if reference is None else reference, scorer, window)
        runs = {}
        if tasks:
            from balcony_export.evaluate.tasks import evaluate_tasks

            runs = evaluate_tasks(scorer, tasks, data=data, limit=limit, progress=progress)
        texts = {
            name: evaluate_text(
                scorer,
                found,
                reference=reference,
                window=window,
                progress=lambda done, name=name: progress(name, done),  # type: ignore[misc]
            )
            for name, found in documents.items()
        }
    against = f"{OWN_DEPTH}{scorer.name}" if reference is None else reference.name
    return build_report(scorer, against, texts, runs)


def _show(report: Report, as_json: bool) -> None:
    from balcony_export.evaluate.report import as_document, tables

    if as_json:
        print(json.dumps(as_document(report)))  # noqa: T201 - programs read this
        return
    for content in tables(report):
        table = Table(title=escape(content.title), title_justify="left")
        for cells in zip(content.header, *content.rows, strict=True):
            # rich would cut the numbers of many tasks to "5…", also in a file or a pipe, which has 80 columns for it
            longest = max((len(word) for cell in cells for word in cell.split()), default=1)
            table.add_column(escape(cells[0]), min_width=longest)
        for row in content.rows:
            table.add_row(*row)
        stdout.print(table, crop=False)
