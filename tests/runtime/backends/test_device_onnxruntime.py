"""Graphs of an engine set by ONNX Runtime's CUDA provider, over stand-ins for it and for CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, DeviceError
from balcony_runtime.backends.accelerator import onnxruntime as onnxruntime_device
from balcony_runtime.backends.accelerator.device import HostDevice
from balcony_runtime.backends.accelerator.onnxruntime import OnnxRuntimeExecutor
from balcony_runtime.backends.onnxruntime import backend as session_module
from balcony_runtime.engine import Engine
from tests.runtime.backends.cuda_stand_in import onnxruntime as cuda_provider
from tests.runtime.backends.cuda_stand_in import runtime as cuda_runtime
from tests.runtime.backends.test_device_backends import ERRORS, SETS, written
from tests.support.schedules import assert_equal


def test_onnxruntime_runs_in_our_stream(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    with cuda_provider.installed(gpu):
        with Engine.of(engine_sets, device="cuda", engines=SETS["rtx"]) as engine:
            found = written(engine)
            assert gpu.count("cudaStreamBeginCapture") == 0  # a session allocates memory while it runs
            gpu.fail("standInLaunch", ERRORS.cudaErrorUnknown)
            with pytest.raises(DeviceError, match=r"embed: ONNX Runtime failed while running it \(CUDA failure 999\)"):
                engine.new_sequence().advance(2, [1])
        broken = engine_sets.engine_directory(SETS["rtx"]) / "norm.onnx"
        broken.write_bytes(b"x" * broken.stat().st_size)
        with pytest.raises(BundleError, match=r"norm.onnx"):
            onnxruntime_device.open_backend(engine_sets, SETS["rtx"], "cuda", verify_hashes=False)
    with Engine.of(engine_sets) as reference:
        assert found == written(reference)


def test_a_launch_takes_what_its_inputs_hold_when_it_runs(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    """A decode step is prepared once, and ONNX Runtime copies inputs for nodes on the CPU when they are bound."""
    tokens = np.random.default_rng(3).integers(0, 320, (9, 1))
    with (
        cuda_provider.installed(gpu),
        Engine.of(engine_sets, device="cuda", engines=SETS["rtx"]) as engine,
        Engine.of(engine_sets) as reference,
    ):
        for exit_layer in (2, 5):  # a balcony and the norm
            one, same = engine.new_sequence(max_length=64), reference.new_sequence(max_length=64)
            for token in tokens:
                assert_equal(one.step(exit_layer, token), same.step(exit_layer, token))


def test_onnxruntime_leaves_the_thread_on_the_applications_gpu(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    gpu.set(devices=2)
    gpu.cudaSetDevice(1)
    with cuda_provider.installed(gpu), Engine.of(engine_sets, device="cuda", engines=SETS["rtx"]) as engine:
        assert gpu.cudaGetDevice()[1] == 1
        written(engine)
    assert gpu.cudaGetDevice()[1] == 1


def test_bfloat16_binds_through_onnxruntime(tmp_path: Path) -> None:
    """NumPy has no bfloat16, and IO binding needs a type."""
    half, single = TensorProto.BFLOAT16, TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["wide"], to=single), helper.make_node("Cast", ["wide"], ["y"], to=half)],
        "casts",
        [helper.make_tensor_value_info("x", half, [2])],
        [helper.make_tensor_value_info("y", half, [2]), helper.make_tensor_value_info("wide", single, [2])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "g.onnx")
    executor, device = OnnxRuntimeExecutor(tmp_path, {"g": "g.onnx"}, "cpu", {}), HostDevice()
    x, y = device.allocate((2,), "bfloat16"), device.allocate((2,), "bfloat16")
    wide = device.allocate((2,), "float32")
    device.upload(x, np.array([0x3FC0, 0xC000], np.uint16))
    executor.prepare("g", {"x": x, "y": y, "wide": wide}).run()
    assert device.download(wide).tolist() == [1.5, -2.0] and device.download(y).tolist() == [0x3FC0, 0xC000]


def test_a_gpu_without_room_for_the_graphs_is_not_a_damaged_bundle(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` runs on the CPU after a DeviceError only."""

    def full(path: Path, **_: Any) -> None:
        cause = "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 56623104"
        raise BundleError(f"{path}: ONNX Runtime cannot load it: export it again") from RuntimeError(cause)

    with cuda_provider.installed(gpu), monkeypatch.context() as patch:
        patch.setattr(onnxruntime_device, "open_session", full)
        with pytest.raises(DeviceError, match="embed: the GPU has too little memory for it"):
            onnxruntime_device.open_backend(engine_sets, SETS["rtx"], "cuda")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "CUDA failure 35: CUDA driver version is insufficient",
            "could not start CUDA.* is insufficient .*: update NVIDIA",
        ),
        ("CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED", r"could not start .*\(CUBLAS failure 1: .*: update NVIDIA"),
        ("CUDA failure 2: out of memory", "the GPU has too little memory for it: free memory"),
    ],
)
def test_a_provider_that_cannot_start_is_not_a_damaged_bundle(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle, monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    """Its reason comes after 500 characters of C++. `auto` runs on the CPU after a DeviceError only."""
    place = "/onnxruntime_src/core/providers/cuda/cuda_call.cc:122 onnxruntime::CudaCall(ERRTYPE, const char*) " * 5

    def fails(*_: Any) -> None:
        raise RuntimeError(f"{place}{said} ; GPU=-1 ; hostname=edge ; expr=cudaSetDevice(info_.device_id);")

    with cuda_provider.installed(gpu), monkeypatch.context() as patch:
        patch.setattr(onnxruntime_device, "open_session", session_module.open_session)
        patch.setattr(session_module, "_quiet_session", fails)
        with pytest.raises(DeviceError, match=f"^embed: .*{told}.*, or run with --device cpu$"):
            onnxruntime_device.open_backend(engine_sets, SETS["rtx"], "cuda")


@pytest.mark.parametrize(
    "said",
    [
        "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal("
        "size_t, bool, onnxruntime::Stream*) Failed to allocate memory for requested buffer of size 33554432",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=edge",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; hostname=edge",
    ],
)
def test_a_run_without_memory_asks_for_it(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """These words come late in the line. A server takes any other failure of each reply for a lost GPU."""
    where = "Error in execution: Non-zero status code returned while running MatMul node. Name:'node_linear_1'"

    def full(*_: Any) -> None:
        raise RuntimeError(f"{where} Status Message: {said}")

    with (
        cuda_provider.installed(gpu),
        monkeypatch.context() as patch,
        Engine.of(engine_sets, device="cuda", engines=SETS["rtx"]) as engine,
    ):
        patch.setattr(cuda_provider._Session, "run_with_iobinding", full)
        with pytest.raises(DeviceError, match=r"embed: ONNX Runtime failed while running it \(.*\): free memory$"):
            engine.new_sequence(max_length=64).advance(2, [1])


def test_products_in_float32_do_not_round_to_tf32(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider rounds the inputs of such products to 10 bits by default, and `fp32` is for checking."""
    given: list[dict[str, str]] = []
    with cuda_provider.installed(gpu), monkeypatch.context() as patch:
        opened = onnxruntime_device.open_session

        def watched(path: Path, **options: Any) -> Any:
            given.append(options["providers"][0][1])
            return opened(path, **options)

        patch.setattr(onnxruntime_device, "open_session", watched)
        Engine.of(engine_sets, device="cuda", engines=SETS["rtx"]).close()
    assert {options.get("use_tf32") for options in given} == {"0"}
