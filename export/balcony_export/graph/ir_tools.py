"""What several rewrites of ONNX graphs share: small edits, and a graph's entry in the manifest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

#: The least scale that a half-precision number holds with all its digits; TensorRT takes none that is not above 0.
SMALLEST_SCALE = 2.0**-14
#: How far weights that were rounded may be from the model's, as a share of their size: 4 bits round to 0.1 of it.
FAR_WEIGHTS = 0.3


def distance(stored: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> float:
    """How far a weight as it is stored is from what it was, as a share of its size; infinite where the shapes differ."""
    if stored.shape != weight.shape:
        return math.inf
    return float(np.linalg.norm(stored - weight)) / max(float(np.linalg.norm(weight)), 1e-30)


def constant(model: ir.Model, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """An initializer of that name and value; one that is there already is taken."""
    if name not in model.graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def replaced(model: ir.Model, node: ir.Node, outputs: Sequence[ir.Value]) -> ir.Node:
    """A copy of ``node`` with other outputs, put before it; ``node`` stays until nothing uses it."""
    new = ir.Node(node.domain, node.op_type, list(node.inputs), list(node.attributes.values()), outputs=list(outputs))
    new.metadata_props.update(node.metadata_props)
    model.graph.insert_before(node, new)
    return new


def insert_between(model: ir.Model, new: ir.Node, before: ir.Value, chain: Sequence[ir.Node]) -> None:
    """Let what used ``before`` use the end of ``chain`` behind ``new``; the node that made ``before`` goes."""
    old = before.producer()
    assert old is not None
    last = chain[-1].outputs[0]
    last.name, last.type, last.shape = before.name, last.type or before.type, before.shape
    model.graph.insert_after(new, chain)
    ir.convenience.replace_all_uses_with(before, last, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)


_ONNX_TO_DTYPE = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.INT8: "int8",
}


def graph_spec(stem: str, traced: ir.Model) -> dict[str, Any]:
    """What the manifest says about a graph (:class:`balcony_edge.bundle.manifest.GraphSpec`)."""

    def table(values: Sequence[ir.Value]) -> list[dict[str, Any]]:
        specs = []
        for value in values:
            assert value.dtype is not None and value.shape is not None
            shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
            specs.append({"name": value.name, "dtype": _ONNX_TO_DTYPE[value.dtype], "shape": shape})
        return specs

    # rope tables are gathered by row, not read whole; shapes are no weights
    tensors = {
        name: value.const_value
        for name, value in traced.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype != ir.DataType.INT64
        and not name.startswith("rope_")
    }
    products = [node.attributes for node in traced.graph if node.op_type == "MatMulNBits"]
    floats = [tensor.size for name, tensor in tensors.items() if not name.endswith((".blocks", ".scales", ".zeros"))]
    return {
        "file": f"{stem}.onnx",
        "inputs": table(traced.graph.inputs),
        "outputs": table(traced.graph.outputs),
        "parameters": sum(floats) + sum(node["K"].as_int() * node["N"].as_int() for node in products),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }
