"""What fails in a round ends the replies that it was for, and says nothing about the device's speed."""

from __future__ import annotations

from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.errors import DeviceError
from balcony_runtime.llm import LLM
from balcony_runtime.reply import TokenStream
from balcony_runtime.scheduling.pool import SequencePool
from balcony_runtime.token_sequence import TokenSequence
from tests.support.replies import PRICES, free_members, ids

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}


def failing(*_: Any) -> Any:
    raise DeviceError("stage_1.onnx: ONNX Runtime failed while running it (bad allocation): free memory")


def test_an_error_in_a_shared_pass_ends_those_that_share_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer, whose prompt runs by itself in the same round, goes on."""
    want, failed = ids(llm.generate([9, 9, 9], **OPTIONS)), set[TokenStream]()
    free = free_members(llm)
    with llm.together() as replies:
        sharing = {replies.add([1, 2, 3 + number], **OPTIONS) for number in range(2)}
        for _ in range(3):
            replies.step()
        newcomer = replies.add([9, 9, 9], **OPTIONS)
        with monkeypatch.context() as patch:
            patch.setattr(SequencePool, "step", failing)
            while not failed:
                failed |= {stream for stream, one in replies.step() if isinstance(one, DeviceError)}
        while replies.open:
            replies.step()
    assert failed == sharing and ids(newcomer.reply) == want and free_members(llm) == free


def test_a_round_in_which_rows_failed_is_no_measurement(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its price has the rows of the prompt, and its time has not: the device would seem to be faster than it is."""
    llm.costs = PRICES
    scheduler = llm._requests.scheduler
    with llm.together() as replies:
        for number in range(2):
            replies.add([1, 2, 3 + number], budget=Budget(tpot_ms=1000.0), **{**OPTIONS, "max_new_tokens": 40})
        while scheduler._last is None:
            replies.step()
        replies.add(list(range(1, 60)), **OPTIONS)
        with monkeypatch.context() as patch:
            patch.setattr(TokenSequence, "run_stage", failing)
            while not any(isinstance(one, DeviceError) for _, one in replies.step()):
                pass
            assert scheduler._last is None
