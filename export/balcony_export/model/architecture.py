"""The parts and sizes of a Hugging Face causal LM, and which models are supported.

Owns the supported architectures, the refusals by name, and the description that goes into the manifest. Does not know how
graphs are traced. Export rebuilds the model's forward pass from its parts (token table, decoder layers, final norm, LM
head). A model that does anything else between them must be refused here, or its bundle would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from balcony_edge.bundle.manifest import LayerMemory, ModelSpec
from balcony_edge.errors import UnsupportedModelError
from balcony_export.model.experts import mixture
from balcony_export.model.layer import memory_of

#: ``config.model_type`` of the architectures whose export is covered by parity tests.
SUPPORTED = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "granite"),
    *("ministral", "olmo2", "phi3", "exaone4", "arcee", "hunyuan_v1_dense"),
    # mixtures of experts
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"),
    # models with layers that keep a convolution's inputs or a recurrent state
    *("lfm2", "lfm2_moe", "mamba", "falcon_mamba", "mamba2", "bamba", "granitemoehybrid", "falcon_h1"),
    *("qwen3_next", "qwen3_5_text"),
)
#: Rotary embeddings whose table does not depend on the length of the sequence (transformers ``ROPE_INIT_FUNCTIONS``).
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
#: Those whose table changes only beyond the length that the model was first trained for; export stays below it.
STATIC_AT_FIRST_ROPE = ("dynamic", "longrope")
#: Default for the longest rope table that export writes: enough for an edge device, small compared with the weights.
DEFAULT_CONTEXT = 8192
#: Longest context of a model without positions.
UNBOUNDED_CONTEXT = 1 << 20


#: Names of the norm before the head. LFM2's is named after the weights that it shares.
_FINAL_NORMS = ("norm", "embedding_norm", "final_layernorm", "norm_f")


@dataclass(frozen=True)
class Parts:
    """The modules of a model by role; ``decoder`` holds all of them but the head."""

    decoder: Any
    embed: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    rotary: nn.Module | None
    head: nn.Linear


def parts_of(model: PreTrainedModel) -> Parts:
    """The modules of a supported model.

    Raises:
        UnsupportedModelError: The model has a feature that export cannot represent, which the message names.
    """
    config = model.config
    refuse_unsupported(config)
    base: Any = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    head = model.get_output_embeddings()
    norm = next(getattr(base, name) for name in _FINAL_NORMS if hasattr(base, name))
    embed: Any = model.get_input_embeddings()
    rotary = getattr(base, "rotary_emb", getattr(base, "pos_emb", None))  # LFM2-MoE has the other name
    return Parts(base, embed, base.layers, norm, rotary, head)


def refuse_unsupported(config: Any) -> None:
    """Raise UnsupportedModelError for a configuration with a feature that export cannot represent."""
    kind = getattr(config, "model_type", None) or type(config).__name__

    def refuse(why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"model type '{kind}': {why}: export supports {', '.join(SUPPORTED)}")

    experts = any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    if experts and kind not in SUPPORTED:
        raise refuse("its mixture of experts is not covered by parity tests")
    if getattr(config, "num_kv_shared_layers", None):
        raise refuse("its layers share keys and values across exits")
    if kind not in SUPPORTED:
        raise refuse("this architecture is not covered by parity tests")
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        raise refuse("bidirectional attention cannot generate token by token")
    # transformers' masks and the argument of its attention, from which export takes the window, differ in these two
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if kind == "smollm3" and slides and not config.use_sliding_window:
        raise refuse("layer_types has sliding_attention, but use_sliding_window is false")
    if kind == "olmoe" and getattr(config, "sliding_window", None) is not None:
        raise refuse("sliding_window is set, which transformers ignores")
    for where, rope in _ropes(config):
        rope_type = rope.get("rope_type", "default")
        if rope_type not in STATIC_ROPE + STATIC_AT_FIRST_ROPE:
            raise refuse(f"rope scaling '{rope_type}'{where} depends on the length of the sequence")


def _ropes(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, rope parameters)`` of each rotary embedding: one, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters or "rope_theta" in parameters or not parameters:
        yield "", parameters
        return
    for layer_type, rope in parameters.items():
        if rope is not None:
            yield f" of {layer_type} layers", rope


def longest_context(config: Any) -> int:
    """Number of positions that a model takes.

    A rotary embedding that changes with the length ends where it changes. A state space without attention has no positions, so
    no bound of its own.
    """
    lengths = [int(getattr(config, "max_position_embeddings", UNBOUNDED_CONTEXT))]
    for _, rope in _ropes(config):
        if rope.get("rope_type") == "yarn" and rope.get("factor"):
            # the models' pages (Qwen 2.5 and 3) add this rope and leave max_position_embeddings at the length before it
            scaled = rope["factor"] * rope["original_max_position_embeddings"]
            lengths[0] = max(lengths[0], int(scaled))
        if rope.get("rope_type") in STATIC_AT_FIRST_ROPE:
            first = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            lengths.append(int(first or config.max_position_embeddings))
    return min(lengths)


def layer_type(config: Any, index: int) -> str:
    """Attention type of a layer: its entry in transformers' ``layer_types``, or ``full_attention`` if there is none."""
    types = getattr(config, "layer_types", None)
    return str(types[index]) if types else "full_attention"


def embedding_scale(parts: Parts, dtype: torch.dtype) -> float:
    """Factor on the token table's rows (Gemma's √D, Granite's multiplier), rounded to the model's precision."""
    scale = getattr(parts.embed, "scalar_embed_scale", getattr(parts.decoder, "embedding_multiplier", None))
    return 1.0 if scale is None else float(torch.tensor(scale).to(dtype))


def embedded_rows(parts: Parts, tokens: torch.Tensor) -> torch.Tensor:
    """State before the first layer, scaled as the model does  # (B, T) -> (B, T, D)"""
    rows: torch.Tensor = parts.embed(tokens)  # Gemma's module multiplies by itself
    return rows * getattr(parts.decoder, "embedding_multiplier", 1.0)


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a module's weights in place, but not its buffers: rotary frequencies stay float32 whatever the weights are.

    ``module.to(float16)`` would also round the frequencies, and 0.05 % of a frequency is half a turn at position 8,192.
    transformers leaves them alone when it loads a model in another type.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that end a text, by the generation defaults of a model."""
    eos = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def describe(model: PreTrainedModel, name: str, context_length: int | None = None) -> ModelSpec:
    """The manifest's description of the base model.

    Args:
        model: The model.
        name: Name of the model.
        context_length: Largest number of rows of a sequence; by default the model's own, at most ``DEFAULT_CONTEXT``.
    """
    config: Any = model.config
    memories = tuple(memory_of(layer) for layer in parts_of(model).layers)
    limit = longest_context(config)
    if context_length is not None and not 2 <= context_length <= limit:
        raise UnsupportedModelError(
            f"context length {context_length}: this model takes 2 to {limit}: give a number in this range"
        )
    attends = any(one.attention for one in memories)
    heads = int(config.num_attention_heads) if attends else 0
    return ModelSpec(
        name=name,
        architecture=str((config.architectures or [type(model).__name__])[0]),
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        num_attention_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads) if attends else 0,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads) if attends else 0,
        vocab_size=parts_of(model).embed.num_embeddings,
        context_length=context_length or min(limit, DEFAULT_CONTEXT),
        bos_token_id=config.bos_token_id,
        eos_token_ids=eos_ids(model),
        layers=() if all(one == LayerMemory() for one in memories) else memories,
        mixture=mixture(config),
    )
