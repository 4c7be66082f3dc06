"""Trace and write a model in a wider type than its own, so that an export needs little more memory than the checkpoint.

Widening a whole bfloat16 model takes three times its size. But tracing reads no matrix: while it runs, each matrix is replaced
by reserved memory of the wide type, which costs nothing until it is touched. Afterwards every tensor that views such memory
becomes a :class:`Widened`, which converts the original matrix a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from balcony_edge.errors import CheckpointError

#: Bytes of the rows that are converted at a time.
PIECE_BYTES = 1 << 25
#: Tensors up to this many values are converted at once, because the tracer merges small tensors of equal values.
SMALL = 1 << 14
_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}


class Widened(ir.LazyTensor):
    """A weight that is read as ``dtype`` and kept in its own type.

    Attributes:
        original: The weight as it is kept.
        wide: The type in which it is read.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, name: str | None = None) -> None:
        super().__init__(
            lambda: ir.tensor(self.rows(0, len(weight))), dtype=_DTYPES[dtype], shape=ir.Shape(weight.shape), name=name
        )
        self.original, self.wide = weight, dtype

    def rows(self, first: int, last: int) -> npt.NDArray[np.generic]:
        """Some rows, converted."""
        found: npt.NDArray[np.generic] = self.original[first:last].to(self.wide).numpy()
        return found


def tensor_as(weight: torch.Tensor, dtype: torch.dtype) -> ir.TensorProtocol:
    """A weight as a tensor of ``dtype``, without a copy."""
    return ir.tensor(weight.detach()) if weight.dtype == dtype else Widened(weight.detach(), dtype)


def row_pieces(tensor: ir.TensorProtocol) -> Iterator[npt.NDArray[np.generic]]:
    """The rows of a tensor, ``PIECE_BYTES`` at a time, so that a large tensor is never copied whole."""
    count = int(tensor.shape[0])  # type: ignore[arg-type]
    step = max(1, PIECE_BYTES * count // max(1, tensor.nbytes))
    for first in range(0, count, step):
        if isinstance(tensor, Widened):
            yield tensor.rows(first, first + step)
        else:
            yield tensor.numpy()[first : first + step]


@contextmanager
def stand_ins(roots: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[Mapping[int, torch.Tensor]]:
    """Give parameters the type ``dtype`` until the end of the context: small ones converted, matrices as reserved memory.

    Yields:
        Address of the reserved memory → the matrix that it replaces.
    """
    made: dict[int, nn.Parameter] = {}
    found: dict[int, torch.Tensor] = {}
    originals = []
    for module in (module for root in roots for module in root.modules()):
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype == dtype:
                continue
            originals.append((module, name, parameter))
            if id(parameter) not in made:
                weight = parameter.detach()
                large = weight.dim() >= 2 and weight.numel() > SMALL
                wide = torch.empty(weight.shape, dtype=dtype) if large else weight.to(dtype)
                if large:
                    found[wide.data_ptr()] = weight
                made[id(parameter)] = nn.Parameter(wide, requires_grad=False)
    try:
        for module, name, parameter in originals:
            module._parameters[name] = made[id(parameter)]
        yield found
    finally:
        for module, name, parameter in originals:
            module._parameters[name] = parameter


def widen(models: Iterable[ir.Model], weights: Mapping[int, torch.Tensor], dtype: torch.dtype) -> None:
    """Replace initializers that view reserved memory, transposed or not, by the original matrices.

    Raises:
        CheckpointError: Tracing computed a matrix from reserved memory, so its values are unknown.
    """
    for value in [value for model in models for value in model.graph.initializers.values()]:
        tensor = value.const_value
        if not weights or tensor is None or tensor.dtype != _DTYPES[dtype]:
            continue
        if len(tensor.shape) < 2 or tensor.size <= SMALL:
            continue
        array = tensor.numpy()
        weight = weights.get(array.ctypes.data)
        if weight is not None:
            same = array.flags.c_contiguous and array.shape == tuple(weight.shape)
            value.const_value = Widened(weight if same else weight.T, dtype, value.name)
            assert value.const_value.shape == tensor.shape
        elif not (value.name or "").startswith("rope_"):
            raise CheckpointError(
                f"weight {value.name}: tracing computes it from others, which does not work for a "
                f"{next(iter(weights.values())).dtype} checkpoint: load it in float32 (export without --no-verify)"
            )
