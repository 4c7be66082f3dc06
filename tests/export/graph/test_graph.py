"""Parity of every architecture at every exit, and the operators of the graphs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import WEIGHTS
from balcony_edge.errors import UnsupportedModelError
from balcony_export import verify as verify_module
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.export import trace as trace_graphs
from balcony_export.graph import trace
from balcony_export.graph.head import build_norm
from balcony_export.graph.operators import tracing
from balcony_export.graph.trace import trace_balcony
from balcony_export.model.architecture import describe
from balcony_export.model.exits import ExitModel
from balcony_export.quantize.blocks import parse_precision
from balcony_export.verify import ParityCheck, verify
from balcony_runtime.engine import Engine
from tests.support.hybrids import DENSE, EXPORTED

ARCHITECTURES = (*DENSE, *EXPORTED)
#: Longer than the sliding windows of the tiny models (7), so that a wrong window shows.
PROMPTS = ("the quick brown fox jumps over the lazy dog and the balcony", "0123456789 — Käse und 牛乳, 20:00!")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_exit_equals_pytorch(export_tiny: Callable[[str], Any], architecture: str) -> None:
    exported = export_tiny(architecture)
    checks = verify(exported.path, exported.exits, exported.tokenizer, PROMPTS)
    phases = ("prefill", "decode", "prefill, portable", "decode, portable", "backbone.onnx")
    assert Counter(check.phase for check in checks) == dict.fromkeys(phases, 3)
    assert {check.exit_layer for check in checks} == {2, 3, 5}
    for check in checks:
        assert check.passed, check
        assert check.agreement == 1.0, check


def test_verify_finds_a_wrong_weight(export_tiny: Callable[[str], Any]) -> None:
    exported = export_tiny("llama")
    weight = exported.balconies[3].layer.mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        weight.data[0, 0] += 1.0
        checks = verify(exported.path, exported.exits, exported.tokenizer, PROMPTS)
    finally:
        weight.data.copy_(before)
    failed = {(check.exit_layer, check.phase) for check in checks if not check.passed}
    assert failed == {(3, phase + set_) for phase in ("prefill", "decode") for set_ in ("", ", portable")}


@pytest.mark.parametrize("factor", [math.nan, 1.01])
def test_a_difference_in_one_prompt_fails(
    factor: float, export_tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever prompt it is, and also if it is not a number. The CPU runs, whatever engines the bundle has."""
    assert not ParityCheck(2, "prefill", 1, float("nan"), 1.0, 1e-4).passed
    exported, prefill, devices = export_tiny("llama"), verify_module._prefill, set()

    def broken(engine: Any, exit_layer: int, ids: Any) -> Any:
        devices.add(engine.backend.name)
        return prefill(engine, exit_layer, ids) * (factor if len(ids) == longest else 1)

    longest = max(len(exported.tokenizer(text).input_ids) for text in PROMPTS)
    assert len(exported.tokenizer(PROMPTS[0]).input_ids) < longest
    monkeypatch.setattr(verify_module, "_prefill", broken)
    checks = verify(exported.path, exported.exits, exported.tokenizer, PROMPTS)
    assert {check.phase for check in checks if not check.passed} == {"prefill", "prefill, portable"}
    assert devices == {"onnxruntime"}


def test_operators_come_out_whole(export_tiny: Callable[[str], Any]) -> None:
    model = onnx.load(export_tiny("llama").path / "backbone.onnx", load_external_data=False)
    onnx.checker.check_model(str(export_tiny("llama").path / "backbone.onnx"))
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["Attention"] == 5
    assert counts["TensorScatter"] == counts["RMSNormalization"] == counts["RotaryEmbedding"] == 10
    assert counts["MatMul"] == 35
    assert "Reshape" not in counts and "Transpose" not in counts
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 24
    assert [value.name for value in model.graph.output][:3] == ["hidden_2", "hidden_3", "hidden_5"]


def test_a_balcony_computes_queries_for_the_last_rows_only(export_tiny: Callable[[str], Any]) -> None:
    model = onnx.load(export_tiny("llama").path / "balcony_2.onnx", load_external_data=False)
    rows = {node.input[0] for node in model.graph.node if node.op_type == "MatMul"}
    producers = {output: node for node in model.graph.node for output in node.output}
    fed = {name: producers[name].input[0] for name in rows if producers[name].op_type == "RMSNormalization"}
    from_rows = [name for name, source in fed.items() if source == "rows"]
    assert sum(node.input[0] in from_rows for node in model.graph.node if node.op_type == "MatMul") == 2  # keys, values
    assert sum(node.op_type == "Attention" for node in model.graph.node) == 1


def test_one_trace_does_for_balconies_that_differ_in_their_weights(
    export_tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exits = export_tiny("llama").exits
    spec = describe(exits.model, "tiny-llama")
    first, wanted = (trace_balcony(exits, exit_layer, spec, {}) for exit_layer in (2, 3))
    monkeypatch.setattr(trace, "_export", lambda *_: "traced")
    found = trace_balcony(exits, 3, spec, {2: first})
    assert ir.serde.serialize_model(found).SerializeToString() == ir.serde.serialize_model(wanted).SerializeToString()
    weight = exits.balconies[2].layer.mlp.up_proj.weight
    for value in first.graph.initializers.values():
        array = value.const_value.numpy()
        if array.ctypes.data == weight.data_ptr():
            value.const_value = ir.tensor(array.copy())  # as if the tracer had computed it
    assert str(trace_balcony(exits, 3, spec, {2: first})) == "traced"


def test_every_weight_is_stored_once(export_tiny: Callable[[str], Any]) -> None:
    for architecture in ("llama", "qwen2"):  # tied and untied
        exported = export_tiny(architecture)
        parameters = {id(p): p for p in exported.model.parameters()}  # a tied table counts once here
        parameters |= {id(p): p for balcony in exported.balconies.values() for p in balcony.parameters()}
        matrices = sum(p.numel() for p in parameters.values() if p.dim() > 1)  # vectors are small and lie in the graphs
        rope = 2 * (2 * 256 * 8)  # for the portable set, and with the factor of the scores for CPUs
        stored = (exported.path / WEIGHTS).stat().st_size / 4
        assert matrices + rope <= stored <= (matrices + rope) * 1.01, architecture


def test_graphs_name_their_weights_and_no_path_of_the_exporter(export_tiny: Callable[[str], Any]) -> None:
    path = export_tiny("llama").path
    stage = onnx.load(path / "stage_1.onnx", load_external_data=False)
    names = {tensor.name for tensor in stage.graph.initializer}
    assert "layers.2.self_attn.q_proj.weight" in names and "layers.2.mlp.down_proj.weight" in names
    for graph in path.glob("*.onnx"):
        text = graph.read_bytes()
        assert b"/site-packages/" not in text and b"stack_trace" not in text, graph.name
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
            locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
            assert locations in ([], [WEIGHTS])


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "llama", "olmo2"])
def test_half_precision_stays_within_its_bound(
    tmp_path: Path, make_tiny: Any, make_tokenizer: Any, architecture: str
) -> None:
    model, tokenizer = make_tiny(architecture, num_hidden_layers=3), make_tokenizer()
    exits, output = ExitModel.open(model, (2,)), tmp_path / "half"
    options = ExportOptions("half", trained=False, precision="float16")
    manifest = export_bundle(exits, tokenizer, output, options)
    assert manifest.precision == "float16" and manifest.embedding.dtype == "float16"
    # weights are rounded, frequencies are not: at position 8,192 they would be half a turn away
    frequencies = model.model.rotary_emb.inv_freq
    assert model.lm_head.weight.dtype == torch.float16 and frequencies.dtype == torch.float32
    assert not torch.equal(frequencies, frequencies.half().float())
    checks = verify(output, exits, tokenizer, PROMPTS)
    assert all(check.passed for check in checks) and {check.phase for check in checks} >= {"decode", "decode, portable"}


def test_a_batch_equals_its_members(export_tiny: Callable[[str], Any]) -> None:
    exported = export_tiny("gemma3")
    tokens = np.random.default_rng(3).integers(0, 320, (3, 21))
    with torch.no_grad():
        expected = exported.model(torch.from_numpy(tokens)).logits.numpy()
    with Engine.open(exported.path) as engine:
        sequence = engine.new_sequence(batch_size=3)
        got = sequence.advance(5, tokens[:, :20], num_logits=20)
        last = sequence.advance(5, tokens[:, 20:])
    np.testing.assert_allclose(got, expected[:, :20], atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(last[:, 0], expected[:, 20], atol=1e-4 * np.abs(expected).max())


def test_the_manifest_lists_the_graphs_tables(export_tiny: Callable[[str], Any]) -> None:
    exported = export_tiny("llama")
    manifest = Bundle.open(exported.path).manifest
    stage = manifest.graphs["stage_1"]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in stage.inputs] == [
        ("hidden_2", "float32", ("batch", "rows", 32)),
        ("start", "int64", ("batch",)),
        ("past_key_2", "float32", ("batch", "capacity", 32)),
        ("past_value_2", "float32", ("batch", "capacity", 32)),
    ]
    assert [tensor.name for tensor in stage.outputs] == ["hidden_3", "present_key_2", "present_value_2"]
    lowered = manifest.cpu["stage_2"]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in lowered.inputs[:4]] == [
        ("hidden_3", "float32", ("batch", "rows", 32)),
        ("last", "int32", ("batch",)),
        ("total", "int32", ()),
        ("past_key_3", "float32", ("batch", 2, "capacity", 16)),
    ]
    assert [tensor.name for tensor in lowered.outputs][:3] == ["hidden_5", "normed", "present_key_3"]


def test_lowered_graphs_hold_one_fused_attention_a_layer_and_no_positions(export_tiny: Callable[[str], Any]) -> None:
    path = export_tiny("mistral").path
    for name, layers in (("stage_0", 2), ("stage_2", 2), ("balcony_2", 1)):
        model = onnx.load(path / f"cpu_{name}.onnx", load_external_data=False)
        counts = Counter(node.op_type for node in model.graph.node)
        assert counts["GroupQueryAttention"] == layers
        assert not counts.keys() & {"Attention", "RotaryEmbedding", "TensorScatter", "Range", "Shape", "LessOrEqual"}
        attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in attention.attribute}
        assert attributes["local_window_size"] == 7 and attributes["do_rotary"] == 1
    keys = onnx.load(path / "cpu_balcony_2_keys.onnx", load_external_data=False)
    assert Counter(node.op_type for node in keys.graph.node)["MatMul"] == 2  # only keys and values


def test_the_factor_of_the_scores_is_in_the_rotary_tables(export_tiny: Callable[[str], Any]) -> None:
    """Queries and keys take half of it each; only attention without a window computes all scores at once."""
    for architecture, blocks in (("llama", False), ("mistral", True)):
        for name in ("stage_0", "balcony_2", "balcony_2_keys"):
            model = onnx.load(export_tiny(architecture).path / f"cpu_{name}.onnx")
            weights = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
            cosines = next(array for key, array in weights.items() if key.startswith("rope_cos"))
            np.testing.assert_allclose(cosines[0], 16**-0.25, rtol=1e-6)  # heads of 16: a factor of 1/4
            for node in (node for node in model.graph.node if node.op_type == "GroupQueryAttention"):
                (scale,) = (a.f for a in node.attribute if a.name == "scale")
                assert (scale, "no_sink" in node.input) == (1.0, not blocks)


def test_float16_has_no_sink_that_arm_would_take_for_0(make_tiny: Any) -> None:
    exits = ExitModel(make_tiny("llama", num_hidden_layers=2).half())
    stage = trace_graphs(exits, ExportOptions("x", False, parse_precision("fp16"))).lowered["stage_0"]
    nodes = [node for node in stage.graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == 2 and all(len(node.inputs) == 9 for node in nodes)  # up to the rotary tables


def test_keys_that_are_normed_after_the_rotation_have_no_factor_of_the_scores(
    export_tiny: Callable[[str], Any],
) -> None:
    """Pending rows of Hunyuan get the keys that its decode steps write: before a norm the factor would only move epsilon."""
    for name in ("balcony_2", "balcony_2_keys"):
        model = onnx.load(export_tiny("hunyuan").path / f"cpu_{name}.onnx")
        tables = [value for value in model.graph.initializer if value.name.startswith("rope_cos")]
        assert [onnx.numpy_helper.to_array(value)[0].max() for value in tables] == [1.0]


def test_a_window_as_long_as_the_context_is_none(make_tiny: Any) -> None:
    """Phi-3.5 has one of 262,144 rows, and export ends at 4,096: its attention may compute all scores at once."""
    exits = ExitModel(make_tiny("mistral", num_hidden_layers=2, sliding_window=256))
    assert describe(exits.model, "x").context_length == 256
    stage = trace_graphs(exits, ExportOptions("x", trained=False)).lowered["stage_0"]
    nodes = [node for node in stage.graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == 2
    for node in nodes:
        assert "local_window_size" not in node.attributes and node.inputs[-1].name == "no_sink"


def test_heads_that_the_fused_attention_refuses_keep_the_portable_graphs(
    tmp_path: Path, make_tiny: Any, make_tokenizer: Any
) -> None:
    exits, options = ExitModel(make_tiny("llama-small-heads", num_hidden_layers=1)), ExportOptions("x", trained=False)
    manifest = export_bundle(exits, make_tokenizer(), tmp_path / "b", options)
    assert manifest.cpu == {} and manifest.runnable is manifest.graphs


@pytest.mark.parametrize("place", ["a layer", "the end"])
def test_norms_that_are_no_rms_norm_are_refused_by_name(make_tiny: Any, place: str) -> None:
    """StarCoder2 and StableLM have LayerNorm; whoever adds such a model to the list is told."""
    exits = ExitModel(make_tiny("llama", num_hidden_layers=2))
    layer_norm = torch.nn.LayerNorm(32)
    with pytest.raises(UnsupportedModelError, match=r"LayerNorm: subtracts the mean: .*: give a model"):
        if place == "a layer":
            exits.parts.layers[1].input_layernorm = layer_norm
            with tracing(exits.model, [exits.parts.layers]):
                raise AssertionError("it was not refused")
        exits.model.model.norm = layer_norm
        build_norm(ExitModel(exits.model))


def test_attention_with_weights_of_its_own_is_refused_by_name(make_tiny: Any) -> None:
    """The sinks of Granite SWA and others go to the attention function as an argument, which the operator does not have."""
    exits = ExitModel(make_tiny("llama", num_hidden_layers=2))
    exits.parts.layers[1].self_attn.sinks = torch.nn.Parameter(torch.ones(4))
    with (
        pytest.raises(UnsupportedModelError, match=r"LlamaAttention: has weights of its own \(sinks\), "),
        tracing(exits.model, [exits.parts.layers]),
    ):
        raise AssertionError("it was not refused")


def test_a_final_norm_of_another_kind_is_refused_by_name(make_tiny: Any) -> None:
    model = make_tiny("llama", num_hidden_layers=2)
    model.model.norm = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"Identity: is the final norm: .*: give a model"):
        build_norm(ExitModel(model))
