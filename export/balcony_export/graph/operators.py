"""Stand-ins that make transformers' decoder layers emit standard ONNX operators while they are traced.

Owns ``Attention`` (opset 24), ``RotaryEmbedding`` and ``RMSNormalization`` (opset 23), each as one node,
and :func:`tracing`, which puts them in place of the modules' own arithmetic for a while. It knows no architecture by name: what
a norm or a rotary embedding computes is found by a trial.

Masks are explicit and positions are row indices: row r sees keys ≤ r (within its window). So rows after the cursor have no
effect, and the graphs also work in engines that ignore ``nonpad_kv_seqlen`` (TensorRT's parser does).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.onnx import ops
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from balcony_edge.errors import UnsupportedModelError
from balcony_export.graph.experts import symbolic_experts
from balcony_export.graph.passes import WINDOW
from balcony_export.graph.stand_ins import replaced_attributes, replaced_children
from balcony_export.model.layer import ATTENTION

_ATTENTION = "balcony_edge_trace"


@dataclass(frozen=True)
class RowPositions:
    """Positions of the rows of one pass and the capacity of the KV cache, with the masks that follow, made on demand."""

    start: torch.Tensor  # (B,) int64: position of the first row
    positions: torch.Tensor  # (B, T) int64
    capacity: int
    masks: dict[int | None, torch.Tensor]
    places: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def mask(self, window: int | None) -> torch.Tensor:
        """True where row r sees key k: k ≤ r, and k > r - window if there is a window  # (B, 1, T, S)"""
        if window not in self.masks:
            keys = torch.arange(self.capacity)[None, None, :]  # (1, 1, S)
            rows = self.positions[:, :, None]  # (B, T, 1)
            seen = keys <= rows
            if window is not None:
                seen = seen & (keys > rows - window)
            self.masks[window] = seen[:, None]  # (B, 1, T, S)
        return self.masks[window]

    def before(self, kept: torch.Tensor, count: int) -> torch.Tensor:
        """The ``count`` rows before the first of the pass, zeros before the sequence  # (B, S, C) -> (B, count, C)"""
        if count not in self.places:
            wanted = self.start[:, None] + torch.arange(-count, 0)[None]  # (B, count)
            self.places[count] = wanted.clamp(min=0)[..., None], (wanted >= 0)[..., None]
        place, there = self.places[count]
        shape = (kept.shape[0], count, kept.shape[2])
        attributes: dict[str, Any] = {"batch_dims": 1}
        found = ops.symbolic("GatherND", (kept, place), attributes, dtype=kept.dtype, shape=shape, version=13)
        return torch.where(there, found, torch.zeros((), dtype=kept.dtype))


@dataclass(frozen=True)
class RopeTable:
    """Half of a rotary table, which the layers take instead of ``cos`` or ``sin``."""

    table: torch.Tensor  # (context, head_dim / 2)
    positions: torch.Tensor  # (B, T)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, head_dim) -> (B, T, H * head_dim)


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, T, head_dim)
    key: torch.Tensor,  # (B, S, F)
    value: torch.Tensor,  # (B, S, F)
    attention_mask: RowPositions,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    batch, heads, rows, head_dim = query.shape
    attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": key.shape[2] // head_dim}
    attributes["scale"] = head_dim**-0.5 if scaling is None else float(scaling)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    # Qwen2-MoE does not pass its window, because its masks contain it. In EXAONE 4 the global layers also have the attribute.
    if sliding_window is None and getattr(module, "is_sliding", True):
        sliding_window = getattr(module, "sliding_window", None)
    if sliding_window is not None:
        attributes[WINDOW] = int(sliding_window)  # not in ONNX: passes.note_windows removes it
    mask = attention_mask.mask(sliding_window)
    shape = (batch, rows, heads * head_dim)
    inputs = (merge_heads(query), key, value, mask)
    out = ops.symbolic("Attention", inputs, attributes, dtype=query.dtype, shape=shape, version=24)
    return out.view(batch, rows, heads, head_dim), None


def _rotary(
    query: torch.Tensor, key: torch.Tensor, cos: RopeTable, sin: RopeTable, *_: object, **__: object
) -> tuple[torch.Tensor, torch.Tensor]:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        batch, heads, rows, head_dim = x.shape
        inputs = (merge_heads(x), cos.table, sin.table, cos.positions)
        shape = (batch, rows, heads * head_dim)
        attributes: dict[str, Any] = {"num_heads": heads}
        if (rotated := 2 * cos.table.shape[1]) < head_dim:  # the rest of each head is not rotated
            attributes["rotary_embedding_dim"] = rotated
        out = ops.symbolic("RotaryEmbedding", inputs, attributes, dtype=x.dtype, shape=shape, version=23)
        return out.view(batch, rows, heads, head_dim).transpose(1, 2)

    return rotate(query), rotate(key)


class RMSNorm(nn.Module):
    """A model's RMSNorm as the standard operator, in float32 inside (``stash_type`` 1)."""

    def __init__(self, scale: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.epsilon = epsilon

    @property
    def weight(self) -> torch.Tensor:
        """The scale, under the name by which Mamba's layers look up its type."""
        return self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attributes: dict[str, Any] = {"axis": -1, "epsilon": self.epsilon, "stash_type": 1}
        return ops.symbolic("RMSNormalization", (x, self.scale), attributes, dtype=x.dtype, shape=x.shape, version=23)


def rms_norm_operator(norm: nn.Module) -> RMSNorm | None:
    """The operator that computes what ``norm`` does, found by a trial; None if it is not an RMSNorm.

    Raises:
        UnsupportedModelError: it is a LayerNorm, or its RMSNorm scales otherwise.
    """
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if "LayerNorm" in type(norm).__name__:
        raise UnsupportedModelError(
            f"{type(norm).__name__}: subtracts the mean: export represents RMSNorms only: give a model with those"
        )
    if "RMSNorm" not in type(norm).__name__ or weight is None or epsilon is None:
        return None
    probe = torch.linspace(-3, 3, 2 * weight.numel()).reshape(2, -1)
    unit = probe * torch.rsqrt(probe.pow(2).mean(-1, keepdim=True) + epsilon)
    with torch.no_grad():
        found = norm(probe.to(weight.dtype)).float()
        for scale in (weight.detach().float(), 1.0 + weight.detach().float()):  # Llama's, and Gemma's (1 + w)
            if torch.allclose(found, unit * scale, rtol=1e-2, atol=1e-2):
                return RMSNorm(scale.to(weight.dtype), float(epsilon))
    raise UnsupportedModelError(
        f"{type(norm).__name__}: computes neither x·w nor x·(1 + w) after scaling: export cannot represent it"
    )


def _check_rotary(module: Any) -> None:
    """Refuse rotary embeddings other than the half-rotation of whole heads, or of their first part, that export writes."""
    query = torch.linspace(-1, 1, 16).reshape(1, 1, 2, 8)
    for width in (8, 4):
        angle = torch.linspace(0, 3, width).reshape(1, 2, width // 2)
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        turned = torch.cat((-query[..., width // 2 : width], query[..., : width // 2]), -1)
        expected = torch.cat((query[..., :width] * cos[:, None] + turned * sin[:, None], query[..., width:]), -1)
        try:
            found, _ = module.apply_rotary_pos_emb(query, query, cos, sin)
        except RuntimeError:
            if width == 8:
                raise
            continue  # it rotates whole heads only, and never gets a narrower table
        if found.shape != query.shape or not torch.allclose(found, expected, atol=1e-5):
            raise UnsupportedModelError(
                f"{module.__name__}: its rotary embedding is not the half-rotation that export writes"
            )


def _refuse_own_weights(modules: Sequence[nn.Module]) -> None:
    """Refuse attention that has weights outside of its projections and norms, such as sinks: the operator takes none."""
    for name, module in (pair for root in modules for pair in root.named_modules()):
        own = ", ".join(key for key, _ in module.named_parameters(recurse=False))
        if name.rpartition(".")[2] == ATTENTION and own:
            raise UnsupportedModelError(
                f"{type(module).__name__}: has weights of its own ({own}), such as attention sinks: export represents "
                "projections and norms only: give a model without them"
            )


@contextlib.contextmanager
def tracing(model: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the decoder layers in ``modules`` emit standard operators until the end of the context."""
    _refuse_own_weights(modules)
    AttentionInterface.register(_ATTENTION, _attention)
    source = sys.modules[type(model).__module__]
    functions: dict[str, object] = {}
    if hasattr(source, "apply_rotary_pos_emb"):  # a model without attention has none
        _check_rotary(source)
        functions["apply_rotary_pos_emb"] = _rotary
    # a balcony is a copy of a layer and has a copy of its configuration
    found = (getattr(child, "config", None) for module in modules for child in module.modules())
    configs = [config for config in found if config is not None]
    with (
        replaced_children(modules, rms_norm_operator),
        replaced_attributes([source], functions),
        replaced_attributes(configs, {"_attn_implementation": _ATTENTION}),
        symbolic_experts(modules),
    ):
        yield
