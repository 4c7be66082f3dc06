"""The roles of the modules inside a decoder layer, and what a layer keeps of the rows that it has taken in.

Owns the names that architectures give to the two halves of a layer: the mixers, which read earlier rows (attention, a short
convolution, a recurrence; Falcon-H1 has two of them), and the MLP, which works row by row (Granite has a shared one next to its
experts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from balcony_edge.bundle.manifest import LayerMemory

#: Name of a mixer that attends; unlike the others it also returns the weights of the rows.
ATTENTION = "self_attn"
_SHORT, _RECURRENT = "conv", ("mamba", "linear_attn", "mixer")
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp")


class Silent(nn.Module):
    """Replaces one half of a decoder layer and adds nothing to the residual stream."""

    def __init__(self, replaced: nn.Module, *, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.layer_idx = getattr(replaced, "layer_idx", None)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        """Zeros, and None for the attention weights if it replaces an attention."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.attention else nothing


def mixer_names(layer: nn.Module) -> tuple[str, ...]:
    """Names of the attributes that hold a layer's mixers."""
    return _present(layer, (ATTENTION, _SHORT, *_RECURRENT))


def mlp_names(layer: nn.Module) -> tuple[str, ...]:
    """Names of the attributes that together are a layer's MLP; a pure state-space layer has none."""
    return _present(layer, _MLPS)


def layer_index(layer: nn.Module) -> int:
    """Index of a layer in its model; that of a balcony is the index of the layer that it copies."""
    return int(getattr(layer, mixer_names(layer)[0]).layer_idx)


def memory_of(layer: nn.Module) -> LayerMemory:
    """What a layer keeps; a silenced mixer keeps nothing."""
    names = [name for name in mixer_names(layer) if not isinstance(getattr(layer, name), Silent)]
    inputs = getattr(layer, _SHORT).conv.in_channels if _SHORT in names else None
    window = state = None
    for name in (name for name in names if name in _RECURRENT):
        mixer = getattr(layer, name)
        window = (mixer.conv1d.in_channels, mixer.conv1d.kernel_size[0] - 1)
        state = _state(mixer)
    return LayerMemory(attention=ATTENTION in names, inputs=inputs, window=window, state=state)


def _state(mixer: Any) -> tuple[int, int, int]:
    """Heads, size of a key and size of a value of a recurrent state."""
    if hasattr(mixer, "num_v_heads"):  # gated delta net
        return mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim
    if hasattr(mixer, "num_heads"):  # Mamba-2
        return mixer.num_heads, mixer.ssm_state_size, mixer.head_dim
    return mixer.intermediate_size, mixer.ssm_state_size, 1  # Mamba: every channel is a head


def _present(layer: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if isinstance(getattr(layer, name, None), nn.Module))
