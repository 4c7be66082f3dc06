"""``weights.bin``: the external data that all graphs of a bundle point into, every tensor stored once.

Owns the file's layout (64-byte aligned tensors in the order in which they are added) and finds equal tensors by their
content, so that a tied table, a shared rope table or a weight that two graphs use is one region of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx_ir as ir

from balcony_edge.bundle.manifest import WEIGHTS
from balcony_export.graph.widen import pieces

#: Alignment of a tensor: a cache line, and what vector loads of every engine ask at most.
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

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def offset_of(self, tensor: ir.TensorProtocol) -> int:
        """Byte offset of ``tensor``, which is written where no equal one was before."""
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
        """Move every large initializer of ``model`` into the file and leave a reference."""
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
    """What is stored of a tensor, a part at a time; values of less than a byte are packed, so those come whole."""
    if tensor.dtype.bitwidth < 8:
        yield tensor.tobytes()
        return
    for piece in pieces(tensor):
        yield piece.tobytes()
