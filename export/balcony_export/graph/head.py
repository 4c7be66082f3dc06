"""The graphs without decoder layers, built node by node: the final norm of the full depth and the shared LM head.

Owns how the head uses the token table without a second copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from balcony_edge.errors import UnsupportedModelError
from balcony_export.graph.operators import rms_norm_operator
from balcony_export.graph.trace import OPSET
from balcony_export.model.exits import ExitModel


def build_norm(exits: ExitModel) -> ir.Model:
    """The final norm of the full depth: ``hidden`` → ``normed``."""
    norm = rms_norm_operator(exits.parts.norm)
    if norm is None:
        raise UnsupportedModelError(
            f"{type(exits.parts.norm).__name__}: is the final norm: export represents RMSNorms only: give a model with those"
        )
    scale = _initializer("norm.weight", norm.scale)
    hidden = _hidden(norm.scale.dtype, exits.parts.embed.embedding_dim)
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", norm.epsilon), ir.AttrInt64("stash_type", 1)]
    node = ir.Node("", "RMSNormalization", [hidden, scale], attributes)
    normed = node.outputs[0]
    normed.name, normed.type, normed.shape = "normed", hidden.type, hidden.shape
    return _model("norm", hidden, [node], [scale])


def build_head(exits: ExitModel) -> ir.Model:
    """The LM head: ``hidden`` → ``logits`` in float32.

    The weight stays (V, D) (``Gemm`` with transB), so that a tied token table is stored once and its rows can be gathered.
    """
    parts, cap = exits.parts, exits.soft_cap
    weight, width = parts.head.weight, parts.embed.embedding_dim
    table = _initializer("embed_tokens.weight" if weight is parts.embed.weight else "lm_head.weight", weight)
    hidden = _hidden(weight.dtype, width)
    rows = _initializer("rows_shape", torch.tensor([-1, width]))
    tail = _initializer("vocabulary", torch.tensor([len(weight)]))
    initializers = [table, rows, tail]
    flat = ir.Node("", "Reshape", [hidden, rows])
    operands = [flat.outputs[0], table]
    if parts.head.bias is not None:
        initializers.append(_initializer("lm_head.bias", parts.head.bias))
        operands.append(initializers[-1])
    gemm = ir.Node("", "Gemm", operands, [ir.AttrInt64("transB", 1)])
    lead = ir.Node("", "Shape", [hidden], [ir.AttrInt64("start", 0), ir.AttrInt64("end", 2)])
    shape = ir.Node("", "Concat", [lead.outputs[0], tail], [ir.AttrInt64("axis", 0)])
    nodes = [flat, gemm, lead, shape, ir.Node("", "Reshape", [gemm.outputs[0], shape.outputs[0]])]
    if weight.dtype != torch.float32:
        nodes.append(ir.Node("", "Cast", [nodes[-1].outputs[0]], [ir.AttrInt64("to", ir.DataType.FLOAT.value)]))
    if exits.logits_divisor != 1.0:  # Granite
        initializers.append(_initializer("logits_divisor", torch.tensor(exits.logits_divisor)))
        nodes.append(ir.Node("", "Div", [nodes[-1].outputs[0], initializers[-1]]))
    if cap is not None:  # Gemma-2: tanh(logits / cap) * cap
        initializers.append(_initializer("softcap", torch.tensor(cap)))
        divided = ir.Node("", "Div", [nodes[-1].outputs[0], initializers[-1]])
        squashed = ir.Node("", "Tanh", [divided.outputs[0]])
        nodes += [divided, squashed, ir.Node("", "Mul", [squashed.outputs[0], initializers[-1]])]
    logits = nodes[-1].outputs[0]
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch", "queries", len(weight)])
    return _model("lm_head", hidden, nodes, initializers)


def _hidden(dtype: torch.dtype, width: int) -> ir.Value:
    kind = ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.FLOAT
    return ir.val("hidden", kind, ["batch", "queries", width])


def _initializer(name: str, tensor: torch.Tensor) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(tensor.detach(), name=name))


def _model(name: str, hidden: ir.Value, nodes: Sequence[ir.Node], initializers: Sequence[ir.Value]) -> ir.Model:
    """A graph from ``hidden`` to the result of its last node."""
    outputs = nodes[-1].outputs
    graph = ir.Graph([hidden], outputs, nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name=name)
    return ir.Model(graph, ir_version=11)
