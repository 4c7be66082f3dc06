"""Engines of a set, built outside the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.engine_sets import new_engine_directory, record_engines
from balcony_edge.bundle.manifest import Manifest
from balcony_runtime.backends.tensorrt_builder import link_files, make_engines


def build_engines(
    bundle: Bundle, name: str, builder: Any, graphs: Sequence[str], progress: Callable[[str, float], None]
) -> Manifest:
    """Build engines of a set from its graphs and add them to the manifest, as `balcony-edge build` does."""
    engines = bundle.manifest.engines[name]
    with new_engine_directory(bundle.path, name) as directory:
        link_files(bundle.engine_directory(name), engines, directory)
        return record_engines(bundle.path, name, make_engines(directory, engines, builder, graphs, progress), directory)
