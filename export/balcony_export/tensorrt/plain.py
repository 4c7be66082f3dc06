"""Attention, rotary embedding, norm and cache update in operators of opset 21.

For TensorRT before 10.15 (JetPack 7.0 has 10.13), whose parser knows none of the four. Every replacement keeps names, types and
shapes, so that both sets of graphs have the same inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from balcony_export.graph.ir_tools import Chain, initializer, replace_node

OPSET, IR_VERSION = 21, 10
#: Score of a key that a row must not see: softmax turns it into 0 in float32.
_UNSEEN = -1e9


def plain_operators(model: ir.Model) -> None:
    """Replace every operator newer than opset 21 in ``model``; its outputs keep their values."""
    patterns: dict[str, Callable[[_Chain, ir.Node], None]] = {
        "RMSNormalization": _norm,
        "RotaryEmbedding": _rotary,
        "TensorScatter": _scatter,
        "Attention": _attention,
    }
    for node in list(model.graph):
        if node.op_type in patterns:
            _replace(model, node, patterns[node.op_type])
    model.graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION


def plain_soft_caps(model: ir.Model) -> None:
    """Replace every attention with capped scores (Gemma-2), which no TensorRT has as a fused operator."""
    for node in list(model.graph):
        if node.op_type == "Attention" and "softcap" in node.attributes:
            _replace(model, node, _attention)


def _replace(model: ir.Model, node: ir.Node, pattern: Callable[[_Chain, ir.Node], None]) -> None:
    chain = _Chain(model)
    pattern(chain, node)
    replace_node(model, node, chain.nodes)


class _Chain(Chain):
    """A chain with constants of its own."""

    def split(self, value: ir.Value | None, width: int, whole: int) -> Sequence[ir.Value]:
        """Two parts of the last axis of so many numbers each, and the rest of it if there is one."""
        sizes = [width, width, whole - 2 * width] if whole > 2 * width else [width, width]
        return self.several("Split", len(sizes), value, self.integers(*sizes), axis=-1)

    def number(self, value: float) -> ir.Value:
        return initializer(self.model, f"float_{value:g}", np.array(value, np.float32))

    def cast(self, value: ir.Value | None, to: ir.DataType) -> ir.Value:
        return self("Cast", value, to=to.value)


def _norm(chain: _Chain, node: ir.Node) -> None:
    hidden, scale = node.inputs
    mean = chain("ReduceMean", chain("Mul", hidden, hidden), chain.integers(-1), keepdims=1)
    root = chain("Sqrt", chain("Add", mean, chain.number(node.attributes["epsilon"].as_float())))
    chain("Mul", chain("Div", hidden, root), scale)


def _rotary(chain: _Chain, node: ir.Node) -> None:
    rows, cos, sin, positions = node.inputs
    heads = node.attributes["num_heads"].as_int()
    assert cos is not None and cos.shape is not None
    half = int(cos.shape[1])  # type: ignore[arg-type]
    assert rows is not None and rows.shape is not None
    width = int(rows.shape[-1])  # type: ignore[arg-type]
    first, second, *rest = chain.split(chain("Reshape", rows, chain.integers(0, 0, heads, -1)), half, width // heads)
    angles = [chain("Unsqueeze", chain("Gather", table, positions, axis=0), chain.integers(2)) for table in (cos, sin)]
    left = chain("Sub", chain("Mul", first, angles[0]), chain("Mul", second, angles[1]))
    right = chain("Add", chain("Mul", second, angles[0]), chain("Mul", first, angles[1]))
    chain("Reshape", chain("Concat", left, right, *rest, axis=-1), chain.integers(0, 0, width))


def _scatter(chain: _Chain, node: ir.Node) -> None:
    past, update, start = node.inputs
    count = chain("Squeeze", chain("Shape", update, start=2, end=3), chain.integers(0))
    zero, one = chain.integer(0), chain.integer(1)
    rows = chain("Unsqueeze", chain("Range", zero, count, one), chain.integers(0, 1, 3))  # (1, 1, T, 1)
    places = chain("Add", chain("Unsqueeze", start, chain.integers(1, 2, 3)), rows)  # (B, 1, T, 1)
    chain("ScatterElements", past, chain("Expand", places, chain("Shape", update)), update, axis=2)


def _attention(chain: _Chain, node: ir.Node) -> None:
    query, key, value, mask = node.inputs
    assert key is not None and key.shape is not None and key.dtype is not None
    kv_heads, capacity, width = (int(dim) for dim in list(key.shape)[1:])  # type: ignore[arg-type]
    heads = _heads_of(node)
    # scaled before the product, which is larger than float16 in some models (Qwen2) otherwise
    scaled = chain("Mul", query, chain.cast(chain.number(node.attributes["scale"].as_float()), key.dtype))
    # query heads that share a key head become rows of one product
    grouped = chain("Reshape", scaled, chain.integers(0, kv_heads, -1, width))
    scores = chain("MatMul", grouped, chain("Transpose", key, perm=[0, 1, 3, 2]))
    scores = chain.cast(chain("Reshape", scores, chain.integers(0, heads, -1, capacity)), ir.DataType.FLOAT)
    if "softcap" in node.attributes:
        cap = chain.number(node.attributes["softcap"].as_float())
        scores = chain("Mul", chain("Tanh", chain("Div", scores, cap)), cap)
    seen = chain("Where", mask, scores, chain.number(_UNSEEN))
    shares = chain.cast(chain("Softmax", seen, axis=-1), key.dtype)
    mixed = chain("MatMul", chain("Reshape", shares, chain.integers(0, kv_heads, -1, capacity)), value)
    chain("Reshape", mixed, chain.integers(0, heads, -1, width))


def _heads_of(node: ir.Node) -> int:
    """Number of query heads, from the shape of the reshape before the attention."""
    query = node.inputs[0]
    transpose = None if query is None else query.producer()
    reshape = None if transpose is None or transpose.inputs[0] is None else transpose.inputs[0].producer()
    assert reshape is not None and reshape.inputs[1] is not None and reshape.inputs[1].const_value is not None
    return int(reshape.inputs[1].const_value.numpy()[2])
