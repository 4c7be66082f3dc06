"""Random schedules of one sequence, and checks of their logits against a pass from scratch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import TokenSequence
from tests.support.properties import examples

#: The largest difference for float32, as a share of the largest logit.
TOLERANCE = 1e-4

#: One action of a schedule: its name, and two numbers whose meaning depends on the action.
actions = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "advance",
                "advance",
                "step",
                "step",
                "stage",
                "balcony",
                "idle",
                "rollback",
                "again",
                "move",
                "cancel",
            ]
        ),
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
    """Logits count as equal if they are close and have the same argmax, unless the two best are closer than twice the bound."""
    bound = TOLERANCE * np.abs(want).max()
    assert np.abs(got - want).max() <= bound
    best = np.sort(want, axis=-1)
    clear = best[..., -1] - best[..., -2] > 2 * bound
    assert (got.argmax(-1) == want.argmax(-1))[clear].all()


def play(engine: Engine, sequence: TokenSequence, schedule: list[tuple[str, int, int]], seed: int) -> None:
    """Run a schedule and compare all its logits with a pass from scratch over the same tokens."""
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
        elif action == "step":
            for _ in range(min(count, 3, sequence.max_length - sequence.length)):
                ids = random.integers(0, engine.manifest.model.vocab_size, sequence.batch_size)
                got = sequence.step(exit_layer, ids)
                assert_equal(got, from_scratch(engine, exit_layer, sequence.tokens, 1)[:, 0])
        elif action == "again" and sequence.length:
            rows = min(count, sequence.length)
            got = sequence.advance(exit_layer, [], num_logits=rows)
            assert_equal(got, from_scratch(engine, exit_layer, sequence.tokens, rows))
        elif action == "stage":
            stage = which % len(exits)
            sequence.checkpoint()
            before = sequence.stage_rows[stage]
            assert sequence.run_stage(stage, count) == before - sequence.stage_rows[stage] <= count
        elif action == "balcony":
            sequence.run_balcony(exit_layer, count)
        elif action == "idle":
            assert sequence.catch_up(count) <= count
        elif action == "rollback":
            sequence.rollback(max(sequence.length - count, 0))
        elif action == "cancel" and sequence.length < sequence.max_length:
            cancel(
                sequence, exit_layer, count, random.integers(0, engine.manifest.model.vocab_size, sequence.batch_size)
            )
        elif action == "move":  # to another sequence, as a file would carry it
            *cursors, parts = sequence.parts(sequence.length)
            parts = {name: part.copy() for name, part in parts.items()}
            there = TokenSequence(sequence.engine, sequence.batch_size, sequence.max_length)
            there.fill(sequence.tokens, *cursors, parts)
            assert (there.stage_rows, there.balcony_rows) == (sequence.stage_rows, sequence.balcony_rows)
            sequence = there
        check_cursors(sequence)


def check_schedules(
    reference: Engine, engine: Engine, count: int, prefill: int = 40, length: int = 128, batches: Sequence[int] = (1,)
) -> None:
    """Play random schedules, each after a prompt of up to ``prefill`` rows, against passes from scratch on ``reference``."""

    @examples(count, suppress_health_check=[HealthCheck.too_slow])
    @given(actions, st.integers(1, prefill), st.integers(0, 2**31), st.sampled_from(batches))
    def schedules(schedule: list[tuple[str, int, int]], rows: int, seed: int, batch: int) -> None:
        sequence = engine.new_sequence(batch_size=batch, max_length=length)
        play(reference, sequence, [("advance", seed % 3, rows), *schedule], seed)

    schedules()


def cancel(sequence: TokenSequence, exit_layer: int, count: int, ids: npt.NDArray[np.int64]) -> None:
    """Interrupt a step after some of its passes: the last one wrote its results, and the sequence did not note them."""
    before, left = sequence.tokens.copy(), count % 4

    def interrupted(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            nonlocal left
            found = run(*given)
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return found

        return call

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for name in ("run_stage", "run_exit", "decode"):
            patch.setattr(sequence.state, name, interrupted(getattr(sequence.state, name)))
        sequence.step(exit_layer, ids)
    after = sequence.tokens  # with the new tokens or without
    assert np.array_equal(after[:, : before.shape[1]], before) and after.shape[1] - before.shape[1] in (0, 1)


def check_cursors(sequence: TokenSequence) -> None:
    pending = sequence.stage_rows
    assert all(0 <= rows <= sequence.length for rows in (*pending, *sequence.balcony_rows))
    assert list(pending) == sorted(pending), "a deeper stage never is ahead of a shallower one"
    for index, rows in enumerate(sequence.balcony_rows[:-1]):
        if sequence.exits[index] in sequence.engine.manifest.cached_exits:  # others keep no rows
            assert rows >= pending[index], "a balcony never is ahead of its stage"
