"""Random schedules of several sequences in one pool, and checks of their logits against passes from scratch."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from balcony_runtime.engine import Engine
from balcony_runtime.scheduling.pool import LEAST_SHARED, SequencePool
from balcony_runtime.scheduling.shared_step import PoolMove
from balcony_runtime.token_sequence import TokenSequence
from tests.support.properties import examples
from tests.support.schedules import assert_equal, check_cursors, from_scratch

MEMBERS = 8

#: One action: its name, two numbers whose meaning depends on it, and an exit for each member (3: it takes no part).
actions = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "step", "stage", "rollback", "end", "prompt"]),
        st.integers(0, MEMBERS - 1),
        st.integers(1, 9),
        st.lists(st.integers(0, 3), min_size=MEMBERS, max_size=MEMBERS),
    ),
    min_size=1,
    max_size=10,
)


def new_pool(engine: Engine, members: int = MEMBERS) -> SequencePool:
    pool = SequencePool.of(engine, members)
    assert pool is not None
    return pool


def check_step(engine: Engine, pool: SequencePool, moves: list[PoolMove]) -> None:
    """One shared step gives each sequence the logits of a pass from scratch over its own tokens."""
    for move, logits in zip(moves, [row.copy() for row in pool.step(moves)], strict=True):
        sequence = move.sequence
        assert sequence.tokens[0, -1] == move.token
        assert_equal(logits, from_scratch(engine, move.exit_layer, sequence.tokens, 1)[:, 0])
        check_cursors(sequence)


def play(engine: Engine, schedule: list[Any], seed: int) -> int:
    """Run a schedule; returns the number of prompts that began with rows of another one. Half of them begin alike."""
    random, pool, exits = np.random.default_rng(seed), new_pool(engine), engine.exit_layers
    vocabulary = engine.manifest.model.vocab_size
    live: dict[int, TokenSequence] = {}
    common = random.integers(0, vocabulary, LEAST_SHARED + 4).tolist()
    for action, which, count, chosen in schedule:
        sequence = live.get(which)
        if action == "prompt" or sequence is None:
            if sequence is not None:
                pool.give_back(sequence)
            tokens = common * (count % 2) + random.integers(0, vocabulary, count + 2).tolist()
            sequence = live[which] = pool.take(tokens) or live[which]
            assert_equal(
                sequence.advance(exits[count % len(exits)], tokens[sequence.length :]),
                from_scratch(engine, exits[count % len(exits)], np.array([tokens]), 1),
            )
        elif action == "stage":
            sequence.run_stage(count % len(exits), count)
        elif action == "rollback":
            sequence.rollback(max(sequence.length - count, 0))
        elif action == "end":
            pool.give_back(live.pop(which))
        moves = [
            PoolMove(one, exits[chosen[member]], int(random.integers(0, vocabulary)))
            for member, one in live.items()
            if chosen[member] < len(exits)
        ]
        if moves:
            check_step(engine, pool, moves)
    return pool.reused.prompts


def check_companies(engine: Engine, count: int) -> int:
    """Run ``count`` random schedules; returns the number of prompts that began with rows of another one."""
    reused = []

    @examples(count, suppress_health_check=[HealthCheck.too_slow])
    @given(actions, st.integers(0, 1000))
    def companies(schedule: list[Any], seed: int) -> None:
        reused.append(play(engine, schedule, seed))

    companies()
    return sum(reused)
