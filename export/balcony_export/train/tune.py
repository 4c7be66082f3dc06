"""Tuning of a cut model: all decoder layers learn to predict what the uncut model predicts.

Owns one short run in float32 with AdamW, whose result is in the model. It has no checkpoint, because its length is that of a
repair, not of a pretraining. Balconies are trained afterwards by :mod:`.trainer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from balcony_edge.errors import TrainingError
from balcony_export.data.corpus import Corpus, Order, Rows
from balcony_export.model.exits import ExitModel
from balcony_export.train.loss import HeadLoss, VocabularySample
from balcony_export.train.positions import pick_positions
from balcony_export.train.schedule import Schedule
from balcony_export.train.states import full_model, head_of

#: Peak learning rate for a model of 135M parameters that was pretrained.
RATE = 2e-4
_BETAS, _CLIP, _WARMUP_SHARE = (0.9, 0.95), 1.0, 0.05


class Closeness(NamedTuple):
    """How near a model is to another on held-out rows."""

    kl: float  # KL(teacher ‖ model), nats a token
    agreement: float  # share of the tokens at which both have the same most probable next token


@torch.no_grad()
def closeness(exits: ExitModel, teacher: ExitModel, rows: Rows) -> Closeness:
    """Compare the full depths of two models of one vocabulary, without a row's first position."""
    head = HeadLoss(head_of(exits), head_of(teacher), dtype=torch.float32, compiled=False)
    kl, hits, count = 0.0, 0.0, 0
    for tokens, length in zip(rows.tokens, rows.lengths, strict=True):
        ids = torch.from_numpy(tokens[None, :length]).long()
        wanted, got = (one.normed(one.depth, one.run(ids, (one.depth,)))[0, 1:] for one in (teacher, exits))
        ((kls, same),) = head.compare(wanted, [got])
        kl, hits, count = kl + float(kls.sum()), hits + float(same.sum()), count + len(same)
    return Closeness(kl / count, hits / count)


def tune(
    exits: ExitModel,
    teacher: ExitModel,
    corpus: Corpus,
    steps: int,
    *,
    rate: float = RATE,
    batch_rows: int = 2,
    vocabulary: int = 8192,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train the decoder layers and the final norm; returns the loss of each step, KL(teacher ‖ model) in nats.

    The rate rises, then falls linearly to zero. Token table and LM head stay, so the loss looks at a part of the vocabulary.

    Args:
        exits: The cut model; its balconies do not take part.
        teacher: The uncut model.
        corpus: Rows to train on.
        steps: Number of steps.
        rate: Peak learning rate.
        batch_rows: Rows of a step.
        vocabulary: Tokens that a step compares; 0: all.
        report: Called with the number of steps done and the last loss.

    Raises:
        InputError: The two models have different vocabularies or sizes.
        TrainingError: The loss is not finite.
    """
    full_model(exits, teacher.model)
    head = HeadLoss(head_of(exits), head_of(teacher), dtype=torch.float32, compiled=False)
    rows = corpus.train
    order = Order(len(rows.tokens), batch_rows, seed=0)
    exits.model.requires_grad_(False)
    trained = [*exits.parts.layers.parameters(), *exits.parts.norm.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=_BETAS, weight_decay=0.0)
    sample: VocabularySample | None = None
    schedule = Schedule("trapezoidal", int(_WARMUP_SHARE * steps), decay_share=1.0)
    losses: list[float] = []
    for step in range(steps):
        which = order.rows(step)
        batch = Rows(rows.tokens[which], rows.lengths[which])
        tokens = torch.from_numpy(batch.tokens).long()
        with torch.no_grad():
            wanted = teacher.normed(teacher.depth, teacher.run(tokens, (teacher.depth,)))  # (B, T, D)
        got = exits.normed(exits.depth, exits.run(tokens, (exits.depth,)))
        where = pick_positions(batch, torch.stack([wanted, wanted]), [], 0, "kl")
        full = wanted.flatten(0, 1)[where]
        if sample is None and 0 < vocabulary < len(head.whole.weight):
            sample = VocabularySample(vocabulary, head.ranking(full))
        part = None if sample is None else sample.draw(head.whole, tokens.flatten(), [0, step])
        (total,) = head.backward(full, [got.flatten(0, 1)[where]], part=part)
        losses.append(total / len(where))
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"step {step}: the loss is {losses[-1]}: tune with fewer steps or another text")
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad.div_(len(where))
        torch.nn.utils.clip_grad_norm_(trained, _CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule.factor(step, step / steps)
        optimizer.step()
        optimizer.zero_grad()
        report(step + 1, losses[-1])
    exits.model.requires_grad_(False)
    return losses
