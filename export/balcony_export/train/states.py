"""States of the frozen backbone: one pass gives the input of every balcony and the target of the loss.

Owns which model the target is taken from, the backbone or a teacher that runs next to it, and a cache on disk that saves the
pass when a row comes again in a later epoch. Both models are frozen, so a state never goes stale.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from balcony_edge.errors import InputError, TrainingError
from balcony_export.model.exits import ExitModel
from balcony_export.train.loss import Head


def full_model(exits: ExitModel, teacher: PreTrainedModel | None) -> ExitModel:
    """The model whose full depth the exits learn from: ``exits`` itself, or a teacher.

    Raises:
        InputError: The teacher's vocabulary or hidden states have another size.
    """
    if teacher is None:
        return exits
    full = ExitModel(teacher)
    (tokens, width), (want_tokens, want_width) = full.parts.head.weight.shape, exits.parts.head.weight.shape
    if (tokens, width) != (want_tokens, want_width):
        raise InputError(
            f"--teacher: its LM head has {tokens} tokens and {width} inputs, the model's has {want_tokens} and {want_width}: "
            "give the model that this one was cut from"
        )
    return full


def head_of(exits: ExitModel) -> Head:
    """The LM head of a model."""
    weight = exits.parts.head.weight
    return Head(weight if exits.logits_divisor == 1.0 else weight / exits.logits_divisor, exits.soft_cap)


class BackboneStates:
    """States at the exits below the full depth, and after the final norm of the full model, of rows of tokens.

    Args:
        exits: The frozen model with its balconies, in the precision of its passes.
        full: The model that the exits learn from, see :func:`full_model`.
        rows: Tokens of the training rows  # (R, T)

    Attributes:
        cache: Keeps states between epochs; None without one.
    """

    cache: StateCache | None = None

    def __init__(self, exits: ExitModel, full: ExitModel, rows: npt.NDArray[np.int32]) -> None:
        self.exits, self.full, self.rows = exits, full, rows

    @torch.no_grad()
    def of(self, tokens: npt.NDArray[np.int32]) -> torch.Tensor:
        """States of any rows, the final normed one last  # (B, T) -> (exits + 1, B, T, D)"""
        exits, full = self.exits, self.full
        ids = torch.from_numpy(tokens).long().to(exits.parts.embed.weight.device)
        states = exits.run(ids, exits.exit_layers)
        last = states if full is exits else full.run(ids, (full.depth,))
        return torch.stack([*(states.at[e] for e in exits.balconies), full.normed(full.depth, last)])

    def at(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """States of training rows, from the cache or through the backbone  # (exits + 1, B, T, D)"""
        if self.cache is not None and (cached := self.cache.get(rows)) is not None:
            return cached.to(self.exits.parts.embed.weight.device)
        states = self.of(self.rows[rows])
        if self.cache is not None:
            self.cache.put(rows, states)
        return states

    def sync(self) -> None:
        """Have what the cache keeps on the disk: see :meth:`StateCache.sync`."""
        if self.cache is not None:
            self.cache.sync()


class StateCache:
    """States of rows on disk: (exits + 1) × T × D values a row (2.4 MB for the demo model at 512 tokens in bfloat16).

    Args:
        path: Path of the file; a map of the rows that it has is kept next to it.
        capacity: Number of rows of the file, which are the rows with an index below it. A file of another length keeps its
            rows that are below it.
        shape: Shape of one row's states  # (exits + 1, T, D)
        dtype: Type of the states.
        key: Identifies the model, the exits and the tokens; a file with another key is replaced.
    """

    def __init__(self, path: Path, capacity: int, shape: tuple[int, int, int], dtype: torch.dtype, key: str) -> None:
        self.capacity = capacity
        self.dtype = dtype
        # numpy has no bfloat16: the bits are kept as integers
        self.bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        key_file, filled_file = path.with_suffix(".key"), path.with_suffix(".rows")
        full_key = f"{key} {shape} {dtype}"
        known = key_file.is_file() and path.is_file() and filled_file.is_file() and key_file.read_text() == full_key
        path.parent.mkdir(parents=True, exist_ok=True)
        if not known:
            for file in (key_file, path, filled_file):
                file.unlink(missing_ok=True)
        elif filled_file.stat().st_size > capacity:
            os.truncate(filled_file, capacity)  # before the values: a killed run leaves no marked row without them
        _reserve(path, capacity * dtype.itemsize * math.prod(shape))
        _reserve(filled_file, capacity)
        self.values: np.memmap[Any, Any] = np.memmap(
            path, dtype=f"i{dtype.itemsize}", mode="r+", shape=(capacity, *shape)
        )
        self._marks: npt.NDArray[np.uint8] = np.memmap(filled_file, dtype=np.uint8, mode="r+", shape=(capacity,))
        self.filled: npt.NDArray[np.uint8] = np.array(self._marks)
        if not known:
            key_file.write_text(full_key)

    @classmethod
    def within(
        cls, gigabytes: float, path: Path, most: int, shape: tuple[int, int, int], dtype: torch.dtype, key: str
    ) -> StateCache | None:
        """A cache of at most ``most`` rows in ``gigabytes`` GB; None if not a single row fits."""
        capacity = min(int(gigabytes * 1e9 / (dtype.itemsize * math.prod(shape))), most)
        return cls(path, capacity, shape, dtype, key) if capacity >= 1 else None

    def get(self, rows: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """States of these rows, or None if one of them is missing  # (exits + 1, B, T, D)"""
        if (rows >= self.capacity).any() or not self.filled[rows].all():
            return None
        return torch.from_numpy(self.values[rows]).view(self.dtype).transpose(0, 1)

    def put(self, rows: npt.NDArray[np.int64], states: torch.Tensor) -> None:
        """Store states of rows, if there is room  # (exits + 1, B, T, D)"""
        values = states.transpose(0, 1).contiguous().cpu().view(self.bits).numpy()
        for index, row in enumerate(rows):
            if row < self.capacity:
                self.values[row] = values[index]
                self.filled[row] = 1

    def sync(self) -> None:
        """Mark the rows on the disk, after their values: power may be lost, and zeros would be taken for states."""
        self.values.flush()
        self._marks[:] = self.filled


def _reserve(path: Path, size: int) -> None:
    """Give a file a size, with zeros, and reserve it: without room on the disk, a write to the map could kill the process."""
    before = path.stat().st_size if path.is_file() else 0
    try:
        # Where a file system cannot reserve (NFS, exFAT), glibc reads and writes instead, and refuses to append.
        with path.open("r+b" if before else "w+b") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
    except OSError as error:
        if path.is_file():  # it could be opened
            os.truncate(path, before)
        raise TrainingError(
            f"{path}: no room for {size / 1e9:.1f} GB ({error.strerror}): lower --cache-gb or free space"
        ) from error
