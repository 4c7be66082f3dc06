"""Lower traced graphs for ONNX Runtime on CPUs: fewer and larger operators, and only the live rows of the KV cache are read.

Owns the rewrite of a stage or a balcony from standard operators to ONNX Runtime's own: ``GroupQueryAttention`` (includes rotary
embedding, window and cache update, and its cost grows with the live rows, while that of ``Attention`` grows with the capacity)
and ``SkipSimplifiedLayerNormalization`` (a residual sum and the norm after it). The I/O tables of the lowered set are in
:mod:`balcony_edge.bundle.manifest`. Both sets of a bundle share their weights until :mod:`balcony_export.quantize.blocks`
replaces those of the lowered set.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from balcony_edge.bundle.manifest import ModelSpec
from balcony_export.graph import passes
from balcony_export.graph.experts import fuse
from balcony_export.graph.ir_tools import MICROSOFT, SINK, initializer, split_by_head

INT32 = ir.TensorType(ir.DataType.INT32)
SKIP_NORM = "SkipSimplifiedLayerNormalization"
#: A sink of the softmax so far below every score that it changes no sum. With one, ``GroupQueryAttention`` computes all scores
#: of a head before it weighs the values, which is faster than its blocks for one row and for short prompts.
NO_SINK = -1e30


def can_lower(spec: ModelSpec, rotated: int) -> bool:
    """Whether ONNX Runtime's ``GroupQueryAttention`` takes the model's heads, of which ``rotated`` values are rotated."""
    return spec.head_dim % 16 == 0 and rotated % 16 == 0


def lower_all(graphs: Mapping[str, ir.Model], spec: ModelSpec) -> dict[str, ir.Model]:
    """The lowered set of a bundle from its portable set, by the names of the I/O tables."""
    stages = [name for name in graphs if name.startswith("stage_")]
    lowered = {name: lower_stage(graphs[name], spec, graphs["norm"] if name == stages[-1] else None) for name in stages}
    for name, traced in graphs.items():
        if name.startswith("balcony_") and any(value.name == "rows" for value in traced.graph.inputs):
            lowered[name] = lower_balcony(traced, spec)
            lowered[f"{name}_keys"] = lower_keys(traced, spec)
    # graphs without attention stay as they are
    lowered |= {name: graphs[name].clone() for name in graphs if name not in ("backbone", *lowered)}
    for model in lowered.values():
        fuse(model)
    return lowered


def lower_stage(stage: ir.Model, spec: ModelSpec, norm: ir.Model | None = None) -> ir.Model:
    """A stage for ONNX Runtime on CPUs.

    Args:
        stage: Graph of the stage as traced and cut; it is not changed.
        spec: Sizes of the model.
        norm: Graph of the final norm, for the last stage: its output ``normed`` becomes a second output.
    """
    model = stage.clone()
    if norm is not None:
        _append_norm(model, norm.clone())
    return _lower(model, spec)


def lower_balcony(balcony: ir.Model, spec: ModelSpec) -> ir.Model:
    """The balcony of a decode step, where every row is a query: input ``rows`` also takes the place of ``queries``."""
    model = balcony.clone()
    rows, queries = (next(v for v in model.graph.inputs if v.name == name) for name in ("rows", "queries"))
    ir.convenience.replace_all_uses_with(queries, rows)
    model.graph.inputs.remove(queries)
    output = model.graph.outputs[0]
    assert output.shape is not None
    output.shape = ir.Shape([output.shape[0], "rows", output.shape[2]])
    common.CommonSubexpressionEliminationPass()(model)
    return _lower(model, spec)


def lower_keys(balcony: ir.Model, spec: ModelSpec) -> ir.Model:
    """The part of a balcony that only writes keys and values of its rows, for rows that are pending."""
    pasts = [str(value.name) for value in balcony.graph.inputs if (value.name or "").startswith("past_")]
    (scale,) = {node.attributes["scale"].as_float() for node in balcony.graph if node.op_type == "Attention"} or {1.0}
    presents = [name.replace("past", "present") for name in pasts]
    dims = {"queries": "rows"} | dict.fromkeys(pasts[1:], pasts[0])
    model = passes.cut(balcony, f"{balcony.graph.name}_keys", ["rows", "start", *pasts], presents, dims)
    for node in list(model.graph):
        if node.op_type != "TensorScatter" or not _of_heads(node.outputs[0]):
            continue
        rotary = _optional_producer(node.inputs[1], "RotaryEmbedding")  # None in Hunyuan: a norm follows the rotation
        if rotary is not None and _turns_whole_heads(rotary.inputs[1], spec):
            for index in (1, 2):
                rotary.replace_input_with(index, _scaled(model, rotary.inputs[index], scale))
        split_by_head(model, node, 1, spec.num_kv_heads, spec.head_dim)
        node.attributes["axis"] = ir.AttrInt64("axis", 2)
    common.RemoveUnusedNodesPass()(model)
    _cache_by_head(model, spec)
    model.graph.opset_imports[MICROSOFT] = 1
    return model


def _lower(model: ir.Model, spec: ModelSpec) -> ir.Model:
    start = next(value for value in model.graph.inputs if value.name == "start")
    last = ir.Value(name="last", type=INT32, shape=ir.Shape(["batch"]))
    total = ir.Value(name="total", type=INT32, shape=ir.Shape([]))
    for node in list(model.graph):
        if node.op_type == "Attention":
            _group_query_attention(model, node, spec, last, total)
    position = list(model.graph.inputs).index(start)
    model.graph.inputs[position : position + 1] = [last, total]
    common.RemoveUnusedNodesPass()(model)
    if start.uses():  # short convolutions look up the rows before the first
        _first_row(model, start, last)
    _cache_by_head(model, spec)
    _skip_norms(model)
    common.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[MICROSOFT] = 1
    return model


def _first_row(model: ir.Model, start: ir.Value, last: ir.Value) -> None:
    """Compute ``start`` from ``last``: the pass has the rows ``start`` to ``last``."""
    one = initializer(model, "one", np.array([1], np.int64))
    wide = ir.Node("", "Cast", [last], [ir.AttrInt64("to", ir.DataType.INT64.value)])
    rows = ir.Node("", "Shape", [model.graph.inputs[0]], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
    after = ir.Node("", "Add", [wide.outputs[0], one])
    first = ir.Node("", "Sub", [after.outputs[0], rows.outputs[0]])
    first.outputs[0].type, first.outputs[0].shape = start.type, start.shape
    model.graph.insert_before(model.graph[0], [wide, rows, after, first])
    ir.convenience.replace_all_uses_with(start, first.outputs[0])


def _append_norm(model: ir.Model, norm: ir.Model) -> None:
    (node,) = norm.graph
    scale = node.inputs[1]
    assert scale is not None
    norm.graph.initializers.clear()
    model.graph.register_initializer(scale)
    hidden = model.graph.outputs[0]
    normed = ir.Value(name="normed", type=hidden.type, shape=hidden.shape)
    attributes = list(node.attributes.values())
    model.graph.append(ir.Node("", node.op_type, [hidden, scale], attributes, outputs=[normed]))
    model.graph.outputs.insert(1, normed)


def _group_query_attention(model: ir.Model, node: ir.Node, spec: ModelSpec, last: ir.Value, total: ir.Value) -> None:
    """Replace an ``Attention`` and everything between the projections and it.

    The factor of the scores goes into the rotary tables of queries and keys, half to each. Without a factor, and without blocks
    (:data:`NO_SINK`), ONNX Runtime multiplies one row by the keys as they lie in the cache; otherwise it transposes them first.
    A window keeps its blocks, which skip the keys outside of it. float16 has no sink: Arm's kernels take every sink for 0
    (ONNX Runtime 1.32).
    """
    query, present_key, present_value, _ = node.inputs
    writes = [_scatter_of(present) for present in (present_key, present_value)]
    key, value = writes[0].inputs[1], writes[1].inputs[1]
    query_rotary, key_rotary = _optional_producer(query, "RotaryEmbedding"), _optional_producer(key, "RotaryEmbedding")
    rope: list[ir.Value | None] = [None, None]
    if query_rotary is not None and key_rotary is not None:
        query, key, rope = query_rotary.inputs[0], key_rotary.inputs[0], list(query_rotary.inputs[1:3])
    attributes = {
        "num_heads": node.attributes["q_num_heads"].as_int(),
        "kv_num_heads": spec.num_kv_heads,
        "scale": node.attributes["scale"].as_float(),
        "do_rotary": int(rope[0] is not None),
    }
    if "softcap" in node.attributes:
        attributes["softcap"] = node.attributes["softcap"].as_float()
    window = node.metadata_props.get(passes.WINDOW)
    # A window as long as the context (262,144 in Phi-3.5) excludes no row.
    if window is not None and int(window) < spec.context_length:
        attributes["local_window_size"] = int(window)
    sink: list[ir.Value | None] = []
    if _turns_whole_heads(rope[0], spec):
        rope = [_scaled(model, table, attributes["scale"]) for table in rope]
        attributes["scale"] = 1.0
        if node.outputs[0].dtype is ir.DataType.FLOAT and not attributes.keys() & {"softcap", "local_window_size"}:
            sink = [None, None, initializer(model, SINK, np.full(spec.num_attention_heads, NO_SINK, np.float32))]
    operands = [query, key, value, *(write.inputs[0] for write in writes), last, total, *rope, *sink]
    converted, old = ir.convenience.convert_attributes(attributes), [node, *writes]
    fused = ir.Node(MICROSOFT, "GroupQueryAttention", operands, converted, num_outputs=3)
    replaced = [one.outputs[0] for one in old]
    ir.convenience.replace_nodes_and_values(model.graph, node, old, [fused], replaced, fused.outputs)


def _turns_whole_heads(table: ir.Value | None, spec: ModelSpec) -> bool:
    """Whether a rotary table, (positions, half of the rotated channels), is for all channels of a head."""
    return table is not None and table.shape is not None and table.shape[1] * 2 == spec.head_dim


def _scaled(model: ir.Model, table: ir.Value | None, scale: float) -> ir.Value:
    """A rotary table that gives queries and keys, if both are turned by it, the factor ``scale`` of their products."""
    assert table is not None and table.const_value is not None
    values = table.const_value.numpy()
    return initializer(model, f"{table.name}_for_{scale:.6g}", (values * scale**0.5).astype(values.dtype))


def _skip_norms(model: ir.Model) -> None:
    """Fuse each ``Add`` with the norm after it; the sum stays available as an output.

    A stage boundary has no residual to fuse, so add zero (``hidden - hidden``). A standalone norm rounds differently, and the
    full model's output would depend on the choice of exits.
    """
    for node in list(model.graph):
        if node.op_type != "RMSNormalization":
            continue
        source, scale = node.inputs[0], node.inputs[1]
        assert source is not None
        add = _optional_producer(source, "Add")
        epsilon = ir.AttrFloat32("epsilon", node.attributes["epsilon"].as_float())
        if add is None and source.is_graph_input() and str(source.name).startswith("hidden_"):
            nothing = ir.Node("", "Sub", [source, source])
            fused = ir.Node(MICROSOFT, SKIP_NORM, [source, nothing.outputs[0], scale], [epsilon])
            old = node.outputs
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [nothing, fused], old, fused.outputs)
        elif add is not None and all(value is not None and value.const_value is None for value in add.inputs):
            # the sum's other readers come after the norm in a decoder layer, or they are outputs
            new = [ir.Value(), ir.Value(name=""), ir.Value(name=""), ir.Value()]
            fused = ir.Node(MICROSOFT, SKIP_NORM, [*add.inputs, scale], [epsilon], outputs=new)
            old = [node.outputs[0], add.outputs[0]]
            ir.convenience.replace_nodes_and_values(model.graph, add, [add, node], [fused], old, new[::3])


def _cache_by_head(model: ir.Model, spec: ModelSpec) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if _of_heads(value):
            value.shape = ir.Shape(["batch", spec.num_kv_heads, "capacity", spec.head_dim])


def _of_heads(value: ir.Value) -> bool:
    """Whether a value is a cache of keys or values."""
    return (value.name or "").startswith(("past_key", "past_value", "present_key", "present_value"))


def _scatter_of(value: ir.Value | None) -> ir.Node:
    node = _optional_producer(value, "TensorScatter")
    assert node is not None, f"expected TensorScatter to make {value}"
    return node


def _optional_producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None
