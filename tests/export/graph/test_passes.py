"""Graph passes on small hand-made graphs: what each needs, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from balcony_export.graph.ir_tools import graph_spec
from balcony_export.graph.passes import WINDOW, collapse_reshapes, cut, name_weights, note_windows, strip_metadata

FLOAT = ir.TensorType(ir.DataType.FLOAT)
SCOPES = "pkg.torch.onnx.name_scopes"


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=FLOAT, shape=ir.Shape(shape))


def weight(name: str, *shape: int) -> ir.Value:
    tensor = ir.tensor(np.ones(shape, np.float32), name=name)
    return ir.Value(name=name, type=FLOAT, shape=ir.Shape(shape), const_value=tensor)


def node(operator: str, inputs: Sequence[ir.Value], output: ir.Value, **metadata: str) -> ir.Node:
    return ir.Node("", operator, inputs, outputs=[output], metadata_props=metadata)


def model(
    inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: Sequence[ir.Node], weights: Sequence[ir.Value] = ()
) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 23}, name="graph")
    return ir.Model(graph, ir_version=10)


def operators(of: ir.Model) -> list[str]:
    return [node.op_type for node in of.graph]


def test_weights_get_the_names_of_their_modules() -> None:
    x, y, z, out = (value(name, "rows", 4) for name in ("x", "y", "z", "out"))
    matrix, bias, norm, rope = weight("val_3", 4, 4), weight("val_4", 4), weight("val_5", 4), weight("rope_cos", 4)
    linear, layer_norm = {SCOPES: "['', 'layers.0.q_proj', 'linear']"}, {SCOPES: "['', 'layers.0.norm', 'rms']"}
    rotated = value("rotated", "rows", 4)
    nodes = [
        node("MatMul", [x, matrix], y, **linear),
        node("Add", [y, bias], z, **linear),
        node("RMSNormalization", [z, norm], rotated, **layer_norm),
        node("Mul", [rotated, rope], out),
    ]
    graph = model([x], [out], nodes, [matrix, bias, norm, rope])
    name_weights(graph, "exit_2.")
    wanted = {"exit_2.layers.0.q_proj.weight", "exit_2.layers.0.q_proj.bias", "exit_2.layers.0.norm.weight", "rope_cos"}
    assert set(graph.graph.initializers) == wanted


def test_two_weights_of_one_module_keep_names_of_their_own() -> None:
    x, y, out = (value(name, "rows", 4) for name in ("x", "y", "out"))
    first, second = weight("val_1", 4, 4), weight("val_2", 4, 4)
    second.const_value = ir.tensor(np.full((4, 4), 3.0, np.float32))
    scopes = {SCOPES: "['', 'layers.0.mlp', 'linear']"}
    graph = model(
        [x],
        [out],
        [node("MatMul", [x, first], y, **scopes), node("MatMul", [y, second], out, **scopes)],
        [first, second],
    )
    name_weights(graph)
    assert set(graph.graph.initializers) == {"layers.0.mlp.weight", "val_2"}


def test_a_weight_that_was_folded_twice_is_one() -> None:
    x, y, out = (value(name, "rows", 4) for name in ("x", "y", "out"))
    first, second = weight("val_1", 4, 4), weight("val_2", 4, 4)
    scopes = {SCOPES: "['', 'layers.0.mlp', 'linear']"}
    products = [node("MatMul", [x, first], y, **scopes), node("MatMul", [y, second], out, **scopes)]
    graph = model([x], [out], products, [first, second])
    name_weights(graph)
    assert set(graph.graph.initializers) == {"layers.0.mlp.weight"}
    assert products[0].inputs[1] is products[1].inputs[1]


def test_a_window_becomes_a_note_and_the_node_is_standard() -> None:
    x, y, out = (value(name, 1, 2, "rows", 4) for name in ("x", "y", "out"))
    with_window = ir.Node("", "Attention", [x, x, x], [ir.AttrInt64(WINDOW, 7)], outputs=[y])
    without = node("Attention", [y, y, y], out)
    note_windows(model([x], [out], [with_window, without]))
    assert WINDOW not in with_window.attributes and with_window.metadata_props[WINDOW] == "7"
    assert WINDOW not in without.metadata_props


def test_reshapes_that_cancel_are_dropped() -> None:
    x, shape = value("x", 2, 8), weight("shape", 2)
    split, merged, out = value("split", 2, 2, 4), value("merged", 2, 8), value("out", 2, 8)
    nodes = [node("Reshape", [x, shape], split), node("Reshape", [split, shape], merged), node("Relu", [merged], out)]
    graph = model([x], [out], nodes, [shape])
    collapse_reshapes(graph)
    assert operators(graph) == ["Relu"]
    assert next(iter(graph.graph)).inputs[0] is x


def test_a_chain_of_reshapes_becomes_the_last_one() -> None:
    x, shape = value("x", 2, 8), weight("shape", 2)
    split, flat, out = value("split", 2, 2, 4), value("flat", 16), value("out", 16)
    nodes = [node("Reshape", [x, shape], split), node("Reshape", [split, shape], flat), node("Relu", [flat], out)]
    graph = model([x], [out], nodes, [shape])
    collapse_reshapes(graph)
    assert operators(graph) == ["Reshape", "Relu"]
    assert next(iter(graph.graph)).inputs[0] is x and flat.shape == ir.Shape([16])


def test_a_reshape_that_makes_an_output_stays() -> None:
    x, shape, out = value("x", 2, 8), weight("shape", 2), value("out", 2, 8)
    graph = model([x], [out], [node("Reshape", [x, shape], out)], [shape])
    collapse_reshapes(graph)
    assert operators(graph) == ["Reshape"] and [output.name for output in graph.graph.outputs] == ["out"]


def test_a_cut_takes_only_what_lies_between_and_leaves_the_whole_alone() -> None:
    x, a, b, out = (value(name, "rows", 4) for name in ("x", "a", "b", "out"))
    first, second, third = (weight(name, 4, 4) for name in ("first", "second", "third"))
    nodes = [node("MatMul", [x, first], a), node("MatMul", [a, second], b), node("MatMul", [b, third], out)]
    whole = model([x], [out], nodes, [third, second, first])
    part = cut(whole, "part", ["a"], ["out"], {})
    assert part.graph.name == "part"
    assert [value.name for value in part.graph.inputs] == ["a"]
    assert [value.name for value in part.graph.outputs] == ["out"]
    assert list(part.graph.initializers) == ["second", "third"], "in the order of their use"
    assert part.graph.initializers["second"].const_value is second.const_value, "shared, not copied"
    assert operators(whole) == ["MatMul"] * 3 and [value.name for value in whole.graph.inputs] == ["x"]
    assert a.producer() is nodes[0] and a.name == "a"


def test_a_cut_reads_dimensions_from_the_input_that_it_has() -> None:
    x, ids, out = value("x", "rows", 4), value("ids", "rows"), value("out", "rows", 4)
    rows = ir.Value(name="dim", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([2]))
    whole = model([ids, x], [out], [node("Shape", [ids], rows), node("Reshape", [x, rows], out)])
    part = cut(whole, "part", ["x"], ["out"], {"ids": "x"})
    shape = next(node for node in part.graph if node.op_type == "Shape")
    assert shape.inputs[0] is not None and shape.inputs[0].name == "x"


def test_no_path_of_the_exporting_machine_is_left() -> None:
    x, out = value("x", 4), value("out", 4)
    relu = node("Relu", [x], out, **{"pkg.torch.onnx.stack_trace": "/home/someone/model.py"})
    graph = model([x], [out], [relu])
    graph.graph.metadata_props["path"] = graph.metadata_props["path"] = "/home/someone"
    graph.producer_name, graph.producer_version = "pytorch", "9"
    strip_metadata(graph)
    assert not relu.metadata_props and not graph.metadata_props and not graph.graph.metadata_props
    assert (graph.producer_name, graph.producer_version) == ("balcony-edge", None)


def test_a_gated_norms_scale_is_a_parameter_and_a_caches_is_not() -> None:
    x, y, out = (value(name, "rows", 4) for name in ("x", "y", "out"))
    norm, cache = weight("layers.0.mamba.norm.scale", 4), weight("past_key_0.scale", 4)
    graph = model([x], [out], [node("Mul", [x, norm], y), node("Div", [y, cache], out)], [norm, cache])
    assert graph_spec("graph", graph)["parameters"] == 4
