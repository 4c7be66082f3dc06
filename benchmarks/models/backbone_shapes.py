"""Backbones of real size with random weights, as a bundle of ours and as a GGUF file of llama.cpp.

Owns the shapes and both files of each, which are kept in a directory. Speed does not depend on the weights' values, so the two
files need not hold the same ones: the GGUF file is random bytes in the types that ``llama-quantize`` gives a Q4_0 model
(LM head in Q6_K, convolutions, norms and routers in float32). Measuring is :mod:`benchmarks.models.backbones`' part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.checkpoint import demo_model_path, load_tokenizer
from balcony_export.model.exits import ExitModel
from balcony_export.quantize.blocks import parse_precision

CONTEXT = 1024
#: Scale of random blocks: their values are then about as large as those of fresh weights (standard deviation 0.02).
SCALE = 0.004
_GRANITE_LAYERS, _GRANITE_ATTENDS = 32, (10, 13, 17, 27)
_LFM2_LAYERS, _LFM2_ATTENDS = 16, (2, 5, 8, 10, 12, 14)


@dataclass(frozen=True)
class Shape:
    """One backbone.

    Attributes:
        config: Name of transformers' class of the configuration.
        options: Arguments of the configuration.
        architecture: Name of the architecture in GGUF.
        write: Writes the keys and tensors of the architecture.
        note: Difference from the published model, for the results.
    """

    config: str
    options: dict[str, Any]
    architecture: str
    write: Callable[[_Gguf], None]
    note: str = ""

    def configuration(self) -> Any:
        """The model's configuration."""
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        common = {**ids, "max_position_embeddings": 4 * CONTEXT}
        return getattr(transformers, self.config)(**common, **self.options)


class _Gguf:
    """A GGUF file in the making: its keys, and tensors of random values."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.config = shape.configuration()
        self.width: int = self.config.hidden_size
        self.file = gguf.GGUFWriter(path, shape.architecture)
        self._random = np.random.default_rng(0)

    def matrix(self, name: str, *shape: int, kind: Kind = Kind.Q4_0) -> None:
        """A quantized matrix (..., outputs, inputs)."""
        values, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = self._random.integers(0, 256, (int(np.prod(shape)) // values, size), np.uint8)
        at, scale = (0, SCALE) if kind == Kind.Q4_0 else (size - 2, SCALE / 512)
        blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
        raw = blocks.reshape(*shape[:-1], shape[-1] // values * size)
        self.file.add_tensor(f"{name}.weight", raw, raw_dtype=kind)

    def vector(self, name: str, *shape: int, mean: float = 1.0) -> None:
        """A float32 tensor with values around ``mean``."""
        self.file.add_tensor(name, (mean + 0.02 * self._random.standard_normal(shape)).astype(np.float32))

    def attention(self, at: str, *, norms: tuple[int, int] | None = None) -> None:
        """Queries, keys, values and output of a layer; ``norms`` are the sizes of the norms of queries and keys."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        size = self.width // heads
        self.matrix(f"{at}.attn_q", heads * size, self.width)
        self.matrix(f"{at}.attn_k", kv_heads * size, self.width)
        self.matrix(f"{at}.attn_v", kv_heads * size, self.width)
        self.matrix(f"{at}.attn_output", self.width, heads * size)
        if norms is not None:
            self.vector(f"{at}.attn_q_norm.weight", norms[0])
            self.vector(f"{at}.attn_k_norm.weight", norms[1])

    def mlp(self, at: str, width: int) -> None:
        """A SwiGLU MLP."""
        for name in ("ffn_gate", "ffn_up"):
            self.matrix(f"{at}.{name}", width, self.width)
        self.matrix(f"{at}.ffn_down", self.width, width)

    def ends(self, norm: str, *, tied: bool) -> None:
        """Embeddings, the last norm, and the head of a model with untied weights."""
        vocabulary = self.config.vocab_size
        self.matrix("token_embd", vocabulary, self.width, kind=Kind.Q6_K if tied else Kind.Q4_0)
        if not tied:
            self.matrix("output", vocabulary, self.width, kind=Kind.Q6_K)
        self.vector(f"{norm}.weight", self.width)

    def keys(self, width: int, kv_heads: list[int] | int) -> None:
        """Keys that all architectures have; ``width`` of the MLPs."""
        self.file.add_context_length(4 * CONTEXT)
        self.file.add_embedding_length(self.width)
        self.file.add_block_count(self.config.num_hidden_layers)
        self.file.add_feed_forward_length(width)
        self.file.add_head_count(self.config.num_attention_heads)
        self.file.add_head_count_kv(kv_heads)
        self.file.add_layer_norm_rms_eps(1e-5)
        self.file.add_rope_freq_base(1e4)
        self.file.add_rope_dimension_count(self.width // self.config.num_attention_heads)
        self.file.add_vocab_size(self.config.vocab_size)
        self.file.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
        self.file.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def vocabulary(self) -> None:
        """The demo model's tokenizer, filled up with tokens that no text has."""
        for key, field in gguf.GGUFReader(demo_model_path()).fields.items():
            if not key.startswith("tokenizer."):
                continue
            value = field.contents()
            missing = self.config.vocab_size - len(value) if key.endswith((".tokens", ".token_type")) else 0
            if key.endswith(".tokens"):
                value += [f"<unused {index}>" for index in range(missing)]
            elif key.endswith(".token_type"):
                value += [int(gguf.TokenType.UNUSED)] * missing
            self.file.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)

    def close(self) -> None:
        """Write everything."""
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()


def _lfm2(file: _Gguf) -> None:
    config, width, mlp = file.config, file.width, 4608
    file.keys(mlp, [config.num_key_value_heads if i in _LFM2_ATTENDS else 0 for i in range(_LFM2_LAYERS)])
    file.file.add_shortconv_l_cache(config.conv_L_cache)
    file.ends("token_embd_norm", tied=True)
    for index in range(_LFM2_LAYERS):
        at = f"blk.{index}"
        if index in _LFM2_ATTENDS:
            size = width // config.num_attention_heads
            file.attention(at, norms=(size, size))
        else:
            file.vector(f"{at}.shortconv.conv.weight", width, config.conv_L_cache, mean=0.0)
            file.matrix(f"{at}.shortconv.in_proj", 3 * width, width)
            file.matrix(f"{at}.shortconv.out_proj", width, width)
        file.vector(f"{at}.attn_norm.weight", width)
        file.vector(f"{at}.ffn_norm.weight", width)
        file.mlp(at, mlp)


def _granite(file: _Gguf) -> None:
    config, width = file.config, file.width
    heads, groups, state = config.mamba_n_heads, config.mamba_n_groups, config.mamba_d_state
    inner = heads * config.mamba_d_head
    mixed = inner + 2 * groups * state
    file.keys(
        config.shared_intermediate_size,
        [config.num_key_value_heads if i in _GRANITE_ATTENDS else 0 for i in range(_GRANITE_LAYERS)],
    )
    file.file.add_ssm_conv_kernel(config.mamba_d_conv)
    file.file.add_ssm_inner_size(inner)
    file.file.add_ssm_state_size(state)
    file.file.add_ssm_time_step_rank(heads)
    file.file.add_ssm_group_count(groups)
    file.file.add_rope_scaling_finetuned(False)  # llama.cpp rotates nothing then
    file.file.add_logit_scale(config.logits_scaling)
    file.file.add_residual_scale(config.residual_multiplier)
    file.file.add_embedding_scale(config.embedding_multiplier)
    file.file.add_attention_scale(config.attention_multiplier)
    file.ends("output_norm", tied=True)
    for index in range(_GRANITE_LAYERS):
        at = f"blk.{index}"
        if index in _GRANITE_ATTENDS:
            file.attention(at)
        else:
            file.matrix(f"{at}.ssm_in", inner + mixed + heads, width)
            file.vector(f"{at}.ssm_conv1d.weight", mixed, config.mamba_d_conv, mean=0.0)
            file.vector(f"{at}.ssm_conv1d.bias", mixed, mean=0.0)
            file.vector(f"{at}.ssm_dt.bias", heads, mean=-3.0)
            file.vector(f"{at}.ssm_a", heads, 1, mean=-8.0)
            file.vector(f"{at}.ssm_d", heads, 1)
            file.vector(f"{at}.ssm_norm.weight", groups, inner // groups)
            file.matrix(f"{at}.ssm_out", width, inner)
        file.vector(f"{at}.attn_norm.weight", width)
        file.vector(f"{at}.ffn_norm.weight", width)
        file.mlp(at, config.shared_intermediate_size)


def _olmoe(file: _Gguf) -> None:
    config, width = file.config, file.width
    experts, mlp = config.num_experts, config.intermediate_size
    file.keys(mlp, config.num_key_value_heads)
    file.file.add_expert_count(experts)
    file.file.add_expert_used_count(config.num_experts_per_tok)
    file.ends("output_norm", tied=False)
    for index in range(config.num_hidden_layers):
        at = f"blk.{index}"
        file.attention(at, norms=(width, width))
        file.vector(f"{at}.attn_norm.weight", width)
        file.vector(f"{at}.ffn_norm.weight", width)
        file.vector(f"{at}.ffn_gate_inp.weight", experts, width, mean=0.0)
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            file.matrix(f"{at}.{name}", experts, mlp, width)
        file.matrix(f"{at}.ffn_down_exps", experts, width, mlp)


#: Name → shape, from each model's config.json on Hugging Face.
SHAPES = {
    "lfm2-350m": Shape(
        "Lfm2Config",
        {
            "vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 6656, "num_hidden_layers": _LFM2_LAYERS,
            "num_attention_heads": 16, "num_key_value_heads": 8, "block_auto_adjust_ff_dim": True,
            "full_attn_idxs": list(_LFM2_ATTENDS), "tie_word_embeddings": True,
        },
        "lfm2",
        _lfm2,
    ),
    "granite-4.0-h-350m": Shape(
        "GraniteMoeHybridConfig",
        {
            "vocab_size": 100352, "hidden_size": 768, "num_hidden_layers": _GRANITE_LAYERS, "num_attention_heads": 12,
            "num_key_value_heads": 4, "num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 2048,
            "shared_intermediate_size": 2048, "mamba_n_heads": 48, "mamba_d_head": 32, "mamba_d_state": 128,
            "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "position_embedding_type": "nope",
            "embedding_multiplier": 12.0, "residual_multiplier": 0.246, "attention_multiplier": 0.015625,
            "logits_scaling": 3.0, "tie_word_embeddings": True,
            "layer_types": ["attention" if i in _GRANITE_ATTENDS else "mamba" for i in range(_GRANITE_LAYERS)],
        },
        "granitehybrid",
        _granite,
    ),
    "olmoe-1b-7b": Shape(
        "OlmoeConfig",
        {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 2,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
            "norm_topk_prob": False, "tie_word_embeddings": False,
        },
        "olmoe",
        _olmoe,
        "2 of its 16 layers",
    ),
}  # fmt: skip


def bundle_of(name: str, directory: Path) -> Path:
    """The int4 bundle of a shape, with exits at half and full depth; it is exported if it does not exist."""
    path = directory / f"{name}-int4"
    if not path.exists():
        torch.manual_seed(0)
        config = SHAPES[name].configuration()
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        exits = ExitModel.open(model, (config.num_hidden_layers // 2,))
        options = ExportOptions(name, trained=False, precision=parse_precision("int4"), context_length=CONTEXT)
        export_bundle(exits, load_tokenizer(demo_model_path()), path, options)
    return path


def gguf_of(name: str, directory: Path) -> Path:
    """The Q4_0 GGUF file of a shape; it is written if it does not exist."""
    path = directory / f"{name}-q4_0.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        file = _Gguf(part, SHAPES[name])
        file.vocabulary()
        SHAPES[name].write(file)
        file.close()
        part.rename(path)
    return path
