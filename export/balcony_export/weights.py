"""``weights.bin``: the external data that all graphs of a bundle point into, every tensor stored once.

Owns the file's layout (64-byte aligned tensors in the order in which they are added) and finds equal tensors by their
content, so that a tied table, a shared rope table or a weight that two graphs use is one region of the file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx_ir as ir

from balcony_edge.bundle import WEIGHTS
from balcony_edge.errors import CheckpointError

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
        data = tensor.tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._offsets[key] = self._file.tell()
            self._file.write(data)
        return self._offsets[key]

    def externalize(self, model: ir.Model) -> None:
        """Move every large initializer of ``model`` into the file and leave a reference.

        Raises:
            CheckpointError: a weight holds a value that is not finite.
        """
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < INLINE_BYTES or isinstance(tensor, ir.ExternalTensor):
                continue
            _check_finite(tensor)
            value.const_value = ir.ExternalTensor(
                location=WEIGHTS,
                offset=self.offset_of(tensor),
                length=tensor.nbytes,
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.numpy().shape),
                name=value.name or "",
                base_dir=str(self._directory),
            )


def _check_finite(tensor: ir.TensorProtocol) -> None:
    # a float is not finite iff its sum is not (a sum of finite float32 weights does not overflow in float64)
    total = float(tensor.numpy().sum(dtype="float64")) if tensor.dtype.is_floating_point() else 0.0
    if total - total != 0.0:
        raise CheckpointError(f"weight {tensor.name}: holds NaN or infinity: use a checkpoint whose weights are finite")
