"""Type of a run's passes: bfloat16 where the device multiplies in it, else float32.

Owns the choice, which is measured: the names of a CPU's instructions are known on Linux only, and what PyTorch makes of them
depends on its build.
"""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch

from balcony_export.model.gpu import has_gpu

PassPrecision = Literal["bf16", "fp32"]
DTYPES: dict[PassPrecision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@functools.cache
def native_precision() -> PassPrecision:
    """The faster type on the device of a run, CUDA or else the CPU.

    PyTorch's products in bfloat16 take hundreds of times as long as in float32 on a CPU with AVX2 only, and three times as long
    on one with AVX-512 but without bfloat16 instructions.
    """
    if has_gpu():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return min(DTYPES, key=_product_s)


def _product_s(precision: PassPrecision) -> float:
    """Seconds of a matrix product on the CPU, the best of three after a first one."""
    matrix, times = torch.ones(512, 512, dtype=DTYPES[precision]), []
    for _ in range(4):
        begun = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - begun)
    return min(times[1:])
