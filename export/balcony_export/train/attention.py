"""Causal attention of whole rows, for training on CPUs: two matrix products around a compiled softmax.

Owns one attention function for transformers' interface. PyTorch's fused CPU kernel computes 512 rows of the demo model's nine
heads in bfloat16 in 10 ms, this function in 3.6 ms (two cores with AVX-512 and BF16). Its products are ordinary matrix
products, query heads that share a key head form one product, and keys after a block of rows are left out.
"""

from __future__ import annotations

import functools
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "balcony_edge_blocks"
#: Blocks of queries. The first half of the rows needs no key of the second, so 2 blocks save a quarter of the arithmetic. 4
#: would save three eighths, but their products are too small (4.3 ms instead of 3.6).
_BLOCKS = 2


def can_compile() -> bool:
    """Whether ``torch.compile`` works on this machine's CPU, which needs a C++ compiler and Python's headers."""
    compiler = "cl" if sys.platform == "win32" else "g++"  # on Windows PyTorch takes no other one by itself
    return shutil.which(compiler) is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


def _softmax(scores: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.softmax(scores.float() * scaling + mask, dim=-1).to(scores.dtype)


def _softmax_gradient(weights: torch.Tensor, gradient: torch.Tensor, scaling: float) -> torch.Tensor:
    product = weights.float() * gradient.float()
    return ((product - weights.float() * product.sum(dim=-1, keepdim=True)) * scaling).to(weights.dtype)


@functools.cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(function, dynamic=False)  # at import it would always load the compiler


class _MaskedSoftmax(torch.autograd.Function):
    """softmax(scores × scaling + mask), computed in float32.

    A custom function, so that the compiler sees each shape once. Otherwise it would compile again with and without gradients,
    with and without autocast, and after eight times it gives up and runs the operations one by one.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            weights = _compiled(_softmax)(scores.detach(), mask, scaling)
        ctx.save_for_backward(weights)
        ctx.scaling = scaling
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            return (
                _compiled(_softmax_gradient)(weights.detach(), gradients[0].detach().contiguous(), ctx.scaling),
                None,
                None,
            )


@functools.lru_cache(maxsize=4)
def _causal_mask(rows: int) -> torch.Tensor:
    return torch.full((rows, rows), float("-inf")).triu(1)


def block_attention(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, T, d)
    key: torch.Tensor,  # (B, KV heads, T, d)
    value: torch.Tensor,  # (B, KV heads, T, d)
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with transformers' interface; everything but plain causal attention goes to PyTorch's kernel.

    Returns:
        The heads' outputs (B, T, H, d), and None for the attention weights.
    """
    batch, heads, rows, width = query.shape
    groups, block = key.shape[1], -(-rows // _BLOCKS)
    if attention_mask is not None or others.get("dropout") or others.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return out, None
    scaling = width**-0.5 if scaling is None else scaling
    mask = _causal_mask(rows)
    together = query.reshape(batch * groups, heads // groups, rows, width)
    keys, values = key.reshape(batch * groups, rows, width), value.reshape(batch * groups, rows, width)
    outs = []
    for first in range(0, rows, block):
        last = min(first + block, rows)
        asked = together[:, :, first:last].reshape(batch * groups, -1, width)
        scores = torch.bmm(asked, keys[:, :last].transpose(1, 2))  # (B × groups, heads a group × block, last)
        scores = scores.view(batch * groups, heads // groups, last - first, last)
        weights = _MaskedSoftmax.apply(scores, mask[first:last, :last], scaling)  # type: ignore[no-untyped-call]
        out = torch.bmm(weights.flatten(1, 2), values[:, :last])  # (B × groups, heads a group × block, d)
        outs.append(out.view(batch, heads, last - first, width))
    return torch.cat(outs, dim=2).transpose(1, 2), None


def use_block_attention(*modules: nn.Module) -> None:
    """Let a model, and modules copied from its layers, use :func:`block_attention` instead of PyTorch's fused kernel.

    Models with eager attention keep it, because it may do what the fused kernel cannot (Gemma-2 caps its scores).
    """
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    configs = {id(c): c for m in modules for part in m.modules() if (c := getattr(part, "config", None))}
    for config in configs.values():
        if config._attn_implementation == "sdpa":
            config._attn_implementation = NAME
