"""The frozen backbone as a source of states: one pass gives the input of every balcony and the target of the loss.

Owns how states are taken from a Hugging Face model (hooks, so that no architecture is known by name) and the cache on
disk that spares the pass when a row comes round again. The backbone is frozen, so a state never goes stale.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from balcony_edge.errors import TrainingError


class Backbone:
    """States of the frozen model at the exits and after its final norm.

    Args:
        model: the base model, in the precision that its pass shall have.
        exit_layers: ascending.
        dtype: in which states are handed out and kept.
    """

    def __init__(
        self, model: PreTrainedModel, exit_layers: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.exit_layers = exit_layers
        self._arguments: dict[int, dict[str, Any]] = {}
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states, the final normed one last  # (B, T) -> (exits + 1, B, T, D)"""
        taken: dict[int, torch.Tensor] = {}

        def take(exit_layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                taken[exit_layer] = hidden.to(self.dtype)

            return hook

        handles = [
            self.decoder.layers[e].register_forward_pre_hook(take(e), with_kwargs=True) for e in self.exit_layers
        ]
        try:
            out = self.decoder(input_ids=tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        final = out.last_hidden_state.to(self.dtype)
        return torch.stack([*(taken[e] for e in self.exit_layers), final])

    @torch.no_grad()
    def layer_arguments(self, seq_len: int) -> dict[str, Any]:
        """What the model hands to its last layer for a batch of full rows: mask, positions, rotary tables."""
        if seq_len not in self._arguments:
            seen: dict[str, Any] = {}

            def hook(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                # what stands in for the KV cache has several names over versions; here there is none
                seen.update({key: value for key, value in kwargs.items() if not _is_cache(key, value)})

            handle = self.decoder.layers[-1].register_forward_pre_hook(hook, with_kwargs=True)
            device = next(self.model.parameters()).device
            try:
                self.decoder(input_ids=torch.zeros(1, seq_len, dtype=torch.long, device=device), use_cache=False)
            finally:
                handle.remove()
            seen.setdefault("attention_mask", None)
            self._arguments[seq_len] = seen
        return self._arguments[seq_len]


def _is_cache(name: str, value: Any) -> bool:
    return value is None or name in ("hidden_states", "use_cache", "cache", "past_key_values", "past_key_value")


class StateCache:
    """States of rows on disk: (exits + 1) × T × D values a row (2.4 MB for the demo model at 512 tokens in bfloat16).

    Args:
        path: of the file; a bitmap of the rows that it holds lies beside it.
        capacity: rows that it may hold: those with an index below it.
        shape: of one row's states  # (exits + 1, T, D)
        dtype: of the states.
        key: names the model, the exits and the tokens; a file with another key is started afresh.
    """

    def __init__(self, path: Path, capacity: int, shape: tuple[int, int, int], dtype: torch.dtype, key: str) -> None:
        self.capacity = capacity
        self.dtype = dtype
        # numpy has no bfloat16: the bits are kept as integers
        self.bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        key_file, filled_file = path.with_suffix(".key"), path.with_suffix(".rows")
        full_key = f"{key} {capacity} {shape} {dtype}"
        known = key_file.is_file() and path.is_file() and filled_file.is_file() and key_file.read_text() == full_key
        path.parent.mkdir(parents=True, exist_ok=True)
        if not known:
            for file in (key_file, path, filled_file):
                file.unlink(missing_ok=True)
            _reserve(path, capacity * dtype.itemsize * math.prod(shape))
            _reserve(filled_file, capacity)
        integer: Any = np.int16 if dtype.itemsize == 2 else np.int32
        self.values: npt.NDArray[Any] = np.memmap(path, dtype=integer, mode="r+", shape=(capacity, *shape))
        self.filled: npt.NDArray[np.uint8] = np.memmap(filled_file, dtype=np.uint8, mode="r+", shape=(capacity,))
        if not known:
            key_file.write_text(full_key)

    @classmethod
    def within(
        cls, gigabytes: float, path: Path, most: int, shape: tuple[int, int, int], dtype: torch.dtype, key: str
    ) -> StateCache | None:
        """A cache of at most ``most`` rows in so many GB; None where not one fits."""
        capacity = min(int(gigabytes * 1e9 / (dtype.itemsize * math.prod(shape))), most)
        return cls(path, capacity, shape, dtype, key) if capacity >= 1 else None

    def get(self, rows: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """States of these rows, or None when one of them is not there  # (exits + 1, B, T, D)"""
        if (rows >= self.capacity).any() or not self.filled[rows].all():
            return None
        return torch.from_numpy(self.values[rows]).view(self.dtype).transpose(0, 1)

    def put(self, rows: npt.NDArray[np.int64], states: torch.Tensor) -> None:
        values = states.transpose(0, 1).contiguous().cpu().view(self.bits).numpy()
        for index, row in enumerate(rows):
            if row < self.capacity:
                self.values[row] = values[index]
                self.filled[row] = 1  # after its values: a killed run leaves no row that is marked and half written


def _reserve(path: Path, size: int) -> None:
    """Make a file of zeros whose room on the disk is taken: writing to a mapped file that finds none kills the process."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise TrainingError(
            f"{path}: no room for {size / 1e9:.1f} GB ({error.strerror}): lower --cache-gb or free space"
        ) from error
