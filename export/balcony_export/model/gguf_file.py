"""What transformers would misread in a GGUF file: such files are refused, and tokenizers are repaired.

Owns the comparison with llama.cpp, whose reading is the reference. Tensors are read by transformers
(:func:`balcony_export.model.checkpoint.load_model`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from balcony_edge.errors import CheckpointError, MissingDependencyError

#: GGUF architecture and number of layers of Gemma 2 27B and Gemma 3 27B, whose ``query_pre_attn_scalar`` is not 256.
_OTHER_SCALES = (("gemma2", 46), ("gemma3", 62))
#: GGUF architectures whose classes have no biases as transformers configures them.
_WITHOUT_BIASES = ("llama", "qwen3", "qwen3moe", "gemma2", "gemma3")
#: Names that llama.cpp gives to one way of splitting text: each digit by itself, then GPT-2's rule (``llama-vocab.cpp``).
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
#: The same for Llama 3's way, where each text begins with the start token, also if the file does not say so.
_BEGUN = ("llama3", "llama-v3", "llama-bpe")
#: The same for GPT-2's rule alone, which transformers takes for all names that it does not know.
_GPT2_RULE = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum")
#: Last of the letters that stand for bytes in byte-level vocabularies (GPT-2's ``bytes_to_unicode``).
_LAST_BYTE = "\u0143"
#: Tensors of factors on the rotary frequencies: of Llama 3, and the two of Phi-3 with a context of 128k and Phi-4-mini.
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
#: Ends of the fields with the factor of a scaling, which is linear without a type; the second is of before November 2023.
_LINEAR = (".rope.scaling.factor", ".rope.scale_linear")
#: Most values of an array: the merges of Gemma 3's 262,144 tokens are half a million. A damaged number would be read for ever.
_MOST_VALUES = 1 << 22
_GGUF_BIAS = re.compile(r"blk\.\d+\.(attn|ffn)_\w+\.bias$")


def check_gguf(path: Path) -> None:
    """Raise CheckpointError for a file that is damaged, or that transformers would read as another model."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: is not a GGUF file: give one, or a Hugging Face directory or hub name")
    if (path.parent / "tokenizer.json").is_file():
        instead = "transformers reads tokenizer.json next to it instead of its own tokenizer"
        raise CheckpointError(f"{path}: {instead}: move one of the two")
    try:
        from gguf import GGUFReader, GGUFValueType  # noqa: PLC0415  # slow to import, and only GGUF needs it
    except ImportError as error:
        raise MissingDependencyError(
            "reading GGUF needs the package gguf: pip install 'balcony-edge[export]'"
        ) from error

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > _MOST_VALUES:
                raise ValueError("an array of more values than any model has")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        reader = Reader(path)
        end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
        parts = reader.get_field("split.count")
        count = 1 if parts is None else int(parts.contents())
    except (ValueError, TypeError, IndexError, KeyError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is cut short or damaged, or its version or types are not known here ({error}): download it again, "
            "or give another file of the model, such as its safetensors"
        ) from error
    if count > 1:
        raise CheckpointError(
            f"{path}: is one of {count} parts of a GGUF file: join them with `llama-gguf-split --merge`, "
            "or give the model's safetensors"
        )
    if end == 0 or path.stat().st_size < end:
        raise CheckpointError(f"{path}: is cut short: download it again")
    try:
        what = next(_misread(reader), None)
    except (ValueError, TypeError) as error:  # a text that is not UTF-8, or a value of another type
        raise CheckpointError(f"{path}: is damaged ({error}): download it again") from error
    if what is not None:
        raise CheckpointError(f"{path}: {what}: give the model's safetensors")


def repair_tokenizer(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer that transformers made from a GGUF file what the conversion loses."""
    _drop_additions(tokenizer)
    rule = _split_rule(path)
    if rule in _DIGITS_APART:
        # The conversion keeps only the byte level, but these split digits first (llama.cpp's ids are the reference).
        digits = Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    elif rule in _BEGUN and "add_bos_token" not in tokenizer.init_kwargs:
        tokenizer.add_bos_token = True


def _drop_additions(tokenizer: Any) -> None:
    """Remove tokens that the GGUF does not have: transformers adds GPT-2's ``<|endoftext|>`` after the last of Llama 3's."""
    backend = tokenizer.backend_tokenizer
    # the file's own tokens are those of the tokenizer's model; the file is not read again, which takes seconds
    count = max(backend.get_vocab(with_added_tokens=False).values()) + 1
    if max(backend.get_added_tokens_decoder(), default=0) < count:
        return
    document = json.loads(backend.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < count]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(document))


def _split_rule(path: Path) -> str:
    """Name that the GGUF's metadata gives to its way of splitting text; empty if it names none (sentencepiece)."""
    from gguf import GGUFReader  # noqa: PLC0415  # see check_gguf

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())


def _misread(reader: Any) -> Iterator[str]:
    """What of a GGUF file transformers would leave out without a word."""
    names = [tensor.name for tensor in reader.tensors]
    scaling = {str(field.contents()) for name, field in reader.fields.items() if name.endswith(".rope.scaling.type")}
    linear = [field.contents() for name, field in reader.fields.items() if name.endswith(_LINEAR)]
    if not scaling and set(linear) - {0, 1}:
        scaling = {"linear"}  # as llama.cpp does
    if {*_ROPE_FACTORS} & {*names} or scaling - {"none"}:
        yield "scales its rotary frequencies, which transformers silently ignores in GGUF files"
    if factors := [name for name in names if name.endswith(".scale")]:  # NVFP4's second scale
        yield f"has {factors[0]}, a factor of a weight that transformers silently ignores in GGUF files"
    known = reader.get_field("general.architecture")
    architecture = "" if known is None else str(known.contents())
    window, length = (reader.get_field(f"phi3.{key}") for key in ("attention.sliding_window", "context_length"))
    if window is not None and length is not None and 0 < int(window.contents()) < int(length.contents()):
        yield "has a sliding window, which transformers silently ignores in GGUF files of phi3"
    if (norms := reader.get_field(f"{architecture}.ssm.dt_b_c_rms")) is not None and norms.contents():
        yield "is a Falcon-Mamba, which transformers reads from GGUF files as a Mamba without its norms"
    if (experts := reader.get_field("llama.expert_count")) is not None and experts.contents():
        yield "is a mixture of experts (Mixtral), of which transformers reads no expert from GGUF files of llama"
    count = reader.get_field(f"{architecture}.block_count")
    model, split = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model is not None and model.contents() == "gpt2":
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (  # noqa: PLC0415  # only GGUF needs it
            GGUF_PRE_TOKENIZER_SPLITS,
        )

        name = "default" if split is None else str(split.contents())
        if name not in {*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS_APART, *_GPT2_RULE}:
            yield f"splits text by the rule '{name}', which transformers does not know in GGUF files"
    if (architecture, None if count is None else int(count.contents())) in _OTHER_SCALES:
        yield (
            f"this size of {architecture} scales its attention in another way than the others, and GGUF files do not say so"
        )
    heads = [reader.get_field(f"llama.attention.{key}") for key in ("head_count", "head_count_kv")]
    if heads[0] is not None and heads[1] is None:
        yield "names no number of key heads, without which transformers leaves queries and keys in llama.cpp's order"
    biases = [name for name in names if _GGUF_BIAS.match(name)]
    if biases and architecture in _WITHOUT_BIASES:
        yield f"has {biases[0]}, a bias that transformers silently ignores in GGUF files of {architecture}"
    if (token := _respelled(reader)) is not None:
        yield f"has the control token {token}, which transformers takes for ordinary letters in GGUF files"


def _respelled(reader: Any) -> str | None:
    """The token that begins or ends texts, if transformers spells it by its bytes (DeepSeek-R1-Distill-Qwen).

    It then adds the name once more, after the last row of the token table.
    """
    model, tokens = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
    if model is None or tokens is None or model.contents() != "gpt2":
        return None
    for key in ("bos_token_id", "eos_token_id"):
        place = reader.get_field(f"tokenizer.ggml.{key}")
        if place is None or not 0 <= place.contents() < len(tokens.data):
            continue
        token = str(tokens.contents(int(place.contents())))
        if any(letter > _LAST_BYTE for letter in token):
            return token
    return None
