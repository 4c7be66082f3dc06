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

from balcony_edge.bundle.manifest import LayerMemory
from balcony_edge.errors import InputError, UnsupportedModelError
from balcony_export.graph import passes
from balcony_export.graph.recurrent import mixers
from balcony_export.graph.recurrent.mixers import RecurrentCache, tracing_mixers
from balcony_export.graph.recurrent.norms import gated_norm_operator
from balcony_export.graph.recurrent.passes import tidy_mixers, write_in_standard_operators
from balcony_export.graph.trace import _export
from balcony_export.model.architecture import cast_weights
from balcony_export.model.balcony import init_balconies
from balcony_export.model.layer import memory_of
from balcony_runtime.backends.onnxruntime.backend import open_session
from tests.conftest import tiny_model

pytestmark = pytest.mark.model  # each test traces layers

Array = npt.NDArray[np.float32]
_ATTENTION: dict[str, Any] = {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
_KINDS = ["linear_attention", "full_attention", "linear_attention"]
#: Name → (architecture of tests/conftest.py, what sets this model of three layers apart, name of the mixer in a layer).
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba2": ("mamba2", {"head_dim": 32}, "mixer"),
    "bamba": ("bamba", {**_ATTENTION, "attn_layer_indices": [1]}, "mamba"),
    "granite": ("granite-hybrid", {**_ATTENTION, "mamba_n_groups": 1, "layer_types": _KINDS}, "mamba"),
    "falcon-h1": (
        "falcon-h1",
        {
            **_ATTENTION,
            "mamba_d_ssm": 128,
            "embedding_multiplier": 3.0,
            "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 0.8,
            "ssm_multipliers": [0.5, 0.8, 1.2, 0.9, 1.1],
            "ssm_in_multiplier": 1.3,
            "mlp_multipliers": [0.9, 1.1],
        },
        "mamba",
    ),
    "falcon-h1-norm": (
        "falcon-h1",
        {**_ATTENTION, "mamba_d_ssm": 128, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
        "mamba",
    ),
    "qwen3-next": (
        "qwen3-next",
        {
            **_ATTENTION,
            "layer_types": _KINDS,
            "mlp_only_layers": [0, 1, 2],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 24,
        },
        "linear_attn",
    ),
    "qwen3.5": (
        "qwen3.5",
        {**_ATTENTION, "layer_types": _KINDS, "linear_key_head_dim": 16, "linear_value_head_dim": 24},
        "linear_attn",
    ),
    "mamba": ("mamba", {"state_size": 8}, "mixer"),
    "falcon-mamba": ("falcon-mamba", {"state_size": 8}, "mixer"),
}


@functools.cache
def tiny(name: str) -> Any:
    """A random model; decays and time steps are spread widely, so that a wrong one shows."""
    architecture, extra, _ = MODELS[name]
    model = tiny_model(architecture, **{"num_hidden_layers": 3, "hidden_size": 64, **extra})
    generator = torch.Generator().manual_seed(20261127)
    for key, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in key and "qwen" not in name else 0.0
        parameter.data = random * 0.5 + centre if parameter.dim() == 1 else random * (0.7 if "conv1d" in key else 0.25)
    return model


def mixer_of(name: str, layer: int = 0) -> Any:
    return getattr(tiny(name).get_decoder().layers[layer], MODELS[name][2])


def states_of(name: str, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty window and state of a mixer, from the shapes of transformers' cache."""
    model = tiny(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(batch, 2, dtype=torch.long), use_cache=True, cache=cache)
    window, state = cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]
    if state.dim() == 3:  # Mamba: one value a channel
        state = state[..., None]
    elif "qwen" not in name:  # (B, H, P, N) in transformers
        state = state.mT
    return torch.zeros_like(window[..., 1:]), torch.zeros_like(state)


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


def portable(model: ir.Model) -> ir.Model:
    clone = model.clone()
    write_in_standard_operators(clone)
    return clone


def session(model: ir.Model) -> Any:
    return open_session(ir.serde.serialize_model(model).SerializeToString())


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


CHUNKS = {"one pass": (21,), "row by row": (1,) * 21, "mixed": (5, 1, 1, 9, 2, 3)}


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
    traced = trace_mixer(model, getattr(model.get_decoder().layers[0], MODELS[name][2]), window.half(), state)
    given = {"rows": rows.half().numpy(), "past_window": window.half().numpy(), "past_state": state.numpy()}
    for graph in (portable(traced), traced):
        out, new_window, new_state = session(graph).run(None, given)
        assert (out.dtype, new_window.dtype, new_state.dtype) == (np.float16, np.float16, np.float32)
        np.testing.assert_allclose(
            out, expected, rtol=0, atol=2e-2 * np.abs(expected).max()
        )  # a norm enlarges small rows


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


@pytest.mark.parametrize("name", ("bamba", "granite", "falcon-h1-norm", "qwen3.5"))
def test_a_gated_norm_is_recognised_in_any_precision(name: str) -> None:
    found = gated_norm_operator(mixer_of(name).norm)
    assert found is not None
    for dtype in (torch.bfloat16, torch.float16):
        norm = copy.deepcopy(mixer_of(name).norm)
        for seed in range(50):
            norm.weight.data = torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            other = gated_norm_operator(norm)
            assert other is not None
            assert (other.groups, other.gate_first) == (found.groups, found.gate_first)


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


def test_a_refusal_while_tracing_begins_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("falcon-h1-norm")
    first, *_, last = [child for child in model.modules() if gated_norm_operator(child) is not None]
    found = mixers.gated_norm_operator
    refusal = UnsupportedModelError("no")

    def refuses_the_last(child: nn.Module) -> nn.Module | None:
        if child is last:
            raise refusal
        return found(child)

    monkeypatch.setattr(mixers, "gated_norm_operator", refuses_the_last)
    with pytest.raises(UnsupportedModelError, match="no"), tracing_mixers(model, [model]):
        pass
    assert first in list(model.modules())


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


def test_a_balcony_of_an_mlp_keeps_nothing_and_needs_an_mlp() -> None:
    balcony = init_balconies(tiny("falcon-h1"), (2,), "mlp")[2]
    assert memory_of(balcony.layer) == LayerMemory(attention=False)
    with pytest.raises(InputError, match="exit module 'mlp': the layers of this model have no MLP"):
        init_balconies(tiny("mamba2"), (2,), "mlp")
