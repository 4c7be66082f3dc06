"""Replies of one model at once: prompts, prices and helpers that several test files use."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from balcony_runtime.llm import LLM
from balcony_runtime.reply import Reply
from tests.support.prices import SMALL

PROMPTS = [[1, 2, 3], [4, 5], [200, 7, 30, 8, 9], [11], [50, 60, 70, 80], [9, 9, 9], [300, 2], [17, 18, 19]]
#: Prices of the tiny model's exits: 5, 7 and 10 ms. Four at the shallowest take 6.1 ms.
PRICES = dataclasses.replace(SMALL, exits=(2, 3, 5))


def ids(reply: Reply) -> list[int]:
    return [token.id for token in reply.tokens]


def free_members(llm: LLM) -> int:
    """Members of the pool that no reply uses."""
    pool = llm._requests.scheduler.sequences._pool
    assert pool is not None
    return len(pool.members) - pool.in_use


def all_at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls in a thread each; the threads begin together."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait(30)
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(120) for future in [threads.submit(run, call) for call in calls]]


def sizes_of_rounds(llm: LLM) -> list[int]:
    """Number of streams of each round from now on."""
    rounds: list[int] = []
    scheduler = llm._requests.scheduler
    run = scheduler._round

    def counted(asking: Any, begin_ns: int) -> None:
        rounds.append(len(asking))
        run(asking, begin_ns)

    scheduler._round = counted
    return rounds
