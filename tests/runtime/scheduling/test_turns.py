"""Turns of several replies: one that waits for its pace or its place, a prompt or a trace holds up none of the others."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.control.company.round_trace import RoundTraceWriter, read_rounds, replay_rounds
from balcony_edge.device.readings import Reading
from balcony_edge.errors import InfeasibleError, InputError
from balcony_runtime.decoding.loop import Decoder
from balcony_runtime.decoding.policy import PLAN_TOKENS, PROBE_TOKENS, Probing
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.scheduling.pool import SequencePool
from balcony_runtime.scheduling.stream import Stream
from balcony_runtime.text.codec import TextCodec
from tests.support.replies import PRICES, all_at_once, free_members, ids

SLOW = Budget(max_pace_tps=1 / 60)
ENDLESS: dict[str, Any] = {"max_new_tokens": 200, "ignore_eos": True}


def test_a_reply_that_waits_for_its_pace_holds_up_nobody(llm: LLM) -> None:
    """Its reader asks while the other reader is at its token, so it is the only one that asks."""
    paced, quick = llm.stream([1, 2], budget=SLOW, **ENDLESS), llm.stream([3], **ENDLESS)
    waiting = threading.Thread(target=list, args=(paced,))
    times_s: list[float] = []
    try:
        for _ in quick:
            times_s.append(time.monotonic())
            if len(times_s) == 1:
                waiting.start()
            elif times_s[-1] - times_s[-2] > 20:
                break
            time.sleep(0.003)
    finally:
        paced.cancel()
        waiting.join(60)
    gaps = [after - before for before, after in itertools.pairwise(times_s)]
    assert len(times_s) == 200 and max(gaps) < 20, "the pace is a token a minute"
    assert 1 <= len(paced.reply.tokens) <= 20


def test_a_newcomer_does_not_wait_until_somebody_is_due(llm: LLM) -> None:
    other = iter(llm.stream([7], **ENDLESS))
    next(other)  # in progress, so that neither of the paced ones is alone
    paced = [llm.stream([1, number], budget=SLOW, **ENDLESS) for number in range(2)]
    threads = [threading.Thread(target=list, args=(one,)) for one in paced]
    try:
        for thread in threads:
            thread.start()
        while not all(one.reply.tokens for one in paced):
            time.sleep(0.002)
        time.sleep(0.05)  # both have asked for their second tokens, which are due in a minute
        reply = llm.generate([5], max_new_tokens=1, ignore_eos=True)
        assert reply.ttft_ms is not None and reply.ttft_ms < 20_000
        assert max(len(one.reply.tokens) for one in paced) <= 2
    finally:
        for one in paced:
            one.cancel()
        for thread in threads:
            thread.join(60)
        other.close()


def test_who_waits_to_be_admitted_does_not_keep_the_leader_busy(llm: LLM) -> None:
    """While everybody else waits for a pace, the leader sleeps between two looks."""
    llm.budget = Budget(kv_memory_mb=1.0)
    rows = llm._requests.scheduler.sequences.most_rows(1)
    assert rows is not None
    other = iter(llm.stream([7], budget=SLOW, max_new_tokens=rows // 2, ignore_eos=True))
    paced = llm.stream([1], budget=SLOW, max_new_tokens=rows // 3, ignore_eos=True)
    large = llm.stream([2], max_new_tokens=rows // 2, ignore_eos=True)
    next(other)
    threads = [threading.Thread(target=list, args=(one,)) for one in (paced, large)]
    leads: list[float] = []
    lead = llm._requests.scheduler._lead
    try:
        for thread in threads:
            thread.start()
        while not paced.reply.tokens:
            time.sleep(0.002)
        llm._requests.scheduler._lead = lambda: (leads.append(0.0), lead())[1]
        begin_s = time.monotonic()
        time.sleep(0.5)
        assert len(leads) < 120 * (time.monotonic() - begin_s), "every 20 ms"
        assert not large.reply.tokens
    finally:
        for one in (paced, large):
            one.cancel()
        for thread in threads:
            thread.join(60)
        other.close()


def test_a_long_prompt_with_a_target_makes_way_if_others_run(llm: LLM) -> None:
    llm.costs = PRICES
    scheduler = llm._requests.scheduler
    with llm.together() as replies:
        first = replies.add([1, 2], **ENDLESS)
        for _ in range(3):
            replies.step()
        replies.pause(first)
        prompt = replies.add(list(range(1, 180)), budget=Budget(ttft_ms=5000.0), max_new_tokens=2, ignore_eos=True)
        stream = next(one for one in scheduler._streams.values() if not one.decoder.made)
        assert scheduler._makes_way(stream, others=True) and not scheduler._makes_way(stream, others=False)
        while prompt in replies.open:
            replies.step()
        replies.resume(first)
        first.cancel()
        while replies.open:
            replies.step()
    assert len(prompt.reply.tokens) == 2


def test_tokens_whose_wait_is_interrupted_are_told_later(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    want = ids(llm.generate([1, 2, 3], **{**ENDLESS, "max_new_tokens": 8}))
    with llm.together() as replies:
        stream = replies.add([1, 2, 3], budget=Budget(max_pace_tps=50.0), **{**ENDLESS, "max_new_tokens": 8})
        for _ in range(3):
            replies.step()
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "_wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                replies.step()
        company = replies.add([9], max_new_tokens=4, ignore_eos=True)  # the next step is a round
        while replies.open:
            replies.step()
    assert ids(stream.reply) == want and len(company.reply.tokens) == 4


@pytest.mark.parametrize("count", [1, 2], ids=["alone", "in company"])
def test_a_token_that_was_made_before_an_interrupt_is_told_later(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The interrupt comes between the step and the answer of one of the streams."""
    options = {**ENDLESS, "max_new_tokens": 8}
    want = [ids(llm.generate([1, 2, 3 + number], **options)) for number in range(count)]
    with llm.together() as replies:
        streams = [replies.add([1, 2, 3 + number], **options) for number in range(count)]
        for _ in range(3):
            replies.step()
        answer, times = Stream.answer, itertools.count()

        def interrupted(self: Stream, steps: Any) -> None:
            if next(times) == 0:
                raise KeyboardInterrupt
            answer(self, steps)

        with monkeypatch.context() as patch:
            patch.setattr(Stream, "answer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                replies.step()
        while replies.open:
            replies.step()
    assert [ids(one.reply) for one in streams] == want


def test_a_trace_that_was_closed_ends_no_reply(llm: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm.costs = PRICES
    with RoundTraceWriter(tmp_path / "rounds.jsonl") as trace:
        llm.record_rounds(trace)
        llm.generate_batch([[1, 2], [3]], max_new_tokens=4)
    assert all(llm.generate_batch([[1, 2], [3]], max_new_tokens=4))
    assert [one.message.rpartition("rounds.jsonl")[2] for one in caplog.records] == [
        ": was closed: record to a new file"
    ]


def test_rounds_that_were_not_recorded_are_not_replayed(llm: LLM, tmp_path: Path) -> None:
    llm.costs = PRICES
    with RoundTraceWriter(tmp_path / "rounds.jsonl") as trace:
        for recorded in (trace, None, trace):
            llm.record_rounds(recorded)
            llm.generate_batch([[1, 2], [3]], budget=Budget(tpot_ms=1000.0), max_new_tokens=6)
    assert (tmp_path / "rounds.jsonl").read_text().count('{"rounds":') == 2
    found = read_rounds(tmp_path / "rounds.jsonl")
    assert found.parts == 2
    for recorded, decided in zip(found.rounds, replay_rounds(found), strict=True):
        assert recorded.exits == {move.key: move.decision.exit_layer for move in decided.moves}


def test_a_trace_that_cannot_be_written_ends_no_reply(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm.costs = PRICES
    with RoundTraceWriter(tmp_path / "rounds.jsonl") as trace:
        llm.record_rounds(trace)
        assert len(llm.generate_batch([[1, 2], [3]], max_new_tokens=4)) == 2
        monkeypatch.setattr(
            trace, "write", lambda *_: (_ for _ in ()).throw(InputError("rounds.jsonl: writing failed"))
        )
        replies = llm.generate_batch([[1, 2], [3]], max_new_tokens=4)
    assert len(replies) == 2 and all(replies)
    assert [one.message for one in caplog.records] == ["no rounds are recorded any more: rounds.jsonl: writing failed"]
    assert read_rounds(tmp_path / "rounds.jsonl").rounds


def test_prices_are_measured_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def slowly(engine: Any) -> Any:
        measured.append(1)
        time.sleep(0.2)
        return PRICES

    monkeypatch.setattr("balcony_runtime.llm.measure_prices", slowly)
    budgets = [Budget(tpot_ms=1000.0), Budget(deadline_s=100.0, expected_tokens=3)]
    all_at_once(*(lambda own=own: llm.generate([1, 2], budget=own, max_new_tokens=3) for own in budgets))
    assert len(measured) == 1


def test_tokens_in_company_say_what_ran_in_their_gaps(llm: LLM) -> None:
    with llm.together() as replies:
        streams = [replies.add([1, 2, number], budget=Budget(exit_layer=2), **ENDLESS) for number in (3, 4)]
        for _ in range(6):
            replies.step()
        for stream in streams:
            stream.budget = Budget(exit_layer=5)
        while sum(len(stream.reply.tokens) for stream in streams) < 20:
            replies.step()
        for stream in streams:
            tokens = stream.reply.tokens
            switch = next(index for index, token in enumerate(tokens) if token.exit_layer == 5)
            assert switch >= 4 and tokens[switch].caught_up_rows >= 2 * switch, "the rows of two deeper stages"
            assert all(token.caught_up_rows == 0 for token in (*tokens[:switch], *tokens[switch + 1 :]))
            stream.cancel()
        while replies.open:
            replies.step()


@pytest.mark.parametrize("together", [False, True])
def test_a_reply_that_heat_ends_has_not_held_its_limit(tiny: Any, together: bool) -> None:
    asked = 0

    def heating() -> tuple[Reading, ...]:
        return (Reading("board", "board", time.monotonic(), celsius=50.0 if asked < 3 else 80.0),)

    with balcony_edge.load(tiny.path) as plain, LLM(plain.engine, plain.codec, Budget(), readings=heating) as llm:
        llm.costs = PRICES
        limit = Budget(critical_temperature_c=75, max_pace_tps=20)
        with llm.together() as replies:
            stream = llm.stream([1, 2], max_new_tokens=50, ignore_eos=True, budget=limit)
            if together:
                stream = replies.add([1, 2], max_new_tokens=50, ignore_eos=True, budget=limit)
            found: Any = None
            while not isinstance(found, InfeasibleError):
                try:
                    found = next(iter(replies.step()), (None, None))[1] if together else next(stream)
                except InfeasibleError as error:
                    found = error
                asked += 1
        (verdict,) = [one for one in stream.reply.verdicts if one.key == "critical_temperature_c"]
        assert verdict.held is False and verdict.reached == 80.0


def test_a_token_of_a_paused_reply_that_another_rounds_leader_brought(llm: LLM) -> None:
    """The round of a third reply answers it as well; its token is told, whether it stays paused or goes on."""
    alone = [token.id for token in llm.generate([5, 9, 17], max_new_tokens=8, ignore_eos=True).tokens]
    for resumes in (True, False):
        with llm.together() as replies:
            paused = replies.add([5, 9, 17], max_new_tokens=8, ignore_eos=True)
            replies.step()
            replies.pause(paused)
            llm.generate([30, 31], max_new_tokens=1)  # leads the round that brings the token that was on the way
            if resumes:
                replies.resume(paused)
            else:
                assert len(replies.step()) == 1
                replies.resume(paused)
            while replies.open:
                replies.step()
            assert [token.id for token in paused.reply.tokens] == alone


def test_a_newcomer_does_not_wait_for_the_long_gap_of_a_reply_that_is_alone(llm: LLM) -> None:
    paced = llm.stream([1, 2], budget=SLOW, **ENDLESS)
    next(paced)
    waiting = threading.Thread(target=list, args=(paced,))
    waiting.start()
    time.sleep(0.1)  # it waits for its pace, a minute
    begin_s = time.monotonic()
    try:
        assert len(ids(llm.generate([3], max_new_tokens=3, ignore_eos=True))) == 3
        assert time.monotonic() - begin_s < 20
    finally:
        paced.cancel()
        waiting.join(60)


def test_a_target_that_cannot_be_kept_keeps_nobody_out(llm: LLM) -> None:
    """Its deadline has passed, or no exit is as fast: to wait for its end would help nobody."""
    llm.costs = PRICES
    for budget in (Budget(deadline_s=0.05, expected_tokens=100), Budget(tpot_ms=0.01)):
        stream = llm.stream([1, 2], budget=budget, **ENDLESS)
        next(stream)
        time.sleep(0.1)
        refusing = Budget(tpot_ms=1000.0, on_infeasible="error")
        for own in (None, refusing):
            assert len(ids(llm.generate([3], budget=own, max_new_tokens=2, ignore_eos=True))) == 2
        stream.close()


def test_all_stages_of_a_long_prompt_make_way(llm: LLM) -> None:
    """Also those after the first one, whose rows are the last to go."""
    for budget, first, left in ((Budget(), 1, 40), (Budget(exit_layer=2), 101, 1)):
        request = llm._requests.of(list(range(first, first + 40)), budget=budget)
        with llm._requests.sequence(request.ids, request.rows) as sequence:
            decoder = llm._requests.decoder(request, sequence, request.begun_s())
            assert decoder.rows_due == 40
            sequence.run_stage(0, 39)  # exit 2 needs no other stage, and the full depth two more
            assert decoder.rows_due == left


def test_replies_that_nobody_holds_leave_the_company(llm: LLM) -> None:
    """A ``Together`` that was dropped without close(): its sequence goes to another reply, and it takes no more steps."""
    prompt = list(range(1, 41))
    alone = ids(llm.generate(prompt, max_new_tokens=6, ignore_eos=True))
    replies = llm.together()
    replies.add(prompt, **ENDLESS)
    while not replies.step():
        pass
    del replies  # at once, and not when the collector comes by in some thread
    scheduler = llm._requests.scheduler
    assert not scheduler._streams and free_members(llm) == len(scheduler.sequences._pool.members)
    assert ids(llm.generate(prompt, max_new_tokens=6, ignore_eos=True)) == alone


def test_the_slow_loop_goes_on_while_replies_without_ceilings_step_alone(tiny: Any) -> None:
    """A device that becomes hot: its share falls at every tick, whoever steps in between."""
    engine, codec, seen = Engine.open(tiny.path), TextCodec(Bundle.open(tiny.path)), list[Any]()
    with LLM(
        engine, codec, Budget(), readings=lambda: (Reading("a", "cpu", time.monotonic(), celsius=95 if seen else 20),)
    ) as llm:
        llm.costs = PRICES
        cool = llm.stream([3], **ENDLESS)
        next(cool)
        limited = llm.stream([1, 2], budget=Budget(temperature_c=70.0, pacing=False), **ENDLESS)
        next(limited)
        for _ in range(12):
            next(cool)
            next(limited)
            seen.append(llm._learned.state.governor)
            time.sleep(0.02)
        assert all(a.ticked_s <= b.ticked_s for a, b in itertools.pairwise(seen)) and seen[0].share > seen[-1].share
        before = llm._learned.state.governor
        next(cool)
        assert llm._learned.state.governor == before
        llm.costs = dataclasses.replace(PRICES, overhead_ms=0.2)  # another controller, and the same device
        assert llm._requests.scheduler._joint() and llm._requests.scheduler._state.governor == before
        for stream in (cool, limited):
            stream.close()


def test_a_reply_may_be_closed_after_its_engine(llm: LLM) -> None:
    stream = llm.stream([1, 2], sampling=SamplingParams(json_schema={"enum": ["aaaaaaaa"]}), max_new_tokens=20)
    next(stream)  # the others are made, and not told
    llm.close()
    stream.close()


def test_an_interrupt_while_a_reply_leaves_takes_it_out(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = llm._requests.scheduler
    stream = llm.stream([1, 2], **ENDLESS)
    next(stream)
    (own,) = scheduler._streams.values()
    scheduler._running = (own,)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scheduler._turn, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.close()
    scheduler._running = ()
    assert not scheduler._streams


def test_a_reading_that_fails_ends_only_who_needs_it(tiny: Any) -> None:
    fails = False

    def readings() -> tuple[Reading, ...]:
        if fails:
            raise RuntimeError("the sensor is gone")
        return (Reading("board", "board", time.monotonic(), celsius=50.0),)

    with LLM(Engine.open(tiny.path), TextCodec(Bundle.open(tiny.path)), Budget(), readings=readings) as llm:
        llm.costs = PRICES
        with llm.together() as replies:
            hot = replies.add([1, 2], budget=Budget(temperature_c=70.0), **ENDLESS)
            other = replies.add([3], max_new_tokens=12, ignore_eos=True)
            replies.step()
            fails = True
            found: list[Any] = []
            while other in replies.open:
                found += replies.step()
            assert [type(one) for stream, one in found if stream is hot][-1] is RuntimeError
            assert len(other.reply.tokens) == 12 and other.reply.finish_reason == "length"


def test_a_reply_that_the_collector_ends_in_its_own_round_stops_nobody(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object that was dropped in a reference cycle, while it still asked: the collector may come by in any thread."""
    alone = ids(llm.generate([3, 4], max_new_tokens=8, ignore_eos=True))
    dropped, closed = llm.together(), threading.Event()
    with llm.together() as replies:
        other = dropped.add([1, 2], **ENDLESS)
        stream = replies.add([3, 4], max_new_tokens=8, ignore_eos=True)
        while not (other.reply.tokens and stream.reply.tokens):
            replies.step()
            dropped.step()  # and asks again
        step, pool = SequencePool.step, llm.pool
        assert pool is not None

        def collected(self: SequencePool, moves: Any) -> Any:
            found = step(self, moves)
            if len(moves) == 2:
                dropped.close()  # as its finalizer would
                closed.set()
            return found

        def go_on() -> None:
            while not closed.is_set() and replies.open:
                replies.step()

        with monkeypatch.context() as patch:
            patch.setattr(SequencePool, "step", collected)
            thread = threading.Thread(target=go_on, daemon=True)
            thread.start()
            thread.join(20)
            assert not thread.is_alive() and closed.is_set()
        while replies.open:
            replies.step()
        assert ids(stream.reply) == alone
    assert free_members(llm) == len(pool.members) and not llm._requests.scheduler._streams


def test_a_plan_that_was_not_worth_it_is_not_made_for_every_token() -> None:
    probing, plans = Probing(), []
    for token in range(2000):
        probing.tokens = token
        if probing.is_due():
            plans.append(token)
            assert not probing.is_worth(None)
    assert plans == list(range(0, 2000, PLAN_TOKENS))
    probing.tokens = PROBE_TOKENS
    assert probing.is_worth(0.5), "after so long it is tried"


def test_a_pause_ends_with_those_who_asked_for_it(llm: LLM) -> None:
    """The others have no ceiling, or one that leaves a token a second."""
    scheduler = llm._requests.scheduler
    with llm.together() as replies:
        two = [replies.add([key], **ENDLESS) for key in (1, 2)]
        while not all(one.reply.tokens for one in two):
            replies.step()
        scheduler._done_s, scheduler._wait_s = time.monotonic(), 60.0  # as after a round with somebody who has gone
        before = [len(one.reply.tokens) for one in two]
        replies.step()
        assert [len(one.reply.tokens) for one in two] != before


def test_a_token_in_company_counts_the_time_in_which_all_tokens_are_picked(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick = Sampler.pick
    monkeypatch.setattr(Sampler, "pick", lambda sampler, logits: (time.sleep(0.02), pick(sampler, logits))[1])
    with llm.together() as replies:
        streams = [replies.add([key], max_new_tokens=4, ignore_eos=True) for key in (1, 2, 3)]
        while replies.open:
            replies.step()
    # One token of each comes from a round of all three.
    assert min(max(token.latency_ms for token in one.reply.tokens[1:]) for one in streams) >= 60
