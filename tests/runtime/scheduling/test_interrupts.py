"""Interrupts between two calls of a round: the next round goes on from there, and nobody waits for this one."""

from __future__ import annotations

from typing import Any

import pytest

from balcony_runtime.llm import LLM
from tests.support.replies import ids

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
