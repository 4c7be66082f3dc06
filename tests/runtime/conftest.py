"""Bundles with engine sets, for the backends of accelerators."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_export.tensorrt.engine_set import write_graphs
from balcony_export.tensorrt.graphs import Format


@pytest.fixture(scope="session")
def with_engine_sets(
    export_tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """A tiny model's bundle with graphs for TensorRT in both sets of operators, by the name of its architecture."""
    made: dict[str, Path] = {}

    def build(architecture: str) -> Bundle:
        if architecture not in made:
            path = tmp_path_factory.mktemp("engines") / architecture
            shutil.copytree(export_tiny(architecture).path, path)
            bundle = Bundle.open(path)
            write_graphs(bundle, "rtx-fp32", "rtx", Format("fp32", "fused", 256))
            write_graphs(bundle, "tensorrt-fp32-plain", "tensorrt", Format("fp32", "plain", 256))
            made[architecture] = path
        return Bundle.open(made[architecture])

    return build
