"""How long a round is taken to have lasted: as our own load of the device, and against its price."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from balcony_runtime.llm import LLM
from tests.support.replies import PRICES, sizes_of_rounds


def test_rounds_are_busy_time_and_are_measured(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes on by 30 ms at each look: one as a round is led, one as its work begins, and one at its end."""
    clock = SimpleNamespace(
        perf_counter_ns=iter(range(0, 10**15, 30_000_000)).__next__, monotonic=time.monotonic, sleep=time.sleep
    )
    monkeypatch.setattr("balcony_runtime.scheduling.scheduler.time", clock)
    llm.costs = PRICES
    scheduler, rounds, busy_s = llm._requests.scheduler, sizes_of_rounds(llm), list[float]()
    seen = scheduler._seen
    monkeypatch.setattr(scheduler, "_seen", lambda asking: (found := seen(asking), busy_s.append(found[1].busy_s))[0])
    with llm.together() as replies:
        streams = [replies.add([1, 2, 3 + number], max_new_tokens=60, ignore_eos=True) for number in range(2)]
        while scheduler._last is None or min(len(one.reply.tokens) for one in streams) < 6:
            replies.step()
    assert set(rounds) == {2} and len(rounds) >= 6
    assert busy_s == pytest.approx([0.03 * number for number in range(len(rounds))])
    assert scheduler._last.measured_ms == pytest.approx(60.0)
