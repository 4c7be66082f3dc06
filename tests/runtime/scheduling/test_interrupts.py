"""Interrupts between two calls of a round: the next round goes on from there, and nobody waits for this one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.control.company.round_trace import RoundTraceWriter, read_rounds
from balcony_runtime.engine import TokenSequence
from balcony_runtime.llm import LLM
from balcony_runtime.scheduling.pool import SequencePool
from tests.support.replies import PRICES, ids

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
