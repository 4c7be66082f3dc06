"""The mixtures of experts inside transformers' decoder layers: where they are and how many rows use which expert.

Owns the names of a layer's MLP, which differ between architectures, and the sizes of a mixture. Knows nothing about graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

#: Names that a decoder layer gives to the modules which together are its MLP.
_MLP_NAMES = ("mlp", "block_sparse_moe", "shared_mlp")


@dataclass(frozen=True)
class Mixture:
    """Sizes of a mixture of experts: ``chosen`` of ``experts`` run for each row."""

    experts: int
    chosen: int


def mixture(config: Any) -> Mixture | None:
    """Sizes of a model's mixtures; None if all its layers are dense."""
    for key in ("num_local_experts", "num_experts"):
        if experts := getattr(config, key, None):
            return Mixture(int(experts), int(config.num_experts_per_tok))
    return None


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer, in the form of transformers' experts interface."""
    return hasattr(module, "has_post_expert_norm") and hasattr(module, "down_proj")


def experts_in(root: nn.Module) -> Iterator[nn.Module]:
    """All modules of :func:`is_experts` below ``root``, layer by layer."""
    return (module for module in root.modules() if is_experts(module))


def mlp_names(layer: nn.Module) -> tuple[str, ...]:
    """Names of the modules of a decoder layer that work position by position; Granite has a shared MLP next to its experts."""
    return tuple(name for name in _MLP_NAMES if isinstance(getattr(layer, name, None), nn.Module))
