"""Reading of a bundle's graphs, small edits that several rewrites share, and a graph's entry in the manifest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from balcony_edge.bundle.bundle import Bundle
from balcony_runtime.backends.graph_files.check import check_graph

#: Domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"
#: Name of the sink of the lowered attention, a constant.
SINK = "no_sink"
#: Smallest scale with full precision in float16; TensorRT takes only scales above 0.
SMALLEST_SCALE = 2.0**-14
#: Largest relative distance of rounded weights from the model's: rounding to 4 bits gives about 0.1.
FAR_WEIGHTS = 0.3


def load_graph(bundle: Bundle, file: str) -> ir.Model:
    """Load a graph of a bundle after a check of its file. Its weights are read when they are used.

    Raises:
        BundleError: it is more than a chain of operators over listed files.
    """
    check_graph(bundle.file(file), bundle.manifest.files)
    return ir.load(bundle.file(file))


def relative_distance(stored: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> float:
    """Norm of the difference between a stored weight and the original, relative to the original; infinite if shapes differ."""
    if stored.shape != weight.shape:
        return math.inf
    return float(np.linalg.norm(stored - weight)) / max(float(np.linalg.norm(weight)), 1e-30)


def decides(node: ir.Node) -> bool:
    """Whether a product chooses or weights others: the router's, or a gate with one output. It stays in float32."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    users = _users(node)
    outputs = 0 if node.op_type == "Gemm" else 1
    routes = any(user.op_type in ("MoE", "QMoE", "Softmax") for user in users)
    # a router with biases computes Sigmoid, Add, TopK
    scores = [added for user in users if user.op_type == "Sigmoid" for added in _users(user)]
    routes = routes or any(user.op_type == "TopK" for score in scores for user in _users(score))
    return routes or int(weight.const_value.shape[outputs]) == 1  # type: ignore[arg-type]


def _users(node: ir.Node) -> list[ir.Node]:
    """Nodes that use a result, in its own precision or in another."""
    found = [use.node for use in node.outputs[0].uses()]
    return [user for one in found for user in (_users(one) if one.op_type == "Cast" else [one])]


def initializer(model: ir.Model, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """The initializer of that name, which is added if the graph has none."""
    if name not in model.graph.initializers:
        model.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return model.graph.initializers[name]


class Chain:
    """Collects the nodes that replace one node; each call adds a node and returns its output."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.nodes = model, list[ir.Node]()

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.several(op_type, 1, *inputs, **attributes)[0]

    def several(self, op_type: str, outputs: int, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        """Add a node with several outputs."""
        converted = ir.convenience.convert_attributes(attributes)
        self.nodes.append(ir.Node("", op_type, list(inputs), converted, num_outputs=outputs))
        return self.nodes[-1].outputs

    def integers(self, *numbers: int) -> ir.Value:
        """A constant vector of int64."""
        name = "integers_" + "_".join(map(str, numbers if len(numbers) < 9 else ("to", numbers[-1])))
        return initializer(self.model, name, np.array(numbers, np.int64))

    def integer(self, number: int) -> ir.Value:
        """A constant int64 without axes."""
        return initializer(self.model, f"integer_{number}", np.array(number, np.int64))


def split_by_head(model: ir.Model, node: ir.Node, index: int, heads: int, head_dim: int) -> None:
    """Turn an input (B, T, H·d) of a node into (B, H, T, d)."""
    shape = initializer(model, f"{heads}_heads_of_{head_dim}", np.array([0, 0, heads, head_dim], np.int64))
    split = ir.Node("", "Reshape", [node.inputs[index], shape])
    swapped = ir.Node("", "Transpose", [split.outputs[0]], [ir.AttrInt64s("perm", [0, 2, 1, 3])])
    model.graph.insert_before(node, [split, swapped])
    node.replace_input_with(index, swapped.outputs[0])


def replace_node(model: ir.Model, node: ir.Node, chain: Sequence[ir.Node]) -> None:
    """Let ``chain`` take the place of a node, and the result of its end the place of the node's."""
    before, last = node.outputs[0], chain[-1].outputs[0]
    last.name, last.type, last.shape = before.name, last.type or before.type, before.shape
    model.graph.insert_after(node, chain)
    ir.convenience.replace_all_uses_with(before, last, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def append_to_node(model: ir.Model, node: ir.Node, output: ir.Value, chain: Sequence[ir.Node]) -> None:
    """Let a node give ``output``, from which ``chain`` makes what takes the place of its result."""
    new = ir.Node(node.domain, node.op_type, list(node.inputs), list(node.attributes.values()), outputs=[output])
    new.metadata_props.update(node.metadata_props)
    replace_node(model, node, [new, *chain])


def graph_spec(stem: str, traced: ir.Model) -> dict[str, Any]:
    """A graph's entry in the manifest (:class:`balcony_edge.bundle.manifest.GraphSpec`)."""

    def table(values: Sequence[ir.Value]) -> list[dict[str, Any]]:
        specs = []
        for value in values:
            assert value.dtype is not None and value.shape is not None
            shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
            specs.append({"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape})
        return specs

    # rope tables are gathered by row, so they are not read whole; integers are shapes and a sink is a constant, not weights
    tensors = {
        name: value.const_value
        for name, value in traced.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype != ir.DataType.INT64
        and not name.startswith(("rope_", SINK))
    }
    # one row reads k of E experts; the first axis of each of these weights is the expert
    chosen = {
        str(value.name): node.attributes["k"].as_int()
        for node in traced.graph
        if node.op_type in ("MoE", "QMoE")
        for value in node.inputs[2:]
        if value is not None and value.const_value is not None
    }
    products = [node.attributes for node in traced.graph if node.op_type == "MatMulNBits"]
    # packed weights, and scales and bounds of caches (a gated norm also has a ".scale", which is a weight)
    floats = [
        tensor.size
        for name, tensor in tensors.items()
        if not name.endswith((".blocks", ".scales", ".zeros")) and not name.startswith("past_")
    ]
    packed = [
        tensors[str(node.inputs[place].name)].nbytes * 8 // node.attributes["expert_weight_bits"].as_int()  # type: ignore[union-attr]
        for node in traced.graph
        if node.op_type == "QMoE"
        for place in (2, 5)
    ]

    def bytes_read(name: str) -> int:
        tensor = tensors[name]
        return tensor.nbytes * chosen[name] // int(tensor.shape[0]) if name in chosen else tensor.nbytes  # type: ignore[arg-type]

    return {
        "file": f"{stem}.onnx",
        "inputs": table(traced.graph.inputs),
        "outputs": table(traced.graph.outputs),
        "parameters": sum(floats) + sum(packed) + sum(node["K"].as_int() * node["N"].as_int() for node in products),
        "weight_bytes": sum(bytes_read(name) for name in tensors),
    }
