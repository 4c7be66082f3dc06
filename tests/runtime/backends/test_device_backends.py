"""Engine sets on a GPU, over stand-ins for CUDA and TensorRT: captures, contexts, errors."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from cuda.bindings import runtime as real

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, DeviceError, EngineBuildError, InputError
from balcony_runtime.backends.accelerator import tensorrt, tensorrt_builder
from balcony_runtime.backends.accelerator.device import Region
from balcony_runtime.backends.accelerator.tensorrt_builder import Builder, make_log
from balcony_runtime.backends.accelerator.workspace import Workspace
from balcony_runtime.engine import Engine
from balcony_runtime.profiler.cells import Bench
from balcony_runtime.profiler.grid import Grid
from tests.runtime.backends.cuda_stand_in import runtime as cuda_runtime
from tests.runtime.backends.cuda_stand_in import tensorrt as stand_in
from tests.support.engine_sets import build_engines

EXITS = (2, 3, 5)
SETS = {"rtx": "rtx-fp32", "tensorrt": "tensorrt-fp32-plain"}
ERRORS = real.cudaError_t


@contextlib.contextmanager
def opened(
    gpu: cuda_runtime.Runtime, bundle: Bundle, target: str = "rtx", **options: Any
) -> Iterator[tuple[Engine, stand_in.TensorRT]]:
    with stand_in.installed(gpu, target) as trt:
        built = stand_in.with_engines(Bundle.open(bundle.path), SETS[target], **options)
        with Engine.of(built, device="tensorrt", engines=SETS[target]) as engine:
            yield engine, trt


def written(engine: Engine, count: int = 9) -> list[int]:
    """Greedy tokens at the exits in turn, each by a decode step: nothing is pending."""
    sequence = engine.new_sequence(max_length=64)
    ids, made = sequence.advance(5, [7, 3, 5, 11])[:, -1].argmax(-1), []
    for index in range(count):
        made.append(int(ids[0]))
        sequence.catch_up()
        ids = sequence.step_best(EXITS[index % 3], ids)
    return made


def test_a_step_is_one_launch_and_nothing_is_captured_in_a_reply(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle
) -> None:
    with opened(gpu, engine_sets) as (engine, _):
        sequence = engine.new_sequence(max_length=64)
        graphs = 1 + 3 + 3 + 1  # token table, stages, exits, head
        assert gpu.count("cudaStreamBeginCapture") == gpu.count("cudaStreamEndCapture") == graphs
        sequence.advance(5, [1, 2, 3])
        for steps, exit_layer in enumerate((5, 2, 3, 2, 5), 1):
            sequence.catch_up()
            sequence.step(exit_layer, np.array([4]))
            assert gpu.count("cudaGraphLaunch") == steps
        del sequence
        gc.collect()
        again = engine.new_sequence(max_length=32)  # other lengths use the same memory and the same captures
        again.advance(5, [1, 2, 3])
        again.step(5, np.array([4]))
        assert gpu.count("cudaStreamBeginCapture") == graphs
        assert gpu.count("cudaGraphInstantiate") == 3


def test_replies_that_end_together_leave_their_captures_to_the_next_ones(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle
) -> None:
    with opened(gpu, engine_sets) as (engine, _):
        for _ in range(3):
            sequences = [engine.new_sequence(max_length=64) for _ in range(3)]
            for sequence in sequences:
                sequence.advance(5, [1, 2, 3])
                sequence.step(5, np.array([4]))
            captured = gpu.count("cudaStreamBeginCapture")
            del sequence, sequences
            gc.collect()
        assert captured == 3 * (1 + 3 + 3 + 1) and len(engine.backend.returned) == 3


def test_a_profiler_holds_the_memory_of_one_sequence(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    """Each has the length of the engines' caches, and those of a whole grid are a dozen."""
    with opened(gpu, engine_sets) as (engine, _):
        llm: Any = SimpleNamespace(engine=engine, exit_layers=engine.exit_layers)
        bench = Bench(llm, Grid.make(engine.max_length, quick=True))
        for use, length in (("pass", 16), ("pass", 40), ("decode", 8), ("switch", 30), ("pass", 16)):
            assert bench._sequence(use, length, room=4).length == length
        assert sum(isinstance(memory, Workspace) for memory in engine.backend.memories) == 1


def test_a_profile_divides_the_memory_by_the_tokens_that_it_is_for(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle
) -> None:
    with opened(gpu, engine_sets) as (engine, _):
        llm: Any = SimpleNamespace(engine=engine, exit_layers=engine.exit_layers)
        bench = Bench(llm, Grid.make(engine.max_length, quick=True))
        sequence = bench._sequence("pass", 40, room=0)
        assert bench.state_bytes() == (256, sequence.state.memory_bytes)


def test_a_profile_is_kept_if_it_is_interrupted_between_two_sequences(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is given back before the next is filled, which takes the time of a whole prompt."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with opened(gpu, engine_sets) as (engine, _):
        llm: Any = SimpleNamespace(engine=engine, exit_layers=engine.exit_layers)
        bench = Bench(llm, Grid.make(engine.max_length, quick=True))
        bench._sequence("pass", 40, room=0)
        found = bench.state_bytes()
        monkeypatch.setattr("balcony_runtime.token_sequence.TokenSequence.advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench._sequence("decode", 8, room=4)
        assert bench.state_bytes() == found and found[1] > 0


@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
def test_rows_that_engines_do_not_take_where_they_lie(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle, target: str
) -> None:
    """TensorRT takes addresses that 256 divides, and a row has 128 bytes here, as one of 64 values in half precision."""
    tokens = np.random.default_rng(3).integers(0, 320, 24)
    with opened(gpu, engine_sets, target) as (engine, trt), Engine.of(engine_sets) as reference:
        with engine.backend.alone():
            ids = engine.backend.allocate((1, 3), "int64").part(1, (1, 1))
            assert not trt.contexts[0].set_tensor_address("ids", ids.pointer)
        sequence, same = engine.new_sequence(max_length=64), reference.new_sequence(max_length=64)
        begin = 0
        for count, exit_layer, rows in ((4, 5, 3), (3, 2, 2), (5, 3, 4), (1, 5, 6), (8, 2, 1), (3, 5, 20)):
            part, begin = tokens[begin : begin + count], begin + count
            got, want = (one.advance(exit_layer, part, num_logits=rows) for one in (sequence, same))
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_sides_that_take_turns_have_two_captures_each(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    with opened(gpu, engine_sets, "tensorrt") as (engine, _):
        captures = 1 + 2 * 3 + 2 * 2 + 1 + 1  # the last exit is a norm, without a cache
        engine.new_sequence(max_length=64)
        assert gpu.count("cudaStreamBeginCapture") == captures
        found = written(engine)
        assert gpu.count("cudaStreamBeginCapture") == captures and gpu.count("cudaGraphLaunch") > 9
    with Engine.of(engine_sets) as reference:
        assert found == written(reference)


def test_contexts_are_made_at_the_start_and_captured_ones_are_used_once(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle
) -> None:
    with opened(gpu, engine_sets) as (engine, trt):
        shared = len(trt.contexts)
        profiles = [e.num_optimization_profiles for e in engine.backend.executor._engines.values()]
        assert shared == sum(profiles)
        kept = engine.new_sequence(max_length=64)
        own = trt.contexts[shared:]
        assert len(own) == 8 and all(context.captured for context in own)
        eager = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        assert all(c.config.dynamic_shapes_kernel_specialization_strategy == eager for c in own if c.config)
        written(engine)
        assert len(trt.contexts) == shared + 2 * 8  # the second sequence has memory of its own
        assert not any(context.captured for context in trt.contexts[:shared])
        assert kept.length == 0


def test_engines_that_cannot_be_captured_run_without_graphs(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(gpu, engine_sets, capturable=False) as (engine, _):
        kept, found = engine.new_sequence(), written(engine)
        assert caplog.text.count("lm_head: its engine cannot be captured, which is slower: build it with") == 1
        assert kept.length == 0
        assert gpu.count("cudaStreamBeginCapture") == gpu.count("cudaGraphLaunch") == 0
    caplog.clear()
    # The enterprise TensorRT cannot be asked: the capture fails, and the error says why.
    with opened(gpu, engine_sets, "tensorrt", capturable=False) as (engine, _):
        kept = engine.new_sequence()
        assert written(engine) == found
        assert (
            caplog.text.count("lm_head: TensorRT could not start it (it allocates memory while it runs (in enqueue")
            == 1
        )
        assert kept.length == 0
    with (
        stand_in.installed(gpu, "rtx"),
        tensorrt.open_backend(Bundle.open(engine_sets.path), SETS["rtx"], capture=False) as bare,
    ):
        assert written(Engine(bare)) == found
    with Engine.of(engine_sets) as reference:
        assert written(reference) == found


def test_kernels_are_kept_for_the_next_start(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    with opened(gpu, engine_sets) as (engine, _):
        written(engine)
    built = Bundle.open(engine_sets.path)
    (kept,) = built.engine_directory(SETS["rtx"]).glob("kernels-89.cache")
    with stand_in.installed(gpu, "rtx") as trt, Engine.of(built, device="tensorrt", engines=SETS["rtx"]):
        caches = {id(context.config.cache) for context in trt.contexts if context.config}
        assert len(caches) == 1
        assert trt.contexts[0].config and trt.contexts[0].config.cache
        assert trt.contexts[0].config.cache.serialize() == kept.read_bytes() != b"[]"


def test_kernels_are_kept_if_nobody_closes_the_backend(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    with stand_in.installed(gpu, "rtx"):
        built = stand_in.with_engines(engine_sets, SETS["rtx"])
        backend = tensorrt.open_backend(built, SETS["rtx"])
        written(Engine(backend))
        del backend
        gc.collect()
    (kept,) = built.engine_directory(SETS["rtx"]).glob("kernels-89.cache")
    assert kept.read_bytes() != b"[]"
    gpu._c.standInReset()  # its memory goes with the process


def test_files_and_contexts_that_fail_are_one_line_and_free_everything(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle
) -> None:
    with stand_in.installed(gpu, "rtx") as trt:
        built = stand_in.with_engines(engine_sets, SETS["rtx"])
        trt.room = 5
        with pytest.raises(DeviceError, match=r"TensorRT made no context for it \(out of memory\): free memory"):
            tensorrt.open_backend(built, SETS["rtx"])
        trt.room = 10**6
        broken = built.engine_directory(SETS["rtx"]) / "stage_1.engine"
        broken.write_bytes(b"x" * broken.stat().st_size)
        with pytest.raises(
            BundleError, match=r"stage_1.engine: .* compute capability 89 \(the file is not an engine\): build it again"
        ):
            tensorrt.open_backend(built, SETS["rtx"], verify_hashes=False)
        gpu.set(major=9, minor=0)
        with pytest.raises(BundleError, match="built for compute capability 89, but this GPU has 90"):
            tensorrt.open_backend(built, SETS["rtx"], verify_hashes=False)
    assert gpu.left() == ""


def test_a_tensorrt_that_cannot_start_is_one_line(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The enterprise TensorRT makes no object without a GPU, or with a driver older than its CUDA."""

    def nothing(log: Any) -> Any:
        log.log(tensorrt_rtx.ILogger.WARNING, "CUDA initialization failure\nwith error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    why = r"cannot start \(CUDA initialization failure with error: 35\): install or update NVIDIA's driver"
    monkeypatch.setattr(stand_in.TensorRT, "Runtime", lambda _, log: nothing(log))
    with stand_in.installed(gpu, "tensorrt"):
        built = stand_in.with_engines(engine_sets, SETS["tensorrt"])
        with pytest.raises(DeviceError, match=f"tensorrt {why}"):
            tensorrt.open_backend(built, SETS["tensorrt"])
    assert gpu.left() == ""
    module = SimpleNamespace(__version__="11.1", ILogger=tensorrt_rtx.ILogger, Builder=nothing)
    monkeypatch.setattr(tensorrt_builder, "import_tensorrt", lambda _: module)
    with pytest.raises(EngineBuildError, match=f"tensorrt 11.1 {why}"):
        Builder("tensorrt")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("Error Code 1: Cuda Runtime (out of memory)", r"embed.engine: .*\(out of memory\)\): free memory"),
        # TensorRT-RTX for CUDA 13, with the driver and the `cuda-python` of CUDA 12
        (
            "CUDA driver version is insufficient for CUDA runtime version",
            r"embed.engine: .*insufficient.*\): update NVIDIA's driver",
        ),
    ],
    ids=["too large", "driver too old"],
)
def test_engines_that_are_right_but_cannot_be_loaded_are_not_to_be_built_again(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle, monkeypatch: pytest.MonkeyPatch, error: str, message: str
) -> None:
    def refuse(loader: Any, data: bytes) -> None:
        loader._log.log(tensorrt_rtx.ILogger.ERROR, error)

    monkeypatch.setattr(stand_in._Loader, "deserialize_cuda_engine", refuse)
    with stand_in.installed(gpu, "rtx"):
        built = stand_in.with_engines(engine_sets, SETS["rtx"])
        with pytest.raises(DeviceError, match=message):
            tensorrt.open_backend(built, SETS["rtx"])
    assert gpu.left() == ""


def test_what_an_engine_refuses_is_one_line(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    with opened(gpu, engine_sets) as (engine, trt):
        executor: Any = engine.backend.executor
        backend: Any = engine.backend
        with backend.alone():
            ids, rows = backend.allocate((1, 513), "int64"), backend.allocate((1, 513, 16), "float32")
            with pytest.raises(
                DeviceError, match=r"embed: the engine takes no ids of shape \(1, 513\): build it again"
            ):
                executor.prepare("embed", {"ids": ids, "hidden_0": rows}).run()
            with pytest.raises(DeviceError, match="embed: the engine has no tensor other that takes a device address"):
                executor.prepare("embed", {"ids": ids.part(0, (1, 1)), "other": rows}, to_capture=True)
            fresh = executor._new_context("embed", 0)
            with pytest.raises(DeviceError, match=r"embed: TensorRT could not start it .*are not set.*nvidia-smi"):
                executor._enqueue("embed", fresh)
            with pytest.raises(
                DeviceError, match=r"embed: TensorRT takes no optimization profile 7 \(.*\): build it again"
            ):
                executor._new_context("embed", 7)
        with pytest.raises(InputError, match="these engines were built for at most 8: build others with --batch 9"):
            engine.new_sequence(batch_size=9)
        assert trt.contexts


def test_no_memory_frees_that_of_collected_sequences_first(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    with opened(gpu, engine_sets) as (engine, _):
        before = gpu.held_bytes
        kept, gone = engine.new_sequence(), engine.new_sequence()
        size = (gpu.held_bytes - before) // 2
        del gone
        gc.collect()
        backend: Any = engine.backend
        gpu.set(memory=gpu.held_bytes + size // 2)
        with backend.alone():
            large = backend.allocate((size - 1000,), "int8")  # in the place of the collected sequence's memory
            with pytest.raises(DeviceError, match="out of memory"):
                backend.allocate((size,), "int8")
            backend.device.free(large)
        gpu.set(memory=gpu.held_bytes + size // 2)
        with pytest.raises(DeviceError, match="out of memory"):
            engine.new_sequence()
        backend.device.synchronize()
        assert gpu.held_bytes <= before + size + 4096
        kept.advance(5, [1, 2, 3])


def test_nan_of_one_sequence_does_not_reach_the_next(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    with opened(gpu, engine_sets) as (engine, _):
        clean = written(engine)
        gc.collect()
        sequence = engine.new_sequence(max_length=64)
        state: Any = sequence.state
        for cache in state._workspace.graphs.caches:
            for region in cache.regions():
                state._device.upload(region, np.full(region.shape, np.nan))
        workspace = state._workspace
        del sequence, state
        gc.collect()
        assert engine.backend.returned[0] is workspace
        assert written(engine) == clean


def test_a_lost_gpu_is_one_line_and_closing_works(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    with opened(gpu, engine_sets) as (engine, _):
        sequence = engine.new_sequence(max_length=64)
        sequence.advance(5, [1, 2, 3])
        backend: Any = engine.backend
        with backend.alone():
            gpu.launch(backend.device.stream, lambda: 1 / 0, [])
        for _ in range(2):
            with pytest.raises(DeviceError, match="this process can no longer use the GPU: start it again") as caught:
                sequence.step(5, np.array([4]))
            assert "\n" not in str(caught.value)
    del sequence
    gc.collect()
    gpu._c.standInReset()  # the process would end here


def test_any_call_of_cuda_may_fail_in_a_reply(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    """Errors in the middle of a reply are one line, and closing leaves nothing behind."""
    for name in ("cudaMallocAsync", "cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaGraphLaunch", "cudaStreamSynchronize"):
        for after in (0, 3):
            with opened(gpu, engine_sets) as (engine, _):
                sequence = engine.new_sequence(max_length=64)
                gpu.fail(name, ERRORS.cudaErrorUnknown, after=after)
                with pytest.raises(DeviceError, match="unknown error"):
                    for _ in range(4):
                        sequence.advance(5, [1, 2, 3])
                        sequence.step(5, np.array([4]))
                del sequence
            assert (gpu.left(), gpu.misuse()) == ("", []), name


def test_sequences_of_several_threads_on_a_gpu_that_is_not_theirs(
    gpu: cuda_runtime.Runtime, engine_sets: Bundle
) -> None:
    gpu.set(devices=2)
    with opened(gpu, engine_sets) as (engine, _):
        expected, found = written(engine), []

        def in_a_thread() -> None:
            gpu.cudaSetDevice(1)
            found.append(written(engine))

        threads = [threading.Thread(target=in_a_thread) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected] * 3


@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
def test_the_stand_in_sees_what_tensorrt_forbids(gpu: cuda_runtime.Runtime, engine_sets: Bundle, target: str) -> None:
    with opened(gpu, engine_sets, target) as (engine, _):
        backend: Any = engine.backend
        executor = backend.executor
        with backend.alone():
            ids, rows = backend.allocate((1, 1), "int64"), backend.allocate((1, 1, 16), "float32")
            width = backend.manifest.model.hidden_size
            rows = backend.allocate((1, 1, width), "float32")
            tensors: dict[str, Region] = {"ids": ids, "hidden_0": rows}
            eager = executor.prepare("embed", tensors)
            captured = backend.device.captured(eager._replace(may_capture=lambda: True))
            lazy = ["a capture with lazy specialization"] if target == "rtx" else []
            assert gpu.misuse() == lazy
            eager.run()
            assert gpu.misuse() == ["a context that was captured is used again"]
            fresh = executor._new_context("embed", 0)
            executor._bind("embed", fresh, tensors)
            stream, mode = backend.device.stream, gpu.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            gpu.cudaStreamBeginCapture(stream, mode)
            assert not fresh.execute_async_v3(stream)  # its first launch
            assert gpu.cudaStreamEndCapture(stream)[0] == ERRORS.cudaErrorStreamCaptureInvalidated
            gpu.cudaGetLastError()
            del captured


@pytest.mark.parametrize("name", ["TensorRT", "Engine", "Config", "Cache", "Context", "_Loader"])
def test_the_stand_in_has_tensorrts_names(name: str) -> None:
    """Every method of the stand-in is one of the real class, with as many parameters."""
    names = {
        "TensorRT": None, "Engine": "ICudaEngine", "Config": "IRuntimeConfig", "Cache": "IRuntimeCache",
        "Context": "IExecutionContext", "_Loader": "Runtime",
    }  # fmt: skip
    ours, theirs = getattr(stand_in, name), tensorrt_rtx if names[name] is None else getattr(tensorrt_rtx, names[name])
    methods = [m for m in vars(ours) if not m.startswith("_")]
    assert methods
    for method in methods:
        found = getattr(theirs, method)
        if inspect.isroutine(found) and inspect.isfunction(vars(ours)[method]):
            first = (found.__doc__ or "").splitlines()
            signature = next(line for line in first if line.lstrip("1. ").startswith(f"{method}(self"))
            wanted = len(re.findall(r"[(,] ?\w+: ", signature)) - 1
            assert len(inspect.signature(vars(ours)[method]).parameters) - 1 == wanted, (method, signature)
    assert hasattr(tensorrt_rtx.IExecutionContext, "is_stream_capturable")


def test_products_in_float32_do_not_round_to_tf32(engine_sets: Bundle) -> None:
    """TensorRT rounds the inputs of such products to 10 bits by default, and `fp32` is for checking."""
    config = Builder("rtx")._config(engine_sets.manifest.engines[SETS["rtx"]].graphs["lm_head"], lambda done: None)
    assert not config.get_flag(tensorrt_rtx.BuilderFlag.TF32)


def test_engines_ask_us_for_their_memory(engine_sets: Bundle) -> None:
    """TensorRT-RTX asks for this flag where a CUDA graph captures an engine."""
    builder = Builder("rtx")
    config = builder._config(engine_sets.manifest.engines[SETS["rtx"]].graphs["lm_head"], lambda done: None)
    assert config.get_flag(tensorrt_rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)


@pytest.mark.skipif(
    real.cudaGetDeviceCount()[0] != ERRORS.cudaErrorInsufficientDriver,
    reason="a driver is installed: it would be asked",
)
def test_the_real_tensorrt_goes_as_far_as_its_own_driver(gpu: cuda_runtime.Runtime, engine_sets: Bundle) -> None:
    """A real engine and the real library over the stand-in for CUDA: it refuses when it asks for the real driver."""
    name = SETS["rtx"]
    build_engines(engine_sets, name, Builder("rtx", compute_capabilities=["89"]), ["lm_head"], lambda *_: None)
    built = Bundle.open(engine_sets.path)
    assert built.manifest.engines[name].compute_capabilities == ("89",)
    with pytest.raises(
        DeviceError, match=r"lm_head.engine: TensorRT cannot use this GPU's driver \(.*: update NVIDIA's driver"
    ) as caught:
        tensorrt.open_backend(built, name)
    assert "\n" not in str(caught.value)


def test_warnings_are_not_printed(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """TensorRT writes through our logger: a failed load is one line of ours, and nothing on stderr."""
    caplog.set_level(logging.DEBUG)
    log = make_log(tensorrt_rtx)
    assert tensorrt_rtx.Runtime(log).deserialize_cuda_engine(b"nonsense") is None
    assert log.last_error and capfd.readouterr().err == ""
    log.forget()
    assert log.last_error == ""
