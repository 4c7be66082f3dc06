"""Learning rate over a run, and optimizers.

Owns the shape of the rate, a pure function of the step and of the share of the run that is over. What that share is, of steps
or of minutes, is the trainer's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from balcony_export.train.muon import Muon

ScheduleKind = Literal["trapezoidal", "cosine"]
OptimizerKind = Literal["muon", "adamw"]


@dataclass(frozen=True)
class Schedule:
    """A warm-up, then a cosine to zero, or a constant rate (trapezoidal) and a line to zero.

    Attributes:
        kind: Shape of the rate after the warm-up.
        warmup: Steps of the warm-up, a line.
        decay_share: Share of the run in which the rate falls (trapezoidal).
    """

    kind: ScheduleKind
    warmup: int
    decay_share: float

    def factor(self, step: int, done: float) -> float:
        """Fraction of the peak rate.

        Args:
            step: Number of steps done.
            done: Share of the run that is over, 0 to 1.
        """
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.kind == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * done))
        left = 1 - done
        return warm * (left / self.decay_share if left < self.decay_share else 1.0)


def make_optimizers(
    parameters: Iterable[nn.Parameter],
    kind: OptimizerKind,
    rate: float,
    vector_rate: float,
    weight_decay: float,
    dtype: torch.dtype,
) -> list[torch.optim.Optimizer]:
    """Optimizers of one balcony, separate for matrices and vectors.

    Muon gets the matrices and computes in ``dtype``. Norms always go to AdamW. Its betas suit short runs: with 0.999 the second
    moment would remember the first steps, whose gradients are a hundred times larger, for a whole small run.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim == 2 else vectors).append(parameter)
    adamw: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": weight_decay}
    if kind == "adamw":
        groups = [{"params": matrices, "lr": rate}, {"params": vectors, "lr": vector_rate}]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **adamw)]
    else:
        optimizers = [torch.optim.AdamW(vectors, lr=vector_rate, **adamw)]
        if matrices:  # an exit that is only a norm has none
            optimizers.insert(0, Muon(matrices, rate, weight_decay, dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set all learning rates to a fraction of their peaks."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
