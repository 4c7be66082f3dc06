"""Shared fixtures: tiny random models of every supported architecture, their bundles, and the demo model's bundle.

A tiny bundle is exported once a session by the real exporter and run by the real ONNX Runtime; nothing is mocked.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from a hub

import copy
import gc
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from balcony_edge.errors import BalconyError
from balcony_export.export import ExportOptions, Traced, export_bundle, trace
from balcony_export.model.balcony import Balcony, init_balconies
from balcony_export.model.exits import ExitModel
from balcony_runtime.backends.cuda import compute_capability
from balcony_runtime.backends.onnxruntime import open_session
from balcony_runtime.backends.webgpu.provider import find_provider
from balcony_runtime.engine import Engine
from tests.traces import SharedTraces, unwatched

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # on tiny matrices a second thread only waits, and sums are the same in a child process
# `make test` runs the same few examples every time; `make test-deep` runs many new ones (--hypothesis-profile=explore)
settings.register_profile("test", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=2000)
settings.load_profile("test")

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
#: sliding windows, two ropes, layers without rope, soft caps and scaled embeddings.
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


#: Those with recurrent layers, and all for tests that export them: what is similar to others is tried in ``make test-deep``.
HYBRIDS = ("mamba2", "granite-hybrid", "falcon-h1", "qwen3.5")
_SIMILAR_HYBRIDS = ("mamba", "falcon-mamba", "bamba", "granite-hybrid-moe", "qwen3-next", "qwen3-next-moe")
SIMILAR = ("granite", "lfm2-moe", *_SIMILAR_HYBRIDS)
RECURRENT = (*HYBRIDS, *(pytest.param(name, marks=pytest.mark.deep) for name in _SIMILAR_HYBRIDS))
EXPORTED = (*HYBRIDS, *(pytest.param(name, marks=pytest.mark.deep) for name in SIMILAR))


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


@pytest.fixture
def interruptible() -> Iterator[Callable[..., subprocess.Popen[Any]]]:
    """``Popen`` for processes that get a Ctrl-C; whatever a test leaves running is killed.

    They run without coverage: its tracer holds a lock now and then, and an interrupt raised there leaves every thread
    of the process waiting for it for ever.
    """
    started: list[subprocess.Popen[Any]] = []

    def start(command: list[str], *, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        untraced = {name: value for name, value in (env or os.environ).items() if "COVERAGE" not in name}
        # a test run in the background ignores SIGINT, and its children would inherit that
        process: subprocess.Popen[Any] = subprocess.Popen(
            command, env=untraced, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that make or run a model."""
    for item in items:
        if {"export_tiny", "make_tiny"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("model")


def pytest_collection_finish() -> None:
    """Take what the imports made out of the collector's sight: looking through it again and again costs a fifth of a run."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` or ``webgpu`` run where there is one."""
    for marker, find in (("gpu", compute_capability), ("webgpu", find_provider)):
        if item.get_closest_marker(marker) is not None:
            try:
                find()
            except BalconyError as error:
                pytest.skip(f"`make test-{marker}` runs it: {error}")


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., transformers.PreTrainedModel]:
    """Makes a fresh tiny model: ``make_tiny("qwen3", num_hidden_layers=3)``."""
    return tiny_model


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], transformers.PreTrainedTokenizerFast]:
    """Makes a fresh tiny tokenizer."""
    return tiny_tokenizer


@pytest.fixture(scope="session", autouse=True)
def unwatched_tracer() -> Iterator[None]:
    """Trace models without coverage and without collecting garbage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", unwatched(torch.onnx.export))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_engine_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make ONNX Runtime's pool with one thread: two spend half of their time waiting for each other on tiny matrices.

    Programs that tests start take the default, a thread for each CPU.
    """
    path = tmp_path_factory.mktemp("pool") / "identity.onnx"
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "identity", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    open_session(path, threads=1)


@pytest.fixture(scope="session")
def all_traces() -> SharedTraces:
    """The traces of this test run."""
    return SharedTraces()


@pytest.fixture
def shared_traces(all_traces: SharedTraces) -> Iterator[None]:
    """For a test of what comes before or after the tracer: a model that is equal to an earlier one is not traced again."""
    with all_traces.shared():
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


@pytest.fixture(scope="session")
def export_tiny(all_traces: SharedTraces, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a tiny model by the name of its architecture, once a session. The balconies are unlike the last layer."""
    made: dict[str, Exported] = {}

    def export(architecture: str) -> Exported:
        if architecture not in made:
            model, tokenizer = tiny_model(architecture), tiny_tokenizer()
            balconies = init_balconies(model, EXITS)
            generator = torch.Generator().manual_seed(7)
            for balcony in balconies.values():
                for parameter in balcony.parameters():
                    parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            path = tmp_path_factory.mktemp("bundles") / architecture
            exits, options = ExitModel(model, balconies), ExportOptions(f"tiny-{architecture}", trained=True)
            with all_traces.shared():
                traced = trace(exits, options)
            export_bundle(exits, tokenizer, path, options, traced=traced)
            made[architecture] = Exported(path, exits, tokenizer, traced)
        return made[architecture]

    return export


@pytest.fixture(scope="session")
def tiny(export_tiny: Callable[[str], Exported]) -> Exported:
    """The tiny Llama's bundle; read only."""
    return export_tiny("llama")


@pytest.fixture
def bundle_copy(tiny: Exported, tmp_path: Path) -> Path:
    """A copy of the tiny Llama's bundle that a test may damage."""
    return Path(shutil.copytree(tiny.path, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def tiny_engine(tiny: Exported) -> Iterator[Engine]:
    """An engine over the tiny Llama's bundle."""
    with Engine.open(tiny.path) as engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    copy.deepcopy(tiny.model).save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def sysfs_tree(tmp_path: Path) -> Callable[[str], Path]:
    """Builds the sysfs tree that ``tests/sysfs/<device>.txt`` lists: ``path = value`` or ``path -> where a link leads``."""

    def build(device: str) -> Path:
        root = tmp_path / device
        text = Path(__file__).with_name("sysfs").joinpath(f"{device}.txt").read_text(encoding="utf-8")
        for line in text.splitlines():
            if not line.startswith("#"):
                name, arrow, target = line.partition(" -> ")
                name, _, value = (name, "", "") if arrow else line.partition(" = ")
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if arrow:
                    path.symlink_to(target)
                else:
                    path.write_text(f"{value}\n", encoding="utf-8")
        return root

    return build


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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
