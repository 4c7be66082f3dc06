"""Integer weights for TensorRT: ``DequantizeLinear`` before each product, symmetric as TensorRT's kernels need.

Owns the form: ``int4`` in blocks along the inputs, ``int8`` and ``fp8`` with a scale for each output. Rounding to ``int4`` uses
:func:`balcony_export.quantize.blocks.quantize`, so that both engines of a bundle round alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from balcony_edge.bundle.manifest import EnginePrecision
from balcony_edge.errors import InputError
from balcony_export.graph.ir_tools import SMALLEST_SCALE, decides, initializer


@dataclass
class Rounding:
    """Integers of the weights; each weight is rounded once, however many graphs use it.

    Attributes:
        block_size: Number of inputs that share a scale in ``int4``.
        given: Weight name → integers (N, K) and scales (N, blocks) of the weights rounded so far, here or earlier (by GPTQ).
    """

    block_size: int
    given: dict[str, tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]] = field(default_factory=dict)


def quantize_weights(model: ir.Model, precision: EnginePrecision, rounding: Rounding) -> None:
    """Replace the weights of every ``MatMul`` and ``Gemm`` by ``DequantizeLinear``, except for those that :func:`decides`."""
    for node in list(model.graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or decides(node):
            continue
        rows_first = node.op_type == "Gemm"  # (N, K), and the product transposes; otherwise (K, N)
        array = weight.const_value.numpy().astype(np.float32)
        quantized, scale, attributes = _quantized(str(weight.name), array, rows_first, precision, rounding)
        operands = [
            initializer(model, f"{weight.name}.{precision}", quantized),
            initializer(model, f"{weight.name}.scales", scale),
        ]
        dequantize = ir.Node("", "DequantizeLinear", operands, ir.convenience.convert_attributes(attributes))
        dequantize.outputs[0].type, dequantize.outputs[0].shape = weight.type, weight.shape
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(1, dequantize.outputs[0])
        if not weight.uses():
            del model.graph.initializers[str(weight.name)]


def _quantized(
    name: str, array: npt.NDArray[np.float32], rows_first: bool, precision: EnginePrecision, rounding: Rounding
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.float32], dict[str, int]]:
    """``(values, scales, attributes of DequantizeLinear)`` in the orientation of ``array``."""
    inputs = 1 if rows_first else 0
    if precision == "int4":
        if name not in rounding.given:
            rounding.given[name] = _int4(name, array if rows_first else array.T, rounding.block_size)
        values, scales = rounding.given[name]
        if not rows_first:
            values, scales = np.ascontiguousarray(values.T), np.ascontiguousarray(scales.T)
        return values.astype(ml_dtypes.int4), scales, {"axis": inputs, "block_size": rounding.block_size}
    largest = np.abs(array).max(axis=inputs, keepdims=True)
    top, kind = (127.0, np.dtype(np.int8)) if precision == "int8" else (448.0, np.dtype(ml_dtypes.float8_e4m3fn))
    scale = np.maximum(largest / top, SMALLEST_SCALE).astype(np.float32)  # above 0 even for a row of zeros
    scaled = array / scale
    values = (np.rint(scaled) if precision == "int8" else scaled).astype(kind)
    return values, scale.reshape(-1), {"axis": 1 - inputs}


def _int4(
    name: str, rows: npt.NDArray[np.float32], block_size: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Integers (N, K) and scales above 0 (N, K / block), to the nearest on the grid of least squared error."""
    import torch  # noqa: PLC0415 - a device builds engines from existing graphs without torch

    from balcony_export.graph.widen import row_pieces  # noqa: PLC0415 - likewise
    from balcony_export.quantize.blocks import quantize  # noqa: PLC0415 - likewise
    from balcony_runtime.backends.token_table import unpacked  # noqa: PLC0415 - likewise

    if rows.shape[1] % block_size:
        raise InputError(
            f"{name}: {rows.shape[1]} inputs are not a multiple of --block {block_size}, and TensorRT takes only whole blocks: "
            "give another block size or precision"
        )
    values = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), rows.shape[1] // block_size), np.float32)
    done = 0
    for piece in row_pieces(ir.tensor(rows)):  # rounding takes several times the size of what it is given
        blocks = quantize(torch.tensor(piece), 4, block_size, symmetric=True, positive=True)
        part = slice(done, done + len(piece))
        values[part], scales[part] = unpacked(blocks.packed, 4).reshape(piece.shape) - 8, blocks.scales
        done = part.stop
    return values, scales
