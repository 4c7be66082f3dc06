"""Stand-ins for transformers' caches while decoder layers are traced: what a layer keeps comes in, and what it keeps goes out.

Owns where the parts of a layer's memory (:class:`balcony_edge.bundle.manifest.LayerMemory`) are read and written. Keys, values
and the inputs of short convolutions are rows that a pass adds to; windows and states of recurrent mixers are
:mod:`.recurrent`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.onnx import ops

from balcony_edge.errors import UnsupportedModelError
from balcony_export.graph.operators import RowPositions, merge_heads
from balcony_export.graph.recurrent.mixers import Convolution, Recurrence, RecurrentCache

#: Layer → what it keeps, by the names of the parts.
Memory = Mapping[int, Mapping[str, torch.Tensor]]


class WritingCache(RecurrentCache):
    """Takes a pass's rows into what the layers keep.

    Attributes:
        past: What the layers kept before the pass.
        rows: Rows of the pass.
    """

    def __init__(self, past: Memory, rows: RowPositions) -> None:
        recurrent = {layer: kept for layer, kept in past.items() if "state" in kept}
        windows, states = ({i: kept[part] for i, kept in recurrent.items()} for part in ("window", "state"))
        super().__init__(windows, states)
        self.past, self.rows = past, rows
        self._written: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in past}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all rows so far, new ones included  # (B, S, F)"""
        return self._write(layer_idx, "key", merge_heads(key)), self._write(layer_idx, "value", merge_heads(value))

    def convolve(self, layer_idx: int, rows: torch.Tensor, convolution: Convolution) -> torch.Tensor:
        """Convolve the rows of a layer after the earlier ones that it keeps  # (B, C, T) -> (B, C, T)"""
        if "inputs" not in self.past[layer_idx]:
            return super().convolve(layer_idx, rows, convolution)
        self._write(layer_idx, "inputs", rows.transpose(1, 2))
        return short_convolution(self.rows, self.past[layer_idx]["inputs"], rows, convolution)

    def present(self, layer_idx: int) -> tuple[torch.Tensor, ...]:
        """What a layer keeps after the pass, in the order of its parts."""
        written = self._written[layer_idx]
        if layer_idx in self.new_states:
            written |= {"window": self.new_windows[layer_idx], "state": self.new_states[layer_idx]}
        return tuple(written[part] for part in self.past[layer_idx])

    def _write(self, layer_idx: int, part: str, new: torch.Tensor) -> torch.Tensor:
        past = self.past[layer_idx][part]
        attributes: dict[str, Any] = {"axis": 1, "mode": "linear"}
        inputs = (past, new, self.rows.start)  # new: (B, T, F)
        written = ops.symbolic("TensorScatter", inputs, attributes, dtype=past.dtype, shape=past.shape, version=24)
        self._written[layer_idx][part] = written
        return written


class ReadingCache(RecurrentCache):
    """Has taken in the rows already: a balcony computes the rest of its layer for the last of them, its queries."""

    def __init__(self, written: WritingCache, queries: RowPositions) -> None:
        super().__init__(written.windows, written.states)
        self.rows, self._count, self._kept = queries, queries.positions.shape[1], written

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all rows  # (B, S, F)"""
        key, value, *_rest = self._kept.present(layer_idx)
        return key, value

    def convolve(self, layer_idx: int, rows: torch.Tensor, convolution: Convolution) -> torch.Tensor:
        """Convolve the queries  # (B, C, Q) -> (B, C, Q)"""
        if "inputs" not in self._kept.past[layer_idx]:
            return rows  # only its shape counts: the recurrence is not run again
        return short_convolution(self.rows, self._kept.present(layer_idx)[0], rows, convolution)

    def attend(self, layer_idx: int, recurrence: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries' output of the recurrence that has been traced, and its new state."""
        out = self._kept.outputs[layer_idx]
        # a slice would have a size that depends on data
        last = torch.arange(self._count) + (out.shape[1] - self._count)
        return out.index_select(1, last), self._kept.new_states[layer_idx]


def short_convolution(
    positions: RowPositions, kept: torch.Tensor, rows: torch.Tensor, convolution: Convolution
) -> torch.Tensor:
    """A depthwise convolution over rows and those before them, as many products as it has taps.

    Args:
        positions: Positions of the rows.
        kept: Inputs of all earlier rows  # (B, S, C)
        rows: Inputs of the rows  # (B, C, T)
        convolution: Weights.

    Returns:
        The convolved rows  # (B, C, T)
    """
    if convolution.activation is not None:
        raise UnsupportedModelError(
            f"short convolution with activation '{convolution.activation}': export writes none: choose another model"
        )
    weight, bias = convolution.weight, convolution.bias
    count, taps = rows.shape[2], weight.shape[1]
    known = torch.cat([positions.before(kept, taps - 1).transpose(1, 2), rows], 2)  # (B, C, taps - 1 + T)
    terms = [known[:, :, tap : tap + count] * weight[:, tap, None] for tap in range(taps)]
    out: torch.Tensor = sum(terms[1:], terms[0])
    return out if bias is None else out + bias[:, None]
