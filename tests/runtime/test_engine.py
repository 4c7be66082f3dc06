"""Exact switching: after any schedule of exits, chunks and rollbacks an exit gives what a pass from scratch gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balcony_edge.bundle import Bundle, fingerprint, sha256_file
from balcony_edge.errors import BundleError, ContextLengthError, InputError
from balcony_edge.manifest import MANIFEST
from balcony_runtime import engine as engine_module
from balcony_runtime.engine import Engine, Sequence

EXITS = (2, 3, 5)
#: DESIGN 3: the largest difference for float32, as a share of the largest logit.
TOLERANCE = 1e-4

#: One action of a schedule: what to do, and two numbers that each action reads in its own way.
actions = st.lists(
    st.tuples(
        st.sampled_from(["advance", "advance", "advance", "stage", "balcony", "idle", "rollback", "again"]),
        st.integers(0, 2),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=14,
)


def from_scratch(engine: Engine, exit_layer: int, tokens: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.float32]:
    sequence = engine.new_sequence(batch_size=tokens.shape[0])
    return sequence.advance(exit_layer, tokens, num_logits=rows)


def assert_equal(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> None:
    """The meaning of equal of DESIGN 3: close, and the same argmax unless the two best are closer than twice that."""
    bound = TOLERANCE * np.abs(want).max()
    assert np.abs(got - want).max() <= bound
    best = np.sort(want, axis=-1)
    clear = best[..., -1] - best[..., -2] > 2 * bound
    assert (got.argmax(-1) == want.argmax(-1))[clear].all()


def play(engine: Engine, sequence: Sequence, schedule: list[tuple[str, int, int]], seed: int) -> None:
    """Run a schedule; every logit that it yields is compared with a pass from scratch over the same tokens."""
    random = np.random.default_rng(seed)
    exits = engine.exit_layers
    for action, which, count in schedule:
        exit_layer = exits[which % len(exits)]
        if action == "advance":
            fitting = min(count, sequence.max_length - sequence.length)
            new = random.integers(0, engine.manifest.model.vocab_size, (sequence.batch_size, fitting))
            if sequence.length + fitting == 0:
                continue
            rows = min(1 + which, sequence.length + fitting)
            got = sequence.advance(exit_layer, new, num_logits=rows)
            assert_equal(got, from_scratch(engine, exit_layer, sequence.tokens, rows))
        elif action == "again" and sequence.length:
            rows = min(count, sequence.length)
            got = sequence.advance(exit_layer, [], num_logits=rows)
            assert_equal(got, from_scratch(engine, exit_layer, sequence.tokens, rows))
        elif action == "stage":
            before = sequence.stage_rows[which]
            assert sequence.run_stage(which, count) == before - sequence.stage_rows[which] <= count
        elif action == "balcony":
            sequence.run_balcony(exit_layer, count)
        elif action == "idle":
            assert sequence.catch_up(count) <= count
        elif action == "rollback":
            sequence.rollback(max(sequence.length - count, 0))
        check_cursors(sequence)


def check_cursors(sequence: Sequence) -> None:
    pending = sequence.stage_rows
    assert all(0 <= rows <= sequence.length for rows in (*pending, *sequence.balcony_rows))
    assert list(pending) == sorted(pending), "a deeper stage never is ahead of a shallower one"
    for index, rows in enumerate(sequence.balcony_rows[:-1]):
        assert rows >= pending[index], "a balcony never is ahead of its stage"


@pytest.mark.parametrize("graphs", ["lowered", "portable"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "smollm3"])
def test_any_schedule_equals_a_pass_from_scratch(
    export_tiny: Callable[[str], Any], architecture: str, graphs: str
) -> None:
    bundle = Bundle.open(export_tiny(architecture).path)
    with Engine.of(bundle if graphs == "lowered" else bundle.portable()) as engine:

        @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
        @given(actions, st.integers(1, 40), st.sampled_from([1, 1, 2]), st.integers(0, 2**31))
        def schedules(schedule: list[tuple[str, int, int]], prefill: int, batch: int, seed: int) -> None:
            sequence = engine.new_sequence(batch_size=batch, max_length=128)
            play(engine, sequence, [("advance", seed % 3, prefill), *schedule], seed)

        schedules()


def test_long_sequences_cross_chunks_and_cache_buckets(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_PASS_ROWS", 48)
    random = np.random.default_rng(11)
    for batch in (1, 2):
        sequence = tiny_engine.new_sequence(batch_size=batch)
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


def test_rollback_is_exact_to_the_bit(tiny_engine: Engine) -> None:
    """The same passes over the same rows give the same bits, whatever stood in the caches past the cursors."""
    tokens = np.random.default_rng(5).integers(0, 320, 40)
    clean = tiny_engine.new_sequence(max_length=64)
    clean.advance(5, tokens[:20])
    expected = [clean.advance(5, [token]) for token in tokens[20:]]
    used = tiny_engine.new_sequence(max_length=64)
    used.advance(5, tokens[:20])
    for exit_layer in (2, 3, 5):
        used.advance(exit_layer, [7, 8, 9, 10])
    used.rollback(20)
    for token, want in zip(tokens[20:], expected, strict=True):
        np.testing.assert_array_equal(used.advance(5, [token]), want)


def test_skipped_stages_keep_their_rows(tiny_engine: Engine) -> None:
    sequence = tiny_engine.new_sequence(max_length=64)
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


def test_idle_time_works_off_the_backlog(tiny_engine: Engine) -> None:
    sequence = tiny_engine.new_sequence(max_length=64)
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


@pytest.mark.parametrize(("graphs", "bucket"), [("lowered", 1), ("portable", 128)])
def test_memory_is_bounded_and_reported(tiny: Any, graphs: str, bucket: int) -> None:
    bundle = Bundle.open(tiny.path)
    with Engine.of(bundle if graphs == "lowered" else bundle.portable()) as engine:
        sequence = engine.new_sequence(max_length=200)
        before = sequence.state.memory_bytes
        assert before == 4 * 200 * 32 * 4  # four boundaries of 32 floats
        sequence.advance(5, [1])
        assert sequence.state.memory_bytes - before == 5 * 2 * bucket * 32 * 4  # keys and values of five layers
        sequence.advance(2, list(range(100)))
        sequence.advance(5, list(range(99)))
        rows = 200 if bucket == 1 else 256
        balcony = 101 if bucket == 1 else 128
        assert sequence.state.memory_bytes - before == (5 * rows + balcony) * 2 * 32 * 4


def test_bad_input_leaves_the_sequence_as_it_was(tiny_engine: Engine) -> None:
    sequence = tiny_engine.new_sequence(max_length=8)
    sequence.advance(5, [1, 2, 3])
    for call, error, pattern in (
        (lambda: sequence.advance(4, [1]), InputError, r"exit_layer = 4: this bundle has exits 2, 3, 5"),
        (lambda: sequence.advance(5, [320]), InputError, r"token 320: the vocabulary has 0 to 319"),
        (lambda: sequence.advance(5, [-1]), InputError, r"token -1"),
        (lambda: sequence.advance(5, np.array([1.5])), InputError, r"must be integers"),
        (lambda: sequence.advance(5, np.array([[1], [2]])), InputError, r"must be \(1, n\)"),
        (lambda: sequence.advance(5, [], num_logits=4), InputError, r"ask for 1 to 3"),
        (lambda: sequence.advance(5, [1], num_logits=0), InputError, r"num_logits = 0"),
        (lambda: sequence.advance(5, [1] * 6), ContextLengthError, r"9 tokens: this sequence holds 8"),
        (lambda: sequence.rollback(4), InputError, r"rollback to 4"),
        (lambda: sequence.rollback(-1), InputError, r"rollback to -1"),
        (lambda: tiny_engine.new_sequence(max_length=257), ContextLengthError, r"takes 1 to 256"),
        (lambda: tiny_engine.new_sequence(batch_size=0), InputError, r"batch_size = 0"),
    ):
        with pytest.raises(error, match=pattern):
            call()
        assert sequence.length == 3 and sequence.stage_rows == (0, 0, 0)


def test_sequences_do_not_disturb_one_another(tiny_engine: Engine) -> None:
    random = np.random.default_rng(2)
    tokens = [random.integers(0, 320, 30) for _ in range(4)]
    sequences = [tiny_engine.new_sequence(max_length=32) for _ in tokens]
    schedule = [(int(random.integers(4)), EXITS[int(random.integers(3))]) for _ in range(80)]
    for which, exit_layer in schedule:
        sequence = sequences[which]
        if sequence.length < 30:
            got = sequence.advance(exit_layer, tokens[which][sequence.length : sequence.length + 1])
            assert_equal(got, from_scratch(tiny_engine, exit_layer, sequence.tokens, 1))


def test_tables_that_differ_from_the_models_sizes_are_refused(bundle_copy: Any) -> None:
    document = json.loads((bundle_copy / MANIFEST).read_text())
    inputs = document["cpu"]["stage_1"]["inputs"]
    for change in (lambda: inputs[3]["shape"].__setitem__(1, 8), lambda: inputs.pop(3)):
        change()
        document["fingerprint"] = fingerprint(document)
        (bundle_copy / MANIFEST).write_text(json.dumps(document))
        with pytest.raises(BundleError, match="input past_key_2 of stage_1 is not what the model's sizes"):
            Engine.open(bundle_copy)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda value: setattr(value, "name", "past_key_77"),
            r"cpu_stage_1\.onnx: the graph has (an unlisted|no) input past_key",
        ),
        (
            lambda value: setattr(value.type.tensor_type.shape.dim[1], "dim_value", 8),
            r"cpu_stage_1\.onnx: input past_key_2 is .*the manifest says",
        ),
    ],
)
def test_graphs_that_differ_from_the_table_are_refused(bundle_copy: Any, change: Any, pattern: str) -> None:
    """A forger who keeps the manifest whole and its hashes right, and changes a graph."""
    path = bundle_copy / "cpu_stage_1.onnx"
    model = onnx.load(path, load_external_data=False)
    value = next(value for value in model.graph.input if value.name == "past_key_2")
    change(value)
    for node in model.graph.node:
        node.input[:] = [value.name if name == "past_key_2" else name for name in node.input]
    if value.name == "past_key_2":  # another width: the operators behind it must not be what refuses it
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


def test_only_the_stages_on_the_way_run(tiny: Any, tmp_path: Any) -> None:
    """ONNX Runtime's own profile of each graph counts its runs."""
    from balcony_runtime.backends.onnxruntime import OnnxRuntimeBackend

    with OnnxRuntimeBackend(Bundle.open(tiny.path), profile_prefix=tmp_path) as backend:
        sequence = Engine(backend).new_sequence(max_length=32)
        sequence.advance(2, [1, 2, 3])
        for token in range(5):
            sequence.advance(2, [token])
        sequence.advance(3, [9])
    runs = {
        path.name.split("_2")[0] if path.name.startswith("lm") else path.name: path.read_text().count('"model_run"')
        for path in tmp_path.iterdir()
    }
    counted = {name: sum(count for file, count in runs.items() if file.startswith(name)) for name in (
        "stage_0", "stage_1", "stage_2", "balcony_2_keys", "balcony_3_keys", "norm", "lm_head"
    )}  # fmt: skip
    # each balcony runs once a token; its backlog (two rows of the prompt; all rows but the last) takes one pass more
    assert counted == {
        "stage_0": 7, "stage_1": 1, "stage_2": 0, "balcony_2_keys": 1, "balcony_3_keys": 1, "norm": 0, "lm_head": 7
    }  # fmt: skip
    balconies = {name: sum(n for file, n in runs.items() if file.startswith(name) and "keys" not in file) for name in (
        "balcony_2", "balcony_3"
    )}  # fmt: skip
    assert balconies == {"balcony_2": 6, "balcony_3": 1}


def test_packed_weights_give_the_same_bits_and_are_made_once(export_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    path, packed = export_tiny("qwen3").path, tmp_path / "packed"
    with Engine.open(path) as plain, Engine.open(path, packed=packed) as first:
        (home,) = packed.iterdir()
        made = {file.name: file.stat().st_mtime_ns for file in home.iterdir()}
        assert {"cpu_stage_0.onnx", "cpu_lm_head.onnx"} <= made.keys() and any(n.endswith(".weights") for n in made)
        with Engine.open(path, packed=packed) as second:
            for exit_layer in plain.exit_layers:
                logits = [
                    engine.new_sequence(max_length=8).advance(exit_layer, [3, 1, 4, 1, 5])
                    for engine in (plain, first, second)
                ]
                assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])
        assert {file.name: file.stat().st_mtime_ns for file in home.iterdir()} == made
    with Engine.open(export_tiny("llama").path, packed=packed):
        assert len(list(packed.iterdir())) == 2  # another bundle, another name
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="packed weights cannot be written"):
        Engine.open(path, packed=blocked / "packed")
