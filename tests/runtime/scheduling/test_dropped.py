"""Replies that nobody holds any more: the collector ends them, in whichever thread it comes by."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from balcony_runtime.llm import LLM
from balcony_runtime.scheduling.pool import SequencePool
from tests.support.replies import free_members, ids


def test_the_collector_does_not_wait_for_the_round_of_another_thread(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread may hold what that round needs, such as the pool's lock; both would wait for ever."""
    alone = ids(llm.generate([3, 4], max_new_tokens=8, ignore_eos=True))
    scheduler, pool, dropped = llm._requests.scheduler, llm.pool, llm.together()
    stream = dropped.add([1, 2], max_new_tokens=200, ignore_eos=True)
    while not stream.reply.tokens:
        dropped.step()  # and asks again
    (sequence,) = [one.sequence for one in scheduler._streams.values()]
    step, inside, collected = SequencePool.step, threading.Event(), threading.Event()
    assert pool is not None

    def slow(self: SequencePool, moves: Any) -> Any:
        if sequence in [move.sequence for move in moves]:
            inside.set()
            assert collected.wait(60), "the collector waits for this round"
        return step(self, moves)

    monkeypatch.setattr(SequencePool, "step", slow)
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(llm.generate, [3, 4], max_new_tokens=8, ignore_eos=True)
        assert inside.wait(20)
        cycle: list[Any] = [dropped]
        cycle.append(cycle)
        del dropped, stream, cycle
        with pool._locked():  # as in a thread that takes a place for a prompt
            gc.collect()
            collected.set()
        assert ids(reply.result(60)) == alone
    assert free_members(llm) == len(pool.members) and not scheduler._streams
