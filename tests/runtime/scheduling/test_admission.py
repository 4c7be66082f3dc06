"""Which replies begin, which wait and which are refused: time, memory, places in the pool, and what is left at the end."""

from __future__ import annotations

import asyncio
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.control.company.round_trace import RoundTraceWriter, read_rounds, replay_rounds
from balcony_edge.control.company.waiting import MOST_OVERTAKEN
from balcony_edge.errors import BusyError, InputError
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.reply import TokenStream
from balcony_runtime.scheduling import admission
from balcony_runtime.scheduling import scheduler as scheduler_module
from balcony_runtime.scheduling.admission import Looks, row_bytes
from balcony_runtime.scheduling.sequences import MEMBERS
from balcony_runtime.text.codec import TextCodec
from tests.support.replies import PRICES, PROMPTS, all_at_once, free_members, ids


def room_for(llm: LLM, rows: int) -> None:
    """Bound the memory of all replies."""
    llm.budget = Budget(kv_memory_mb=rows * row_bytes(llm.engine.manifest) / 1e6)


def waiting(llm: LLM) -> bool:
    """Whether a stream has asked and is not admitted."""
    return any(one.asks and not one.admitted for one in list(llm._requests.scheduler._streams.values()))


def test_one_stream_more_than_there_is_time_for(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at 8 ms can be held at the shallowest exits, and a fourth cannot, as far as the prices say at the start."""
    llm.costs = PRICES
    target = Budget(tpot_ms=8.0)
    with llm.together() as replies:
        three = [replies.add([key], budget=target, max_new_tokens=3, ignore_eos=True) for key in (1, 2, 3)]
        refused = replies.add([4], budget=Budget(tpot_ms=8.0, on_infeasible="error"), max_new_tokens=3, ignore_eos=True)
        waits = replies.add([5], budget=target, max_new_tokens=3, ignore_eos=True)
        first = replies.step()
        errors = [one for stream, one in first if stream is refused]
        assert [type(one) for one in errors] == [BusyError]
        assert (
            "a round of 4 streams takes 6.12 ms at their shallowest exits, and another one asked for tpot_ms = 8: "
            "wait until it ends" in str(errors[0])
        )
        assert not waits.reply.tokens
        while replies.open:
            replies.step()
        assert [len(stream.reply.tokens) for stream in (*three, waits)] == [3] * 4
        monkeypatch.setattr(scheduler_module, "MOST_WAITING", 2)
        replies.add([1], max_new_tokens=1)
        replies.add([2], max_new_tokens=1)
        with pytest.raises(BusyError, match="2 replies wait for others to end: try again later"):
            replies.add([3], max_new_tokens=1)
    assert free_members(llm) == MEMBERS


def test_a_stream_that_waits_for_others_ends_as_soon_as_it_is_cancelled(llm: LLM) -> None:
    room_for(llm, 60)
    with llm.stream([1], max_new_tokens=55, ignore_eos=True) as first, ThreadPoolExecutor(1) as threads:
        next(first)
        waits = llm.stream([2], max_new_tokens=55, ignore_eos=True)
        consumed = threads.submit(lambda: list(waits))
        while not waiting(llm):
            time.sleep(0.001)
        waits.cancel()
        assert consumed.result(30) == [] and waits.reply.finish_reason == "cancelled"

        async def gives_up() -> None:
            task = asyncio.create_task(anext(aiter(llm.stream([3], max_new_tokens=55))))
            while not waiting(llm):
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(asyncio.wait_for(gives_up(), 30))
        assert len(llm._requests.scheduler._streams) == 1


def test_who_waits_for_a_stream_that_was_left_is_told(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after `break` in a notebook, whose variable keeps the stream: the next cell would wait for ever, and say nothing."""
    monkeypatch.setattr(admission, "LEFT_S", 0.05)
    room_for(llm, 60)
    left, told = llm.stream([1], max_new_tokens=55, ignore_eos=True), []
    next(left)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(llm.generate, [2], max_new_tokens=55, ignore_eos=True)
        for _ in range(2000):
            told = [one.message for one in caplog.records]
            if told:
                break
            time.sleep(0.005)
        left.close()
        assert len(answer.result(30).tokens) == 55
    assert told == [
        "a reply waits for others: for 0.05 s nobody has asked for a token of the 1 in progress: read those streams on, or "
        "close them"
    ]


def test_each_reply_that_waits_for_a_stream_that_was_left_is_told_in_its_own_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C ends the cell that was told, and it runs again. Another one goes before it was told, an hour before the next."""
    now_s, looks = 0.0, Looks()
    left: Any = SimpleNamespace(key=0, asks=False, admitted=True, waits=False)
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: now_s))

    def told(key: int, seconds: int) -> int:
        nonlocal now_s
        one: Any = SimpleNamespace(key=key, asks=True, admitted=False, waits=True)
        caplog.clear()
        for _ in range(seconds):
            looks.due([left, one])
            now_s += 1.0
        return len(caplog.records)

    assert [told(1, 20), told(2, 20), told(3, 2)] == [1, 1, 0]
    now_s += 3600.0
    assert told(4, 2) == 0


def test_more_asynchronous_streams_than_threads_of_the_loop(llm: LLM) -> None:
    """There is room for one at a time; those that wait take no thread that it needs."""
    room_for(llm, 30)

    async def one(key: int) -> int:
        return len([token async for token in llm.stream([key], max_new_tokens=29, ignore_eos=True)])

    async def several() -> list[int]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        return await asyncio.wait_for(asyncio.gather(*(one(key) for key in range(1, 6))), 60)

    assert asyncio.run(several()) == [29] * 5


def test_streams_that_come_and_go_leave_nothing_behind(llm: LLM) -> None:
    """300 replies of six threads: whole ones, cancelled ones, abandoned ones and refused ones."""
    random = np.random.default_rng(3)
    plans = [
        [(int(kind), int(n)) for kind, n in zip(*random.integers((0, 1), (4, 9), (50, 2)).T, strict=True)]
        for _ in range(6)
    ]

    def work(plan: list[tuple[int, int]]) -> int:
        tokens = 0
        for kind, count in plan:
            stream = llm.stream(
                random.integers(0, 320, count).tolist(),
                max_new_tokens=count,
                ignore_eos=True,
                budget=Budget(exit_layer=2 + kind % 2),
            )
            if kind == 0:
                tokens += len(list(stream))
            elif kind == 1:
                next(stream)
                stream.cancel()
                tokens += 1 + len(list(stream))
            elif kind == 2:
                next(stream)
                del stream
                tokens += 1
            else:
                stream.close()
        return tokens

    assert sum(all_at_once(*(lambda plan=plan: work(plan) for plan in plans))) > 400
    gc.collect()
    scheduler = llm._requests.scheduler
    assert free_members(llm) == MEMBERS and not scheduler._streams and not scheduler._state.streams.keys()


def test_memory_for_keys_and_values_is_bounded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 60 rows: two replies of 30 at a time, and never one of 61."""
    scheduler = llm._requests.scheduler
    # 5 layers and 2 balconies of 2 × 2 heads × 16, and 4 boundaries of 32, in float32
    assert row_bytes(llm.engine.manifest) == 4 * (7 * 2 * 2 * 16 + 4 * 32)
    room_for(llm, 60)
    with llm.together() as replies:
        streams = [replies.add([key], max_new_tokens=29, ignore_eos=True) for key in (1, 2, 3)]
        for _ in range(10):
            replies.step()
        assert [len(stream.reply.tokens) > 0 for stream in streams] == [True, True, False]
        # while the readers of the others are slow, a step ends without a token, after a nap
        for stream in streams[:2]:
            replies.pause(stream)
        replies.step()
        naps: list[float | None] = []
        nap = scheduler._turn.wait
        monkeypatch.setattr(scheduler._turn, "wait", lambda seconds=None: (naps.append(seconds), nap(seconds)))
        assert replies.step() == [] and scheduler_module.NAP_S in naps and not streams[2].reply.tokens
        streams[0].close()
        replies.step()
        replies.step()
        assert streams[2].reply.tokens
        replies.resume(streams[1])
        while replies.open:
            replies.step()
        assert [len(stream.reply.tokens) for stream in streams[1:]] == [29] * 2
        with pytest.raises(InputError, match="kv_memory_mb: 61 tokens do not fit, which has room for 60"):
            replies.add([1], max_new_tokens=60)
        # one that shall not wait is refused, and one for which there is no room any more ends
        replies.add([1], max_new_tokens=29, ignore_eos=True)
        replies.step()
        strict = Budget(on_infeasible="error")
        refused = replies.add([2], max_new_tokens=39, budget=strict)
        assert [(stream, str(one)) for stream, one in replies.step() if isinstance(one, BusyError)] == [
            (refused, "kv_memory_mb: the replies in progress leave room for 30 tokens, not for 40: wait")
        ]
        late = replies.add([2], max_new_tokens=39)
        room_for(llm, 35)
        assert [stream for stream, one in replies.step() if isinstance(one, InputError)] == [late]


def test_memory_is_bounded_on_an_engine_that_shares_no_passes(tiny: Any) -> None:
    """Also for a conversation, whose sequence is its own."""
    with Engine.of(Bundle.open(tiny.path).portable()) as engine:
        llm = LLM(engine, TextCodec(Bundle.open(tiny.path)), Budget())
        room_for(llm, 50)
        assert llm.pool is None
        with pytest.raises(InputError, match="kv_memory_mb: 51 tokens do not fit, which has room for 50"):
            llm.generate([1], max_new_tokens=50)
        with llm.together() as replies:
            first, second = (replies.add([key], max_new_tokens=29, ignore_eos=True) for key in (1, 2))
            while first in replies.open:
                assert not second.reply.tokens
                replies.step()
            while replies.open:
                replies.step()
            assert len(second.reply.tokens) == 29


def test_who_waits_is_not_judged_in_every_round(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "LOOK_S", 600.0)
    room_for(llm, 60)
    scheduler, looks = llm._requests.scheduler, []  # type: Any, list[int]
    refusal = scheduler._refusal
    scheduler._refusal = lambda stream: (looks.append(stream.key), refusal(stream))[1]
    with llm.together() as replies:
        for key in (1, 2, 3):
            replies.add([key], max_new_tokens=29, ignore_eos=True)
        last = max(scheduler._streams)
        for _ in range(10):
            replies.step()
        assert looks.count(last) == 1
        while replies.open:
            replies.step()
        assert looks.count(last) == 2, "once more when the others have ended"


def test_nobody_is_overtaken_without_end(llm: LLM) -> None:
    """The heavier begins first; a reply that needs all memory is next after four that came later."""
    room_for(llm, 60)
    order: list[TokenStream] = []
    with llm.together() as replies:
        options: dict[str, Any] = {"ignore_eos": True, "max_new_tokens": 29}
        small = [replies.add([key], **options) for key in (1, 2)]
        replies.step()
        big = replies.add([3], max_new_tokens=59, ignore_eos=True)
        light, heavy = replies.add([4], **options), replies.add([5], budget=Budget(weight=2.0), **options)
        while big not in order:
            for stream, _ in replies.step():
                if stream not in order:
                    order.append(stream)
            if len(replies.open) < 6 and len(order) < 12:
                replies.add([6], budget=Budget(weight=2.0), **options)
    assert order[:3] == [*small, heavy] and light not in order and len(order) == 3 + MOST_OVERTAKEN


def test_rounds_without_a_target_are_recorded(llm: LLM, tmp_path: Path) -> None:
    """As in the example of record_rounds: no budget has needed prices before."""
    with RoundTraceWriter(tmp_path / "rounds.jsonl") as trace:
        llm.record_rounds(trace)
        llm.generate_batch(PROMPTS[:2], max_new_tokens=4)
        llm.record_rounds(None)
    recorded = read_rounds(tmp_path / "rounds.jsonl")
    again = [{move.key: move.decision.exit_layer for move in found.moves} for found in replay_rounds(recorded)]
    assert again == [one.exits for one in recorded.rounds]


def test_more_streams_than_members(llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Streams without a place in the pool have memory of their own: their tokens are the same, and their passes their own."""
    monkeypatch.setattr("balcony_runtime.scheduling.sequences.MEMBERS", 2)
    want = [ids(llm.generate(prompt, max_new_tokens=8, ignore_eos=True)) for prompt in PROMPTS[:5]]
    llm.costs = PRICES
    with RoundTraceWriter(tmp_path / "rounds.jsonl") as trace, llm.together() as replies:
        llm.record_rounds(trace)
        streams = [replies.add(prompt, max_new_tokens=8, ignore_eos=True) for prompt in PROMPTS[:5]]
        while replies.open:
            replies.step()
        assert [ids(stream.reply) for stream in streams] == want
        llm.record_rounds(None)
    recorded = read_rounds(tmp_path / "rounds.jsonl")
    at_once = [one for one in zip(recorded.rounds, replay_rounds(recorded), strict=True) if len(one[0].exits) == 5]
    assert [[stream.shares for stream in one.seen.streams] for one, _ in at_once] == [[True] * 2 + [False] * 3] * len(
        at_once
    )
    begun = [found.price_ms for one, found in at_once if all(stream.made_tokens for stream in one.seen.streams)]
    # a step at the full depth takes 10 ms, and two that share it 10.75 ms; contexts add a little
    assert begun and all(price_ms == pytest.approx(10.75 + 3 * 10, rel=0.01) for price_ms in begun)


@pytest.mark.parametrize("count", [1, 2])
def test_late_tokens_count_for_the_joint_decision(llm: LLM, count: int) -> None:
    """Alone and in rounds; the first token has no gap."""
    llm.costs = PRICES
    with llm.together() as replies:
        for key in range(count):
            replies.add([key, 2, 3], budget=Budget(tpot_ms=0.001), max_new_tokens=9, ignore_eos=True)
        streams = list(llm._requests.scheduler._streams.values())
        while not all(one.decoder.made and one.decoder.seen(0, 0.0).made_tokens >= 5 for one in streams):
            replies.step()
        for one in streams:
            seen = one.decoder.seen(0, 0.0)
            assert seen.late == seen.made_tokens - 1


def test_a_reply_that_waited_begins_with_what_others_have_learned_meanwhile(llm: LLM) -> None:
    llm.costs = PRICES
    room_for(llm, 60)
    with llm.together() as replies:
        first = replies.add([1], budget=Budget(tpot_ms=50.0), max_new_tokens=50, ignore_eos=True)
        waits = replies.add([2], budget=Budget(tpot_ms=50.0), max_new_tokens=50, ignore_eos=True)
        while not first.reply.tokens:
            replies.step()
        assert not waits.reply.tokens
        first.cancel()
        state = llm._learned.state
        llm._learned.state = state._replace(slowdown=state.slowdown._replace(mean=2.0, variance=1e-4))
        while not waits.reply.tokens:
            replies.step()
        decision = waits.reply.tokens[0].decision
        assert decision.predicted_ms > 5 * decision.price_ms > 0


def test_a_bound_beyond_all_memory_bounds_nothing_and_one_that_is_no_number_is_refused(llm: LLM) -> None:
    llm.budget = Budget(kv_memory_mb=1e303)
    assert len(llm.generate([1], max_new_tokens=2, ignore_eos=True).tokens) == 2
    given: Any
    for given in (None, "256", True, -1, float("nan"), 1e303, 10**400):
        with pytest.raises(InputError, match=r"^prefix_mb = .*: must be a number from 0 to 1e\+12: give megabytes"):
            admission.Bounds.of(lambda: None, given, None)
