"""Stand-ins that make transformers' recurrent mixers emit single operators while they are traced.

Owns Mamba-2's state space (Mamba-2, Bamba, Granite 4 hybrid, Falcon-H1), Mamba's selective scan (Mamba, Falcon-Mamba) and the
gated delta rule (Qwen3-Next, Qwen3.5). Each mixer becomes two nodes, and the rest of it is traced as it is:

    CausalConvWithState   x (B, C, T), weight (C, 1, K), bias (C), window (B, C, K - 1)             → (B, C, T), new window
    LinearAttention       query, key (B, T, G·dk), value (B, T, H·dv), state (B, H, dk, dv),
                          decay (B, T, H) or (B, T, H·dk), beta (B, T, H)                           → (B, T, H·dv), new state

Both are ONNX Runtime's (``com.microsoft``); opset 27 has the same two as standard operators. G heads of queries and keys serve
H heads of values. The state is float32 whatever the weights are. There are no dead rows: all T rows are consumed.
:mod:`.passes` writes these nodes in standard operators.

It knows no architecture by name: it replaces the functions in which transformers computes convolutions and recurrences, and
compares each with the recurrence that the operator computes, on sample numbers.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.onnx import ops
from transformers import PreTrainedModel

from balcony_edge.errors import UnsupportedModelError
from balcony_export.graph.ir_tools import MICROSOFT
from balcony_export.graph.recurrent.norms import (
    L2_EPSILON,
    GatedNorm,
    gated_norm_operator,
    unit,
    unscaled_norm_operator,
)
from balcony_export.graph.stand_ins import replaced_attributes, replaced_children

#: ``LinearAttention``'s rules: a decayed state, and one that also forgets what a key retrieves.
GATED, GATED_DELTA = "gated", "gated_delta"
#: Smallest logarithm of a decay. exp(-50) is 2e-22 of a state, which float32 loses next to what the row adds. Smaller factors
#: make denormal numbers, which take ONNX Runtime's CPU kernel 8 times as long (37 instead of 4.4 ms for 256 rows of 48 heads).
_LEAST_DECAY = -50.0


class RecurrentCache:
    """Replaces transformers' cache for recurrent mixers: gives each its window and state, and takes the new ones.

    Attributes:
        windows: Layer → last inputs of its convolution  # (B, C, K - 1)
        states: Layer → recurrent state  # (B, H, dk, dv) float32
        new_windows: Layer → window after the rows of the pass.
        new_states: Layer → state after the rows of the pass.
        outputs: Layer → result of the recurrence for the rows of the pass  # (B, T, H, dv)
    """

    def __init__(self, windows: Mapping[int, torch.Tensor], states: Mapping[int, torch.Tensor]) -> None:
        self.windows, self.states = windows, states
        self.new_windows: dict[int, torch.Tensor] = {}
        self.new_states: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}

    def get_conv_state(self, *_: object, **__: object) -> None:
        """None: a mixer then takes one row the same way as several."""

    def get_recurrent_state(self, *_: object, **__: object) -> None:
        """None, as above; the stand-in of the recurrence knows the state."""

    def update_conv_state(self, rows: torch.Tensor, layer_idx: int, **_: object) -> _Rows:
        return _Rows(self, layer_idx, rows)

    def update_recurrent_state(self, *_: object, **__: object) -> None:
        """Nothing: :meth:`attend` has the new state, in the operator's order of axes."""

    def convolve(self, layer_idx: int, rows: torch.Tensor, convolution: Convolution) -> torch.Tensor:
        """Convolve the rows of a layer after its window  # (B, C, T) -> (B, C, T)"""
        out, self.new_windows[layer_idx] = convolution.emit(rows, self.windows[layer_idx])
        return out

    def attend(self, layer_idx: int, recurrence: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the recurrence of a layer from its state: the output and the new state."""
        self.outputs[layer_idx], self.new_states[layer_idx] = recurrence.emit(self.states[layer_idx])
        return self.outputs[layer_idx], self.new_states[layer_idx]


@dataclass(frozen=True)
class _Rows:
    """New inputs of a layer's convolution, with the cache that knows the earlier ones."""

    cache: RecurrentCache
    layer_idx: int
    rows: torch.Tensor  # (B, C, T)


@dataclass(frozen=True)
class _Convolved:
    """Result of a convolution, of which the mixer takes the last T rows: there are no others."""

    rows: torch.Tensor  # (B, C, T)

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.rows


@dataclass(frozen=True)
class Convolution:
    """A depthwise causal convolution."""

    weight: torch.Tensor  # (C, K)
    bias: torch.Tensor | None  # (C,)
    activation: str | None

    def emit(self, rows: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One operator, and those of the activation: the convolved rows and the new window.

        The operator has SiLU as an option, but its CPU kernel then takes twice as long as both apart for many rows.
        """
        out, new = ops.symbolic_multi_out(
            f"{MICROSOFT}::CausalConvWithState",
            (rows.to(window.dtype), self.weight[:, None], self.bias, window),
            dtypes=(window.dtype, window.dtype),
            shapes=(rows.shape, window.shape),
            version=1,
        )
        return self._activated(out).to(rows.dtype), new

    def evaluate(self, rows: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the operator computes, in PyTorch."""
        known = torch.cat((window, rows), -1)
        out = functional.conv1d(known, self.weight[:, None], self.bias, groups=len(self.weight))
        return self._activated(out), known[..., rows.shape[-1] :]

    def _activated(self, out: torch.Tensor) -> torch.Tensor:
        if self.activation is None:
            return out
        if self.activation in ("silu", "swish"):
            return functional.silu(out)
        raise UnsupportedModelError(
            f"convolution with activation '{self.activation}': export supports silu: choose another model"
        )


@dataclass(frozen=True)
class Recurrence:
    """A linear recurrence over the rows of a pass, in float32."""

    query: torch.Tensor  # (B, T, G, dk)
    key: torch.Tensor  # (B, T, G, dk)
    value: torch.Tensor  # (B, T, H, dv)
    decay: torch.Tensor  # (B, T, H), or (B, T, H, dk) if every row of the state has its own; logarithms
    beta: torch.Tensor | None = None  # (B, T, H), only in the gated delta rule
    scale: float = 1.0
    unit: bool = False  # whether queries and keys are scaled to length 1
    skipping: torch.Tensor | None = None  # (B, T, H, dv), the part of the output that does not depend on the state

    def emit(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One operator, and one for each scaling: the output  # (B, T, H, dv)  and the new state."""
        query, key, value = self.query.float(), self.key.float(), self.value.float()
        if self.unit:
            query, key = unit(query), unit(key)
        attributes: dict[str, Any] = {
            "update_rule": GATED if self.beta is None else GATED_DELTA,
            "q_num_heads": query.shape[2],
            "kv_num_heads": value.shape[2],
            "scale": self.scale,
        }
        decay = torch.clamp(self.decay.float(), min=_LEAST_DECAY)
        inputs = [query.flatten(2), key.flatten(2), value.flatten(2), state, decay.flatten(2)]
        inputs += [] if self.beta is None else [self.beta.float()]
        out, new = ops.symbolic_multi_out(
            f"{MICROSOFT}::LinearAttention",
            inputs,
            attributes,
            dtypes=(torch.float32, torch.float32),
            shapes=(inputs[2].shape, state.shape),
            version=1,
        )
        return self._with_skip(out.view(value.shape)), new

    def evaluate(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the operators compute, in PyTorch, row by row."""
        query, key = self.query, self.key
        if self.unit:
            query, key = (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + L2_EPSILON) for x in (query, key))
        shared = self.value.shape[2] // query.shape[2]
        query, key = (x.repeat_interleave(shared, 2) for x in (query, key))  # (B, T, H, dk)
        decay = self.decay if self.decay.dim() == 4 else self.decay[..., None]
        outputs = []
        for row in range(query.shape[1]):
            state = state * decay[:, row, :, :, None].exp()
            new = self.value[:, row, :, None]  # (B, H, 1, dv)
            if self.beta is not None:
                new = (new - key[:, row, :, None] @ state) * self.beta[:, row, :, None, None]
            state = state + key[:, row, :, :, None] * new  # (B, H, dk, dv)
            outputs.append(query[:, row, :, None] @ state * self.scale)
        return self._with_skip(torch.cat(outputs, 2).transpose(1, 2)), state

    def _with_skip(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.skipping is None else out + self.skipping


class _Functions:
    """Stand-ins for the functions of a mixer; each has the arguments and results of transformers' own."""

    _rows: _Rows

    def causal_conv1d_fn(
        self,
        rows: _Rows,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **_: object,
    ) -> _Convolved:
        self._rows = rows  # a mixer convolves before its recurrence
        return _Convolved(rows.cache.convolve(rows.layer_idx, rows.rows, Convolution(weight, bias, activation)))

    def apply_mask_to_padding_states(self, rows: torch.Tensor, _: object) -> torch.Tensor:
        return rows  # there are no padding rows

    def mamba2_chunk_scan(
        self,
        rows: torch.Tensor,  # (B, T, H, P)
        dt: torch.Tensor,  # (B, T, H)
        decay: torch.Tensor,  # (H,) negative
        key: torch.Tensor,  # (B, T, G, N)
        query: torch.Tensor,  # (B, T, G, N)
        chunk_size: int,
        D: torch.Tensor | None = None,  # (H,)  # transformers' name
        dt_bias: torch.Tensor | None = None,  # (H,)
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        **_: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dt = _time_step(dt, dt_bias, dt_softplus)
        low, high = dt_limit
        if low > 0.0 or high < math.inf:
            dt = torch.clamp(dt, low, high)
        rows = rows.float()
        skipping = None if D is None else rows * D.float()[:, None]
        recurrence = Recurrence(query, key, rows * dt[..., None], dt * decay.float(), skipping=skipping)
        out, state = self._attend(recurrence)
        return out, state.mT

    def mamba_selective_scan(
        self,
        rows: torch.Tensor,  # (B, C, T)
        dt: torch.Tensor,  # (B, C, T)
        decay: torch.Tensor,  # (C, N) negative
        key: torch.Tensor,  # (B, N, T)
        query: torch.Tensor,  # (B, N, T)
        D: torch.Tensor | None = None,  # (C,)  # transformers' name
        z: torch.Tensor | None = None,  # (B, C, T)
        delta_bias: torch.Tensor | None = None,  # (C,)
        delta_softplus: bool = False,
        **_: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # every channel is a head with one value, and each of its N state values decays at its own rate
        x = rows.transpose(1, 2)[..., None].float()  # (B, T, C, 1)
        step = _time_step(dt.transpose(1, 2), delta_bias, delta_softplus)[..., None]  # (B, T, C, 1)
        query, key = (y.transpose(1, 2)[:, :, None] for y in (query, key))  # (B, T, 1, N)
        skipping = None if D is None else x * D.float()[:, None]
        out, state = self._attend(Recurrence(query, key, x * step, step * decay.float(), skipping=skipping))
        out = out.squeeze(-1).transpose(1, 2)  # (B, C, T)
        return out if z is None else out * functional.silu(z), state.squeeze(-1)

    def torch_chunk_gated_delta_rule(
        self,
        query: torch.Tensor,  # (B, T, G, dk)
        key: torch.Tensor,  # (B, T, G, dk)
        value: torch.Tensor,  # (B, T, H, dv)
        g: torch.Tensor,  # (B, T, H)
        beta: torch.Tensor,  # (B, T, H)
        use_qk_l2norm_in_kernel: bool = False,
        **_: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = query.shape[-1] ** -0.5
        out, state = self._attend(Recurrence(query, key, value, g, beta, scale, use_qk_l2norm_in_kernel))
        return out.to(query.dtype), state

    def by_row(self, x: torch.Tensor) -> torch.Tensor:
        """Give batch and rows of the current pass their own axes  # (B·T·H, N) -> (B, T, H, N)"""
        batch, _, rows = self._rows.rows.shape
        return x.view(batch, rows, -1, x.shape[-1])

    def _attend(self, recurrence: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rows.cache.attend(self._rows.layer_idx, recurrence)


def _time_step(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return functional.softplus(dt) if softplus else dt


def _sample(*shape: int) -> torch.Tensor:
    """Numbers between -1 and 1 that do not repeat."""
    return torch.sin(torch.arange(math.prod(shape)).float() * 1.7 + len(shape)).reshape(shape)


class _SampleCache(RecurrentCache):
    """Computes with PyTorch what the operators compute."""

    def convolve(self, layer_idx: int, rows: torch.Tensor, convolution: Convolution) -> torch.Tensor:
        return convolution.evaluate(rows, self.windows[layer_idx])[0]

    def attend(self, layer_idx: int, recurrence: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
        return recurrence.evaluate(self.states[layer_idx])


def _check(source: Any) -> None:
    """Refuse a module of transformers whose functions compute something else than their stand-ins."""
    channels, rows, groups, heads, size, width = 6, 5, 2, 4, 3, 2
    state = _sample(1, heads, size, width)
    query, key, value = (
        _sample(1, rows, groups, size),
        _sample(1, rows, groups, size).cos(),
        _sample(1, rows, heads, width),
    )
    per_head, bias = _sample(1, rows, heads), _sample(heads)
    gates = _sample(1, channels, rows)
    trials: dict[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor, dict[str, Any]]] = {
        "mamba2_chunk_scan": (
            (value, per_head, -bias.exp(), key, query),
            {"chunk_size": 2, "D": bias, "dt_bias": bias, "dt_softplus": True, "dt_limit": (0.5, 1.0)},
            state,
            {"initial_states": state.mT, "return_final_states": True},
        ),
        "mamba_selective_scan": (
            (gates.cos(), gates, -_sample(channels, size).exp(), *_sample(2, 1, size, rows)),
            {"D": _sample(channels), "z": gates, "delta_bias": _sample(channels), "delta_softplus": True},
            torch.zeros(1, channels, size, 1),
            {"return_last_state": True},
        ),
        "torch_chunk_gated_delta_rule": (
            (query, key, value, -per_head.exp(), per_head.sigmoid()),
            {"use_qk_l2norm_in_kernel": True},
            state,
            {"initial_state": state, "output_final_state": True},
        ),
    }
    stand_ins = _Functions()
    windows = {0: torch.zeros(1, channels, size - 1)}
    for activation in (None, "silu"):
        kernel = (_sample(channels, size), _sample(channels), activation)
        if (function := getattr(source, "causal_conv1d_fn", None)) is not None:
            found = stand_ins.causal_conv1d_fn(_Rows(_SampleCache(windows, {}), 0, gates), *kernel).rows
            _compare(source, function, (found,), (function(gates, *kernel),))
    for name, (given, options, start, own) in trials.items():
        if (function := getattr(source, name, None)) is not None:
            stand_ins.causal_conv1d_fn(_Rows(_SampleCache(windows, {0: start}), 0, gates), *kernel)
            _compare(source, function, getattr(stand_ins, name)(*given, **options), function(*given, **options, **own))


def _compare(source: Any, function: Any, found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    if not all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, wanted, strict=True)):
        raise UnsupportedModelError(
            f"{source.__name__}: {function.__name__} computes something else than the operator that export writes: "
            "use another version of transformers"
        )


#: Functions of transformers' mixers that :class:`_Functions` replaces.
_REPLACED = (
    "causal_conv1d_fn",
    "apply_mask_to_padding_states",
    "mamba2_chunk_scan",
    "mamba_selective_scan",
    "torch_chunk_gated_delta_rule",
)


@contextlib.contextmanager
def tracing_mixers(model: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the recurrent mixers in ``modules`` emit single operators until the end of the context.

    They must be called with a :class:`RecurrentCache`. Enter it before
    :func:`balcony_export.graph.operators.tracing`, which knows no gated norms.

    Raises:
        UnsupportedModelError: A mixer computes something else than the operators.
    """
    source: Any = sys.modules[type(model).__module__]
    _check(source)
    stand_ins = _Functions()
    functions = {name: getattr(stand_ins, name) for name in _REPLACED if hasattr(source, name)}

    def norm_of(child: nn.Module) -> nn.Module | None:
        norm = gated_norm_operator(child) or unscaled_norm_operator(child)
        if isinstance(norm, GatedNorm):
            norm.by_row = stand_ins.by_row
        return norm

    # rows at the boundaries have one type: in half precision Mamba's residual sums have it as well
    wide = [child for module in modules for child in module.modules() if getattr(child, "residual_in_fp32", False)]
    with (
        replaced_children(modules, norm_of),
        replaced_attributes(wide, {"residual_in_fp32": False}),
        replaced_attributes([source], functions),
    ):
        yield
