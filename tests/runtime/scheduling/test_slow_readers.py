"""Replies whose readers are slower than those of others, so that rounds and steps of one reply come by turns."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.company.joint import JointController
from balcony_runtime.llm import LLM
from balcony_runtime.scheduling import stream
from tests.support.replies import PRICES

TIMED: dict[str, Any] = {"budget": Budget(tpot_ms=1000.0), "max_new_tokens": 200, "ignore_eos": True}


def test_rounds_teach_also_if_no_two_of_them_follow_one_another(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each round the quick reader's reply makes a token by itself."""
    llm.costs = PRICES
    decide, last = JointController.decide, []  # type: Any, list[Any]
    monkeypatch.setattr(JointController, "decide", lambda *of: (last.append(of[2].last), decide(*of))[1])
    with llm.together() as replies:
        quick, slow = (replies.add([key], **TIMED) for key in (1, 2))
        for _ in range(8):
            replies.step()
        last.clear()
        for _ in range(6):
            before = len(quick.reply.tokens), len(slow.reply.tokens)
            replies.pause(slow)
            replies.step()  # both: its token was on the way
            replies.step()  # the quick one alone
            replies.resume(slow)
            assert (len(quick.reply.tokens), len(slow.reply.tokens)) == (before[0] + 2, before[1] + 1)
        assert len(last) == 6 and any(one is not None for one in last[1:])


@pytest.mark.parametrize(("tpot_ms", "absent_ms"), [(60_000.0, 30_000.0), (0.001, math.inf)])
def test_a_reader_is_waited_for_as_long_as_the_gap_that_it_asks_for(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, tpot_ms: float, absent_ms: float
) -> None:
    """Also after a token of another reply that came without it."""
    llm.costs = PRICES
    decide, seen = JointController.decide, []  # type: Any, list[float]
    monkeypatch.setattr(JointController, "decide", lambda *of: (seen.append(of[2].absent_ms), decide(*of))[1])
    options: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True}
    with llm.together() as replies:
        reader, other = replies.add([1], budget=Budget(tpot_ms=tpot_ms), **options), replies.add([2], **options)
        for _ in range(8):
            replies.step()
        replies.pause(reader)
        replies.step()  # the token that was on the way
        before = len(other.reply.tokens)
        while len(other.reply.tokens) < before + 6:  # most of them without the reader
            replies.step()
        seen.clear()
        replies.add(list(range(1, 60)), **options)
        replies.step()
        assert seen and set(seen) == {absent_ms}


def test_a_newcomer_knows_of_a_reply_whose_reader_is_at_its_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if that reply has been alone so far, while a long prompt runs in portions, and if the prompt is short."""
    llm.costs = PRICES
    decide, seen = JointController.decide, []  # type: Any, list[float]
    monkeypatch.setattr(JointController, "decide", lambda *of: (seen.append(of[2].absent_ms), decide(*of))[1])
    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter_ns=lambda: 0))  # a reader is one for 60 ms
    with llm.stream([1, 2], **{**TIMED, "budget": Budget(tpot_ms=30.0)}) as reading:
        for rows in (240, 10):  # the first prompt runs in portions
            assert [next(reading) for _ in range(3)]
            seen.clear()
            llm.generate(list(range(1, rows + 1)), max_new_tokens=1, ignore_eos=True)
            assert set(seen[:2]) == {15.0} and (rows == 10 or len(seen) > 1)


def test_a_reader_that_has_gone_holds_no_prompt_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its token was the last one of all: portions of a prompt bring none."""
    llm.costs = PRICES
    decide, seen = JointController.decide, []  # type: Any, list[float]
    monkeypatch.setattr(JointController, "decide", lambda *of: (seen.append(of[2].absent_ms), decide(*of))[1])
    with llm.together() as replies:
        reader = replies.add([1], budget=Budget(tpot_ms=0.001), max_new_tokens=60, ignore_eos=True)
        for _ in range(4):
            replies.step()
        replies.pause(reader)
        replies.step()  # the token that was on the way
        seen.clear()
        replies.add(list(range(1, 60)), max_new_tokens=2, ignore_eos=True)
        replies.step()
        assert seen and set(seen) == {math.inf}
