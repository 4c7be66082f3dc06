"""Learning rate over steps, and optimizers.

Owns the schedule, a pure function of the step with one exception: a run that must end at a given time re-plans its last step
on the way. The plan is part of a checkpoint, so that a resumed run repeats the same rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

ScheduleKind = Literal["trapezoidal", "cosine"]
OptimizerKind = Literal["muon", "adamw"]
#: Steps whose mean time predicts the rest of a run, and the multiple of that mean above which a step was a pause: a process
#: that was stopped for a while.
WINDOW_STEPS, PAUSE = 200, 60.0


@dataclass
class Schedule:
    """Warm-up, then cosine or trapezoidal decay to zero at ``total`` steps.

    Trapezoidal: constant until ``decay_start``, then linear. ``replan`` moves the end. Before the decay has begun, that also
    moves its start; later, the line continues from the current factor.
    """

    kind: ScheduleKind
    warmup: int
    total: int
    decay_share: float
    decay_start: int = -1  # -1: follows from total
    decay_from: float = 1.0  # factor at decay_start
    begin: int = 0  # step at which a run that had ended began again

    def factor(self, step: int) -> float:
        """Fraction of the peak rate at ``step``, counted from 0."""
        warm = self._warm(step)
        if self.kind == "cosine":
            done = (step - self.begin) / (self.total - self.begin)
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        start = self._start()
        if step < start:
            return warm
        return warm * self.decay_from * max(0.0, (self.total - step) / max(1, self.total - start))

    def replan(self, step: int, total: int) -> None:
        """Let the run end after ``total`` steps; ``step`` is the next.

        A plan may end a step or two before the time does: these go on at the rate of the last one.
        """
        total = max(total, step + 1)
        if self.kind == "trapezoidal" and step > self._start():
            last = min(step, self.total - 1)
            self.decay_from, self.decay_start = self.factor(last) / self._warm(last), step
        elif self.kind == "trapezoidal" and step >= self._usual_start(total):
            self.decay_start = step
        self.total = total

    def restart(self, step: int, total: int) -> None:
        """Let a run that had ended begin again at ``step``, at the full rate."""
        self.begin, self.decay_from, self.decay_start, self.total = step, 1.0, -1, max(total, step + 1)

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def _warm(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0

    def _start(self) -> int:
        return self.decay_start if self.decay_start >= 0 else self._usual_start(self.total)

    def _usual_start(self, total: int) -> int:
        return self.begin + math.ceil((total - self.begin) * (1 - self.decay_share))


def windowed(window: list[tuple[float, int]], now_s: float, step: int) -> list[tuple[float, int]]:
    """The last pairs of (time, step), with a new one. A pause counts as a usual step: it must not begin the decay early."""
    (first_s, first), (last_s, last) = window[0], window[-1]
    usual_s = (last_s - first_s) / max(1, last - first)
    pause_s = now_s - last_s - usual_s
    if usual_s > 0 and pause_s > PAUSE * usual_s:
        window = [(time_s + pause_s, at) for time_s, at in window]
    return [*window[-WINDOW_STEPS:], (now_s, step)]


def make_optimizers(
    parameters: Iterable[nn.Parameter], kind: OptimizerKind, rate: float, vector_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Optimizers of one balcony, separate for matrices and vectors.

    Muon (orthogonalized momentum) gets the matrices, with its update scaled to the size of AdamW's so that one rate suits both.
    Norms always go to AdamW. Its betas suit short runs: with 0.999 the second moment would remember the first steps, whose
    gradients are a hundred times larger, for a whole small run.
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
            muon = torch.optim.Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            optimizers.insert(0, muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set all learning rates to a fraction of their peaks."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
