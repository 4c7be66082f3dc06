"""GGUF files: what transformers would misread is refused, and tokenizers are repaired."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from balcony_edge.errors import CheckpointError, MissingDependencyError
from balcony_export.model import gguf_file
from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer


@pytest.fixture(scope="module")
def demo() -> Path:
    try:
        return demo_model_path()
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


def test_truncated_gguf_is_named(demo: Path, tmp_path: Path) -> None:
    with demo.open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(40_000_000))
    with pytest.raises(CheckpointError, match=r"cut\.gguf: is cut short"):
        load_model(tmp_path / "cut.gguf")


def test_a_part_of_a_gguf_file_is_not_called_damaged(tmp_path: Path) -> None:
    """As Qwen publishes its 7B: to download a part again would not help."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 2)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"m\.gguf: is one of 2 parts of a GGUF file: join them"):
        gguf_file.check_gguf(tmp_path / "m.gguf")


def write_gguf(path: Path, architecture: str, tensor: str = "output_norm.weight", **fields: Any) -> None:
    """Write a GGUF file with one tensor and some fields, named as the writer's methods are (``block_count``)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(*(value if isinstance(value, tuple) else (value,)))
    writer.add_tensor(tensor, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (struct.pack("<IQI", 1, 8, 0), struct.pack("<IQI", 1, 8, 31), "31.* is not a valid GGMLQuantizationType"),
        (b"GGUF\3", b"GGUF\1", "version 1"),
    ],
    ids=["Q4_0_4_4", "version 1"],
)
def test_a_gguf_file_of_another_time_is_not_just_called_damaged(
    old: bytes, new: bytes, words: str, tmp_path: Path
) -> None:
    """llama.cpp has dropped types that were published for Arm, and adds others: to download it again would not help."""
    write_gguf(tmp_path / "m.gguf", "qwen2")
    content = (tmp_path / "m.gguf").read_bytes()
    assert content.count(old) == 1
    (tmp_path / "m.gguf").write_bytes(content.replace(old, new))
    with pytest.raises(CheckpointError, match=rf"or its version or types are not known here \(.*{words}.*\): "):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("key", "of", "value", "words"),
    [
        ("x.scores", "array", struct.pack("<IQ", 6, gguf_file._MOST_VALUES + 1), "more values than any model has"),
        ("x.scores", "array", struct.pack("<IQ", 9, 1) * 2000, "recursion"),
        ("split.count", "text", struct.pack("<Q", 1) + b"x", "invalid literal"),
        ("llama.rope.scaling.factor", "array", struct.pack("<IQff", 6, 2, 1.0, 2.0), "unhashable"),
    ],
    ids=["a long array", "nested arrays", "a text", "two factors"],
)
def test_a_gguf_file_whose_values_are_damaged_is_named(
    key: str, of: str, value: bytes, words: str, tmp_path: Path
) -> None:
    """The reader would go on after the file's end, with more memory at each value, until the system ends the process."""
    write_gguf(tmp_path / "m.gguf", "llama")
    content = (tmp_path / "m.gguf").read_bytes()
    field = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", {"text": 8, "array": 9}[of]) + value
    (fields,) = struct.unpack_from("<Q", content, 16)
    damaged = content[:16] + struct.pack("<Q", fields + 1) + field + content[24:] + bytes(-len(field) % 32)
    (tmp_path / "m.gguf").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=words):
        gguf_file.check_gguf(tmp_path / "m.gguf")


def test_a_gguf_file_whose_texts_are_damaged_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "qwen2")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"qwen2", b"\xffwen2", 1))
    with pytest.raises(CheckpointError, match=r"m\.gguf: is damaged \(.*utf-8.*\): download it again"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("scaling", ["rope_freqs.weight", "rope_factors_short.weight", "yarn", "none"])
def test_a_gguf_file_that_scales_its_rope_is_refused(scaling: str, tmp_path: Path) -> None:
    """transformers reads neither tensors of factors (Llama 3, Phi-3.5) nor the type of a scaling: the model would be wrong."""
    if scaling.endswith(".weight"):
        write_gguf(tmp_path / "m.gguf", "llama", scaling)
    else:
        write_gguf(tmp_path / "m.gguf", "llama", rope_scaling_type=gguf.RopeScalingType(scaling))
    if scaling == "none":
        gguf_file.check_gguf(tmp_path / "m.gguf")
        return
    with pytest.raises(CheckpointError, match=r"m\.gguf: scales its rotary frequencies"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("key", ["rope.scale_linear", "rope.scaling.factor"])
@pytest.mark.parametrize(("factor", "refused"), [(4.0, True), (1.0, False)])
def test_a_gguf_file_that_names_only_the_factor_of_its_rope_is_refused(
    key: str, factor: float, refused: bool, tmp_path: Path
) -> None:
    """As files of before November 2023 do. llama.cpp then takes the scaling for a linear one."""
    write_gguf(tmp_path / "m.gguf", "llama", float32=(f"llama.{key}", factor))
    with pytest.raises(CheckpointError, match="scales its rotary") if refused else contextlib.nullcontext():
        gguf_file.check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("architecture", "layers", "tensor", "words"),
    [
        ("gemma2", 46, "output_norm.weight", "this size of gemma2 scales its attention in another way"),
        ("gemma3", 62, "output_norm.weight", "this size of gemma3 scales its attention in another way"),
        ("gemma2", 42, "output_norm.weight", None),
        ("llama", 2, "blk.0.attn_q.bias", r"has blk\.0\.attn_q\.bias, a bias that transformers silently ignores"),
        ("qwen2", 2, "blk.0.attn_q.bias", None),
        ("qwen3", 2, "blk.0.attn_q.scale", r"has blk\.0\.attn_q\.scale, a factor of a weight"),
    ],
)
def test_a_gguf_file_with_what_transformers_ignores_is_refused(
    architecture: str, layers: int, tensor: str, words: str | None, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", architecture, tensor, block_count=layers)
    with contextlib.nullcontext() if words is None else pytest.raises(CheckpointError, match=words):
        gguf_file.check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(("window", "refused"), [(2047, True), (0, False), (262144, False)])
def test_a_gguf_file_of_phi3_with_a_window_is_refused(window: int, refused: bool, tmp_path: Path) -> None:
    """Phi-3-mini-4k has one. Phi-4 has none, which its file calls 0."""
    write_gguf(tmp_path / "m.gguf", "phi3", context_length=4096, sliding_window=window)
    with pytest.raises(CheckpointError, match="has a sliding window") if refused else contextlib.nullcontext():
        gguf_file.check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(("keys", "refused"), [(None, True), (4, False)])
def test_a_gguf_file_of_llama_without_a_number_of_key_heads_is_refused(
    keys: int | None, refused: bool, tmp_path: Path
) -> None:
    """llama.cpp's converter copies it from config.json, where the first Llamas have none, and reorders rows either way."""
    write_gguf(tmp_path / "m.gguf", "llama", head_count=4, **({} if keys is None else {"head_count_kv": keys}))
    with pytest.raises(CheckpointError, match="names no number of key heads") if refused else contextlib.nullcontext():
        gguf_file.check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("normed", [True, False])
def test_a_gguf_file_of_falcon_mamba_is_refused(normed: bool, tmp_path: Path) -> None:
    """Its norms have no weights, so nothing but this field tells it from a Mamba."""
    write_gguf(tmp_path / "m.gguf", "mamba", ssm_dt_b_c_rms=normed)
    with pytest.raises(CheckpointError, match="Falcon-Mamba") if normed else contextlib.nullcontext():
        gguf_file.check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(("experts", "refused"), [(8, True), (0, False)])
def test_a_gguf_file_of_mixtral_is_refused_before_its_weights_are_read(
    experts: int, refused: bool, tmp_path: Path
) -> None:
    """llama.cpp has one architecture for both. The experts would be unpacked, minutes and gigabytes, and then be missing."""
    write_gguf(tmp_path / "m.gguf", "llama", expert_count=experts)
    with pytest.raises(CheckpointError, match="is a mixture of experts") if refused else contextlib.nullcontext():
        gguf_file.check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(("end", "refused"), [("<｜end▁of▁sentence｜>", True), ("<|im_end|>", False)])
def test_a_gguf_file_whose_control_tokens_transformers_respells_is_refused(
    end: str, refused: bool, tmp_path: Path
) -> None:
    """As in DeepSeek-R1-Distill-Qwen: the token would be cut into bytes, and get a second id after the token table."""
    tokens: dict[str, Any] = {"tokenizer_model": "gpt2", "tokenizer_pre": "qwen2", "token_list": ["a", end]}
    write_gguf(tmp_path / "m.gguf", "qwen2", eos_token_id=1, **tokens)
    with pytest.raises(CheckpointError, match=f"has the control token {end}") if refused else contextlib.nullcontext():
        gguf_file.check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "refused"), [("qwen2", False), ("smollm", False), ("mpt", False), ("deepseek-llm", True), (None, True)]
)
def test_a_gguf_file_that_splits_text_by_an_unknown_rule_is_refused(
    name: str | None, refused: bool, tmp_path: Path
) -> None:
    """transformers would split by GPT-2's rule. Files of before May 2024 (Qwen 1.5) name none."""
    rule = {} if name is None else {"tokenizer_pre": name}
    write_gguf(tmp_path / "m.gguf", "qwen2", tokenizer_model="gpt2", **rule)
    with pytest.raises(CheckpointError, match="splits text by the rule") if refused else contextlib.nullcontext():
        gguf_file.check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "apart"), [("smollm", True), ("refact", True), ("minerva-7b", True), ("qwen2", False)]
)
def test_gguf_files_that_take_digits_apart_are_known_by_their_rule(name: str, apart: bool, tmp_path: Path) -> None:
    """llama.cpp has one rule for these names, and transformers knows none of them."""
    write_gguf(tmp_path / "m.gguf", "llama", tokenizer_pre=name)
    assert (gguf_file._split_rule(tmp_path / "m.gguf") in gguf_file._DIGITS_APART) is apart


@pytest.mark.parametrize(
    ("rule", "flag", "begun"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_texts_of_llama_3_begin_as_in_llama_cpp(rule: str, flag: bool | None, begun: bool, tmp_path: Path) -> None:
    """Its files of before 2025 have no flag. The 8B of April 2024 has no factors of its rope, for which it would be refused."""
    tokens: dict[str, Any] = {"token_list": ["a", "b", "ab", "<begin>", "<end>"], "token_merges": ["a b"]}
    tokens |= {"bos_token_id": 3, "eos_token_id": 4} | ({} if flag is None else {"add_bos_token": flag})
    write_gguf(tmp_path / "m.gguf", "llama", tokenizer_model="gpt2", tokenizer_pre=rule, **tokens)
    assert load_tokenizer(tmp_path / "m.gguf")("ab").input_ids == ([3, 2] if begun else [2])


def test_a_gguf_tokenizer_has_the_tokens_of_its_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers adds ``<|endoftext|>`` after the last token of a file without it (Llama 3): no token table has that row."""
    tokens: dict[str, Any] = {"token_list": ["a", "b", "ab", "<end>"], "token_merges": ["a b"], "eos_token_id": 3}
    write_gguf(tmp_path / "m.gguf", "llama", tokenizer_model="gpt2", tokenizer_pre="llama-bpe", **tokens)
    reads: list[Any] = []
    begin = gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, path: (reads.append(path), begin(self, path))[1])
    found = load_tokenizer(tmp_path / "m.gguf")
    ours = [path for path in reads if isinstance(path, Path)]  # transformers gives a text
    assert len(ours) == 2, "a read of 128,000 tokens takes seconds: one for the checks, one for the rule"
    assert found.get_vocab() == {"a": 0, "b": 1, "ab": 2, "<end>": 3}
    assert found("ab<end>").input_ids == [2, 3]


def test_a_gguf_file_next_to_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """llama.cpp's converter writes into the model's directory, where LFM2 and Llama 3 would lose their chat template."""
    write_gguf(tmp_path / "m.gguf", "llama")
    gguf_file.check_gguf(tmp_path / "m.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    for source in (tmp_path / "m.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=r"m\.gguf: transformers reads tokenizer\.json next to it"):
            load_tokenizer(source)


@pytest.mark.slow
def test_gguf_tokenizer_splits_digits_and_keeps_its_template(demo_tokenizer: Any) -> None:
    # llama.cpp's ids for this text
    assert demo_tokenizer("In 2024, 12345").input_ids == [788, 216, 34, 32, 34, 36, 28, 216, 33, 34, 35, 36, 37]
    assert demo_tokenizer.decode(demo_tokenizer("1 + 234 = 235, café 🙂").input_ids) == "1 + 234 = 235, café 🙂"
    chat = demo_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
