"""ONNX Runtime's WebGPU provider: which package has it, which adapter it finds, and what its errors mean.

Two packages have it. The plugin ``onnxruntime-ep-webgpu`` (extra ``[webgpu]``) is a library that the plain ``onnxruntime``
loads; it takes a GPU that the system lists. The wheel ``onnxruntime-webgpu`` is another build of ONNX Runtime that takes the
place of the plain one; it also takes an adapter in software.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from balcony_edge.bundle.manifest import Manifest
from balcony_edge.errors import DeviceError, MissingDependencyError
from balcony_runtime.backends.installed import checked_onnxruntime, first_line
from balcony_runtime.backends.webgpu.adapters import Adapter, adapters

NAME = "WebGpuExecutionProvider"
_LIBRARY = "balcony-edge.webgpu"
_NODES = Path("/dev/dri")
_registering = threading.Lock()


class Provider(NamedTuple):
    """The provider as sessions are opened with it.

    Attributes:
        names: providers of a session; empty if there are devices.
        devices: device of the plugin's library; empty for the wheel.
        adapters: adapters that Vulkan lists; None where WebGPU does not use Vulkan.
    """

    names: tuple[str, ...]
    devices: tuple[Any, ...]
    adapters: list[Adapter] | None


def is_installed() -> bool:
    """Whether a package has the provider."""
    return importlib.util.find_spec("onnxruntime_ep_webgpu") is not None or _is_inside(checked_onnxruntime())


def misfit(manifest: Manifest) -> str | None:
    """Why WebGPU does not run a bundle, and the cure; None if it does."""
    elsewhere = "or run it with --device cpu"
    if not manifest.cpu:
        return "has no graphs with fused attention, and WebGPU runs only those: run it with --device cpu"
    if manifest.kv_dtype == "int8":
        return f"has an int8 KV cache, and WebGPU runs float caches: export the model without kv=8, {elsewhere}"
    if manifest.model.layers:
        return (
            f"has layers that do not attend ({manifest.model.architecture}), and a sequence on WebGPU keeps keys and values "
            "only: run it with --device cpu"
        )
    if manifest.model.mixture and manifest.precision in ("int8", "int4"):
        return (
            f"is a quantized mixture of experts ({manifest.model.architecture}), whose zero points and router weights ONNX "
            f"Runtime's QMoE does not take on WebGPU: export the model with --precision fp32 or fp16, {elsewhere}"
        )
    return None


def find_provider() -> Provider:
    """The installed provider, registered with ONNX Runtime.

    Raises:
        MissingDependencyError: no package has the provider.
        DeviceError: there is no Vulkan loader or no adapter.
    """
    ort = checked_onnxruntime()
    if _is_inside(ort):
        return Provider((NAME,), (), adapters())
    plugin, known = _plugin(), adapters()
    with _registering:  # the library belongs to the process; the host may have registered it under another name
        found = _devices(ort)
        if not found:
            try:
                _register(ort, plugin.get_library_path())
            except Exception as error:  # its class differs by version
                raise DeviceError(
                    f"ONNX Runtime {ort.__version__} cannot load onnxruntime-ep-webgpu ({first_line(error)}): upgrade both, or "
                    "run with --device cpu"
                ) from error
            found = _devices(ort)
    if not found:
        names = ", ".join(adapter.name for adapter in known or ()) or "no adapter"
        driver = "install the GPU's driver"
        raise DeviceError(
            f"WebGPU needs a GPU, and this system lists none ({names}): {_node_cure() or driver}, or run with --device cpu; "
            "only the package onnxruntime-webgpu also runs on an adapter in software"
        )
    return Provider((), (found[0],), known)


def _is_inside(ort: Any) -> bool:
    return NAME in ort.get_available_providers()


@functools.cache
def _register(ort: Any, path: str) -> None:
    """Register the library of the plugin. ONNX Runtime refuses to do it twice, also if the library has brought no device."""
    ort.register_execution_provider_library(_LIBRARY, path)


def _devices(ort: Any) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == NAME]


def _plugin() -> Any:
    try:
        return importlib.import_module("onnxruntime_ep_webgpu")
    except ImportError as error:
        raise MissingDependencyError(
            "--device webgpu: ONNX Runtime's WebGPU provider is not installed: pip install 'balcony-edge[webgpu]', or run with "
            "--device cpu"
        ) from error


def gpu_for_webgpu() -> str:
    """Name of the first GPU on which WebGPU runs here: an adapter in hardware, with a package that has the provider.

    Without Vulkan (macOS and Windows) nothing lists adapters, and the one that the provider takes counts as a GPU: Metal has
    no other, and Direct3D 12 lists its adapter in software last.

    Raises:
        DeviceError, MissingDependencyError: there is none; the message says why.
    """
    known = find_provider().adapters
    if known is None:
        return "this system's, which nothing names"
    for adapter in known:
        if adapter.is_gpu:
            return adapter.name
    seen, cure = ", ".join(adapter.name for adapter in known), _node_cure()
    raise DeviceError(f"WebGPU has no GPU here, only {seen}" + (f": {cure}" if cure else ""))


def _node_cure() -> str:
    """The cure if this user may not open a GPU's render node, for which Vulkan then lists no GPU and no error; or empty."""
    closed = next((node for node in sorted(_NODES.glob("renderD*")) if not os.access(node, os.R_OK | os.W_OK)), None)
    return "" if closed is None else f"let this user open {closed}: sudo usermod -aG render $USER, then log in again"


def failure(what: str, error: BaseException) -> DeviceError:
    """The error for a failed call of the provider, with the cure that its text suggests.

    The locals of the failed call's frames are cleared: they may hold values of the device, and whoever keeps the error would
    keep them past the end of their session.
    """
    traceback.clear_frames(error.__traceback__)
    text = f"{error} {error.__cause__ or ''}"
    low = text.lower()
    if "device lost" in low or "device is lost" in low or "devicelost" in low.replace("_", ""):
        cure = "the GPU was reset or removed: look at dmesg, then load the bundle again"
    elif "memory" in low or "alloc" in low or "storage buffers" in low:  # a buffer above a limit is split into many
        cure = "ask for a shorter context or a smaller batch, free memory of the GPU, or run with --device cpu"
    elif "f16" in low:
        cure = "this adapter has no 16-bit floats: export the model with --precision fp32 or int4"
    else:
        cure = "update the GPU's driver, or run with --device cpu"
    return DeviceError(f"{what}: WebGPU failed ({first_line(error)}): {cure}")
