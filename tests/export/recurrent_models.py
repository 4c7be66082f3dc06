"""Tiny random models with recurrent mixers, and sessions on their graphs."""

from __future__ import annotations

import functools
from typing import Any

import onnx_ir as ir
import torch
import transformers
from transformers import DynamicCache

from balcony_export.graph.recurrent.passes import write_in_standard_operators
from balcony_runtime.backends.onnxruntime import open_session

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_ATTENTION: dict[str, Any] = {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
_STATE_SPACE: dict[str, Any] = {"mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 8}
_DELTA: dict[str, Any] = {
    "head_dim": 64,  # a quarter of it is rotated
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
_KINDS = ["linear_attention", "full_attention", "linear_attention"]
#: Name → (class of the configuration, class of the model, what sets it apart, name of the mixer in a layer).
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 2, "chunk_size": 8},
        "mixer",
    ),
    "bamba": ("BambaConfig", "BambaForCausalLM", {**_ATTENTION, **_STATE_SPACE, "attn_layer_indices": [1]}, "mamba"),
    "granite": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **_ATTENTION,
            **_STATE_SPACE,
            "mamba_n_groups": 1,
            "layer_types": _KINDS,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.15,
            "logits_scaling": 3.0,
        },
        "mamba",
    ),
    "falcon-h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {
            **_ATTENTION,
            **_STATE_SPACE,
            "mamba_d_ssm": 128,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "key_multiplier": 0.7,
            "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 0.8,
            "ssm_multipliers": [0.5, 0.8, 1.2, 0.9, 1.1],
            "ssm_in_multiplier": 1.3,
            "ssm_out_multiplier": 0.6,
            "mlp_multipliers": [0.9, 1.1],
        },
        "mamba",
    ),
    "falcon-h1-norm": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {**_ATTENTION, **_STATE_SPACE, "mamba_d_ssm": 128, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
        "mamba",
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_ATTENTION, **_DELTA, "layer_types": _KINDS, "mlp_only_layers": [0, 1, 2]},
        "linear_attn",
    ),
    "qwen3.5": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {**_ATTENTION, **_DELTA, "layer_types": _KINDS},
        "linear_attn",
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"state_size": 8}, "mixer"),
    "falcon-mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", {"state_size": 8}, "mixer"),
}


@functools.cache
def tiny(name: str) -> Any:
    """A random model; decays and time steps are spread widely, so that a wrong one shows."""
    config_class, model_class, extra, _ = MODELS[name]
    config = getattr(transformers, config_class)(**{**_SIZES, **extra})
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(20261127)
    for key, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in key and "qwen" not in name else 0.0
        parameter.data = random * 0.5 + centre if parameter.dim() == 1 else random * (0.7 if "conv1d" in key else 0.25)
    return model.eval()


def mixer_of(name: str, layer: int = 0) -> Any:
    return getattr(tiny(name).get_decoder().layers[layer], MODELS[name][3])


def states_of(name: str, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty window and state of a mixer, from the shapes of transformers' cache."""
    model = tiny(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(batch, 2, dtype=torch.long), use_cache=True, cache=cache)
    window, state = cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]
    if state.dim() == 3:  # Mamba: one value a channel
        state = state[..., None]
    elif "qwen" not in name:  # (B, H, P, N) in transformers
        state = state.mT
    return torch.zeros_like(window[..., 1:]), torch.zeros_like(state)


def portable(model: ir.Model) -> ir.Model:
    clone = model.clone()
    write_in_standard_operators(clone)
    return clone


def session(model: ir.Model) -> Any:
    return open_session(ir.serde.serialize_model(model).SerializeToString())


#: Sizes of passes that add up to 21 rows.
CHUNKS = {"one pass": (21,), "row by row": (1,) * 21, "mixed": (5, 1, 1, 9, 2, 3)}
