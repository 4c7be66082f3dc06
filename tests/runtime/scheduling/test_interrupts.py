"""Interrupts between two calls of a round: the next round goes on from there, and nobody waits for this one."""

from __future__ import annotations

import itertools
import json
import pkgutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.control.company.round_trace import RoundTraceWriter, read_rounds
from balcony_edge.errors import InputError
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Token, TokenStream
from balcony_runtime.scheduling.pool import SequencePool
from balcony_runtime.scheduling.shared_step import SharedStep
from balcony_runtime.scheduling.stream import Cancellation
from balcony_runtime.sessions import prefixes
from balcony_runtime.token_sequence import TokenSequence
from tests.support.replies import PRICES, ids
from tests.support.schedules import assert_equal, from_scratch

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}


def test_an_interrupt_as_a_round_begins_is_an_interrupt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    want = [ids(llm.generate([1, 2, 3 + number], **OPTIONS)) for number in range(2)]
    scheduler = llm._requests.scheduler
    release = scheduler._turn.release

    def interrupted() -> None:
        release()
        raise KeyboardInterrupt

    with llm.together() as replies:
        streams = [replies.add([1, 2, 3 + number], **OPTIONS) for number in range(2)]
        for _ in range(3):
            replies.step()
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, RuntimeError)) as found:
            patch.setattr(scheduler._turn, "release", interrupted)
            replies.step()
        running, scheduler._running = scheduler._running, ()  # to leave a round that never ends would wait for ever
        assert found.type is KeyboardInterrupt and not running
        while replies.open:
            replies.step()
    assert [ids(stream.reply) for stream in streams] == want


@pytest.mark.parametrize("taken", [True, False], ids=["has the lock", "waits for the lock"])
def test_an_interrupt_as_a_round_ends_keeps_nobody_running(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """It comes as the leader takes the lock again; its reply, which leaves, would wait for its own round for ever."""
    scheduler = llm._requests.scheduler
    acquire, times = scheduler._turn.acquire, itertools.count()

    def interrupted() -> bool:
        if next(times):
            return acquire()
        if taken:
            acquire()
        raise KeyboardInterrupt

    def waits(*_: Any) -> None:
        raise AssertionError("it waits for itself")

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, RuntimeError)) as found:
        patch.setattr(scheduler._turn, "acquire", interrupted)
        patch.setattr(scheduler._turn, "wait", waits)
        next(llm.stream([1, 2, 3], **OPTIONS))
    assert found.type is KeyboardInterrupt or not taken
    assert scheduler._leader is None and not scheduler._running and not scheduler._streams
    assert len(ids(llm.generate([1, 2, 3], **OPTIONS))) == 8


@pytest.mark.parametrize("last", [1, 2])
def test_a_trace_that_was_interrupted_is_read(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """Header and budgets are written again."""
    llm.costs = PRICES
    written, times = json.dumps, itertools.count(1)

    def interrupted(*arguments: Any, **options: Any) -> str:
        if next(times) == last:
            raise KeyboardInterrupt
        return written(*arguments, **options)

    with RoundTraceWriter(tmp_path / "rounds.jsonl") as trace, llm.together() as replies:
        llm.record_rounds(trace)
        for number in range(2):
            replies.add([1, 2, 3 + number], budget=Budget(tpot_ms=1000.0), **OPTIONS)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("balcony_edge.control.trace.json.dumps", interrupted)
            while replies.open:
                replies.step()
        while replies.open:
            replies.step()
        llm.record_rounds(None)
    rounds = read_rounds(tmp_path / "rounds.jsonl").rounds
    assert len(rounds) > 3 and {stream.budget.tpot_ms for stream in rounds[0].seen.streams} == {1000.0}


def test_a_round_that_was_interrupted_is_not_in_the_trace(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is decided again from the state before it; a replay that had it would go on from another state."""
    llm.costs = PRICES
    step, times = SequencePool.step, itertools.count()

    def interrupted(pool: SequencePool, moves: Any) -> Any:
        if next(times) == 0:
            raise KeyboardInterrupt
        return step(pool, moves)

    with RoundTraceWriter(tmp_path / "rounds.jsonl") as trace, llm.together() as replies:
        llm.record_rounds(trace)
        for number in range(2):
            replies.add([1, 2, 3 + number], **OPTIONS)
        for _ in range(3):
            replies.step()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SequencePool, "step", interrupted)
            replies.step()
        while replies.open:
            replies.step()
        llm.record_rounds(None)
    made = [
        (stream.key, stream.made_tokens)
        for one in read_rounds(tmp_path / "rounds.jsonl").rounds
        for stream in one.seen.streams
        if stream.key in one.exits
    ]
    assert made and len(made) == len(set(made)), "each token is chosen once"


def test_what_was_told_before_an_interrupt_comes_with_the_next_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round has brought two tokens, and the interrupt comes when the first has been told; so with an error."""
    told, times = TokenStream.__next__, itertools.count()

    def interrupted(self: TokenStream) -> Token:
        if next(times) == 1:
            raise KeyboardInterrupt
        return told(self)

    found: list[tuple[TokenStream, Token | Exception]] = []
    with llm.together() as replies:
        streams = [replies.add([1, 2, 3 + number], **OPTIONS) for number in range(2)]
        for _ in range(3):
            found += replies.step()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TokenStream, "__next__", interrupted)
            found += replies.step()
        while replies.open:
            found += replies.step()
    for stream in streams:
        assert [one for reply, one in found if reply is stream] == list(stream.reply.tokens)


def test_recording_may_stop_in_the_handler_of_a_signal(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python runs it between two calls of a step of its own thread, which would wait for itself for ever."""
    turn, step = llm._requests.scheduler._turn, TokenSequence.step

    def waits(*_: Any) -> None:
        raise AssertionError("it waits for itself")

    def interrupted(self: TokenSequence, exit_layer: int, tokens: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(turn, "wait", waits)
            llm.record_rounds(None)
        return step(self, exit_layer, tokens)

    with llm.stream([1, 2], **OPTIONS) as stream:
        next(stream)
        monkeypatch.setattr(TokenSequence, "step", interrupted)
        assert len(list(stream)) == 7


@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "exits"])
def test_a_bundle_may_be_closed_in_the_handler_of_a_signal(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """Python runs it in the middle of a shared pass of its own thread, which would wait for itself for ever."""
    run, found = SharedStep.run, list[Any]()

    def interrupted(self: SharedStep, *arguments: Any) -> Any:
        monkeypatch.setattr(SharedStep, "run", run)
        llm.close()
        if ends:
            sys.exit(0)
        return run(self, *arguments)

    def handled() -> None:
        try:
            with llm.together() as replies:
                for number in range(2):
                    replies.add([1, 2, 3 + number], **OPTIONS)
                for _ in range(3):
                    replies.step()
                monkeypatch.setattr(SharedStep, "run", interrupted)
                while replies.open:
                    found.extend(one for _, one in replies.step() if not isinstance(one, Token))
        except BaseException as error:  # SystemExit would end the thread in silence
            found.append(error)

    thread = threading.Thread(target=handled, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for itself"
    assert [type(one) for one in found] == ([SystemExit] if ends else [InputError] * 2)


@pytest.mark.parametrize(
    "at", ["balcony_runtime.token_sequence.TokenSequence.fill", f"{prefixes.__name__}.common_length"]
)
def test_a_bundle_may_be_closed_in_the_handler_of_a_signal_as_a_reply_begins(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """While its rows are copied, or looked for in files, this thread has a lock, and would wait for itself for ever."""
    prompt, found = list(range(10, 90)), list[Any]()
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as before:
        before.generate(prompt, max_new_tokens=1, ignore_eos=True)
    llm = balcony_edge.load(tiny.path, prefix_directory=tmp_path)
    llm.generate(prompt, max_new_tokens=1, ignore_eos=True)
    called = pkgutil.resolve_name(at)

    def interrupted(*given: Any) -> Any:
        monkeypatch.undo()
        llm.close()
        return called(*given)

    def handled() -> None:
        with pytest.raises(InputError, match="this bundle was closed") as closed:
            llm.generate([*prompt[:40], 3], **OPTIONS)
        found.append(closed)

    monkeypatch.setattr(at, interrupted)
    thread = threading.Thread(target=handled, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for itself"
    assert found


def test_a_bundle_may_be_closed_in_a_handler_while_another_thread_waits_for_the_interrupted_pass(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: it begins a reply, has the pool's lock, and waits for the device, which the thread of the handler has."""
    monkeypatch.setattr("balcony_runtime.scheduling.pool.LONGEST_PASS_S", 0.2)
    device, waits, pool = threading.Lock(), threading.Event(), llm.pool
    assert pool is not None

    def begins() -> None:
        with pool._lock:
            waits.set()
            with device:
                pass

    other, handler = (threading.Thread(target=one, daemon=True) for one in (begins, llm.close))
    with device:
        other.start()
        assert waits.wait(20)
        handler.start()
        handler.join(20)
        ended = not handler.is_alive()
    other.join(20)
    handler.join(20)
    assert ended, "they wait for each other"


def test_what_a_look_interrupts_keeps_its_tokens(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, prompt = SequencePool.of(tiny_engine, 2), list(range(10, 90))
    assert pool is not None
    waits, ran = pool.take(prompt), pool.take(prompt)
    assert waits is not None and ran is not None
    waits.append([*prompt, 7])
    ran.advance(5, prompt)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TokenSequence, "fill", interrupted)
        pool.look_again(waits, ())
    assert waits.tokens[0].tolist() == [*prompt, 7]
    assert_equal(waits.advance(5, ()), from_scratch(tiny_engine, 5, np.array([[*prompt, 7]]), 1))


def test_a_reply_may_be_cancelled_in_the_handler_of_a_signal() -> None:
    """Python runs it between two lines of the wait for a pace: the thread would wait for the event's lock for ever."""
    assert "_cond" in vars(threading.Event()), (
        "under another name the lock of `Cancellation` is not the one that `wait` takes"
    )
    cancelled = Cancellation(int)

    def handled() -> None:
        with cancelled._cond:  # as the wait has it
            cancelled.set()

    thread = threading.Thread(target=handled, daemon=True)
    thread.start()
    thread.join(5)
    assert cancelled.is_set() and not thread.is_alive()


def test_an_interrupt_as_a_reply_joins_leaves_no_stream_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count as one that waits, of which there may be 64, and no later reply would be alone."""

    class Interrupted(threading.Condition):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            raise KeyboardInterrupt

    scheduler = llm._requests.scheduler
    want = ids(llm.generate([1, 2, 3], **OPTIONS))
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_turn", Interrupted(scheduler._lock))
        for _ in range(64):
            with pytest.raises(KeyboardInterrupt):
                llm.generate([1, 2, 3], **OPTIONS)
    assert ids(llm.generate([1, 2, 3], **OPTIONS)) == want
    assert not scheduler._streams
