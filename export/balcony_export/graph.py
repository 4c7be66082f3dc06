"""Trace a Hugging Face causal LM and its balconies into ONNX graphs (opset 24).

Owns: how the modules are entered so that each attention, KV cache update, rotary embedding and RMSNorm comes out as one
standard node (``Attention``, ``TensorScatter``, ``RotaryEmbedding``, ``RMSNormalization``). It knows no architecture by
name: the layers are transformers' own, called through its attention interface. The I/O tables stand in
:mod:`balcony_edge.bundle`.

Masks are explicit and positions are row indices: row r sees keys ≤ r (within its window), so rows past the cursor never
count, and the same graph serves engines that ignore ``nonpad_kv_seqlen`` (TensorRT's parser does).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.onnx import ops
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from balcony_edge.errors import UnsupportedModelError
from balcony_export.architecture import Parts, layer_type
from balcony_export.balcony import Balcony

OPSET = 24
_ATTENTION = "balcony_edge_trace"


@dataclass(frozen=True)
class _Rows:
    """What the layers of one pass share: the rows' positions, the capacity of the KV cache, and masks made on demand."""

    positions: torch.Tensor  # (B, T) int64
    capacity: int
    masks: dict[int | None, torch.Tensor]

    def mask(self, window: int | None) -> torch.Tensor:
        """True where row r sees key k: k ≤ r, and k > r - window where there is one."""
        if window not in self.masks:
            keys = torch.arange(self.capacity)[None, None, :]  # (1, 1, S)
            rows = self.positions[:, :, None]  # (B, T, 1)
            seen = keys <= rows
            if window is not None:
                seen = seen & (keys > rows - window)
            self.masks[window] = seen[:, None]  # (B, 1, T, S)
        return self.masks[window]


@dataclass(frozen=True)
class _RopeTable:
    """Half of a rotary table, handed to the layers in the place of ``cos`` or ``sin``."""

    table: torch.Tensor  # (context, head_dim / 2)
    positions: torch.Tensor  # (B, T)


class _WritingCache:
    """Stands in for transformers' cache: writes a layer's new rows into its past and returns the whole of it."""

    def __init__(self, past: dict[int, tuple[torch.Tensor, torch.Tensor]], start: torch.Tensor) -> None:
        self.past = past
        self.start = start
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past_key, past_value = self.past[layer_idx]
        self.present[layer_idx] = (self._write(past_key, key), self._write(past_value, value))
        return self.present[layer_idx]

    def _write(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        update = _merge_heads(new)  # (B, T, F)
        attributes = {"axis": 1, "mode": "linear"}
        return ops.symbolic(
            "TensorScatter", (past, update, self.start), attributes, dtype=past.dtype, shape=past.shape, version=24
        )


class _ReadingCache:
    """Ignores the keys and values it is offered: they stand in the cache already."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = key, value

    def update(self, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key, self.value


def _merge_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, head_dim) -> (B, T, H * head_dim)


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, T, head_dim)
    key: torch.Tensor,  # (B, S, F)
    value: torch.Tensor,  # (B, S, F)
    attention_mask: _Rows,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    batch, heads, rows, head_dim = query.shape
    attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": key.shape[2] // head_dim}
    attributes["scale"] = head_dim**-0.5 if scaling is None else float(scaling)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    mask = attention_mask.mask(sliding_window)
    shape = (batch, rows, heads * head_dim)
    inputs = (_merge_heads(query), key, value, mask)
    out = ops.symbolic("Attention", inputs, attributes, dtype=query.dtype, shape=shape, version=24)
    return out.view(batch, rows, heads, head_dim), None


def _rotary(
    query: torch.Tensor, key: torch.Tensor, cos: _RopeTable, sin: _RopeTable, *_: object, **__: object
) -> tuple[torch.Tensor, torch.Tensor]:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        batch, heads, rows, head_dim = x.shape
        inputs = (_merge_heads(x), cos.table, sin.table, cos.positions)
        shape = (batch, rows, heads * head_dim)
        out = ops.symbolic("RotaryEmbedding", inputs, {"num_heads": heads}, dtype=x.dtype, shape=shape, version=23)
        return out.view(batch, rows, heads, head_dim).transpose(1, 2)

    return rotate(query), rotate(key)


class _RMSNorm(nn.Module):
    """A model's RMSNorm as the standard operator, in float32 inside (``stash_type`` 1)."""

    def __init__(self, scale: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attributes = {"axis": -1, "epsilon": self.epsilon, "stash_type": 1}
        return ops.symbolic("RMSNormalization", (x, self.scale), attributes, dtype=x.dtype, shape=x.shape, version=23)


def _as_operator(norm: nn.Module) -> _RMSNorm | None:
    """The operator that computes what ``norm`` does, or None where it is no RMSNorm. Found by trying, not by name."""
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if "RMSNorm" not in type(norm).__name__ or weight is None or epsilon is None:
        return None
    probe = torch.linspace(-3, 3, 2 * weight.numel()).reshape(2, -1)
    unit = probe * torch.rsqrt(probe.pow(2).mean(-1, keepdim=True) + epsilon)
    with torch.no_grad():
        found = norm(probe.to(weight.dtype)).float()
        for scale in (weight.detach().float(), 1.0 + weight.detach().float()):  # Llama's, and Gemma's (1 + w)
            if torch.allclose(found, unit * scale, rtol=1e-2, atol=1e-2):
                return _RMSNorm(scale.to(weight.dtype), float(epsilon))
    raise UnsupportedModelError(f"{type(norm).__name__}: neither x·w nor x·(1 + w) after scaling: export cannot place it")


def _check_rotary(module: Any) -> None:
    """Refuse a rotary embedding other than the half-rotation over the whole head that ``RotaryEmbedding`` computes."""
    query, angle = torch.linspace(-1, 1, 16).reshape(1, 1, 2, 8), torch.linspace(0, 3, 8).reshape(1, 2, 4)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    turned = torch.cat((-query[..., 4:], query[..., :4]), -1)
    found, _ = module.apply_rotary_pos_emb(query, query, cos, sin)
    if found.shape != query.shape or not torch.allclose(found, query * cos[:, None] + turned * sin[:, None], atol=1e-5):
        raise UnsupportedModelError(f"{module.__name__}: its rotary embedding is not the half-rotation that export writes")


@contextlib.contextmanager
def tracing(model: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, the decoder layers in ``modules`` emit standard operators; afterwards they are as before."""
    AttentionInterface.register(_ATTENTION, _attention)
    source: Any = sys.modules[type(model).__module__]
    _check_rotary(source)
    rotary = source.apply_rotary_pos_emb
    # a balcony is a copy of a layer and has a copy of its configuration
    found = (getattr(child, "config", None) for module in modules for child in module.modules())
    configs = list({id(config): config for config in found if config is not None}.values())
    before = [config._attn_implementation for config in configs]
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in (child for module in modules for child in module.modules()):
        for name, child in parent.named_children():
            if (norm := _as_operator(child)) is not None:
                replaced.append((parent, name, child))
                setattr(parent, name, norm)
    source.apply_rotary_pos_emb = _rotary
    for config in configs:
        config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        source.apply_rotary_pos_emb = rotary
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        for parent, name, child in replaced:
            setattr(parent, name, child)


def _rope_tables(model: PreTrainedModel, parts: Parts, context_length: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """``(cos, sin)`` per layer type, each (context, head_dim / 2), as the model's own rotary module computes them."""
    types = sorted({layer_type(model.config, i) for i in range(len(parts.layers))})
    takes_type = "layer_type" in inspect.signature(parts.rotary.forward).parameters
    probe = torch.zeros(1, 1, 1, dtype=parts.embed.weight.dtype)
    tables = {}
    for kind in types if takes_type else types[:1]:
        with torch.no_grad():
            arguments = (kind,) if takes_type else ()
            cos, sin = parts.rotary(probe, torch.arange(context_length)[None], *arguments)
        half = cos.shape[-1] // 2
        tables[kind] = (cos[0, :, :half].clone(), sin[0, :, :half].clone())
    return {kind: tables.get(kind, tables[types[0]]) for kind in types}


class _Trace(nn.Module):
    """Common to what is traced: the rope tables, and the call of one decoder layer."""

    def __init__(self, model: PreTrainedModel, parts: Parts, context_length: int) -> None:
        super().__init__()
        self.config = model.config
        for kind, (cos, sin) in _rope_tables(model, parts, context_length).items():
            self.register_buffer(f"rope_cos_{kind}", cos)
            self.register_buffer(f"rope_sin_{kind}", sin)

    def _rows(self, start: torch.Tensor, rows: int, capacity: int) -> _Rows:
        return _Rows(start[:, None] + torch.arange(rows)[None, :], capacity, {})

    def _call(self, layer: Any, hidden: torch.Tensor, rows: _Rows, cache: object) -> torch.Tensor:
        kind = layer_type(self.config, layer.self_attn.layer_idx)
        cos = _RopeTable(getattr(self, f"rope_cos_{kind}"), rows.positions)
        sin = _RopeTable(getattr(self, f"rope_sin_{kind}"), rows.positions)
        # transformers renamed this argument during version 5
        keyword = "cache" if "cache" in inspect.signature(layer.forward).parameters else "past_key_values"
        out = layer(hidden, attention_mask=rows, position_embeddings=(cos, sin), **{keyword: cache})
        return out if isinstance(out, torch.Tensor) else out[0]  # type: ignore[no-any-return]


class _Backbone(_Trace):
    """All decoder layers, with the hidden state after each exit layer as an output."""

    def __init__(self, model: PreTrainedModel, parts: Parts, context_length: int, exit_layers: Sequence[int]) -> None:
        super().__init__(model, parts, context_length)
        self.layers = parts.layers
        self.exit_layers = frozenset(exit_layers)

    def forward(self, hidden: torch.Tensor, start: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        rows = self._rows(start, hidden.shape[1], past[0].shape[1])
        cache = _WritingCache({i: (past[2 * i], past[2 * i + 1]) for i in range(len(self.layers))}, start)
        exits = []
        for index, layer in enumerate(self.layers):
            hidden = self._call(layer, hidden, rows, cache)  # (B, T, D)
            if index + 1 in self.exit_layers:
                exits.append(hidden)
        present = [tensor for index in range(len(self.layers)) for tensor in cache.present[index]]
        return (*exits, *present)


class _BalconyTrace(_Trace):
    """A balcony: keys and values for all T rows, the rest of the layer for the last Q of them only.

    The layer is entered twice. The first pass is there for its cache update; its output is not used and the exporter
    drops what only it needed. The second pass asks with the query rows and reads the cache.
    """

    def __init__(self, model: PreTrainedModel, parts: Parts, context_length: int, balcony: Balcony) -> None:
        super().__init__(model, parts, context_length)
        self.layer, self.norm = balcony.layer, balcony.norm

    def forward(
        self, rows: torch.Tensor, queries: torch.Tensor, start: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        index = self.layer.self_attn.layer_idx
        total, asked, capacity = rows.shape[1], queries.shape[1], past_key.shape[1]
        writing = _WritingCache({index: (past_key, past_value)}, start)
        self._call(self.layer, rows, self._rows(start, total, capacity), writing)
        key, value = writing.present[index]
        asking = self._rows(start + (total - asked), asked, capacity)
        hidden = self._call(self.layer, queries, asking, _ReadingCache(key, value))  # (B, Q, D)
        return self.norm(hidden), key, value


def _export(
    module: nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...], inputs: list[str], outputs: list[str]
) -> ir.Model:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # the exporter warns about its own internals (tree specs, axis names that unify); nothing of it is ours
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                arguments,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model


# Sample sizes only give the symbols an example; all differ so that no two symbols unify by accident.
_BATCH, _ROWS, _QUERIES, _CAPACITY = 2, 5, 3, 16


def past_names(layers: Sequence[int]) -> list[str]:
    """KV inputs of these layers in graph order."""
    return [f"past_{what}_{layer}" for layer in layers for what in ("key", "value")]


def trace_backbone(model: PreTrainedModel, parts: Parts, exit_layers: Sequence[int], context_length: int) -> ir.Model:
    """Trace all layers: ``hidden_0``, ``start``, pasts → ``hidden_<e>`` for each exit layer, presents."""
    dtype, depth = parts.embed.weight.dtype, len(parts.layers)
    width = _kv_width(parts.layers[0])
    batch, rows, capacity = (torch.export.Dim(name) for name in ("batch", "rows", "capacity"))
    past = [torch.zeros(_BATCH, _CAPACITY, width, dtype=dtype) for _ in range(2 * depth)]
    hidden = torch.zeros(_BATCH, _ROWS, parts.embed.embedding_dim, dtype=dtype)
    with tracing(model, [parts.layers]):
        return _export(
            _Backbone(model, parts, context_length, exit_layers),
            (hidden, torch.zeros(_BATCH, dtype=torch.int64), past),
            ({0: batch, 1: rows}, {0: batch}, [{0: batch, 1: capacity} for _ in past]),
            ["hidden_0", "start", *past_names(range(depth))],
            [f"hidden_{e}" for e in exit_layers] + [name.replace("past", "present") for name in past_names(range(depth))],
        )


def trace_balcony(model: PreTrainedModel, parts: Parts, balcony: Balcony, context_length: int) -> ir.Model:
    """Trace one balcony: ``rows``, ``queries``, ``start``, past → ``hidden``, present."""
    dtype, width = parts.embed.weight.dtype, _kv_width(balcony.layer)
    batch, rows, queries, capacity = (torch.export.Dim(name) for name in ("batch", "rows", "queries", "capacity"))
    hidden = torch.zeros(_BATCH, _ROWS, parts.embed.embedding_dim, dtype=dtype)
    past = torch.zeros(_BATCH, _CAPACITY, width, dtype=dtype)
    cache_shape = {0: batch, 1: capacity}
    with tracing(model, [balcony]):
        return _export(
            _BalconyTrace(model, parts, context_length, balcony),
            (hidden, hidden[:, :_QUERIES].clone(), torch.zeros(_BATCH, dtype=torch.int64), past, past.clone()),
            ({0: batch, 1: rows}, {0: batch, 1: queries}, {0: batch}, cache_shape, cache_shape),
            ["rows", "queries", "start", "past_key", "past_value"],
            ["hidden", "present_key", "present_value"],
        )


def _kv_width(layer: Any) -> int:
    return int(layer.self_attn.k_proj.weight.shape[0])


def build_norm(parts: Parts) -> ir.Model:
    """The final norm of the full depth: ``hidden`` → ``normed``."""
    norm = _as_operator(parts.norm)
    assert norm is not None
    scale = ir.Value(name="norm.weight", const_value=ir.tensor(norm.scale.detach(), name="norm.weight"))
    hidden = _value("hidden", norm.scale.dtype, ["batch", "queries", parts.embed.embedding_dim])
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", norm.epsilon), ir.AttrInt64("stash_type", 1)]
    node = ir.Node("", "RMSNormalization", [hidden, scale], attributes)
    return _model("norm", [hidden], [node], [scale], {"normed": (node, hidden.dtype, hidden.shape)})


def build_head(model: PreTrainedModel, parts: Parts) -> ir.Model:
    """The LM head: ``hidden`` → ``logits`` in float32.

    The weight stays [V, D] (``Gemm`` with transB), so that a tied token table is stored once and still gathered by rows.
    """
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
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:  # Gemma-2: tanh(logits / cap) * cap
        factor = ir.Value(name="softcap", const_value=ir.tensor(torch.tensor(float(cap)), name="softcap"))
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
        value.shape, value.dtype = ir.Shape(value.const_value.shape), value.const_value.dtype
    graph = ir.Graph(inputs, values, nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name=name)
    return ir.Model(graph, ir_version=11)
