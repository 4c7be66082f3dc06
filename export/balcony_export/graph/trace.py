"""Trace the backbone and the balconies of a Hugging Face causal LM into ONNX graphs (opset 24).

Owns how the layers are called for a trace, with the rows, KV caches and rope tables of the I/O tables in
:mod:`balcony_edge.bundle.manifest`. The operators that they emit are :mod:`.operators`; graphs without layers are :mod:`.head`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch._dynamo.config
from torch import nn

from balcony_edge.bundle.manifest import STATES, ModelSpec, is_state
from balcony_export.graph.caches import ReadingCache, WritingCache
from balcony_export.graph.operators import RopeTable, RowPositions, tracing
from balcony_export.graph.recurrent.mixers import tracing_mixers
from balcony_export.model.balcony import Balcony
from balcony_export.model.exits import ExitModel, call_layer
from balcony_export.model.layer import layer_index, memory_of

OPSET = 24


class _Trace(nn.Module):
    """Base of the traced modules: the rope tables, the parts of a balcony, and the call of one decoder layer."""

    def __init__(self, exits: ExitModel, context_length: int, balcony: Balcony | None = None) -> None:
        super().__init__()
        self.layer_type = exits.layer_type
        for kind, (cos, sin) in exits.rotary_tables(context_length).items():
            self.register_buffer(f"rope_cos_{kind}", cos)
            self.register_buffer(f"rope_sin_{kind}", sin)
        if balcony is not None:
            self.layer: Any = balcony.layer
            self.norm = balcony.norm

    def _rows(self, start: torch.Tensor, rows: int, capacity: int) -> RowPositions:
        return RowPositions(start, start[:, None] + torch.arange(rows)[None, :], capacity, {}, {})

    def _call(self, layer: Any, hidden: torch.Tensor, rows: RowPositions, cache: object) -> torch.Tensor:
        kind = self.layer_type(layer)
        mask = rows if memory_of(layer).attention else None
        rotary = None
        if hasattr(self, f"rope_cos_{kind}"):
            tables = getattr(self, f"rope_cos_{kind}"), getattr(self, f"rope_sin_{kind}")
            rotary = RopeTable(tables[0], rows.positions), RopeTable(tables[1], rows.positions)
        return call_layer(layer, hidden, mask, rotary, cache)

    @staticmethod
    def _capacity(parts: Sequence[str], past: Sequence[torch.Tensor]) -> int:
        """Rows of what the layers keep; 1 if they keep only states."""
        return next((kept.shape[1] for part, kept in zip(parts, past, strict=True) if part not in STATES), 1)


class _Backbone(_Trace):
    """All decoder layers, with the hidden state after each exit layer as an output."""

    def __init__(self, exits: ExitModel, context_length: int) -> None:
        super().__init__(exits, context_length)
        self.layers = exits.parts.layers
        self.memory = [memory_of(layer).parts for layer in self.layers]
        self.exit_layers = frozenset(exits.exit_layers)

    def forward(self, hidden: torch.Tensor, start: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        rows = self._rows(start, hidden.shape[1], self._capacity(sum(self.memory, ()), past))
        tensors = iter(past)
        kept = {i: {part: next(tensors) for part in parts} for i, parts in enumerate(self.memory)}
        cache = WritingCache(kept, rows)
        exits = []
        for index, layer in enumerate(self.layers):
            hidden = self._call(layer, hidden, rows, cache)  # (B, T, D)
            if index + 1 in self.exit_layers:
                exits.append(hidden)
        present = [tensor for index in range(len(self.layers)) for tensor in cache.present(index)]
        return (*exits, *present)


class _BalconyTrace(_Trace):
    """A balcony: what it keeps (keys and values) for all T rows, the rest of the layer for the last Q rows only.

    The layer is called twice. The first call is only for its cache update: its output is not used, and the tracer drops the
    operations that only the output needs. The second call has the query rows and reads the cache.
    """

    def forward(
        self,
        rows: torch.Tensor,
        queries: torch.Tensor,
        start: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        index = layer_index(self.layer)
        total, asked, capacity = rows.shape[1], queries.shape[1], self._capacity(memory_of(self.layer).parts, past)
        taken = self._rows(start, total, capacity)
        writing = WritingCache({index: dict(zip(memory_of(self.layer).parts, past, strict=True))}, taken)
        self._call(self.layer, rows, taken, writing)
        asking = self._rows(start + (total - asked), asked, capacity)
        hidden = self._call(self.layer, queries, asking, ReadingCache(writing, asking))  # (B, Q, D)
        return self.norm(hidden), *writing.present(index)


class _StatelessTrace(_Trace):
    """An exit without attention: an MLP, or the norm alone."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.layer is not None:
            rows = self._rows(torch.zeros(hidden.shape[0], dtype=torch.int64), hidden.shape[1], 1)
            hidden = self._call(self.layer, hidden, rows, None)
        normed: torch.Tensor = self.norm(hidden)
        return normed


def _export(
    module: nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...], inputs: list[str], outputs: list[str]
) -> ir.Model:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # With symbolic sizes, a look-up in the cache of fake tensors takes longer than the result (docs/LOG.md, "Tests").
        uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
        with uncached, warnings.catch_warnings(), torch.no_grad():
            # the tracer warns about its own internals (tree specs, axis names that unify)
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


# Sample sizes are only examples of the symbols. All differ, so that no two symbols unify by accident.
_BATCH, _ROWS, _QUERIES, _CAPACITY = 2, 5, 3, 16


def past_names(spec: ModelSpec, layers: Sequence[int]) -> list[str]:
    """Inputs of what these layers keep, in graph order."""
    return [f"past_{part}_{layer}" for layer in layers for part in spec.memory(layer).parts]


def trace_backbone(exits: ExitModel, spec: ModelSpec) -> ir.Model:
    """Trace all layers: ``hidden_0``, ``start``, pasts → ``hidden_<e>`` for each exit layer, presents."""
    parts, depth = exits.parts, exits.depth
    dtype = parts.embed.weight.dtype
    names = past_names(spec, range(depth))
    batch, rows, capacity = (torch.export.Dim(name) for name in ("batch", "rows", "capacity"))
    past = [tensor for layer in range(depth) for tensor in _memory(spec, layer, dtype)]
    hidden = torch.zeros(_BATCH, _ROWS, parts.embed.embedding_dim, dtype=dtype)
    with tracing_mixers(exits.model, [parts.layers]), tracing(exits.model, [parts.layers]):
        return _export(
            _Backbone(exits, spec.context_length),
            (hidden, torch.zeros(_BATCH, dtype=torch.int64), past),
            ({0: batch, 1: rows}, {0: batch}, [_dynamic(name, batch, capacity) for name in names]),
            ["hidden_0", "start", *names],
            [f"hidden_{e}" for e in exits.exit_layers] + [name.replace("past", "present") for name in names],
        )


def trace_balcony(exits: ExitModel, exit_layer: int, spec: ModelSpec, traced: Mapping[int, ir.Model]) -> ir.Model:
    """Trace one balcony: ``rows``, ``queries``, ``start``, past → ``hidden``, present.

    A balcony without attention: ``hidden`` → ``normed``. ``traced`` has graphs of the model's other balconies, as they came
    from here. The graph of one with the same structure is used again, with this balcony's weights.
    """
    parts, balcony = exits.parts, exits.balconies[exit_layer]
    dtype = parts.embed.weight.dtype
    for other, model in traced.items():
        if (found := _with_weights_of(balcony, exits.balconies[other], model)) is not None:
            return found
    if not balcony.keeps_rows:
        example = torch.zeros(_BATCH, _QUERIES, parts.embed.embedding_dim, dtype=dtype)
        shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("queries")}
        with tracing_mixers(exits.model, [balcony]), tracing(exits.model, [balcony]):
            module = _StatelessTrace(exits, spec.context_length, balcony)
            return _export(module, (example,), (shape,), ["hidden"], ["normed"])
    past = _memory(spec, exits.copied, dtype)
    names = [f"past_{part}" for part in spec.memory(exits.copied).parts]
    batch, rows, queries, capacity = (torch.export.Dim(name) for name in ("batch", "rows", "queries", "capacity"))
    hidden = torch.zeros(_BATCH, _ROWS, parts.embed.embedding_dim, dtype=dtype)
    with tracing_mixers(exits.model, [balcony]), tracing(exits.model, [balcony]):
        return _export(
            _BalconyTrace(exits, spec.context_length, balcony),
            (hidden, hidden[:, :_QUERIES].clone(), torch.zeros(_BATCH, dtype=torch.int64), past),
            (
                {0: batch, 1: rows},
                {0: batch, 1: queries},
                {0: batch},
                [_dynamic(name, batch, capacity) for name in names],
            ),
            ["rows", "queries", "start", *names],
            ["hidden", *(name.replace("past", "present") for name in names)],
        )


def _with_weights_of(balcony: Balcony, other: Balcony, traced: ir.Model) -> ir.Model | None:
    """The graph of another balcony with the weights of this one.

    None if the two are built differently, or if a weight of the other is not in its graph as it is: the tracer computes with
    some, splits some, and merges small ones of equal values.
    """

    def built(one: Balcony) -> tuple[Any, ...]:
        return one.kind, one.copies, repr(one), [(name, p.shape, p.dtype) for name, p in one.named_parameters()]

    if built(balcony) != built(other):
        return None
    if any(not torch.equal(*pair) for pair in zip(balcony.buffers(), other.buffers(), strict=True)):
        return None
    weights, others = dict(balcony.named_parameters()), dict(other.named_parameters())
    places = {weight.data_ptr(): name for name, weight in others.items()}
    found, seen = traced.clone(), set()
    for value in found.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        name = places.get(array.ctypes.data)
        if name is None:
            continue
        weight = weights[name].detach()
        if array.size != weight.numel() or not (array.flags.c_contiguous or array.ndim == 2):
            return None
        value.const_value = ir.tensor(weight if array.flags.c_contiguous else weight.T, name=value.name)
        seen.add(name)
    return found if seen == others.keys() else None


def _dynamic(name: str, batch: Any, capacity: Any) -> dict[int, Any]:
    """The symbolic dimensions of something that a layer keeps."""
    return {0: batch} if is_state(name) else {0: batch, 1: capacity}


def _memory(spec: ModelSpec, layer: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Examples of what a layer keeps."""
    return [
        torch.zeros(_BATCH, *(() if part in STATES else (_CAPACITY,)), *spec.sizes(part, layer)).to(
            torch.float32 if part == "state" else dtype
        )
        for part in spec.memory(layer).parts
    ]
