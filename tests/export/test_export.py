"""Export is atomic, and its refusals name the reason."""

from __future__ import annotations

import errno
import gc
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import MANIFEST
from balcony_edge.errors import BalconyError, CheckpointError, InputError, UnsupportedModelError, VerificationError
from balcony_export.export import ExportOptions, _chat_template, _tool_versions, _write_tokenizer, export_bundle
from balcony_export.model.architecture import describe, longest_context, parts_of
from balcony_export.model.exits import ExitModel
from balcony_export.output import fresh_directory
from balcony_export.verify import TOLERANCE, ParityCheck, _scratch_place, require_all_passed
from tests.support.command import invoke_here

OPTIONS = ExportOptions("x", trained=False)


def unsupported(config: Any, pattern: str) -> None:
    class Model:
        pass

    model = Model()
    model.config = config
    with pytest.raises(UnsupportedModelError, match=pattern) as caught:
        parts_of(model)
    assert "\n" not in str(caught.value)


def test_architectures_are_refused_by_name() -> None:
    unsupported(transformers.DeepseekV3Config(), "'deepseek_v3': its mixture of experts is not covered")
    unsupported(transformers.Glm4MoeConfig(), "'glm4_moe': its mixture of experts is not covered")
    unsupported(transformers.Gemma3nTextConfig(), "'gemma3n_text': its layers share keys and values")
    unsupported(transformers.Gemma3nConfig(), "'gemma3n': this architecture is not covered")
    unsupported(
        transformers.Gemma3nTextConfig(num_kv_shared_layers=0), "'gemma3n_text': this architecture is not covered"
    )
    unsupported(transformers.JambaConfig(), "'jamba': its mixture of experts is not covered")
    unsupported(transformers.Zamba2Config(), "'zamba2': this architecture is not covered")
    unsupported(transformers.GPT2Config(), "'gpt2': this architecture is not covered")
    unsupported(transformers.StableLmConfig(), "'stablelm': this architecture is not covered")


def test_masks_that_export_would_make_otherwise_are_refused_by_name() -> None:
    unsupported(transformers.LlamaConfig(is_causal=False), "'llama': bidirectional attention")
    slides = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    config = transformers.SmolLM3Config(**slides, use_sliding_window=False)
    unsupported(config, "'smollm3': layer_types has sliding_attention, but use_sliding_window is false")
    unsupported(
        transformers.OlmoeConfig(sliding_window=8), "'olmoe': sliding_window is set, which transformers ignores"
    )


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.5, 2.0, 1.0, 3.0, 1.0, 1.0, 2.0, 1.0],
    "long_factor": [4.0] * 8,
}


@pytest.mark.parametrize(
    ("rope", "first"),
    [(LONG_ROPE, 64), ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, 256)],
    ids=["longrope", "dynamic"],
)
def test_ropes_that_change_with_the_length_stop_before_they_change(
    make_tiny: Callable[..., Any], rope: dict[str, Any], first: int
) -> None:
    exits = ExitModel(make_tiny("llama", rope_parameters=rope))
    assert describe(exits.model, "x").context_length == first
    with pytest.raises(UnsupportedModelError, match=f"context length {first + 1}: this model takes 2 to {first}"):
        describe(exits.model, "x", first + 1)
    ((cos, sin),) = exits.rotary_tables(first).values()
    for count in (first // 2, first):  # the same rows for any number of them, and transformers' own
        (few,) = exits.rotary_tables(count).values()
        assert torch.equal(few[0], cos[:count]) and torch.equal(few[1], sin[:count])
        wanted, _ = exits.parts.rotary(torch.zeros(1, 1, 1), torch.arange(count)[None])
        assert torch.equal(wanted[0, :, :8], cos[:count])
    # beyond it, the angles of all earlier rows are others: docs/backbones.md
    (longer,) = exits.rotary_tables(first + 1).values()
    assert not torch.equal(longer[0][:first], cos)
    # transformers itself then gives two answers
    tokens, cache = torch.arange(1, first + 5)[None], exits.new_cache()
    exits.rotary_tables(1)  # back to the first frequencies
    with torch.no_grad():
        exits.run(tokens[:, :first], (), cache)
        *_, decoded = exits.run(tokens[:, first:], (exits.depth,), cache).at[exits.depth][0]
        whole = exits.model(tokens).logits[0, -1]
        far = exits.head(exits.parts.norm(decoded)) - whole
    assert far.abs().max() > 1e-2 * whole.abs().max()


def test_a_rope_per_layer_type_is_looked_into(make_tiny: Callable[..., Any]) -> None:
    config = make_tiny("gemma3").config
    config.rope_parameters["full_attention"]["rope_type"] = "other"
    unsupported(config, "rope scaling 'other' of full_attention layers")


def test_a_state_space_has_no_longest_context() -> None:
    assert longest_context(transformers.Mamba2Config()) == longest_context(transformers.MambaConfig()) == 1 << 20
    assert longest_context(transformers.LlamaConfig(max_position_embeddings=77)) == 77


def test_yarn_takes_the_length_that_it_scales_to() -> None:
    """Qwen 2.5's page adds this rope for 131,072 tokens, and max_position_embeddings stays 32,768."""
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    assert longest_context(transformers.Qwen2Config(max_position_embeddings=32768, rope_parameters=rope)) == 131072
    longer = {**rope, "factor": 2.0}  # as in files whose length counts the scaling already
    assert longest_context(transformers.Qwen2Config(max_position_embeddings=131072, rope_parameters=longer)) == 131072


def test_context_length_has_bounds(make_tiny: Callable[..., Any]) -> None:
    model = make_tiny("llama")
    assert describe(model, "x", 64).context_length == 64
    for length in (1, 257):
        with pytest.raises(UnsupportedModelError, match=f"context length {length}: this model takes 2 to 256"):
            describe(model, "x", length)


def test_weights_that_are_not_finite_leave_nothing(make_tiny: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    model = make_tiny("llama")
    model.model.layers[3].mlp.up_proj.weight.data[5, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight: holds NaN or infinity"):
        export_bundle(ExitModel(model), make_tokenizer(), tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_of_several_chat_templates_the_default_is_taken(make_tiny: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    model, tokenizer = make_tiny("llama"), make_tokenizer()
    tokenizer.chat_template = {"tool_use": "tools", "default": "{{ messages[0].content }}"}
    _write_tokenizer(model, tokenizer, _chat_template(tokenizer), tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    tokenizer.chat_template = {"tool_use": "tools"}
    words = "has chat templates tool_use and none called 'default': give the one for chats that name"
    with pytest.raises(CheckpointError, match=words):
        export_bundle(ExitModel(model), tokenizer, tmp_path / "out", OPTIONS, traced=cast(Any, "no trace is needed"))
    assert not (tmp_path / "out").exists()


def test_replies_end_where_the_chat_template_ends_a_turn(make_tiny: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Gemma's GGUF files name only the end of a text, but its replies end with ``<end_of_turn>``."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<end_of_turn>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end_of_turn>\n{% endfor %}"
    manifest = export_bundle(ExitModel(make_tiny("llama")), tokenizer, tmp_path / "out", OPTIONS)
    assert manifest.model.eos_token_ids == (0, tokenizer.convert_tokens_to_ids("<end_of_turn>"))


def test_a_failed_check_leaves_nothing(make_tiny: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        assert Bundle.open(directory).manifest.exit_layers == (5,)
        raise VerificationError("different")

    with pytest.raises(VerificationError):
        export_bundle(ExitModel(make_tiny("llama")), make_tokenizer(), tmp_path / "out", OPTIONS, check=fail)
    assert list(tmp_path.iterdir()) == []


def test_the_full_model_is_the_same_with_and_without_balconies(tiny: Any, make_tiny: Any, tmp_path: Path) -> None:
    """Bit for bit: the same weights, the same operators, and so the same logits."""
    import numpy as np

    from balcony_runtime.engine import Engine

    plain = tmp_path / "plain"
    export_bundle(ExitModel(make_tiny("llama")), tiny.tokenizer, plain, OPTIONS)
    tokens = np.random.default_rng(1).integers(0, 320, 30)
    logits = []
    for path in (plain, tiny.path):
        with Engine.open(path) as engine:
            sequence = engine.new_sequence(max_length=32)
            logits.append([sequence.advance(5, tokens[:29]), sequence.advance(5, tokens[29:])])
    for one, other in zip(*logits, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_bundle_has_the_names_of_special_tokens_that_its_reader_takes(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """LFM2-VL's tokenizer, which text models that were cut out of it keep, calls one of its tokens image_thumbnail."""
    tokenizer = make_tokenizer()
    tokenizer._set_model_specific_special_tokens({"image_thumbnail": "<end>"})
    assert "image_thumbnail" in tokenizer.special_tokens_map
    _write_tokenizer(make_tiny("llama"), tokenizer, _chat_template(tokenizer), tmp_path)
    names = json.loads((tmp_path / "special_tokens.json").read_text())
    assert "eos_token" in names and "image_thumbnail" not in names


def test_verification_is_required_of_every_check() -> None:
    good, bad = ParityCheck(2, "prefill", 1, 1e-6, 1.0, 1e-4), ParityCheck(5, "decode", 1, 0.5, 0.0, 1e-4)
    require_all_passed([good], Path("b"), "a-model")
    with pytest.raises(
        VerificationError, match=r"b: exit 5, decode: .* 5\.0e-01 of the largest logit.* compare it with a-model"
    ):
        require_all_passed([good, bad], Path("b"), "a-model")


def test_verification_names_the_cure_of_half_precision_that_overflows() -> None:
    """Hidden states of Gemma 3 exceed 65,504, and no architecture is to be reported for that."""
    half = TOLERANCE["float16"]
    checks = [ParityCheck(2, "prefill", 1, 0.5, 0.0, half), ParityCheck(5, "prefill", 1, math.nan, 0.0, half)]
    with pytest.raises(
        VerificationError, match=r"b: exit 5, prefill: its logits are not finite, .* of float16: export with fp32"
    ):
        require_all_passed(checks, Path("b"), "a-model")


def test_a_verification_of_logits_that_are_not_finite_is_json(
    tiny: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no NaN, and strict readers refuse a document with one."""
    checks = [ParityCheck(5, "prefill", 1, math.nan, 0.0, TOLERANCE["float16"])]
    monkeypatch.setattr("balcony_export.verify.verify", lambda *_: checks)
    done = invoke_here("verify", tiny.path, "--against", tiny_checkpoint, "--json")
    (check,) = json.loads(done.stdout, parse_constant=pytest.fail)
    assert done.returncode == 1 and check["max_difference"] is None and not check["passed"]


def test_verification_where_nothing_can_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose file systems are all read-only."""

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    assert _scratch_place(tmp_path / "bundle") == tmp_path
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert _scratch_place(tmp_path / "bundle") == Path(tempfile.gettempdir())
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(VerificationError, match=r"cannot be written, and there is no directory for temporary files"):
        _scratch_place(tmp_path / "bundle")


def test_outputs_that_exist_or_cannot_be_made_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    for output, pattern in (
        (tmp_path / "file", "already exists"),
        (tmp_path, "already exists"),
        (tmp_path / "file" / "such", "is not a directory"),
    ):
        with pytest.raises(InputError, match=pattern), fresh_directory(output):
            pytest.fail("nothing may be written")
    assert (tmp_path / "file").read_text() == "keep me"
    with fresh_directory(tmp_path / "no" / "such"):
        pass  # missing parents are made
    assert (tmp_path / "no" / "such").is_dir()


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), fresh_directory(tmp_path / "out") as directory:
        (directory / "weights.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_mapped_any_more_when_the_directory_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of ONNX are cycles that map the weights once these were read, and Windows then renames no directory."""
    rename, mapped, left = Path.rename, weakref.WeakSet[Any](), list[int]()

    class Graph:
        def __init__(self) -> None:
            self.nodes = self
            mapped.add(self)

    def renamed(path: Path, target: Path) -> Path:
        left.append(len(mapped))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    gc.disable()
    try:
        with fresh_directory(tmp_path / "out"):
            Graph()
    finally:
        gc.enable()
    assert left == [0]


def test_a_workstation_may_have_onnxruntime_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of ONNX Runtime have several names; docs/tensorrt.md puts onnxruntime-gpu in the place of the plain one."""
    known = importlib.metadata.version

    def version(package: str) -> str:
        if package == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    facts = tmp_path / "onnxruntime_gpu-1.32.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Name: onnxruntime-gpu\nVersion: 1.32.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", version)
    tools = _tool_versions()
    assert tools["onnxruntime-gpu"] == "1.32.0" and tools["torch"] == known("torch")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("cyclic", [False, True])
def test_an_interrupt_that_a_finalizer_swallowed_counts(
    tmp_path: Path, request: pytest.FixtureRequest, cyclic: bool
) -> None:
    # A shell starts jobs in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), fresh_directory(tmp_path / "out") as directory:
        (directory / MANIFEST).write_text("{}")
        victim: Any = Finalized()
        if cyclic:  # as graphs are: they go when the directory is about to get its name
            victim.itself = victim
        del victim
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_leftovers_of_a_killed_export_go_and_a_running_one_stays(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from balcony_export.output import fresh_directory\n"
        "with fresh_directory(Path(sys.argv[1])) as directory:\n"
        "    (directory / 'weights.bin').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert killed.returncode == -9
    assert [path.name.startswith(".out.partial-") for path in tmp_path.iterdir()] == [True]
    with pytest.raises(RuntimeError), fresh_directory(tmp_path / "out") as running:
        assert list(tmp_path.iterdir()) == [running]
        with pytest.raises(RuntimeError), fresh_directory(tmp_path / "out"):  # also of this process
            raise RuntimeError
        assert list(tmp_path.iterdir()) == [running]
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_line(make_tiny: Any, make_tokenizer: Any, small_disk: Path) -> None:
    model = make_tiny("llama")
    with pytest.raises(BalconyError, match=r"cannot be written .*No space left") as caught:
        export_bundle(ExitModel(model), make_tokenizer(), small_disk / "out", OPTIONS)
    assert "\n" not in str(caught.value)
    assert list(small_disk.iterdir()) == []
