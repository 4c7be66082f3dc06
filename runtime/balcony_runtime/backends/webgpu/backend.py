"""The graphs of a bundle on a WebGPU device: ONNX Runtime's provider for Vulkan, Metal and Direct3D 12.

Owns the sessions of a bundle's graphs. The graphs are those for CPUs, because their fused operators have kernels on WebGPU.
Memory and the order of its end are in :mod:`.device`, the passes of a sequence in :mod:`.state`.
"""

from __future__ import annotations

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import Manifest
from balcony_edge.closing import Closing
from balcony_edge.errors import BundleError, InputError
from balcony_runtime.backends.graph_files.check import check_graph, nodes_of
from balcony_runtime.backends.onnxruntime.backend import check_io
from balcony_runtime.backends.token_table import TokenTable
from balcony_runtime.backends.webgpu import small_graphs
from balcony_runtime.backends.webgpu.device import WebGpuDevice
from balcony_runtime.backends.webgpu.probe import Attention, most_rows
from balcony_runtime.backends.webgpu.provider import NAME, find_provider, misfit
from balcony_runtime.backends.webgpu.state import WebGpuState


class WebGpuBackend(Closing):
    """Sessions of one bundle on a WebGPU device; implements :class:`balcony_runtime.backends.base.Backend`.

    Raises:
        BundleError: a graph cannot be loaded, differs from the manifest, or has no form that WebGPU runs.
        DeviceError: there is no adapter, or it cannot run the bundle.
        MissingDependencyError: no package has the provider.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.manifest: Manifest = bundle.manifest
        if (problem := misfit(self.manifest)) is not None:
            raise BundleError(f"{bundle.path}: {problem}")
        provider = find_provider()
        #: The device does the work; one thread of the host starts it.
        self.threads = 1
        self.max_length = self.manifest.model.context_length
        self.name = f"ONNX Runtime, {NAME}"
        self.most_members: int | None = 1
        self.picks_inside, self.graphs = True, "lowered"
        self.table = TokenTable(bundle)
        self.dtype = self.table.dtype
        with WebGpuDevice.lock:
            self.device = WebGpuDevice(provider, self.manifest.embedding.dtype, len(self.manifest.exit_layers), threads)
            try:
                kinds = self._open_graphs(bundle)
                #: Most rows of a pass; None: any number.
                self.most_rows = most_rows(self.device, kinds, self.manifest.model.head_dim)
            except BaseException:
                self.device.close()
                raise

    def _open_graphs(self, bundle: Bundle) -> set[Attention]:
        """Open the bundle's graphs and return each kind of attention in them."""
        kinds = set()
        for name, spec in self.manifest.runnable.items():
            if name == "backbone" or name.endswith("_keys"):  # see WebGpuState.run_exit
                continue
            path = bundle.file(spec.file)
            check_graph(path, self.manifest.files)
            check_io(path, spec, self.device.open(name, path))
            for inputs, attributes in nodes_of(path, "GroupQueryAttention"):
                kinds.add(Attention(tuple(sorted(attributes.items())), sink=inputs > small_graphs.SINK_INPUT))
        return kinds

    def new_state(self, batch_size: int, max_length: int) -> WebGpuState:
        """Memory for one sequence; see :class:`balcony_runtime.backends.base.Backend`.

        Raises:
            InputError: there are several members.
            DeviceError: there is not enough memory.
        """
        if batch_size > 1:
            raise InputError(f"batch_size = {batch_size}: WebGPU runs no batches: give each its own sequence")
        with self.device.lock:
            return WebGpuState(self, max_length)

    def new_pool(self, members: int, max_length: int) -> None:
        """Nothing: a part of a buffer cannot be bound, so members of a pool could not share passes over ranges."""

    def close(self) -> None:
        """Free memory and sessions."""
        self.device.close()
        self.table.close()
