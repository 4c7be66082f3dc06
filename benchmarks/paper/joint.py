"""Train backbone and exits together: the baselines that the paper compares its frozen backbone with.

    python -m benchmarks.paper.joint demo --objective unfrozen --exits 14,17,20 --data TEXT.jsonl --steps 1000 -o OUT

There are three objectives:

    unfrozen   The paper's distillation without freezing (section 4.3). The teacher is a copy of the original model, and the
               full depth learns from it like any exit. With the moving full depth as the teacher, all outputs would agree
               with one another but lose the original model
    sorted     SortedLLaMA's objective without modules at the exits: the mean cross-entropy of all sub-models
    scratch    The same mean with balconies, from random weights (Table 4)

The result is a new base model in ``OUT/model``, as a Hugging Face checkpoint, and balconies for it in ``OUT``. Every command
of ``balcony-edge`` takes the two. It is meant for small models and short runs: weights and optimizer are in float32, and
a run cannot be resumed.

The last line is JSON: ``model``, ``balconies``, ``exits`` (exit → ``cross_entropy``, ``kl``, ``agreement`` on held-out rows).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from balcony_edge.errors import InputError, TrainingError
from balcony_export.data.corpus import Corpus, Rows, build_corpus
from balcony_export.model.balcony import KINDS, Balcony, BalconyKind, init_balconies, parse_exits
from balcony_export.model.balcony_files import INDEX, fingerprint, save_balconies
from balcony_export.model.checkpoint import load_tokenizer, load_trainable, save_checkpoint
from balcony_export.model.exits import ExitModel
from balcony_export.output import fresh_directory, refuse_existing
from balcony_export.train.schedule import Schedule, ScheduleKind

#: Objective of training backbone and exits together.
Objective = Literal["unfrozen", "sorted", "scratch"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
#: Directory of a run's base model, below its output.
BASE = "model"


@dataclass(frozen=True)
class JointConfig:
    """The recipe. The paper fine-tunes with a cosine and trains from scratch with a trapezoidal rate (section 4.1).

    AdamW, the warm-up of a twentieth of the steps and the fall over the last two fifths (trapezoidal) are our choice.
    """

    exits: tuple[int, ...]
    objective: Objective
    module: BalconyKind = "decoder"
    steps: int = 1000
    batch_rows: int = 8
    rate: float = 1e-3
    clip: float = 1.0
    seed: int = 0
    schedule: ScheduleKind = "cosine"

    def check(self) -> None:
        """Raise InputError for values that exclude each other."""
        if self.steps < 1 or self.batch_rows < 1 or not (self.rate > 0 and math.isfinite(self.rate)):
            raise InputError(
                f"{self.steps} steps of {self.batch_rows} rows at rate {self.rate}: must be positive numbers"
            )
        if self.objective == "sorted" and self.module != "none":
            raise InputError("--objective sorted: its exits have no module: give --exit-module none or leave it out")


@dataclass(frozen=True)
class ExitScore:
    """Scores of an exit on held-out text: cross-entropy with the text, KL (nats) and agreement with the model's full depth."""

    cross_entropy: float
    kl: float
    agreement: float


class JointTrainer:
    """One run. ``run()`` trains to the end, ``save()`` writes model and balconies.

    Args:
        model: The base model, with attention ``sdpa`` or ``eager``; it is trained.
        corpus: Rows to train on and held-out rows.
        config: The recipe.
        balconies: Balconies of the exits; by default copies of the last layer, or random ones for the objective ``scratch``.
    """

    def __init__(
        self, model: PreTrainedModel, corpus: Corpus, config: JointConfig, balconies: dict[int, Balcony] | None = None
    ) -> None:
        config.check()
        self.model, self.corpus, self.config = model, corpus, config
        if config.objective == "scratch":
            torch.manual_seed(config.seed)
            loaded: Any = model.parameters()
            for weight in loaded:
                weight._is_hf_initialized = False  # transformers marks what it loads, and its initialisation skips that
            model.apply(model._init_weights)
        kind: BalconyKind = "none" if config.objective == "sorted" else config.module
        self.balconies = balconies or init_balconies(
            model, config.exits, kind, random=config.seed if config.objective == "scratch" else None
        )
        self.exits = ExitModel(model, self.balconies)
        parameters: list[torch.nn.Parameter] = list(model.parameters())
        if config.objective == "sorted":  # the exits share the final norm, which is trained with the model
            for balcony in self.balconies.values():
                balcony.norm = self.exits.parts.norm
        else:
            parameters += [p for balcony in self.balconies.values() for p in balcony.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        self._parameters = parameters
        self._teacher = copy.deepcopy(model).requires_grad_(False) if config.objective == "unfrozen" else None
        self._optimizer = torch.optim.AdamW(parameters, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = 0

    def run(self, report: Callable[[int, float, float], None] = lambda step, loss, left_s: None) -> list[float]:
        """Train all steps; returns the loss of each.

        Args:
            report: Called with the step, its loss, and the seconds left.

        Raises:
            TrainingError: The loss is not finite.
        """
        losses = []
        begin, first = time.monotonic(), self.step
        while self.step < self.config.steps:
            losses.append(self.train_step())
            left_s = (time.monotonic() - begin) / (self.step - first) * (self.config.steps - self.step)
            report(self.step, losses[-1], left_s)
        return losses

    def train_step(self) -> float:
        """Make one step; returns the loss: a mean over positions, and over sub-models except for ``unfrozen`` (a sum)."""
        tokens, mask = self._batch(self.corpus.train, self._rows_of(self.step))
        logits = self._logits(tokens)
        if self._teacher is not None:
            with torch.no_grad():
                teacher = torch.log_softmax(self._teacher(tokens, use_cache=False).logits.float(), -1)[mask]
            each = [torch.log_softmax(one, -1)[mask] for one in logits]
            loss = torch.stack(
                [functional.kl_div(one, teacher, log_target=True, reduction="batchmean") for one in each]
            ).sum()
        else:
            labels = tokens[:, 1:][mask[:, :-1]]
            each = [functional.cross_entropy(one[:, :-1][mask[:, :-1]], labels) for one in logits]
            loss = torch.stack(each).mean()
        if not math.isfinite(float(loss.detach())):
            raise TrainingError(f"step {self.step}: the loss is {float(loss.detach())}: lower --rate and start again")
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip)
        schedule = Schedule(self.config.schedule, max(self.config.steps // 20, 1), 0.4)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.rate * schedule.factor(self.step, self.step / self.config.steps)
        self._optimizer.step()
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> dict[int, ExitScore]:
        """Score every exit and the full depth on the held-out rows.

        Raises:
            TrainingError: One of them is not finite: the last step was too large.
        """
        sums = {e: [0.0, 0.0, 0.0] for e in self.exits.exit_layers}
        count = 0
        for row in range(len(self.corpus.held_out.tokens)):
            tokens, mask = self._batch(self.corpus.held_out, [row])
            kept, labels = mask[:, :-1], tokens[:, 1:][mask[:, :-1]]
            logits = [torch.log_softmax(one[:, :-1][kept], -1) for one in self._logits(tokens)]
            count += len(labels)
            for exit_layer, logs in zip(sums, logits, strict=True):
                found = sums[exit_layer]
                found[0] += float(functional.nll_loss(logs, labels, reduction="sum"))
                found[1] += float((logits[-1].exp() * (logits[-1] - logs)).sum())
                found[2] += int((logs.argmax(-1) == logits[-1].argmax(-1)).sum())
        for exit_layer, values in sums.items():
            if not all(map(math.isfinite, values)):
                raise TrainingError(f"exit {exit_layer} is not finite any more: lower --rate and start again")
        return {e: ExitScore(*(value / count for value in values)) for e, values in sums.items()}

    def save(self, output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write ``output/model`` (a Hugging Face checkpoint) and the balconies for it into ``output``."""
        output.mkdir(parents=True, exist_ok=True)
        with fresh_directory(output / BASE) as directory:
            save_checkpoint(self.model, tokenizer, directory)
        recipe = json.loads(json.dumps(asdict(self.config)))
        save_balconies(output, self.balconies, fingerprint(self.model), {"recipe": recipe, "steps": self.step})

    def _logits(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Logits of each exit and of the full depth  # each (B, T, V)"""
        return [logits.float() for logits in self.exits.logits(tokens).values()]

    def _rows_of(self, step: int) -> npt.NDArray[np.int64]:
        """Row indices of a step: whole epochs, each in a seeded order."""
        count, size = len(self.corpus.train.tokens), self.config.batch_rows
        epochs: dict[int, npt.NDArray[np.int64]] = {}
        picked = []
        for position in range(step * size, (step + 1) * size):
            epoch, index = divmod(position, count)
            if epoch not in epochs:
                epochs[epoch] = np.random.default_rng([self.config.seed, epoch]).permutation(count)
            picked.append(epochs[epoch][index])
        return np.asarray(picked, dtype=np.int64)

    def _batch(self, rows: Rows, which: Sequence[int] | npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, and whether each has a successor  # (B, T), (B, T)"""
        tokens = torch.from_numpy(rows.tokens[which]).long()
        lengths = torch.from_numpy(rows.lengths[which])
        return tokens, torch.arange(tokens.shape[1])[None] < lengths[:, None] - 1


def train_jointly(options: argparse.Namespace) -> dict[str, ExitScore]:
    """Train, write the model and its balconies, and score every exit on held-out rows."""
    output: Path = options.output
    if (output / INDEX).exists():
        raise InputError(f"{output}: has balconies of another model: name another directory")
    if output.exists():
        refuse_existing(output / BASE)
    model, tokenizer = load_trainable(options.model, options.seq_len), load_tokenizer(options.model)
    module: BalconyKind = options.exit_module or ("none" if options.objective == "sorted" else "decoder")
    config = JointConfig(
        exits=parse_exits(options.exits, model.config.num_hidden_layers),
        objective=options.objective,
        module=module,
        steps=options.steps,
        batch_rows=options.batch_rows,
        rate=options.rate,
        clip=options.clip,
        seed=options.seed,
        schedule=options.schedule,
    )
    config.check()
    corpus = build_corpus(
        options.data, tokenizer, seq_len=options.seq_len, seed=config.seed, held_out_rows=options.held_out_rows
    )
    trainer = JointTrainer(model, corpus, config)

    def report(step: int, loss: float, left_s: float) -> None:
        if step % 50 == 0:
            print(f"step {step} of {config.steps}: loss {loss:.3f}, {left_s / 60:.0f} min left", flush=True)

    trainer.run(report)
    scores = trainer.evaluate()
    trainer.save(output, tokenizer)
    return {str(e): score for e, score in scores.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory, GGUF file, hub name, or 'demo'")
    parser.add_argument("--objective", choices=OBJECTIVES, required=True)
    parser.add_argument("--exits", required=True, help="exit layers (14,17,20) or depth factors (0.5x,0.6x,0.7x)")
    parser.add_argument("--data", type=Path, action="append", required=True, help="text, as for `balcony-edge train`")
    parser.add_argument("--output", "-o", type=Path, required=True, help="directory for the model and its balconies")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--exit-module", choices=KINDS, help="default: decoder, or none for sorted")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument(
        "--schedule", choices=get_args(ScheduleKind), default="cosine", help="the paper's scratch: trapezoidal"
    )
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--batch-rows", type=int, default=2, help="rows per step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per row")
    parser.add_argument("--held-out-rows", type=int, default=24, help="rows of documents kept out of training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    scores = train_jointly(options)
    for exit_layer, score in scores.items():
        print(f"exit {exit_layer}: cross-entropy {score.cross_entropy:.3f}, KL {score.kl:.3f}, {score.agreement:.1%}")
    exits = {exit_layer: asdict(score) for exit_layer, score in scores.items()}
    print(json.dumps({"model": str(options.output / BASE), "balconies": str(options.output), "exits": exits}))


if __name__ == "__main__":
    main()
