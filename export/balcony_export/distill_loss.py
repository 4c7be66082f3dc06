"""Equation 2 of the paper without ever holding the vocabulary for all positions.

Owns the loss of every exit, KL(full ‖ exit) per position in float32, and its gradient with respect to the exit's hidden
state. Both come from one pass over chunks of positions, in which the full model's logits are made once for all exits: the
gradient of the KL with respect to an exit's logits is softmax(exit) - softmax(full), so nothing of size
(positions × vocabulary) is kept for the backward pass.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import torch
from torch import nn

#: Positions per chunk. Measured on 2 cores with 49,152 tokens of vocabulary: 150 µs a position at 64, 135 at 128, 130 at
#: 256; 128 rows of float32 logits are 25 MB.
CHUNK = 128

_Kernel = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _kl_kernel(full: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(KL per row, its gradient with respect to the student's logits)`` of two blocks of logits  # (n, V)"""
    full_log = torch.log_softmax(full.float(), dim=-1)
    student_log = torch.log_softmax(student.float(), dim=-1)
    p = full_log.exp()
    kl = (p * (full_log - student_log)).sum(dim=-1)  # (n,)
    return kl, (student_log.exp() - p).to(student.dtype)


class HeadLoss:
    """KL through a frozen LM head.

    Args:
        weight: the LM head  # (V, D)
        dtype: in which logits are multiplied; softmax and sums are float32 in any case.
        softcap: the model's ``final_logit_softcapping``, or None.
        compiled: fuse the softmax passes with ``torch.compile`` (8 times as fast on a CPU, 46 against 392 µs a
            position); None: where a C++ compiler is found.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        dtype: torch.dtype = torch.bfloat16,
        softcap: float | None = None,
        compiled: bool | None = None,
    ) -> None:
        self.weight = weight.detach().to(dtype)
        self.dtype = dtype
        self.softcap = softcap
        if compiled is None:
            compiled = weight.is_cuda or shutil.which("g++") is not None
        self.kernel: _Kernel = torch.compile(_kl_kernel, dynamic=False) if compiled else _kl_kernel

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits as the model computes them  # (n, D) -> (n, V)"""
        logits = hidden.to(self.dtype) @ self.weight.T
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def kl(
        self, full: torch.Tensor, students: Sequence[torch.Tensor], *, need_grad: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each exit, ``(KL per position, gradient of their sum)``; the gradient is empty without need.

        Args:
            full: normed hidden states of the full model  # (n, D)
            students: those of each exit  # (n, D)
        """
        kls: list[list[torch.Tensor]] = [[] for _ in students]
        grads: list[list[torch.Tensor]] = [[] for _ in students]
        total = full.shape[0]
        for start in range(0, total, CHUNK):
            count = min(CHUNK, total - start)
            # one shape only, or every length would be compiled anew
            padding = (0, 0, 0, CHUNK - count if total > CHUNK else 0)
            targets = self.logits(nn.functional.pad(full[start : start + count], padding))
            for student, kl_parts, grad_parts in zip(students, kls, grads, strict=True):
                logits = self.logits(nn.functional.pad(student[start : start + count], padding))
                kl, grad = self.kernel(targets, logits)
                kl_parts.append(kl[:count])
                if need_grad:
                    if self.softcap is not None:
                        grad = grad * (1 - (logits / self.softcap) ** 2)
                    grad_parts.append((grad @ self.weight)[:count])
        empty = full.new_zeros(0)
        return [
            (torch.cat(parts) if parts else empty, torch.cat(slopes) if slopes else empty)
            for parts, slopes in zip(kls, grads, strict=True)
        ]

    def backward(self, full: torch.Tensor, students: Sequence[torch.Tensor]) -> list[float]:
        """Propagate each exit's sum of the KL over positions into whatever made its states; returns the sums."""
        sums = []
        detached = [student.detach() for student in students]
        for student, (kl, grad) in zip(students, self.kl(full, detached, need_grad=True), strict=True):
            if len(kl):
                student.backward(grad.to(student.dtype))
            sums.append(float(kl.sum()))
        return sums

    def agreement(self, full: torch.Tensor, student: torch.Tensor) -> int:
        """Number of positions at which both have the same most probable token."""
        hits = 0
        for start in range(0, full.shape[0], CHUNK):
            stop = start + CHUNK
            same = self.logits(full[start:stop]).argmax(-1) == self.logits(student[start:stop]).argmax(-1)
            hits += int(same.sum())
        return hits
