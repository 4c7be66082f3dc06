"""Norms of recurrent mixers, in standard operators.

Owns gated RMSNorms, RMSNorms without weights, and the scaling of queries and keys to length 1. What a module of transformers
computes is found by a trial, as in :mod:`balcony_export.graph.operators`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.onnx import ops

from balcony_edge.errors import UnsupportedModelError

#: Note on a norm whose scale is not a weight of the model.
UNSCALED = "balcony_unscaled"
#: Added by transformers to the squared length of queries and keys before the gated delta rule (``l2norm``).
L2_EPSILON = 1e-6


def unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1, as one operator: x / √(Σx² + ε) = x / √(mean(x²) + ε / n) · n^-0.5  # (..., n)"""
    size = x.shape[-1]
    return _unscaled(x, L2_EPSILON / size, size**-0.5)


def _unscaled(x: torch.Tensor, epsilon: float, length: float = 1.0) -> torch.Tensor:
    """An RMSNorm with one factor instead of weights."""
    return _norm(x, torch.full((x.shape[-1],), length, dtype=x.dtype), epsilon, {UNSCALED: "yes"})


def _norm(x: torch.Tensor, scale: torch.Tensor, epsilon: float, note: dict[str, str] | None = None) -> torch.Tensor:
    attributes: dict[str, Any] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    inputs, name = (x, scale), "RMSNormalization"
    return ops.symbolic(name, inputs, attributes, dtype=x.dtype, shape=x.shape, version=23, metadata_props=note)


class GatedNorm(nn.Module):
    """A mixer's gated RMSNorm over groups of channels, in standard operators.

    ONNX Runtime's ``GatedRMSNorm`` computes one of the two orders, but its CPU kernel takes 4 times as long for one row and 20
    times as long for 256 rows.

    Args:
        scale: Weights  # (C,)
        epsilon: Added to the mean square.
        groups: Number of groups of channels that are scaled to unit length on their own.
        gate_first: Whether x·silu(gate) is normed (Mamba-2), or the normed x is multiplied by silu(gate) (gated delta net).
    """

    def __init__(self, scale: torch.Tensor, epsilon: float, groups: int, gate_first: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.epsilon, self.groups, self.gate_first = epsilon, groups, gate_first
        self.by_row: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        if self.by_row is not None and x.dim() == 2:
            # all heads of all rows are in one axis, and a graph would have to compute their number
            x, gate = (self.by_row(y) for y in (x, gate))
        gated = functional.silu(gate.float())
        y = x.float() * gated if self.gate_first else x.float()
        if self.groups == 1:
            y = _norm(y, self.scale.float(), self.epsilon)
        else:
            y = _unscaled(y.unflatten(-1, (self.groups, -1)), self.epsilon).flatten(-2) * self.scale.float()
        return (y if self.gate_first else y * gated).to(x.dtype).view(shape)


def gated_norm_operator(norm: nn.Module) -> GatedNorm | None:
    """The module that computes what the gated norm of a mixer does, found by a trial; None if it is not one."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if "RMSNormGated" not in type(norm).__name__ or weight is None or epsilon is None:
        return None
    width = weight.numel()
    # each group of channels has another magnitude, so that a wrong number of groups shows
    x, gate = torch.randn(2, 1, 2, width, generator=torch.Generator().manual_seed(0))
    x = x * torch.linspace(-2, 2, width).exp()
    x, gate = (y.to(weight.dtype).float() for y in (x, gate))  # no difference comes from rounding the samples
    scale = weight.detach().float()
    with torch.no_grad():
        found = norm(x.to(weight.dtype), gate.to(weight.dtype)).float()
        for groups in (n for n in range(1, width + 1) if width % n == 0):
            for gate_first in (True, False):
                y = (x * functional.silu(gate) if gate_first else x).unflatten(-1, (groups, -1))
                y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + epsilon)).flatten(-2) * scale
                if torch.allclose(found, y if gate_first else y * functional.silu(gate), rtol=1e-2, atol=1e-2):
                    return GatedNorm(weight.detach(), float(epsilon), groups, gate_first)
    raise UnsupportedModelError(
        f"{type(norm).__name__}: norms neither x·silu(gate) nor x before the gate: export cannot represent it"
    )


class UnscaledNorm(nn.Module):
    """An RMSNorm without weights, as one operator (Falcon-Mamba, whose norms have weights that nothing reads)."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _unscaled(x, self.epsilon)


def unscaled_norm_operator(norm: nn.Module) -> UnscaledNorm | None:
    """The module that computes what a norm without weights does, found by a trial; None if it is not one."""
    epsilon = getattr(norm, "eps", None)
    if "RMSNorm" not in type(norm).__name__ or epsilon is None or any(True for _ in norm.parameters()):
        return None
    x = torch.linspace(-3, 3, 16).reshape(2, 8)
    if not torch.allclose(norm(x), x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon), rtol=1e-3):
        raise UnsupportedModelError(
            f"{type(norm).__name__}: has no weights, but does more than to scale: export cannot represent it"
        )
    return UnscaledNorm(float(epsilon))
