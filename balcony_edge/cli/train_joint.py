"""``balcony-edge train`` with ``--unfreeze``, ``--objective sorted`` or ``--from-scratch``: the backbone learns, too."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from balcony_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from balcony_export.train.joint import Objective


def objective_of(objective: str, unfreeze: bool, from_scratch: bool) -> Objective | None:
    """Which joint objective the options name; None: the paper's, with a frozen backbone.

    Raises:
        InputError: they name two.
    """
    named: list[Objective] = []
    named += ["sorted"] if objective == "sorted" else []
    named += ["unfrozen"] if unfreeze else []
    named += ["scratch"] if from_scratch else []
    if len(named) > 1:
        raise InputError(
            "--unfreeze, --objective sorted and --from-scratch: each is a training of its own: give one of them"
        )
    return named[0] if named else None


#: Options that a joint training has no use for.
_FROZEN_ONLY = (
    "start", "loss", "init", "resume", "minutes", "optimizer", "vector_rate", "weight_decay", "schedule", "warmup_steps",
    "decay_share", "micro_rows", "positions", "vocabulary", "mix", "reuse", "window_steps", "average", "precision",
    "cache_gb", "evaluate_every", "checkpoint_minutes", "compiled", "pretraining_tokens",
)  # fmt: skip


def refuse_for_frozen(context: typer.Context, objective: Objective) -> None:
    """Refuse options of the command line that only distillation with a frozen backbone knows.

    Raises:
        InputError: one was given.
    """
    names = (*_FROZEN_ONLY, *(("exit_module",) if objective == "sorted" else ()))
    refuse_given(context, names, f"has no meaning in a training of kind '{objective}'")


def refuse_given(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Refuse options that were given on the command line.

    Raises:
        InputError: one was.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
            raise InputError(f"{option}: {why}: leave it out")


def load_trainable(source: str, seq_len: int) -> PreTrainedModel:
    """Load a model whose exits can be trained, with the attention that transformers takes for it.

    Raises:
        CheckpointError, UnsupportedModelError: it cannot be read, or export could not represent it.
        InputError: rows longer than its context.
    """
    from balcony_export.model.architecture import parts_of
    from balcony_export.model.checkpoint import load_model

    model = load_model(source, attn_implementation=None)
    parts_of(model)
    longest = int(model.config.max_position_embeddings)
    if seq_len > longest:
        raise InputError(f"--seq-len {seq_len}: this model's context holds {longest} tokens: give no more")
    return model


def train_jointly(
    model: str,
    exits: str,
    recipe: dict[str, Any],
    data: list[Path],
    output: Path,
    seq_len: int,
    held_out_rows: int,
    as_json: bool,
) -> None:
    """Train, write ``output/model`` and the balconies for it, and show every exit on held-out rows."""
    from rich.table import Table

    from balcony_edge.cli.console import progress_bar, stdout
    from balcony_export.data.corpus import build_corpus
    from balcony_export.model.balcony import INDEX, parse_exits
    from balcony_export.model.checkpoint import load_tokenizer
    from balcony_export.output import refuse_existing
    from balcony_export.train.joint import BASE, JointConfig, JointTrainer

    if (output / INDEX).exists():
        raise InputError(f"{output}: holds balconies of another model: name another directory")
    if output.exists():
        refuse_existing(output / BASE)
    loaded, tokenizer = load_trainable(model, seq_len), load_tokenizer(model)
    config = JointConfig(exits=parse_exits(exits, loaded.config.num_hidden_layers), **recipe)
    config.check()
    corpus = build_corpus(data, tokenizer, seq_len=seq_len, seed=config.seed, held_out_rows=held_out_rows)
    trainer = JointTrainer(loaded, corpus, config)
    with progress_bar() as progress:
        trainer.run(
            lambda step, loss, left_s: progress(f"loss {loss:.3f}, {left_s / 60:.0f} min left", step / config.steps)
        )
    scores = trainer.evaluate()
    trainer.save(output, tokenizer)
    if as_json:
        found = {str(e): asdict(score) for e, score in scores.items()}
        print(json.dumps({"model": str(output / BASE), "balconies": str(output), "exits": found}))  # noqa: T201 - for programs
        return
    table = Table("exit", "cross-entropy", "KL to its full depth", "agreement", title=f"{output}, on held-out rows")
    for exit_layer, score in scores.items():
        table.add_row(str(exit_layer), f"{score.cross_entropy:.3f}", f"{score.kl:.3f}", f"{score.agreement:.1%}")
    stdout.print(table)
