"""Trace the backbone and the balconies of a Hugging Face causal LM into ONNX graphs (opset 24).

Owns how the layers are called for a trace, with the rows, KV caches and rope tables of the I/O tables in
:mod:`balcony_edge.bundle.manifest`. The operators that they emit are :mod:`.operators`; graphs without layers are :mod:`.head`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from balcony_export.graph.operators import ReadingCache, RopeTable, RowPositions, WritingCache, tracing
from balcony_export.model.balcony import Balcony
from balcony_export.model.exits import ExitModel, call_layer

OPSET = 24


class _Trace(nn.Module):
    """Base of the traced modules: the rope tables, and the call of one decoder layer."""

    def __init__(self, exits: ExitModel, context_length: int) -> None:
        super().__init__()
        self.layer_type = exits.layer_type
        for kind, (cos, sin) in exits.rotary_tables(context_length).items():
            self.register_buffer(f"rope_cos_{kind}", cos)
            self.register_buffer(f"rope_sin_{kind}", sin)

    def _rows(self, start: torch.Tensor, rows: int, capacity: int) -> RowPositions:
        return RowPositions(start[:, None] + torch.arange(rows)[None, :], capacity, {})

    def _call(self, layer: Any, hidden: torch.Tensor, rows: RowPositions, cache: object) -> torch.Tensor:
        kind = self.layer_type(layer)
        cos = RopeTable(getattr(self, f"rope_cos_{kind}"), rows.positions)
        sin = RopeTable(getattr(self, f"rope_sin_{kind}"), rows.positions)
        return call_layer(layer, hidden, rows, (cos, sin), cache)


class _Backbone(_Trace):
    """All decoder layers, with the hidden state after each exit layer as an output."""

    def __init__(self, exits: ExitModel, context_length: int) -> None:
        super().__init__(exits, context_length)
        self.layers = exits.parts.layers
        self.exit_layers = frozenset(exits.exit_layers)

    def forward(self, hidden: torch.Tensor, start: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        rows = self._rows(start, hidden.shape[1], past[0].shape[1])
        cache = WritingCache({i: (past[2 * i], past[2 * i + 1]) for i in range(len(self.layers))}, start)
        exits = []
        for index, layer in enumerate(self.layers):
            hidden = self._call(layer, hidden, rows, cache)  # (B, T, D)
            if index + 1 in self.exit_layers:
                exits.append(hidden)
        present = [tensor for index in range(len(self.layers)) for tensor in cache.present[index]]
        return (*exits, *present)


class _BalconyTrace(_Trace):
    """A balcony: keys and values for all T rows, the rest of the layer for the last Q rows only.

    The layer is called twice. The first call is only for its cache update: its output is not used, and the tracer drops the
    operations that only the output needs. The second call has the query rows and reads the cache.
    """

    def __init__(self, exits: ExitModel, context_length: int, balcony: Balcony) -> None:
        super().__init__(exits, context_length)
        self.layer: Any = balcony.layer
        self.norm = balcony.norm

    def forward(
        self,
        rows: torch.Tensor,
        queries: torch.Tensor,
        start: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        index = self.layer.self_attn.layer_idx
        total, asked, capacity = rows.shape[1], queries.shape[1], past_key.shape[1]
        writing = WritingCache({index: (past_key, past_value)}, start)
        self._call(self.layer, rows, self._rows(start, total, capacity), writing)
        key, value = writing.present[index]
        asking = self._rows(start + (total - asked), asked, capacity)
        hidden = self._call(self.layer, queries, asking, ReadingCache(key, value))  # (B, Q, D)
        return self.norm(hidden), key, value


class _StatelessTrace(_Trace):
    """An exit without attention: an MLP, or the norm alone."""

    def __init__(self, exits: ExitModel, context_length: int, balcony: Balcony) -> None:
        super().__init__(exits, context_length)
        self.layer: Any = balcony.layer
        self.norm = balcony.norm

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
        with warnings.catch_warnings(), torch.no_grad():
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


def past_names(layers: Sequence[int]) -> list[str]:
    """KV inputs of these layers in graph order."""
    return [f"past_{what}_{layer}" for layer in layers for what in ("key", "value")]


def trace_backbone(exits: ExitModel, context_length: int) -> ir.Model:
    """Trace all layers: ``hidden_0``, ``start``, pasts → ``hidden_<e>`` for each exit layer, presents."""
    parts, depth = exits.parts, exits.depth
    dtype = parts.embed.weight.dtype
    width = _kv_width(parts.layers[0])
    batch, rows, capacity = (torch.export.Dim(name) for name in ("batch", "rows", "capacity"))
    past = [torch.zeros(_BATCH, _CAPACITY, width, dtype=dtype) for _ in range(2 * depth)]
    hidden = torch.zeros(_BATCH, _ROWS, parts.embed.embedding_dim, dtype=dtype)
    with tracing(exits.model, [parts.layers]):
        return _export(
            _Backbone(exits, context_length),
            (hidden, torch.zeros(_BATCH, dtype=torch.int64), past),
            ({0: batch, 1: rows}, {0: batch}, [{0: batch, 1: capacity} for _ in past]),
            ["hidden_0", "start", *past_names(range(depth))],
            [f"hidden_{e}" for e in exits.exit_layers]
            + [name.replace("past", "present") for name in past_names(range(depth))],
        )


def trace_balcony(exits: ExitModel, exit_layer: int, context_length: int) -> ir.Model:
    """Trace one balcony: ``rows``, ``queries``, ``start``, past → ``hidden``, present.

    A balcony without attention: ``hidden`` → ``normed``.
    """
    parts, balcony = exits.parts, exits.balconies[exit_layer]
    dtype = parts.embed.weight.dtype
    if not balcony.keeps_rows:
        example = torch.zeros(_BATCH, _QUERIES, parts.embed.embedding_dim, dtype=dtype)
        shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("queries")}
        with tracing(exits.model, [balcony]):
            module = _StatelessTrace(exits, context_length, balcony)
            return _export(module, (example,), (shape,), ["hidden"], ["normed"])
    width = _kv_width(balcony.layer)
    batch, rows, queries, capacity = (torch.export.Dim(name) for name in ("batch", "rows", "queries", "capacity"))
    hidden = torch.zeros(_BATCH, _ROWS, parts.embed.embedding_dim, dtype=dtype)
    past = torch.zeros(_BATCH, _CAPACITY, width, dtype=dtype)
    cache_shape = {0: batch, 1: capacity}
    with tracing(exits.model, [balcony]):
        return _export(
            _BalconyTrace(exits, context_length, balcony),
            (hidden, hidden[:, :_QUERIES].clone(), torch.zeros(_BATCH, dtype=torch.int64), past, past.clone()),
            ({0: batch, 1: rows}, {0: batch, 1: queries}, {0: batch}, cache_shape, cache_shape),
            ["rows", "queries", "start", "past_key", "past_value"],
            ["hidden", "present_key", "present_value"],
        )


def _kv_width(layer: Any) -> int:
    return int(layer.self_attn.k_proj.weight.shape[0])
