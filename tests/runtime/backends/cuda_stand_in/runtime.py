"""Takes the place of the module ``cuda.bindings.runtime``: the same functions and types, over cudart_stand_in.c.

Types and enums are those of the real package, so are parameters; a call with other ones raises TypeError, as there. A
function that the stand-in does not have is an error.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import inspect
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cuda.bindings import runtime as real

from balcony_runtime.backends.accelerator import cuda
from balcony_runtime.backends.accelerator.device import Region

#: Function → type of its result besides the code; None: it has none.
FUNCTIONS: dict[str, Any] = {
    "cudaDeviceGetAttribute": int,
    "cudaDeviceGetPCIBusId": bytes,
    "cudaDriverGetVersion": int,
    "cudaFree": None,
    "cudaFreeAsync": None,
    "cudaFreeHost": None,
    "cudaGetDevice": int,
    "cudaGetDeviceCount": int,
    "cudaGetLastError": None,
    "cudaGraphAddChildGraphNode": real.cudaGraphNode_t,
    "cudaGraphCreate": real.cudaGraph_t,
    "cudaGraphDestroy": None,
    "cudaGraphExecDestroy": None,
    "cudaGraphInstantiate": real.cudaGraphExec_t,
    "cudaGraphLaunch": None,
    "cudaMalloc": ctypes.c_void_p,
    "cudaMallocAsync": ctypes.c_void_p,
    "cudaMallocHost": ctypes.c_void_p,
    "cudaMemcpy2DAsync": None,
    "cudaMemcpyAsync": None,
    "cudaMemsetAsync": None,
    "cudaSetDevice": None,
    "cudaStreamBeginCapture": None,
    "cudaStreamCreateWithFlags": real.cudaStream_t,
    "cudaStreamDestroy": None,
    "cudaStreamEndCapture": real.cudaGraph_t,
    "cudaStreamSynchronize": None,
}
#: Functions of the real package that need no driver.
TABLES = ("cudaGetErrorString", "cudaRuntimeGetVersion")
_HANDLES = (real.cudaStream_t, real.cudaGraph_t, real.cudaGraphExec_t, real.cudaGraphNode_t)
_Kernel = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _Span(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("size", ctypes.c_size_t))


@functools.cache
def compiled() -> Path:
    """The library, compiled once a process."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the stand-in for CUDA is C: no compiler named cc here")
    directory = Path(tempfile.mkdtemp(prefix="cuda-stand-in-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    library = directory / "libcudart_stand_in.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, "-o", library, Path(__file__).with_name("cudart_stand_in.c")], check=True)
    return library


class Runtime:
    """One GPU. Attributes are those of ``cuda.bindings.runtime``; what tests control has names of its own."""

    def __init__(self) -> None:
        self._c = ctypes.CDLL(str(compiled()))
        for name in ("standInMisuse", "standInLeft"):
            getattr(self._c, name).restype = ctypes.c_char_p
        self._c.standInBytes.restype = ctypes.c_long
        self._c.standInReset()
        #: Calls of CUDA's functions: name and arguments.
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        #: Misuse that stand-ins of libraries found.
        self.noted: list[str] = []
        self._work: dict[int, Callable[[], None]] = {}
        self._kernel = _Kernel(self._run)
        #: The error of the last kernel that failed.
        self.error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return functools.partial(self._call, name)
        value = getattr(real, name)
        if name not in TABLES and inspect.isroutine(value):
            raise AttributeError(f"{name} is not in the stand-in: write it, or do without")
        return value

    def _call(self, name: str, *given: Any) -> tuple[Any, ...]:
        inspect.signature(getattr(real, name)).bind(*given)  # raises TypeError
        self.calls.append((name, given))
        function, kind = getattr(self._c, name), FUNCTIONS[name]
        arguments = [_passed(value) for value in given]
        if kind is None:
            return (real.cudaError_t(function(*arguments)),)
        if kind is bytes:
            text = ctypes.create_string_buffer(given[0])
            code = real.cudaError_t(function(text, *arguments))
            return code, text.raw if code == real.cudaError_t.cudaSuccess else None
        out = ctypes.c_int() if kind is int else ctypes.c_void_p()
        last = name == "cudaStreamEndCapture"  # the others have it first
        code = real.cudaError_t(
            function(*arguments, ctypes.byref(out)) if last else function(ctypes.byref(out), *arguments)
        )
        if code != real.cudaError_t.cudaSuccess:
            return code, None
        return code, kind(out.value or 0) if kind in _HANDLES else out.value

    def launch(self, stream: int, work: Callable[[], None], regions: Sequence[Region]) -> Any:
        """Put a library's kernel into a stream. A kernel that raises crashes the GPU. Returns CUDA's code."""
        key = len(self._work) + 1
        self._work[key] = work
        spans = (_Span * len(regions))(*((region.pointer, region.nbytes) for region in regions))
        arguments = (ctypes.c_void_p(stream), self._kernel, ctypes.c_void_p(key), spans, len(regions))
        return real.cudaError_t(self._c.standInLaunch(*arguments))

    def _run(self, key: int) -> int:
        try:
            self._work[key]()
        except BaseException as error:
            self.error = error
            return 1
        return 0

    def initialise(self, stream: int) -> bool:
        """Do what a library does at its first launch and no capture allows; whether it worked."""
        return not self._c.standInInitialise(ctypes.c_void_p(stream))

    def captures(self, stream: int) -> bool:
        """Whether a stream is being captured."""
        return bool(self._c.standInCapturing(ctypes.c_void_p(stream)))

    def set(self, **values: int) -> None:
        """Change the machine: ``devices``, ``driver`` (13000 for CUDA 13.0), ``major``, ``minor``, ``pools``, ``memory``."""
        for name, value in values.items():
            self._c.standInSet(name.encode(), ctypes.c_long(value))

    def fail(self, function: str, code: Any, *, after: int = 0) -> None:
        """Let a call of a function fail, after this many more that work."""
        self._c.standInFail(function.encode(), after, int(code))

    def count(self, function: str) -> int:
        """Number of calls of a function so far."""
        return int(self._c.standInCalls(function.encode()))

    def misuse(self) -> list[str]:
        """What was misused since the last question."""
        noted, self.noted = self.noted, []
        return [*self._c.standInMisuse().decode().splitlines(), *noted]

    def left(self) -> str:
        """What is still allocated, in words."""
        text: str = self._c.standInLeft().decode()
        return text.replace("\n", "; ")

    @property
    def held_bytes(self) -> int:
        """Bytes of device memory in use, including what waits in a stream to be freed."""
        return int(self._c.standInBytes())


def _passed(value: Any) -> Any:
    """An argument as C gets it."""
    if value is None:
        return None
    if isinstance(value, list):
        return (ctypes.c_void_p * len(value))(*(int(node) for node in value))
    if isinstance(value, _HANDLES):
        return ctypes.c_void_p(int(value))
    if hasattr(value, "value"):  # an enum
        return int(value.value)
    if not isinstance(value, int):
        raise TypeError(f"CUDA gets {value!r}")
    return ctypes.c_void_p(value) if value > 0x7FFFFFFF else ctypes.c_size_t(value)


@contextlib.contextmanager
def installed() -> Iterator[Runtime]:
    """A GPU in the place of this machine's; afterwards nothing may be left or have been misused."""
    runtime, before = Runtime(), cuda.cudart
    cuda.cudart = runtime
    try:
        yield runtime
        assert (runtime.misuse(), runtime.left()) == ([], "")
    finally:
        cuda.cudart = before
