"""What a sequence's memory for ONNX Runtime says besides logits: largest cached values, time of passes, failed runs."""

from __future__ import annotations

import gc
import shutil
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, DeviceError, InputError
from balcony_runtime.backends.onnxruntime import backend as onnxruntime_backend
from balcony_runtime.backends.onnxruntime import state as onnxruntime_state
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import TokenSequence

TOKENS = np.random.default_rng(6).integers(0, 320, (2, 12))


def largest(sequence: TokenSequence) -> dict[str, dict[str, Any]]:
    state: Any = sequence.state
    return dict(state.largest_cached(0))


def advanced(engine: Engine, tokens: Any, exit_layer: int = 5) -> TokenSequence:
    sequence = engine.new_sequence(batch_size=len(tokens), max_length=32)
    sequence.advance(exit_layer, tokens)
    sequence.catch_up()
    return sequence


def test_the_largest_cached_values_are_those_of_all_members_and_rows(tiny_engine: Engine) -> None:
    both = largest(advanced(tiny_engine, TOKENS))
    assert {"stage_0", "stage_1", "stage_2", "balcony_2", "balcony_3"} < both.keys()
    apart = [largest(advanced(tiny_engine, TOKENS[member : member + 1])) for member in (0, 1)]
    for graph, caches in both.items():
        assert all(name.startswith("past_") for name in caches)
        for name, values in caches.items():
            assert values.shape == apart[0][graph][name].shape and values.ndim == 2  # heads, channels
            np.testing.assert_allclose(values, np.maximum(*(one[graph][name] for one in apart)), rtol=1e-4, atol=1e-5)
            assert (values > 0).all()


def test_rows_of_decode_steps_are_cached_values_as_well(tiny_engine: Engine) -> None:
    whole = largest(advanced(tiny_engine, TOKENS[:1]))
    stepped = advanced(tiny_engine, TOKENS[:1, :6])
    for token in TOKENS[0, 6:]:
        stepped.step(5, np.array([token]))
    stages = [name for name in whole if name.startswith("stage_")]
    for graph in stages:
        for name, values in largest(stepped)[graph].items():
            np.testing.assert_allclose(values, whole[graph][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graphs", ["lowered", "portable"])
def test_time_in_passes_is_summed_up(tiny: Any, graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny.path)
    bound, passes = onnxruntime_state.bound_run, []

    def slow(session: Any, binding: Any) -> Callable[[], object]:
        run = bound(session, binding)
        return lambda: (time.sleep(0.02), run(), passes.append(1))

    monkeypatch.setattr(onnxruntime_state, "bound_run", slow)
    with Engine.of(bundle if graphs == "lowered" else bundle.portable()) as engine:
        sequence = engine.new_sequence(max_length=16)
        assert sequence.state.busy_ns == 0
        for act in (lambda: sequence.advance(5, [1, 2, 3]), lambda: sequence.step(5, np.array([4]))):
            before, begin_ns = sequence.state.busy_ns, time.perf_counter_ns()
            passes.clear()
            act()
            busy_ns = sequence.state.busy_ns - before
            assert len(passes) >= 4  # three stages and the head, and the norm where it is a graph of its own
            assert len(passes) * 20e6 <= busy_ns <= time.perf_counter_ns() - begin_ns


def test_a_decode_step_with_packed_weights_is_one_pass(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound, passes = onnxruntime_state.bound_run, []

    def counted(session: Any, binding: Any) -> Callable[[], object]:
        run = bound(session, binding)
        return lambda: (run(), passes.append(1))

    monkeypatch.setattr(onnxruntime_state, "bound_run", counted)
    with Engine.open(tiny.path) as plain, Engine.open(tiny.path, packed=tmp_path) as engine:
        for exit_layer in (2, 3, 5):
            want, sequence = plain.new_sequence(max_length=16), engine.new_sequence(max_length=16)
            want.advance(exit_layer, [1, 2, 3])
            sequence.advance(exit_layer, [1, 2, 3])
            for token in (4, 5):
                passes.clear()
                logits = sequence.step(exit_layer, np.array([token])).copy()
                assert len(passes) == 1
                np.testing.assert_allclose(logits, want.step(exit_layer, np.array([token])), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "line", "cure"),
    [
        ("[ONNXRuntimeError] : 6 : bad index\nmore", r"\(\[ONNXRuntimeError\] : 6 : bad index\)", "export again"),
        ("[ONNXRuntimeError] : 6 : std::bad_alloc", r"\(\[ONNXRuntimeError\] : 6 : std::bad_alloc\)", "free memory"),
        ("x" * 300, r"\(x{200}\)", "export again"),
        ("", r"\(RuntimeError\)", "export again"),
    ],
)
def test_a_run_that_fails_is_one_line(
    tiny_engine: Engine, said: str, line: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Callable[[], object]:
        def run() -> None:
            raise RuntimeError(said)

        return run

    sequence = tiny_engine.new_sequence(max_length=16)
    sequence.advance(5, [1, 2, 3])
    monkeypatch.setattr(onnxruntime_state, "bound_run", broken)
    why = f"ONNX Runtime failed while running it {line}: {cure}"
    with pytest.raises(DeviceError, match=f"^a decode step: {why}$"):
        sequence.step(5, np.array([4]))
    with pytest.raises(DeviceError, match=rf"^.*stage_0.*\.onnx: {why}$"):
        sequence.advance(5, [4])
    monkeypatch.undo()
    fresh = tiny_engine.new_sequence(max_length=16).advance(5, sequence.tokens)
    np.testing.assert_allclose(sequence.advance(5, []), fresh, rtol=1e-3, atol=1e-4)


def test_a_closed_engine_frees_its_sessions(tiny: Any) -> None:
    """Whoever still has a sequence."""
    with Engine.open(tiny.path) as engine:
        sequence, pool = engine.new_sequence(), engine.backend.new_pool(2, 64)
        sequence.advance(2, [1, 2, 3])
        sequence.step(5, np.array([4]))
        assert pool is not None
        pool.begin(np.array([0]), np.array([1]), np.array([0]), 1)
        pool.run_stage(0, 0, 1)
        sessions = [weakref.ref(session._sess) for session in engine.backend.sessions.values()]
    gc.collect()
    assert not any(session() for session in sessions)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of what is mapped")
def test_a_closed_engine_lets_go_of_its_bundle(tiny: Any, tmp_path: Path) -> None:
    """An update removes it, and its space would stay taken for as long as anybody has the engine or a sequence."""
    place = tmp_path / "bundle"
    shutil.copytree(tiny.path, place)
    engine = Engine.open(place)
    sequence = engine.new_sequence()
    sequence.advance(2, [1, 2, 3])
    engine.close()
    assert str(place) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="this bundle was closed: load it again"):
        sequence.advance(2, [4])


@pytest.mark.parametrize("packed", [None, Path("packed")])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"),
        RuntimeError("RUNTIME_EXCEPTION : Exception during initialization: bad allocation"),  # on Windows
        RuntimeError("RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 5242880"),
    ],
)
def test_a_graph_without_memory_for_it_is_not_called_damaged(
    error: Exception, packed: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed weights that are removed would take still more memory to be made again."""

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(onnxruntime_backend, "_quiet_session", fail)
    with pytest.raises(BundleError, match=r"^stage_0\.onnx: ONNX Runtime cannot load it \(.*\): free memory$"):
        onnxruntime_backend._open(Path("stage_0.onnx"), packed)


def test_a_system_without_proc_has_no_damaged_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a bare chroot."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("Secure opened-file canonicalization requires procfs at /proc/self")

    monkeypatch.setattr(onnxruntime_backend, "_quiet_session", fail)
    with pytest.raises(BundleError, match=r"^stage_0\.onnx: ONNX Runtime cannot load it \(.*\): mount /proc here$"):
        onnxruntime_backend._open(Path("stage_0.onnx"), None)


def test_a_graph_without_memory_to_pack_it_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be loaded: packing takes as much memory again as the weights."""

    def fail(_: Any, options: Any, __: Any) -> None:
        if options.optimized_model_filepath:
            raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(onnxruntime_backend, "_quiet_session", fail)
    with pytest.raises(BundleError, match=r"^stage_0\.onnx: ONNX Runtime cannot load it \(.*\): free memory$"):
        onnxruntime_backend._pack(Path("stage_0.onnx"), tmp_path / "stage_0.onnx")
