"""``balcony-edge train``: distil the balconies of a frozen model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from balcony_edge.cli.console import stderr, stdout
from balcony_edge.cli.options import refuse_given, use_threads
from balcony_edge.errors import InputError, MissingDependencyError, TrainingError
from balcony_edge.files import exists, require_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from balcony_export.data.corpus import Corpus
    from balcony_export.data.packed import PackedText
    from balcony_export.model.balcony import Balcony, BalconyKind
    from balcony_export.train.precision import PassPrecision
    from balcony_export.train.report import StepReport
    from balcony_export.train.trainer import Trainer


def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hugging Face directory, GGUF file, hub name, or 'demo'.")],
    exits: Annotated[str, typer.Option(help="Exit layers (14,17,20) or depth factors (0.5x,0.6x,0.7x).")],
    data: Annotated[
        list[Path],
        typer.Option(help='JSON Lines with "text", "messages" or "instruction"; .txt; or a directory. Repeatable.'),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the balconies; other exits' balconies in it stay.")
    ],
    steps: Annotated[int | None, typer.Option(min=1, help="Number of optimizer steps.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Number of tokens, instead of --steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes to train, instead of --steps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in the output.")] = False,
    start: Annotated[
        Path | None, typer.Option(help="Trained balconies to start from (default: copies of the last layer).")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Model to learn from (default: MODEL's full depth): the one that MODEL was cut from."),
    ] = None,
    exit_module: Annotated[
        Literal["decoder", "attention", "mlp", "none", "dense"],
        typer.Option(
            help="Module of an exit before its norm: a decoder layer, one half of it, nothing, or (in mixtures of experts) a "
            "layer with a dense MLP."
        ),
    ] = "decoder",
    init: Annotated[
        Literal["last", "random"], typer.Option(help="Initial weights: those of the last layer, or random ones.")
    ] = "last",
    loss: Annotated[
        Literal["kl", "kl+ce", "ce"],
        typer.Option(help="Target: the full model's distribution (kl), the text (ce), or the paper's mix."),
    ] = "kl",
    state_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of the distance between the states of an exit and of the full model, next to the KL; it falls to 0 "
            "over the run (default: 0.5; with --start 0)."
        ),
    ] = None,
    optimizer: Annotated[
        Literal["muon", "adamw"], typer.Option(help="Optimizer of the matrices; norms use AdamW.")
    ] = "muon",
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 6e-3,
    vector_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the norms (default: half of --rate).")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.0,
    schedule: Annotated[Literal["trapezoidal", "cosine"], typer.Option(help="Decay of the rate.")] = "trapezoidal",
    warmup_steps: Annotated[int, typer.Option(help="Number of steps with rising rate.")] = 50,
    decay_share: Annotated[float, typer.Option(help="Share of the run with falling rate (trapezoidal).")] = 0.4,
    clip: Annotated[float, typer.Option(help="Largest gradient norm of a balcony.")] = 1.0,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    batch_rows: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 2,
    micro_rows: Annotated[
        int | None, typer.Option(min=1, help="Sequences per pass (default: all of a step); fewer accumulate gradients.")
    ] = None,
    positions: Annotated[int, typer.Option(help="Number of positions of a sequence in the loss; 0: all.")] = 0,
    vocabulary: Annotated[
        int,
        typer.Option(help="Number of tokens that a step compares, half of them drawn anew each step; 0: all."),
    ] = 8192,
    mix: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE=SHARE", help="Share of a file's documents to use, 0 to 1. Repeatable."),
    ] = None,
    average: Annotated[float, typer.Option(help="Decay of the moving average of the weights, 0 to 1.")] = 0.99,
    precision: Annotated[
        Literal["bf16", "fp32"] | None,
        typer.Option(
            help="Type of the passes; weights are trained in fp32 (default: bf16 where the CPU or GPU multiplies in it, else "
            "fp32; with --resume, that of the checkpoint)."
        ),
    ] = None,
    cache_gb: Annotated[
        float, typer.Option(help="GB on disk for states of the backbone, which later epochs reuse.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of sequences and positions.")] = 0,
    evaluate_every: Annotated[int, typer.Option(help="Steps between held-out evaluations, which keep the best.")] = 500,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
    held_out_rows: Annotated[int, typer.Option(min=1, help="Number of sequences kept out of training.")] = 24,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the loss (default: if there is a C++ compiler)."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    pretraining_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the base model's pretraining, for the table of costs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train one decoder layer per exit to predict what the frozen full model predicts."""
    from balcony_export.data.packed import PackedText
    from balcony_export.model.balcony import parse_exits
    from balcony_export.model.checkpoint import load_tokenizer, load_trainable
    from balcony_export.train.config import TrainConfig
    from balcony_export.train.parallel import Processes
    from balcony_export.train.precision import native_precision
    from balcony_export.train.run_files import PACKED, run_directory
    from balcony_export.train.trainer import Start, Trainer

    _refuse_without_effect(context, schedule, loss, vocabulary, state_weight)
    if tokens is not None:
        if steps is not None:
            raise InputError("--steps and --tokens: both set the length of the run: give one of them")
        steps = max(1, tokens // (batch_rows * seq_len))
    use_threads(threads)
    if steps is None and minutes is None:
        raise InputError("the length of the run is missing: give --tokens, --steps or --minutes")
    config = TrainConfig(
        exits=(),  # they need the number of layers; all else is checked before the model is loaded
        steps=steps,
        minutes=minutes,
        seq_len=seq_len,
        batch_rows=batch_rows,
        micro_rows=batch_rows if micro_rows is None else micro_rows,
        positions=positions,
        vocabulary=vocabulary,
        state_weight=(0.0 if start else 0.5) if state_weight is None else state_weight,
        optimizer=optimizer,
        rate=rate,
        vector_rate=rate / 2 if vector_rate is None else vector_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup_steps=warmup_steps,
        decay_share=decay_share,
        clip=clip,
        average=average,
        precision=precision or native_precision(),
        loss=loss,
        seed=seed,
        evaluate_every=evaluate_every,
        checkpoint_minutes=checkpoint_minutes,
        cache_gb=cache_gb,
    )
    config.check()
    shares = _shares(mix or [])
    _refuse_unreadable(data, start)
    # before Processes joins them: after that, under FSDP, transformers would load weights in the first one only
    loaded = load_trainable(model, seq_len)
    uncut = None if teacher is None else _load_teacher(teacher, model, seq_len, loss)
    layers = parse_exits(exits, loaded.config.num_hidden_layers)
    _refuse_trained(output, layers, start)
    _refuse_checkpoint(run_directory(output, layers), resume)
    begins_as, kind = _start(context, init, exit_module, start)
    begun = None if start is None else _begun(start, loaded, layers, kind, resume)
    passes = _precision(precision, run_directory(output, layers) if resume else None)
    config = replace(config, exits=layers, start=begins_as, module=kind, precision=passes)
    config.check_processes(Processes().count)
    text = PackedText(
        run_directory(output, layers) / PACKED,
        data,
        load_tokenizer(model),
        seq_len=seq_len,
        seed=seed,
        held_out_rows=held_out_rows,
        mix=shares,
    )
    begin = None
    if begun is not None and start is not None:
        begin = Start(begun, 0 if resume else _rows_seen(start, layers, text.corpus), start.resolve())
    trainer = Trainer(loaded, text.corpus, config, output, start=begin, teacher=uncut, compiled=compiled)
    if config.precision == "bf16" and native_precision() == "fp32":
        stderr.print("passes in bf16 are slower here than in fp32: a new run takes fp32 by default")
    _ready(trainer, text, resume)
    before = {} if trainer.step else {e: kl for e, (kl, _) in trainer.evaluate().items()}
    with _saved_at_interrupts(trainer):
        if not trainer.processes.writes:
            trainer.run()
            return
        with _progress_bar(trainer) as report:
            trainer.run(report)
    if trainer.stopped:
        stderr.print(f"{trainer.work}: step {trainer.step} is saved: continue with --resume", markup=False)
        raise typer.Exit(130)
    _finish(trainer, model, pretraining_tokens, before, as_json)


def _refuse_without_effect(
    context: typer.Context, schedule: str, loss: str, vocabulary: int, state_weight: float | None
) -> None:
    """Refuse options that the others of the run leave without effect: its record would name them."""
    if schedule == "cosine":
        refuse_given(
            context, {"decay_share": "--decay-share"}, " with --schedule cosine, which falls over the whole run"
        )
    if loss == "ce" and state_weight:
        refuse_given(context, {"state_weight": "--state-weight"}, " with --loss ce, which learns from the text alone")
    if loss == "ce" and vocabulary:
        refuse_given(context, {"vocabulary": "--vocabulary"}, " with --loss ce, which compares all tokens")


def _refuse_unreadable(data: list[Path], start: Path | None) -> None:
    """Refuse files that cannot be read before a model is loaded, which may take minutes."""
    from balcony_export.data.documents import files_in, refuse_unreadable
    from balcony_export.model.balcony_files import refuse_missing

    refuse_missing(start)
    refuse_unreadable(files_in(data))


def _refuse_checkpoint(work: Path, resume: bool) -> None:
    """Refuse to resume nothing, and to begin where a run has begun."""
    from balcony_export.train.run_files import CHECKPOINT

    begun = exists(work / CHECKPOINT)
    if resume and not begun:
        raise TrainingError(f"{work}: has no checkpoint: train without --resume first")
    if begun and not resume:
        raise TrainingError(f"{work}: has a checkpoint: continue with --resume, or remove the directory")


def _precision(given: PassPrecision | None, resumed: Path | None) -> PassPrecision:
    """Type of the passes: by default that of the run to resume, which may come from another machine, or the faster one here."""
    from balcony_export.train.parallel import Processes
    from balcony_export.train.precision import native_precision
    from balcony_export.train.run_files import read_state

    if given is not None:
        return given
    if resumed is None:
        return Processes().agreed(native_precision())  # each process has measured, perhaps on another machine
    state = read_state(resumed)
    assert state is not None  # _refuse_checkpoint has seen it
    kept: PassPrecision = state["recipe"]["precision"]
    return kept


def _begun(
    start: Path, loaded: PreTrainedModel, layers: tuple[int, ...], kind: BalconyKind, resume: bool
) -> dict[int, Balcony]:
    """Balconies to start from. On a resume the checkpoint has their weights, but not which layer they are copies of."""
    from balcony_export.model.balcony import init_balconies
    from balcony_export.model.balcony_files import layer_of, load_balconies

    if resume:
        return init_balconies(loaded, layers, kind, layer=layer_of(start, loaded))
    return load_balconies(start, loaded, layers)


def _load_teacher(teacher: str, model: str, seq_len: int, loss: str) -> PreTrainedModel:
    """Load the model that the exits learn from, whose tokens must be those of ``model``."""
    from balcony_export.model.checkpoint import load_tokenizer, load_trainable

    if loss == "ce":
        raise InputError("--teacher with --loss ce: the text is the only target of that loss: leave one of them out")
    if load_tokenizer(teacher).get_vocab() != load_tokenizer(model).get_vocab():
        raise InputError(
            f"--teacher {teacher}: its tokens are not those of {model}: give the model that it was cut from"
        )
    return load_trainable(teacher, seq_len)


def _rows_seen(start: Path, layers: tuple[int, ...], corpus: Corpus) -> int:
    """Number of rows of the corpus that the balconies to start from have learned from."""
    from balcony_export.model.balcony_files import rows_seen

    seen = rows_seen(start, layers, corpus.digest)
    if seen is None:
        stderr.print(
            f"{start} has learned from other data (or --seed, --seq-len, --mix, --held-out-rows differ): nothing is skipped",
            markup=False,
        )
    elif seen:
        stderr.print(
            f"{start} has learned from {seen:,} of {len(corpus.train.tokens):,} rows: continuing after them",
            markup=False,
        )
    return seen or 0


def _ready(trainer: Trainer, text: PackedText, resume: bool) -> None:
    """Keep the text for later pieces, take up the checkpoint if the user asks for it, and say if rows will come again."""
    if resume and trainer.resume():
        stderr.print(f"continuing from step {trainer.step}")
    if trainer.processes.writes:  # not before: a resume that is refused, such as one with other data, would replace it
        text.keep()
    rows, steps = len(trainer.corpus.train.tokens), trainer.config.steps
    if steps is None or not trainer.processes.writes or (last := trainer.order.learned(steps)) <= rows:
        return
    seen = trainer.order.learned(trainer.step)
    stderr.print(
        f"the run takes {last - seen:,} rows, and {max(0, rows - seen):,} of {rows:,} are left: the others come again: "
        "give more --data or fewer --tokens",
        markup=False,
    )


def _shares(given: list[str]) -> dict[str, float]:
    """File name → share, from the values of ``--mix``."""
    shares: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            shares[name] = float(number)
        except ValueError:
            shares[name] = -1.0
        if not name or not 0 < shares[name] <= 1:
            raise InputError(
                f"--mix {text}: expected FILE=SHARE with a share above 0 and up to 1, as wikipedia.jsonl=0.5"
            )
    return shares


def _refuse_trained(output: Path, layers: tuple[int, ...], start: Path | None) -> None:
    """Refuse a place that cannot be written, and to overwrite balconies of another run, unless this run starts from them."""
    from balcony_export.model.balcony_files import trained_exits
    from balcony_export.train.run_files import read_state, run_directory

    require_writable(output, f"--output {output}", TrainingError, "name another directory")
    there = [layer for layer in layers if layer in trained_exits(output)]
    goes_on = read_state(run_directory(output, layers)) is not None
    if there and not goes_on and (start is None or start.resolve() != output.resolve()):
        raise TrainingError(
            f"{output}: already has balcony {there[0]}: name another directory, remove it, or continue from it with --start"
        )


def _start(context: typer.Context, init: str, kind: BalconyKind, start: Path | None) -> tuple[str, BalconyKind]:
    """Initial weights of the balconies, for the record of the run, and their kind."""
    from balcony_export.model.balcony_files import digest_and_kind

    if start is None:
        return "last layer" if init == "last" else "random", kind
    options = {"init": "--init", "exit_module": "--exit-module"}
    refuse_given(context, options, ": the balconies that --start names have their own")
    digest, kind = digest_and_kind(start)
    return f"balconies {digest[:16]}", kind


@contextmanager
def _saved_at_interrupts(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end the run after its step, which is saved; a second one ends it at once.

    One within a second is the same request: systemd and Slurm signal every process of a job, and `accelerate launch` passes the
    signal that it gets on to the processes that it started.
    """
    numbers, first_s = [signal.SIGINT, signal.SIGTERM], 0.0
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # as under `nohup`
        numbers.append(hangup)

    def interrupt(*_: object) -> None:
        nonlocal first_s
        if trainer.interrupted:
            if trainer.clock() - first_s > 1:
                raise KeyboardInterrupt
            return
        first_s, trainer.interrupted = trainer.clock(), True
        # Not through rich, which may be in the middle of a line. Ctrl-C also ends a `tee` that reads stderr.
        with suppress(OSError):
            os.write(2, b"the step ends and is saved; once more ends the run at once\n")

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress_bar(trainer: Trainer) -> Iterator[Callable[[StepReport], None]]:
    """Loss per exit, tokens a second and time left, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("first step", total=1.0, rate="")

        def report(step: StepReport) -> None:
            losses = "  ".join(f"{e}: {value:.3f}" for e, value in step.loss.items())
            left = f"{step.tokens_per_s:.0f} tok/s, {step.eta_s / 60:.0f} min left"
            bar.update(task, completed=step.done, description=f"loss {losses}", rate=left)
            if step.held_out:
                held_out = "  ".join(f"{e}: {value:.3f}" for e, value in step.held_out.items())
                bar.console.print(f"step {step.step}: held-out KL {held_out}")

        yield report


def _finish(trainer: Trainer, model: str, given_tokens: int | None, before: dict[int, float], as_json: bool) -> None:
    from balcony_export.model.checkpoint import model_name
    from balcony_export.train.report import TrainingCost, plot_curves, pretraining_tokens, read_metrics
    from balcony_export.train.trainer import METRICS

    results = trainer.best
    name = model_name(model)
    parameters = sum(p.numel() for p in next(iter(trainer.balconies.values())).parameters())
    cost = TrainingCost(len(results), parameters, trainer.tokens, pretraining_tokens(name, given_tokens))
    plot = trainer.work / "curve.png"
    metrics, after = read_metrics(trainer.work / METRICS), {e: kl for e, (kl, _) in results.items()}
    try:
        plot_curves(metrics, plot, f"Balconies of {name}", trainer.config.loss, before=before, after=after)
    except (MissingDependencyError, TrainingError, OSError) as error:  # matplotlib finds no place to write
        stderr.print(f"no plot: {error}", style="yellow", markup=False)
    if as_json:
        document: dict[str, Any] = {
            "balconies": str(trainer.output),
            "steps": trainer.step,
            "tokens": cost.tokens,
            "tunable_parameters": cost.exits * cost.parameters_per_balcony,
            "pretraining_share": cost.share,
            "exits": {
                str(e): {"held_out_kl_before": before.get(e), "held_out_kl": kl, "held_out_agreement": hits}
                for e, (kl, hits) in results.items()
            },
        }
        print(json.dumps(document))  # noqa: T201 - for programs
        return
    table = Table("exit", "held-out KL before", "after", "change", "top-1 agreement", title=escape(str(trainer.output)))
    for exit_layer, (kl, hits) in results.items():
        was = before.get(exit_layer)  # None in a resumed run; 0 where a copy of the last layer makes the full model
        start = ("", "") if was is None else (f"{was:.3f}", f"{kl / was - 1:+.1%}" if was else "")
        table.add_row(str(exit_layer), start[0], f"{kl:.3f}", start[1], f"{100 * hits:.1f} %")
    stdout.print(table)
    costs = Table("cost", "this run", title="Training cost (the paper's Table 2)")
    for row in cost.lines():
        costs.add_row(*row)
    stdout.print(costs)
