"""Whole backbones and balconies with recurrent mixers, traced and run against transformers."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from balcony_export.graph import passes
from balcony_export.graph.operators import RopeTable, RowPositions, WritingCache, tracing
from balcony_export.graph.recurrent.mixers import ReadingRecurrentCache, RecurrentCache, tracing_mixers
from balcony_export.graph.recurrent.passes import tidy_mixers
from balcony_export.graph.trace import _export
from balcony_export.model.exits import call_layer
from tests.export.recurrent_models import CHUNKS, MODELS, portable, session, states_of, tiny


def layers_of(name: str) -> Any:
    return tiny(name).get_decoder().layers


def is_attention(layer: nn.Module) -> bool:
    return getattr(layer, "self_attn", None) is not None


class _HybridCache(WritingCache, RecurrentCache):
    """What a stage's layers keep: keys and values, or a window and a state, or both (Falcon-H1)."""

    def __init__(self, pasts: dict[int, dict[str, torch.Tensor]], start: torch.Tensor) -> None:
        attention = {i: (past["key"], past["value"]) for i, past in pasts.items() if "key" in past}
        WritingCache.__init__(self, attention, start)
        recurrent_layers = {i: past for i, past in pasts.items() if "state" in past}
        windows = {i: past["window"] for i, past in recurrent_layers.items()}
        RecurrentCache.__init__(self, windows, {i: past["state"] for i, past in recurrent_layers.items()})

    def presents(self) -> list[torch.Tensor]:
        """New contents, in the order of the inputs."""
        found = []
        for layer in sorted({*self.past, *self.states}):
            found += self.present[layer] if layer in self.past else ()
            found += [self.new_windows[layer], self.new_states[layer]] if layer in self.states else []
        return found


class _Backbone(nn.Module):
    """All layers of a model between its token table and its final norm."""

    def __init__(self, name: str, context: int) -> None:
        super().__init__()
        decoder = tiny(name).get_decoder()
        self.layers = decoder.layers
        self.tables: tuple[torch.Tensor, torch.Tensor] | None = None
        if getattr(decoder, "rotary_emb", None) is not None:
            cos, sin = decoder.rotary_emb(torch.zeros(1, 1, 1), torch.arange(context)[None])
            self.tables = (cos[0, :, : cos.shape[-1] // 2], sin[0, :, : cos.shape[-1] // 2])

    def forward(
        self, hidden: torch.Tensor, start: torch.Tensor, pasts: list[dict[str, torch.Tensor]]
    ) -> tuple[torch.Tensor, ...]:
        capacity = next((past["key"].shape[1] for past in pasts if "key" in past), 1)
        rows = RowPositions(start[:, None] + torch.arange(hidden.shape[1])[None], capacity, {})
        rotary = None if self.tables is None else tuple(RopeTable(table, rows.positions) for table in self.tables)
        cache = _HybridCache(dict(enumerate(pasts)), start)
        for layer in self.layers:
            hidden = call_layer(layer, hidden, rows, rotary, cache)  # type: ignore[arg-type]
        return (hidden, *cache.presents())


CAPACITY = 32


def kept(name: str, batch: int) -> list[dict[str, torch.Tensor]]:
    """Empty memory of every layer."""
    window, state = states_of(name, batch)
    found = []
    for layer in layers_of(name):
        past: dict[str, torch.Tensor] = {}
        if is_attention(layer):
            width = layer.self_attn.k_proj.weight.shape[0]
            past |= {"key": torch.zeros(batch, CAPACITY, width), "value": torch.zeros(batch, CAPACITY, width)}
        if hasattr(layer, MODELS[name][3]) and getattr(layer, MODELS[name][3]) is not None:
            past |= {"window": window.clone(), "state": state.clone()}  # each an input of its own
        found.append(past)
    return found


def memory_names(name: str) -> list[str]:
    return [f"past_{what}_{index}" for index, past in enumerate(kept(name, 1)) for what in past]


@functools.cache
def traced_backbone(name: str) -> ir.Model:
    model, pasts = tiny(name), kept(name, 2)
    batch, length, capacity = (torch.export.Dim(one) for one in ("batch", "rows", "capacity"))
    shapes = [
        {key: {0: batch, 1: capacity} if key in ("key", "value") else {0: batch} for key in past} for past in pasts
    ]
    layers, names = layers_of(name), memory_names(name)
    with tracing_mixers(model, [layers]), tracing(model, [layers]):
        traced = _export(
            _Backbone(name, 64),
            (torch.zeros(2, 5, 64), torch.zeros(2, dtype=torch.int64), pasts),
            ({0: batch, 1: length}, {0: batch}, shapes),
            ["hidden_0", "start", *names],
            ["hidden_3", *(one.replace("past", "present") for one in names)],
        )
    passes.name_weights(traced)
    passes.collapse_reshapes(traced)
    tidy_mixers(traced)
    return traced


@pytest.mark.parametrize("name", ("mamba2", "bamba", "granite", "falcon-h1", "qwen3-next", "qwen3.5"))
def test_a_whole_backbone_equals_transformers(name: str) -> None:
    model, tokens = tiny(name), torch.randint(1, 320, (2, 21), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    decoder, table = model.get_decoder(), model.get_input_embeddings()
    norm = next(getattr(decoder, one) for one in ("norm", "final_layernorm", "norm_f") if hasattr(decoder, one))
    config = model.config
    factor = getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
    for form in (traced_backbone(name), portable(traced_backbone(name))):
        one, logits, first = session(form), [], 0
        memory = dict(
            zip(memory_names(name), (x.numpy() for past in kept(name, 2) for x in past.values()), strict=True)
        )
        wanted = {value.name for value in one.get_inputs()}
        for chunk in CHUNKS["mixed"]:
            with torch.no_grad():
                hidden = table(tokens[:, first : first + chunk]) * getattr(decoder, "embedding_multiplier", 1.0)
            given = {"hidden_0": hidden.numpy(), "start": np.full(2, first)} | memory
            out, *presents = one.run(None, {key: array for key, array in given.items() if key in wanted})
            memory = dict(zip(memory, presents, strict=True))
            with torch.no_grad():
                logits.append(model.get_output_embeddings()(norm(torch.from_numpy(out))).numpy() * factor)
            first += chunk
        np.testing.assert_allclose(np.concatenate(logits, 1), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


class _Balcony(nn.Module):
    """A layer of which only the last rows are asked for: the recurrence takes all rows, the rest the queries."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, rows: torch.Tensor, queries: torch.Tensor, window: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        written = RecurrentCache({0: window}, {0: state})
        call_layer(self.layer, rows, None, None, written)  # type: ignore[arg-type]
        reading = ReadingRecurrentCache(written, queries.shape[1])
        hidden = call_layer(self.layer, queries, None, None, reading)  # type: ignore[arg-type]
        return hidden, written.new_windows[0], written.new_states[0]


@pytest.mark.parametrize("name", ("mamba2", "qwen3.5"))
def test_a_balcony_computes_the_rest_for_its_queries_only(name: str) -> None:
    model, layer = tiny(name), layers_of(name)[0]
    window, state = states_of(name, 2)
    rows = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = layer(rows, **({} if name == "mamba2" else {"position_embeddings": None}))
    batch, length, queries = (torch.export.Dim(one) for one in ("batch", "rows", "queries"))
    with tracing_mixers(model, [layer]), tracing(model, [layer]):
        traced = _export(
            _Balcony(layer),
            (rows[:, :5], rows[:, :3].clone(), window, state),
            ({0: batch, 1: length}, {0: batch, 1: queries}, {0: batch}, {0: batch}),
            ["rows", "queries", "past_window", "past_state"],
            ["hidden", "present_window", "present_state"],
        )
    passes.collapse_reshapes(traced)
    tidy_mixers(traced)
    counts = Counter(node.op_type for node in traced.graph)
    assert counts["LinearAttention"] == counts["CausalConvWithState"] == 1
    outputs = [node for node in traced.graph if node.op_type == "MatMul" and "out_proj" in str(node.metadata_props)]
    assert len(outputs) == 1
    one = session(traced)
    given = {"rows": rows, "past_window": window, "past_state": state}
    out = one.run(["hidden"], {"queries": rows[:, -3:].numpy(), **{key: x.numpy() for key, x in given.items()}})[0]
    np.testing.assert_allclose(out, expected[:, -3:].numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))
