"""Requirements for every backend: exact switching, rollback, batches, bad input. One suite runs over all backends.

After any schedule of exits, chunks and rollbacks an exit gives what a pass from scratch gives; the portable graphs on ONNX
Runtime say what it should be. Backends that need a GPU are marked ``gpu``: `make test-gpu` runs them. Without one, the same
code runs over a stand-in for CUDA and TensorRT (``stand-in-*``), with decode steps that are captured and replayed.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import ContextLengthError, DeviceError, InputError
from balcony_runtime import token_sequence
from balcony_runtime.backends.accelerator.tensorrt_builder import MODULES, Builder
from balcony_runtime.backends.base import NotFiniteError
from balcony_runtime.engine import Engine
from tests.support.engine_sets import build_engines, memory_for
from tests.support.schedules import assert_equal, check_schedules, from_scratch

EXITS = (2, 3, 5)


def own_copy(bundle: Bundle) -> Bundle:
    """A copy that engines can be built into; the tests share the bundle itself."""
    return Bundle.open(shutil.copytree(bundle.path, Path(tempfile.mkdtemp(dir=bundle.path.parent)) / "bundle"))


def on_tensorrt(bundle: Bundle, engines: str, target: Literal["rtx", "tensorrt"]) -> Engine:
    """Engines in float32, built for the GPU of this machine."""
    from balcony_runtime.backends.accelerator.cuda import compute_capability

    here = [compute_capability()] if target == "rtx" else []  # by default some GPUs are left out
    if here and here[0] not in (known := Builder("rtx").known_capabilities):
        pytest.skip(f"TensorRT-RTX builds for {', '.join(known)}, and this GPU has {here[0]}")
    pytest.importorskip(MODULES[target])
    bundle = own_copy(bundle)
    graphs = [name for name in bundle.manifest.engines[engines].graphs if name != "backbone"]
    batch = bundle.manifest.engines[engines].batch_size
    builder = Builder(target, batch_size=batch, compute_capabilities=here)
    build_engines(bundle, engines, builder, graphs, lambda *_: None)
    return Engine.of(Bundle.open(bundle.path), device="tensorrt", engines=engines)


def on_stand_in(bundle: Bundle, engines: str, target: str) -> Engine:
    """Engines and a GPU that are stand-ins; closing the engine checks that nothing is left and nothing was misused."""
    from tests.runtime.backends.cuda_stand_in import runtime, tensorrt

    stand_ins = contextlib.ExitStack()
    stand_ins.enter_context(tensorrt.installed(stand_ins.enter_context(runtime.installed()), target))
    backend: Any = (
        engine := Engine.of(tensorrt.with_engines(own_copy(bundle), engines), device="tensorrt", engines=engines)
    ).backend
    backend.close = lambda close=backend.close: (close(), stand_ins.close())
    return engine


def on_cuda_stand_in(bundle: Bundle) -> Engine:
    """ONNX Runtime whose CUDA provider is a stand-in, over the GPU that is one."""
    from tests.runtime.backends.cuda_stand_in import onnxruntime, runtime

    stand_ins = contextlib.ExitStack()
    stand_ins.enter_context(onnxruntime.installed(stand_ins.enter_context(runtime.installed())))
    backend: Any = (engine := Engine.of(bundle, device="cuda", engines="rtx-fp32")).backend
    backend.close = lambda close=backend.close: (close(), stand_ins.close())
    return engine


#: Backend → function that opens an engine over a bundle.
BACKENDS: dict[str, Callable[[Bundle], Engine]] = {
    "lowered": Engine.of,
    "portable": lambda bundle: Engine.of(bundle.portable()),
    "packed": lambda bundle: Engine.of(bundle, packed=bundle.path.with_suffix(".packed")),
    "packed-portable": lambda bundle: Engine.of(bundle.portable(), packed=bundle.path.with_suffix(".portable")),
    "device-fused": lambda bundle: Engine.of(bundle, device="cpu", engines="rtx-fp32"),
    "device-plain": lambda bundle: Engine.of(bundle, device="cpu", engines="tensorrt-fp32-plain"),
    "cuda-fused": lambda bundle: Engine.of(bundle, device="cuda", engines="rtx-fp32"),
    "tensorrt-rtx": partial(on_tensorrt, engines="rtx-fp32", target="rtx"),
    "tensorrt": partial(on_tensorrt, engines="tensorrt-fp32-plain", target="tensorrt"),
    "stand-in-cuda": on_cuda_stand_in,
    "stand-in-rtx": partial(on_stand_in, engines="rtx-fp32", target="rtx"),
    "stand-in-plain": partial(on_stand_in, engines="tensorrt-fp32-plain", target="tensorrt"),
    "webgpu": lambda bundle: Engine.of(bundle, device="webgpu"),
}
#: Backend → mark of the hardware or package that it needs.
NEEDS = {
    "cuda-fused": pytest.mark.gpu,
    "tensorrt-rtx": pytest.mark.gpu,
    "tensorrt": pytest.mark.gpu,
    "webgpu": pytest.mark.webgpu,
}
CASES = [pytest.param(name, marks=NEEDS.get(name, ())) for name in BACKENDS]
#: Joining graphs depends only on names, so two architectures are enough here; test_quantize.py has more.
PAIRS = [
    pytest.param(architecture, name, marks=NEEDS.get(name, ()))
    for architecture in ("llama", "qwen3", "gemma2", "gemma3", "smollm3", "lfm2")
    for name in BACKENDS
    if not name.startswith(("packed", "stand-in")) or architecture in ("llama", "gemma3")
    if name != "webgpu" or architecture == "llama"  # test_webgpu.py has the others
]


@pytest.fixture(params=CASES)
def subject(request: pytest.FixtureRequest, with_engine_sets: Callable[[str], Bundle]) -> Iterator[Engine]:
    """An engine of each backend over the tiny Llama."""
    with BACKENDS[request.param](with_engine_sets("llama")) as engine:
        yield engine


@pytest.mark.hypothesis  # its examples are drawn inside
@pytest.mark.parametrize(("architecture", "backend"), PAIRS)
def test_any_schedule_equals_a_pass_from_scratch(
    with_engine_sets: Callable[[str], Bundle], architecture: str, backend: str
) -> None:
    bundle = with_engine_sets(architecture)
    with Engine.of(bundle.portable()) as reference, BACKENDS[backend](bundle) as engine:
        count = 25 if architecture == "llama" else 12
        if backend == "webgpu":  # test_webgpu.py plays more of them
            count = 3
        check_schedules(reference, engine, count)


def test_long_sequences_cross_chunks_and_cache_buckets(
    subject: Engine, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_sequence, "MAX_PASS_ROWS", 48)
    random = np.random.default_rng(11)
    for batch in range(1, min(subject.backend.most_members or 2, 2) + 1):
        sequence = subject.new_sequence(batch_size=batch)
        tokens = random.integers(0, 320, (batch, 256))
        got = sequence.advance(2, tokens[:, :200], num_logits=3)
        assert_equal(got, from_scratch(tiny_engine, 2, tokens[:, :200], 3))
        for index in range(200, 256):
            got = sequence.advance(EXITS[index % 3], tokens[:, index : index + 1])
            if index % 9 == 0:
                assert_equal(got, from_scratch(tiny_engine, EXITS[index % 3], tokens[:, : index + 1], 1))
        sequence.rollback(150)
        got = sequence.advance(3, tokens[:, 150:256])
        assert_equal(got, from_scratch(tiny_engine, 3, tokens, 1))


def test_rollback_is_exact_to_the_bit(subject: Engine) -> None:
    """The same passes over the same rows give the same bits, independent of cache contents past the cursors."""
    tokens = np.random.default_rng(5).integers(0, 320, 40)
    clean = subject.new_sequence(max_length=64)
    clean.advance(5, tokens[:20])
    expected = [clean.advance(5, [token]) for token in tokens[20:]]
    used = subject.new_sequence(max_length=64)
    used.advance(5, tokens[:20])
    for exit_layer in (2, 3, 5):
        used.advance(exit_layer, [7, 8, 9, 10])
    used.rollback(20)
    for token, want in zip(tokens[20:], expected, strict=True):
        np.testing.assert_array_equal(used.advance(5, [token]), want)


def test_skipped_stages_keep_their_rows(subject: Engine) -> None:
    sequence = subject.new_sequence(max_length=64)
    sequence.advance(5, [1, 2, 3, 4])
    assert sequence.stage_rows == (0, 0, 0) and sequence.balcony_rows == (4, 4, 0)
    sequence.advance(2, [5, 6])
    assert sequence.stage_rows == (0, 2, 2) and sequence.balcony_rows == (0, 6, 0)
    sequence.advance(3, [7])
    assert sequence.stage_rows == (0, 0, 3) and sequence.balcony_rows == (1, 0, 0)
    assert sequence.run_stage(2, 2) == 2
    assert sequence.stage_rows == (0, 0, 1)
    assert sequence.run_stage(2, 9) == 1 and sequence.run_stage(2, 9) == 0
    assert sequence.run_balcony(2, 9) == 1 and sequence.run_balcony(5, 9) == 0
    sequence.rollback(3)
    assert sequence.stage_rows == (0, 0, 0) and sequence.length == 3


def test_idle_time_works_off_the_backlog(subject: Engine, tiny_engine: Engine) -> None:
    sequence = subject.new_sequence(max_length=64)
    tokens = np.random.default_rng(4).integers(0, 320, 20)
    sequence.advance(2, tokens)
    assert sequence.stage_rows == (0, 20, 20) and sequence.balcony_rows == (0, 20, 0)
    assert sequence.catch_up(8) == 8 and sequence.stage_rows == (0, 12, 20)
    assert sequence.catch_up(15) == 15 and sequence.stage_rows == (0, 0, 17)
    assert sequence.catch_up() == 17 + 20 and sequence.catch_up() == 0
    assert sequence.stage_rows == (0, 0, 0) and sequence.balcony_rows == (0, 0, 0)
    before = sequence.state.busy_ns
    assert_equal(sequence.advance(5, []), from_scratch(tiny_engine, 5, tokens[None], 1))
    assert sequence.state.busy_ns > before and sequence.stage_rows == (0, 0, 0)


def test_bad_input_leaves_the_sequence_as_it_was(subject: Engine) -> None:
    sequence = subject.new_sequence(max_length=8)
    sequence.advance(5, [1, 2, 3])
    for call, error, pattern in (
        (lambda: sequence.advance(4, [1]), InputError, r"exit_layer = 4: this bundle has exits 2, 3, 5"),
        (lambda: sequence.advance(5, [320]), InputError, r"token 320: the vocabulary has 0 to 319"),
        (lambda: sequence.advance(5, [-1]), InputError, r"token -1"),
        (lambda: sequence.advance(5, np.array([1.5])), InputError, r"must be integers"),
        (lambda: sequence.advance(5, np.array([[1], [2]])), InputError, r"or \(1, n\)"),
        (lambda: sequence.advance(5, [], num_logits=4), InputError, r"ask for 1 to 3"),
        (lambda: sequence.advance(5, [1], num_logits=0), InputError, r"num_logits = 0"),
        (lambda: sequence.advance(5, [1] * 6), ContextLengthError, r"9 tokens: this sequence holds 8"),
        (lambda: sequence.rollback(4), InputError, r"rollback to 4"),
        (lambda: sequence.rollback(-1), InputError, r"rollback to -1"),
        (lambda: sequence.rollback(1.0), InputError, r"length = 1.0: must be a whole number"),
        (lambda: sequence.run_stage(99, 1), InputError, r"stage = 99: this bundle has stages 0 to 2"),
        (lambda: sequence.run_stage(-1, 1), InputError, r"stage = -1: must be at least 0"),
        (lambda: sequence.run_stage(0, 1.5), InputError, r"max_rows = 1.5: must be a whole number"),
        (lambda: sequence.run_balcony(2, -1), InputError, r"max_rows = -1: must be at least 0"),
        (lambda: sequence.catch_up(2.0), InputError, r"max_rows = 2.0"),
        (lambda: sequence.advance([5], []), InputError, r"exit_layer = \[5\]: this bundle has exits 2, 3, 5"),
        (lambda: sequence.advance(5, [], num_logits=1.0), InputError, r"num_logits = 1.0: must be a whole number"),
        (lambda: subject.new_sequence(max_length=9.0), InputError, r"max_length = 9.0: must be a whole number"),
        (lambda: subject.new_sequence(batch_size="2"), InputError, r"batch_size = '2': must be a whole number"),
        (lambda: subject.new_sequence(max_length=257), ContextLengthError, r"takes 1 to 256"),
        (lambda: subject.new_sequence(batch_size=0), InputError, r"batch_size = 0"),
    ):
        with pytest.raises(error, match=pattern):
            call()
        assert sequence.length == 3 and sequence.stage_rows == (0, 0, 0)


def test_a_step_on_a_full_sequence_is_refused_and_changes_nothing(subject: Engine, tiny_engine: Engine) -> None:
    sequence = subject.new_sequence(max_length=4)
    sequence.advance(5, [1, 2, 3])
    for exit_layer in (5, 2):  # up to date, and with a backlog
        sequence.rollback(3)
        sequence.step(exit_layer, np.array([4]))
        for step in (sequence.step, sequence.step_best):
            with pytest.raises(ContextLengthError, match="5 tokens: this sequence holds 4"):
                step(exit_layer, np.array([5]))
        assert sequence.length == 4 and sequence.tokens.tolist() == [[1, 2, 3, 4]]
        assert_equal(sequence.advance(exit_layer, []), from_scratch(tiny_engine, exit_layer, sequence.tokens, 1))


def test_a_closed_engine_is_one_line(with_engine_sets: Callable[[str], Bundle]) -> None:
    for backend in ("lowered", "portable", "packed", "device-fused"):
        engine = BACKENDS[backend](with_engine_sets("llama"))
        sequence = engine.new_sequence(max_length=16)
        sequence.advance(2, [1, 2, 3])
        sequence.step(2, np.array([4]))
        engine.close()
        engine.close()
        for call in (
            lambda s=sequence: s.advance(2, [4]),
            lambda s=sequence: s.step(2, np.array([4])),
            lambda s=sequence: s.step_best(2, np.array([4])),
            lambda s=sequence: s.run_stage(1, 1),
            lambda s=sequence: s.run_balcony(3, 1),
            lambda s=sequence: s.catch_up(),
            lambda s=sequence: s.rollback(0),
            *([lambda s=sequence: s.parts(3)] if backend == "device-fused" else ()),  # its memory is freed
            engine.new_sequence,
        ):
            with pytest.raises(InputError, match="this bundle was closed: load it again"):
                call()


def test_sequences_do_not_disturb_one_another(subject: Engine, tiny_engine: Engine) -> None:
    random = np.random.default_rng(2)
    tokens = [random.integers(0, 320, 30) for _ in range(4)]
    sequences = [subject.new_sequence(max_length=32) for _ in tokens]
    schedule = [(int(random.integers(4)), EXITS[int(random.integers(3))]) for _ in range(80)]
    for which, exit_layer in schedule:
        sequence = sequences[which]
        if sequence.length < 30:
            got = sequence.advance(exit_layer, tokens[which][sequence.length : sequence.length + 1])
            assert_equal(got, from_scratch(tiny_engine, exit_layer, sequence.tokens, 1))


def test_device_memory_goes_back_with_the_sequence(with_engine_sets: Callable[[str], Bundle]) -> None:
    with BACKENDS["device-fused"](with_engine_sets("llama")) as engine:
        device: Any = engine.backend.device

        def held() -> int:
            return sum(array.nbytes for array in device._arrays.values())

        sequence = engine.new_sequence(max_length=64)
        fresh = held()
        sequence.advance(5, [1, 2, 3])
        assert held() >= sequence.state.memory_bytes > 0
        first = sequence.state._workspace
        del sequence
        gc.collect()  # may run in any thread; the next sequence takes the memory
        left = engine.new_sequence(max_length=32)
        assert held() == fresh and left.state._workspace is first
        del left
        gc.collect()
        left = engine.new_sequence(batch_size=2)  # it does not fit and is freed
        twice = held()
        assert fresh < twice < 2.5 * fresh
        # The memory of a state whose allocation failed half-way is freed as well.
        with memory_for(device, 10) as taken, pytest.raises(DeviceError, match="out of memory"):
            engine.new_sequence(max_length=64)
        assert len(taken) == 10 and held() == twice
    del left  # after the backend has closed there is nothing left to free


def test_an_engine_that_picks_tokens_says_where_there_are_none(with_engine_sets: Callable[[str], Bundle]) -> None:
    with BACKENDS["device-fused"](with_engine_sets("llama")) as engine:
        sequence = engine.new_sequence(max_length=64)
        sequence.advance(5, [1, 2, 3])
        state: Any = sequence.state
        for cache in state._workspace.graphs.caches:
            for region in cache.past.values():
                state._device.upload(region, np.full(region.shape, np.nan, region.dtype))
        with pytest.raises(InputError, match="the logits hold NaN or infinity"):
            sequence.step_best(5, np.array([4]))


@pytest.mark.parametrize("named", [-1, 2**31 - 1])
def test_a_likeliest_token_that_is_none_means_nan(with_engine_sets: Callable[[str], Bundle], named: int) -> None:
    """Where all logits are NaN, a GPU's argmax may be any number, and it must not become an address."""
    with BACKENDS["stand-in-rtx"](with_engine_sets("llama")) as engine:
        sequence = engine.new_sequence(max_length=64)
        sequence.advance(5, [1, 2, 3])
        state: Any = sequence.state
        download, best = state._device.download, state._workspace.step.best
        state._device.download = lambda region: np.full((1, 1), named) if region is best else download(region)
        with pytest.raises(NotFiniteError):
            sequence.step_best(5, np.array([4]))


def test_a_device_is_used_by_one_sequence_at_a_time(with_engine_sets: Callable[[str], Bundle]) -> None:
    with BACKENDS["device-fused"](with_engine_sets("llama")) as engine, ThreadPoolExecutor(1) as pool:
        sequence, backend = engine.new_sequence(max_length=64), engine.backend
        sequence.advance(5, [1, 2, 3])
        upload, begun = backend.device.upload, threading.Event()
        backend.device.upload = lambda *given: (begun.set(), upload(*given))[1]
        with backend.lock:
            step = pool.submit(sequence.step, 5, np.array([4]))
            assert not begun.wait(0.3)
        assert step.result(60).shape[0] == 1 and begun.is_set()


def test_sequences_in_several_threads_do_not_meet(subject: Engine, tiny_engine: Engine) -> None:
    prompts = [[7 + index, 3, 5, 11] for index in range(3)]

    def written(engine: Engine, prompt: list[int]) -> list[int]:
        sequence = engine.new_sequence(max_length=48)
        ids = sequence.advance(5, prompt)[:, -1].argmax(-1)
        made = []
        for index in range(12):
            made.append(int(ids[0]))
            ids = sequence.step(EXITS[index % 3], ids).argmax(-1)
        sequence.state.wait()
        return made

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(partial(written, subject), prompts))
    assert found == [written(tiny_engine, prompt) for prompt in prompts]


def test_a_greedy_step_names_the_likeliest_token(subject: Engine) -> None:
    """`step_best` returns the token of `step`'s largest logit, on the host and on the device."""
    one, two = subject.new_sequence(max_length=48), subject.new_sequence(max_length=48)
    for sequence in (one, two):
        sequence.advance(5, list(range(1, 9)))
        sequence.catch_up()
    ids = np.array([17])
    for index in range(24):
        exit_layer = EXITS[index % 3]
        logits = one.step(exit_layer, ids)
        ids = two.step_best(exit_layer, ids)
        assert ids.tolist() == logits.argmax(-1).tolist()
    assert one.tokens.tolist() == two.tokens.tolist()
