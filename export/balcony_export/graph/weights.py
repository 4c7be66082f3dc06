"""``weights.bin``: the external data of all graphs of a bundle, every tensor stored once.

Owns the file's layout (64-byte aligned tensors in the order in which they are added). Equal tensors are found by their
content, so a tied table, a shared rope table or a weight that two graphs use is one region of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from balcony_edge.bundle.manifest import WEIGHTS
from balcony_export.graph.widen import row_pieces

#: Alignment of a tensor: a cache line, which satisfies the vector loads of every engine.
ALIGNMENT = 64
#: Tensors below this many bytes stay inside their graph.
INLINE_BYTES = 1024


class WeightFile:
    """Writes ``weights.bin`` in ``directory``; a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[bytes, int] = {}
        self._file: BinaryIO

    def __enter__(self) -> WeightFile:
        self._file = (self._directory / WEIGHTS).open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def offset_of(self, tensor: ir.TensorProtocol) -> int:
        """Byte offset of ``tensor``, which is written if the file has no equal one yet."""
        digest = hashlib.sha256()
        for data in _bytes(tensor):
            digest.update(data)
        key = digest.digest()
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._offsets[key] = self._file.tell()
            for data in _bytes(tensor):
                self._file.write(data)
        return self._offsets[key]

    def externalize(self, model: ir.Model) -> None:
        """Move every large initializer of ``model`` into the file and leave a reference to it."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < INLINE_BYTES or isinstance(tensor, ir.ExternalTensor):
                continue
            value.const_value = ir.ExternalTensor(
                location=WEIGHTS,
                offset=self.offset_of(tensor),
                length=tensor.nbytes,
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=str(self._directory),
            )


def _bytes(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    """Stored bytes of a tensor, in pieces; a tensor of values smaller than a byte is packed and comes in one piece."""
    if tensor.dtype.bitwidth < 8:
        yield tensor.tobytes()
        return
    for piece in row_pieces(tensor):
        yield piece.tobytes()
