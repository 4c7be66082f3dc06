"""The graphs for TensorRT: a bundle's portable set with caches by head, in the precision of the engines.

Owns the rewrite from the set ``graphs`` (see :mod:`balcony_edge.bundle.manifest`) to the set of one engine directory: KV caches
(B, H, S, d) with a fixed S, as TensorRT's cache update needs; ``Attention`` over heads with the explicit mask of the portable
graphs (TensorRT's parser ignores ``nonpad_kv_seqlen``); activations in half precision (``fp32``: in float32), norms in
float32; the token table as a graph; the most probable token next to the logits. Weights become integers in
:mod:`.integers`; :mod:`.plain` replaces operators that TensorRT before 10.15 lacks. Works on files, so that only rounding to
``int4`` needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import EnginePrecision, ModelSpec
from balcony_export.graph.ir_tools import append_to_node, initializer, load_graph, split_by_head
from balcony_export.tensorrt.integers import Rounding, quantize_weights
from balcony_export.tensorrt.plain import plain_operators, plain_soft_caps
from balcony_runtime.backends.token_table import TokenTable

#: Precision → type of activations, caches and float weights.
ACTIVATIONS: dict[EnginePrecision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.FLOAT16,
    "int4": ir.DataType.FLOAT16,
    "fp8": ir.DataType.FLOAT16,
}


@dataclass(frozen=True)
class Format:
    """Form of the graphs.

    Attributes:
        precision: Precision of weights; activations are in half precision except for ``fp32``.
        operators: ``fused`` for Attention, RotaryEmbedding, RMSNormalization and TensorScatter as single nodes; ``plain`` for
            the same in operators of opset 21, which TensorRT before 10.15 reads.
        capacity: Rows of the KV caches.
        block_size: Number of inputs that share a scale in ``int4``.
    """

    precision: EnginePrecision = "fp16"
    operators: Literal["fused", "plain"] = "fused"
    capacity: int = 2048
    block_size: Literal[32, 64, 128] = 64


def tensorrt_graphs(bundle: Bundle, form: Format, rounding: Rounding | None = None) -> dict[str, ir.Model]:
    """Every graph of a bundle in a form for TensorRT: ``embed``, ``backbone``, stages, balconies, ``norm`` and ``lm_head``.

    Args:
        bundle: Bundle with graphs in standard ONNX.
        form: Form of the graphs.
        rounding: Integers of the weights; by default they are rounded to the nearest.

    Raises:
        BundleError: The bundle has no portable graphs.
    """
    portable = bundle.portable()
    spec = portable.manifest.model
    graphs = {"embed": _finished(build_embedding(portable), "embed", form)}
    rounding = rounding or Rounding(form.block_size)
    for name, graph in portable.manifest.graphs.items():
        model = ir.external_data.load_to_model(load_graph(portable, graph.file))
        # each at once: half precision halves what is held before the next one is read
        graphs[name] = _finished(rewrite(model, spec, form, rounding), name, form)
    return graphs


def rewrite(model: ir.Model, spec: ModelSpec, form: Format, rounding: Rounding) -> ir.Model:
    """Rewrite one portable graph; ``model`` is changed."""
    _fix_capacity(model, form.capacity)
    _caches_by_head(model, spec, form.capacity)
    if form.precision in ("int8", "int4", "fp8"):
        quantize_weights(model, form.precision, rounding)
    if model.graph.name == "lm_head":
        _add_argmax(model)
    return model


def build_embedding(bundle: Bundle) -> ir.Model:
    """The token table as a graph: ``ids`` int64 (B, T) → ``hidden_0`` float (B, T, D), scaled as the model does."""
    manifest = bundle.manifest
    rows = TokenTable(bundle)[np.arange(manifest.model.vocab_size)]
    tensor = ir.tensor(np.ascontiguousarray(rows), name="embed_tokens.weight")
    table = ir.val(tensor.name, const_value=tensor)
    ids = ir.val("ids", ir.DataType.INT64, ["batch", "rows"])
    hidden = ir.val("hidden_0", tensor.dtype, ["batch", "rows", rows.shape[1]])
    node = ir.Node("", "Gather", [table, ids], [ir.AttrInt64("axis", 0)], outputs=[hidden])
    graph = ir.Graph([ids], [hidden], nodes=[node], initializers=[table], opset_imports={"": 24}, name="embed")
    return ir.Model(graph, ir_version=11)


def _finished(model: ir.Model, name: str, form: Format) -> ir.Model:
    _to_precision(model, ACTIVATIONS[form.precision])
    if form.operators == "plain":
        plain_operators(model)
    else:
        plain_soft_caps(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.graph.name, model.producer_name, model.producer_version = name, "balcony-edge", None
    return model


def _fix_capacity(model: ir.Model, capacity: int) -> None:
    """Replace the row count that is read from a cache's shape by a number, and cut rope tables to the capacity."""
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs else None
        reads_rows = node.op_type == "Shape" and node.attributes["start"].as_int() == 1
        if reads_rows and source is not None and str(source.name).startswith("past_"):
            number = initializer(model, "capacity_rows", np.array([capacity], np.int64))
            ir.convenience.replace_all_uses_with(node.outputs[0], number)
            model.graph.remove(node, safe=True)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if str(value.name).startswith("rope_") and tensor is not None:
            rows = np.ascontiguousarray(tensor.numpy()[:capacity])
            value.const_value, value.shape = ir.tensor(rows, name=value.name), ir.Shape(rows.shape)


def _caches_by_head(model: ir.Model, spec: ModelSpec, capacity: int) -> None:
    """Give caches the shape (B, H, S, d), written at axis 2, and attention inputs and outputs by head.

    What a short convolution keeps has one head.
    """
    caches = {
        value.name: value
        for value in (*model.graph.inputs, *model.graph.outputs)
        if value.name is not None and value.name.startswith(("past_", "present_"))
    }
    heads_of = {name: _heads_and_width(value, spec) for name, value in caches.items()}
    for node in list(model.graph):
        if node.op_type == "TensorScatter":
            split_by_head(model, node, 1, *heads_of[str(node.outputs[0].name)])
            node.attributes["axis"] = ir.AttrInt64("axis", 2)
        elif node.op_type == "GatherND":  # rows of a convolution's inputs
            past = node.inputs[0]
            assert past is not None
            shape = initializer(model, "one_head", np.array([0, capacity, heads_of[str(past.name)][1]], np.int64))
            flat = ir.Node("", "Reshape", [past, shape])
            model.graph.insert_before(node, flat)
            node.replace_input_with(0, flat.outputs[0])
        elif node.op_type == "Attention":
            heads = node.attributes["q_num_heads"].as_int()
            split_by_head(model, node, 0, heads, spec.head_dim)
            for attribute in ("q_num_heads", "kv_num_heads"):  # only for inputs whose heads are merged
                del node.attributes[attribute]
            split = ir.Value(name=f"{node.outputs[0].name}_by_head", type=node.outputs[0].type)
            back = ir.Node("", "Transpose", [split], [ir.AttrInt64s("perm", [0, 2, 1, 3])])
            width = initializer(model, f"merged_{heads}_heads", np.array([0, 0, heads * spec.head_dim], np.int64))
            append_to_node(model, node, split, [back, ir.Node("", "Reshape", [back.outputs[0], width])])
    _own_masks(model)
    _own_starts(model)
    for name, value in caches.items():
        count, size = heads_of[name]
        value.shape = ir.Shape(["batch", count, capacity, size])


def _heads_and_width(cache: ir.Value, spec: ModelSpec) -> tuple[int, int]:
    if "_inputs" not in str(cache.name):
        return spec.num_kv_heads, spec.head_dim
    assert cache.shape is not None
    return 1, int(cache.shape[2])  # type: ignore[arg-type]


def _own_masks(model: ir.Model) -> None:
    """Give every ``Attention`` a mask comparison of its own.

    TensorRT-RTX 1.7 fuses the comparison into the attention's kernel and refuses a graph where two kernels share one ("more
    than one op named"). It also merges equal comparisons, so each adds a different offset to keys and rows.
    """
    taken: set[ir.Value] = set()
    for index, node in enumerate(list(model.graph)):
        mask = node.inputs[3] if node.op_type == "Attention" else None
        if mask is None or mask not in taken:
            taken |= {mask} if mask is not None else set()
            continue
        offset = initializer(model, f"mask_{index}", np.array([index], np.int64))
        chain: list[ir.Node] = []

        def again(value: ir.Value, offset: ir.Value = offset, chain: list[ir.Node] = chain) -> ir.Value:
            producer = value.producer()
            assert producer is not None
            inputs = list(producer.inputs)
            if value.dtype == ir.DataType.BOOL:
                inputs = [
                    source if source is None or source.const_value is not None else again(source) for source in inputs
                ]
                new = ir.Node("", producer.op_type, inputs, list(producer.attributes.values()))
            else:
                new = ir.Node("", "Add", [value, offset])
            new.outputs[0].type, new.outputs[0].shape = value.type, value.shape
            chain.append(new)
            return new.outputs[0]

        own = again(mask)
        model.graph.insert_before(node, chain)
        node.replace_input_with(3, own)


def _own_starts(model: ir.Model) -> None:
    """Give the cache update of every short convolution a ``start`` of its own.

    TensorRT-RTX 1.7 dies with a segmentation fault where two updates that no attention reads share one. It also merges equal
    sums, so each adds and subtracts a different number.
    """
    updates = [
        node for node in model.graph if node.op_type == "TensorScatter" and "_inputs" in str(node.outputs[0].name)
    ]
    for index, node in enumerate(updates):
        offset = initializer(model, f"start_{index}", np.array([index], np.int64))
        there = ir.Node("", "Add", [node.inputs[2], offset])
        back = ir.Node("", "Sub", [there.outputs[0], offset])
        model.graph.insert_before(node, [there, back])
        node.replace_input_with(2, back.outputs[0])


def _add_argmax(model: ir.Model) -> None:
    """Add the output ``argmax`` int64 (B, Q) next to ``logits``, so that a greedy step copies back only eight bytes."""
    logits = model.graph.outputs[0]
    assert logits.shape is not None
    best = ir.Value(name="argmax", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(list(logits.shape)[:2]))
    attributes = [ir.AttrInt64("axis", -1), ir.AttrInt64("keepdims", 0)]
    model.graph.append(ir.Node("", "ArgMax", [logits], attributes, outputs=[best]))
    model.graph.outputs.append(best)


#: Operators that stay in float32: squares of hidden states (up to 25,856 in the demo model) exceed the range of float16.
_FLOAT32 = ("RMSNormalization",)


def _to_precision(model: ir.Model, activations: ir.DataType) -> None:
    """Convert activations, caches and float weights; norms stay in float32 between casts, and logits in float32."""
    kinds = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    exact = {
        value for node in model.graph if node.op_type in _FLOAT32 for value in node.inputs[1:] if value is not None
    }
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype in kinds:
            wanted = ir.DataType.FLOAT if value in exact else activations
            if tensor.dtype != wanted:
                value.const_value = ir.tensor(tensor.numpy().astype(wanted.numpy()), name=value.name)
            value.type = ir.TensorType(wanted)
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.dtype in kinds:
            value.type = ir.TensorType(activations)
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() in {kind.value for kind in kinds}:
            # the cast of the portable head, whose result is a graph output or leads to one
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0], replace_graph_outputs=True)  # type: ignore[arg-type]
            model.graph.remove(node, safe=True)
    if activations == ir.DataType.FLOAT:
        return
    for node in list(model.graph):
        if node.op_type in _FLOAT32:
            up = _cast(node.inputs[0], ir.DataType.FLOAT)
            model.graph.insert_before(node, up)
            node.replace_input_with(0, up.outputs[0])
            exact_output = ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=node.outputs[0].shape)
            append_to_node(model, node, exact_output, [_cast(exact_output, activations)])
    for logits in [output for output in model.graph.outputs if output.name == "logits"]:
        producer = logits.producer()
        assert producer is not None
        narrow = ir.Value(name="narrow_logits", type=logits.type, shape=logits.shape)
        append_to_node(model, producer, narrow, [_cast(narrow, ir.DataType.FLOAT)])


def _cast(value: ir.Value | None, to: ir.DataType) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", to.value)])
    assert value is not None
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(to), value.shape
    return node
