"""The cursors of a sequence, over a backend that only writes down what it is asked to run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from balcony_edge.errors import ContextLengthError, InputError
from balcony_runtime.backends.base import RowsOnly
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import MAX_PASS_ROWS, TokenSequence
from balcony_runtime.tokens import whole

VOCABULARY = 50


class Written(RowsOnly):
    """A state; ``calls`` has the passes. Logits of a row are highest at the token 10 + row."""

    memory_bytes = busy_ns = 0

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.batch_size, self.max_length = batch_size, max_length
        self.calls: list[tuple[Any, ...]] = []
        self._queries: list[int] = []

    def wait(self) -> None:
        """Nothing to wait for."""

    def _logits(self, rows: list[int]) -> npt.NDArray[np.float32]:
        found = np.zeros((self.batch_size, len(rows), VOCABULARY), np.float32)
        found[:, range(len(rows)), [10 + row for row in rows]] = 1
        return found

    def embed(self, tokens: npt.NDArray[np.int64], start: int) -> None:
        self.calls.append(("embed", tokens.tolist(), start))

    def run_stage(self, stage: int, start: int, stop: int) -> None:
        self.calls.append(("stage", stage, start, stop))

    def run_exit(self, index: int, start: int, stop: int, queries: int) -> None:
        self.calls.append(("exit", index, start, stop, queries))
        self._queries = list(range(stop - queries, stop))

    def logits(self, queries: int) -> npt.NDArray[np.float32]:
        assert queries == len(self._queries)
        return self._logits(self._queries)

    def decode(self, index: int, ids: npt.NDArray[np.int64], row: int) -> npt.NDArray[np.float32]:
        self.calls.append(("decode", index, ids.tolist(), row))
        return self._logits([row])[:, 0]

    def decode_best(self, index: int, ids: npt.NDArray[np.int64], row: int) -> npt.NDArray[np.int64]:
        return self.decode(index, ids, row).argmax(-1)


class Writes:
    """A backend of exits 2, 3, 4 and 6; all but exits 4 and 6 have balconies that keep rows."""

    def __init__(self, max_length: int = 64, context_length: int = 40) -> None:
        model = SimpleNamespace(context_length=context_length, vocab_size=VOCABULARY, num_attention_heads=2)
        self.manifest = SimpleNamespace(exit_layers=(2, 3, 4, 6), cached_exits=(2, 3), model=model)
        self.max_length, self.closed = max_length, 0
        self.name = "written"

    def new_state(self, batch_size: int, max_length: int) -> Written:
        return Written(batch_size, max_length)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def sequence() -> TokenSequence:
    return Engine(Writes()).new_sequence()


def calls(sequence: TokenSequence) -> list[tuple[Any, ...]]:
    """What the state was asked since the last time."""
    state: Any = sequence.state
    found, state.calls = state.calls, []
    return list(found)


def test_an_exit_runs_its_stages_and_its_balcony_only(sequence: TokenSequence) -> None:
    logits = sequence.advance(3, [7, 8, 9])
    assert calls(sequence) == [("embed", [[7, 8, 9]], 0), ("stage", 0, 0, 3), ("stage", 1, 0, 3), ("exit", 1, 0, 3, 1)]
    assert logits.shape == (1, 1, VOCABULARY) and logits.argmax(-1).tolist() == [[12]]
    assert (sequence.stage_rows, sequence.balcony_rows) == ((0, 0, 3, 3), (3, 0, 0, 0))
    assert (sequence.length, sequence.pending_rows, sequence.rows_run) == (3, 3, 6)
    sequence.advance(6, [4])
    assert calls(sequence) == [
        ("embed", [[4]], 3), ("stage", 0, 3, 4), ("stage", 1, 3, 4), ("stage", 2, 0, 4), ("stage", 3, 0, 4),
        ("exit", 3, 3, 4, 1),
    ]  # fmt: skip
    assert (sequence.stage_rows, sequence.balcony_rows) == ((0, 0, 0, 0), (4, 1, 0, 0))
    assert (sequence.pending_rows, sequence.rows_run) == (0, 6 + 10)
    assert sequence.tokens.tolist() == [[7, 8, 9, 4]]
    assert sequence.advance(2, [], num_logits=2).argmax(-1).tolist() == [[12, 13]]  # the same rows at another exit
    assert calls(sequence) == [("exit", 0, 0, 4, 2)]
    assert sequence.advance(2, [], num_logits=3).argmax(-1).tolist() == [[11, 12, 13]]
    assert calls(sequence) == [("exit", 0, 1, 4, 3)]  # only the rows that are asked for run again


def test_rows_that_a_step_would_run(sequence: TokenSequence) -> None:
    sequence.advance(3, [7, 8, 9])
    assert sequence.rows_due(1) == ([1, 1, 4, 4], [4, 1, 1, 1])
    assert sequence.rows_due(5) == ([5, 5, 8, 8], [8, 5, 1, 1])


def test_a_step_is_fast_where_nothing_is_pending_and_full_otherwise(sequence: TokenSequence) -> None:
    sequence.advance(3, [7, 8, 9])
    assert [sequence.up_to_date(layer) for layer in (2, 3, 4, 6, 5)] == [False, True, False, False, False]
    assert sequence.step(3, np.array([5])).argmax(-1).tolist() == [13]
    assert calls(sequence)[-1] == ("decode", 1, [5], 3)
    assert (sequence.stage_rows, sequence.balcony_rows) == ((0, 0, 4, 4), (4, 0, 0, 0))
    assert (sequence.length, sequence.rows_run) == (4, 6 + 2)
    assert sequence.step_best(3, np.array([6])).tolist() == [14]
    assert calls(sequence) == [("decode", 1, [6], 4)]
    # its balcony is behind
    assert sequence.step(2, np.array([7])).argmax(-1).tolist() == [15]
    assert calls(sequence) == [("embed", [[7]], 5), ("stage", 0, 5, 6), ("exit", 0, 0, 6, 1)]
    assert sequence.step_best(4, np.array([8])).tolist() == [16]
    assert calls(sequence)[-2:] == [("stage", 2, 0, 7), ("exit", 2, 6, 7, 1)]
    assert sequence.up_to_date(4) and not sequence.up_to_date(2)  # exit 4 keeps no rows
    sequence.step(4, np.array([9]))
    assert calls(sequence) == [("decode", 2, [9], 7)]
    assert sequence.tokens.tolist() == [[7, 8, 9, 5, 6, 7, 8, 9]]


def test_a_step_at_the_full_depth_leaves_the_balconies_behind(sequence: TokenSequence) -> None:
    sequence.advance(6, [7, 8])
    sequence.step(6, np.array([9]))
    assert calls(sequence)[-1] == ("decode", 3, [9], 2)
    assert (sequence.stage_rows, sequence.balcony_rows, sequence.rows_run) == ((0,) * 4, (3, 3, 0, 0), 12)


def test_a_full_sequence_is_never_up_to_date() -> None:
    sequence = Engine(Writes()).new_sequence(max_length=4)
    sequence.advance(6, [1, 2, 3])
    assert sequence.up_to_date(6)
    sequence.step(6, np.array([4]))
    assert not sequence.up_to_date(6)


def test_a_batch_advances_together() -> None:
    sequence = Engine(Writes()).new_sequence(batch_size=2, max_length=9)
    state: Any = sequence.state
    assert (state.batch_size, state.max_length, sequence.batch_size, sequence.max_length) == (2, 9, 2, 9)
    sequence.advance(6, np.array([[1, 2], [3, 4]]))
    sequence.step(6, np.array([5, 6]))
    assert sequence.tokens.tolist() == [[1, 2, 5], [3, 4, 6]]
    assert sequence.advance(6, [[], []]).shape == (2, 1, VOCABULARY)
    with pytest.raises(InputError, match=r"tokens of shape \(2,\): must be \(2, n\), one line per member$"):
        sequence.advance(6, [1, 2])
    with pytest.raises(InputError, match=r"tokens of shape \(1, 2, 2\)"):
        sequence.advance(6, [[[1, 2], [3, 4]]])
    with pytest.raises(InputError, match=r"tokens: .*: give \(2, n\), one line"):
        sequence.advance(6, [[1], [2, 3]])


def test_the_scores_of_a_pass_have_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 rows of 2 heads, of 40 rows each
    monkeypatch.setattr("balcony_runtime.token_sequence.MAX_SCORE_BYTES", 3 * 2 * 40 * 4)
    sequence = Engine(Writes()).new_sequence()
    assert sequence.advance(2, [1, 2, 3, 4], num_logits=4).argmax(-1).tolist() == [[10, 11, 12, 13]]
    # a power of two, so that portions of MAX_PASS_ROWS rows end where passes end
    assert calls(sequence)[1:3] == [("stage", 0, 0, 2), ("stage", 0, 2, 4)]
    batch = Engine(Writes()).new_sequence(batch_size=4)
    batch.append([[1, 2]] * 4)
    assert batch.run_stage(0, 2) == 2  # one row of all members at a time, though even that is too large
    assert calls(batch)[1:] == [("stage", 0, 0, 1), ("stage", 0, 1, 2)]


def test_the_page_of_the_format_says_how_long_a_pass_is() -> None:
    """A prompt in one pass takes gigabytes, which no table of inputs tells."""
    page = (Path(__file__).parents[3] / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    assert f"the runtime's have at most {MAX_PASS_ROWS} rows" in page and "`context_length` rows" in page


def test_passes_have_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balcony_runtime.token_sequence.MAX_PASS_ROWS", 4)
    sequence = Engine(Writes()).new_sequence()
    logits = sequence.advance(2, list(range(10)), num_logits=6)
    assert calls(sequence) == [
        ("embed", [list(range(10))], 0), ("stage", 0, 0, 4), ("stage", 0, 4, 8), ("stage", 0, 8, 10),
        ("exit", 0, 0, 4, 0), ("exit", 0, 4, 8, 4), ("exit", 0, 8, 10, 2),
    ]  # fmt: skip
    assert logits.argmax(-1).tolist() == [[14, 15, 16, 17, 18, 19]]
    assert sequence.run_stage(1, 9) == 9
    assert calls(sequence) == [("stage", 1, 0, 4), ("stage", 1, 4, 8), ("stage", 1, 8, 9)]
    assert sequence.run_balcony(3, 7) == 7
    assert calls(sequence) == [("exit", 1, 0, 4, 0), ("exit", 1, 4, 7, 0)]
    assert sequence.balcony_rows == (0, 3, 0, 0)
    assert sequence.advance(4, [], num_logits=5).argmax(-1).tolist() == [[15, 16, 17, 18, 19]]
    assert calls(sequence)[-2:] == [("exit", 2, 5, 9, 4), ("exit", 2, 9, 10, 1)]


def test_idle_time_takes_the_shallowest_stages_first_and_balconies_last(sequence: TokenSequence) -> None:
    sequence.advance(2, [1, 2, 3, 4])
    calls(sequence)
    assert sequence.catch_up(0) == 0 and calls(sequence) == []
    assert sequence.catch_up(6) == 6
    assert calls(sequence) == [("stage", 1, 0, 4), ("stage", 2, 0, 2)]
    assert sequence.catch_up(7) == 7
    assert calls(sequence) == [("stage", 2, 2, 4), ("stage", 3, 0, 4), ("exit", 1, 0, 1, 0)]
    assert sequence.catch_up() == 3 and sequence.catch_up() == 0
    assert calls(sequence) == [("exit", 1, 1, 4, 0)]
    assert (sequence.stage_rows, sequence.balcony_rows) == ((0,) * 4, (0,) * 4)


def test_a_stage_takes_what_the_one_before_has_run(sequence: TokenSequence) -> None:
    sequence.advance(2, [1, 2, 3, 4])
    assert sequence.run_stage(0, 9) == 0  # up to date
    assert sequence.run_stage(1, 3) == 3 and sequence.run_stage(2, 9) == 3 and sequence.run_stage(3, 1) == 1
    assert sequence.stage_rows == (0, 1, 1, 3)
    assert sequence.run_balcony(3, 9) == 3  # as far as its stage
    assert sequence.run_balcony(4, 9) == sequence.run_balcony(6, 9) == 0  # no rows are kept
    for stage, message in ((4, "stage = 4: this bundle has stages 0 to 3: give one of those"), (-1, "stage = -1")):
        with pytest.raises(InputError, match=message):
            sequence.run_stage(stage, 1)


def test_a_rollback_takes_cursors_back_as_far_as_needed(sequence: TokenSequence) -> None:
    sequence.advance(3, [1, 2, 3, 4])
    sequence.advance(2, [5, 6])
    sequence.run_stage(2, 2)
    sequence.rollback(5)
    assert (sequence.length, sequence.stage_rows, sequence.balcony_rows) == (5, (0, 1, 3, 5), (0, 1, 0, 0))
    sequence.rollback(3)
    assert (sequence.stage_rows, sequence.balcony_rows, sequence.tokens.tolist()) == (
        (0, 0, 1, 3),
        (0,) * 4,
        [[1, 2, 3]],
    )
    sequence.rollback(3)
    with pytest.raises(InputError, match="rollback to 4: the sequence has 3 rows: give 0 to 3"):
        sequence.rollback(4)
    sequence.rollback(0)
    assert sequence.length == 0 and sequence.stage_rows == (0,) * 4


def test_a_sequence_without_rows_has_no_logits(sequence: TokenSequence) -> None:
    with pytest.raises(InputError, match="new_tokens: none for a sequence without rows, which has no logits: give a"):
        sequence.advance(2, [])


def test_tokens_outside_the_vocabulary_are_named_by_the_first(sequence: TokenSequence) -> None:
    sequence.advance(2, [0, VOCABULARY - 1])
    for tokens, bad in (([3, VOCABULARY, 99], VOCABULARY), ([3, -2, 99], -2)):
        with pytest.raises(InputError, match=f"token {bad}: the vocabulary has 0 to {VOCABULARY - 1}"):
            sequence.advance(2, tokens)
    with pytest.raises(InputError, match="tokens of type float64: must be integers: give token ids"):
        sequence.advance(2, np.array([1.0]))
    sequence.advance(2, np.array([1, 2], np.uint8))
    assert sequence.tokens.tolist() == [[0, VOCABULARY - 1, 1, 2]]
    with pytest.raises(InputError, match="num_logits = 5: the sequence has 4 rows: ask for 1 to 4"):
        sequence.advance(2, [], num_logits=5)


@pytest.mark.parametrize(("engine_rows", "context", "most"), [(64, 40, 40), (32, 40, 32)])
def test_a_sequence_is_as_long_as_bundle_and_engines_allow(engine_rows: int, context: int, most: int) -> None:
    backend: Any = Writes(engine_rows, context)
    with Engine(backend) as engine:
        assert (engine.max_length, engine.exit_layers) == (most, (2, 3, 4, 6))
        assert engine.new_sequence().max_length == engine.new_sequence(max_length=most).max_length == most
        assert engine.new_sequence(max_length=1).max_length == 1
        for length in (0, most + 1):
            with pytest.raises(ContextLengthError, match=f"max_length = {length}: this bundle takes 1 to {most}"):
                engine.new_sequence(max_length=length)
    assert backend.closed == 1


def test_options_reach_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []
    backend = Writes()
    monkeypatch.setattr("balcony_runtime.engine.Bundle.open", lambda path, verify_hashes: (path, verify_hashes))
    misspelled: Any = {"thread": 3}
    with pytest.raises(TypeError, match="thread"):
        Engine.open("b", **misspelled)
    monkeypatch.setattr("balcony_runtime.engine.open_backend", lambda *a, **o: (opened.append((a, o)), backend)[1])
    engine = Engine.open("b", verify_hashes=False, threads=3, packed="weights", device="cpu", engines="fused")
    assert engine.backend is backend and engine.manifest is backend.manifest
    Engine.open("b")
    given = {"threads": 3, "packed": "weights", "device": "cpu", "engines": "fused", "verify_hashes": False}
    assert opened == [((("b", False),), given), ((("b", True),), {"verify_hashes": True})]


@pytest.mark.parametrize(
    ("value", "least", "message"),
    [
        (1.5, None, "rows = 1.5: must be a whole number: give an integer"),
        ("2", 1, "rows = '2': must be a whole number: give an integer"),
        (0, 1, "rows = 0: must be at least 1: give a larger number"),
    ],
)
def test_numbers_that_are_not_whole_or_too_small(value: Any, least: int | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        whole("rows", value, least)
    assert str(caught.value) == message
    assert whole("rows", np.int64(7)) == 7 and whole("rows", 1, 1) == 1 and whole("rows", -5) == -5


def test_numbers_that_python_does_not_write_are_taken_or_refused_as_others() -> None:
    huge = 10**5000
    assert whole("rows", huge, 1) == huge
    with pytest.raises(InputError, match="rows = int with a number that is too long to show: must be at least 1"):
        whole("rows", -huge, 1)
