"""The graphs without decoder layers, built node by node: the final norm of the full depth and the shared LM head.

Owns how the head uses the token table without a second copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from balcony_export.graph.operators import rms_norm_operator
from balcony_export.graph.trace import OPSET
from balcony_export.model.exits import ExitModel


def build_norm(exits: ExitModel) -> ir.Model:
    """The final norm of the full depth: ``hidden`` → ``normed``."""
    norm = rms_norm_operator(exits.parts.norm)
    assert norm is not None
    scale = ir.Value(name="norm.weight", const_value=ir.tensor(norm.scale.detach(), name="norm.weight"))
    hidden = _value("hidden", norm.scale.dtype, ["batch", "queries", exits.parts.embed.embedding_dim])
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", norm.epsilon), ir.AttrInt64("stash_type", 1)]
    node = ir.Node("", "RMSNormalization", [hidden, scale], attributes)
    return _model("norm", [hidden], [node], [scale], {"normed": (node, hidden.dtype, hidden.shape)})


def build_head(exits: ExitModel) -> ir.Model:
    """The LM head: ``hidden`` → ``logits`` in float32.

    The weight stays (V, D) (``Gemm`` with transB), so that a tied token table is stored once and its rows can be gathered.
    """
    parts, cap = exits.parts, exits.soft_cap
    weight, width = parts.head.weight, parts.embed.embedding_dim
    name = "embed_tokens.weight" if weight is parts.embed.weight else "lm_head.weight"
    table = ir.Value(name=name, const_value=ir.tensor(weight.detach(), name=name))
    hidden = _value("hidden", weight.dtype, ["batch", "queries", width])
    rows = _constant("rows_shape", [-1, width])
    tail = _constant("vocabulary", [weight.shape[0]])
    initializers = [table, rows, tail]
    flat = ir.Node("", "Reshape", [hidden, rows])
    operands = [flat.outputs[0], table]
    if parts.head.bias is not None:
        bias = ir.Value(name="lm_head.bias", const_value=ir.tensor(parts.head.bias.detach(), name="lm_head.bias"))
        initializers.append(bias)
        operands.append(bias)
    gemm = ir.Node("", "Gemm", operands, [ir.AttrInt64("transB", 1)])
    lead = ir.Node("", "Shape", [hidden], [ir.AttrInt64("start", 0), ir.AttrInt64("end", 2)])
    shape = ir.Node("", "Concat", [lead.outputs[0], tail], [ir.AttrInt64("axis", 0)])
    last = ir.Node("", "Reshape", [gemm.outputs[0], shape.outputs[0]])
    nodes = [flat, gemm, lead, shape, last]
    if weight.dtype != torch.float32:
        last = ir.Node("", "Cast", [last.outputs[0]], [ir.AttrInt64("to", ir.DataType.FLOAT.value)])
        nodes.append(last)
    if exits.logits_divisor != 1.0:  # Granite
        divisor = _number("logits_divisor", exits.logits_divisor)
        initializers.append(divisor)
        last = ir.Node("", "Div", [last.outputs[0], divisor])
        nodes.append(last)
    if cap is not None:  # Gemma-2: tanh(logits / cap) * cap
        factor = _number("softcap", cap)
        initializers.append(factor)
        divided = ir.Node("", "Div", [last.outputs[0], factor])
        squashed = ir.Node("", "Tanh", [divided.outputs[0]])
        last = ir.Node("", "Mul", [squashed.outputs[0], factor])
        nodes += [divided, squashed, last]
    out_shape = ir.Shape(["batch", "queries", weight.shape[0]])
    return _model("lm_head", [hidden], nodes, initializers, {"logits": (last, ir.DataType.FLOAT, out_shape)})


def _value(name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> ir.Value:
    kind = ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.FLOAT
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))


def _constant(name: str, values: list[int]) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(values, dtype=ir.DataType.INT64, name=name))


def _number(name: str, value: float) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(torch.tensor(value), name=name))


def _model(
    name: str,
    inputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    initializers: Sequence[ir.Value],
    outputs: dict[str, tuple[ir.Node, ir.DataType | None, ir.Shape | None]],
) -> ir.Model:
    values = []
    for output, (node, dtype, shape) in outputs.items():
        value = node.outputs[0]
        assert dtype is not None
        value.name, value.type, value.shape = output, ir.TensorType(dtype), shape
        values.append(value)
    for value in initializers:
        assert value.const_value is not None
        value.shape, value.dtype = ir.Shape(value.const_value.numpy().shape), value.const_value.dtype
    graph = ir.Graph(inputs, values, nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name=name)
    return ir.Model(graph, ir_version=11)
