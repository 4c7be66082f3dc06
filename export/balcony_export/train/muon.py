"""Muon for the matrices of a balcony: steps along their momentum, orthogonalized (https://kellerjordan.github.io/posts/muon/).

Owns the type of its matrix products. ``torch.optim.Muon``, from which all else comes, computes them in bfloat16, which on a CPU
without such instructions takes 5 s for one matrix of the demo model (0.02 s in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

#: Coefficients of the Newton-Schulz iteration, and number of iterations: those of ``torch.optim.Muon``.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` whose products are in ``dtype``.

    A step changes a weight by 0.2 times the rate on average (root mean square), as one of AdamW does (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982), so that one rate suits both.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], rate: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, lr=rate, weight_decay=weight_decay)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Change every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum: torch.Tensor = state["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(momentum, group["momentum"])  # Nesterov's
                size = 0.2 * max(matrix.shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(orthogonal(ahead.to(self.dtype)), alpha=-group["lr"] * size)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the same singular vectors and singular values of 0.7 to 1.2  # (M, N)"""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)  # no singular value is above 1
    first, third, fifth = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=third, alpha=fifth), wide, beta=first)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
