"""Takes the place of ONNX Runtime's CUDA provider: sessions of the CPU whose runs go into a stream of the stand-in for CUDA.

An input that nodes on the CPU read is copied when it is bound, in no stream, as by ONNX Runtime (its issues 5857 and 29782).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from balcony_runtime.backends.accelerator import onnxruntime as onnxruntime_device
from balcony_runtime.backends.onnxruntime.backend import open_session
from tests.runtime.backends.cuda_stand_in.runtime import Runtime


class _Binding:
    """A binding of a session. In balconies nodes on the CPU read ``start``: they add shapes to it."""

    def __init__(self, binding: Any) -> None:
        self.real, self.bind_output = binding, binding.bind_output
        self._copy: Any = None

    def bind_input(self, name: str, memory: str, index: int, kind: Any, shape: tuple[int, ...], pointer: int) -> None:
        if name == "start":
            self._copy = np.empty(shape, kind)
            ctypes.memmove(self._copy.ctypes.data, pointer, self._copy.nbytes)
            pointer = self._copy.ctypes.data
        self.real.bind_input(name, memory, index, kind, shape, pointer)


class _Session:
    """A session that runs in the stream of its options, as `user_compute_stream` says."""

    def __init__(self, cuda: Runtime, session: Any, options: dict[str, str]) -> None:
        self._cuda, self._session, self._stream = cuda, session, int(options["user_compute_stream"])
        cuda.cudaSetDevice(int(options["device_id"]))  # as the provider does, for the calling thread

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> _Binding:
        return _Binding(self._session.io_binding())

    def run_with_iobinding(self, binding: _Binding) -> None:
        # The binding keeps its copies until the stream has come to this run.
        code = self._cuda.launch(self._stream, lambda: self._session.run_with_iobinding(binding.real), [])
        if int(code):
            raise RuntimeError(f"CUDA failure {int(code)}\nand more lines")


@contextlib.contextmanager
def installed(cuda: Runtime) -> Iterator[None]:
    """This provider in the place of the real one."""
    table, ort, before = (
        onnxruntime_device.PROVIDERS,
        onnxruntime_device.checked_onnxruntime(),
        onnxruntime_device.open_session,
    )

    def opened(path: Path, *, providers: list[tuple[str, dict[str, str]]], **_: Any) -> Any:
        return _Session(cuda, open_session(path), providers[0][1])

    listed = ort.get_available_providers
    onnxruntime_device.open_session = opened
    ort.get_available_providers = lambda: ["CUDAExecutionProvider", *listed()]
    onnxruntime_device.PROVIDERS = {**table, "cuda": ("CUDAExecutionProvider", "cpu")}
    try:
        yield
    finally:
        onnxruntime_device.open_session, onnxruntime_device.PROVIDERS = before, table
        ort.get_available_providers = listed
