"""WebGPU: its small graphs, its errors and the choice of it anywhere; the backend where the provider is.

The conformance suite runs over this backend, too (tests/runtime/test_conformance.py). `make test-webgpu` brings the provider; any
adapter will do, such as Mesa's for CPUs. What only needs more examples is marked ``deep``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import balcony_edge
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, DeviceError, InputError, MissingDependencyError
from balcony_runtime.backends.choose import choose
from balcony_runtime.backends.onnxruntime import open_session
from balcony_runtime.backends.webgpu import adapters as adapters_module
from balcony_runtime.backends.webgpu import provider, small_graphs
from balcony_runtime.backends.webgpu.adapters import Adapter, adapters
from balcony_runtime.engine import Engine

SOFTWARE = Adapter("llvmpipe", "CPU", half=True)
CARD = Adapter("a card", "discrete GPU", half=False)


def ran(graph: bytes, **inputs: Any) -> list[Any]:
    onnx.checker.check_model(graph)
    found: list[Any] = open_session(graph).run(None, inputs)
    return found


def test_small_graphs_move_rows() -> None:
    rows = np.arange(24, dtype=np.float32).reshape(1, 6, 4)
    (made,) = ran(small_graphs.zeros("float16"), zero=np.zeros((), np.float16), shape=np.array([2, 3]))
    assert made.shape == (2, 3) and made.dtype == np.float16 and not made.any()
    (taken,) = ran(small_graphs.take("float32"), rows=rows, at=np.array([4, 1]))
    np.testing.assert_array_equal(taken, rows[:, [4, 1]])
    new, at = -rows[:, :2], np.array([[[0, 5], [0, 0]]])
    given = {"at": at, "rows_0": rows, "new_0": new, "rows_1": 2 * rows, "new_1": 3 * new}
    kept = ran(small_graphs.put("float32", 2), **given)
    for found, before, written in zip(kept, (rows, 2 * rows), (new, 3 * new), strict=True):
        np.testing.assert_array_equal(found[:, [5, 0]], written)
        np.testing.assert_array_equal(found[:, 1:5], before[:, 1:5])


def test_the_pick_tells_when_a_logit_is_not_a_number() -> None:
    logits = np.array([[[0.5, 3.0, -1.0]]], np.float32)
    (picked,) = ran(small_graphs.pick(), logits=logits)
    assert picked.tolist() == [[[1.0, 2.5]]]
    for bad in (np.nan, np.inf):
        logits[0, 0, 2] = bad
        (picked,) = ran(small_graphs.pick(), logits=logits)
        assert not np.isfinite(picked[0, 0, 1])


def test_auto_takes_a_gpu_and_no_software(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Bundle.open(tiny.path).manifest
    found = provider.Provider(("x",), (), [SOFTWARE, CARD])
    monkeypatch.setattr(provider, "is_installed", lambda: True)
    monkeypatch.setattr(provider, "find_provider", lambda: found)
    assert choose(manifest) == ("webgpu", None, "ONNX Runtime has WebGPU, and there is a GPU: a card")
    found.adapters.remove(CARD)  # type: ignore[union-attr]
    assert choose(manifest) == ("cpu", None, "WebGPU has no GPU here, only llvmpipe")
    portable = Bundle.open(tiny.path).portable().manifest
    assert choose(portable).device == "cpu"


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
    with pytest.raises(BundleError, match="has no graphs with fused attention.* --device cpu"):
        Engine.of(Bundle.open(tiny.path).portable(), device="webgpu")


def test_a_missing_package_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "_is_inside", lambda _: False)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_webgpu", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'balcony-edge\[webgpu\]', or run with --device cpu"):
        balcony_edge.load(tiny.path, device="webgpu")
