"""Self-speculation: the full depth's own tokens and distribution, and rounds only when they pay."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.control.trace import TraceWriter, read_trace, replay
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.errors import BudgetError
from balcony_runtime.decoding.policy import PLAN_TOKENS, PROBE_TOKENS, WORTH, Turn
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.decoding.speculate import (
    MEMORY,
    MOST_DRAFTS,
    PRIOR_DRAFTS,
    ROUND_TOKENS,
    DraftRound,
    Speculator,
    Standing,
    run_round,
)
from balcony_runtime.llm import LLM
from tests.support.command import invoke_here

EXITS = (2, 3, 5)


#: Pending rows of the balconies: none.
NONE = (0, 0, 0)


def costs(shallow_ms: float = 1.0, deep_ms: float = 50.0) -> CostModel:
    """Drafting at exit 2 costs almost nothing compared with the deeper stages; further rows are nearly free."""
    units = (UnitCost(shallow_ms, 0.01), UnitCost(deep_ms, 0.01), UnitCost(deep_ms, 0.01))
    return CostModel(EXITS, units, (UnitCost(0.1),) * 3, UnitCost(0.1))


@pytest.fixture
def llm(tiny: Any) -> Any:
    """Prices under which rounds always pay, so that they run even with bad drafts."""
    with balcony_edge.load(tiny.path) as loaded:
        loaded.costs = costs()
        yield loaded


def plain(llm: LLM, prompt: list[int], count: int, **options: Any) -> list[int]:
    llm.budget = Budget()
    return [token.id for token in llm.stream(prompt, max_new_tokens=count, ignore_eos=True, **options)]


PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for i in range(4 + j % 9)] for j in range(12)]


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, logit_bias={5: 2.0})],
    ids=["greedy", "penalties"],
)
def test_greedy_replies_are_the_full_depths(llm: LLM, sampling: SamplingParams) -> None:
    drafted = 0
    for prompt in PROMPTS:
        wanted = plain(llm, prompt, 60, sampling=sampling)
        llm.budget = Budget(policy="lossless")
        tokens = list(llm.stream(prompt, max_new_tokens=60, ignore_eos=True, sampling=sampling))
        assert [token.id for token in tokens] == wanted
        assert {token.exit_layer for token in tokens} == {5}
        drafted += sum(token.decision.drafted > 0 for token in tokens)
        assert all("drafted" in token.reason for token in tokens if token.decision.drafted)
    assert drafted > 300  # drafting was really used


def test_switches_budgets_and_a_continued_sequence_leave_it_exact(llm: LLM) -> None:
    """Plain, speculative and shallow tokens in one reply: the full depth's tokens do not depend on the stretches before."""
    sequence = llm.engine.new_sequence(max_length=200)
    random = np.random.default_rng(4)
    history = PROMPTS[3]
    for _ in range(12):
        llm.budget = [
            Budget(policy="lossless"),
            Budget(exit_layer=2),
            Budget(policy="speculative", max_exit=3),
            Budget(),
        ][int(random.integers(4))]
        count = int(random.integers(1, 12))
        stream = llm.stream(history, max_new_tokens=count, ignore_eos=True, sequence=sequence)
        history = [*history, *(token.id for token in stream)]
        llm.budget = Budget(policy="lossless")
        got = [t.id for t in llm.stream(history, max_new_tokens=6, ignore_eos=True, sequence=sequence)]
        assert got == plain(llm, history, 6)


def test_sampled_replies_use_rounds(llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=7)
    llm.budget = Budget(policy="lossless")
    first, second = (
        [
            (t.id, t.decision.drafted)
            for t in llm.stream(PROMPTS[0], max_new_tokens=50, ignore_eos=True, sampling=sampling)
        ]
        for _ in range(2)
    )
    assert first[0] == second[0], "later ones depend on which rounds are planned, by measured times"
    assert any(drafted for _, drafted in first)


def test_a_round_keeps_the_prefix_and_rolls_the_rest_back(llm: LLM) -> None:
    prompt = PROMPTS[5]
    engine = llm.engine
    wanted = plain(llm, prompt, 10)
    sequence = engine.new_sequence(max_length=64)
    first = int(sequence.advance(5, prompt)[0, -1].argmax())
    assert first == wanted[0]
    sampler = Sampler(SamplingParams(), np.array([prompt]), engine.manifest.model.vocab_size)
    made = [first]
    while len(made) < 10:
        outcome = run_round(sequence, np.array([made[-1]]), sampler, DraftRound(3, 3, 1.0, 1.0))
        assert outcome is not None
        tokens, logits, _ = outcome
        made += tokens
        assert sequence.length == len(prompt) + len(made) - 1  # the last token is not in the sequence yet
        assert 1 <= len(tokens) == len(logits) <= 4
        assert sequence.stage_rows == (0, 0, 0)
    assert made[:10] == wanted


@pytest.mark.parametrize("made", [0, 1])
def test_a_draft_that_fails_makes_way_for_those_before_it(llm: LLM, monkeypatch: pytest.MonkeyPatch, made: int) -> None:
    """A balcony's logits may overflow where the full depth's do not; without any draft a plain step follows."""
    prompt, engine = PROMPTS[5], llm.engine
    wanted, sequence = plain(llm, prompt, 4), engine.new_sequence(max_length=64)
    sequence.advance(5, prompt)
    sampler, step = Sampler(SamplingParams(), np.array([prompt]), engine.manifest.model.vocab_size), sequence.step

    def broken(exit_layer: int, ids: Any) -> Any:
        logits = step(exit_layer, ids).copy()
        return logits * np.nan if sequence.length == len(prompt) + 1 + made else logits

    monkeypatch.setattr(sequence, "step", broken)
    outcome = run_round(sequence, np.array([wanted[0]]), sampler, DraftRound(3, 3, 1.0, 1.0))
    assert (outcome is None) is (made == 0)
    count = 0 if outcome is None else len(outcome[0])
    assert outcome is None or (outcome[0] == wanted[1 : 1 + count] and len(outcome[1]) == count)
    assert sequence.length == len(prompt) + count
    assert sequence.advance(5, [wanted[count]])[0, -1].argmax() == wanted[count + 1]


def test_a_draft_that_fails_leaves_no_nan(
    with_engine_sets: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """These graphs read rows after the end under a mask, those of drafts that were rolled back included."""
    prompt = PROMPTS[5]
    with balcony_edge.load(with_engine_sets("llama").path, device="cpu", engines="rtx-fp32") as llm:
        wanted, sequence = plain(llm, prompt, 4), cast(Any, llm.engine.new_sequence())
        sequence.advance(5, prompt)
        sampler, step = Sampler(SamplingParams(), np.array([prompt]), 320), sequence.step

        def broken(exit_layer: int, ids: Any) -> Any:
            logits = step(exit_layer, ids)
            if sequence.length < len(prompt) + 2:
                return logits
            for graph in sequence.state._workspace.graphs.path(EXITS.index(exit_layer)):
                for region in graph.cache.regions() if graph.cache else ():
                    rows = sequence.state._device.download(region)
                    rows[:, :, len(prompt) + 1] = np.nan
                    sequence.state._device.upload(region, rows)
            return logits * np.nan

        monkeypatch.setattr(sequence, "step", broken)
        outcome = run_round(sequence, np.array(wanted[:1]), sampler, DraftRound(3, 3, 1.0, 1.0))
        assert outcome is not None and outcome[0] == wanted[1 : 1 + len(outcome[0])]
        count = len(outcome[0])
        assert sequence.length == len(prompt) + count
        assert sequence.advance(5, [wanted[count]])[0, -1].argmax() == wanted[count + 1]


def test_it_is_off_where_it_does_not_pay_and_probes(tiny: Any) -> None:
    expensive = CostModel(EXITS, (UnitCost(9.0, 5.0),) * 3, (UnitCost(9.0, 5.0),) * 3, UnitCost(1.0, 1.0))
    with balcony_edge.load(tiny.path) as llm:
        llm.costs = expensive
        llm.budget = Budget(policy="lossless")
        tokens = list(llm.stream([1, 2, 3], max_new_tokens=200, ignore_eos=True))
        assert not any(token.decision.drafted for token in tokens)
    speculator = Speculator(EXITS, {2: 0.3, 3: None, 5: 1.0})
    assert speculator.acceptance(2) == pytest.approx(0.3) and speculator.acceptance(3) == pytest.approx(0.5)
    assert speculator.plan(expensive, Standing(50, 100, NONE), float("inf")) is None
    for _ in range(PROBE_TOKENS):
        speculator.learn_plain(10.0, 10.0)
    probe = speculator.plan(expensive, Standing(50, 100, NONE), float("inf"))
    assert probe is not None and probe.speedup < 1
    speculator.learn(probe, 0, probe.price_ms)
    assert speculator.plan(expensive, Standing(50, 100, NONE), float("inf")) is None
    assert speculator.acceptance(probe.exit_layer) < 0.5


def test_the_choice_follows_acceptance_and_measured_times() -> None:
    speculator = Speculator(EXITS, {2: 0.9, 3: 0.9, 5: 1.0})
    good = speculator.plan(costs(), Standing(50, 100, NONE), float("inf"))
    assert good is not None and good.exit_layer == 2 and good.drafts == 8 and good.speedup > 4
    assert speculator.plan(costs(), Standing(50, 4, NONE), float("inf")).drafts == 3  # no room for more
    assert speculator.plan(costs(), Standing(50, 100, NONE), 90.0) is None  # the whole round must fit a gap
    # A balcony with 30 pending rows runs first, in the same gap.
    behind_ms = costs().balconies[0].pass_ms(30, 50, 1)
    for share in (0.9, 1.1):
        fresh = Speculator(EXITS, {2: 0.9, 3: 0.9, 5: 1.0})
        planned = fresh.plan(costs(), Standing(50, 100, (30, 30, 0)), good.price_ms + share * behind_ms)
        assert (planned == good) == (share > 1)
    for _ in range(60):
        speculator.learn(good, 0, good.price_ms)  # nothing is ever kept
    assert speculator.acceptance(2) < 0.05
    other = speculator.plan(costs(), Standing(50, 100, NONE), float("inf"))
    assert other is None or other.exit_layer != 2 or other.drafts < 3
    slow = Speculator(EXITS, {2: 0.9, 3: 0.9, 5: 1.0})
    for _ in range(60):
        slow.learn(good, 8, 10 * good.price_ms)  # rounds take ten times their price
    assert slow.plan(costs(), Standing(50, 100, NONE), float("inf")) is None


def test_under_a_latency_target_a_round_must_fit_the_gap(llm: LLM) -> None:
    llm.budget = Budget(policy="speculative", tpot_ms=1e5)
    tokens = list(llm.stream(PROMPTS[1], max_new_tokens=40, ignore_eos=True))
    assert any(token.decision.drafted for token in tokens)
    llm.budget = Budget(policy="speculative", tpot_ms=1.0)  # no deep step fits: shallow steps, and no rounds
    tokens = list(llm.stream(PROMPTS[1], max_new_tokens=40, ignore_eos=True))
    assert not any(token.decision.drafted for token in tokens)


def test_contradictions_and_depth() -> None:
    with pytest.raises(BudgetError, match="policy = 'lossless' with exit_layer = 3: a fixed exit makes every token"):
        Budget(policy="lossless", exit_layer=3)
    with pytest.raises(BudgetError, match="policy = 'lossless' with max_exit = 3: only the full depth is lossless"):
        Budget(policy="lossless", max_exit=3)
    assert Budget(policy="lossless").allowed_exits(EXITS) == (5,)
    assert Budget(policy="lossless").speculates and Budget(policy="speculative").speculates and not Budget().speculates


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_round_makes_no_more_tokens_than_the_reply_may_have(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    drafts: list[int] = []

    def counted(sequence: Any, ids: Any, sampler: Any, planned: DraftRound) -> Any:
        drafts.append(planned.drafts)
        return run_round(sequence, ids, sampler, planned)

    monkeypatch.setattr("balcony_runtime.decoding.speculate.run_round", counted)
    wanted = plain(llm, PROMPTS[1], count)
    llm.budget = Budget(policy="lossless")
    tokens = list(llm.stream(PROMPTS[1], max_new_tokens=count, ignore_eos=True))
    assert [token.id for token in tokens] == wanted
    assert bool(drafts) == (count > 2) and max(drafts, default=0) <= count - 2  # the first token is the prompt's


def test_a_trace_of_rounds_replays(llm: LLM, tmp_path: Path) -> None:
    llm.budget = Budget(policy="speculative", tpot_ms=1e5)
    with TraceWriter(tmp_path / "t.jsonl") as trace:
        tokens = list(llm.stream(PROMPTS[2], max_new_tokens=30, ignore_eos=True, trace=trace))
    recorded = read_trace(tmp_path / "t.jsonl")
    assert 5 < len(recorded) <= len(tokens)
    said = invoke_here("replay", tmp_path / "t.jsonl").stdout
    assert said.startswith(f"{len(recorded)} decisions: "), (
        "a round of drafts is one decision, and makes several tokens"
    )
    assert [d.exit_layer for d in replay(recorded)] == [t.line["exit_layer"] for t in recorded]
    assert any(
        "drafted" in json.loads(line).get("reason", "") for line in (tmp_path / "t.jsonl").read_text().splitlines()
    )


def test_an_exit_that_never_agreed_does_not_count_as_one_that_was_never_evaluated() -> None:
    speculator = Speculator(EXITS, {2: 0.0, 3: None, 5: 1.0})
    assert (speculator.acceptance(2), speculator.acceptance(3)) == (0.0, 0.5)
    only_bad = Speculator(EXITS, {2: 0.0, 3: 0.0, 5: 1.0})
    assert only_bad.plan(costs(), Standing(50, 100, NONE), float("inf")) is None


def test_drafts_that_were_not_made_are_not_judged(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A balcony's logits are NaN after one of the drafts that were planned."""
    prompt, sequence = PROMPTS[5], llm.engine.new_sequence(max_length=64)
    ids = sequence.advance(5, prompt)[:, -1].argmax(-1)
    sampler, step = Sampler(SamplingParams(), np.array([prompt]), llm.engine.manifest.model.vocab_size), sequence.step
    monkeypatch.setattr(
        sequence, "step", lambda *move: step(*move) * (np.nan if sequence.length > len(prompt) + 1 else 1)
    )
    speculator = Speculator(EXITS, {2: 0.5, 3: 0.0})
    turn = Turn(sequence, ids, sampler, Budget(), costs(), math.inf, 1.0, time.perf_counter_ns(), 20)
    made = speculator.attempt(turn)
    assert made is not None and made.drafted == 1 and made.words.startswith("drafted 1 at 2, kept ")
    assert float(made.words.partition(", expected ")[2].removesuffix(" times as fast")) >= WORTH
    kept, judged = len(made.ids) - 1, MEMORY * PRIOR_DRAFTS
    assert speculator.acceptance(2) == pytest.approx((judged * 0.5 + kept) / (judged + 1))
    assert speculator._round_ratio == 1.0, "the time of one draft is not that of all, which the price is for"
    before = speculator.acceptance(2)
    monkeypatch.setattr(sequence, "step", lambda *move: step(*move) * np.nan)
    assert speculator.attempt(turn) is None and speculator.acceptance(2) < before, "no draft at all is a refused one"
    assert planned(speculator, costs()) is None, "nor is it tried again at the next token"


def test_drafts_after_a_refused_one_are_not_judged() -> None:
    speculator = Speculator(EXITS, {2: 0.5, 3: 0.5})
    speculator.learn(DraftRound(2, 4, 1.0, 1.0), kept=1, measured_ms=1.0)
    # of four drafts one was kept and the next refused; the two after it say nothing
    assert speculator.acceptance(2) == pytest.approx((MEMORY * PRIOR_DRAFTS * 0.5 + 1) / (MEMORY * PRIOR_DRAFTS + 2))
    assert speculator.acceptance(3) == 0.5


def test_the_check_pays_for_the_heads_rows_of_all_drafts() -> None:
    cheap, dear = UnitCost(0.001), UnitCost(10.0, 0.0)
    prices = CostModel(EXITS, (cheap, cheap, dear), (cheap, cheap, cheap), head=UnitCost(0.5, 0.25))
    planned = Speculator(EXITS, {2: 0.9, 3: 0.0}).plan(prices, Standing(100, 50, (0, 0, 0)), most_ms=1e9)
    assert planned is not None and planned.exit_layer == 2
    index = EXITS.index(2)
    rows = (1,) * (index + 1) + (planned.drafts + 1,) * (len(EXITS) - index - 1)
    check_ms = prices.step_ms(EXITS[-1], rows, (1,) * len(EXITS), 100)
    check_ms += prices.head.pass_ms(planned.drafts + 1, 100) - prices.head.pass_ms(1, 100)
    assert planned.price_ms == pytest.approx(planned.drafts * prices.steady_ms(2, 100) + check_ms)


ANY_MS = float("inf")


def planned(speculator: Speculator, prices: CostModel, room: int = 100, most_ms: float = ANY_MS) -> DraftRound | None:
    return speculator.plan(prices, Standing(50, room, NONE), most_ms)


BY_HAND = CostModel(
    EXITS,
    (UnitCost(10.0, 1.0), UnitCost(20.0, 1.0), UnitCost(40.0, 3.0)),
    (UnitCost(0.5),) * 3,
    UnitCost(2.0, 0.25),
)


def test_a_rounds_price_and_speedup_by_hand() -> None:
    # A plain step takes 10 + 20 + 40 + 0.5 + 2 ms. Two drafts at exit 2 take 2 × (10 + 0.5 + 2), and their check 10 ms, three
    # rows of 20 + 2 × 1 and 40 + 2 × 3 ms, 0.5 ms for the norm and three rows of the head: 2 + 2 × 0.25.
    prices, speculator = BY_HAND, Speculator(EXITS, {2: 0.8, 3: 0.1})
    found = planned(speculator, prices, room=3)
    assert found is not None and (found.exit_layer, found.drafts) == (2, 2)
    assert found.price_ms == pytest.approx(25.0 + 81.0)
    assert found.speedup == pytest.approx(72.5 * (1 + 0.8 + 0.64) / 106.0)
    assert speculator.plan(prices, Standing(50, 3, NONE), found.price_ms) == found  # just enough time
    # for one draft there is time in any case
    shorter = speculator.plan(prices, Standing(50, 3, NONE), found.price_ms - 0.01)
    assert shorter is not None and shorter.drafts == 1
    assert planned(speculator, prices, room=1) is None  # the token alone fills the sequence


def test_rows_that_run_again_are_part_of_the_price() -> None:
    # As above; unless both drafts are kept, the rows that stay (2.44 expected) run again in all stages. Three pending
    # rows of the deepest stage need time of their own.
    prices, speculator = BY_HAND, Speculator(EXITS, {2: 0.8, 3: 0.1})
    again_ms = 2 * 1.0 + 2 * 1.0 + 2 * 3.0  # passes of the next round take them along
    price_ms = 106.0 + (1 - 0.64) * again_ms
    found = speculator.plan(prices, Standing(50, 3, NONE, replays=True), ANY_MS)
    assert found is not None and (found.exit_layer, found.drafts) == (2, 2)
    assert found.price_ms == pytest.approx(price_ms)
    pending_ms = 3 * 3.0
    tight = speculator.plan(prices, Standing(50, 3, NONE, (0, 0, 3), replays=True), pending_ms + price_ms)
    assert tight == found
    tight = speculator.plan(prices, Standing(50, 3, NONE, (0, 0, 3), replays=True), pending_ms + price_ms - 0.01)
    assert tight is None or tight.drafts == 1


def test_the_exit_with_the_best_drafts_makes_them() -> None:
    # Exit 3 takes 2.2 ms and the full depth 52.2: its drafts are kept nearly always, those of exit 2 hardly ever.
    prices = CostModel(EXITS, (UnitCost(1.0), UnitCost(1.0), UnitCost(50.0)), (UnitCost(0.1),) * 3, UnitCost(0.1))
    found = planned(Speculator(EXITS, {2: 0.05, 3: 0.95}), prices)
    assert found is not None and (found.exit_layer, found.drafts) == (3, 8)
    assert found.price_ms == pytest.approx(8 * 2.2 + 52.2)
    found = planned(Speculator(EXITS, {2: 0.95, 3: 0.95}), prices)
    assert found is not None and found.exit_layer == 2  # of the same acceptance, the cheaper one


def test_a_step_with_pending_rows_teaches_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes many times as long as its price, and drafts would seem many times as fast."""
    learned: list[float] = []
    learn = Speculator.learn_plain
    monkeypatch.setattr(
        Speculator, "learn_plain", lambda self, price, took: (learned.append(took), learn(self, price, took))
    )
    monkeypatch.setattr(Speculator, "plan", lambda *_: None)
    stream = llm.stream(PROMPTS[0], budget=Budget(exit_layer=EXITS[0]), max_new_tokens=14, ignore_eos=True)
    for count, token in enumerate(stream, start=1):
        if count == 8:
            stream.budget = Budget(policy="speculative")
        if count == 9:
            assert token.caught_up_rows > 0 and not learned
    assert len(learned) == 5, "all later tokens"


def test_measured_times_correct_the_expected_speedup() -> None:
    fresh, slow_steps, slow_rounds = (Speculator(EXITS, {2: 0.9, 3: 0.9}) for _ in range(3))
    wanted = planned(fresh, costs())
    assert wanted is not None
    slow_steps.learn_plain(10.0, 15.0)  # a tenth of the way from 1 to 1.5
    slow_rounds.learn(DraftRound(3, 4, 10.0, 2.0), kept=0, measured_ms=30.0)  # and from 1 to 3
    for speculator, factor in ((slow_steps, 1.05), (slow_rounds, 1 / 1.2)):
        found = planned(speculator, costs())
        assert found is not None and found.speedup == pytest.approx(wanted.speedup * factor)


def test_a_step_in_which_the_process_was_stopped_says_little_about_the_next_ones() -> None:
    """It would turn rounds on or off for thousands of tokens, because a probe every 512 corrects a tenth."""
    fresh, stopped_step, stopped_round = (Speculator(EXITS, {2: 0.9, 3: 0.9}) for _ in range(3))
    wanted = planned(fresh, costs())
    assert wanted is not None
    stopped_step.learn_plain(10.0, 60_000.0)
    stopped_round.learn(DraftRound(3, 4, 10.0, 2.0), kept=0, measured_ms=60_000.0)
    for speculator, factor in ((stopped_step, 1.2), (stopped_round, 1 / 1.2)):
        found = planned(speculator, costs())
        assert found is not None and found.speedup == pytest.approx(wanted.speedup * factor)


def test_rounds_make_way_for_a_plain_step_now_and_then(llm: LLM) -> None:
    """Without one, a price of plain steps that is too high would keep rounds on for ever."""
    budget = Budget(policy="speculative")
    llm.costs = costs(1.0, 1000.0)  # drafts cost nothing, so rounds seem to pay whatever they keep
    drafted = [
        token.decision.drafted > 0 for token in llm.stream([1, 2], max_new_tokens=400, ignore_eos=True, budget=budget)
    ]
    rows = [len(list(run)) for used, run in itertools.groupby(drafted) if used]
    assert sum(drafted) > 200 and max(rows) <= ROUND_TOKENS + MOST_DRAFTS + 1 and len(rows) > 3


def test_a_batch_in_lockstep_teaches_nothing(llm: LLM) -> None:
    """Its steps have as many rows as it has members."""
    llm.costs = costs()
    budget, slowdown = Budget(policy="speculative", tpot_ms=1000.0), llm._learned.state.slowdown
    members = [llm._requests.of(ids, budget=budget, max_new_tokens=8) for ids in ([1, 2], [3, 4])]
    assert len(llm._lockstep.texts(members, None)) == 2
    speculator = llm._learned.speculator
    assert (speculator._plain_ratio, speculator._round_ratio) == (1.0, 1.0)
    assert llm._learned.state.slowdown == slowdown, "the next reply would begin too shallow"


def test_all_drafts_that_were_kept_were_judged() -> None:
    speculator = Speculator(EXITS, {2: 0.5, 3: 0.5})
    speculator.learn(DraftRound(3, 4, 1.0, 1.0), kept=4, measured_ms=1.0)
    assert speculator.acceptance(3) == pytest.approx((MEMORY * PRIOR_DRAFTS * 0.5 + 4) / (MEMORY * PRIOR_DRAFTS + 4))
    assert speculator.acceptance(2) == 0.5


def test_a_choice_that_found_no_round_holds_for_a_while() -> None:
    dear = CostModel(EXITS, (UnitCost(9.0, 5.0),) * 3, (UnitCost(9.0, 5.0),) * 3, UnitCost(1.0, 1.0))
    speculator = Speculator(EXITS, {2: 0.3, 3: 0.3})
    assert planned(speculator, dear) is None
    for token in range(PLAN_TOKENS):
        assert planned(speculator, costs()) is None, token  # rounds would pay now, but nobody looks
        speculator.learn_plain(10.0, 10.0)
    found = planned(speculator, costs())
    assert found is not None
    speculator.learn(found, found.drafts, found.price_ms)
    assert planned(speculator, costs()) is not None  # after a round the next choice is made at once


def test_a_trial_is_due_after_many_plain_tokens_and_once() -> None:
    dear = CostModel(EXITS, (UnitCost(9.0, 5.0),) * 3, (UnitCost(9.0, 5.0),) * 3, UnitCost(1.0, 1.0))
    speculator, chosen = Speculator(EXITS, {2: 0.3, 3: 0.3}), []
    for token in range(2 * PROBE_TOKENS + 10):
        if found := planned(speculator, dear):
            chosen.append(token)
            speculator.learn(found, 0, found.price_ms)
        else:
            speculator.learn_plain(10.0, 10.0)
    assert chosen == [PROBE_TOKENS, 2 * PROBE_TOKENS + 1]


def test_rounds_that_a_load_made_too_long_are_tried_again_under_a_target() -> None:
    """Nothing but a round corrects their ratio: without a trial, a minute of load would end them for the whole process."""
    speculator, standing = Speculator(EXITS, {2: 0.9, 3: 0.9}), Standing(50, 100, NONE)
    found = planned(speculator, costs())
    assert found is not None
    most_ms = 1.5 * found.price_ms
    while speculator.plan(costs(), standing, most_ms) is not None:
        speculator.learn(found, found.drafts, 3 * found.price_ms)  # the load
    for _ in range(PROBE_TOKENS):  # it has ended
        assert speculator.plan(costs(), standing, most_ms) is None
        speculator.learn_plain(10.0, 10.0)
    tried = speculator.plan(costs(), standing, most_ms)
    assert tried is not None and tried.price_ms <= most_ms


def test_an_exit_that_was_never_evaluated_keeps_half_of_its_drafts() -> None:
    speculator = Speculator(EXITS, {2: None})
    assert speculator.acceptance(2) == speculator.acceptance(3) == 0.5
    with pytest.raises(KeyError):
        speculator.acceptance(5)  # the full depth drafts nothing
