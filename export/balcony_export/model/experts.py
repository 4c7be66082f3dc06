"""The mixtures of experts inside transformers' decoder layers: where they are, their sizes, and a dense MLP in their place.

Owns how they are found, and how a dense MLP begins. Knows nothing about graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from balcony_edge.bundle.manifest import MixtureSpec


def mixture(config: Any) -> MixtureSpec | None:
    """Sizes of a model's mixtures; None if all its layers are dense."""
    for key in ("num_local_experts", "num_experts"):
        if experts := getattr(config, key, None):
            return MixtureSpec(experts=int(experts), chosen=int(config.num_experts_per_tok))
    return None


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer, in the form of transformers' experts interface."""
    return hasattr(module, "has_post_expert_norm") and hasattr(module, "down_proj")


def experts_in(root: nn.Module) -> Iterator[nn.Module]:
    """All modules of :func:`is_experts` below ``root``, layer by layer."""
    return (module for module in root.modules() if is_experts(module))


class DenseMLP(nn.Module):
    """A SwiGLU MLP, down(silu(gate(x)) · up(x)), in the place of a mixture of experts."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        """Take copies of the weights: gate and up (I, D), down (D, I)."""
        super().__init__()
        width, hidden = gate.shape
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        for module, weight in ((self.gate_proj, gate), (self.up_proj, up), (self.down_proj, down)):
            module.weight = nn.Parameter(weight.detach().clone())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)"""
        out: torch.Tensor = self.down_proj(torch.nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class Use:
    """How much each expert of a layer is used: number of rows, and the sum of their weights; also the shared expert's gate."""

    def __init__(self, block: Any) -> None:
        """Watch the mixture ``block`` of a layer until :meth:`close`."""
        experts: Any = next(experts_in(block))
        count = len(experts.down_proj)
        self.rows, self.weights = torch.zeros(count), torch.zeros(count)
        self.shared: list[float] = []
        self._handles = [experts.register_forward_pre_hook(self._take)]
        if hasattr(block, "shared_expert_gate"):
            self._handles.append(block.shared_expert_gate.register_forward_hook(self._take_gate))

    def _take(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        _hidden, index, weights = inputs
        chosen = index.flatten().cpu()
        self.rows.index_add_(0, chosen, torch.ones(len(chosen)))
        self.weights.index_add_(0, chosen, weights.detach().flatten().float().cpu())

    def _take_gate(self, _: nn.Module, _inputs: Any, out: torch.Tensor) -> None:
        self.shared.append(float(out.float().sigmoid().mean()))

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()


def dense_from(block: Any, use: Use, chosen: int) -> DenseMLP:
    """A dense MLP as wide as the experts that run for one row, which computes what the most used of them compute.

    Experts next to each other in one MLP give the sum of their outputs. Each down projection is multiplied by the expert's mean
    weight. (The mean of the experts' weights would mix neurons that have nothing to do with one another.) A shared expert
    inside the mixture is one more of them, with the mean of its gate.
    """
    experts: Any = next(experts_in(block))
    gates, ups, downs = [], [], []
    for expert in use.weights.topk(chosen).indices.tolist():
        gate, up = experts.gate_up_proj[expert].chunk(2)
        gates.append(gate)
        ups.append(up)
        downs.append(experts.down_proj[expert] * (use.weights[expert] / use.rows[expert].clamp(min=1)))
    if use.shared:
        shared = block.shared_expert
        gates.append(shared.gate_proj.weight)
        ups.append(shared.up_proj.weight)
        downs.append(shared.down_proj.weight * (sum(use.shared) / len(use.shared)))
    return DenseMLP(torch.cat(gates), torch.cat(ups), torch.cat([down.to(gates[0].dtype) for down in downs], dim=1))
