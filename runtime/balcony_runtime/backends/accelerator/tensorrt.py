"""TensorRT as an executor: deserialized engines, their contexts, one arena of activations for all contexts.

Owns engines and contexts; :mod:`.cuda` owns memory and the stream. Passes share one context per graph and optimization profile.
A launch that is captured has a context of its own, as NVIDIA asks ("one execution context per captured graph"): the graph
refers to memory of the context, which a later pass over other shapes or addresses would change. Both TensorRTs have the same
interface; the set names the one that built it. Execution needs an NVIDIA GPU; docs/tensorrt.md lists what was run on which
machine.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import EngineSet
from balcony_edge.errors import BalconyError, BundleError, DeviceError
from balcony_edge.files import write_atomically
from balcony_runtime.backends.accelerator.backend import DeviceBackend
from balcony_runtime.backends.accelerator.cuda import CudaDevice
from balcony_runtime.backends.accelerator.device import Launch, Region
from balcony_runtime.backends.accelerator.tensorrt_builder import (
    MODULES,
    PASSES,
    RTX_GPUS,
    gpus_of,
    import_tensorrt,
    make_log,
    one_line,
    started,
)

_log = logging.getLogger(__name__)


class TensorRTExecutor:
    """Engines of one set; implements :class:`.device.Executor`.

    Raises:
        BundleError: the set has no engines, or they were built by another TensorRT or for other GPUs.
        DeviceError: the GPU has too little memory for them or too old a driver, or TensorRT cannot start.
    """

    def __init__(self, directory: Path, engines: EngineSet, device: CudaDevice) -> None:
        self._trt, self._device, self._table = import_tensorrt(engines.target), device, engines.graphs
        _refuse_misfits(directory, engines, f"{MODULES[engines.target]} {self._trt.__version__}", device.capability)
        self.in_place = engines.operators == "fused"
        self.most_members: int | None = engines.batch_size
        self._warned: set[str] = set()
        self._log = make_log(self._trt)
        self._runtime = started(self._trt.Runtime, self._log, MODULES[engines.target], DeviceError)
        self._engines = {}
        for graph, spec in engines.engines.items():
            if graph == "backbone":  # the whole backbone is for other tools
                continue
            self._log.forget()
            engine = self._runtime.deserialize_cuda_engine((directory / spec.file).read_bytes())
            if engine is None:
                raise self._refusal(directory / spec.file, _build(engines))
            self._engines[graph] = engine
        # Passes run one after another on one stream, so all can use the same memory.
        sizes = [e.get_device_memory_size_for_profile_v2(p) for e in self._engines.values() for p in _profiles_of(e)]
        self._arena = device.allocate((max(sizes, default=1),), "int8")
        self._kernels = _KernelCache(directory / f"kernels-{device.capability}.cache")
        # Made here, because the first pass of a profile may be in the middle of a reply.
        self._contexts = {
            (name, p): self._new_context(name, p) for name, e in self._engines.items() for p in _profiles_of(e)
        }
        # At close(), when the executor is collected, or at the exit of Python: not every program closes what it loads.
        self._end = weakref.finalize(self, self._kernels.save)

    def prepare(self, graph: str, tensors: Mapping[str, Region], *, to_capture: bool = False) -> Launch:
        profile = _profile_for(self._table[graph].inputs[0].name, tensors, self._engines[graph])
        if to_capture:
            context = self._new_context(graph, profile, to_capture=True)
            self._bind(graph, context, tensors)
            return Launch(lambda: self._enqueue(graph, context), lambda: self._may_capture(graph, context))
        context = self._contexts[graph, profile]

        def launch() -> None:
            self._bind(graph, context, tensors)
            self._enqueue(graph, context)

        return Launch(launch)

    def close(self) -> None:
        self._contexts.clear()
        self._end()
        self._engines.clear()

    def _bind(self, graph: str, context: Any, tensors: Mapping[str, Region]) -> None:
        inputs = {spec.name for spec in self._table[graph].inputs}
        for name, region in tensors.items():
            if name in inputs and not context.set_input_shape(name, region.shape):
                raise DeviceError(f"{graph}: the engine takes no {name} of shape {region.shape}: build it again")
            if not context.set_tensor_address(name, region.pointer):
                raise DeviceError(
                    f"{graph}: the engine has no tensor {name} that takes a device address: build it again"
                )

    def _enqueue(self, graph: str, context: Any) -> None:
        self._log.forget()
        if not context.execute_async_v3(self._device.stream):
            raise DeviceError(f"{graph}: TensorRT could not start it ({self._why()}): look at `nvidia-smi`")

    def _may_capture(self, graph: str, context: Any) -> bool:
        """Whether TensorRT-RTX can have the context captured; the enterprise TensorRT has no such question."""
        if not hasattr(context, "is_stream_capturable") or context.is_stream_capturable(self._device.stream):
            return True
        if graph not in self._warned:  # once, and not for every sequence
            self._warned.add(graph)
            _log.warning(
                "%s: its engine cannot be captured, which is slower: build it with `balcony-edge build`", graph
            )
        return False

    def _new_context(self, graph: str, profile: int, *, to_capture: bool = False) -> Any:
        engine = self._engines[graph]
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._log.forget()
        if hasattr(self._trt, "IRuntimeCache"):  # TensorRT-RTX compiles kernels here
            config = self._kernels.config_for(engine, strategy)
            if to_capture:
                # By default, kernels for this shape are compiled in the background and replace slower ones at a later pass. A
                # captured graph would keep the slower ones. Eager: they are compiled before the first pass.
                strategies = self._trt.DynamicShapesKernelSpecializationStrategy
                config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise DeviceError(
                f"{graph}: TensorRT made no context for it ({self._why()}): free memory of the GPU, or build with a smaller "
                "--context-length"
            )
        context.set_device_memory(self._arena.pointer, self._arena.nbytes)
        try:
            context.set_optimization_profile_async(profile, self._device.stream)
        except RuntimeError as error:  # the binding raises, and never returns False
            why = self._why() or one_line(str(error))
            raise DeviceError(
                f"{graph}: TensorRT takes no optimization profile {profile} ({why}): build it again"
            ) from error
        return context

    def _refusal(self, path: Path, build: str) -> BalconyError:
        """Why an engine cannot be loaded, by the log; ``build`` is the command that builds it again."""
        error, why = self._log.last_error.lower(), self._why()
        if "outofmemory" in error.replace(" ", ""):
            return DeviceError(
                f"{path}: the GPU has too little memory for it ({why}): free memory of the GPU, "
                "or build with a smaller --precision, such as int4"
            )
        if "driver" in error:  # engines that are built again need it, too
            return DeviceError(f"{path}: TensorRT cannot use this GPU's driver ({why}): update NVIDIA's driver")
        return BundleError(
            f"{path}: TensorRT cannot load it on this GPU, compute capability {self._device.capability} "
            f"({why}): build it again here with {build}"
        )

    def _why(self) -> str:
        return one_line(self._log.last_error)


class _KernelCache:
    """Kernels that TensorRT-RTX compiled for this GPU, kept next to the engines for later processes.

    Args:
        path: file of the cache. TensorRT-RTX refuses and replaces a file of another GPU, driver or version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._before = b""

    def config_for(self, engine: Any, strategy: Any) -> Any:
        """Configuration for a context of an engine, with the cache that all contexts share."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):  # the file does not exist yet
                self._before = self._path.read_bytes()
                self._cache.deserialize(self._before)
        config.set_runtime_cache(self._cache)
        return config

    def save(self) -> None:
        """Write the compiled kernels. If the directory has gone or cannot be written, the next start compiles again."""
        blob = None if self._cache is None else self._cache.serialize()  # TensorRT gives None if the GPU is lost
        if blob is None or (now := bytes(blob)) == self._before or not self._path.parent.exists():
            return
        try:
            write_atomically(self._path, now, BundleError, "make it writable to keep compiled kernels")
        except BundleError as error:
            _log.warning("%s", error)


def open_backend(bundle: Bundle, engines: str, *, capture: bool = True, verify_hashes: bool = True) -> DeviceBackend:
    """Open a set's engines on the first GPU.

    Args:
        bundle: bundle with the set.
        engines: name of the set.
        capture: whether decode steps run as CUDA graphs.
        verify_hashes: whether the set's files are hashed.

    Raises:
        BundleError: the set is missing, damaged, or for another TensorRT or GPU.
        DeviceError: there is no driver, no GPU, or not enough memory.
        MissingDependencyError: TensorRT or cuda-python is not installed.
    """
    directory, chosen = bundle.engine_directory(engines, verify_hashes=verify_hashes), bundle.manifest.engines[engines]
    device = CudaDevice(capture=capture)
    try:
        with device.current():
            executor = TensorRTExecutor(directory, chosen, device)
    except BaseException:
        device.close()
        raise
    return DeviceBackend(bundle.manifest, chosen, device, executor, f"{chosen.builder}, compute {device.capability}")


def _refuse_misfits(directory: Path, engines: EngineSet, here: str, capability: str) -> None:
    if not engines.engines:
        raise BundleError(f"{directory}: has graphs but no engines: build them with {_build(engines)}")
    gpus = gpus_of(engines)
    fits = not gpus or capability in gpus
    if engines.builder != here and (fits or engines.target != "rtx"):  # built again, an rtx set is for the same GPUs
        raise BundleError(
            f"{directory}: built by {engines.builder}, but this machine has {here}: build again with {_build(engines)}"
        )
    if not fits:
        cure = f"build with {_build(engines, sm=capability)}, or with --target tensorrt on this machine"
        if engines.precision == "fp8" and int(capability) < 89:  # no such GPU has products in fp8
            cure = "build with another --precision"
        elif capability not in ("75", "80", *RTX_GPUS):  # TensorRT-RTX does not know it
            cure = "build with --target tensorrt on this machine"
        raise BundleError(
            f"{directory}: built for compute capability {', '.join(gpus)}, but this GPU has {capability}: {cure}"
        )


def _build(engines: EngineSet, sm: str = "") -> str:
    """The command that builds a set; without these options it would build another one, or for other GPUs."""
    options = ["--target", engines.target, "--precision", engines.precision]
    options += ["--operators", "plain"] if engines.operators == "plain" else []
    if sm := sm or ",".join(engines.compute_capabilities if engines.target == "rtx" else ()):
        options += ["--sm", sm]
    return f"`balcony-edge build BUNDLE {' '.join(options)}`"


def _profiles_of(engine: Any) -> range:
    return range(engine.num_optimization_profiles)


def _profile_for(first_input: str, tensors: Mapping[str, Region], engine: Any) -> int:
    """The first optimization profile that accepts as many new rows as the pass has."""
    shape = tensors[first_input].shape
    rows = shape[1] if len(shape) > 1 else 1
    for index, (_, _, most) in enumerate(PASSES[: engine.num_optimization_profiles]):
        if rows <= most:
            return index
    return int(engine.num_optimization_profiles) - 1
