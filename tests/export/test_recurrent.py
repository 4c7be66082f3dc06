"""Recurrent mixers: the traced operators against transformers, and one pass of many rows against many passes of one row."""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from balcony_edge.errors import UnsupportedModelError
from balcony_export.graph import passes
from balcony_export.graph.recurrent import mixers
from balcony_export.graph.recurrent.mixers import RecurrentCache, tracing_mixers
from balcony_export.graph.recurrent.norms import gated_norm_operator
from balcony_export.graph.recurrent.passes import tidy_mixers
from balcony_export.graph.trace import _export
from balcony_export.model.architecture import cast_weights
from tests.export.recurrent_models import CHUNKS, MODELS, mixer_of, portable, session, states_of, tiny

Array = npt.NDArray[np.float32]


class _Mixer(nn.Module):
    """A mixer as a stage calls it."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, rows: torch.Tensor, window: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = RecurrentCache({0: window}, {0: state})
        return self.mixer(rows, cache=cache), cache.new_windows[0], cache.new_states[0]


def trace_mixer(model: Any, mixer: nn.Module, window: torch.Tensor, state: torch.Tensor) -> ir.Model:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("rows")
    with tracing_mixers(model, [model.get_decoder().layers]):
        traced = _export(
            _Mixer(mixer),
            (torch.zeros(2, 5, 64, dtype=window.dtype), window, state),
            ({0: batch, 1: length}, {0: batch}, {0: batch}),
            ["rows", "past_window", "past_state"],
            ["out", "present_window", "present_state"],
        )
    passes.collapse_reshapes(traced)
    tidy_mixers(traced)
    return traced


@functools.cache
def traced_mixer(name: str) -> ir.Model:
    return trace_mixer(tiny(name), mixer_of(name), *states_of(name, 2))


@functools.cache
def sessions(name: str) -> dict[str, Any]:
    traced = traced_mixer(name)
    return {"lowered": session(traced), "portable": session(portable(traced))}


def run_mixer(one: Any, rows: Array, chunks: Sequence[int], name: str) -> tuple[Array, Array, Array]:
    """Outputs of rows that are given in chunks, and the last window and state."""
    window, state = (tensor.numpy() for tensor in states_of(name, len(rows)))
    outputs, first = [], 0
    for chunk in chunks:
        given = {"rows": rows[:, first : first + chunk], "past_window": window, "past_state": state}
        out, window, state = one.run(None, given)
        outputs.append(out)
        first += chunk
    return np.concatenate(outputs, 1), window, state


@pytest.mark.parametrize("form", ("lowered", "portable"))
@pytest.mark.parametrize("name", MODELS)
def test_a_mixer_equals_transformers_in_any_chunks(name: str, form: str) -> None:
    rows = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=tiny(name).config)
    with torch.no_grad():
        expected = mixer_of(name)(rows).numpy()
        decoded = torch.cat([mixer_of(name)(rows[:, i : i + 1], cache=cache) for i in range(21)], 1).numpy()
    window = cache.layers[0].conv_states[0][..., 1:].numpy()
    state = cache.layers[0].recurrent_states[0]
    state = (state[..., None] if state.dim() == 3 else state if "qwen" in name else state.mT).numpy()
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=bound)
    for chunks in CHUNKS.values():
        out, new_window, new_state = run_mixer(sessions(name)[form], rows.numpy(), chunks, name)
        np.testing.assert_allclose(out, expected, rtol=0, atol=bound)
        np.testing.assert_allclose(new_window, window, rtol=0, atol=1e-5 * np.abs(window).max())
        np.testing.assert_allclose(new_state, state, rtol=0, atol=1e-5 * np.abs(state).max())


@pytest.mark.parametrize("name", MODELS)
def test_lowered_a_mixer_has_equal_bits_in_any_chunks(name: str) -> None:
    rows = np.random.default_rng(2).standard_normal((1, 21, 64)).astype(np.float32)
    whole, *others = [run_mixer(sessions(name)["lowered"], rows, chunks, name) for chunks in CHUNKS.values()]
    for other in others:
        for one, two in zip(whole, other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(("rule", "width"), (("gated", 32), ("gated", 64), ("gated_delta", 128)))
def test_the_operators_have_equal_bits_in_any_chunks_at_real_sizes(rule: str, width: int) -> None:
    """From 4,096 values a head on, ONNX Runtime's ``LinearAttention`` computes with other kernels than in tiny models."""
    groups, heads, size, channels, length = 2, 4, 128, 192, 21
    generator = np.random.default_rng(3)
    names = ["query", "key", "value", "state", "decay", *(["beta"] if rule == "gated_delta" else [])]
    attention = ir.Node(
        mixers.MICROSOFT,
        "LinearAttention",
        [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in names],
        ir.convenience.convert_attributes(
            {"update_rule": rule, "q_num_heads": groups, "kv_num_heads": heads, "scale": 0.5}
        ),
        num_outputs=2,
    )
    convolution = ir.Node(
        mixers.MICROSOFT,
        "CausalConvWithState",
        [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("x", "weight", "bias", "window")],
        [],
        num_outputs=2,
    )
    outputs = [*attention.outputs, *convolution.outputs]
    for value, name in zip(outputs, ("out", "new_state", "y", "new_window"), strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    nodes = [attention, convolution]
    inputs = [value for node in nodes for value in node.inputs if value is not None]
    opsets = {"": 24, mixers.MICROSOFT: 1}
    one = session(ir.Model(ir.Graph(inputs, outputs, nodes=nodes, opset_imports=opsets), ir_version=11))

    def random(*shape: int) -> Array:
        return generator.standard_normal(shape).astype(np.float32)

    given = {
        "query": random(1, length, groups * size) / size**0.5,
        "key": random(1, length, groups * size) / size**0.5,
        "value": random(1, length, heads * width),
        "decay": -np.abs(random(1, length, heads)),
        "beta": 1 / (1 + np.exp(-random(1, length, heads))),
        "x": random(1, channels, length),
    }
    given = {name: array for name, array in given.items() if name in names or name == "x"}
    fixed = {"weight": random(channels, 1, 4), "bias": random(channels)}
    start = {"state": random(1, heads, size, width), "window": random(1, channels, 3)}

    def run(chunks: Sequence[int]) -> list[Array]:
        carried, first, outs, convolved = start, 0, [], []
        for chunk in chunks:
            part = slice(first, first + chunk)
            rows = {name: array[..., part] if name == "x" else array[:, part] for name, array in given.items()}
            out, state, y, window = one.run(None, rows | fixed | carried)
            carried, first = {"state": state, "window": window}, first + chunk
            outs.append(out)
            convolved.append(y)
        return [np.concatenate(outs, 1), np.concatenate(convolved, 2), carried["state"], carried["window"]]

    whole, *others = [run(chunks) for chunks in CHUNKS.values()]
    for other in others:
        for first, second in zip(whole, other, strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ("qwen3.5", "falcon-h1-norm"))
def test_half_precision_keeps_the_state_in_float32(name: str) -> None:
    rows = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = mixer_of(name)(rows).numpy()
    model = copy.deepcopy(tiny(name))
    cast_weights(model, torch.float16)
    window, state = states_of(name, 2)
    traced = trace_mixer(model, getattr(model.get_decoder().layers[0], MODELS[name][3]), window.half(), state)
    given = {"rows": rows.half().numpy(), "past_window": window.half().numpy(), "past_state": state.numpy()}
    out, new_window, new_state = session(portable(traced)).run(None, given)
    assert (out.dtype, new_window.dtype, new_state.dtype) == (np.float16, np.float16, np.float32)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-2 * np.abs(expected).max())  # a norm enlarges small rows


def test_large_decays_make_no_denormal_numbers() -> None:
    """A state that a row all but forgets stays out of the range that a CPU computes slowly."""
    least = np.exp(np.float32(mixers._LEAST_DECAY))
    assert 0 < least * 1e-9 > np.finfo(np.float32).tiny
    (clamp,) = [node for node in traced_mixer("bamba").graph if node.op_type == "Clip"]
    assert clamp.inputs[1] is not None and clamp.inputs[1].const_value is not None
    assert float(clamp.inputs[1].const_value.numpy()) == mixers._LEAST_DECAY


@pytest.mark.parametrize("name", ("mamba2_chunk_scan", "torch_chunk_gated_delta_rule", "causal_conv1d_fn"))
def test_another_recurrence_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3.5" if "delta" in name else "bamba")
    source: Any = sys.modules[type(model).__module__]
    function = getattr(source, name)

    @functools.wraps(function)
    def other(*given: Any, **options: Any) -> Any:
        result = function(*given, **options)
        return result * 1.01 if isinstance(result, torch.Tensor) else (result[0], result[1] * 1.01)

    monkeypatch.setattr(source, name, other)
    with (
        pytest.raises(UnsupportedModelError, match=f"{name} computes something else"),
        tracing_mixers(model, []),
    ):
        pass


def test_another_gated_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = mixer_of("bamba").norm
    forward = type(norm).forward
    monkeypatch.setattr(type(norm), "forward", lambda self, x, gate: forward(self, x, gate.tanh()))
    with pytest.raises(UnsupportedModelError, match="norms neither"):
        gated_norm_operator(norm)


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = tiny("falcon-h1-norm")
    source: Any = sys.modules[type(model).__module__]
    before = (source.mamba2_chunk_scan, source.causal_conv1d_fn, mixer_of("falcon-h1-norm").norm)
    with pytest.raises(RuntimeError, match="stop"), tracing_mixers(model, [model]):
        assert mixer_of("falcon-h1-norm").norm is not before[2]
        raise RuntimeError("stop")
    assert (source.mamba2_chunk_scan, source.causal_conv1d_fn, mixer_of("falcon-h1-norm").norm) == before


def test_a_mixer_is_two_operators_and_few_others() -> None:
    """For one row each node costs microseconds, so that many of them cost more than the mixer."""
    counts = {name: Counter(node.op_type for node in traced_mixer(name).graph) for name in ("granite", "qwen3-next")}
    for name, count in counts.items():
        assert count["LinearAttention"] == count["CausalConvWithState"] == 1, name
        assert "Shape" not in count
        assert "Where" not in count and "GatedRMSNorm" not in count
    assert counts["granite"].total() <= 32 and counts["qwen3-next"].total() <= 38
    for name in counts:
        weights = traced_mixer(name).graph.initializers
        assert "mixer.conv1d.weight" in weights
        assert all(node.domain == "" for node in portable(traced_mixer(name)).graph)
