"""Many replies at once: each writes what it writes alone, is held to its own budget, and ends or fails alone."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.control import controller
from balcony_edge.control.company import composition, joint
from balcony_edge.control.company.round_trace import RoundTraceWriter, read_rounds, replay_rounds
from balcony_edge.control.governor import Governor
from balcony_edge.errors import InfeasibleError, InputError
from balcony_runtime.decoding.loop import Decoder
from balcony_runtime.decoding.policy import Turn
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.decoding.speculate import Speculator
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Token, TokenStream
from balcony_runtime.scheduling.pool import LEAST_SHARED
from balcony_runtime.scheduling.scheduler import MOST_WAITING
from balcony_runtime.scheduling.sequences import MEMBERS
from balcony_runtime.scheduling.stream import Stream
from balcony_runtime.token_sequence import TokenSequence
from tests.support.command import invoke_here
from tests.support.replies import PRICES, PROMPTS, all_at_once, free_members, ids, sizes_of_rounds


def test_threads_write_what_they_write_alone(llm: LLM) -> None:
    budgets = [Budget(exit_layer=layer) for layer in (2, 3, 5, 2, 5, 3, 5, 5)]
    options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
    alone = [ids(llm.generate(one, budget=own, **options)) for one, own in zip(PROMPTS, budgets, strict=True)]
    rounds = sizes_of_rounds(llm)
    together = all_at_once(
        *(lambda i=i: llm.generate(PROMPTS[i], budget=budgets[i], **options) for i in range(len(PROMPTS)))
    )
    assert [ids(reply) for reply in together] == alone
    assert [set(reply.tokens_per_exit) for reply in together] == [{own.exit_layer} for own in budgets]
    assert max(rounds) >= 4, "streams of different threads share rounds"
    assert free_members(llm) == MEMBERS


@pytest.mark.parametrize("seed", range(4))
def test_a_companys_tokens_are_those_of_a_pass_from_scratch(llm: LLM, seed: int) -> None:
    """Random prompts, targets, arrivals, changes of budget and pauses: the exit of a token gives the same token by itself.

    Half the prompts begin alike, with rows enough that the later ones start from those of the earlier.
    """
    llm.costs = PRICES
    random = np.random.default_rng(seed)
    common = random.integers(0, 320, LEAST_SHARED + 8).tolist()
    budgets = [Budget(tpot_ms=float(ms)) for ms in (6.5, 9, 14, 30)] + [Budget(), Budget(ttft_ms=50)]
    fixed = [Budget(exit_layer=layer) for layer in (2, 3, 5)]  # of the first three, so that every exit writes
    made: dict[TokenStream, list[int]] = {}
    with llm.together() as replies:
        while len(made) < 10 or replies.open:
            if len(made) < 10 and (not replies.open or random.random() < 0.4):
                prompt = common * (len(made) % 2) + random.integers(0, 320, random.integers(1, 9)).tolist()
                budget = fixed[len(made)] if len(made) < len(fixed) else budgets[random.integers(len(budgets))]
                count = int(random.integers(4, 16))
                made[replies.add(prompt, budget=budget, max_new_tokens=count, ignore_eos=True)] = prompt
            if len(replies.open) > 1:
                one = replies.open[random.integers(len(replies.open))]
                (replies.pause, replies.resume)[random.integers(2)](one)
                if one.budget not in fixed:
                    one.budget = budgets[random.integers(len(budgets))]
            for stream in replies.open[:1]:
                replies.resume(stream)  # somebody goes on
            assert not any(isinstance(found, Exception) for _, found in replies.step())
    assert llm.pool is not None and llm.pool.reused.prompts, "some prompts began with rows of others"
    assert len({token.exit_layer for stream in made for token in stream.reply.tokens}) == 3
    for stream, prompt in made.items():
        for token in stream.reply.tokens:
            check_pick(llm, token, prompt)
            prompt.append(token.id)


def check_pick(llm: LLM, token: Token, before: list[int]) -> None:
    """A token is the likeliest of its exit after a pass from scratch, up to what float32 promises."""
    logits = llm.engine.new_sequence().advance(token.exit_layer, before)[0, -1]
    assert logits.max() - logits[token.id] <= 2e-4 * np.abs(logits).max()


def test_sampling_penalties_and_policies_are_those_of_a_stream_alone(llm: LLM) -> None:
    """Each stream keeps its own random numbers, penalties and stop strings; policies make full-depth tokens one by one."""
    samplings = [SamplingParams(temperature=1.0, seed=seed, repetition_penalty=1.2) for seed in range(3)]
    options: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True, "logprobs": 2}
    alone = [llm.generate(PROMPTS[i], sampling=one, **options) for i, one in enumerate(samplings)]
    plain = ids(llm.generate(PROMPTS[3], max_new_tokens=20, ignore_eos=True))
    lossless = Budget(policy="lossless")
    *sampled, drafted = all_at_once(
        *(lambda i=i, one=one: llm.generate(PROMPTS[i], sampling=one, **options) for i, one in enumerate(samplings)),
        lambda: llm.generate(PROMPTS[3], budget=lossless, max_new_tokens=20, ignore_eos=True),
    )
    assert [ids(reply) for reply in sampled] == [ids(reply) for reply in alone]
    for got, want in zip(sampled, alone, strict=True):
        for a, b in zip(got.tokens, want.tokens, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4) and len(a.top_logprobs) == 2
    assert ids(drafted) == plain


def test_a_streams_budget_changes_between_its_tokens(llm: LLM) -> None:
    with llm.together() as replies:
        first = replies.add([1, 2, 3], max_new_tokens=9, ignore_eos=True)
        second = replies.add([4, 5], max_new_tokens=9, ignore_eos=True)
        for count in range(9):
            if count == 3:
                first.budget = Budget(exit_layer=2)
            if count == 6:
                first.budget = None
                llm.budget = Budget(exit_layer=3)
            replies.step()
        assert first.budget == second.budget == Budget(exit_layer=3)
        assert [token.exit_layer for token in first.reply.tokens] == [5, 5, 5, 2, 2, 2, 3, 3, 3]
        # a round runs one prompt, so the second stream is a token behind
        assert [token.exit_layer for token in second.reply.tokens] == [5] * 5 + [3] * 3
    with pytest.raises(balcony_edge.BudgetError, match="tpot_ms = -1"):
        first.budget = Budget(tpot_ms=-1)
    stream = llm.stream([1], budget=Budget(exit_layer=2), max_new_tokens=2)
    assert next(stream).exit_layer == 2


def test_each_reply_has_verdicts_on_its_own_budget(llm: LLM) -> None:
    llm.costs = PRICES
    replies = all_at_once(
        lambda: llm.generate([1, 2], budget=Budget(tpot_ms=50_000.0), max_new_tokens=8, ignore_eos=True),
        lambda: llm.generate([3], budget=Budget(ttft_ms=90_000.0), max_new_tokens=8, ignore_eos=True),
        lambda: llm.generate([3], max_new_tokens=8, ignore_eos=True),
    )
    assert [[verdict.key for verdict in reply.verdicts] for reply in replies] == [["tpot_ms"], ["ttft_ms"], []]
    assert all(verdict.held for reply in replies for verdict in reply.verdicts)
    assert [token.target_ms for token in replies[0].tokens] == [None] + [50_000.0] * (len(replies[0].tokens) - 1)


def test_a_cancelled_stream_leaves_the_others_alone(llm: LLM) -> None:
    want = ids(llm.generate([4, 5], max_new_tokens=30, ignore_eos=True))
    cancelled = llm.stream([1, 2, 3], max_new_tokens=200, ignore_eos=True, budget=Budget(max_pace_tps=200))
    begun = threading.Event()

    def consume() -> int:
        for count, _ in enumerate(cancelled):
            if count == 5:
                begun.set()
        return len(cancelled.reply.tokens)

    def other() -> list[int]:
        found = []
        for token in llm.stream([4, 5], max_new_tokens=30, ignore_eos=True):
            found.append(token.id)
            if len(found) == 10:
                begun.wait(30)
                cancelled.cancel()
        return found

    made, found = all_at_once(consume, other)
    assert found == want and 5 < made < 200 and cancelled.reply.finish_reason == "cancelled"
    abandoned = llm.stream([7], max_new_tokens=50)
    next(abandoned)
    del abandoned
    gc.collect()
    assert free_members(llm) == MEMBERS and not llm._requests.scheduler._streams


def test_a_reader_that_does_not_ask_holds_nobody_up(llm: LLM) -> None:
    slow = llm.stream([1, 2, 3], max_new_tokens=12, ignore_eos=True)
    next(slow)
    want = ids(llm.generate([4, 5], max_new_tokens=20, ignore_eos=True))
    assert len(want) == 20
    alone = llm.generate([1, 2, 3], max_new_tokens=12, ignore_eos=True)
    assert [*ids(slow.reply), *(token.id for token in slow)] == ids(alone)


def test_a_failure_is_one_streams_own(llm: LLM) -> None:
    llm.costs = PRICES
    with llm.together() as replies:
        good = replies.add([1, 2], max_new_tokens=6, ignore_eos=True)
        strict = replies.add([3], budget=Budget(tpot_ms=0.001, on_infeasible="error"), max_new_tokens=6)
        found: dict[Any, list[Token | Exception]] = {good: [], strict: []}
        while replies.open:
            for stream, one in replies.step():
                found[stream].append(one)
        assert [type(one) for one in found[strict]][-1] is InfeasibleError
        assert "tpot_ms = 0.001" in str(found[strict][-1])
        assert [one.id for one in found[good] if isinstance(one, Token)] == ids(
            llm.generate([1, 2], max_new_tokens=6, ignore_eos=True)
        )
        with pytest.raises(InputError, match="no messages were given"):
            replies.add([])
    with pytest.raises(InfeasibleError, match=r"tpot_ms = 0\.001"):
        llm.generate_batch([[1], [2]], max_new_tokens=4, budget=[None, strict.budget])


def test_a_bug_ends_the_stream_that_it_hits_and_no_other(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sampler and in a prompt, of streams that one thread drives and of streams with a thread each."""
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    want = [ids(llm.generate(prompt, **options)) for prompt in PROMPTS[:2]]
    pick, advance = Sampler.pick, TokenSequence.advance
    hit, count = SamplingParams(temperature=0.5, seed=1), itertools.count()

    def picked(self: Sampler, logits: Any) -> Any:
        return 1 / 0 if not self.greedy and next(count) % 5 == 4 else pick(self, logits)

    def advanced(self: TokenSequence, exit_layer: int, tokens: Any, *rest: Any) -> Any:
        return 1 / 0 if 66 in [*self.tokens[0], *np.ravel(tokens)] else advance(self, exit_layer, tokens, *rest)

    monkeypatch.setattr(Sampler, "pick", picked)
    monkeypatch.setattr(TokenSequence, "advance", advanced)
    with llm.together() as replies:
        good = [replies.add(prompt, **options) for prompt in PROMPTS[:2]]
        bad = [replies.add([1], sampling=hit, **options), replies.add([66, 66, 1], **options)]
        errors = {}
        while replies.open:
            errors |= {stream: type(one) for stream, one in replies.step() if isinstance(one, Exception)}
    assert [ids(stream.reply) for stream in good] == want and errors == dict.fromkeys(bad, ZeroDivisionError)

    def outcome(prompt: list[int], sampling: SamplingParams | None = None) -> Any:
        try:
            return ids(llm.generate(prompt, sampling=sampling, **options))
        except ZeroDivisionError:
            return None

    calls = [lambda i=i: outcome(PROMPTS[i]) for i in range(2)]
    found = all_at_once(*calls, lambda: outcome([1], hit), lambda: outcome([66, 66, 1]))
    assert found == [*want, None, None]


def test_an_interrupted_round_takes_nothing_from_the_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside a shared pass: the tokens that it appended go, and the streams continue as if nothing had been."""
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    alone = [ids(llm.generate(prompt, **options)) for prompt in PROMPTS[:3]]
    with llm.together() as replies:
        streams = [replies.add(prompt, **options) for prompt in PROMPTS[:3]]
        for _ in range(4):
            replies.step()
        pool = llm._requests.scheduler.sequences._pool
        assert pool is not None
        for where in ("decode", "run_stage", "run_exit", "keep", "logits"):
            with monkeypatch.context() as patch:
                patch.setattr(pool._pool, where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                budgets = [None if where == "decode" else Budget(exit_layer=2), None, None]
                for stream, own in zip(streams, budgets, strict=True):
                    stream.budget = own
                with pytest.raises(KeyboardInterrupt):
                    replies.step()
                for stream in streams:
                    stream.budget = None
            replies.step()
        while replies.open:
            replies.step()
        assert [ids(stream.reply) for stream in streams] == alone


def test_a_long_prompt_makes_way_for_a_reply_that_comes_meanwhile(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}
    prompt = [3 + 7 * place % 290 for place in range(200)]
    assert llm._requests.scheduler.sequences.pool is not None
    llm._requests.scheduler.sequences._pool.kept_bytes = 0  # the second run shall not begin with the rows of the first
    alone = ids(llm.generate(prompt, **options))
    llm.costs = PRICES
    monkeypatch.setattr(composition, "CALM_MS", 20.0)  # some dozen rows of a stage at these prices
    scheduler, chunks, order = llm._requests.scheduler, [], []  # type: Any, list[int], list[int]
    work_off, take = Stream.work_off, Decoder.take
    with ThreadPoolExecutor(1) as threads:

        def worked_off(stream: Any, chunk: Any) -> None:
            work_off(stream, chunk)
            chunks.append(chunk.rows)
            if len(chunks) == 1:
                threads.submit(llm.generate, [5], budget=Budget(ttft_ms=500), max_new_tokens=1)
                while not any(one.asks for one in list(scheduler._streams.values()) if one is not stream):
                    time.sleep(0.001)

        def taken(decoder: Any, *rest: Any) -> Any:
            order.append(decoder.sequence.length)
            return take(decoder, *rest)

        monkeypatch.setattr(Stream, "work_off", worked_off)
        monkeypatch.setattr(Decoder, "take", taken)
        reply = llm.generate(prompt, **options)
    assert ids(reply) == alone
    assert len(chunks) >= 2 and max(chunks) < 190
    assert order[0] == 1, "the reply that came meanwhile has its token first"


def test_a_reply_that_began_in_a_round_keeps_its_policy_and_its_ceilings(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt runs in rounds, although no other reply is there; what follows is decided by the reply's own budget."""
    llm.costs = PRICES
    rounds, attempts, run, attempt = [], [], llm._requests.scheduler._round, Speculator.attempt

    def counted(asking: Any, begin_ns: int) -> None:
        rounds.append(len(asking))
        run(asking, begin_ns)

    def attempted(self: Speculator, turn: Turn) -> Any:
        attempts.append(turn.budget.policy)
        return attempt(self, turn)

    monkeypatch.setattr(llm._requests.scheduler, "_round", counted)
    monkeypatch.setattr(Speculator, "attempt", attempted)
    prompt = [3 + 7 * place % 290 for place in range(200)]
    budget = Budget(policy="lossless", memory_mb=1e6)
    reply = llm.generate(prompt, budget=budget, max_new_tokens=6, ignore_eos=True)
    assert set(rounds) == {1}, "the prompt runs in rounds of one"
    assert attempts and set(attempts) == {"lossless"}
    (verdict,) = (one for one in reply.verdicts if one.key == "memory_mb")
    assert verdict.held and verdict.reached is not None and 50 < verdict.reached < 1e5


def test_what_is_learned_alone_and_in_company_is_one(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits pass from a reply alone to rounds and back; a trace has them, so that its replay agrees."""
    llm.costs = PRICES
    for module in (joint, controller):
        monkeypatch.setattr(module, "TICK_S", 600.0)  # no look at the sensors changes the limits within this test
    hot = Governor(share=0.25, ticked_s=time.monotonic(), ceiling=0)
    budget, path = Budget(memory_mb=1e6, pacing=False), tmp_path / "rounds.jsonl"
    with RoundTraceWriter(path) as trace, llm.together() as replies:
        llm.record_rounds(trace)
        replies.add([1, 2], budget=budget, max_new_tokens=30, ignore_eos=True)
        replies.add([4], budget=budget, max_new_tokens=3, ignore_eos=True)
        for _ in range(2):
            replies.step()
        state = llm._learned.state
        llm._learned.state = state._replace(governor=hot)  # as a reply by itself does
        replies.step()
        assert llm._learned.state.governor.ceiling == 0
        alone = next(iter(replies.open))
        while replies.open:
            replies.step()
        assert {token.exit_layer for token in alone.reply.tokens[-20:]} == {2}, "the limit holds for who goes on alone"
        llm.record_rounds(None)
    recorded = read_rounds(path)
    assert [one.seen.learned is not None for one in recorded.rounds[:4]] == [True, False, True, False]
    again = replay_rounds(recorded)
    assert [{move.key: move.decision.exit_layer for move in found.moves} for found in again] == [
        one.exits for one in recorded.rounds
    ]
    assert set(recorded.rounds[1].exits.values()) == {5} and set(recorded.rounds[2].exits.values()) == {2}


def test_a_batch_may_be_larger_than_the_queue(llm: LLM) -> None:
    prompts = [[key % 300, 7] for key in range(MOST_WAITING + 6)]
    found = llm.generate_batch(prompts, max_new_tokens=2)
    assert found == [llm.generate(prompt, max_new_tokens=2).text for prompt in prompts]


def test_a_token_counts_the_time_for_which_it_waited(llm: LLM) -> None:
    """Also if it is the only one that asks."""
    with llm.together() as replies:
        stream = replies.add([1, 2, 3], budget=Budget(ttft_ms=100.0), max_new_tokens=2, ignore_eos=True)
        time.sleep(0.5)
        while replies.open:
            replies.step()
    first, second = (token.latency_ms for token in stream.reply.tokens)
    assert first > 500 and first - second > 100  # the second may take long on a busy machine, and does not wait
    (verdict,) = stream.reply.verdicts
    assert verdict.key == "ttft_ms" and verdict.held is False


def test_an_interrupted_step_of_one_reply_is_taken_back(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    want = ids(llm.generate([1, 2, 3], max_new_tokens=8, ignore_eos=True))
    with llm.together() as replies:
        stream = replies.add([1, 2, 3], max_new_tokens=8, ignore_eos=True)
        for _ in range(4):
            replies.step()
        advance = TokenSequence.step

        def interrupted(self: TokenSequence, exit_layer: int, tokens: Any) -> Any:
            advance(self, exit_layer, tokens)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(TokenSequence, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                replies.step()
        while replies.open:
            replies.step()
    assert ids(stream.reply) == want


def test_without_memory_for_a_pool_every_reply_has_its_own(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(type(llm.engine.backend), "new_pool", lambda *_: (_ for _ in ()).throw(MemoryError))
    assert len(ids(llm.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True))) == 4 and llm.pool is None
    assert [one.message for one in caplog.records] == ["no memory for replies that share passes: each runs by itself"]


def test_replies_can_be_paused(llm: LLM) -> None:
    with llm.together() as replies:
        paused = replies.add([1, 2, 3], max_new_tokens=10, ignore_eos=True)
        other = replies.add([4], max_new_tokens=6, ignore_eos=True)
        replies.step()
        replies.pause(paused)
        while other in replies.open:
            replies.step()
        assert len(paused.reply.tokens) == 2, "the token that was on the way still comes"
        replies.resume(paused)
        replies.step()
        paused.cancel()
        assert replies.step() == [] and paused.reply.finish_reason == "cancelled" and len(paused.reply.tokens) == 3


def test_a_reply_that_another_thread_cancels_ends_quietly(llm: LLM) -> None:
    """The cancellation arrives while a round runs."""
    with llm.together() as replies:
        streams = [replies.add([key], max_new_tokens=9, ignore_eos=True) for key in (1, 2)]
        for _ in range(3):
            replies.step()
        scheduler = llm._requests.scheduler
        run = scheduler._round

        def cancelled(*arguments: Any) -> None:
            run(*arguments)
            streams[0].cancel()

        scheduler._round = cancelled
        assert [stream for stream, _ in replies.step()] == [streams[1]]
        assert replies.open == (streams[1],) and streams[0].reply.finish_reason == "cancelled"


def test_asynchronous_streams_share_rounds_too(llm: LLM) -> None:
    async def one(prompt: list[int]) -> list[int]:
        return [token.id async for token in llm.stream(prompt, max_new_tokens=100, ignore_eos=True)]

    async def several() -> list[list[int]]:
        return await asyncio.gather(*(one(prompt) for prompt in PROMPTS[:4]))

    rounds = sizes_of_rounds(llm)
    found = asyncio.run(several())
    assert max(rounds) > 1
    assert found == [ids(llm.generate(prompt, max_new_tokens=100, ignore_eos=True)) for prompt in PROMPTS[:4]]


def test_recorded_rounds_are_decided_again(llm: LLM, tmp_path: Path) -> None:
    """Streams that come, change their budgets and go; the replay decides every round as it was decided."""
    llm.costs = PRICES
    path = tmp_path / "rounds.jsonl"
    with RoundTraceWriter(path) as trace, llm.together() as replies:
        llm.record_rounds(trace)
        first = replies.add([1, 2, 3], budget=Budget(tpot_ms=40.0), max_new_tokens=30, ignore_eos=True)
        replies.add([4], budget=Budget(tpot_ms=25.0, weight=2.0), max_new_tokens=12, ignore_eos=True)
        for count in range(14):
            if count == 6:
                first.budget = Budget(tpot_ms=15.0)
                replies.add([7, 8], max_new_tokens=20, ignore_eos=True)
            replies.step()
        while replies.open:
            replies.step()
        llm.record_rounds(None)
    recorded = read_rounds(path)
    assert len(recorded.rounds) > 20 and {len(one.seen.streams) for one in recorded.rounds} == {2, 3}
    again = list(replay_rounds(recorded))
    assert [{move.key: move.decision.exit_layer for move in found.moves} for found in again] == [
        one.exits for one in recorded.rounds
    ]
    assert invoke_here("replay", path).stdout.startswith(
        f"{len(again)} rounds of 3 streams; decisions that differ now: 0"
    )
    lines = path.read_text().splitlines()
    changed = json.loads(lines[5])
    changed["exits"] = dict.fromkeys(changed["exits"], 999)
    path.write_text("\n".join([*lines[:5], json.dumps(changed), *lines[6:]]))
    differing = json.loads(invoke_here("replay", path, "--json").stdout)["differences"]
    assert [one["round"] for one in differing] == [4] and "a round of 2 streams" in differing[0]["again"]["reason"]
    waits = json.loads(lines[5])
    waits["wait_ms"] += 1
    path.write_text("\n".join([*lines[:5], json.dumps(waits), *lines[6:]]))
    done = invoke_here("replay", path)
    assert done.returncode == 1 and "wait_ms = " in done.stdout, "a round that waits for longer is another decision"
    for text, message in (
        (lines[0].replace('"rounds": 5', '"rounds": 7'), "version 7 of rounds, must be 5"),
        ("\n".join([lines[0], "{}", lines[1]]), "line 2 is not a line of rounds"),
        *(
            ("\n".join([lines[0], lines[1].replace(old, new), *lines[2:]]), "line 2 is not")
            for old, new in (
                ('"balcony_rows": [', '"balcony_rows": [1, '),
                ('"stage_rows": [', '"stage_rows": [-1, '),
                ('"ended": [', '"ended": [Infinity], "was": ['),
            )
        ),
        ("\n".join([lines[0].replace('"quality": [', '"quality": [0.5, '), *lines[1:]]), "not readable as a trace"),
        (lines[0], "contains no rounds"),
        ('{"rounds": ', "not readable as a trace of rounds"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_rounds(path)
