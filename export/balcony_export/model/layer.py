"""The roles of the modules inside a decoder layer, and what a layer keeps of the rows that it has taken in.

Owns the names that architectures give to the two halves of a layer: the mixer, which reads earlier rows (attention, or a short
convolution), and the MLP, which works row by row.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from balcony_edge.bundle.manifest import LayerMemory

_MIXERS = ("self_attn", "conv")
_MLPS = ("mlp", "feed_forward")


def mixer_name(layer: nn.Module) -> str:
    """Name of the attribute that holds a layer's mixer."""
    return _named(layer, _MIXERS)


def mlp_name(layer: nn.Module) -> str:
    """Name of the attribute that holds a layer's MLP."""
    return _named(layer, _MLPS)


def mixer(layer: nn.Module) -> Any:
    """The module of a layer that reads earlier rows."""
    return getattr(layer, mixer_name(layer))


def layer_index(layer: nn.Module) -> int:
    """Index of a layer in its model; that of a balcony is the index of the layer that it copies."""
    return int(mixer(layer).layer_idx)


def memory_of(layer: nn.Module) -> LayerMemory:
    """What a layer keeps."""
    if mixer_name(layer) == "conv":
        return LayerMemory(attention=False, inputs=mixer(layer).conv.in_channels)
    return LayerMemory()


def _named(layer: nn.Module, names: tuple[str, ...]) -> str:
    return next(name for name in names if hasattr(layer, name))
