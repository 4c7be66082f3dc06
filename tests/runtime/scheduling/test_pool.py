"""Sequences in company: shared passes give each of them what it gets alone, whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import ContextLengthError, DeviceError, InputError
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.scheduling.admission import Bounds
from balcony_runtime.scheduling.pool import LEAST_SHARED, SequencePool
from balcony_runtime.scheduling.sequences import Sequences
from balcony_runtime.scheduling.shared_step import PoolMove, SharedStep
from balcony_runtime.token_sequence import TokenSequence
from tests.support.pools import MEMBERS, check_companies, check_step, new_pool
from tests.support.schedules import assert_equal, from_scratch


@pytest.mark.hypothesis  # its examples are drawn inside
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "smollm3", "lfm2"])
def test_any_company_gives_each_sequence_its_own_logits(export_tiny: Callable[[str], Any], architecture: str) -> None:
    with Engine.open(export_tiny(architecture).path) as engine:
        assert check_companies(engine, 8), "prompts began with rows of others"


def test_a_conversation_keeps_its_memory_whenever_a_place_is_given_back(tiny_engine: Engine) -> None:
    """The collector may give one back between any two steps of the thread that leads; nobody would give this one back."""

    class Lent(dict[Any, Any]):
        def get(self, *given: Any) -> Any:
            found = super().get(*given)
            sequences.free(other)
            return found

    sequences = Sequences(tiny_engine, Bounds(lambda: None, 0, None))
    other, conversation = sequences.new([1, 2], 8), tiny_engine.new_sequence()
    conversation.append([1, 2, 3])
    sequences._lent = Lent(sequences._lent)
    stream: Any = SimpleNamespace(
        sequence=conversation, asks=True, decoder=SimpleNamespace(kept_rows=0), isolated=nullcontext
    )
    sequences.look_again([stream])
    assert not sequences.shares(stream) and not sequences._lent


def test_mixed_exits_share_their_stages(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five members at three exits: one pass a stage over those that reach it, one for each balcony, one head."""
    pool = new_pool(tiny_engine)
    passes: list[tuple[str, int, int, int]] = []
    for name in ("run_stage", "run_exit"):
        run = getattr(pool._pool, name)

        def recorded(index: int, first: int, count: int, name: str = name, run: Any = run) -> None:
            passes.append((name, index, first, count))
            run(index, first, count)

        monkeypatch.setattr(pool._pool, name, recorded)
    members = [pool.take() for _ in range(5)]
    sequences = [member for member in members if member is not None]
    exits = [5, 5, 2, 3, 2]
    for sequence, exit_layer in zip(sequences, exits, strict=True):
        sequence.advance(exit_layer, [1, 2, 3])
    check_step(tiny_engine, pool, [PoolMove(one, e, 7) for one, e in zip(sequences, exits, strict=True)])
    assert passes == [
        ("run_stage", 0, 0, 5),
        ("run_exit", 0, 2, 3),  # member 3 lies between two that leave here, and takes its row along
        ("run_stage", 1, 0, 4),  # member 2 lies between, and works off its pending row
        ("run_exit", 1, 3, 1),
        ("run_stage", 2, 0, 2),  # the last stage includes the norm
    ]
    assert sequences[2].stage_rows == (0, 3, 4), (
        "member 2 has worked off a row of stage 1 for the price of a further row"
    )


@pytest.mark.parametrize(
    ("exits", "at_once"),
    [
        ([5, 5, 5], True),
        ([2, 2, 2], True),
        ([2, 3, 5], True),
        ([5, 2, 2], True),
        ([2, 5, 2], False),
        ([5, 2, 5], False),
    ],
)
def test_neighbours_without_pending_rows_step_at_once(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch, exits: list[int], at_once: bool
) -> None:
    pool = new_pool(tiny_engine)
    sequences = [sequence for sequence in (pool.take() for _ in exits) if sequence is not None]
    for count, sequence in enumerate(sequences):
        sequence.advance(5, [1, 2, 3][: count + 1])
        sequence.catch_up()
    decode, calls = pool._pool.decode, []
    monkeypatch.setattr(pool._pool, "decode", lambda *given: calls.append(given) or decode(*given))
    moves = [PoolMove(one, e, 7 + e) for one, e in zip(sequences, exits, strict=True)]
    check_step(tiny_engine, pool, moves[::-1])  # the order of the moves is not that of the members
    assert len(calls) == at_once
    for sequence in sequences:  # what it stored serves later stages and balconies
        sequence.catch_up()
    check_step(tiny_engine, pool, [PoolMove(one, 5, 3) for one in sequences])
    assert len(calls) == at_once + 1
    memory = sequences[0].state.memory_bytes
    pool.give_back(sequences[1])
    other = pool.take()
    assert other is not None
    other.advance(5, [4])
    other.catch_up()
    check_step(tiny_engine, pool, [PoolMove(sequences[0], 2, 1), PoolMove(other, 2, 2), PoolMove(sequences[2], 5, 3)])
    for token in range(40):
        pool.step([PoolMove(sequences[0], 2, token)])
    assert sequences[0].state.memory_bytes > memory, "shared steps count the rows that they write"


def test_members_far_apart_take_two_passes(tiny_engine: Engine) -> None:
    pool = new_pool(tiny_engine)
    members = [pool.take() for _ in range(MEMBERS)]
    first, last = members[0], members[-1]
    assert first is not None and last is not None
    check_step(tiny_engine, pool, [PoolMove(first, 2, 3), PoolMove(last, 5, 4)])
    check_step(tiny_engine, pool, [PoolMove(last, 2, 3), PoolMove(first, 5, 4)])


def test_a_member_that_another_thread_uses_is_not_taken_along(tiny_engine: Engine) -> None:
    pool = new_pool(tiny_engine)
    one, busy, other = (pool.take() for _ in range(3))
    assert one is not None and busy is not None and other is not None
    busy.advance(2, [1, 2, 3])
    before = (list(busy.stage_cursor), list(busy.balcony_cursor))
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with busy.lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    try:
        check_step(tiny_engine, pool, [PoolMove(one, 5, 3), PoolMove(other, 5, 4)])
        assert (busy.stage_cursor, busy.balcony_cursor) == before
    finally:
        done.set()
        thread.join()


def test_nobody_takes_a_member_during_a_step(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Member 1 is free and lies between two others: the pass writes there, and who wants it waits for the end of the step."""
    pool = new_pool(tiny_engine)
    random = np.random.default_rng(8)
    common = random.integers(0, 320, LEAST_SHARED + 4).tolist()
    one, between, other = (pool.take() for _ in range(3))
    assert one is not None and between is not None and other is not None
    one.advance(5, common)
    other.advance(5, [1, 2, 3])
    pool.give_back(between)
    taken: list[TokenSequence | None] = []
    thread = threading.Thread(target=lambda: taken.append(pool.take([*common, 7])))
    run = pool._pool.run_stage

    def slow(stage: int, first: int, count: int) -> None:
        if stage == 0:
            thread.start()
            thread.join(0.2)
            assert not taken
        run(stage, first, count)

    monkeypatch.setattr(pool._pool, "run_stage", slow)
    check_step(tiny_engine, pool, [PoolMove(one, 5, 3), PoolMove(other, 5, 4)])
    thread.join(30)
    sequence = taken[0]
    assert sequence is not None and pool.members[1] is sequence and sequence.length == len(common)
    assert_equal(sequence.advance(5, [7]), from_scratch(tiny_engine, 5, sequence.tokens, 1))


def test_a_full_sequence_stops_the_step_before_it_changes_anything(tiny_engine: Engine) -> None:
    pool = new_pool(tiny_engine)
    full, other = pool.take(), pool.take()
    assert full is not None and other is not None
    full.advance(2, [1] * full.max_length)
    with pytest.raises(ContextLengthError, match="this sequence holds"):
        pool.step([PoolMove(other, 5, 1), PoolMove(full, 2, 1)])
    assert other.length == 0 and full.length == full.max_length
    # a member at its full length can lie between two others
    third = pool.take()
    assert third is not None
    pool.give_back(other)
    other = pool.take()
    assert other is not None
    check_step(tiny_engine, pool, [PoolMove(other, 5, 1), PoolMove(third, 5, 2)])


def test_a_prompt_starts_from_the_longest_prefix_of_another_one(tiny_engine: Engine) -> None:
    pool = new_pool(tiny_engine, 3)
    random = np.random.default_rng(5)
    common = random.integers(0, 320, LEAST_SHARED + 8).tolist()
    donor = pool.take(common)
    assert donor is not None and donor.length == 0
    donor.advance(3, [*common, 1, 2])
    copied = pool.take([*common, 9, 9])
    assert copied is not None and copied is not donor
    assert copied.tokens[0].tolist() == common and copied.stage_rows == (0, 0, len(common))
    for exit_layer in (3, 5, 2):
        got = copied.advance(exit_layer, [9])
        assert_equal(got, from_scratch(tiny_engine, exit_layer, copied.tokens, 1))
    assert_equal(donor.advance(5, [4]), from_scratch(tiny_engine, 5, donor.tokens, 1))
    # after its end a sequence gives its own rows away
    pool.give_back(donor)
    again = pool.take([*common, 1, 7])
    assert again is donor and again.length == len(common) + 1
    assert_equal(again.advance(5, [7]), from_scratch(tiny_engine, 5, again.tokens, 1))
    # the last token of a prompt is always run, and short prefixes are not looked for
    pool.give_back(again)
    same = pool.take([*common, 1, 7])
    assert same is again and same.length == len(common) + 1
    short = pool.take(common[: LEAST_SHARED - 1])
    assert short is not None and short.length == 0


def test_of_equal_prefixes_a_prompt_takes_the_one_that_went_deepest(tiny_engine: Engine) -> None:
    """A voice reply at a shallow exit came first: each reply at the full depth after it would run those rows again."""
    pool, common = new_pool(tiny_engine, 4), list(range(10, 90))
    for exit_layer, first in ((2, 100), (5, 150)):
        tokens = [*common, *range(first, first + LEAST_SHARED)]
        sequence = pool.take(tokens)
        assert sequence is not None
        sequence.advance(exit_layer, tokens[sequence.length :])
        pool.give_back(sequence)
    third = pool.take([*common, 7])
    assert third is not None and third.stage_cursor == [80, 80, 80]


def test_a_sequence_may_be_collected_in_the_middle_of_a_step(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector gives it back in the thread that steps, or in another, which does not wait; its member is free later."""
    pool = new_pool(tiny_engine, 3)
    steps, lost, other = pool.take(), pool.take(), pool.take()
    assert steps is not None and lost is not None and other is not None
    steps.advance(2, [1, 2, 3])
    run = SharedStep.run

    def collected(self: SharedStep, *arguments: Any) -> Any:
        pool.give_back(lost)
        thread = threading.Thread(target=pool.give_back, args=(other,), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it waited for the step"
        assert pool.in_use == 3, "not before the step has ended"
        return run(self, *arguments)

    monkeypatch.setattr(SharedStep, "run", collected)
    pool.step([PoolMove(steps, 2, 4)])
    assert pool.in_use == 1 and not pool.holds(lost) and not pool.holds(other)


def test_ended_sequences_make_room(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = new_pool(tiny_engine, 2)
    random = np.random.default_rng(6)
    ended = []
    for _ in range(2):
        sequence = pool.take()
        assert sequence is not None
        sequence.advance(2, random.integers(0, 320, 40))
        ended.append(sequence)
    assert pool.take() is None
    for sequence in ended:
        pool.give_back(sequence)
    assert pool.members == tuple(ended)
    fresh = pool.take(random.integers(0, 320, 40).tolist())
    assert fresh is not None and fresh.length == 0 and pool.members == (fresh, ended[1]), "the oldest has gone"
    assert not pool.holds(ended[0])
    assert_equal(fresh.advance(5, [3, 4, 5]), from_scratch(tiny_engine, 5, fresh.tokens, 1))
    monkeypatch.setattr(pool, "kept_bytes", 0)
    pool.give_back(fresh)
    assert pool.members == (None, ended[1])


def test_cleared_members_give_their_memory_back_and_keep_their_bindings(tiny_engine: Engine) -> None:
    pool = new_pool(tiny_engine, 1)
    sequence = pool.take()
    assert sequence is not None
    sequence.advance(5, np.arange(200) % 320)
    sequence.step(5, np.array([7]))  # a decode step counts its rows by itself
    assert sequence.state.memory_bytes > 100_000
    pool.kept_bytes = 0
    pool.give_back(sequence)
    again = pool.take()
    assert again is not None and again is not sequence
    # only the pages at the edges of a member's part are still there
    assert again.state.memory_bytes < 20_000
    memory = pool._pool._memory
    assert not memory.rows[:, 0, 64:128].any()
    assert again.state is sequence.state
    for tokens in ([3, 4, 5], [6]):
        assert_equal(again.advance(5, tokens), from_scratch(tiny_engine, 5, again.tokens, 1))
    assert 0 < again.state.memory_bytes < 100_000


def test_portable_graphs_share_no_passes(tiny: Any) -> None:
    with Engine.of(Bundle.open(tiny.path).portable()) as engine:
        assert SequencePool.of(engine, 4) is None


def test_dead_rows_beyond_the_bound_are_not_paid_for(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = new_pool(tiny_engine)
    monkeypatch.setattr(pool._pool, "most_dead", 0)
    one, gap, other = (pool.take() for _ in range(3))
    assert one is not None and gap is not None and other is not None
    check_step(tiny_engine, pool, [PoolMove(one, 5, 3), PoolMove(other, 5, 4)])


def test_a_place_without_memory_stays_free(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a place takes memory when it is first used; the sequence keeps its own, and the place waits for another."""
    pool, alone = SequencePool.of(tiny_engine, 2), tiny_engine.new_sequence()
    assert pool is not None
    alone.append(list(range(10, 30)))

    def full(member: int) -> None:
        raise DeviceError(f"no memory for place {member}")

    with monkeypatch.context() as patched, pytest.raises(DeviceError, match="no memory"):
        patched.setattr(pool._pool, "state", full)
        pool.look_again(alone, ())
    assert pool.members == (None, None) and pool.room == 2 and not pool.holds(alone)
    assert pool.look_again(alone, ()) == 0 and pool.holds(alone) and pool.room == 1


def test_a_file_whose_rows_are_there_takes_no_further_place(tiny_engine: Engine, tmp_path: Path) -> None:
    """Nor does one that cannot be used. Otherwise both push out what is kept of others, and to erase a reply leaves a copy."""
    pool, path = SequencePool.of(tiny_engine, 3), tmp_path / "saved.session"
    assert pool is not None
    saved, *others = (list(range(begin, begin + 50)) for begin in (10, 100, 200))
    for tokens in (*others, saved):
        sequence = pool.take(tokens)
        assert sequence is not None
        sequence.advance(5, tokens)
        pool.give_back(sequence)
    assert pool.save([*saved, 1], path)[0] == 50
    for _ in range(3):
        assert pool.load(path) == 50
        with pytest.raises(InputError, match="cannot be read"):
            pool.load(tmp_path / "none")
    assert pool.forget([*saved, 1]) == 50 and pool.forget([*saved, 1]) == 0
    assert [pool.load(path), pool.load(path)] == [50, 50] and None not in pool.members
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        pool.load(path)
    assert pool.forget([*saved, 1]) == 50
    more, sequence = list(range(250, 300)), pool.take()
    assert sequence is not None
    sequence.advance(5, more)
    pool.give_back(sequence)
    with pytest.raises(InputError, match="is damaged"):  # its rows are in no place, and all places are taken
        pool.load(path)
    assert [pool.forget([*tokens, 1]) for tokens in (*others, more)] == [50, 50, 50]


def test_an_interrupt_while_the_pool_is_made_leaves_it_to_the_next_reply(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it takes a while. Without a pool no reply would share passes or prefixes until the process ends."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SequencePool, "of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        llm.generate([1, 2], max_new_tokens=1)
    assert llm.pool is not None


def test_rows_that_a_prompt_has_run_itself_are_not_cached(llm: LLM) -> None:
    """A portion of 40 rows has run when another reply with the same 160 first tokens ends: 120 rows are its."""
    prompt = list(range(10, 170))
    with llm.together() as replies:
        late = replies.add([*prompt, 1], max_new_tokens=2, ignore_eos=True)
        (stream,) = llm._requests.scheduler._streams.values()
        stream.sequence.run_stage(0, 40)
        with llm._requests.sequence([*prompt, 2], 170) as other:
            other.advance(5, [*prompt, 2][other.length :])
        while replies.open:
            replies.step()
    assert late.reply.cached_tokens == 120 and len(late.reply.tokens) == 2
