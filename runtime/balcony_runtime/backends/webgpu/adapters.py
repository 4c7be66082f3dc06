"""Graphics adapters of this machine, as Vulkan lists them.

ONNX Runtime chooses the adapter itself and tells Python nothing about it. The Vulkan loader's C interface tells names, types
and support of 16-bit floats without creating a device (Vulkan 1.3 specification, "Devices and Queues"). WebGPU uses Vulkan on
Linux only, so other systems are not asked.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from dataclasses import dataclass
from typing import Any

from balcony_edge.errors import DeviceError

#: VkPhysicalDeviceType, by number.
_KINDS = ("other", "integrated GPU", "discrete GPU", "virtual GPU", "CPU")
_API_VERSION = 1 << 22 | 1 << 12  # 1.1, the first with vkGetPhysicalDeviceFeatures2
#: VkStructureType of the structures used here.
_APPLICATION, _INSTANCE, _FEATURES, _STORAGE_16, _FLOAT_16 = 0, 1, 1000059000, 1000083000, 1000082000
#: Bytes of VkPhysicalDeviceProperties (824) and VkPhysicalDeviceFeatures2 (240), rounded up.
_ROOM = 1024


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        name: name that the driver gives it.
        kind: one of :data:`_KINDS`; ``CPU`` is a software implementation.
        half: whether shaders may use 16-bit floats, in arithmetic and in buffers.
    """

    name: str
    kind: str
    half: bool

    @property
    def is_gpu(self) -> bool:
        """Whether hardware does the work."""
        return self.kind.endswith("GPU")


class _Application(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_uint32),
        ("engine", ctypes.c_char_p),
        ("engine_version", ctypes.c_uint32),
        ("api_version", ctypes.c_uint32),
    )


class _Instance(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.POINTER(_Application)),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    )


class _Flags(ctypes.Structure):
    """A structure of up to four flags in the chain of VkPhysicalDeviceFeatures2."""

    _fields_ = (("type", ctypes.c_uint32), ("next", ctypes.c_void_p), ("values", ctypes.c_uint32 * 4))


class _Features(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint32), ("next", ctypes.c_void_p), ("room", ctypes.c_uint8 * _ROOM))


def adapters() -> list[Adapter] | None:
    """The adapters of this machine, in the loader's order; None where WebGPU does not use Vulkan.

    Raises:
        DeviceError: the Vulkan loader is missing, or no driver provides an adapter.
    """
    if sys.platform != "linux":
        return None
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1")
    except OSError as error:
        raise DeviceError(
            "WebGPU needs the Vulkan loader, and libvulkan.so.1 is missing: install it (Debian: apt install libvulkan1) with "
            "the GPU's driver, or run with --device cpu"
        ) from error
    application = _Application(_APPLICATION, api_version=_API_VERSION)
    about, instance = _Instance(_INSTANCE, application=ctypes.pointer(application)), ctypes.c_void_p()
    found: list[Adapter] = []
    if vulkan.vkCreateInstance(ctypes.byref(about), None, ctypes.byref(instance)) == 0:
        try:
            count = ctypes.c_uint32()
            vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
            handles = (ctypes.c_void_p * count.value)()
            vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
            found = [_described(vulkan, ctypes.c_void_p(handle)) for handle in handles[: count.value]]
        finally:
            vulkan.vkDestroyInstance(instance, None)
    if not found:
        raise DeviceError(
            "WebGPU needs an adapter, and Vulkan finds none: install the GPU's driver (Debian: apt install "
            "mesa-vulkan-drivers, which also has one for CPUs), or run with --device cpu"
        )
    return found


def _described(vulkan: Any, device: ctypes.c_void_p) -> Adapter:
    properties = ctypes.create_string_buffer(_ROOM)
    vulkan.vkGetPhysicalDeviceProperties(device, properties)
    # apiVersion, driverVersion, vendorID, deviceID, deviceType, deviceName
    api_version, _, _, _, kind, name = struct.unpack_from("=5I256s", properties.raw)
    half = False
    if api_version >= _API_VERSION:
        arithmetic = _Flags(_FLOAT_16)
        storage = _Flags(_STORAGE_16, ctypes.cast(ctypes.pointer(arithmetic), ctypes.c_void_p))
        features = _Features(_FEATURES, ctypes.cast(ctypes.pointer(storage), ctypes.c_void_p))
        vulkan.vkGetPhysicalDeviceFeatures2(device, ctypes.byref(features))
        half = bool(arithmetic.values[0] and storage.values[0] and storage.values[1])
    return Adapter(
        name.split(b"\0")[0].decode(errors="replace"), _KINDS[kind] if kind < len(_KINDS) else _KINDS[0], half
    )
