"""A test of fused attention on the device: for how many rows of a pass it is right.

ONNX Runtime has several kernels for ``GroupQueryAttention`` on WebGPU and chooses by the number of rows. The one for many rows
is wrong, without an error, where a subgroup of the adapter has fewer lanes than it expects: on Mesa's llvmpipe (8 lanes) all
rows from the ninth on are noise, and no kernel applies a soft cap (docs/LOG.md, "Attention over many rows is wrong on
llvmpipe"). So the kernels are compared with NumPy when a bundle is loaded, for each kind of attention that it has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from balcony_edge.errors import DeviceError
from balcony_runtime.backends.base import Array
from balcony_runtime.backends.webgpu import small_graphs
from balcony_runtime.backends.webgpu.device import WebGpuDevice

_log = logging.getLogger(__name__)

#: Most rows of a pass (None: any number) → sizes of passes that must be right, the most first. The plugin 0.4.0 takes the
#: kernel for many rows from 32 on; where a sliding window is longer than the sequence, smaller passes take it, too.
LIMITS: dict[int | None, tuple[int, ...]] = {None: (64, 31, 12, 3, 1), 31: (31, 12, 3, 1), 1: (1,)}
#: Rows of the test: more than the lanes of any adapter's subgroup, and passes with earlier rows.
_ROWS = 96
#: Window that some of these rows leave, as those of long contexts leave a model's own.
SHORT_WINDOW = 24
#: Largest difference, as a share of the largest value. A kernel that is wrong differs by 0.05 or more; float32 by 1e-6, float16
#: by 2e-3.
_TOLERANCE = 5e-3
#: A sink of the softmax that changes no sum, as exported graphs have it.
_NO_SINK = -1e30


class Attention(NamedTuple):
    """A kind of fused attention: the numbers among its attributes, and whether its softmax has a sink."""

    attributes: tuple[tuple[str, float], ...]
    sink: bool


def most_rows(device: WebGpuDevice, kinds: Iterable[Attention], size: int) -> int | None:
    """Most rows of a pass for which attention is right; None for any number.

    Args:
        device: device to test.
        kinds: each kind of attention that a bundle has.
        size: size of a head.

    Raises:
        DeviceError: attention is wrong even for one row, or the device failed.
    """
    tried = {one for kind in kinds for one in (kind, _shortened(kind))}
    return min((limit for kind in tried if (limit := _most_rows(device, kind, size)) is not None), default=None)


def _shortened(kind: Attention) -> Attention:
    """The same attention with a window that rows of the test leave, if it has a longer one."""
    pairs = (
        (name, min(value, SHORT_WINDOW) if name == "local_window_size" else value) for name, value in kind.attributes
    )
    return kind._replace(attributes=tuple(pairs))


def _most_rows(device: WebGpuDevice, attention: Attention, size: int) -> int | None:
    kind = dict(attention.attributes)
    heads, kv_heads = int(kind["num_heads"]), int(kind["kv_num_heads"])
    device.open("attend", small_graphs.attend(device.dtype, attention.sink, **kind))
    random = np.random.default_rng(0)
    query, key, value = (
        random.standard_normal((1, _ROWS, count * size), np.float32) for count in (heads, kv_heads, kv_heads)
    )
    # Scores of size 3, whatever the scale is: flat weights would hide a key that is left out.
    query *= 3 / (size**0.5 * (kind.get("scale") or size**-0.5))
    query, key, value = (array.astype(device.dtype) for array in (query, key, value))
    tables: dict[str, Array] = {}
    turned = query, key
    if kind.get("do_rotary"):
        angles = np.outer(np.arange(_ROWS), 10_000.0 ** -np.linspace(0, 1, size // 2, endpoint=False))
        tables = {"cos": np.cos(angles).astype(device.dtype), "sin": np.sin(angles).astype(device.dtype)}
        turned = _turned(query, size, **tables), _turned(key, size, **tables)
    if attention.sink:
        lowest = max(_NO_SINK, float(np.finfo(device.dtype).min))
        tables["sink"] = np.full(heads, lowest, device.dtype)
    want = _attended(*turned, value, size, kind)
    for limit, sizes in LIMITS.items():
        for rows in sizes:
            wrong = np.abs(_on_device(device, query, key, value, tables, size, rows) - want).max() / np.abs(want).max()
            if not wrong <= _TOLERANCE:  # also NaN
                _log.info("attention over %d rows a pass differs by %.0e on this adapter", rows, wrong)
                break
        else:
            return limit
    words = ", ".join(f"{name} {number:g}" for name, number in kind.items())
    raise DeviceError(
        f"WebGPU computes this model's attention wrongly here ({words}): run it with --device cpu, or update onnxruntime and "
        "the GPU's driver"
    )


def _on_device(
    device: WebGpuDevice, query: Array, key: Array, value: Array, tables: Mapping[str, Array], size: int, limit: int
) -> Array:
    """Attention over all rows in passes of at most ``limit`` rows, (1, T, N·d)."""
    memory = device.new_memory()
    shape = (1, key.shape[2] // size, query.shape[1], size)
    pasts = {name: device.zeros(memory, shape, device.dtype) for name in ("past_key", "past_value")}
    found = np.empty_like(query)
    for start in range(0, query.shape[1], limit):
        rows = slice(start, min(start + limit, query.shape[1]))
        one = device.new_pass(memory, "attend")
        for name, array in (("query", query), ("key", key), ("value", value)):
            one.give(name, np.ascontiguousarray(array[:, rows]))
        one.give("last", np.array([rows.stop - 1], np.int32))
        one.give("total", np.array(rows.stop, np.int32))
        for name, array in tables.items():
            one.give(name, array)
        for name, past in pasts.items():
            one.give(name, past)
            one.take(name.replace("past_", "present_"), past)
        attended = np.empty_like(query[:, rows])
        one.take("attended", attended)
        one.run()
        found[:, rows] = attended
        memory.free((), [one])
    device.release(memory)
    return found.astype(np.float32)


def _turned(rows: Array, size: int, cos: Array, sin: Array) -> Array:
    """Rows (1, T, N·d) with the halves of each head turned by their position's angles, in float32."""
    x, y = np.split(rows.astype(np.float32).reshape(rows.shape[1], -1, size), 2, axis=-1)
    c, s = (table.astype(np.float32)[:, None] for table in (cos, sin))
    return np.concatenate([x * c - y * s, y * c + x * s], axis=-1).reshape(rows.shape)


def _attended(query: Array, key: Array, value: Array, size: int, kind: Mapping[str, float]) -> Array:
    """Causal attention with shared keys and values, in float32, (1, T, N·d)."""
    rows, heads, kv_heads = query.shape[1], query.shape[2] // size, key.shape[2] // size
    q = query.astype(np.float32).reshape(rows, kv_heads, heads // kv_heads, size)
    k, v = (array.astype(np.float32).reshape(rows, kv_heads, size) for array in (key, value))
    scores = np.einsum("thgd,shd->hgts", q, k) * (kind.get("scale") or size**-0.5)
    if cap := kind.get("softcap"):
        scores = cap * np.tanh(scores / cap)
    seen = np.tri(rows, dtype=bool)
    if (window := int(kind.get("local_window_size", -1))) > 0:
        seen &= ~np.tri(rows, k=-window, dtype=bool)
    scores[:, :, ~seen] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    found: Array = np.einsum("hgts,shd->thgd", weights / weights.sum(-1, keepdims=True), v).reshape(query.shape)
    return found
