"""Random switching schedules on WebGPU, compared with passes from scratch on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcony_export.export import ExportOptions, export_bundle
from balcony_export.quantize.blocks import parse_precision
from balcony_runtime.engine import Engine
from tests.support.schedules import check_schedules

ARCHITECTURES = ("llama", "qwen3", "gemma3", "smollm3")


def plays(
    export_tiny: Callable[[str], Any], path: Path, architecture: str, precision: str, count: int, length: int
) -> None:
    """Random schedules on WebGPU against passes from scratch on the CPU."""
    source = export_tiny(architecture)
    if precision != "fp32":
        options = ExportOptions("q", True, parse_precision(precision))
        export_bundle(source.exits.copy(), source.tokenizer, path, options, traced=source.traced)
    path = source.path if precision == "fp32" else path
    with Engine.open(path, device="cpu") as reference, Engine.open(path, device="webgpu") as engine:
        check_schedules(reference, engine, count, prefill=length)


@pytest.mark.webgpu
@pytest.mark.parametrize("precision", ["fp32", "int4,level=1"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_switches_are_exact(
    export_tiny: Callable[[str], Any], tmp_path: Path, architecture: str, precision: str
) -> None:
    """int4 with float activations, as on the CPU; level 4 rounds activations on the CPU, and only on some adapters."""
    plays(export_tiny, tmp_path / "b", architecture, precision, 3, 12)


@pytest.mark.webgpu
def test_float16_is_as_close_to_the_cpu_as_its_rounding(export_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    source, random = export_tiny("llama"), np.random.default_rng(6)
    options = ExportOptions("half", True, "float16")
    export_bundle(source.exits.copy(), source.tokenizer, tmp_path / "b", options)
    with Engine.open(tmp_path / "b", device="cpu") as reference, Engine.open(tmp_path / "b", device="webgpu") as engine:
        pair = [one.new_sequence(max_length=64) for one in (reference, engine)]
        for round_, exit_layer in enumerate((5, 2, 3, 2, 5, 3, 5)):
            tokens = random.integers(0, 320, 1 + round_ % 3 * 4)
            want, got = (sequence.advance(exit_layer, tokens) for sequence in pair)
            # WebGPU multiplies in half precision, where a CPU multiplies in float32; a wrong row differs by half of it.
            assert np.abs(got - want).max() <= 6e-2 * np.abs(want).max(), round_
            for sequence in pair:
                sequence.rollback(sequence.length - round_ % 2)


@pytest.mark.webgpu
@pytest.mark.deep
@pytest.mark.parametrize("precision", ["fp32", "int4,level=1", "int8,level=1"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_schedules(export_tiny: Callable[[str], Any], tmp_path: Path, architecture: str, precision: str) -> None:
    plays(export_tiny, tmp_path / "b", architecture, precision, 20, 40)
