"""Replies as requests: batches, sequences that are given, options that have no effect, and when a reply is over."""

from __future__ import annotations

import inspect
import math
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.control.company.round_trace import RoundTraceWriter
from balcony_edge.control.decision import Decision
from balcony_edge.control.trace import TraceWriter, read_trace
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BudgetError, BundleError, InputError, ProfileError
from balcony_runtime.chat import Chat
from balcony_runtime.decoding.loop import Decoder, Environment
from balcony_runtime.decoding.policy import Made, Turn
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.decoding.speculate import DraftRound, Speculator
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.lockstep import Lockstep
from balcony_runtime.reply import TokenStream
from balcony_runtime.requests import Request
from balcony_runtime.scheduling.sequences import MEMBERS
from balcony_runtime.text.codec import TextCodec
from balcony_runtime.together import Together
from tests.support.replies import PRICES, all_at_once


def test_a_batch_of_any_lengths_and_a_budget_for_each(llm: LLM) -> None:
    prompts = [[1, 2, 3], [4, 5], [200, 7, 30, 8, 9]]
    budgets = [Budget(exit_layer=2), None, Budget(exit_layer=3)]
    together = llm.generate_batch(prompts, max_new_tokens=16, budget=budgets)
    alone = [llm.generate(one, max_new_tokens=16, budget=own).text for one, own in zip(prompts, budgets, strict=True)]
    assert together == alone
    assert len(set(alone)) == 3
    with pytest.raises(InputError, match="budget: 1 for 2 prompts: give one for all, or one for each"):
        llm.generate_batch([[1], [1, 2]], max_new_tokens=2, budget=[None])
    with pytest.raises(InputError, match="no messages were given"):
        llm.generate_batch([[1], []], max_new_tokens=2)


def test_a_batch_keeps_only_the_texts_of_replies_that_have_ended(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tokens take half a kilobyte each: 10,000 replies of 256 would take more than a gigabyte."""
    alive, most, begin = weakref.WeakSet[TokenStream](), [0], Together.begin

    def begins(self: Together, request: Request) -> TokenStream:
        stream = begin(self, request)
        alive.add(stream)
        most[0] = max(most[0], len(alive))
        return stream

    monkeypatch.setattr(Together, "begin", begins)
    prompts = [[1 + number, 2] for number in range(3 * MEMBERS)]
    texts = llm.generate_batch(prompts, max_new_tokens=2)
    assert texts == [llm.generate(prompt, max_new_tokens=2).text for prompt in prompts]
    assert most[0] <= MEMBERS + 1, "the last one that ended, too"


def test_a_batch_on_an_engine_that_shares_no_passes(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one length and one budget run in lockstep; others take turns."""
    with Engine.of(Bundle.open(tiny.path).portable()) as engine:
        llm = LLM(engine, TextCodec(Bundle.open(tiny.path)), Budget())
        prompts = [[1, 2, 3], [4, 5, 6], [200, 7, 30]]
        together = llm.generate_batch(prompts, max_new_tokens=16)
        assert together == [llm.generate(prompt, max_new_tokens=16).text for prompt in prompts]
        seeded = SamplingParams(temperature=1.0, seed=7)
        drawn = llm.generate_batch(prompts, max_new_tokens=16, sampling=seeded)
        assert drawn == [llm.generate(prompt, max_new_tokens=16, sampling=seeded).text for prompt in prompts]
        monkeypatch.setattr(Lockstep, "texts", None)
        monkeypatch.setattr(engine.backend, "most_members", 2)
        assert llm.generate_batch(prompts, max_new_tokens=16) == together
        for others, budgets in (
            ([[1], [1, 2]], [None, None]),
            ([[1, 2], [1, 2]], [Budget(exit_layer=2), Budget(exit_layer=5)]),
        ):
            alone = [
                llm.generate(one, max_new_tokens=16, budget=own).text for one, own in zip(others, budgets, strict=True)
            ]
            assert llm.generate_batch(others, max_new_tokens=16, budget=budgets) == alone
        assert len(set(alone)) == 2, "each reply has its own budget"


def test_a_reply_is_over_with_its_last_token(llm: LLM) -> None:
    """Its place is free although nobody has asked for one token more."""
    stream = llm.stream([1, 2, 3], max_new_tokens=4, ignore_eos=True)
    while next(stream).finish_reason is None:
        pass
    assert llm.pool is not None and llm.pool.in_use == 0 and stream.reply.finish_reason == "length"
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.reply.finish_reason == "length"


def test_a_reply_is_shown_without_the_decisions_of_its_tokens(llm: LLM) -> None:
    """A notebook shows what its cell ends with, which was a kilobyte for each token."""
    reply = llm.generate([1, 2, 3], budget=Budget(tpot_ms=1000.0), max_new_tokens=10, ignore_eos=True)
    assert repr(reply.text) in repr(reply) and "Decision" not in repr(reply)


def test_a_sequence_serves_one_reply_at_a_time(llm: LLM, tiny: Any) -> None:
    sequence = llm.engine.new_sequence()
    first = llm.stream([1, 2, 3], sequence=sequence, max_new_tokens=9, ignore_eos=True)
    next(first)
    with pytest.raises(InputError, match="another reply still uses it: close that stream"):
        next(llm.stream([1, 2, 3], sequence=sequence, max_new_tokens=9))
    next(first)
    first.close()
    again = [token.id for token in llm.stream([1, 2, 3], sequence=sequence, max_new_tokens=4, ignore_eos=True)]
    assert again == [token.id for token in llm.stream([1, 2, 3], max_new_tokens=4, ignore_eos=True)]
    with Engine.of(Bundle.open(tiny.path)) as other, pytest.raises(InputError, match="of another bundle or engine"):
        next(llm.stream([1, 2, 3], sequence=other.new_sequence(), max_new_tokens=4))


def test_options_that_a_prompt_cannot_use_are_refused(llm: LLM) -> None:
    for options in ({"documents": [{"text": "a"}]}, {"chat_template_kwargs": {"a": 1}}, {"control_tokens": False}):
        with pytest.raises(InputError, match="the prompt is token ids: give a text or messages"):
            llm.stream([1, 2, 3], **options)
    with (
        llm.together() as replies,
        pytest.raises(InputError, match="sequence, trace: not for replies that run together"),
    ):
        replies.add([1], sequence=llm.engine.new_sequence(), trace=None)


def test_a_misspelled_option_is_seen_by_type_checkers_wherever_a_reply_begins(llm: LLM) -> None:
    for call in (LLM.stream, LLM.generate, Chat.send, Together.add):
        assert inspect.signature(call).parameters["options"].annotation == "Unpack[ReplyOptions]", call
    chat: Any = llm.chat()
    with pytest.raises(InputError, match="sequence: a conversation has its own: leave it out"):
        chat.send("hi", sequence=llm.engine.new_sequence())


def test_prices_of_another_type_are_refused(llm: LLM) -> None:
    other: Any = "device.json"
    with pytest.raises(InputError, match="costs of type str: give a CostModel"):
        llm.costs = other


def test_rounds_are_recorded_by_their_own_writer_only(llm: LLM, tmp_path: Path) -> None:
    """Each round would end all its replies with an error of Python's: those of other threads as well."""
    other: Any
    with TraceWriter(tmp_path / "run.jsonl") as trace:
        for other in (trace, tmp_path / "rounds.jsonl", "rounds.jsonl"):
            with pytest.raises(InputError, match=r"trace of type \w+: give a RoundTraceWriter, or None to stop"):
                llm.record_rounds(other)
    assert all(llm.generate_batch([[1, 2], [3]], max_new_tokens=4))


def test_paths_of_another_type_are_refused(tiny: Any) -> None:
    """None is what a variable of the environment that is not set gives; `load` takes a profile's path, not what is in it."""
    other: Any = None
    with pytest.raises(BundleError, match="bundle of type NoneType: give the path of a bundle's directory"):
        balcony_edge.load(other)
    other = {"schema_version": 1}
    with pytest.raises(ProfileError, match="profile of type dict: give the path of a device profile"):
        balcony_edge.load(tiny.path, profile=other)
    other = b"budget.toml"
    with pytest.raises(BudgetError, match="budget file of type bytes: give a path"):
        balcony_edge.load_budget(other)
    for option in ("packed", "prefix_directory"):
        with pytest.raises(InputError, match=f"{option} of type bytes: give the path of a directory"):
            balcony_edge.load(tiny.path, device="cpu", **{option: other})
    for writer in (TraceWriter, RoundTraceWriter):
        with pytest.raises(InputError, match="trace of type bytes: give the path of a file"):
            writer(other)


def test_sessions_of_no_path_are_refused(llm: LLM) -> None:
    none: Any = None
    for call in (
        lambda: llm.chat().save(none),
        lambda: Chat.load(llm, none),
        lambda: llm.save_prefix(list(range(10, 60)), none),
        lambda: llm.load_prefix(none),
    ):
        with pytest.raises(InputError, match="session of type NoneType: give the path of a file"):
            call()


def test_writers_and_sequences_of_another_kind_are_one_line(llm: LLM, tmp_path: Path) -> None:
    """A sequence of several members would also lose its rows."""
    other: Any
    with RoundTraceWriter(tmp_path / "rounds.jsonl") as rounds:
        for other in (rounds, tmp_path / "run.jsonl", "run.jsonl"):
            with pytest.raises(InputError, match=r"trace of type \w+: give a TraceWriter, or leave it out"):
                next(llm.stream([1, 2, 3], trace=other))
    several = llm.engine.new_sequence(batch_size=2)
    several.append([[1, 2], [1, 2]])
    for other in (llm.chat(), several):
        with pytest.raises(InputError, match="sequence: must be a TokenSequence with one member: make it"):
            next(llm.stream([5, 6, 7], sequence=other))
    assert several.length == 2


def test_a_budget_is_resolved_from_what_every_call_takes(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "shallow.toml").write_text("max_exit = 3\n")
    assert llm.resolved(tmp_path / "shallow.toml") == Budget(max_exit=3)
    other: Any = {"max_exit": 3}
    with pytest.raises(BudgetError, match=r"budget = .*: must be a Budget, the path of a budget file or None"):
        llm.resolved(other)


def test_the_controller_is_told_which_tokens_were_forced(llm: LLM, tmp_path: Path) -> None:
    """They are made, and no step was measured for them."""
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
    with TraceWriter(tmp_path / "run.jsonl") as trace:
        tokens = list(llm.stream([1, 2, 3], sampling=SamplingParams(json_schema=schema), trace=trace))
    made = max(place for place, token in enumerate(tokens) if not token.forced)
    seen = read_trace(tmp_path / "run.jsonl")[-1].seen
    assert (seen.made_tokens, seen.forced_tokens) == (made, sum(token.forced for token in tokens[:made]))
    assert seen.forced_tokens > 0


def test_our_busy_time_is_that_of_our_steps(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By it the slow loop tells our watts from those of others. A step looks at the clock at both ends, 30 ms apart."""
    clock = SimpleNamespace(perf_counter_ns=iter(range(0, 10**12, 30_000_000)).__next__, monotonic=time.monotonic)
    monkeypatch.setattr("balcony_runtime.decoding.loop.time", clock)
    with TraceWriter(tmp_path / "run.jsonl") as trace:
        assert len(list(llm.stream([1, 2, 3], max_new_tokens=5, ignore_eos=True, trace=trace))) == 5
    busy_s = [token.seen.busy_s for token in read_trace(tmp_path / "run.jsonl")]
    assert busy_s == pytest.approx([0.0, 0.03, 0.06, 0.09, 0.12])


def test_a_round_that_gave_no_token_measures_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is no part of the plain step after it, from which the controller learns the load."""

    def undone(sequence: Any, ids: Any, *_: Any) -> None:
        sequence.step(2, ids)
        sequence.rollback(sequence.length - 1)

    measured: list[Any] = []
    monkeypatch.setattr("balcony_runtime.decoding.speculate.run_round", undone)
    monkeypatch.setattr(Speculator, "plan", lambda *_: DraftRound(2, 1, 1.0, 2.0))
    monkeypatch.setattr("balcony_runtime.decoding.loop.Measurement", lambda *step: measured.append(step))
    budget = Budget(policy="lossless", tpot_ms=1e6)
    assert len(list(llm.stream([1, 2, 3], budget=budget, max_new_tokens=5, ignore_eos=True))) == 5
    assert len(measured) == 1, "that of the last token, which leaves no place for drafts"


def test_two_threads_do_not_get_one_sequence(llm: LLM) -> None:
    class Slow(weakref.WeakSet[Any]):
        def __contains__(self, item: object) -> bool:
            found = super().__contains__(item)
            time.sleep(0.1)  # the other thread looks as well
            return found

    llm._requests._continuing, sequence = Slow(), llm.engine.new_sequence()
    streams = [llm.stream([1, 2, 3], sequence=sequence, max_new_tokens=9, ignore_eos=True) for _ in range(2)]

    def begins(stream: Any) -> bool:
        try:
            return next(stream).id >= 0
        except InputError as error:
            return "another reply still uses it" not in str(error)

    assert sorted(all_at_once(*(lambda one=one: begins(one) for one in streams))) == [False, True]
    for stream in streams:
        stream.close()


def test_a_pace_is_held_next_to_a_slow_reader(llm: LLM) -> None:
    """It counts from the token before: without what the reader takes of the wait, it would seem too fast."""
    stream = llm.stream([1, 2, 3], budget=Budget(max_pace_tps=10), max_new_tokens=5, ignore_eos=True)
    for _ in stream:
        time.sleep(0.06)
    (verdict,) = stream.reply.verdicts
    assert verdict.held and 1.0 < (verdict.reached or 0.0) <= 10.1


@pytest.mark.parametrize(
    ("idle_ms", "step_ms", "portions"), [(50.0, 10.0, 5), (50.0, 60.0, 0), (5000.0, 10.0, 100), (0.0, 10.0, 0)]
)
def test_a_wait_is_for_pending_rows_no_longer_than_it_may_be(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, idle_ms: float, step_ms: float, portions: int
) -> None:
    """They take watts and joules. A token is due in a second, each portion takes 10 ms, and none may end too late."""
    ran, slept = list[int](), list[float]()
    environment = Environment(lambda: (Budget(), None), tuple, llm._learned, 1, sleep=slept.append)
    sampler = Sampler(SamplingParams(), np.zeros((1, 0), np.int64), 100)
    decoder = Decoder(llm.engine.new_sequence(), np.zeros((1, 1), np.int64), sampler, environment)
    clock = SimpleNamespace(perf_counter_ns=iter(range(0, 10**12, 10_000_000)).__next__)
    monkeypatch.setattr("balcony_runtime.decoding.loop.time", clock)
    monkeypatch.setattr(decoder.sequence, "catch_up", lambda rows: ran.append(rows) or rows)
    decision = Decision(2, step_ms, step_ms, period_ms=1000.0, idle_ms=idle_ms)
    assert decoder._wait(decision, 10**9) == portions * 10**7
    assert len(ran) == portions and sum(slept) == pytest.approx(1.0 - 0.01 * portions)


def test_waits_are_for_pending_rows_again_after_a_portion_that_was_held_up(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another program, or by Ctrl-Z. Every later wait is shorter than that portion, so that none would be timed again."""
    environment = Environment(lambda: (Budget(), None), tuple, llm._learned, 1, sleep=lambda _: False)
    sampler = Sampler(SamplingParams(), np.zeros((1, 0), np.int64), 100)
    decoder = Decoder(llm.engine.new_sequence(), np.zeros((1, 1), np.int64), sampler, environment)
    clock = SimpleNamespace(perf_counter_ns=iter(range(0, 10**12, 10_000_000)).__next__)
    monkeypatch.setattr("balcony_runtime.decoding.loop.time", clock)
    monkeypatch.setattr(decoder.sequence, "catch_up", lambda rows: rows)
    decoder._portion_ns = 200_000_000
    worked_ns = [decoder._wait(Decision(2, 10.0, 10.0, period_ms=100.0, idle_ms=50.0), 10**12) for _ in range(500)]
    assert not any(worked_ns[:200]) and all(worked_ns[400:])


def test_a_deadline_runs_while_the_reader_is_at_a_token(llm: LLM) -> None:
    """The controller counts from the request, and so does the verdict."""
    budget = Budget(deadline_s=0.2, expected_tokens=5)
    stream = llm.stream([1, 2, 3], budget=budget, max_new_tokens=7, ignore_eos=True)
    begin_s = time.monotonic()
    for _ in stream:
        time.sleep(0.06)
    (verdict,) = stream.reply.verdicts
    assert verdict.held is False and 0.24 <= (verdict.reached or 0.0) <= time.monotonic() - begin_s - 2 * 0.06


def test_joules_of_a_token_have_its_readers_time(tiny: Any) -> None:
    """The controller's ceiling is from one token to the next, and the watts are those of that time."""

    def steady() -> tuple[Reading, ...]:
        now_s = time.monotonic()
        return (Reading("board", "board", now_s, watts=4.0, joules=4 * now_s),)

    with balcony_edge.load(tiny.path) as plain, LLM(plain.engine, plain.codec, Budget(), readings=steady) as llm:
        llm.costs = PRICES
        stream = llm.stream([1, 2, 3], budget=Budget(energy_j_per_token=0.2), max_new_tokens=5, ignore_eos=True)
        for _ in stream:
            time.sleep(0.06)
        (verdict,) = stream.reply.verdicts
    assert (verdict.reached or 0.0) >= 4 * 0.06 and verdict.held is False


def test_a_policy_has_the_time_that_a_plain_step_has(llm: LLM) -> None:
    """A device at half its speed leaves 50 of 100 ms, less 1.28 deviations of 10 % for nine tokens in ten."""
    turns: list[Turn] = []
    policy: Any = SimpleNamespace(attempt=turns.append)
    sampler = Sampler(SamplingParams(), np.zeros((1, 0), np.int64), 100)
    environment = Environment(lambda: (Budget(), None), tuple, llm._learned, 9)
    decoder = Decoder(llm.engine.new_sequence(), np.zeros((1, 1), np.int64), sampler, environment)
    decoder._budget, decoder._costs, decoder.made = Budget(tpot_ms=100.0, probability=0.9), PRICES, 2
    slowdown = decoder._state.slowdown._replace(variance=0.0, noise_variance=0.1**2)
    decoder._state = decoder._state._replace(slowdown=slowdown)
    decoder._attempt(policy, np.array([1]), Decision(llm.exit_layers[-1], 20.0, 10.0), 0)
    (turn,) = turns
    assert (turn.slowdown, turn.left) == (2.0, 7)
    assert turn.most_ms == pytest.approx(50.0 / math.exp(1.2816 * 0.1), rel=1e-4)


def test_a_policy_that_leaves_other_rows_than_its_tokens_is_found(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mistake: for the full depth it runs the token once more, instead of asking again about its row."""

    def attempt(turn: Turn) -> Made:
        first, *_, full = turn.sequence.exits
        turn.sequence.step(first, turn.ids)
        logits = turn.sequence.step(full, turn.ids)
        return Made([turn.sampler.pick(logits)], [logits], full, "unsure")

    policy = SimpleNamespace(attempt=attempt, learn_plain=lambda *_: None)
    monkeypatch.setattr(Decoder, "_policy_of", lambda self, budget: policy)
    with pytest.raises(AssertionError, match="a policy left 2 rows for 1 tokens"):
        llm.generate([1, 2, 3], budget=Budget(policy="speculative"), max_new_tokens=4, ignore_eos=True)


@pytest.mark.parametrize(
    ("keys", "period_ms"), [({"max_pace_tps": 20}, 50.0), ({"deadline_s": 60, "expected_tokens": 9}, 0.0), ({}, 0.0)]
)
def test_a_policy_makes_no_token_with_a_pace_or_a_deadline(llm: LLM, keys: dict[str, Any], period_ms: float) -> None:
    """A round of drafts would bring up to nine tokens at once."""
    turns: list[Turn] = []
    policy: Any = SimpleNamespace(attempt=turns.append)
    sampler = Sampler(SamplingParams(), np.zeros((1, 0), np.int64), 100)
    environment = Environment(lambda: (Budget(), None), tuple, llm._learned, 9)
    decoder = Decoder(llm.engine.new_sequence(), np.zeros((1, 1), np.int64), sampler, environment)
    decoder._budget, decoder._costs, decoder.made = Budget(**keys), PRICES, 2
    decoder._attempt(policy, np.array([1]), Decision(llm.exit_layers[-1], 20.0, 10.0, period_ms=period_ms), 0)
    assert len(turns) == (not keys)


@pytest.mark.parametrize(
    "bad", [{}, False, np.zeros((9, 9)), {"json_schema": "x" * 9_000}], ids=lambda bad: str(bad)[:9]
)
def test_what_is_no_sampling_is_one_short_line(llm: LLM, bad: Any) -> None:
    """Also if it is empty: only None asks for greedy decoding."""
    with pytest.raises(InputError, match=r"^sampling = .*: must be SamplingParams") as caught:
        llm.stream("the fox", sampling=bad)
    with pytest.raises(InputError, match=r"^stop = .*: must be a list of non-empty strings") as other:
        llm.stream("the fox", stop=[[bad]])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"^exit_layer = .*: this bundle has exits 2, 3, 5") as third:
        llm.engine.new_sequence().advance(bad, [1])
    for error in (caught, other, third):
        assert "\n" not in str(error.value) and len(str(error.value)) < 160


def test_token_ids_are_encoded_as_a_stream_sees_them(llm: LLM) -> None:
    """The refusal of other prompts asks for them by name."""
    ids: Any = np.array([5, 6])
    assert llm.encode([5, 6]) == llm.encode(ids) == [5, 6]
    assert llm.encode("the fox", chat=False) == llm.encode(llm.encode("the fox", chat=False))
    with pytest.raises(InputError, match=r"^token 320: the vocabulary has 0 to 319"):
        llm.encode([320])
