"""ONNX Runtime over device memory: the graphs of an engine set through a GPU's execution provider, or the CPU's.

Owns the choice of the provider and the sessions. Everything is bound by pointer, so rows and caches never leave the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import DeviceError
from balcony_runtime.backends.device import Device, HostDevice, Region
from balcony_runtime.backends.device_state import DeviceBackend
from balcony_runtime.backends.graph_file import check_graph
from balcony_runtime.backends.installed import checked_onnxruntime
from balcony_runtime.backends.onnxruntime import open_session

#: Name → the providers of ONNX Runtime that it means, in order of preference, and the kind of memory that they bind.
PROVIDERS = {
    "nv": ("NvTensorRTRTXExecutionProvider", "cuda"),
    "tensorrt": ("TensorrtExecutionProvider", "cuda"),
    "cuda": ("CUDAExecutionProvider", "cuda"),
    "cpu": ("CPUExecutionProvider", "cpu"),
}


class OnnxRuntimeExecutor:
    """Sessions of an engine set's graphs; implements :class:`.device.Executor`."""

    #: ``TensorScatter`` and ``ScatterElements`` may write where they read: what they do not write is equal.
    in_place = True
    batch_size: int | None = None

    def __init__(self, directory: Path, files: Mapping[str, str], provider: str, options: dict[str, Any]) -> None:
        name, self._memory = PROVIDERS[provider]
        if name not in checked_onnxruntime().get_available_providers():
            raise DeviceError(
                f"--device {provider}: this build of ONNX Runtime has no {name}: "
                "pip uninstall onnxruntime, then install 'balcony-edge[gpu]'; or run with --device cpu"
            )
        providers = [(name, options)] if options else [name]
        # on the CPU it is the files that are to be checked: fused with its DequantizeLinear a product would round its inputs
        entries = {"session.disable_quant_qdq": "1"} if provider == "cpu" else None
        self._sessions = {
            graph: open_session(directory / file, providers=providers, entries=entries) for graph, file in files.items()
        }
        if strays := [graph for graph, session in self._sessions.items() if session.get_providers()[0] != name]:
            # ONNX Runtime goes on with the CPU, with a warning, where a library of the provider's is missing
            raise DeviceError(f"{strays[0]}: ONNX Runtime could not start {name}: see `balcony-edge doctor`")

    def prepare(self, graph: str, tensors: Mapping[str, Region]) -> Callable[[], None]:
        session = self._sessions[graph]
        binding = session.io_binding()
        for names, bind in (
            ([value.name for value in session.get_inputs()], binding.bind_input),
            ([value.name for value in session.get_outputs()], binding.bind_output),
        ):
            for name in names:
                region = tensors[name]
                bind(name, self._memory, 0, np.dtype(region.dtype), region.shape, region.pointer)

        def launch() -> None:
            try:
                session.run_with_iobinding(binding)
            except RuntimeError as error:
                line = (str(error).strip().splitlines() or ["no message"])[0][:200]
                raise DeviceError(f"{graph}: ONNX Runtime failed while running it ({line}): free memory") from error

        return launch

    def close(self) -> None:
        self._sessions.clear()


def open_backend(bundle: Bundle, engines: str, provider: str, *, verify_hashes: bool = True) -> DeviceBackend:
    """An engine set's graphs through ONNX Runtime.

    Args:
        bundle: holds the set.
        engines: the set's name.
        provider: a key of :data:`PROVIDERS`.
        verify_hashes: hash the set's files.

    Raises:
        BundleError: the set is not there or damaged, or a graph cannot be loaded.
        DeviceError: there is no such device.
    """
    directory, chosen = bundle.engine_directory(engines, verify_hashes=verify_hashes), bundle.manifest.engines[engines]
    device: Device = HostDevice()
    options: dict[str, Any] = {}
    if PROVIDERS[provider][1] == "cuda":
        from balcony_runtime.backends.cuda import CudaDevice  # noqa: PLC0415 - an extra

        device = cuda = CudaDevice(capture=False)  # a session's own allocations cannot be captured
        options = {"device_id": "0", "user_compute_stream": str(cuda.stream)}
    files = {name: spec.file for name, spec in chosen.graphs.items() if name != "backbone"}
    try:
        for file in files.values():
            check_graph(directory / file, chosen.files)
        executor = OnnxRuntimeExecutor(directory, files, provider, options)
    except BaseException:
        device.close()
        raise
    return DeviceBackend(bundle.manifest, chosen, device, executor, f"ONNX Runtime, {PROVIDERS[provider][0]}")
