"""Engine sets, made outside the command line: graphs, and engines from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.engine_sets import new_engine_directory, record_engines
from balcony_edge.bundle.manifest import Manifest
from balcony_edge.errors import DeviceError
from balcony_runtime.backends.accelerator.tensorrt_builder import Target, link_files, make_engines

if TYPE_CHECKING:  # the tests on Arm have no torch
    from balcony_export.tensorrt.graphs import Format
    from balcony_export.tensorrt.integers import Rounding


def build_engines(
    bundle: Bundle, name: str, builder: Any, graphs: Sequence[str], progress: Callable[[str, float], None]
) -> Manifest:
    """Build engines of a set from its graphs and add them to the manifest, as `balcony-edge build` does."""
    engines = bundle.manifest.engines[name]
    with new_engine_directory(bundle.path, name) as directory:
        link_files(bundle.engine_directory(name), engines, directory)
        return record_engines(bundle.path, name, make_engines(directory, engines, builder, graphs, progress), directory)


def write_graphs(
    bundle: Bundle, name: str, target: Target, form: Format, *, batch_size: int = 1, rounding: Rounding | None = None
) -> Manifest:
    """Write the graphs of a set and record them, as `balcony-edge build --graphs-only` does."""
    from balcony_export.tensorrt.engine_set import make_graphs

    with new_engine_directory(bundle.path, name) as directory:
        engines = make_graphs(bundle, directory, target, form, batch_size=batch_size, rounding=rounding)
        return record_engines(bundle.path, name, engines, directory)


@contextlib.contextmanager
def memory_for(device: Any, count: int) -> Iterator[list[Any]]:
    """A context in which a device has memory for so many more regions; gives the shapes of those that were allocated."""
    allocate, taken = device.allocate, list[Any]()

    def allocated(shape: Any, dtype: Any) -> Any:
        if len(taken) == count:
            raise DeviceError("out of memory")
        taken.append(shape)
        return allocate(shape, dtype)

    device.allocate = allocated
    try:
        yield taken
    finally:
        device.allocate = allocate
