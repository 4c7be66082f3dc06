"""Training with the backbone: what the paper compares frozen balconies with.

Owns the loop in which backbone and exits learn together, for three baselines. ``unfrozen``: the paper's distillation without
the freezing (section 4.3); the teacher is the model as it was, and the full depth learns from it like any exit, since with its
own moving full depth as the teacher all of them come to agree on nothing. ``sorted``: SortedLLaMA's, no modules at the exits,
the mean cross-entropy of all sub-models. ``scratch``: the same mean with balconies, from random weights (Table 4). The result
is a base model of its own, as a Hugging Face checkpoint, and balconies for it. Small models and short runs: weights and
optimizer in float32, no resume.
"""

from __future__ import annotations

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
from balcony_export.data.corpus import Corpus, Rows
from balcony_export.model.balcony import Balcony, Kind, fingerprint, init_balconies, save_balconies
from balcony_export.model.checkpoint import save_checkpoint
from balcony_export.output import fresh_directory
from balcony_export.train.states import Backbone

#: How backbone and exits learn together.
Objective = Literal["unfrozen", "sorted", "scratch"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
#: Where the base model of a run lies, below its output.
BASE = "model"


@dataclass(frozen=True)
class JointConfig:
    """The recipe: AdamW with a warm-up of a twentieth and a cosine to zero, as the paper trains (section 4.1)."""

    exits: tuple[int, ...]
    objective: Objective
    module: Kind = "decoder"
    steps: int = 1000
    batch_rows: int = 8
    rate: float = 1e-3
    clip: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for values that make no sense together."""
        if self.steps < 1 or self.batch_rows < 1 or not (self.rate > 0 and math.isfinite(self.rate)):
            raise InputError(f"{self.steps} steps of {self.batch_rows} rows at {self.rate}: must be positive numbers")
        if self.objective == "sorted" and self.module != "none":
            raise InputError("--objective sorted: its exits have no module: leave --exit-module out")


@dataclass(frozen=True)
class ExitScore:
    """An exit on held-out text: nats and share of tokens, against the text and against the model's own full depth."""

    cross_entropy: float
    kl: float
    agreement: float


class JointTrainer:
    """One run. ``run()`` trains to the end, ``save()`` writes model and balconies.

    Args:
        model: the base model, whose attention is ``sdpa`` or ``eager``; it is trained.
        corpus: rows to train on and held-out rows.
        config: the recipe.
        balconies: of the exits; by default copies of the last layer, from random weights where the objective is ``scratch``.
    """

    def __init__(
        self, model: PreTrainedModel, corpus: Corpus, config: JointConfig, balconies: dict[int, Balcony] | None = None
    ) -> None:
        config.check()
        self.model, self.corpus, self.config = model, corpus, config
        if config.objective == "scratch":
            torch.manual_seed(config.seed)
            model.apply(model._init_weights)
        kind: Kind = "none" if config.objective == "sorted" else config.module
        self.balconies = balconies or init_balconies(
            model, config.exits, kind, random=config.seed if config.objective == "scratch" else None
        )
        self._backbone = Backbone(model, config.exits, torch.float32)
        self._arguments = self._backbone.layer_arguments(corpus.train.tokens.shape[1])
        parameters: list[torch.nn.Parameter] = list(model.parameters())
        if config.objective == "sorted":  # the exits share the final norm, which trains with the model
            for balcony in self.balconies.values():
                balcony.norm = self._backbone.decoder.norm
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
            report: told the step, its loss, and the seconds left.

        Raises:
            TrainingError: the loss is not a number.
        """
        losses = []
        begin, first = time.monotonic(), self.step
        while self.step < self.config.steps:
            losses.append(self.train_step())
            left_s = (time.monotonic() - begin) / (self.step - first) * (self.config.steps - self.step)
            report(self.step, losses[-1], left_s)
        return losses

    def train_step(self) -> float:
        """One optimizer step; returns the loss: a mean over positions, and over sub-models but for ``unfrozen`` (a sum)."""
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
        warmup = max(self.config.steps // 20, 1)
        share = min((self.step + 1) / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * self.step / self.config.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.rate * share
        self._optimizer.step()
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> dict[int, ExitScore]:
        """Every exit and the full depth on the held-out rows.

        Raises:
            TrainingError: one of them gives no number: the last step went too far.
        """
        depth = len(self._backbone.decoder.layers)
        sums = {e: [0.0, 0.0, 0.0] for e in (*self.config.exits, depth)}
        count = 0
        for rows in np.array_split(np.arange(len(self.corpus.held_out.tokens)), len(self.corpus.held_out.tokens)):
            tokens, mask = self._batch(self.corpus.held_out, rows)
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
                raise TrainingError(f"exit {exit_layer} gives no number any more: lower --rate and start again")
        return {e: ExitScore(*(value / count for value in values)) for e, values in sums.items()}

    def save(self, output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write ``output/model`` (a Hugging Face checkpoint) and the balconies for it into ``output``."""
        output.mkdir(parents=True, exist_ok=True)
        with fresh_directory(output / BASE) as directory:
            save_checkpoint(self.model, tokenizer, directory)
        recipe = json.loads(json.dumps(asdict(self.config)))
        save_balconies(output, self.balconies, fingerprint(self.model), {"recipe": recipe, "steps": self.step})

    def _logits(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Of each exit and of the full depth  # each (B, T, V)"""
        decoder: Any = self._backbone.decoder
        states: dict[int, torch.Tensor] = {}

        def take(exit_layer: int) -> Any:
            def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                states[exit_layer] = args[0] if args else kwargs["hidden_states"]

            return hook

        handles = [decoder.layers[e].register_forward_pre_hook(take(e), with_kwargs=True) for e in self.config.exits]
        try:
            last = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        normed = [self.balconies[e](states[e], **self._arguments) for e in self.config.exits]
        head, cap = self.model.get_output_embeddings(), getattr(self.model.config, "final_logit_softcapping", None)
        logits = [head(hidden).float() for hidden in (*normed, last)]
        return logits if cap is None else [torch.tanh(one / cap) * cap for one in logits]

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
        """Tokens and which of them have a successor  # (B, T), (B, T)"""
        tokens = torch.from_numpy(rows.tokens[which]).long()
        lengths = torch.from_numpy(rows.lengths[which])
        return tokens, torch.arange(tokens.shape[1])[None] < lengths[:, None] - 1
