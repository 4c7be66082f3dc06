"""ONNX Runtime over device memory: runs the graphs of an engine set through CUDA's execution provider, or on the CPU.

Owns the sessions. All tensors are bound by pointer, so rows and caches never leave the device.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, DeviceError, is_out_of_memory
from balcony_runtime.backends.accelerator.backend import DeviceBackend
from balcony_runtime.backends.accelerator.device import Device, HostDevice, Launch, Region, array_dtype
from balcony_runtime.backends.graph_files.check import check_graph
from balcony_runtime.backends.installed import checked_onnxruntime, first_line
from balcony_runtime.backends.onnxruntime.backend import open_session

#: Device name → ONNX Runtime's provider and the kind of memory that it binds.
PROVIDERS = {
    "cuda": ("CUDAExecutionProvider", "cuda"),
    "cpu": ("CPUExecutionProvider", "cpu"),
}
#: The number of bfloat16 in ONNX's TensorProto.DataType. NumPy has no such type, and IO binding also takes the number.
_BFLOAT16 = 16


class OnnxRuntimeExecutor:
    """Sessions of an engine set's graphs; implements :class:`.device.Executor`."""

    #: ``TensorScatter`` and ``ScatterElements`` may write to their input, because they do not change other values.
    in_place = True
    most_members: int | None = None

    def __init__(
        self,
        directory: Path,
        files: Mapping[str, str],
        provider: str,
        options: dict[str, Any],
        threads: int | None = None,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        (name, self._memory), self._wait = PROVIDERS[provider], wait
        module = checked_onnxruntime()
        if name not in module.get_available_providers():
            raise DeviceError(
                f"--device {provider}: this build of ONNX Runtime has no {name}: "
                "pip uninstall onnxruntime, then install 'balcony-edge[gpu]'; or run with --device cpu"
            )
        if provider == "cuda":  # CUDA's and cuDNN's libraries may be packages of this environment
            with contextlib.redirect_stdout(sys.stderr):
                module.preload_dlls()
        providers = [(name, options)] if options else [name]
        # On the CPU the purpose is to check the files. A product fused with its DequantizeLinear would also round its inputs.
        entries = {"session.disable_quant_qdq": "1"} if provider == "cpu" else None
        self._sessions = {}
        for graph, file in files.items():
            try:
                session = open_session(directory / file, threads=threads, providers=providers, entries=entries)
            except BundleError as error:
                cause = error.__cause__ or error  # ONNX Runtime's error
                full = is_out_of_memory(cause) or "alloc" in str(cause).lower()
                if provider == "cpu" or not (full or re.search(r"\b\w+ failure \d", str(cause))):
                    raise
                why, cure = "the GPU has too little memory for it", "free memory of the GPU"
                if not full:  # CUDA, cuBLAS or cuDNN refuses the driver or the GPU
                    why, cure = f"ONNX Runtime could not start {name} ({first_line(cause)})", "update NVIDIA's driver"
                raise DeviceError(f"{graph}: {why}: {cure}, or run with --device cpu") from error
            if session.get_providers()[0] != name:
                # If a library of the provider is missing, ONNX Runtime only warns and uses the CPU.
                raise DeviceError(
                    f"{graph}: ONNX Runtime could not start {name} (a library of CUDA or cuDNN may be missing): "
                    "pip install 'balcony-edge[gpu]', or run with --device cpu"
                )
            self._sessions[graph] = session

    def prepare(self, graph: str, tensors: Mapping[str, Region], *, to_capture: bool = False) -> Launch:
        """A session allocates memory while it runs, so its launches are never captured."""
        session = self._sessions[graph]
        binding = session.io_binding()

        def bind(values: Sequence[Any], to: Callable[..., None]) -> None:
            for value in values:
                region = tensors[value.name]
                kind = _BFLOAT16 if region.dtype == "bfloat16" else array_dtype(region.dtype)
                to(value.name, self._memory, 0, kind, region.shape, region.pointer)

        bind(session.get_outputs(), binding.bind_output)

        def launch() -> None:
            # An input that a node on the CPU reads is copied when it is bound, not when the graph runs, and in another stream.
            # In a balcony that is ``start``: shapes, which are on the CPU, are added to it.
            self._wait()
            try:
                bind(session.get_inputs(), binding.bind_input)
                session.run_with_iobinding(binding)
            except RuntimeError as error:
                cure = "free memory" if is_out_of_memory(error) else "run it with --device cpu"
                why = first_line(error)
                raise DeviceError(f"{graph}: ONNX Runtime failed while running it ({why}): {cure}") from error

        return Launch(launch)

    def close(self) -> None:
        self._sessions.clear()


def open_backend(
    bundle: Bundle, engines: str, provider: str, *, threads: int | None = None, verify_hashes: bool = True
) -> DeviceBackend:
    """Open an engine set's graphs with ONNX Runtime.

    Args:
        bundle: bundle with the set.
        engines: name of the set.
        provider: key of :data:`PROVIDERS`.
        threads: size of ONNX Runtime's shared pool, if this is the first engine of the process.
        verify_hashes: whether the set's files are hashed.

    Raises:
        BundleError: the set is missing or damaged, or a graph cannot be loaded.
        DeviceError: the device is missing.
    """
    directory, chosen = bundle.engine_directory(engines, verify_hashes=verify_hashes), bundle.manifest.engines[engines]
    device: Device = HostDevice()
    options: dict[str, Any] = {}
    if provider == "cuda":
        from balcony_runtime.backends.accelerator.cuda import CudaDevice  # noqa: PLC0415 - an extra

        device = cuda = CudaDevice(capture=False)
        # TF32 is on by default: products in float32 would round their inputs to 10 bits, as float16 does.
        options = {"device_id": "0", "user_compute_stream": str(cuda.stream), "use_tf32": "0"}
    files = {name: spec.file for name, spec in chosen.graphs.items() if name != "backbone"}
    try:
        for file in files.values():
            check_graph(directory / file, chosen.files)
        with device.current():  # a session of the provider chooses its GPU for the thread
            executor = OnnxRuntimeExecutor(directory, files, provider, options, threads, device.synchronize)
    except BaseException:
        device.close()
        raise
    return DeviceBackend(bundle.manifest, chosen, device, executor, f"ONNX Runtime, {PROVIDERS[provider][0]}")
