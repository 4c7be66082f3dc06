"""WebGPU's provider: how it is found, what it does not run, and its errors. None of this needs the provider."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import balcony_edge
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import Manifest, MixtureSpec
from balcony_edge.cli.device.doctor import engine_facts
from balcony_edge.errors import BundleError, DeviceError, InputError, MissingDependencyError
from balcony_runtime.backends.choose import choose
from balcony_runtime.backends.webgpu import adapters as adapters_module
from balcony_runtime.backends.webgpu import provider
from balcony_runtime.backends.webgpu.adapters import Adapter, adapters
from balcony_runtime.backends.webgpu.device import BoundPass, DeviceMemory, Value
from balcony_runtime.engine import Engine

CARD = Adapter("a card", "discrete GPU", half=False)


def test_a_device_that_fails_at_any_call_of_a_pass_is_one_line() -> None:
    """The first call of a step copies a token's row to the device, so it is the first to find a device that is gone."""

    class Lost:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def fail(*_: Any, **__: Any) -> None:
                raise RuntimeError("Device lost: VK_ERROR_DEVICE_LOST")

            return fail

    session = Mock(io_binding=Lost)
    one = BoundPass("stage_0.onnx", session)
    value, array = Value(object(), (1,)), np.zeros(1, np.float32)
    calls = [lambda given=given: one.give("hidden_0", given) for given in (value, array)]
    calls += [lambda given=given: one.take("hidden_1", given) for given in (value, array, None)]
    for call in (*calls, lambda: one.made(DeviceMemory())):
        with pytest.raises(DeviceError, match=r"^stage_0.onnx: .*the GPU was reset or removed: look at dmesg"):
            call()


def test_adapters_that_are_missing_name_their_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        """A Vulkan loader without a driver."""

        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *_: -9  # VK_ERROR_INCOMPATIBLE_DRIVER

    def missing(name: str) -> None:
        raise OSError(name)

    for load, cure in (
        (missing, r"needs the Vulkan loader, and libvulkan.so.1 is missing: install it .* or run with --device cpu$"),
        (lambda _: Loader(), r"needs an adapter, and Vulkan finds none: install the GPU's driver .* --device cpu$"),
    ):
        monkeypatch.setattr(adapters_module.ctypes, "CDLL", load)
        with pytest.raises(DeviceError, match=cure):
            adapters()


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("Device lost: VK_ERROR_DEVICE_LOST", "the GPU was reset or removed: look at dmesg"),
        ("VK_ERROR_OUT_OF_DEVICE_MEMORY", "ask for a shorter context"),
        (
            "n <= max was false. Too many storage buffers in shader",
            "failed (Too many storage buffers in shader): ask for a",
        ),
        (
            "Program Cast requires f16 but the device does not support it",
            "export the model with --precision fp32 or int4",
        ),
        ("", "update the GPU's driver"),
    ],
)
def test_failures_are_one_line_with_a_cure(text: str, cure: str) -> None:
    error = provider.failure("stage_0", RuntimeError(f"{text}\nmore"))
    assert str(error).startswith("stage_0: WebGPU failed (") and cure in str(error) and "\n" not in str(error)


def test_bundles_and_options_that_do_not_fit_are_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="--device webgpu: runs the bundle's own graphs, not engine sets: leave them out"
    ):
        balcony_edge.load(tiny.path, device="webgpu", engines="rtx-fp16")
    with pytest.raises(InputError, match="not packed weights: leave them out"):
        balcony_edge.load(tiny.path, device="webgpu", packed=tmp_path / "packed")
    with pytest.raises(BundleError, match=r"has no graphs with fused attention.* --device cpu"):
        Engine.of(Bundle.open(tiny.path).portable(), device="webgpu")


def test_models_that_webgpu_does_not_run_are_refused_by_name(
    export_tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "is_installed", lambda: True)
    monkeypatch.setattr(provider, "find_provider", lambda: provider.Provider(("x",), (), [CARD]))
    bundle = Bundle.open(export_tiny("llama").path)
    dense, mixture = bundle.manifest, MixtureSpec(experts=8, chosen=2)

    def of(precision: str) -> Manifest:
        model = dense.model.model_copy(update={"mixture": mixture})
        return dense.model_copy(update={"model": model, "precision": precision})

    assert all(provider.misfit(manifest) is None for manifest in (dense, of("float32"), of("float16")))
    bundle.manifest = of("int4")
    with pytest.raises(
        BundleError, match=r"is a quantized mixture of experts \(LlamaForCausalLM\).*--precision fp32 or fp16, or"
    ):
        Engine.of(bundle, device="webgpu")
    others = [Bundle.open(export_tiny(name).path).manifest for name in ("granite-hybrid", "lfm2")]
    for manifest, words in ((of("int4"), "QMoE"), *((other, "layers that do not attend") for other in others)):
        problem = provider.misfit(manifest)
        assert problem is not None and words in problem and "--device cpu" in problem and "\n" not in problem
        assert choose(manifest).device == "cpu"


def test_a_missing_package_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "_is_inside", lambda _: False)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_webgpu", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'balcony-edge\[webgpu\]', or run with --device cpu"):
        balcony_edge.load(tiny.path, device="webgpu")


def test_the_plugin_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plain ONNX Runtime, as documented: its library is registered unless the host has done so."""

    class Runtime:
        __version__ = "1.32"

        def __init__(self, devices: list[Any], *, loads: bool = True) -> None:
            self.there, self.brings, self.loads = list[Any](), devices, loads
            self.libraries: list[str] = []

        def get_available_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

        def get_ep_devices(self) -> list[Any]:
            return [SimpleNamespace(ep_name="CPUExecutionProvider"), *self.there]

        def register_execution_provider_library(self, name: str, path: str) -> None:
            if self.libraries:
                raise RuntimeError(f"library is already registered under {name}")
            self.libraries.append(path)
            if not self.loads:
                raise RuntimeError("API version 24 is not available\nmore")
            self.there = self.brings

    monkeypatch.setitem(sys.modules, "onnxruntime_ep_webgpu", Mock(get_library_path=lambda: "plugin.so"))
    monkeypatch.setattr(provider, "adapters", lambda: [CARD])
    monkeypatch.setattr(provider, "_NODES", Path("nowhere"))

    def found(runtime: Runtime) -> provider.Provider:
        monkeypatch.setattr(provider, "checked_onnxruntime", lambda: runtime)
        return provider.find_provider()

    card, other = (SimpleNamespace(ep_name=provider.NAME, number=number) for number in (0, 1))
    runtime = Runtime([card, other])
    for _ in range(2):
        assert found(runtime) == ((), (card,), [CARD])
    assert runtime.libraries == ["plugin.so"]
    hosts = Runtime([])
    hosts.there = [other]
    assert found(hosts).devices == (other,) and not hosts.libraries
    with pytest.raises(
        DeviceError, match=r"^ONNX Runtime 1.32 cannot load .*API version 24 is not available.: upgrade both"
    ):
        found(Runtime([card], loads=False))
    nothing = Runtime([])
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"this system lists none \(a card\): install the GPU's driver"):
            found(nothing)


def test_a_gpu_that_the_user_may_not_open_names_the_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over ssh only members of `render` open it; Mesa then lists its adapter in software, as if the driver were missing."""
    (tmp_path / "renderD128").touch()
    software = Adapter("llvmpipe", "CPU", half=True)
    monkeypatch.setattr(provider, "_NODES", tmp_path)
    monkeypatch.setattr(provider.os, "access", lambda *_: False)  # root may open everything
    monkeypatch.setattr(provider, "find_provider", lambda: provider.Provider(("x",), (), [software]))
    with pytest.raises(
        DeviceError, match=r"only llvmpipe: let this user open .*renderD128: sudo usermod -aG render \$USER"
    ):
        provider.gpu_for_webgpu()
    monkeypatch.setattr(adapters_module, "adapters", lambda: [software])
    (facts,) = [facts for facts in engine_facts() if facts["engine"] == "webgpu"]
    assert facts["note"].endswith("sudo usermod -aG render $USER, then log in again")
