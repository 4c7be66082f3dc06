"""Confidence exits: measures, the tested promise, the choice, the checks online, and replies on a real engine."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle, read_manifest
from balcony_edge.bundle.manifest import ConfidenceMeasure, ConfidenceSpec, ThresholdSpec
from balcony_edge.bundle.quality import record_confidence
from balcony_edge.control.trace import TraceWriter, read_trace, replay
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.errors import BudgetError, InputError
from balcony_runtime.decoding.confident import CHECK_EVERY, MOST_CHECKED, Confident, EarlyExits
from balcony_runtime.decoding.policy import PROBE_TOKENS, Turn
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.decoding.thresholds import (
    CANDIDATES,
    MEASURES,
    Compared,
    _largest_share,
    binomial_tail,
    compare_exits,
    held_out,
    last_accepted,
    learn,
    least_tokens,
    measured,
)
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import TokenSequence
from tests.support.command import invoke_here

EXITS = (2, 3, 5)
#: Threshold that a tiny random model does not reach half of the time.
THRESHOLD = 0.12
COSTS = CostModel(
    exits=EXITS,
    stages=(UnitCost(1.0, 0.05), UnitCost(2.0, 0.1), UnitCost(5.0, 0.2)),
    balconies=(UnitCost(0.3, 0.01), UnitCost(0.3, 0.01), UnitCost(0.01)),
    head=UnitCost(0.5, 0.1),
)

#: Rows that each stage and each balcony would run: one; and with a balcony that is 500 rows behind.
DUE, BEHIND = ((1, 1, 1), (1, 1, 1)), ((1, 1, 1), (501, 1, 1))


def spec(threshold: float = 0.5, share: float = 0.9, **changes: Any) -> ConfidenceSpec:
    one = ThresholdSpec(threshold=threshold, exit_share=share, disagreement=0.01)
    options: dict[str, Any] = {"thresholds": {2: one}, **changes}
    return ConfidenceSpec(measure="top1", max_disagreement=0.02, confidence=0.95, text="t", tokens=1000, **options)


def test_measures_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]], np.float32)) + 5
    np.testing.assert_allclose(measured(logits, "top1"), [0.7, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(measured(logits, "margin"), [0.5, 0.0], atol=1e-6)
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1)) / np.log(3)
    np.testing.assert_allclose(measured(logits, "entropy"), [1 - entropy, 0.0], atol=1e-6)


def test_the_page_of_the_format_defines_every_measure() -> None:
    """A reader of thresholds in another language has this page only."""
    page = (Path(__file__).parents[3] / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `confidence` \| (.+) \|$", page, re.MULTILINE)
    told = dict(re.findall(r"`(\w+)`: ([^,)]+)", row.partition("the promise")[0]))
    assert set(told) == set(MEASURES) and told["entropy"] == "1 minus the entropy divided by log V"
    assert "at this confidence or above" in row


def test_the_binomial_tail_by_hand() -> None:
    assert binomial_tail(-1, 5, 0.3) == 0 and binomial_tail(5, 5, 0.3) == 1
    assert binomial_tail(0, 5, 0.3) == pytest.approx(0.7**5)
    assert binomial_tail(1, 5, 0.3) == pytest.approx(0.7**5 + 5 * 0.3 * 0.7**4)
    assert binomial_tail(100, 10_000, 0.01) == pytest.approx(0.5266, abs=1e-3)


def test_the_last_accepted_keeps_its_promise() -> None:
    """Over 300 draws of calibration text, the true risk of the chosen threshold is above the promise in about 5 % at most."""
    random, broken, shares = np.random.default_rng(5), 0, []
    candidates = np.linspace(1, 0, 101)
    for _ in range(300):
        sure = random.random(1500)
        agrees = random.random(1500) < 0.8 + 0.2 * sure  # disagreement at confidence c: 0.2 (1 - c)
        threshold = last_accepted(sure, agrees, candidates, 0.02, 0.95)
        assert threshold is not None
        true_risk = 0.1 * (1 - threshold) ** 2  # share of all tokens that exit and disagree
        broken += true_risk > 0.02
        shares.append(1 - threshold)
    assert broken <= 300 * 0.05 + 3 * (300 * 0.05 * 0.95) ** 0.5
    assert np.mean(shares) > 0.3, "and it is not kept by never exiting"


def test_the_promise_holds_for_all_exits_at_once() -> None:
    random = np.random.default_rng(5)
    sure = {e: random.random(4000) for e in (2, 3)}
    agrees = {e: random.random(4000) < 0.8 + 0.2 * sure[e] for e in (2, 3)}
    found = learn(Compared(dict.fromkeys(MEASURES, sure), agrees), "t", 0.02, 0.95)
    assert found.thresholds.keys() == {2, 3}
    for exit_layer, threshold in found.thresholds.items():
        levels = np.quantile(sure[exit_layer][:2000], np.linspace(1, 0, CANDIDATES + 1)).tolist()
        held, fits = sure[exit_layer][2000:], agrees[exit_layer][2000:]
        assert threshold.threshold == last_accepted(held, fits, levels, 0.02, 0.975)
        alone = last_accepted(held, fits, levels, 0.02, 0.95)
        assert alone is not None and threshold.threshold >= alone
        early = held >= threshold.threshold
        assert (threshold.exit_share, threshold.disagreement) == (early.mean(), (early & ~fits).mean())


def test_as_many_exit_early_as_may_be_wrong() -> None:
    """Of the surest first: the third and fourth disagree, and a quarter of all may."""
    sure, agrees = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, False, False])
    assert (_largest_share(sure, agrees, 0.0), _largest_share(sure, agrees, 0.25)) == (0.5, 0.75)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_measure_with_most_early_exits_is_taken(measure: ConfidenceMeasure) -> None:
    random = np.random.default_rng(1)
    good, bad = random.random((2, 4000))
    agrees = {2: random.random(4000) < 0.7 + 0.3 * good}
    sure = {name: {2: good if name == measure else bad} for name in MEASURES}
    assert learn(Compared(sure, agrees), "t", 0.05, 0.95).measure == measure


def test_no_threshold_where_none_keeps_it() -> None:
    sure = np.linspace(0, 1, 500)
    assert last_accepted(sure, np.zeros(500, bool), [0.99, 0.9, 0.5], 0.001, 0.95) is None
    policy = Confident(EXITS, spec(thresholds={}))
    assert policy.plan(COSTS, 10, DUE, EXITS, np.inf) is None


@pytest.mark.parametrize(("promise", "least"), [((0.02, 0.95), 400), ((0.001, 0.95), 7376), ((0.001, 0.5), 2772)])
def test_a_promise_that_no_exit_could_keep_on_so_few_tokens_is_refused(promise: Any, least: int) -> None:
    """Even two exits that are never wrong would seem to break it, and thresholds of before would be lost."""
    assert least_tokens(2, *promise) == least
    for count in (least, least - 1):
        compared = Compared(
            {measure: {e: np.linspace(0.5, 1, count) for e in (2, 3)} for measure in MEASURES},
            {e: np.ones(count, bool) for e in (2, 3)},
        )
        if count == least:
            assert learn(compared, "t", *promise).thresholds.keys() == {2, 3}
        else:
            with pytest.raises(InputError, match=f"{count} tokens to calibrate on: give {least} or more"):
                learn(compared, "t", *promise)


def test_trying_follows_from_prices() -> None:
    paying = Confident(EXITS, spec(share=0.9))
    found = paying.plan(COSTS, 0, DUE, EXITS, np.inf)
    # A plain token takes 9.01... ms; a trial 1.8 ms and, in one of ten cases, the deep stages over ten rows and the head.
    assert found is not None and (found.exit_layer, found.threshold) == (2, 0.5) and found.speedup > 2.5
    assert paying.plan(COSTS, 0, DUE, EXITS, most_ms=5.0) is None, (
        "an unsure token would take longer than the gap allows"
    )
    losing = Confident(EXITS, spec(share=0.05))
    assert [losing.plan(COSTS, 0, DUE, EXITS, np.inf) for _ in range(PROBE_TOKENS - 1)] == [None] * (PROBE_TOKENS - 1)
    probe = losing.plan(COSTS, 0, DUE, EXITS, np.inf)
    assert probe is not None and probe.speedup < 1.03
    assert losing.plan(COSTS, 0, DUE, EXITS, np.inf) is None
    for _ in range(300):
        losing.learn(2, True)
    assert losing.plan(COSTS, 0, DUE, EXITS, np.inf) is not None, "what was learned counts"


def test_a_share_that_only_single_trials_see_is_learned_within_thousands_of_tokens() -> None:
    """The calibration's text is not that of the replies: hardly a token exited there. Here three of ten must, and all would."""
    policy, trials = Confident(EXITS, spec(share=0.05)), list[float]()
    costs = replace(COSTS, stages=(UnitCost(4.0), UnitCost(1.0), UnitCost(2.0)))
    for _ in range(10 * PROBE_TOKENS):
        if found := policy.plan(costs, 0, DUE, EXITS, np.inf):
            trials.append(found.speedup)
            policy.learn(2, True)
    assert trials[0] < 1 and trials[-1] > 1.5 and len(trials) > PROBE_TOKENS


def test_the_speedup_of_a_trial_by_hand() -> None:
    # A plain token takes 1 + 2 + 5 + 0.01 + 0.5 ms, a try at exit 2 takes 1 + 0.3 + 0.5. Nine of ten tokens exit there, and
    # leave their rows to the tenth: ten rows of 2 + 9 × 0.1 and 5 + 9 × 0.2 ms, 0.01 for the norm and 0.5 for the head.
    found = Confident(EXITS, spec(share=0.9)).plan(COSTS, 0, DUE, EXITS, np.inf)
    assert found is not None and found.speedup == pytest.approx(8.51 / (1.8 + 0.1 * 10.21))


@pytest.mark.parametrize(("shares", "exit_layer"), [((0.9, 0.9), 2), ((0.3, 0.95), 3), ((0.9, 0.3), 2)])
def test_the_exit_that_pays_most_is_tried(shares: tuple[float, float], exit_layer: int) -> None:
    known = {
        exit_: ThresholdSpec(threshold=0.5, exit_share=share, disagreement=0.01)
        for exit_, share in zip((2, 3), shares, strict=True)
    }
    found = Confident(EXITS, spec(thresholds=known)).plan(COSTS, 0, DUE, EXITS, np.inf)
    assert found is not None and found.exit_layer == exit_layer


def test_a_trial_keeps_the_budgets_bounds_and_pays_for_a_balcony_that_is_behind() -> None:
    assert Confident(EXITS, spec(share=0.9)).plan(COSTS, 600, DUE, (3, 5), np.inf) is None
    # The bound is for a token of which the balcony is not sure: it takes all rows that are pending, of whichever graph.
    for stages, balconies in (DUE, BEHIND, ((1, 31, 31), (1, 1, 1))):
        unsure_ms = COSTS.step_ms(2, stages, balconies, 600) + COSTS.step_ms(5, (0, *stages[1:]), (1, 1, 1), 600)
        assert Confident(EXITS, spec(share=0.9)).plan(COSTS, 600, (stages, balconies), EXITS, unsure_ms + 0.01)
        assert not Confident(EXITS, spec(share=0.9)).plan(COSTS, 600, (stages, balconies), EXITS, unsure_ms - 0.01)
    with pytest.raises(BudgetError, match="policy = 'confident' with exit_layer = 5: a fixed exit makes every token"):
        Budget(policy="confident", exit_layer=5)


def test_bounds_of_depth_hold_for_early_exits(calibrated: Path) -> None:
    with balcony_edge.load(calibrated) as llm:
        llm.costs = COSTS
        llm.budget = Budget(policy="confident", min_exit=3)
        assert {t.exit_layer for t in llm.stream("the quick brown fox", max_new_tokens=60, ignore_eos=True)} == {5}
        llm.budget = Budget(policy="confident")
        tokens = list(llm.stream("the quick brown fox", max_new_tokens=60, ignore_eos=True))
        # A token without enough confidence takes in the rows that early ones left, and no saving is negative.
        assert min(token.caught_up_rows for token in tokens) == 0 < max(token.caught_up_rows for token in tokens)
        assert len({token.exit_layer for token in tokens}) == 2


def test_a_promise_that_slips_raises_the_threshold() -> None:
    kept, slipping = Confident(EXITS, spec(share=0.5)), Confident(EXITS, spec(share=0.5))
    for index in range(400):
        kept.check(2, agreed=index % 100 != 0)  # 1 %; the promise allows 4 % of the tokens that exit
        slipping.check(2, agreed=index % 5 != 0)  # 20 %
    assert kept.thresholds[2] == 0.5 and kept.telemetry[2] == (400, 4)
    assert slipping.thresholds[2] > 0.9 and slipping.telemetry[2] == (400, 80)


def test_the_promise_is_about_all_tokens() -> None:
    """A tenth of them exit early, and a tenth of those disagree: that is 1 %, and the promise allows 2 %."""
    policy = Confident(EXITS, spec(share=0.1))
    for index in range(400):
        policy.check(2, agreed=index % 10 != 9)
    assert policy.thresholds[2] == 0.5 and policy.telemetry[2] == (400, 40)


def test_checks_are_rationed() -> None:
    policy = Confident(EXITS, spec())

    def after_a_trial(waiting: int) -> int:
        policy.learn(2, True)
        return policy.due(waiting)

    asked = [after_a_trial(10) for _ in range(3 * CHECK_EVERY)]
    assert sum(count > 0 for count in asked) == 3 and max(asked) == MOST_CHECKED
    assert [after_a_trial(0) for _ in range(CHECK_EVERY)] == [0] * CHECK_EVERY and policy.due(2) == 2


@pytest.fixture
def calibrated(export_tiny: Callable[[str], Any], tmp_path: Path) -> Path:
    """A tiny bundle whose tokens exit early at 2 if their largest probability is THRESHOLD or more."""
    path = Path(shutil.copytree(export_tiny("llama").path, tmp_path / "bundle"))
    record_confidence(path, spec(threshold=THRESHOLD, share=0.99), read_manifest(path).fingerprint)
    return path


def test_replies_are_the_exits_own_tokens(calibrated: Path) -> None:
    """Every token is the likeliest of its exit, and tokens without enough confidence are the full depth's."""
    with balcony_edge.load(calibrated) as llm:
        llm.costs = COSTS
        llm.budget = Budget(policy="confident")
        tokens = list(llm.stream("the quick brown fox", max_new_tokens=120, ignore_eos=True))
        exits = {token.exit_layer for token in tokens}
        assert exits == {2, 5}, "both happen"
        prompt = llm.encode("the quick brown fox")
        ids = [*prompt, *(token.id for token in tokens)]
        checked = tried = 0
        for place, token in enumerate(tokens):
            before = ids[: len(prompt) + place]
            sequence = llm.engine.new_sequence()
            logits = sequence.advance(token.exit_layer, before)[0, 0]
            best = np.sort(logits)
            assert token.id == int(logits.argmax()) or best[-1] - best[-2] < 1e-3
            if found := re.search(r"([\d.]+) sure at 2, asked ([\d.]+)", token.reason):
                sure = float(measured(sequence.advance(2, [])[0], "top1")[0])
                said, asked_for = map(float, found.groups())
                assert abs(said - sure) < 0.006 and (token.exit_layer == 2) == (sure >= asked_for - 0.006)
                tried += 1
            checked += 1
        assert checked == 120 and tried > 60
        early = [token for token in tokens if token.exit_layer == 2]
        assert all("sure at 2, asked" in token.reason for token in early)
        asked = llm.quality[2].checked
        assert 0 < asked <= 120 / CHECK_EVERY * MOST_CHECKED + MOST_CHECKED
        # The telemetry counts the full depth's checks of exactly such tokens.
        assert 0 <= llm.quality[2].disagreed <= asked


def test_telemetry_counts_what_the_full_depth_would_have_said(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every early token checked, the disagreements equal those that a pass from scratch finds."""
    monkeypatch.setattr("balcony_runtime.decoding.confident.CHECK_EVERY", 1)
    monkeypatch.setattr("balcony_runtime.decoding.confident.MOST_CHECKED", 1000)
    monkeypatch.setattr("balcony_runtime.decoding.confident.RAISE", 0.0)
    with balcony_edge.load(calibrated) as llm:
        llm.costs = COSTS
        llm.budget = Budget(policy="confident")
        prompt = llm.encode("the dog and the fox")
        tokens = list(llm.stream(prompt, max_new_tokens=100, ignore_eos=True))
        ids = [*prompt, *(token.id for token in tokens)]
        last_full = max(index for index, token in enumerate(tokens) if token.exit_layer == 5)
        judged = [i for i, token in enumerate(tokens[:last_full]) if token.exit_layer == 2]
        sequence = llm.engine.new_sequence()
        said = sequence.advance(5, ids, num_logits=len(tokens) + 1)[0].argmax(-1)
        wrong = sum(int(said[index]) != tokens[index].id for index in judged)
        assert llm.quality[2] == (len(judged), wrong) and judged
        # Traces and the live view have the checks where they were made: in the reason.
        told = [re.search(r", (\d+) of the last (\d+) tokens are not the full depth's", t.reason) for t in tokens]
        counts = [(int(found[2]), int(found[1])) for found in told if found]
        assert tuple(map(sum, zip(*counts, strict=True))) == llm.quality[2]


def test_calibration_of_a_bundle(export_tiny: Callable[[str], Any]) -> None:
    random = np.random.default_rng(8)
    documents = [random.integers(1, 320, 60).tolist() for _ in range(30)]
    with Engine.open(export_tiny("llama").path) as engine:
        compared = compare_exits(engine, documents)
        found = learn(compared, "random", max_disagreement=0.2, confidence=0.9)
        assert found.tokens == 1800 and found.thresholds.keys() == {2, 3}
        for threshold in found.thresholds.values():
            assert threshold.disagreement <= 0.2 and 0 < threshold.exit_share <= 1
        # On other text, counted token by token.
        others = [random.integers(1, 320, 50).tolist() for _ in range(8)]
        count, held = held_out(compare_exits(engine, others), found)
        assert count == 400 and held.keys() == found.thresholds.keys()
        for exit_layer, threshold in found.thresholds.items():
            early = wrong = 0
            for ids in others:
                sequence = engine.new_sequence()
                said = sequence.advance(5, ids, num_logits=50)[0].argmax(-1)
                logits = sequence.advance(exit_layer, [], num_logits=50)[0]
                exits_early = measured(logits, found.measure) >= threshold.threshold
                early += int(exits_early.sum())
                wrong += int((exits_early & (logits.argmax(-1) != said)).sum())
            assert held[exit_layer].exit_share == pytest.approx(early / 400, abs=0.006)
            assert held[exit_layer].disagreement == pytest.approx(wrong / 400, abs=0.006)
        with pytest.raises(InputError, match="400 or more"):
            held_out(compare_exits(engine, others[:2]), found)
        with pytest.raises(InputError, match="300 tokens to calibrate on: give 400 or more"):
            learn(compare_exits(engine, documents[:5]), "x", max_disagreement=0.2, confidence=0.9)


@pytest.mark.parametrize("broken", [2, 5], ids=["an exit", "the full depth"])
def test_logits_that_are_not_finite_are_not_calibrated_on(
    tiny: Any, broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of Gemma 3 in half precision: NaN would become a threshold, or no exit would keep the promise."""
    real = TokenSequence.advance

    def advance(sequence: TokenSequence, exit_layer: int, *arguments: Any, **options: Any) -> Any:
        logits = real(sequence, exit_layer, *arguments, **options)
        return np.full_like(logits, np.nan) if exit_layer == broken else logits

    monkeypatch.setattr(TokenSequence, "advance", advance)
    with Engine.open(tiny.path) as engine, pytest.raises(InputError, match="the logits hold NaN or infinity"):
        compare_exits(engine, [list(range(3, 60))])


def test_a_bundle_without_thresholds_says_so(tiny: Any) -> None:
    with pytest.raises(BudgetError, match="this bundle has no thresholds: measure them with `balcony-edge calibrate"):
        balcony_edge.load(tiny.path, budget=Budget(policy="confident"))
    with balcony_edge.load(tiny.path) as llm:
        assert llm.quality == {2: (0, 0), 3: (0, 0)}


def test_thresholds_are_outside_the_fingerprint(calibrated: Path, tiny: Any) -> None:
    assert Bundle.open(calibrated).manifest.fingerprint == Bundle.open(tiny.path).manifest.fingerprint
    assert (
        json.loads((calibrated / "bundle.json").read_text())["confidence"]["thresholds"]["2"]["threshold"] == THRESHOLD
    )


def test_a_trace_of_early_exits_replays(calibrated: Path, tmp_path: Path) -> None:
    with balcony_edge.load(calibrated) as llm:
        llm.costs = COSTS
        llm.budget = Budget(policy="confident")
        with TraceWriter(tmp_path / "run.jsonl") as trace:
            exits = [token.exit_layer for token in llm.stream("a fox", max_new_tokens=60, ignore_eos=True, trace=trace)]
    assert set(exits) == {2, 5}
    trace_read = read_trace(tmp_path / "run.jsonl")
    assert [token.line.get("made_at", token.line["exit_layer"]) for token in trace_read] == exits
    said = json.loads(invoke_here("replay", tmp_path / "run.jsonl", "--json").stdout)
    assert said["exits"] == {str(layer): exits.count(layer) for layer in (2, 5)} and not said["differences"]
    assert len(trace_read) == 60 and any("sure at 2" in token.line["reason"] for token in trace_read)
    assert [again.exit_layer for again in replay(trace_read)] == [token.line["exit_layer"] for token in trace_read]


def test_trials_teach_the_slowdown(tiny: Any, tmp_path: Path) -> None:
    """Next to another program nearly every token may be a trial, and the target must be held all the same."""
    bundle = Path(shutil.copytree(tiny.path, tmp_path / "b"))
    record_confidence(bundle, spec(threshold=THRESHOLD, share=0.9), read_manifest(bundle).fingerprint)
    with balcony_edge.load(bundle, budget=Budget(tpot_ms=1e6, policy="confident")) as llm:
        units = [replace(unit, first_row_ms=1000 * unit.first_row_ms) for unit in (*COSTS.stages, *COSTS.balconies)]
        llm.costs = replace(COSTS, stages=tuple(units[:3]), balconies=tuple(units[3:]))  # seconds a token
        reply = llm.generate([1, 2], max_new_tokens=40, ignore_eos=True)
        exits = {token.exit_layer for token in reply.tokens if "sure at" in token.reason}
        learned = llm._requests._learned.state.slowdown
    assert exits == {2, 5}
    assert learned.factor < 0.5, "the tiny model is much faster than these prices"


@pytest.mark.parametrize(("threshold", "exit_layer", "further_ms"), [(0.0, 2, 0.0), (1.0, 5, 2 + 5 + 0.01 + 0.5)])
def test_a_trial_costs_what_it_has_run(tiny: Any, threshold: float, exit_layer: int, further_ms: float) -> None:
    """The try takes 1 + 0.3 + 0.5 ms, an unsure token also the deeper stages, and both Python's share once.

    The slowdown is learned from this price: one that is too low would take depth away on a calm device.
    """
    costs = replace(COSTS, overhead_ms=0.25)
    with Engine.open(tiny.path) as engine:
        sequence = engine.new_sequence(max_length=64)
        ids = sequence.advance(5, [1, 2, 3])[:, -1].argmax(-1)
        sequence.catch_up()  # the balconies too
        sampler = Sampler(SamplingParams(), np.array([[1, 2, 3]]), engine.manifest.model.vocab_size)
        turn = Turn(sequence, ids, sampler, Budget(policy="confident"), costs, math.inf, 1.0, 0, 9)
        made = EarlyExits(Confident(EXITS, spec(threshold=threshold))).attempt(turn)
    assert made is not None and made.exit_layer == exit_layer
    assert made.price_ms == pytest.approx(1.0 + 0.3 + 0.5 + 0.25 + further_ms)


def test_a_promise_that_slips_after_weeks_is_noticed() -> None:
    """What was checked long ago does not outweigh the text of now, and a check takes no longer than on the first day."""
    policy = Confident(EXITS, spec(share=0.5))
    for index in range(20_000):
        policy.check(2, agreed=index % 100 != 0)  # 1 %; the promise allows 4 % of the tokens that exit
    assert policy.thresholds[2] == 0.5 and policy._recent[2].checked < 5_000
    for index in range(3_000):
        policy.check(2, agreed=index % 5 != 0)  # 20 %
    assert policy.thresholds[2] > 0.5 and policy.telemetry[2] == (23_000, 800), "nothing of the telemetry is forgotten"


def test_early_tokens_do_not_make_the_full_depth_too_dear(tiny: Any, tmp_path: Path) -> None:
    """Without ``tpot_ms`` a step costs at most two full ones: beyond that the controller takes a shallower exit."""
    bundle = Path(shutil.copytree(tiny.path, tmp_path / "b"))
    record_confidence(bundle, spec(threshold=0.0, share=0.99), read_manifest(bundle).fingerprint)
    with balcony_edge.load(bundle) as llm:
        dear = [replace(unit, marginal_row_ms=unit.first_row_ms / 2) for unit in COSTS.stages]
        llm.costs = replace(COSTS, stages=tuple(dear))
        llm.budget = Budget(policy="confident", ttft_ms=1e6)
        tokens = list(llm.stream([1, 2], max_new_tokens=40, ignore_eos=True))
    assert {token.exit_layer for token in tokens} == {2, 5}
    assert all("sure at 2, asked" in token.reason for token in tokens if token.exit_layer == 2)
