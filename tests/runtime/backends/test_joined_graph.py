"""Joining graphs as protobuf messages, checked with ONNX's own library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from balcony_runtime.backends.graph_files.join import Part, join
from balcony_runtime.backends.onnxruntime.backend import open_session


def part(name: str, source: str, result: str, weight: float, also: str = "") -> bytes:
    """``result = source · weight + last``; all parts use the same inner names."""
    ports = {
        port: helper.make_tensor_value_info(port, TensorProto.FLOAT, ["rows", 2]) for port in (source, result, "last")
    }
    outputs = [ports[result]]
    nodes = [
        helper.make_node("Mul", [source, "weight"], ["inner"], name="node"),
        helper.make_node("Clip", ["inner", "", "most"], ["clipped"], name="clip"),
        helper.make_node("Add", ["clipped", "last"], [result], name="add"),
    ]
    if also:
        nodes.append(helper.make_node("Neg", ["inner"], [also]))
        outputs.append(helper.make_tensor_value_info(also, TensorProto.FLOAT, ["rows", 2]))
    constants = {"weight": np.full((2,), weight, np.float32), "most": np.array(1e6, np.float32)}
    graph = helper.make_graph(
        nodes, name, [ports[source], ports["last"]], outputs,
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
        value_info=[helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["rows", 2])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key="made", value="by the test" * 40)  # a length of two bytes
    return bytes(model.SerializeToString())


def test_joined_graphs_compute_what_they_computed_one_behind_the_other(tmp_path: Path) -> None:
    parts = [
        Part(part("a", "hidden_0", "hidden_1", 2.0, also="present_0"), "a", {}),
        Part(part("b", "rows", "hidden", 3.0), "b", {"rows": "hidden_1"}),
        Part(part("c", "hidden", "logits", 5.0), "c", {}),
    ]
    whole = join(parts, keep=("hidden_", "present_", "logits"))
    model = onnx.load_from_string(whole)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["hidden_0", "last"]
    assert [value.name for value in model.graph.output] == ["hidden_1", "present_0", "logits"]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)] and model.ir_version == 10
    assert [entry.key for entry in model.metadata_props] == ["made"]

    (tmp_path / "whole.onnx").write_bytes(whole)
    session = open_session(tmp_path / "whole.onnx", optimize=False)
    row, last = np.array([[1.0, -2.0]], np.float32), np.array([[10.0, 20.0]], np.float32)
    hidden, present, logits = session.run(None, {"hidden_0": row, "last": last})
    np.testing.assert_array_equal(hidden, row * 2 + last)
    np.testing.assert_array_equal(present, -row * 2)
    np.testing.assert_array_equal(logits, ((row * 2 + last) * 3 + last) * 5 + last)


def test_a_graph_that_is_cut_short_is_no_graph() -> None:
    model = part("a", "hidden_0", "logits", 2.0)
    with pytest.raises((ValueError, IndexError)):
        join([Part(model[: len(model) // 2], "a", {})], keep=("logits",))


def test_weights_outside_of_the_files_stay_there(tmp_path: Path) -> None:
    """The joined graph refers to a part's external data in the same file, at the same place."""
    model = onnx.load_from_string(part("a", "hidden_0", "hidden", 2.0))
    onnx.save(
        model, str(tmp_path / "a.onnx"), save_as_external_data=True, location="weights", size_threshold=0,
        convert_attribute=False,
    )  # fmt: skip
    other = part("b", "hidden", "logits", 3.0)
    whole = join([Part((tmp_path / "a.onnx").read_bytes(), "a", {}), Part(other, "b", {})], keep=("logits",))
    weight = onnx.load_from_string(whole).graph.initializer[0]
    assert weight.name == "a.weight"
    assert {entry.key: entry.value for entry in weight.external_data}["location"] == "weights"
