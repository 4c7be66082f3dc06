"""Bundles with engine sets and a stand-in for CUDA, for the backends of accelerators; bundles of other precisions."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.quantize.blocks import parse_precision
from balcony_export.tensorrt.graphs import Format
from balcony_runtime.structure.grammar import Grammars
from tests.runtime.backends.cuda_stand_in import runtime as cuda_runtime
from tests.support.engine_sets import write_graphs

#: Rows of tokens to calibrate on: GPTQ, and the scales of an int8 cache.
ROWS = [[(7 * i + 13 * j) % 120 + 1 for i in range(48)] for j in range(40)]


@pytest.fixture(scope="session")
def with_engine_sets(
    export_tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """A tiny model's bundle with graphs for TensorRT in both sets of operators, by the name of its architecture."""

    @functools.cache
    def made(architecture: str) -> Path:
        path = tmp_path_factory.mktemp("engines") / architecture
        shutil.copytree(export_tiny(architecture).path, path)
        bundle = Bundle.open(path)
        write_graphs(bundle, "rtx-fp32", "rtx", Format("fp32", "fused", 256), batch_size=8)
        write_graphs(bundle, "tensorrt-fp32-plain", "tensorrt", Format("fp32", "plain", 256), batch_size=2)
        return path

    return lambda architecture: Bundle.open(made(architecture))


@pytest.fixture
def engine_sets(with_engine_sets: Callable[[str], Bundle], tmp_path: Path) -> Bundle:
    """The tiny Llama with both engine sets, as a copy."""
    return Bundle.open(Path(shutil.copytree(with_engine_sets("llama").path, tmp_path / "bundle")))


@pytest.fixture
def gpu() -> Iterator[cuda_runtime.Runtime]:
    """A stand-in for CUDA, with one GPU."""
    with cuda_runtime.installed() as runtime:
        yield runtime


@pytest.fixture(scope="session")
def with_precision(
    export_tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A tiny model's bundle in a precision, by the name of its architecture and the words of ``--precision``."""

    @functools.cache
    def build(architecture: str, precision: str) -> Path:
        source, path = export_tiny(architecture), tmp_path_factory.mktemp("precisions") / "bundle"
        calibration = ROWS if "asym" in precision or "kv=8" in precision else ()
        options = ExportOptions(f"tiny-{architecture}", True, parse_precision(precision), calibration)
        traced = None if precision == "fp16" else source.traced
        export_bundle(source.exits.copy(), source.tokenizer, path, options, traced=traced)
        return path

    return build


@pytest.fixture(scope="module")
def grammars(tiny: Any) -> Grammars:
    """The structures of the tiny bundle's tokenizer."""
    model = Bundle.open(tiny.path).manifest.model
    text = (tiny.path / "tokenizer.json").read_text(encoding="utf-8")
    return Grammars(lambda: text, model.vocab_size, model.eos_token_ids)
