"""The choice of the engine for a bundle on this machine: the meaning of ``auto``, its reason, and the opening of a backend."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, get_args

import numpy as np

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import EngineSet, Manifest
from balcony_edge.device.machine import checked_threads, cpu_features, machine_id, this_device
from balcony_edge.errors import BalconyError, BundleError, DeviceError, InputError, MissingDependencyError
from balcony_edge.files import require_path
from balcony_runtime.backends.base import Backend
from balcony_runtime.backends.installed import checked_onnxruntime
from balcony_runtime.backends.webgpu import provider

#: ``cpu``: ONNX Runtime on the CPU; ``cuda``: ONNX Runtime on an NVIDIA GPU; ``tensorrt``: engines; ``webgpu``: ONNX Runtime
#: on any GPU with Vulkan, Metal or Direct3D 12.
DeviceName = Literal["auto", "cpu", "cuda", "tensorrt", "webgpu"]

_log = logging.getLogger(__name__)
#: Tokens whose median time decides between GPU and CPU, after one that packs weights or compiles shaders.
TOKENS = 5


class Choice(NamedTuple):
    """A device, the engine set that it runs (None: the bundle's graphs for CPUs), and the reason.

    ``unfit`` says that the machine has an NVIDIA GPU and the bundle something for it that does not run: a set's engines that
    another machine built, or any set.
    """

    device: DeviceName
    engines: str | None
    reason: str
    unfit: bool = False


def choose(manifest: Manifest, engines: str | None = None) -> Choice:
    """The choice of ``auto`` on this machine: engines that it built for its GPU, else ONNX Runtime on the GPU, else the CPU.

    WebGPU is chosen only if its package is installed and there is a GPU; an adapter in software is slower than the CPU.
    :func:`open_backend` measures whether that GPU is faster than the CPU. ``engines`` names the set that is to run: its engines
    are then chosen even if they do not fit, so that opening them says what to do.
    """
    choice = _on_nvidia(manifest, engines)
    if choice.device != "cpu" or engines is not None:
        return choice
    try:
        installed = provider.is_installed()
    except MissingDependencyError as error:  # [tensorrt] alone brings no ONNX Runtime
        raise MissingDependencyError(f"{choice.reason}; {error}" if choice.unfit else str(error)) from error
    if not installed or provider.misfit(manifest) is not None:
        return choice
    device: DeviceName = "webgpu"
    try:
        reason = f"ONNX Runtime has WebGPU, and there is a GPU: {provider.gpu_for_webgpu()}"
    except BalconyError as error:
        device, reason = "cpu", str(error)
    return Choice(device, None, f"{choice.reason}; {reason}" if choice.unfit else reason, choice.unfit)


def _on_nvidia(manifest: Manifest, engines: str | None) -> Choice:
    """The choice between an NVIDIA GPU and the CPU."""
    if not manifest.engines:
        return Choice("cpu", None, "the bundle has no graphs for GPUs: make them with `balcony-edge build`")
    try:
        from balcony_runtime.backends.accelerator.cuda import compute_capability  # noqa: PLC0415 - an extra

        capability = compute_capability()
    except BalconyError as error:
        return Choice("cpu", None, str(error), unfit=bool(this_device().gpus))
    if engines in manifest.engines and manifest.engines[engines].engines:  # what does not fit is refused with its cure
        return Choice("tensorrt", engines, "it was named, and has engines")
    names = [name for name in manifest.engines if engines in (None, name)]
    fitting = [name for name in names if _runs_here(manifest.engines[name], capability)]
    machine = machine_id()
    for name in fitting:
        if (mark := manifest.engines[name].mark(machine)) and mark == manifest.engines[name].built_on:
            return Choice("tensorrt", name, f"it has engines for this GPU (compute capability {capability})")
    if fitting:
        missing = (
            f"the engines of {fitting[0]} were not built on this machine, and engines are programs (--engines {fitting[0]} "
            "runs them, if you trust who built them)"
        )
    else:
        missing = f"no engines for compute capability {capability} and the TensorRT that is installed"
    try:
        providers = checked_onnxruntime().get_available_providers()
    except MissingDependencyError as error:  # [tensorrt] alone brings none
        raise MissingDependencyError(f"{missing}; {error}") from error
    if names and "CUDAExecutionProvider" in providers:
        return Choice("cuda", names[0], f"{missing}; ONNX Runtime has CUDA", unfit=bool(fitting))
    return Choice("cpu", None, f"{missing}, and ONNX Runtime has no CUDA here", unfit=True)


def _runs_here(engines: EngineSet, capability: str) -> bool:
    """Whether a set's engines run on a GPU with the TensorRT that is installed."""
    from balcony_runtime.backends.accelerator.tensorrt_builder import (  # noqa: PLC0415 - likewise
        MODULES,
        gpus_of,
        import_tensorrt,
    )

    known = gpus_of(engines) or (capability,)
    if not engines.engines or capability not in known:
        return False
    try:
        here = import_tensorrt(engines.target).__version__
    except BalconyError:
        return False
    return engines.builder == f"{MODULES[engines.target]} {here}"


def open_backend(
    bundle: Bundle,
    device: DeviceName = "auto",
    engines: str | None = None,
    *,
    threads: int | None = None,
    spin: bool | None = None,
    packed: str | os.PathLike[str] | None = None,
    verify_hashes: bool = True,
) -> Backend:
    """Open the engine of a device.

    Args:
        bundle: bundle to load.
        device: device to run it on.
        engines: name of a set in ``manifest.engines``; by default the only one. On the CPU, the set's graphs run instead of
            those for CPUs, which checks a GPU's graphs without a GPU.
        threads: as for :class:`.onnxruntime.backend.OnnxRuntimeBackend`.
        spin: likewise; None for yes.
        packed: likewise.
        verify_hashes: whether files of an engine set and packed weights are hashed; opening the bundle hashes its own files.

    Raises:
        BundleError: the bundle has no such set, or the set does not fit.
        InputError: packed weights are given for a device other than the CPU, or their directory is no path, or ``spin`` is no
            bool.
        DeviceError: there is no such device, or it is missing.
        MissingDependencyError: the engine is not installed.
    """
    spins = _checked(spin)
    if device not in (names := get_args(DeviceName)):
        raise DeviceError(f"device = {device!r}: must be one of {', '.join(names)}: give one of those")
    if packed is not None:
        require_path(packed, "packed", InputError, "give the path of a directory")
    named = device != "auto" or engines is not None
    if device == "auto" and packed is not None:
        device = "cpu"
    if device == "auto":
        device, engines = _chosen(bundle, engines)
        if device == "webgpu":
            return _faster(bundle, threads, spins, verify_hashes)
    if device == "cpu" and engines is None:
        from balcony_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend  # noqa: PLC0415 - an engine is an extra

        _warn_of_unpacking(bundle)
        place = None if packed is None else Path(packed)
        return OnnxRuntimeBackend(bundle, threads=threads, spin=spins, packed=place, verify_hashes=verify_hashes)
    threads = None if threads is None else checked_threads(threads)
    if device == "webgpu":
        if packed is not None or engines is not None:
            given = "engine sets" if packed is None else "packed weights"
            raise InputError(f"--device webgpu: runs the bundle's own graphs, not {given}: leave them out")
        from balcony_runtime.backends.webgpu.backend import WebGpuBackend  # noqa: PLC0415 - likewise

        return WebGpuBackend(bundle, threads)
    if packed is not None:
        cure = "run with device cpu" if engines is None else "leave the engine set out"
        raise InputError(f"packed weights are for the CPU and the bundle's own graphs: leave them out, or {cure}")
    engines = engines or _only(bundle, device)
    if device == "tensorrt":
        from balcony_runtime.backends.accelerator import tensorrt  # noqa: PLC0415 - likewise

        return tensorrt.open_backend(bundle, engines, verify_hashes=verify_hashes)
    from balcony_runtime.backends.accelerator import onnxruntime  # noqa: PLC0415 - likewise

    try:
        return onnxruntime.open_backend(bundle, engines, device, threads=threads, verify_hashes=verify_hashes)
    except DeviceError as error:
        if named:
            raise
        _log.warning("%s: runs on the CPU: %s", bundle.path, error)
    # not before: the error holds the sessions that were opened
    return open_backend(bundle, "cpu", threads=threads, spin=spins, verify_hashes=verify_hashes)


def _checked(spin: bool | None) -> bool:
    if spin is not None and not isinstance(spin, bool):
        raise InputError(f"spin = {spin!r:.40}: must be True, False or None: leave it out for the default")
    return spin is not False


def _warn_of_unpacking(bundle: Bundle) -> None:
    """Say it if ONNX Runtime has no kernels for a bundle's integers on this CPU: it unpacks them at every token."""
    quantized, features = bundle.manifest.quantization, cpu_features()
    if quantized is None:
        return
    if "sse2" in features and "avx2" not in features:
        absent, weights, cure = "AVX2", "int4 and int8", "fp32, or give a virtual machine its host's CPU type"
    elif "asimd" in features and "asimddp" not in features and 8 in (quantized.bits, quantized.head_bits):
        absent, weights, cure = "dot products of int8", "8-bit", "int4,head=4"
    else:
        return
    why = f"this CPU has no {absent}, so ONNX Runtime unpacks {weights} weights at every token"
    _log.warning("%s: %s: export with --precision %s", bundle.path, why, cure)


def _chosen(bundle: Bundle, engines: str | None) -> tuple[DeviceName, str | None]:
    """The choice of ``auto``, which must be the set that was named, if one was."""
    if engines is not None and engines not in bundle.manifest.engines:
        bundle.engine_directory(engines)  # refuses it, and names those that there are
    device, chosen, reason, unfit = choose(bundle.manifest, engines)
    if engines is not None and chosen is None:
        raise DeviceError(
            f"{bundle.path}: engine set {engines} cannot run: {reason}: leave the set out, or run its graphs on the CPU with "
            "--device cpu"
        )
    if unfit:
        _log.warning("%s: runs no engines: %s", bundle.path, reason)
    return device, chosen


def _faster(bundle: Bundle, threads: int | None, spin: bool, verify_hashes: bool) -> Backend:
    """The faster one of GPU and CPU for tokens at the full depth, one by one; only one of them is in memory at a time."""

    def on(device: DeviceName) -> Backend:
        return open_backend(bundle, device, threads=threads, spin=spin, verify_hashes=verify_hashes)

    with on("cpu") as backend:
        cpu_ms = token_ms(backend)
    try:
        backend = on("webgpu")
        try:
            gpu_ms = token_ms(backend)
        except BaseException:
            backend.close()
            raise
    except DeviceError as error:
        _log.warning("%s", error)
        return on("cpu")
    _log.info("a token takes %.1f ms on the GPU and %.1f ms on the CPU", gpu_ms, cpu_ms)
    if gpu_ms < cpu_ms:
        return backend
    backend.close()
    return on("cpu")


def token_ms(backend: Backend) -> float:
    """Median time of a decode step at the full depth, its logits included, in milliseconds."""
    state, last = backend.new_state(1, TOKENS + 1), len(backend.manifest.exit_layers) - 1
    times = []
    for row in range(TOKENS + 1):
        begin = time.perf_counter()
        state.decode(last, np.zeros(1, np.int64), row)
        times.append(1000 * (time.perf_counter() - begin))
    return median(times[1:])


def _only(bundle: Bundle, device: DeviceName) -> str:
    names = list(bundle.manifest.engines)
    if not names and not bundle.manifest.graphs:
        raise BundleError(
            f"{bundle.path}: precision {bundle.manifest.precision} has no graphs for {device}: run it with --device cpu, or "
            "export the model with --precision fp16 and make engines with `balcony-edge build` (--rounded-as takes over int4 "
            "weights)"
        )
    if not names:
        raise BundleError(f"{bundle.path}: has no engine set for {device}: make one with `balcony-edge build`")
    if len(names) > 1:
        raise BundleError(f"{bundle.path}: has engine sets {', '.join(names)}: name one with --engines")
    return names[0]
