"""The engine over ONNX Runtime: memory, refused graphs, graphs that run. All backends: test_conformance.py."""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from balcony_edge.bundle.bundle import Bundle, fingerprint, sha256_file
from balcony_edge.bundle.manifest import MANIFEST
from balcony_edge.device.machine import available_cpus
from balcony_edge.errors import BundleError, InputError
from balcony_runtime.backends.onnxruntime import state as onnxruntime_state
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import TokenSequence


def resident_bytes(arrays: list[Any]) -> int:
    """Bytes of the pages of arrays that hold memory of their own, as the kernel reports them page by page."""
    own: set[int] = set()
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        for array in arrays:
            first, end = array.ctypes.data // mmap.PAGESIZE, -(-(array.ctypes.data + array.nbytes) // mmap.PAGESIZE)
            pagemap.seek(8 * first)
            entries = np.frombuffer(pagemap.read(8 * (end - first)), np.uint64)
            # Bit 63: present; bit 56: mapped by this process alone, which the shared page of zeros is not.
            own.update(first + int(page) for page in np.flatnonzero((entries >> 63) & (entries >> 56) & 1))
    return mmap.PAGESIZE * len(own)


def arrays_of(sequence: TokenSequence) -> list[Any]:
    state: Any = sequence.state
    caches = [graph.cache for graph in state._graphs.values() if graph.cache is not None]
    return [state._rows, state._logits, *(array for cache in caches for array in cache.held.arrays)]


@pytest.mark.parametrize("graphs", ["lowered", "portable"])
@pytest.mark.parametrize("batch", [1, 3])
def test_memory_is_taken_as_rows_come_and_reported_as_it_is(tiny: Any, graphs: str, batch: int) -> None:
    bundle = Bundle.open(tiny.path)
    with Engine.of(bundle if graphs == "lowered" else bundle.portable()) as engine:
        sequence = engine.new_sequence(batch_size=batch, max_length=256)
        logits = sequence.state._logits.nbytes
        assert resident_bytes(arrays_of(sequence)) == 0 and sequence.state.memory_bytes == logits

        def reported() -> int:
            # The array of logits is counted whole, and a page counts as soon as a row touches it.
            assert abs(resident_bytes(arrays_of(sequence)) - sequence.state.memory_bytes) <= mmap.PAGESIZE
            return int(sequence.state.memory_bytes) - logits

        sequence.advance(5, [[1]] * batch)
        segments = 2 * 2 if graphs == "lowered" else 2  # keys and values; lowered graphs have them apart by head
        assert reported() == batch * (4 + 5 * segments) * mmap.PAGESIZE  # four boundaries, five layers, one row: a page
        deep = arrays_of(sequence)[0][2:].copy()
        sequence.advance(2, [list(range(100))] * batch)
        shallow = reported()
        assert np.array_equal(arrays_of(sequence)[0][2:], deep)
        sequence.advance(5, [])
        # On pages of 16 kB, 100 rows of 128 bytes take the same single page as one row.
        assert reported() > 1.3 * shallow or (mmap.PAGESIZE > 4096 and reported() == shallow)
        for token in range(150):
            sequence.step(5, np.array([token] * batch))
        longest = reported()
        sequence.rollback(3)
        sequence.step(5, np.array([1] * batch))
        assert reported() == longest, "pages stay after a rollback"
        everything = 4 * 251 * 32 * 4 + (5 * 251 + 101) * 2 * 32 * 4
        # Partly used is the last page of each boundary, and of each segment of five layers and two balconies.
        partly_used = batch * (4 + 7 * segments) * mmap.PAGESIZE
        assert batch * everything <= reported() <= batch * everything + partly_used


@pytest.mark.parametrize("batch", [1, 3])
def test_an_interrupt_at_any_point_of_a_growing_cache_leaves_the_logits_right(
    tiny: Any, tiny_engine: Engine, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at every instruction of growing, and at every line around it; the sequence then continues unharmed."""
    monkeypatch.setattr("balcony_runtime.backends.onnxruntime.memory.BUCKET", 8)
    tokens = np.random.default_rng(3).integers(0, 320, (batch, 20))
    want = {e: tiny_engine.new_sequence(batch_size=batch).advance(e, tokens)[:, 0] for e in (2, 5)}
    growing = {"grow", "_reserve", "bucketed", "zeros", "touched_bytes"}

    class Interrupts:
        def __init__(self, at: int) -> None:
            self.left = at

        def __call__(self, frame: Any, event: str, _: object) -> Any:
            if "balcony_runtime/backends" not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes = inside = frame.f_code.co_name in growing
            if event == ("opcode" if inside else "line"):
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
            return self

    with Engine.of(Bundle.open(tiny.path).portable()) as engine:
        point = interrupted = 0
        while point == interrupted * batch:
            point += batch  # with a batch only every third point, which takes seconds already
            sequence = engine.new_sequence(batch_size=batch)
            sequence.advance(5, tokens[:, :6])
            sequence.step(5, tokens[:, 6])
            sequence.step(2, tokens[:, 7])
            before = sys.gettrace()
            sys.settrace(Interrupts(point))
            try:
                sequence.step(5, tokens[:, 8])
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(before)
            if point % 2:  # bindings to the smaller cache must not return either
                sequence.rollback(5)
            for exit_layer, stop in ((2, 10), (5, 19)):
                sequence.advance(exit_layer, tokens[:, sequence.length : stop])
            for exit_layer in (2, 5):
                sequence.rollback(19)
                logits = sequence.step(exit_layer, tokens[:, 19])
                assert np.abs(logits - want[exit_layer]).max() <= 1e-4 * np.abs(want[exit_layer]).max(), point
        assert interrupted > 250


@pytest.mark.parametrize(
    ("rows", "asked", "passes"),
    [
        (16, 1, [(0, 16, 1)]),
        (17, 1, [(0, 16, 0), (16, 17, 1)]),
        (17, 17, [(0, 16, 16), (16, 17, 1)]),
        (20, 8, [(0, 12, 0), (12, 20, 8)]),
        (49, 40, [(0, 9, 0), (9, 25, 16), (25, 41, 16), (41, 49, 8)]),
    ],
)
def test_a_balconys_backlog_ends_where_what_is_asked_begins(
    tiny: Any,
    tiny_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    asked: int,
    passes: list[tuple[int, int, int]],
) -> None:
    """``(start, stop, queries)`` of each pass of at most 16 rows: every row once, in as few passes as possible."""
    want = tiny_engine.new_sequence().advance(3, list(range(rows)), num_logits=asked)
    monkeypatch.setattr("balcony_runtime.token_sequence.MAX_PASS_ROWS", 16)
    with Engine.open(tiny.path) as engine:
        sequence = engine.new_sequence()
        run, seen = sequence.state.run_exit, []
        monkeypatch.setattr(
            sequence.state, "run_exit", lambda index, *place: (seen.append(place), run(index, *place))[1]
        )
        got = sequence.advance(3, list(range(rows)), num_logits=asked)
        assert seen == passes and np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_a_thread_that_catches_up_and_one_that_decodes_take_turns(tiny: Any) -> None:
    tokens = np.random.default_rng(9).integers(0, 320, 250)
    with Engine.open(tiny.path) as engine:
        want = {e: engine.new_sequence().advance(e, tokens)[0, -1] for e in engine.exit_layers}
        for _ in range(4):
            sequence, over = engine.new_sequence(), threading.Event()
            sequence.advance(2, tokens[:100])

            def work_off(sequence: TokenSequence = sequence, over: threading.Event = over) -> None:
                while not over.is_set():
                    sequence.catch_up(5)

            with ThreadPoolExecutor(1) as pool:
                working = pool.submit(work_off)
                for row in range(100, 250):
                    sequence.step(2, tokens[row : row + 1])
                over.set()
                working.result()
            for exit_layer in engine.exit_layers:
                got = sequence.advance(exit_layer, [])[0, -1]
                assert np.abs(got - want[exit_layer]).max() <= 1e-4 * np.abs(want[exit_layer]).max()


def test_backlog_is_worked_off_as_far_as_the_stage_before_has_come(tiny: Any) -> None:
    with Engine.open(tiny.path) as engine:
        sequence = engine.new_sequence()
        sequence.advance(2, list(range(20)))
        assert sequence.run_balcony(3, 99) == sequence.run_stage(2, 99) == 0
        assert sequence.run_stage(1, 7) == 7 and sequence.run_balcony(3, 99) == 7 and sequence.run_balcony(3, 99) == 0
        got = sequence.advance(3, [])
        want = engine.new_sequence().advance(3, list(range(20)))
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("exit_layer", [2, 3, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_steps_follow_a_cache_that_has_grown(
    tiny: Any, tiny_engine: Engine, batch: int, exit_layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later rows must not be written to arrays that an earlier step was bound to."""
    monkeypatch.setattr("balcony_runtime.backends.onnxruntime.memory.BUCKET", 8)
    tokens = np.random.default_rng(8).integers(0, 320, (batch, 40))
    with Engine.of(Bundle.open(tiny.path).portable()) as engine:
        sequence = engine.new_sequence(batch_size=batch)
        sequence.advance(exit_layer, tokens[:, :4])
        for row in (4, 5):
            assert sequence.up_to_date(exit_layer)
            sequence.step(exit_layer, tokens[:, row])
        sequence.advance(5, tokens[:, 6:30])  # to 32 rows, in passes of several rows
        sequence.rollback(6)
        assert sequence.up_to_date(exit_layer)
        sequence.step(exit_layer, tokens[:, 30])
        for asked in (2, 3, 5):
            got = sequence.advance(asked, tokens[:, 31:32])
            want = tiny_engine.new_sequence(batch_size=batch).advance(asked, sequence.tokens)
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_an_interrupt_in_the_middle_of_bookkeeping_leaves_rows_to_do(tiny: Any) -> None:
    class Interrupting(list[int]):
        def __iter__(self) -> Any:
            raise KeyboardInterrupt

        def __setitem__(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with Engine.open(tiny.path) as engine:
        for act in ("rollback", "step"):
            sequence = engine.new_sequence()
            sequence.advance(5, [1, 2, 3, 4])
            cursors = sequence.stage_cursor
            sequence.stage_cursor = Interrupting(cursors)
            with pytest.raises(KeyboardInterrupt):
                sequence.rollback(2) if act == "rollback" else sequence.step(5, np.array([5]))
            sequence.stage_cursor = cursors
            assert sequence.length == (4 if act == "rollback" else 5)
            got = sequence.advance(5, [6])[0, 0]
            want = engine.new_sequence().advance(5, sequence.tokens)[0, 0]
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_tables_that_differ_from_the_models_sizes_are_refused(bundle_copy: Any) -> None:
    document = json.loads((bundle_copy / MANIFEST).read_text())
    inputs = document["cpu"]["stage_1"]["inputs"]
    for change in (lambda: inputs[3]["shape"].__setitem__(1, 8), lambda: inputs.pop(3)):
        change()
        document["fingerprint"] = fingerprint(document)
        (bundle_copy / MANIFEST).write_text(json.dumps(document))
        with pytest.raises(BundleError, match="input past_key_2 of stage_1 does not match the model's sizes"):
            Engine.open(bundle_copy)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda value: setattr(value, "name", "past_key_77"),
            r"cpu_stage_1\.onnx: the graph has no input past_key_2:",
        ),
        (
            lambda value: setattr(value.type.tensor_type.shape.dim[1], "dim_value", 8),
            r"cpu_stage_1\.onnx: input past_key_2 is .*the manifest says",
        ),
    ],
)
def test_graphs_that_differ_from_the_table_are_refused(bundle_copy: Any, change: Any, pattern: str) -> None:
    """A forger changes a graph, but keeps the manifest complete and its hashes right."""
    path = bundle_copy / "cpu_stage_1.onnx"
    model = onnx.load(path, load_external_data=False)
    value = next(value for value in model.graph.input if value.name == "past_key_2")
    change(value)
    for node in model.graph.node:
        node.input[:] = [value.name if name == "past_key_2" else name for name in node.input]
    if value.name == "past_key_2":  # another width, which must be refused before the operators run
        del model.graph.node[:]
        model.graph.node.extend(
            onnx.helper.make_node(
                "Identity", [out.name.replace("present", "past").replace("hidden_3", "hidden_2")], [out.name]
            )
            for out in model.graph.output
        )
        present = next(out for out in model.graph.output if out.name == "present_key_2")
        present.type.tensor_type.shape.dim[1].dim_value = 8
    onnx.save(model, path)
    document = json.loads((bundle_copy / MANIFEST).read_text())
    document["files"]["cpu_stage_1.onnx"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    document["fingerprint"] = fingerprint(document)
    (bundle_copy / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=pattern):
        Engine.open(bundle_copy)


def test_only_the_stages_on_the_way_run(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, bound_run = Counter[str](), onnxruntime_state.bound_run
    with Engine.open(tiny.path) as engine:
        names = {id(session): name for name, session in engine.backend.sessions.items()}

        def counted(session: Any, binding: Any) -> Callable[[], object]:
            run = bound_run(session, binding)
            return lambda: runs.update([names[id(session)]]) or run()

        monkeypatch.setattr(onnxruntime_state, "bound_run", counted)
        sequence = engine.new_sequence(max_length=32)
        sequence.advance(2, [1, 2, 3])
        for token in range(5):
            sequence.advance(2, [token])
        sequence.advance(3, [9])
    # Each balcony runs once per token; its backlog (two rows of the prompt; all rows but the last) takes one more pass.
    assert runs == {
        "stage_0": 7, "stage_1": 1, "balcony_2": 6, "balcony_3": 1, "balcony_2_keys": 1, "balcony_3_keys": 1, "lm_head": 7
    }  # fmt: skip


def test_decode_steps_take_the_public_call_where_there_is_no_other(tiny: Any) -> None:
    from balcony_runtime.backends.onnxruntime.bindings import bound_run

    class Elsewhere:
        """A session of a version that keeps its inner object under another name."""

        def __init__(self, session: Any) -> None:
            self.run_with_iobinding = session.run_with_iobinding

    with Engine.open(tiny.path) as engine:
        sequence, want = engine.new_sequence(max_length=8), engine.new_sequence(max_length=8)
        for token in (1, 2):
            expected = want.step(5, np.array([token]))
        sequence.advance(5, [1])
        state: Any = sequence.state
        sequence.step(5, np.array([2]))
        sessions: Any = engine.backend.sessions
        runs = [bound_run(Elsewhere(sessions[graph.name]), graph.one_row[graph.side]) for graph in state._paths[2]]
        state._programs[2][0] = state._programs[2][0]._replace(runs=runs)
        sequence.rollback(1)
        state._logits[:] = 0
        assert np.array_equal(sequence.step(5, np.array([2])), expected)


@pytest.mark.parametrize("threads", [0, -1, 5000, 1.5, "2"])
def test_threads_that_cannot_work_are_refused(tiny: Any, threads: Any) -> None:
    with pytest.raises(
        InputError, match=rf"threads = {threads!r}: this process may use \d+ CPUs: give a whole number from 1"
    ):
        Engine.open(tiny.path, threads=threads)


def test_more_threads_than_cpus_are_warned_of(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    cpus = available_cpus()
    with Engine.open(tiny.path, threads=cpus):
        assert caplog.text == ""
    with Engine.open(tiny.path, threads=cpus + 1):
        assert f"threads = {cpus + 1}, but this process may use {cpus} CPUs: fewer threads are faster" in caplog.text


def test_rows_run_counts_each_row_of_each_stage(tiny_engine: Engine) -> None:
    sequence = tiny_engine.new_sequence(max_length=16)
    sequence.advance(2, [1, 2, 3])  # the first stage
    assert sequence.rows_run == 3
    sequence.step(2, np.array([4]))
    assert sequence.rows_run == 3 + 1
    sequence.advance(3, [5])  # the second stage has the four rows before to do as well
    assert sequence.rows_run == 4 + 1 + 5
    sequence.step(3, np.array([6]))
    assert sequence.rows_run == 10 + 2


def test_a_file_system_that_maps_no_files_is_one_line(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FUSE with direct I/O; ONNX Runtime reads the weights there."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(BundleError, match=r"cannot be mapped into memory \(No such device\): copy the bundle"):
        Engine.open(tiny.path)


def test_a_sequence_without_memory_says_its_size(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def new_state(*_: int) -> None:
        raise MemoryError

    monkeypatch.setattr(tiny_engine.backend, "new_state", new_state)
    with pytest.raises(InputError, match="max_length = 16, batch_size = 2: there is not enough memory"):
        tiny_engine.new_sequence(batch_size=2, max_length=16)
