"""The token table: rows of the embedding, mapped from the bundle's weights.

Owns finding a row and converting it to floats. The file is mapped, not read: a tied table is also the LM head's weight, and
only the rows of tokens that occur are touched here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, is_out_of_memory

#: Most rows kept as floats: two of three tokens of a text are among the 1,000 different tokens before it.
RECENT_ROWS = 1024


class TokenTable:
    """Rows of the token table, scaled as the model does. Layout: :class:`balcony_edge.bundle.manifest.EmbeddingSpec`."""

    def __init__(self, bundle: Bundle) -> None:
        """Map the table.

        Raises:
            BundleError: the file system maps no files.
        """
        spec = bundle.manifest.embedding
        path = bundle.file(spec.file)

        def mapped(offset: int, dtype: Any, *row: int) -> npt.NDArray[Any]:
            try:
                table = np.memmap(path, dtype, mode="r", offset=offset, shape=(spec.shape[0], *row))
            except OSError as error:  # such as FUSE with direct I/O, which maps nothing that is shared
                if is_out_of_memory(error):
                    raise
                cure = "copy the bundle to a local disk"
                raise BundleError(f"{path}: cannot be mapped into memory ({error.strerror}): {cure}") from error
            return np.asarray(table)  # a plain array: indexing a memmap object costs 10 µs more

        self.dtype: np.dtype[Any] = np.dtype(spec.dtype)
        self._scale = self.dtype.type(spec.scale)
        self._width, self._blocks = spec.shape[1], spec.blocks
        self._recent: dict[int, npt.NDArray[Any]] = {}
        self._mapped: dict[str, npt.NDArray[Any]] = {}  # empty once it is closed
        if spec.blocks is None:
            self._mapped["table"] = mapped(spec.offset, self.dtype, self._width)
            return
        bits, size = spec.blocks.bits, spec.blocks.block_size
        count = -(-self._width // size)
        self._mapped["table"] = mapped(spec.offset, np.uint8, count * size * bits // 8)
        self._mapped["scales"] = mapped(spec.blocks.scales_offset, np.float32, count, 1)
        self._middle = np.float32(1 << (bits - 1))
        self._values = unpacked(np.arange(256, dtype=np.uint8)[:, None], bits) - self._middle  # (256, values a byte)
        if (zeros := spec.blocks.zero_points_offset) is not None:
            self._mapped["zeros"] = mapped(zeros, np.uint8, -(-count * bits // 8))

    def __getitem__(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows of an array of tokens of any shape; the result has one more axis, of size D."""
        rows = self._mapped["table"][tokens] if self._blocks is None else self._dequantized(tokens)
        scaled = rows if self._scale == 1 else rows * self._scale
        return scaled.reshape(*tokens.shape, self._width)

    def row(self, token: int) -> npt.NDArray[Any]:
        """Row of one token, (D,), read-only. Recent rows are kept: with cold caches a new one takes 30 µs."""
        row = self._recent.get(token)
        if row is None:
            if len(self._recent) >= RECENT_ROWS:
                self._recent.clear()
            row = self._recent[token] = self[np.array(token)]
        return row

    def close(self) -> None:
        """Let go of the file, whose space is free only then if it was removed; rows are KeyErrors, as graphs are."""
        self._mapped.clear()
        self._recent.clear()

    def _dequantized(self, at: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        assert self._blocks is not None
        zeros = self._mapped.get("zeros")  # first: another thread may close meanwhile, and the lines below then fail
        values = self._values.take(self._mapped["table"][at], axis=0)  # a byte contains one value or two
        scales = self._mapped["scales"][at]  # (..., blocks, 1)
        blocks = values.reshape(*scales.shape[:-1], self._blocks.block_size)
        if zeros is not None:
            bits = self._blocks.bits
            blocks = blocks - (unpacked(zeros[at], bits)[..., : scales.shape[-2], None] - self._middle)
        rows: npt.NDArray[np.float32] = (blocks * scales).reshape(*scales.shape[:-2], -1)
        return rows[..., : self._width]


def unpacked(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.float32]:
    """Values of the last axis, low bits first, as float32."""
    if bits == 8:
        return packed.astype(np.float32)
    halves = np.stack((packed & 15, packed >> 4), axis=-1)
    return halves.reshape(*packed.shape[:-1], -1).astype(np.float32)
