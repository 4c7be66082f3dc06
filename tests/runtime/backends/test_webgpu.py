"""WebGPU: its small graphs anywhere, and the backend where the provider is.

The conformance suite also runs over this backend. `make test-webgpu` brings the provider; any adapter will do, such as
Mesa's for CPUs.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import DeviceError, InputError
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.exits import ExitModel
from balcony_runtime.backends import choose as choose_module
from balcony_runtime.backends.graph_files.check import nodes_of
from balcony_runtime.backends.onnxruntime.backend import open_session
from balcony_runtime.backends.webgpu import probe, small_graphs
from balcony_runtime.backends.webgpu.adapters import Adapter
from balcony_runtime.backends.webgpu.backend import WebGpuBackend
from balcony_runtime.backends.webgpu.device import BoundPass
from balcony_runtime.engine import Engine
from tests.conftest import tiny_model, tiny_tokenizer

CARD = Adapter("a card", "discrete GPU", half=False)


def ran(graph: bytes, **inputs: Any) -> list[Any]:
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


def test_a_pass_of_a_bundle_that_was_closed_is_one_line() -> None:
    """The handler of a signal may close it in the middle of a step of its own thread, which goes on with the next pass."""
    one = BoundPass("stage_0", SimpleNamespace(io_binding=object, run_with_iobinding=print))
    one.drop()
    with pytest.raises(InputError, match="this bundle was closed: load it again"):
        one.run()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "smollm3"])
def test_the_test_of_attention_has_the_operator_of_the_bundle(
    export_tiny: Callable[[str], Any], architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same inputs (rotary tables, the sink) and attributes; NumPy's reference agrees with the CPU's kernel."""
    bundle = Bundle.open(export_tiny(architecture).path)
    opened: dict[str, Any] = {}

    def opens(name: str, graph: bytes) -> None:
        (tmp_path / "attend.onnx").write_bytes(graph)
        opened[name] = open_session(graph)

    def on_cpu(device: Any, query: Any, key: Any, value: Any, tables: Any, size: int, limit: int) -> Any:
        past = np.zeros((1, key.shape[2] // size, query.shape[1], size), np.float32)
        rows = {"last": np.array([query.shape[1] - 1], np.int32), "total": np.array(query.shape[1], np.int32)}
        given = {"query": query, "key": key, "value": value, "past_key": past, "past_value": past, **rows, **tables}
        return opened["attend"].run(["attended"], given)[0]

    monkeypatch.setattr(probe, "_on_device", on_cpu)
    device: Any = SimpleNamespace(dtype="float32", open=opens)
    found = [
        (inputs, attributes)
        for spec in bundle.manifest.runnable.values()
        for inputs, attributes in nodes_of(bundle.file(spec.file), "GroupQueryAttention")
    ]
    assert found
    for inputs, attributes in found:
        kind = probe.Attention(tuple(sorted(attributes.items())), sink=inputs > small_graphs.SINK_INPUT)
        assert probe.most_rows(device, [kind], bundle.manifest.model.head_dim) is None
        ((same, numbers),) = nodes_of(tmp_path / "attend.onnx", "GroupQueryAttention")
        assert (same, numbers) == (inputs, attributes)
    assert any(inputs > small_graphs.SINK_INPUT for inputs, _ in found) == (architecture != "gemma2")


def test_the_pick_tells_when_a_logit_is_not_a_number() -> None:
    logits = np.array([[[0.5, 3.0, -1.0]]], np.float32)
    (picked,) = ran(small_graphs.pick(), logits=logits)
    assert picked.tolist() == [[[1.0, 2.5]]]
    for bad in (np.nan, np.inf):
        logits[0, 0, 2] = bad
        (picked,) = ran(small_graphs.pick(), logits=logits)
        assert not np.isfinite(picked[0, 0, 1])


@pytest.fixture(scope="module")
def on_webgpu(tiny: Any) -> Iterator[Engine]:
    """An engine over the tiny Llama."""
    with Engine.open(tiny.path, device="webgpu") as engine:
        yield engine


class Moved:
    """Counts the bytes of bound arrays: those that a step gives to the device, and those that it takes back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up = self.down = 0
        self._taken: dict[BoundPass, int] = {}
        give, take, run = BoundPass.give, BoundPass.take, BoundPass.run

        def counted_give(one: BoundPass, name: str, value: Any) -> None:
            self.up += value.nbytes if isinstance(value, np.ndarray) else 0
            give(one, name, value)

        def counted_take(one: BoundPass, name: str, value: Any) -> None:
            self._taken[one] = self._taken.get(one, 0) + (value.nbytes if isinstance(value, np.ndarray) else 0)
            take(one, name, value)

        def counted_run(one: BoundPass) -> None:
            self.down += self._taken.get(one, 0)
            run(one)

        for name, method in (("give", counted_give), ("take", counted_take), ("run", counted_run)):
            monkeypatch.setattr(BoundPass, name, method)


@pytest.mark.webgpu
def test_a_step_takes_one_embedding_to_the_device_and_brings_logits_or_a_token(
    on_webgpu: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Moved(monkeypatch)
    model = on_webgpu.manifest.model
    sequence = on_webgpu.new_sequence(max_length=32)
    sequence.advance(5, [1, 2, 3])
    for exit_layer, graphs in ((2, 2), (3, 3), (5, 3)):  # graphs with attention: stages up to the exit, and its balcony
        for step, down in ((sequence.step, 4 * model.vocab_size), (sequence.step_best, 8)):
            sequence.catch_up()
            step(exit_layer, np.array([4]))  # binds
            sequence.catch_up()
            moved.up = moved.down = 0
            step(exit_layer, np.array([5]))
            assert moved.down == down
            # the embedding; the position of the row for each graph, and of the rows that are kept
            assert moved.up == 4 * model.hidden_size + 4 * graphs + 16


@pytest.mark.webgpu
@pytest.mark.parametrize("most", [4, 3])
def test_passes_of_several_rows(tiny: Any, on_webgpu: Engine, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Every adapter is right for the first 8 rows, so passes of several rows run here on any adapter."""
    monkeypatch.setattr(on_webgpu.backend, "most_rows", most)
    runs: list[int] = []
    with Engine.open(tiny.path, device="cpu") as reference:
        for exit_layer in (2, 3, 5):
            for queries in (1, 3, 6, 8):  # within the last pass, and across passes
                sequence = on_webgpu.new_sequence(max_length=16)
                state: Any = sequence.state
                take = state._take
                monkeypatch.setattr(
                    state, "_take", lambda rows, at, *into, take=take: (runs.append(len(at)), take(rows, at, *into))[1]
                )
                tokens = [7, 3, 5, 11, 2, 9, 4, 8]
                got = sequence.advance(exit_layer, tokens, num_logits=queries)
                want = reference.new_sequence(max_length=16).advance(exit_layer, tokens, num_logits=queries)
                assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    assert max(runs) > 1


@pytest.mark.webgpu
def test_a_logit_that_is_not_a_number_is_refused(on_webgpu: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = on_webgpu.new_sequence(max_length=32)
    sequence.advance(5, [1, 2, 3])
    nothing = np.full(on_webgpu.manifest.model.hidden_size, np.nan, np.float32)
    monkeypatch.setattr(on_webgpu.backend.table, "row", lambda _: nothing)
    with pytest.raises(InputError, match="the logits hold NaN or infinity"):
        sequence.step_best(5, np.array([4]))
    sequence.rollback(3)


@pytest.mark.webgpu
def test_memory_goes_back_with_the_sequence_and_after_an_error(
    on_webgpu: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = on_webgpu.backend.device._memories

    def held() -> int:
        gc.collect()
        sequence = on_webgpu.new_sequence(max_length=16)  # an allocation frees what was returned
        count = sum(len(memory.values) + len(memory.passes) for memory in memories)
        del sequence
        return count

    before = held()
    sequence = on_webgpu.new_sequence(max_length=16)
    sequence.advance(3, [1, 2, 3], num_logits=2)
    sequence.step(3, np.array([7]))
    assert held() > before
    state: Any = sequence.state
    sizes = len(state._memory.values), len(state._memory.passes)
    with monkeypatch.context() as patch, pytest.raises(DeviceError, match="lost"):
        patch.setattr(state, "_put", lambda *_: (_ for _ in ()).throw(DeviceError("lost")))
        state.run_stage(2, 0, 2)
    assert (len(state._memory.values), len(state._memory.passes)) == sizes
    del sequence, state
    assert held() == before
    with pytest.raises(InputError, match="batch_size = 2: WebGPU runs no batches"):
        on_webgpu.new_sequence(batch_size=2)


#: Bundles that are loaded, used and closed in threads; with passes at the same time the provider fails or crashes.
THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from balcony_runtime.engine import Engine

def written():
    with Engine.open(sys.argv[1], device="webgpu") as engine:
        sequence = engine.new_sequence(max_length=32)
        ids, made = sequence.advance(5, [7, 3, 5])[:, -1].argmax(-1), []
        for _ in range(12):
            made.append(int(ids[0]))
            ids = sequence.step_best(5, ids)
    return made

expected = written()
with ThreadPoolExecutor(3) as threads:
    assert [task.result() for task in [threads.submit(written) for _ in range(6)]] == [expected] * 6
"""


@pytest.mark.webgpu
def test_bundles_of_one_process_take_turns(tiny: Any) -> None:
    command = [sys.executable, "-c", THREADS, str(tiny.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr


#: Ends of a process in which values of the device are still referred to in every way that there is.
ENDS = """
import gc, sys, threading
import balcony_edge
from balcony_edge.errors import BalconyError, InputError
from balcony_runtime.engine import Engine
import numpy as np

def used(engine):
    sequence = engine.new_sequence(max_length=16)
    sequence.advance(2, [1, 2, 3])
    sequence.step(2, np.array([4]))
    return sequence

for _ in range(2):  # sequences that live longer than their engine
    engine = Engine.open(sys.argv[1], device="webgpu")
    sequence, other = used(engine), used(engine)
    del other
    engine.close()
    engine.close()
    try:
        sequence.step(2, np.array([5]))
    except InputError as error:
        assert "was closed" in str(error)
engine = Engine.open(sys.argv[1], device="webgpu")
thread = threading.Thread(target=lambda: [used(engine) for _ in range(3)])
thread.start()
thread.join()
cycle = [engine, used(engine)]
cycle.append(cycle)
del cycle, engine
gc.collect()
kept = Engine.open(sys.argv[1], device="webgpu")  # never closed
kept.myself, kept.sequence = kept, used(kept)
other = Engine.open(sys.argv[1], device="webgpu")
held = used(other)
print("the end")
if sys.argv[2] == "error":
    raise ValueError("an error that nobody catches")
"""


@pytest.mark.webgpu
@pytest.mark.parametrize("end", ["quiet", "error"])
def test_no_end_of_a_process_is_a_crash(tiny: Any, end: str) -> None:
    command = [sys.executable, "-c", ENDS, str(tiny.path), end]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.stdout == "the end\n" and done.returncode == (0 if end == "quiet" else 1), done.stderr


@pytest.mark.webgpu
def test_auto_takes_the_faster_one(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On an adapter that counts as a GPU here: what was measured decides, and a GPU that fails is named."""
    caplog.set_level("INFO", choose_module.__name__)
    monkeypatch.setattr(choose_module, "choose", lambda *_: choose_module.Choice("webgpu", None, "there is a GPU"))

    def taken() -> bool:
        with Engine.open(tiny.path) as engine:
            engine.new_sequence().advance(5, [1, 2, 3])
            return isinstance(engine.backend, WebGpuBackend)

    found = taken()
    gpu_ms, cpu_ms = map(float, re.findall(r"takes (\S+) ms on the GPU and (\S+) ms on the CPU", caplog.text)[0])
    assert gpu_ms > 0 < cpu_ms and found == (gpu_ms < cpu_ms)
    monkeypatch.setattr(choose_module, "token_ms", lambda backend: 1.0 + (not isinstance(backend, WebGpuBackend)))
    assert taken()

    def lost(backend: Any) -> float:
        if isinstance(backend, WebGpuBackend):
            raise DeviceError("the GPU was lost")
        return 1.0

    monkeypatch.setattr(choose_module, "token_ms", lost)
    assert not taken() and "the GPU was lost" in caplog.text


@pytest.mark.webgpu
def test_attention_that_is_wrong_is_found(on_webgpu: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    device = on_webgpu.backend.device
    numbers = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.25, "local_window_size": 7}
    kinds = [probe.Attention(tuple(numbers.items()), sink=False)]
    right, asked = probe._on_device, []

    def wrong(*given: Any) -> Any:
        asked.append(given[-1])
        return right(*given) + (given[-1] > good) + (given[-1] == bad)

    monkeypatch.setattr(probe, "_on_device", wrong)
    good, bad = 99, 1  # the kernel of decode steps
    with pytest.raises(DeviceError, match="attention wrongly here"):
        probe.most_rows(device, kinds, 16)
    asked.clear()
    good, bad = 1, 0
    assert probe.most_rows(device, kinds, 16) == 1 and asked == [64, 31, 1]
    good = 0
    with pytest.raises(
        DeviceError, match=r"computes this model's attention wrongly here \(num_heads 4, .* --device cpu"
    ):
        probe.most_rows(device, kinds, 16)


#: Loads and closes a bundle many times, and prints megabytes and open files after a tenth of them and at the end.
CYCLES = """
import gc, sys, psutil, numpy as np
from balcony_runtime.engine import Engine
process, count = psutil.Process(), int(sys.argv[2])
for cycle in range(1, count + 1):
    with Engine.open(sys.argv[1], device="webgpu") as engine:
        sequence = engine.new_sequence(max_length=16)
        sequence.advance(engine.exit_layers[-1], [1, 2, 3])
        sequence.step(engine.exit_layers[-1], np.array([4]))
    del sequence
    if cycle in (count // 10, count):
        gc.collect()
        print(process.memory_info().rss / 1e6, process.num_fds())
"""


@pytest.mark.webgpu
@pytest.mark.deep
def test_a_bundle_that_is_loaded_and_closed_a_thousand_times(tmp_path: Path) -> None:
    exits, options = ExitModel(tiny_model("llama", num_hidden_layers=1), {}), ExportOptions("one", trained=True)
    export_bundle(exits, tiny_tokenizer(), tmp_path / "bundle", options)  # one stage, for short cycles
    command = [sys.executable, "-c", CYCLES, str(tmp_path / "bundle"), "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=7200)
    assert done.returncode == 0, done.stderr
    (mb, files), (mb_after, files_after) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert mb_after < mb + 10 and files_after == files, done.stdout


@pytest.mark.webgpu
@pytest.mark.deep
def test_a_soft_cap_that_the_provider_ignores_is_refused(export_tiny: Callable[[str], Any]) -> None:
    with pytest.raises(DeviceError, match=r"computes this model's attention wrongly here .*softcap 2.* --device cpu"):
        Engine.open(export_tiny("gemma2").path, device="webgpu")
