"""Forged graphs: loops, functions, and weights in files that the manifest does not list."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from balcony_edge.bundle.bundle import file_spec, fingerprint
from balcony_edge.bundle.manifest import MANIFEST
from balcony_edge.errors import BundleError
from balcony_runtime.backends.graph_files.check import check_graph
from balcony_runtime.engine import Engine

_HIDDEN = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "rows", 32])
_NORMED = helper.make_tensor_value_info("normed", TensorProto.FLOAT, ["batch", "rows", 32])


def model(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto] | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "norm", [_HIDDEN], [_NORMED], initializers or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def endless() -> onnx.ModelProto:
    """A loop over all numbers whose body does nothing."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["state"], ["state_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", "rows", 32]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_on", TensorProto.FLOAT, ["batch", "rows", 32]),
        ],
    )
    times = numpy_helper.from_array(np.array(2**62, np.int64), "times")
    go = numpy_helper.from_array(np.array(True), "go_first")
    return model([helper.make_node("Loop", ["times", "go_first", "hidden"], ["normed"], body=body)], [times, go])


def with_function() -> onnx.ModelProto:
    made = model([helper.make_node("Own", ["hidden"], ["normed"], domain="own")])
    node = helper.make_node("Identity", ["x"], ["y"])
    made.functions.append(helper.make_function("own", "Own", ["x"], ["y"], [node], [helper.make_opsetid("", 20)]))
    made.opset_import.append(helper.make_opsetid("own", 1))
    return made


def external(location: str, *, constant: bool = False) -> onnx.ModelProto:
    tensor = numpy_helper.from_array(np.zeros(32, np.float32), "weight")
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    add = helper.make_node("Add", ["hidden", "weight"], ["normed"])
    if constant:
        return model([helper.make_node("Constant", [], ["weight"], value=tensor), add])
    return model([add], [tensor])


def field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes or a message."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def named_twice() -> bytes:
    """A loop that is called Scan first; ONNX Runtime takes the last name of a node."""
    made = endless()
    node = field(4, b"Scan") + made.graph.node[0].SerializeToString()
    del made.graph.node[:]
    graph = field(1, node) + made.graph.SerializeToString()
    made.ClearField("graph")
    return made.SerializeToString() + field(7, graph)


def wide(number: int, content: bytes) -> bytes:
    """The same, whose number has a bit more than C++ reads: ONNX Runtime knows the field, and a reader of all bits does not."""
    encoded = field(number, content)
    return bytes([encoded[0] | 128, 128, 128, 128, 16]) + encoded[1:]


def disguised() -> onnx.ModelProto:
    """Weights in another file, whose entry also has a number in place of its key, which readers of the format skip."""
    made = external("extra.bin")
    made.graph.initializer[0].external_data[0].MergeFromString(bytes([1 << 3, 0]))
    return made


def sparse(*, constant: bool = False) -> onnx.ModelProto:
    values = numpy_helper.from_array(np.zeros(1, np.float32), "weight")
    tensor = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "at"), [32])
    add = helper.make_node("Add", ["hidden", "weight"], ["normed"])
    if constant:
        return model([helper.make_node("Constant", [], ["weight"], sparse_value=tensor), add])
    made = model([add])
    made.graph.sparse_initializer.append(tensor)
    return made


@pytest.mark.parametrize(
    ("forged", "pattern"),
    [
        (sparse(), "contains a sparse tensor"),
        (sparse(constant=True), "contains a sparse tensor"),
        (named_twice(), "has an operator with 2 names"),
        (endless(), r"contains a graph inside an operator \(Loop\), which could run without end"),
        (with_function(), "contains a function"),
        (external("extra.bin"), "has weights in 'extra.bin', which the manifest does not list"),
        (external("../weights.bin"), "has weights in '../weights.bin'"),
        (external("extra.bin", constant=True), "has weights in 'extra.bin'"),
        (disguised(), "has weights in 'extra.bin'"),
    ],
)
def test_what_no_export_writes_is_named(tmp_path: Path, forged: onnx.ModelProto | bytes, pattern: str) -> None:
    path = tmp_path / "norm.onnx"
    path.write_bytes(forged if isinstance(forged, bytes) else forged.SerializeToString())
    with pytest.raises(BundleError, match=rf"norm\.onnx: {pattern}.*: use bundles that"):
        check_graph(path, ["weights.bin", "norm.onnx"])


def test_listed_weights_pass_and_a_torn_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "norm.onnx"
    path.write_bytes(external("weights.bin").SerializeToString())
    check_graph(path, ["weights.bin"])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BundleError, match=r"norm\.onnx: not readable as a graph"):
        check_graph(path, ["weights.bin"])
    path.write_bytes(b"\xff" * 1000)  # a megabyte of these took minutes
    with pytest.raises(BundleError, match="a number has more than ten bytes"):
        check_graph(path, ["weights.bin"])


def test_a_field_that_only_onnxruntime_sees_is_refused(tmp_path: Path) -> None:
    made, path = endless(), tmp_path / "norm.onnx"
    (node,) = made.graph.node
    loop = wide(1, node.SerializeToString())
    del made.graph.node[:]
    graph = field(7, made.graph.SerializeToString() + loop)
    made.ClearField("graph")
    path.write_bytes(made.SerializeToString() + graph)
    with pytest.raises(BundleError, match="the number of a field has more than 32 bits"):
        check_graph(path, ["norm.onnx"])


def test_a_bundle_with_an_endless_loop_is_refused_when_it_is_opened(bundle_copy: Path, tmp_path: Path) -> None:
    """Sizes, hashes and fingerprint are consistent; without the check, the first step would hang."""
    (bundle_copy / "cpu_norm.onnx").write_bytes(endless().SerializeToString())
    document = json.loads((bundle_copy / MANIFEST).read_text())
    document["files"]["cpu_norm.onnx"] = file_spec(bundle_copy / "cpu_norm.onnx").model_dump()
    document["fingerprint"] = fingerprint(document)
    (bundle_copy / MANIFEST).write_text(json.dumps(document))
    for packed in (None, tmp_path / "packed"):
        with pytest.raises(BundleError, match=r"cpu_norm\.onnx: contains a graph inside an operator \(Loop\)"):
            Engine.open(bundle_copy, packed=packed)
    assert not list((tmp_path / "packed").iterdir())  # nothing was made of it
