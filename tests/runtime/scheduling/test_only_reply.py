"""The only reply of a Together: its short way leaves nothing behind that another thread's round could meet."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_runtime.decoding.speculate import Speculator
from balcony_runtime.llm import LLM
from balcony_runtime.scheduling.stream import Stream
from balcony_runtime.token_sequence import TokenSequence
from tests.support.replies import PRICES, ids

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}


def test_it_is_answered_while_nobody_else_can_lead(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of another thread would find it asking, and step it or tell its token at the same time."""
    scheduler, answer, leads = llm._requests.scheduler, Stream.answer, list[bool]()

    def seen(self: Stream, steps: Any) -> None:
        leads.append(self in scheduler._running and scheduler._leader is not None)
        answer(self, steps)

    with llm.together() as replies:
        replies.add([1, 2, 3], **OPTIONS)
        for _ in range(2):
            replies.step()
        monkeypatch.setattr(Stream, "answer", seen)
        for _ in range(3):
            replies.step()
    assert leads == [True] * 3


def test_an_interrupt_takes_its_row_back_while_nobody_else_can_lead(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, step, rollback, leads = llm._requests.scheduler, TokenSequence.step, TokenSequence.rollback, list[bool]()

    def interrupted(self: TokenSequence, exit_layer: int, tokens: Any) -> Any:
        step(self, exit_layer, tokens)
        raise KeyboardInterrupt

    def seen(self: TokenSequence, rows: int) -> None:
        leads.append(scheduler._leader is not None)
        rollback(self, rows)

    with llm.together() as replies:
        replies.add([1, 2, 3], **OPTIONS)
        for _ in range(3):
            replies.step()
        with monkeypatch.context() as patch:
            patch.setattr(TokenSequence, "step", interrupted)
            patch.setattr(TokenSequence, "rollback", seen)
            with pytest.raises(KeyboardInterrupt):
                replies.step()
    assert leads == [True]


def test_an_interrupt_as_it_takes_the_lead_gives_it_back(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody would wait for it for ever."""
    want, reads = ids(llm.generate([1, 2, 3], **OPTIONS)), itertools.count()

    def alone(self: Stream) -> frozenset[int]:
        if next(reads) == 1:
            raise KeyboardInterrupt
        return frozenset((self.key,))

    with llm.together() as replies:
        stream = replies.add([1, 2, 3], **OPTIONS)
        for _ in range(3):
            replies.step()
        with monkeypatch.context() as patch:
            patch.setattr(Stream, "alone", property(alone), raising=False)
            with pytest.raises(KeyboardInterrupt):
                replies.step()
        assert llm._requests.scheduler._leader is None and not llm._requests.scheduler._running
        while replies.open:
            replies.step()
    assert ids(stream.reply) == want


def test_an_interrupt_as_it_gives_the_lead_back_leaves_nobody_waiting(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes as the end of a step takes the lock; every later reply would wait for this one's round for ever."""
    scheduler, taken = llm._requests.scheduler, itertools.count()

    class Lock:
        def __enter__(self) -> None:
            if next(taken) == 1:
                raise KeyboardInterrupt
            scheduler._turn.acquire()

        def __exit__(self, *_: object) -> None:
            scheduler._turn.release()

    stream = llm.stream([1, 2, 3], **OPTIONS)
    next(stream)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scheduler, "_lock", Lock())
        next(stream)
    assert scheduler._leader is None and not scheduler._running and not scheduler._streams


def test_its_pending_rows_make_way_for_a_reader_at_its_token(llm: LLM) -> None:
    """Whole, they could take a second; they run in portions until the other one asks."""
    llm.costs = PRICES
    scheduler, options = llm._requests.scheduler, {**OPTIONS, "max_new_tokens": 60}
    with llm.together() as replies:
        reader = replies.add([1], budget=Budget(tpot_ms=1000.0), **options)
        behind = replies.add([2], budget=Budget(exit_layer=2), **options)
        for _ in range(8):
            replies.step()
        replies.pause(reader)
        replies.step()
        (stream,) = (one for one in scheduler._streams.values() if one.asks)
        assert not scheduler._makes_way(stream, others=True), "it stays at its exit"
        behind.budget = Budget()
        assert stream.decoder.rows_due > 5 and scheduler._makes_way(stream, others=True)
        replies.resume(reader)
        assert not scheduler._makes_way(stream, others=True), "nobody is at a token"


def test_its_policy_rests_while_another_reply_is_in_progress(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of drafts takes as long as several steps, and the other one's reader may ask in the meantime."""
    llm.costs = PRICES
    attempts, options = list[bool](), {**OPTIONS, "max_new_tokens": 60}
    monkeypatch.setattr(Speculator, "attempt", lambda *_: attempts.append(True))
    with llm.together() as replies:
        reader = replies.add([1], budget=Budget(tpot_ms=1000.0), **options)
        replies.add([2], budget=Budget(policy="lossless"), **options)
        for _ in range(8):
            replies.step()
        replies.pause(reader)
        for _ in range(4):
            replies.step()
        assert not attempts
        reader.cancel()
        for _ in range(3):
            replies.step()
        assert attempts, "it is alone now"
