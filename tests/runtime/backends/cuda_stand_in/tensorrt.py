"""Takes the place of the module ``tensorrt_rtx`` or ``tensorrt`` at run time: engines that run on ONNX Runtime's CPU provider.

An engine file names a session that its build opened. Launches go into the stream of the stand-in for CUDA, so that a captured
step really is one, and run over "device" memory by address. Contexts keep the rules that NVIDIA documents:

- All addresses are multiples of 256.
- A context needs its activations' memory, all shapes within its profile, and all addresses before it runs.
- After a change of shapes or profile the first launch does work that no capture allows.
- A context that was captured is used for nothing else ("one execution context per captured graph").
- With lazy specialization (the default) TensorRT-RTX exchanges kernels later, which a captured graph would not see.
- An engine that may allocate memory while it runs cannot be captured; ``is_stream_capturable`` says so.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx as real

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import GraphSpec
from balcony_runtime.backends.accelerator import tensorrt
from balcony_runtime.backends.accelerator.device import Region
from balcony_runtime.backends.accelerator.tensorrt_builder import BuiltEngine, profiles
from balcony_runtime.backends.onnxruntime.backend import open_session
from tests.runtime.backends.cuda_stand_in.runtime import Runtime
from tests.support.engine_sets import build_engines

ARENA_BYTES = 4096
#: Bytes that must divide an address, as NVIDIA's reference of ``setTensorAddress`` and ``setDeviceMemoryV2`` says.
ALIGNMENT = 256
#: Sessions of all engines that were built.
_sessions: list[Any] = []
_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


class StandInBuilder:
    """Writes engines that :class:`TensorRT` loads.

    It has the part of :class:`balcony_runtime.backends.accelerator.tensorrt_builder.Builder` that a build needs.
    """

    def __init__(self, target: str, batch_size: int, *, capturable: bool = True) -> None:
        module = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}[target]
        self.name, self.compute_capabilities = f"{module} {real.__version__}", ("89",)
        self._batch_size, self._capturable = batch_size, capturable

    def build(self, path: Path, spec: GraphSpec, progress: Callable[[float], None]) -> BuiltEngine:
        _sessions.append(open_session(path, entries={"session.disable_quant_qdq": "1"}))
        shapes = list(profiles(spec, self._batch_size))
        facts = {"session": len(_sessions) - 1, "profiles": shapes, "capturable": self._capturable}
        return BuiltEngine(json.dumps(facts).encode(), 1, None)


def with_engines(bundle: Bundle, name: str, *, capturable: bool = True) -> Bundle:
    """The bundle with engines of a set, made for the stand-in."""
    engines = bundle.manifest.engines[name]
    graphs = [graph for graph in engines.graphs if graph != "backbone"]
    builder: Any = StandInBuilder(engines.target, engines.batch_size, capturable=capturable)
    build_engines(bundle, name, builder, graphs, lambda *_: None)
    return Bundle.open(bundle.path)


class TensorRT:
    """The module, as the executor uses it.

    Args:
        cuda: the GPU.
        target: which TensorRT it is.
    """

    __version__ = real.__version__
    ILogger = real.ILogger
    ExecutionContextAllocationStrategy = real.ExecutionContextAllocationStrategy

    def __init__(self, cuda: Runtime, target: str) -> None:
        self.cuda = cuda
        #: Contexts that were made.
        self.contexts: list[Context] = []
        #: The number of further contexts for which there is memory.
        self.room = 10**6
        if target == "rtx":
            self.IRuntimeCache = real.IRuntimeCache
            self.DynamicShapesKernelSpecializationStrategy = real.DynamicShapesKernelSpecializationStrategy

    def Runtime(self, log: Any) -> _Loader:  # noqa: N802 - TensorRT's name
        return _Loader(self, log)


class _Loader:
    def __init__(self, trt: TensorRT, log: Any) -> None:
        self._trt, self._log = trt, log

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        try:
            return Engine(self._trt, self._log, **json.loads(data))
        except ValueError:
            self._log.log(real.ILogger.ERROR, "the file is\nnot an engine")
            return None


class Engine:
    def __init__(self, trt: TensorRT, log: Any, session: int, profiles: list[Any], capturable: bool) -> None:
        self.trt, self.log, self.profiles, self.capturable = trt, log, profiles, capturable
        self.session = _sessions[session]
        self.num_optimization_profiles = len(profiles)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return ARENA_BYTES * (profile_index + 1)

    def create_runtime_config(self) -> Config:
        return Config()

    def create_execution_context(self, how: Any) -> Context | None:
        self.trt.room -= 1
        if self.trt.room < 0:
            self.log.log(real.ILogger.ERROR, "out of memory")
            return None
        self.trt.contexts.append(Context(self, how))
        return self.trt.contexts[-1]


class Config:
    """A runtime configuration of TensorRT-RTX, with its defaults."""

    def __init__(self) -> None:
        self.strategy = real.ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = real.DynamicShapesKernelSpecializationStrategy.LAZY
        self.cache: Cache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Cache:
    """Kernels as bytes; the first launch of a context adds one for each shape."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        self.kernels = set(json.loads(blob))
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.kernels)).encode()


class Context:
    def __init__(self, engine: Engine, how: Any) -> None:
        self._engine, self._cuda = engine, engine.trt.cuda
        self.config = how if isinstance(how, Config) else None
        strategy = self.config.strategy if self.config else how
        self._own_memory = strategy != real.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.config is not None:
            self.is_stream_capturable = lambda stream_handle: engine.capturable and not self._own_memory
        self.profile, self._bytes, self._fresh, self.captured = 0, 0, False, False
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._inputs = {value.name: value for value in engine.session.get_inputs()}
        self._outputs = {value.name: value for value in engine.session.get_outputs()}

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % ALIGNMENT:
            self._cuda.noted.append(f"memory of a context at {memory % ALIGNMENT} bytes past a multiple of {ALIGNMENT}")
        self._bytes = size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if profile_index >= self._engine.num_optimization_profiles:
            raise RuntimeError("Error in set optimization profile async.")  # as the binding does
        self.profile, self._fresh = profile_index, False
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.profiles[self.profile][name]
        if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
            return False
        if self._shapes.get(name) != shape:
            self._shapes[name], self._fresh = shape, False
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._inputs and name not in self._outputs:
            return False
        if memory % ALIGNMENT:
            return self._refused(
                f"{name} lies {memory % ALIGNMENT} bytes past a multiple of {ALIGNMENT}", "setTensorAddress"
            )
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        needed = self._engine.get_device_memory_size_for_profile_v2(self.profile)
        missing = [name for name in self._inputs if name not in self._shapes]
        missing += [name for name in (*self._inputs, *self._outputs) if name not in self._addresses]
        if missing or self._bytes < needed:
            return self._refused(f"{missing} are not set, or {self._bytes} of {needed} bytes of memory")
        if not self._fresh and not self._cuda.initialise(stream_handle):
            return self._refused("the first launch after a change cannot be captured")
        self._fresh = True
        capturing = self._cuda.captures(stream_handle)
        if self.captured:
            self._cuda.noted.append("a context that was captured is used again")
        if capturing and self.config is not None:
            strategies = real.DynamicShapesKernelSpecializationStrategy
            if self.config.dynamic_shapes_kernel_specialization_strategy == strategies.LAZY:
                self._cuda.noted.append("a capture with lazy specialization")
        if capturing and not self._engine.capturable:
            return self._refused("it allocates memory while it runs")
        if self.config is not None and self.config.cache is not None:
            self.config.cache.kernels.add(str(sorted(self._shapes.items())))
        self.captured = self.captured or capturing
        regions = self._regions()
        code = self._cuda.launch(stream_handle, functools.partial(self._run, regions), list(regions.values()))
        return int(code) == 0

    def _refused(self, why: str, where: str = "enqueueV3") -> bool:
        self._engine.log.log(real.ILogger.ERROR, f"{why}\n(in {where})")
        return False

    def _regions(self) -> dict[str, Region]:
        sizes = {
            symbol: size
            for name, shape in self._shapes.items()
            for symbol, size in zip(self._inputs[name].shape, shape, strict=True)
        }
        regions = {}
        for name, value in {**self._inputs, **self._outputs}.items():
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in value.shape)
            regions[name] = Region(self._addresses[name], shape, _TYPES[value.type])
        return regions

    def _run(self, regions: Mapping[str, Region]) -> None:
        binding = self._engine.session.io_binding()
        for names, bind in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for name in names:
                region = regions[name]
                bind(name, "cpu", 0, np.dtype(region.dtype), region.shape, region.pointer)
        self._engine.session.run_with_iobinding(binding)


@contextlib.contextmanager
def installed(cuda: Runtime, target: str) -> Iterator[TensorRT]:
    """This TensorRT in the place of the real one."""
    trt, before = TensorRT(cuda, target), tensorrt.import_tensorrt
    tensorrt.import_tensorrt = lambda _: trt
    try:
        yield trt
    finally:
        tensorrt.import_tensorrt = before
