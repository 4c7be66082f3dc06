"""Recurrent states: what is kept after any passes, rollbacks and interrupts is the state of a run from scratch."""

from __future__ import annotations

import random as chance_module

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcony_edge.bundle.manifest import GraphSpec
from balcony_runtime.backends.onnxruntime import recurrent
from balcony_runtime.backends.onnxruntime.recurrent import MOST_COPIES, SPACING, RecurrentStates, copies_for
from tests.support.properties import CHANCE, examples

GRAPH = GraphSpec.model_validate(
    {
        "file": "stage_0.onnx",
        "inputs": [
            {"name": "hidden_0", "dtype": "float32", "shape": ["batch", "rows", 4]},
            {"name": "past_key_0", "dtype": "float32", "shape": ["batch", "capacity", 4]},
            {"name": "past_window_1", "dtype": "float32", "shape": ["batch", 4, 3]},
            {"name": "past_state_1", "dtype": "float32", "shape": ["batch", 2, 4, 4]},
        ],
        "outputs": [],
        "parameters": 1,
        "weight_bytes": 4,
    }
)


class Layer:
    """A recurrence whose state says which rows it has taken in: it counts them, and remembers the last one."""

    def __init__(self, most_copies: int = MOST_COPIES) -> None:
        self.states = RecurrentStates(GRAPH, 1, most_copies)
        self.rows: list[int] = []

    def run(self, values: list[int], *, finish: bool = True) -> None:
        """A pass; without ``finish`` it is interrupted after it has written."""
        side = self.states.begin(len(self.rows))
        window, state = self.states.sides[side]
        assert (window == (self.rows[-1] if self.rows else 0)).all() and (state == sum(self.rows)).all()
        out_window, out_state = self.states.sides[1 - side]
        out_window[:], out_state[:] = values[-1], state + sum(values)
        if finish:
            self.rows += values
            self.states.end(side, len(self.rows))

    def rollback(self, rows: int) -> int:
        """Go back to at most ``rows`` rows; returns the number of rows that are pending again."""
        there = self.states.newest(min(rows, len(self.rows)))
        del self.rows[there:]
        return rows - there


@examples(60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["run", "step", "break", "back", "mark"]), st.integers(1, 200)),
        min_size=1,
        max_size=25,
    ),
    CHANCE,
)
def test_a_state_is_that_of_a_run_from_scratch(actions: list[tuple[str, int]], chance: chance_module.Random) -> None:
    layer = Layer()
    for action, count in actions:
        if action == "back":
            rows = max(0, len(layer.rows) - count)
            pending = layer.rollback(rows)
            assert 0 <= pending <= rows
        elif action == "mark":
            layer.states.copy(len(layer.rows))
        else:
            values = [chance.randint(1, 999) for _ in range(1 if action == "step" else count)]
            layer.run(values, finish=action != "break")
        kept = layer.states.after(layer.states.newest(len(layer.rows)))
        assert (kept["past_state_1"] == sum(layer.rows[: layer.states.newest(len(layer.rows))])).all()
        copies = layer.states.nbytes // (4 * (4 * 3 + 2 * 4 * 4)) - 2
        assert copies <= MOST_COPIES


def test_a_rollback_runs_about_as_many_rows_again_as_it_takes_back() -> None:
    for distance in (0, 1, 5, 63, 100, 500, 1500):
        for marked in ((), (130,), (1930, 1999)):
            layer = Layer()
            for _ in range(2000):
                layer.run([1])
                if len(layer.rows) in marked:  # the end of a prompt
                    layer.states.copy(len(layer.rows))
            # the last two states are kept; below them, a copy every SPACING rows, thinned out with the distance
            again = layer.rollback(2000 - distance)
            assert again <= (0 if distance <= 1 else max(distance, SPACING - 1)), (distance, marked)


def test_a_round_keeps_the_copy_that_it_goes_back_to() -> None:
    """Also the longest one, where states are so large that there is one copy: else all rows would run again."""
    layer = Layer(most_copies=1)
    layer.run([1] * 50)
    layer.states.copy(50)
    layer.run([1] * 9)  # what the round before has left, and the token before the drafts
    for _ in range(8):
        layer.run([1])
    assert layer.rollback(60) == 10


def test_copies_are_spaced_from_the_mark_before_them() -> None:
    """A mark at 130 once left no copy up to 256, and going back by 3 rows from 257 ran 124 again."""
    for passes in (
        128 * [2],
        [130, *127 * [1]],
        [100, 30, *127 * [1]],
    ):  # of three stages, which end with copies in common
        layer = Layer()
        for count in passes:
            layer.run([1] * count)
            if len(layer.rows) == 130:
                layer.states.copy(130)
        if len(layer.rows) < 257:
            layer.run([1] * (257 - len(layer.rows)))
        assert layer.rollback(254) == 254 - 192
    for drafts in range(30):  # a mark just before a line of the grid
        layer = Layer()
        layer.run([1] * (192 - drafts))
        layer.states.copy(192 - drafts)
        for _ in range(drafts + 63):
            layer.run([1])
        assert layer.rollback(252) < SPACING


def test_a_marked_state_makes_a_rollback_free() -> None:
    layer = Layer()
    layer.run([1] * 37)
    layer.states.copy(37)
    for _ in range(20):
        layer.run([2])
    assert layer.rollback(37) == 0 and len(layer.rows) == 37
    layer.run([5])
    assert layer.rollback(38) == 0


def test_an_interrupted_pass_leaves_the_old_state() -> None:
    layer = Layer()
    layer.run([3] * 10)
    layer.run([4], finish=False)
    assert layer.rollback(10) == 0
    layer.run([6])
    assert layer.states.after(11)["past_state_1"].max() == 36


def test_another_state_can_be_taken_over() -> None:
    first, second = Layer(), Layer()
    first.run([2] * 70)
    for name, array in second.states.fill(70).items():
        array[:] = first.states.after(70)[name]
    second.rows = [2] * 70
    second.run([9])
    assert second.rollback(70) == 0 and second.rollback(69) == 69  # nothing older came along


def test_large_states_have_fewer_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert copies_for([GRAPH], 1) == MOST_COPIES
    bytes_of_one = 4 * (4 * 3 + 2 * 4 * 4)
    monkeypatch.setattr(recurrent, "COPY_BYTES", 5 * bytes_of_one)
    assert copies_for([GRAPH], 1) == 5 and copies_for([GRAPH, GRAPH], 1) == 2 and copies_for([GRAPH], 100) == 1
    assert copies_for([], 1) == MOST_COPIES
    layer = Layer(most_copies=1)
    layer.run([1] * 200)
    layer.run([1] * 200)
    assert layer.states.nbytes == 3 * bytes_of_one and layer.rollback(350) == 150


@pytest.mark.parametrize("copies", [1, 2])
def test_a_draft_over_a_spaced_copy_does_not_push_the_rounds_own_out(copies: int) -> None:
    layer = Layer(copies)
    for _ in range(700):
        layer.run([1])
    layer.states.copy(700)  # a round of drafts begins
    for _ in range(6):
        layer.run([2])  # over 704, where a copy would be due
    assert layer.rollback(702) == 2
