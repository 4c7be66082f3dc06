"""Tiny random mixtures of experts, one for each architecture and form of router."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from balcony_export.model.exits import ExitModel
from tests.conftest import VOCABULARY, spread_biases, with_balconies

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
_GRANITE: dict[str, Any] = {
    "num_local_experts": 8,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.5,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.15,
}
#: Name → (config class, model class, what sets it apart).
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 8, "sliding_window": 7}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 2,
            "intermediate_size": 96,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 4,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 16,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 8, "clip_qkv": 2.0}),
    "granite-moe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", _GRANITE),
    "granite-moe-shared": (
        "GraniteMoeSharedConfig",
        "GraniteMoeSharedForCausalLM",
        {**_GRANITE, "shared_intermediate_size": 48},
    ),
    "lfm2-moe": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 1,
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 1.5,
        },
    ),
}


def tiny_mixture(name: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A random model whose logits spread widely, and whose routers decide clearly."""
    config_class, model_class, extra = MIXTURES[name]
    config = getattr(transformers, config_class)(**{**_SIZES, **extra, **overrides})
    config._attn_implementation = "eager"
    model: transformers.PreTrainedModel = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(20261127)
    for parameter_name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        norm = 1.0 if "norm" in parameter_name else 0.0
        parameter.data = random * (0.5 if parameter.dim() == 1 else 0.2) + norm
    spread_biases(model, generator)
    return model.eval()


def mixture_exits(name: str, **overrides: Any) -> ExitModel:
    """A tiny mixture with balconies that are unlike its last layer."""
    return with_balconies(tiny_mixture(name, **overrides))
