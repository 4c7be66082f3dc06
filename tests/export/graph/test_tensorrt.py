"""Graphs for TensorRT and the engines built from them: the real builder, without a GPU, and the same files on ONNX Runtime."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch

from balcony_edge import files as files_module
from balcony_edge.bundle import engine_sets
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.engine_sets import new_engine_directory, record_engines
from balcony_edge.bundle.manifest import EngineSet, GraphSpec, Manifest
from balcony_edge.errors import BundleError, EngineBuildError, InputError, MissingDependencyError
from balcony_edge.files import locked
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.graph.ir_tools import graph_spec
from balcony_export.model.exits import ExitModel
from balcony_export.quantize.blocks import Scheme
from balcony_export.tensorrt import engine_set as tensorrt_module
from balcony_export.tensorrt.engine_set import rounding_of
from balcony_export.tensorrt.graphs import Format, tensorrt_graphs
from balcony_export.tensorrt.integers import Rounding
from balcony_export.tensorrt.plain import plain_operators
from balcony_export.verify import reference_logits
from balcony_runtime.backends.accelerator.tensorrt_builder import PASSES, Builder, import_tensorrt, link_files, profiles
from balcony_runtime.backends.onnxruntime.backend import open_session
from balcony_runtime.engine import Engine
from tests.support.engine_sets import build_engines, write_graphs

ARCHITECTURES = ("llama", "llama-mha", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "smollm3", "lfm2")
#: What `make test` builds of them, ten seconds each: every kind of mask, norm and rope once.
BUILT = {
    ("llama", "fp16"),
    ("llama", "bf16"),
    ("llama", "fp8"),
    ("gemma2", "fp16"),
    ("smollm3", "fp16"),
    ("qwen3", "int4"),
    ("gemma3", "int4"),
}
IDS = [(7 * i * i + 3 * i + 1) % 320 for i in range(24)]


@pytest.fixture
def tiny_copy(export_tiny: Callable[[str], Any], tmp_path: Path) -> Callable[[str], Bundle]:
    """A copy of a tiny bundle that a test may add engines to."""

    def make(architecture: str) -> Bundle:
        return Bundle.open(shutil.copytree(export_tiny(architecture).path, tmp_path / architecture))

    return make


def logits_of(bundle: Bundle, engines: str) -> dict[int, npt.NDArray[np.float32]]:
    """Logits (T, V) of every exit, half of the rows as one pass and half row by row, from the set's files on the CPU."""
    found = {}
    with Engine.of(bundle, device="cpu", engines=engines) as engine:
        for exit_layer in engine.exit_layers:
            sequence = engine.new_sequence(max_length=len(IDS))
            half = len(IDS) // 2
            rows = [sequence.advance(exit_layer, IDS[:half], num_logits=half)[0]]
            rows += [sequence.step(exit_layer, np.array([token]))[:1] for token in IDS[half:]]
            found[exit_layer] = np.concatenate(rows)
    return found


@pytest.mark.parametrize("operators", ["fused", "plain"])
@pytest.mark.parametrize("precision", ["fp16", "int4", "int8", "fp8"])
def test_the_files_that_are_built_compute_what_pytorch_computes(
    export_tiny: Callable[[str], Any], tiny_copy: Callable[[str], Bundle], precision: Any, operators: Any
) -> None:
    """Half precision within its bound, and integers like the model with the weights that they represent."""
    exported, bundle = export_tiny("llama"), tiny_copy("llama")
    rounding = Rounding(32)
    form = Format(precision, operators, 64, 32)
    write_graphs(bundle, "set", "rtx", form, rounding=rounding)
    bundle = Bundle.open(bundle.path)
    exits = exported.exits.copy()
    model = exits.model
    if precision != "fp16":
        head = model.lm_head.weight = torch.nn.Parameter(
            model.lm_head.weight.detach().clone()
        )  # untied: the table is float
        put_weights(bundle, exits, head)
    expected = reference_logits(exits, IDS)
    for exit_layer, got in logits_of(bundle, "set").items():
        want = expected[exit_layer]
        assert np.abs(got - want).max() <= 2e-2 * np.abs(want).max(), exit_layer


@pytest.mark.parametrize("rotated", [8, 4])
def test_plain_rotation_leaves_the_rest_of_a_head_alone(rotated: int) -> None:
    """Two heads of 8; of some models only a part of each is rotated."""
    heads, width, rows = 2, 8, 3
    attributes = {} if rotated == width else {"rotary_embedding_dim": rotated}
    node = onnx.helper.make_node("RotaryEmbedding", ["x", "cos", "sin", "at"], ["y"], num_heads=heads, **attributes)
    kinds = {
        "x": (1, [1, rows, heads * width]),
        "at": (7, [1, rows]),
        "cos": (1, [16, rotated // 2]),
        "sin": (1, [16, rotated // 2]),
    }
    inputs = [onnx.helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in kinds.items()]
    graph = onnx.helper.make_graph([node], "g", inputs, [onnx.helper.make_tensor_value_info("y", *kinds["x"])])
    whole = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    plain = ir.serde.deserialize_model(whole)
    plain_operators(plain)
    random = np.random.default_rng(0)
    fed = {name: random.normal(size=shape).astype(np.float32) for name, (kind, shape) in kinds.items() if kind == 1}
    fed["at"] = np.array([[3, 4, 15]])
    made = [open_session(one.SerializeToString()).run(None, fed)[0] for one in (whole, ir.serde.serialize_model(plain))]
    np.testing.assert_allclose(made[1], made[0], atol=1e-6)


def test_plain_attention_scales_before_its_product() -> None:
    """Products of queries and keys leave the range of float16 in some models; scaled, they are ordinary numbers."""
    shape = [1, 1, 4, 64]
    names = ("query", "key", "value")
    inputs = [ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT16)) for name in names]
    rows = ir.Value(name="rows", shape=ir.Shape([1, 4, 64]), type=ir.TensorType(ir.DataType.FLOAT16))
    mask = ir.Value(name="mask", shape=ir.Shape([1, 1, 4, 4]), type=ir.TensorType(ir.DataType.BOOL))
    heads = ir.Value(name="heads", const_value=ir.tensor(np.array([0, 0, 1, 64], np.int64), name="heads"))
    split = ir.Node("", "Reshape", [rows, heads])
    swapped = ir.Node("", "Transpose", [split.outputs[0]], [ir.AttrInt64s("perm", [0, 2, 1, 3])])
    attend = ir.Node("", "Attention", [swapped.outputs[0], *inputs[1:], mask], [ir.AttrFloat32("scale", 0.125)])
    attend.outputs[0].name, attend.outputs[0].type = "mixed", ir.TensorType(ir.DataType.FLOAT16)
    attend.outputs[0].shape = ir.Shape(shape)
    graph = ir.Graph(
        [rows, *inputs[1:], mask], [attend.outputs[0]], nodes=[split, swapped, attend], initializers=[heads],
        opset_imports={"": 24}, name="attend",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    plain_operators(model)
    session = open_session(ir.to_proto(model).SerializeToString())
    forty = np.full((1, 4, 64), 40.0, np.float16)  # products of 102,400
    given = {
        "rows": forty,
        "key": forty[:, None],
        "value": np.ones(shape, np.float16),
        "mask": np.ones((1, 1, 4, 4), bool),
    }
    (mixed,) = session.run(None, given)
    np.testing.assert_array_equal(mixed, np.ones(shape, np.float16))


def put_weights(bundle: Bundle, exits: ExitModel, head: torch.nn.Parameter) -> None:
    """Give a model the dequantized weights of the set's ``DequantizeLinear`` nodes."""
    for name, spec in bundle.manifest.engines["set"].graphs.items():
        if name == "backbone":
            continue
        for node in ir.load(bundle.path / "tensorrt" / "set" / spec.file).graph:
            if node.op_type != "DequantizeLinear":
                continue
            values, scales = (value.const_value.numpy().astype(np.float32) for value in node.inputs[:2])
            weight_name = str(node.inputs[0].name).rpartition(".")[0]
            axis = node.attributes["axis"].as_int()
            if "block_size" in node.attributes:
                dense = values * np.repeat(scales, node.attributes["block_size"].as_int(), axis)
            else:
                dense = values * (scales[:, None] if axis == 0 else scales[None])
            if weight_name == "embed_tokens.weight":
                head.data = torch.from_numpy(dense)
                continue
            root: Any = exits.parts.decoder
            if name.startswith("balcony_"):
                root = exits.balconies[int(name.removeprefix("balcony_"))]
            path = weight_name.removeprefix(f"{name}.").removesuffix(".weight")
            root.get_submodule(path).weight.data = torch.from_numpy(np.ascontiguousarray(dense.T))


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        pytest.param(architecture, precision, marks=() if (architecture, precision) in BUILT else pytest.mark.deep)
        for architecture in ARCHITECTURES
        for precision in ("fp16", "int4", *(("bf16", "fp8") if architecture == "llama" else ()))
    ],
)
def test_engines_of_every_architecture_build(
    tiny_copy: Callable[[str], Bundle], architecture: str, precision: Any
) -> None:
    """TensorRT's own inputs and outputs are those of the table (the builder refuses otherwise)."""
    bundle = tiny_copy(architecture)
    builder = Builder("rtx", compute_capabilities=["89"])
    manifest = write_graphs(bundle, f"rtx-{precision}", "rtx", Format(precision, "fused", 64, 32))
    bundle = Bundle(bundle.path, manifest)
    every = manifest.engines[f"rtx-{precision}"].graphs  # all layers are in the stages: the backbone once
    graphs, seen = [name for name in every if name != "backbone" or precision == "bf16"], list[float]()
    manifest = build_engines(bundle, f"rtx-{precision}", builder, graphs, lambda _, done: seen.append(done))
    bundle = Bundle.open(bundle.path)
    engines = bundle.manifest.engines[f"rtx-{precision}"]
    assert set(engines.engines) == set(graphs) and {*graphs, "backbone"} == {
        "embed", "backbone", "stage_0", "stage_1", "stage_2", "balcony_2", "balcony_3", "norm", "lm_head"}  # fmt: skip
    assert engines.compute_capabilities == ("89",) and engines.builder.startswith("tensorrt_rtx ")
    assert {engines.engines[name].attention for name in ("embed", "norm", "lm_head")} == {None}
    spelled_out = architecture == "gemma2"  # its scores are capped, which no fused attention does
    assert engines.engines["stage_0"].attention in ([None] if spelled_out else ["fused", "decomposed"])
    assert seen == sorted(seen) and seen[0] >= 0 and seen[-1] <= 1
    for spec in engines.engines.values():
        assert (
            engines.files[spec.file].bytes == (bundle.engine_directory(f"rtx-{precision}") / spec.file).stat().st_size
        )


def copies_in(engine: bytes, array: npt.NDArray[Any]) -> int:
    """Number of copies of a weight in an engine, found by a piece of one of its rows, in either orientation."""
    found = 0
    for oriented in (array, array.T):
        row = np.ascontiguousarray(oriented)[len(oriented) // 2]
        if row.dtype == ml_dtypes.int4:
            nibbles = row.astype(np.int8).view(np.uint8) & 15
            row = nibbles[0::2] | (nibbles[1::2] << 4)
        found += engine.count(row.tobytes())
    return found


@pytest.mark.parametrize(("precision", "batch_size"), [("fp16", 1), ("fp16", 4), ("int4", 4), ("int8", 1)])
def test_every_weight_lies_in_an_engine_once(
    tiny_copy: Callable[[str], Bundle], precision: Any, batch_size: int
) -> None:
    """Three optimization profiles share one copy; a profile of exactly one row would add a second copy."""
    bundle = tiny_copy("qwen2")
    manifest = write_graphs(bundle, "set", "rtx", Format(precision, "fused", 64, 32), batch_size=batch_size)
    graphs = [name for name in manifest.engines["set"].graphs if name != "backbone"]
    builder = Builder("rtx", batch_size=batch_size)
    manifest = build_engines(Bundle(bundle.path, manifest), "set", builder, graphs, lambda *_: None)
    directory = Bundle(bundle.path, manifest).engine_directory("set")
    weights = stored = 0
    for name in graphs:
        engine = (directory / f"{name}.engine").read_bytes()
        for value in ir.load(directory / f"{name}.onnx").graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if (
                len(tensor.shape) != 2
                or str(value.name).startswith(("ints", "mask", "rope"))
                or ".scales" in str(value.name)
            ):
                continue
            copies = copies_in(engine, tensor.numpy())
            assert copies <= 1, (name, value.name)
            weights, stored = weights + tensor.nbytes, stored + copies * tensor.nbytes
    assert stored <= 1.05 * weights
    if precision != "int4":  # whose packing is the kernel's own
        assert stored >= 0.95 * weights


def test_profiles_cover_decode_catch_up_and_prefill(tiny: Any) -> None:
    def table(capacity: int) -> GraphSpec:
        graphs = tensorrt_graphs(Bundle.open(tiny.path), Format(capacity=capacity))
        return GraphSpec.model_validate(graph_spec("balcony_2", graphs["balcony_2"]))

    assert [shapes["rows"][2][1] for shapes in profiles(table(48), 1)] == [8, 48]
    found = list(profiles(table(2048), 3))
    # A pass takes one member up to all of them; usually all take a row, and one of them more.
    assert [shapes["rows"] for shapes in found] == [
        ((1, least, 32), (3 if usual == 1 else 1, usual, 32), (3, most, 32)) for least, usual, most in PASSES
    ]
    assert [shapes["queries"][2] for shapes in found] == [(3, most, 32) for _, _, most in PASSES]
    assert [shapes["start"][1] for shapes in found] == [(3,), (1,), (1,)]


def test_plain_graphs_hold_no_operator_newer_than_opset_21(tiny: Any) -> None:
    graphs = tensorrt_graphs(Bundle.open(tiny.path), Format("fp16", "plain", 64))
    newer = {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"}
    for name, graph in graphs.items():
        assert not {node.op_type for node in graph.graph} & newer, name
        assert graph.graph.opset_imports == {"": 21} and graph.ir_version == 10
        onnx.checker.check_model(ir.to_proto(graph))


def test_integers_of_a_quantized_bundle_are_taken_over(
    export_tiny: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = export_tiny("qwen3")
    rows = [[(7 * i + 13 * j) % 120 + 1 for i in range(48)] for j in range(40)]
    scheme = Scheme(4, 32, symmetric=True, head_bits=4, positive=True)
    options = ExportOptions("tiny-qwen3", True, scheme, rows)
    export_bundle(tiny.exits.copy(), tiny.tokenizer, tmp_path / "int4", options, traced=tiny.traced)
    quantized, bundle = Bundle.open(tmp_path / "int4"), Bundle.open(tiny.path)
    taken, nearest = rounding_of(quantized, bundle), Rounding(32)
    for rounding in (taken, nearest):
        tensorrt_graphs(bundle, Format("int4", "fused", 64, 32), rounding)
    assert taken.given.keys() == nearest.given.keys() and len(taken.given) == 7 * 7 + 1  # layers, balconies, head
    weight = tiny.model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    error = {}
    for name, rounding in (("gptq", taken), ("nearest", nearest)):
        values, scales = rounding.given["layers.1.mlp.up_proj.weight"]
        assert values.shape == weight.shape and values.min() >= -8 and values.max() <= 7
        assert (scales > 0).all()  # as TensorRT needs
        error[name] = np.abs(values * np.repeat(scales, 32, 1) - weight).mean() / np.abs(weight).mean()
    assert error["nearest"] < error["gptq"] < 0.3  # GPTQ moves weights further, for better outputs
    with pytest.raises(InputError, match="must be int4,sym,head=4"):
        rounding_of(bundle, bundle)
    form = quantized.manifest.quantization
    assert form is not None
    mixed = quantized.manifest.model_copy(update={"quantization": form.model_copy(update={"down_block_size": 64})})
    with pytest.raises(InputError, match="with blocks of one size"):
        rounding_of(Bundle(quantized.path, mixed), bundle)
    with pytest.raises(InputError, match="is of another model"):
        rounding_of(quantized, Bundle.open(export_tiny("llama").path))
    entry = write_graphs(
        Bundle.open(shutil.copytree(tiny.path, tmp_path / "b")), "x", "rtx", Format("int4", capacity=64), rounding=taken
    )
    assert entry.engines["x"].block_size == 32  # that of the integers, not of the format
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_module, "FAR_WEIGHTS", 0.01)
        with pytest.raises(InputError, match=r"differs too much from that of .*: give a bundle of the same model"):
            rounding_of(quantized, bundle)
    options = ExportOptions("tiny-qwen3", True, Scheme(4, 32, head_bits=4))
    export_bundle(tiny.exits.copy(), tiny.tokenizer, tmp_path / "signed", options, traced=tiny.traced)
    with pytest.raises(
        InputError, match=r"has scales below 0, which TensorRT does not take: export one with .*positive"
    ):
        rounding_of(Bundle.open(tmp_path / "signed"), bundle)


def test_what_cannot_be_built_is_one_line(tiny_copy: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = tiny_copy("llama")
    with pytest.raises(EngineBuildError, match=r"--sm 87: tensorrt_rtx .* builds for .*Orin \(87\)"):
        Builder("rtx", compute_capabilities=["87"])
    with pytest.raises(MissingDependencyError, match="tensorrt is not installed: it is part of JetPack"):
        import_tensorrt("tensorrt")
    with pytest.raises(InputError, match="--context-length 999: this bundle takes 1 to 256"):
        write_graphs(bundle, "x", "rtx", Format(capacity=999))
    with pytest.raises(InputError, match="32 inputs are not a multiple of --block 64"):
        write_graphs(bundle, "x", "rtx", Format("int4", capacity=64))
    with pytest.raises(BundleError, match="has no engine set x"):
        bundle.engine_directory("x")
    manifest = write_graphs(bundle, "x", "rtx", Format(capacity=64))
    spec, path = manifest.engines["x"].graphs["norm"], bundle.path / "tensorrt" / "x" / "norm.onnx"
    model = onnx.load(path)
    model.graph.node[1].op_type = "Nonsense"
    onnx.save(model, tmp_path / "wrong.onnx")
    builder = Builder("rtx")
    with pytest.raises(EngineBuildError, match=r"wrong.onnx: tensorrt_rtx .* cannot read node .*Nonsense"):
        builder.build(tmp_path / "wrong.onnx", spec)
    lying = GraphSpec.model_validate(json.loads(spec.model_dump_json().replace('"normed"', '"other"')))
    with pytest.raises(
        EngineBuildError, match=r"tensorrt_rtx .* reads output (normed|other) as .*, but the manifest says"
    ):
        builder.build(path, lying)


def test_an_input_that_the_parser_drops_is_an_error(tmp_path: Path) -> None:
    """``nonpad_kv_seqlen`` of ``Attention``: the parser warns, and the engine would attend to garbage."""
    shapes = {"q": [1, 2, 4, 16], "k": [1, 2, 8, 16], "v": [1, 2, 8, 16]}
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, shape) for name, shape in shapes.items()
    ]
    inputs.append(onnx.helper.make_tensor_value_info("length", onnx.TensorProto.INT64, [1]))
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, [1, 2, 4, 16])
    node = onnx.helper.make_node("Attention", ["q", "k", "v", "", "", "", "length"], ["y"])
    graph = onnx.helper.make_graph([node], "g", inputs, [output])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)]), tmp_path / "g.onnx")
    tensors: list[dict[str, Any]] = [{"name": n, "dtype": "float16", "shape": s} for n, s in shapes.items()]
    tensors.append({"name": "length", "dtype": "int64", "shape": [1]})
    spec = GraphSpec(file="g.onnx", inputs=tensors, outputs=[{"name": "y", "dtype": "float16", "shape": [1, 2, 4, 16]}],
                     parameters=1, weight_bytes=1)  # fmt: skip
    with pytest.raises(
        EngineBuildError, match=r"g.onnx: tensorrt_rtx .* would ignore a part of it .input length is not read"
    ):
        Builder("rtx").build(tmp_path / "g.onnx", spec)


def test_a_failed_build_changes_nothing(tiny_copy: Callable[[str], Bundle]) -> None:
    bundle = tiny_copy("llama")
    manifest = write_graphs(bundle, "set", "rtx", Format(capacity=64))
    before = sorted(path.name for path in (bundle.path / "tensorrt" / "set").iterdir())

    def interrupted(what: str, done: float) -> None:
        if what == "building stage_0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(Bundle(bundle.path, manifest), "set", Builder("rtx"), ["norm", "stage_0"], interrupted)
    assert sorted(path.name for path in (bundle.path / "tensorrt" / "set").iterdir()) == before
    assert Bundle.open(bundle.path).manifest.engines["set"].engines == {}


def test_a_set_has_engines_of_one_builder(tiny_copy: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a build for other GPUs, or on another machine, engines that were not built again are gone."""
    bundle = tiny_copy("llama")
    manifest = write_graphs(bundle, "set", "rtx", Format(capacity=64))
    for machine, capability, graphs, there in (
        ("a", "86", ["norm", "lm_head"], {"norm", "lm_head"}),
        ("a", "86", ["norm"], {"norm", "lm_head"}),
        ("a", "89", ["norm"], {"norm"}),
        ("b", "89", ["lm_head"], {"lm_head"}),
    ):
        monkeypatch.setattr(f"{Builder.__module__}.machine_id", lambda machine=machine: machine)
        builder = Builder("rtx", compute_capabilities=[capability])
        manifest = build_engines(Bundle(bundle.path, manifest), "set", builder, graphs, lambda *_: None)
        engines = Bundle.open(bundle.path).manifest.engines["set"]
        assert engines.engines.keys() == there and tuple(engines.compute_capabilities) == (capability,)
        files = {path.name for path in Bundle.open(bundle.path).engine_directory("set").glob("*.engine")}
        assert files == {f"{name}.engine" for name in there} == {one for one in engines.files if one.endswith("engine")}


def test_a_build_that_is_killed_leaves_the_old_set_or_the_new_one(tiny_copy: Callable[[str], Bundle]) -> None:
    """SIGKILL before each file system change of a replacement, and then an undisturbed build."""
    bundle = tiny_copy("llama")
    write_graphs(bundle, "set", "rtx", Format(capacity=64))
    home = bundle.path / "tensorrt"
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree", "open"}

    def replace(batch_size: int, killed_at: int = -1) -> None:
        left = killed_at

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event in changes and (event != "open" or "w" in str(args[1])):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        now = Bundle.open(bundle.path)
        sys.addaudithook(hook)
        with new_engine_directory(bundle.path, "set") as directory:
            entry = now.manifest.engines["set"]
            link_files(now.engine_directory("set"), entry, directory)
            record_engines(bundle.path, "set", entry.model_copy(update={"batch_size": batch_size}), directory)

    status, batch_size, point, seen = -1, 1, 0, set()
    while status != 0:
        batch_size, point = batch_size + 1, point + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child runs Python alone, none of the threads
            child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                replace(batch_size, point)
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        after = Bundle.open(bundle.path)
        after.engine_directory("set")  # every file is there and has its hash
        seen.add(after.manifest.engines["set"].batch_size == batch_size)
    assert point > 20 and seen == {True, False}
    assert [path.name for path in home.iterdir()] == [after.manifest.engines["set"].directory or "set"]


def test_a_set_that_cannot_be_recorded_is_removed(
    tiny_copy: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_copy("llama")
    home = bundle.path / "tensorrt"
    sizes = {"context_length": 64, "batch_size": 1}
    entry = EngineSet(target="rtx", precision="fp16", operators="fused", graphs={}, files={}, **sizes)

    def full(directory: Path, manifest: Manifest) -> None:
        raise BundleError("bundle.json: cannot be written (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(engine_sets, "replace_manifest", full)
        with pytest.raises(BundleError, match="No space"), new_engine_directory(bundle.path, "set") as directory:
            (directory / "file").write_bytes(b"gigabytes")
            record_engines(bundle.path, "set", entry, directory)
    assert not home.exists()
    # sets of killed processes, next to a directory that another process is making and to a set of another name
    for name in ("set", "set.0123abcd", ".set.partial-0123abcd", "other"):
        (home / name).mkdir(parents=True)
    with locked(home / ".set.partial-0123abcd"), new_engine_directory(bundle.path, "set") as directory:
        assert {path.name for path in home.iterdir()} == {directory.name, ".set.partial-0123abcd", "other"}


def test_a_set_is_on_the_disk_before_the_old_one_is_removed(
    tiny_copy: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, synced = tiny_copy("llama"), []
    entry = EngineSet(
        target="rtx", precision="fp16", operators="fused", graphs={}, files={}, context_length=64, batch_size=1
    )
    monkeypatch.setattr(files_module, "sync", lambda path: synced.append(path.name))
    with new_engine_directory(bundle.path, "set") as directory:
        for name in ("stage_0.engine", "weights.bin"):
            (directory / name).write_bytes(b"gigabytes")
        record_engines(bundle.path, "set", entry, directory)
    assert sorted(synced) == ["stage_0.engine", "weights.bin"]
