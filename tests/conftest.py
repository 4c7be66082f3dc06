"""Shared fixtures: tiny random models of every supported architecture, their bundles, and the demo model's bundle.

A tiny bundle is exported once a session by the real exporter and run by the real ONNX Runtime; nothing is mocked. What needs no
model library is in tests/fixtures.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from a hub

import copy
import functools
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from balcony_edge.errors import MissingDependencyError
from balcony_export.export import ExportOptions, Traced, export_bundle, trace
from balcony_export.model.balcony import Balcony, init_balconies
from balcony_export.model.checkpoint import demo_model_path, load_tokenizer
from balcony_export.model.exits import ExitModel
from tests.support.traces import SharedTraces, unwatched

pytest_plugins = ("tests.fixtures",)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # on tiny matrices a second thread only waits, and sums are the same in a child process

VOCABULARY = 320
EXITS = (2, 3)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"]
_STATE_SPACE = {"mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 8}
_DELTA = {
    "head_dim": 64,  # a quarter of it is rotated
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
#: Architecture → (config class, model class, what sets it apart): GQA and MHA, tied and untied heads, q/k norms, biases,
#: sliding windows, two ropes, layers without rope, soft caps, scaled embeddings, norms after the mixers only, one matrix for
#: several projections and an MLP without a gate.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-mha": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "llama-small-heads": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 8}),  # ONNX Runtime's fused attention refuses
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 7, "tie_word_embeddings": False}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 7,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 7, "layer_types": _MIXED}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1, 1, 0]}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.15,
            "logits_scaling": 3.0,
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"tie_word_embeddings": False}),
    "ministral": ("MinistralConfig", "MinistralForCausalLM", {"sliding_window": 7, "layer_types": _MIXED}),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "pad_token_id": 0,
            "sliding_window": 7,
            "head_dim": 64,  # half of it is rotated, as three quarters of Phi-4-mini's
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", {"sliding_window": 7, "layer_types": _MIXED}),
    "arcee": ("ArceeConfig", "ArceeForCausalLM", {}),
    "hunyuan": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {}),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {
            "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
            "conv_bias": True,
        },
    ),
    "lfm2-moe": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {
            "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 1.5,
        },
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"state_size": 16}),
    "falcon-mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", {"state_size": 16}),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", {"num_heads": 4, "state_size": 16, "n_groups": 2, "chunk_size": 8}),
    "bamba": ("BambaConfig", "BambaForCausalLM", {**_STATE_SPACE, "attn_layer_indices": [1, 3], "head_dim": 32}),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **_STATE_SPACE,
            "layer_types": _HYBRID,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.15,
            "logits_scaling": 3.0,
        },
    ),
    "granite-hybrid-moe": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **_STATE_SPACE,
            "layer_types": _HYBRID,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
        },
    ),
    "falcon-h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {
            **_STATE_SPACE,
            "mamba_d_ssm": 64,
            "lm_head_multiplier": 0.5,
            "key_multiplier": 0.7,
            "ssm_out_multiplier": 0.6,
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_DELTA, "layer_types": _HYBRID, "mlp_only_layers": [0, 1, 2, 3, 4]},
    ),
    "qwen3-next-moe": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **_DELTA,
            "layer_types": _HYBRID,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**_DELTA, "layer_types": _HYBRID}),
}


def tiny_model(architecture: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A random model whose logits spread widely enough that a wrong mask or rope shows."""
    config_class, model_class, extra = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**{**_SIZES, **extra, **overrides})
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(20261125)
    for name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        norm = 0.0 if "gemma" in architecture else 1.0  # Gemma's norms multiply by 1 + w
        parameter.data = random * 0.3 + norm if "norm" in name else random * (0.5 if parameter.dim() == 1 else 0.3)
    spread_biases(model, generator)
    return model.eval()


def spread_biases(model: transformers.PreTrainedModel, generator: torch.Generator) -> None:
    """Give the routers that have one a bias that changes their choices; transformers keeps it in a buffer of zeros."""
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):
            bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))


def with_balconies(model: transformers.PreTrainedModel) -> ExitModel:
    """A tiny model with balconies at `EXITS` that are unlike its last layer."""
    balconies, generator = init_balconies(model, EXITS), torch.Generator().manual_seed(7)
    for balcony in balconies.values():
        for parameter in balcony.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return ExitModel(model, balconies)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over a page of text, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and the balcony " * 5], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., transformers.PreTrainedModel]:
    """Makes a fresh tiny model: ``make_tiny("qwen3", num_hidden_layers=3)``."""
    return tiny_model


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], transformers.PreTrainedTokenizerFast]:
    """Makes a fresh tiny tokenizer."""
    return tiny_tokenizer


@pytest.fixture(scope="session")
def demo_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """The demo model's tokenizer, which takes many seconds to read; read only."""
    try:
        return load_tokenizer(demo_model_path())
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session", autouse=True)
def shared_traces() -> Iterator[None]:
    """Trace models without coverage and without collecting garbage, and only those that are unlike earlier ones."""
    with pytest.MonkeyPatch.context() as patch, SharedTraces().shared():
        patch.setattr(torch.onnx, "export", unwatched(torch.onnx.export))
        yield


@dataclass(frozen=True)
class Exported:
    """A bundle with what it was made from."""

    path: Path
    exits: ExitModel
    tokenizer: transformers.PreTrainedTokenizerBase
    traced: Traced

    @property
    def model(self) -> transformers.PreTrainedModel:
        return self.exits.model

    @property
    def balconies(self) -> dict[int, Balcony]:
        return self.exits.balconies


def exported(exits: ExitModel, name: str, path: Path) -> Exported:
    """Export a model in float32."""
    tokenizer, options = tiny_tokenizer(), ExportOptions(name, trained=True)
    traced = trace(exits, options)
    export_bundle(exits, tokenizer, path, options, traced=traced)
    # The graphs stay for the session. The collection at the end of every export would walk over those of all bundles.
    gc.freeze()
    return Exported(path, exits, tokenizer, traced)


@pytest.fixture(scope="session")
def export_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a tiny model by the name of its architecture, once a session. The balconies are unlike the last layer."""

    @functools.cache
    def export(architecture: str) -> Exported:
        path = tmp_path_factory.mktemp("bundles") / architecture
        return exported(with_balconies(tiny_model(architecture)), f"tiny-{architecture}", path)

    return export


@pytest.fixture(scope="session")
def tiny(export_tiny: Callable[[str], Exported]) -> Exported:
    """The tiny Llama's bundle; read only."""
    return export_tiny("llama")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    copy.deepcopy(tiny.model).save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def small_checkpoint(make_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers as a Hugging Face directory, for a process that traces it by itself."""
    path = tmp_path_factory.mktemp("checkpoint") / "small-llama"
    make_tiny("llama", num_hidden_layers=2).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON Lines to distil on: 60 short texts and 10 instructions."""
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "balcony"]
    generator = np.random.default_rng(3)
    records: list[dict[str, Any]] = [
        {"text": " ".join(generator.choice(words, size=int(generator.integers(4, 40))))} for _ in range(60)
    ]
    records += [{"instruction": "name the dog", "context": "", "response": f"lazy {n} fox"} for n in range(10)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
