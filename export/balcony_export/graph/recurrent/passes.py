"""Graph passes on recurrent mixers: tidy their graphs, and write their operators in standard ONNX.

Owns the form of what :mod:`.mixers` emits, after tracing. In the portable form a recurrence is a ``Scan`` over the rows of
the pass:

- The gated delta rule has no closed form over many rows without a triangular solve, which ONNX lacks; its inverse as a power
  series loses all digits when keys repeat. One row after the other is right for every rule.
- Each step has the same shapes whatever the number of rows, so a pass of T rows gives the bits of T passes of one row.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from balcony_export.graph.ir_tools import MICROSOFT, initializer
from balcony_export.graph.passes import SCOPES
from balcony_export.graph.recurrent.mixers import GATED_DELTA
from balcony_export.graph.recurrent.norms import UNSCALED

FLOAT = ir.DataType.FLOAT


def tidy_mixers(model: ir.Model, prefix: str = "") -> None:
    """Remove what tracing leaves around recurrent mixers, which costs more than the mixer itself for one row.

    Precondition: shapes are annotated, and the nodes have the tracer's name scopes. Postcondition: a reshape that keeps
    batch and rows needs no node for its shape, ``Softplus`` has no guard against overflow (the operator has its own), the
    weight of a convolution in module ``a.b`` is called ``<prefix>a.b.conv1d.weight``, and no constant is called like a
    weight. All outputs keep their values.
    """
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _fix_shape(model, node)
        elif node.op_type == "Where":
            _unguard_softplus(node)
        elif UNSCALED in node.metadata_props:
            _share_scale(model, node)
        elif node.op_type == "CausalConvWithState":
            weight, scopes = node.inputs[1], ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
            wanted = f"{prefix}{scopes[-2]}.conv1d.weight" if len(scopes) >= 2 else ""
            if weight is not None and wanted and wanted not in model.graph.initializers:
                weight.name = wanted
    common.RemoveUnusedNodesPass()(model)


def _fix_shape(model: ir.Model, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or output.shape is None:
        return
    before = source.shape
    same = [index < len(before) and before[index] == size for index, size in enumerate(output.shape)]
    # 0 copies a dimension of the input
    shape = [
        size if isinstance(size, int) else 0 if kept else -1 for size, kept in zip(output.shape, same, strict=True)
    ]
    if shape.count(-1) > 1:
        return
    name = "shape_" + "_".join(str(size) for size in shape)
    node.replace_input_with(1, initializer(model, name, np.array(shape, np.int64)))
    node.attributes.pop("allowzero", None)


def _share_scale(model: ir.Model, node: ir.Node) -> None:
    """Let a norm without weights read a constant that has no weight's name."""
    scale = node.inputs[1]
    assert scale is not None and scale.const_value is not None
    array = scale.const_value.numpy()
    node.replace_input_with(1, initializer(model, f"scale_{array[0]:.6g}_{len(array)}", array))


def _unguard_softplus(node: ir.Node) -> None:
    """Where(x > 20, x, Softplus(x)) is Softplus(x)."""
    _, large, small = node.inputs
    softplus = small.producer() if small is not None else None
    if softplus is not None and softplus.op_type == "Softplus" and softplus.inputs[0] is large:
        ir.convenience.replace_all_uses_with(node.outputs[0], softplus.outputs[0])


class _Builder:
    """Makes nodes in order, for one place of a graph."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: int | str | Sequence[int]) -> ir.Value:
        """Add a node with one output, in the type of its first input."""
        node = ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes))
        value = node.outputs[0]
        value.name = f"{self.prefix}.{len(self.nodes)}.{kind}"
        value.type = inputs[0].type if inputs[0] is not None else None
        self.nodes.append(node)
        return value

    def number(self, *values: int) -> ir.Value:
        """A vector of integers."""
        return self._constant(ir.tensor(np.array(values, np.int64)))

    def scalar(self, number: float) -> ir.Value:
        return self._constant(ir.tensor(np.array(number, np.float32)))

    def _constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = f"{self.prefix}.constant.{len(self.constants)}"
        value = ir.val(name, const_value=tensor)
        self.constants.append(value)
        return value


def write_in_standard_operators(model: ir.Model) -> None:
    """Replace ``CausalConvWithState`` and ``LinearAttention`` by standard operators.

    Precondition: :mod:`.mixers` made the nodes. Postcondition: none of them is left, and all outputs keep
    their names, shapes and values up to rounding.
    """
    writers: dict[str, Callable[[_Builder, ir.Node], Sequence[ir.Value]]] = {
        "CausalConvWithState": _convolution,
        "LinearAttention": _recurrence,
    }
    for node in list(model.graph):
        if node.domain != MICROSOFT or node.op_type not in writers:
            continue
        builder = _Builder(str(node.outputs[0].name))
        results = writers[node.op_type](builder, node)
        for constant in builder.constants:
            model.graph.register_initializer(constant)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], builder.nodes, node.outputs, results)
    if not any(node.domain == MICROSOFT for node in model.graph):
        model.graph.opset_imports.pop(MICROSOFT, None)


def _convolution(builder: _Builder, node: ir.Node) -> Sequence[ir.Value]:
    rows, weight, bias, window = node.inputs
    channels, _, taps = _sizes(weight)
    known = builder.op("Concat", window, rows, axis=2)  # (B, C, K - 1 + T)
    operands = [known, weight] if bias is None else [known, weight, bias]
    out = builder.op("Conv", *operands, group=channels, kernel_shape=[taps])
    new = builder.op("Slice", known, builder.number(1 - taps), builder.number(2**62), builder.number(2))
    return out, new


def _sizes(value: ir.Value | None) -> list[int]:
    """Dimensions of a value, -1 for those that are not known before the run."""
    assert value is not None and value.shape is not None
    return [size if isinstance(size, int) else -1 for size in value.shape]


def _recurrence(builder: _Builder, node: ir.Node) -> Sequence[ir.Value]:
    """A ``Scan`` in five axes: G groups of heads share a query and a key, and R = H / G heads are in a group."""
    query, key, value, state, decay, *rest = node.inputs
    groups, heads = node.attributes["q_num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    *_, size, width = _sizes(state)
    shared, per_row = heads // groups, _sizes(decay)[-1] // heads
    scale = node.attributes["scale"].as_float()

    def split(x: ir.Value | None, *shape: int) -> ir.Value:
        return builder.op("Reshape", x, builder.number(0, 0, *shape))  # (B, T, ...)

    if scale != 1.0:
        query = builder.op("Mul", query, builder.scalar(scale))
    given = [
        split(query, groups, 1, 1, size),
        split(key, groups, 1, size, 1),
        split(value, groups, shared, 1, width),
        split(decay, groups, shared, per_row, 1),
    ]
    if node.attributes["update_rule"].as_string() == GATED_DELTA:
        given.append(split(rest[0], groups, shared, 1, 1))
    start = builder.op("Reshape", state, builder.number(0, groups, shared, size, width))
    body = _step(f"{builder.prefix}.step", ["B", groups, shared, size, width], given)
    attributes = [
        ir.AttrGraph("body", body),
        ir.AttrInt64("num_scan_inputs", len(given)),
        ir.AttrInt64s("scan_input_axes", [1] * len(given)),
        ir.AttrInt64s("scan_output_axes", [1]),
    ]
    loop = ir.Node("", "Scan", [start, *given], attributes, num_outputs=2)
    for output, name in zip(loop.outputs, ("state", "outputs"), strict=True):
        output.name, output.type = f"{builder.prefix}.scan.{name}", ir.TensorType(FLOAT)
    builder.nodes.append(loop)
    end, outputs = loop.outputs
    return split(outputs, heads * width), builder.op("Reshape", end, builder.number(0, heads, size, width))


def _step(name: str, shape: Sequence[int | str], given: Sequence[ir.Value]) -> ir.Graph:
    """One row: the old state and the row's query, key, value, decay (and beta) → the new state and the output."""
    builder = _Builder(name)
    *heads, _, width = shape
    state = ir.Value(name=f"{name}.state", type=ir.TensorType(FLOAT), shape=ir.Shape(shape))
    rows = [ir.Value(name=f"{name}.row_{index}", type=ir.TensorType(FLOAT)) for index in range(len(given))]
    query, key, value, decay, *beta = rows
    kept = builder.op("Mul", state, builder.op("Exp", decay))
    if beta:
        retrieved = builder.op("MatMul", builder.op("Transpose", key, perm=[0, 1, 2, 4, 3]), kept)
        value = builder.op("Mul", builder.op("Sub", value, retrieved), beta[0])
    # a product of matrices is faster than one that broadcasts
    new = builder.op("Add", kept, builder.op("MatMul", key, value))
    out = builder.op("MatMul", query, new)  # (B, G, R, 1, dv)
    new.shape, out.shape = ir.Shape(shape), ir.Shape([*heads, 1, width])
    return ir.Graph([state, *rows], [new, out], nodes=builder.nodes, initializers=builder.constants, name=name)
