"""Muon for the matrices of a balcony: steps along their momentum, orthogonalized (https://kellerjordan.github.io/posts/muon/).

Owns the polynomials and the type of its matrix products. ``torch.optim.Muon``, from which all else comes, computes them in
bfloat16, which on a CPU without such instructions takes 5 s for one matrix of the demo model (0.09 s in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from balcony_export.train.parallel import Processes

#: Odd polynomials of degree 5, one after another: the best ones for singular values from 0.001 to 1 (Polar Express, Amsel et
#: al. 2025, https://arxiv.org/abs/2505.16932). torch.optim.Muon repeats one. At equal cost KL is 0.7 % lower.
_POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749518, 0.4188073119525678),
)
#: How much further each of them looks. Without it rounding to bfloat16 takes singular values to 1.4.
_SAFETY = 1.01


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` whose products are in ``dtype``; its ``ns_coefficients`` and ``ns_steps`` have no effect.

    A step changes a weight by 0.2 times the rate on average (root mean square), as one of AdamW does (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982), so that one rate suits both.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], rate: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, lr=rate, weight_decay=weight_decay)
        self.dtype, self.processes = dtype, Processes()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Change every matrix that has a gradient; each process of the run orthogonalizes its part of them."""
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            own, directions = self.processes.share(len(matrices)), [torch.zeros_like(matrix) for matrix in matrices]
            for number, (matrix, direction) in enumerate(zip(matrices, directions, strict=True)):
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum: torch.Tensor = state["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                if number in own:
                    ahead = matrix.grad.lerp(momentum, group["momentum"])  # Nesterov's
                    direction.copy_(orthogonal(ahead.to(self.dtype)))
            self.processes.sum(directions)
            for matrix, direction in zip(matrices, directions, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(direction, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the same singular vectors and singular values near 1  # (M, N)"""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)  # no singular value is above 1
    for first, third, fifth in _POLYNOMIALS:
        wide = wide / _SAFETY
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=third, alpha=fifth), wide, beta=first)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
