"""Generation: the text of transformers, budgets that change between tokens, and every way to end."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.control.decision import Decision
from balcony_edge.control.governor import TICK_S
from balcony_edge.control.trace import TraceWriter, read_trace, replay
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BudgetError, ContextLengthError, InfeasibleError, InputError
from balcony_runtime.decoding import loop as decode_module
from balcony_runtime.decoding.loop import Decoder, Environment
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.llm import LLM


def hf_greedy(exported: Any, ids: list[int], count: int) -> list[int]:
    with torch.no_grad():
        out = exported.model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return [int(token) for token in out[0, len(ids) :]]


def test_full_depth_writes_what_transformers_writes(llm: LLM, tiny: Any) -> None:
    random = np.random.default_rng(8)
    for length in (1, 2, 17, 90):
        ids = random.integers(1, 320, length).tolist()
        reply = llm.generate(ids, max_new_tokens=40, ignore_eos=True)
        assert [token.id for token in reply.tokens] == hf_greedy(tiny, ids, 40)
        assert {token.exit_layer for token in reply.tokens} == {5}
        assert reply.prompt_tokens == length and reply.finish_reason == "length"


def test_each_exit_writes_what_its_own_logits_say(llm: LLM, tiny: Any) -> None:
    ids = [5, 6, 7, 8]
    for exit_layer in (2, 3):
        llm.budget = Budget(exit_layer=exit_layer)
        tokens = [token.id for token in llm.stream(ids, max_new_tokens=12, ignore_eos=True)]
        sequence = llm.engine.new_sequence(max_length=32)
        new, expected = list(ids), []
        for _ in range(12):
            expected.append(int(sequence.advance(exit_layer, new)[0, 0].argmax()))
            new = expected[-1:]
        assert tokens == expected


def test_a_reply_counts_what_it_cost(llm: LLM) -> None:
    reply = llm.generate([1, 2, 3], max_new_tokens=10, ignore_eos=True)
    assert len(reply.tokens) == 10 and reply.tokens_per_exit == {5: 10}
    assert reply.text == llm.generate([1, 2, 3], max_new_tokens=10, ignore_eos=True).text
    assert reply.ttft_ms == reply.tokens[0].latency_ms > 0
    assert reply.mean_tpot_ms == pytest.approx(sum(t.latency_ms for t in reply.tokens[1:]) / 9)
    assert reply.late_tokens == 0 and all(t.target_ms is None and t.predicted_ms is None for t in reply.tokens)
    assert [token.finish_reason for token in reply.tokens] == [None] * 9 + ["length"]
    assert llm.generate([1], max_new_tokens=1).mean_tpot_ms is None


def test_end_of_sequence_stops_and_has_no_text(llm: LLM, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [9, 10, 11]
    free = llm.generate(ids, max_new_tokens=20, ignore_eos=True)
    end = free.tokens[6].id
    first = [token.id for token in free.tokens].index(end)
    model = llm.engine.manifest.model.model_copy(update={"eos_token_ids": (end,)})
    monkeypatch.setattr(llm.engine, "manifest", llm.engine.manifest.model_copy(update={"model": model}))
    reply = llm.generate(ids, max_new_tokens=20)
    assert len(reply.tokens) == first + 1
    assert reply.finish_reason == "stop" and reply.tokens[-1].id == end
    assert reply.text == llm.codec.decode([token.id for token in free.tokens[:first]])


def test_budget_changes_take_effect_at_the_next_token(llm: LLM) -> None:
    exits = []
    for count, token in enumerate(llm.stream([1, 2, 3, 4], max_new_tokens=12, ignore_eos=True)):
        exits.append(token.exit_layer)
        if count == 3:
            llm.budget = Budget(exit_layer=2)
        if count == 7:
            llm.budget = Budget(max_exit=3)
    assert exits == [5] * 4 + [2] * 4 + [3] * 4


def test_a_budget_that_a_joint_decision_saw_first_takes_effect(llm: LLM) -> None:
    """A newcomer is judged next to the replies in progress. If it must wait, they go on alone."""
    with llm.stream([1, 2, 3, 4], max_new_tokens=9, ignore_eos=True) as stream:
        assert [next(stream).exit_layer for _ in range(3)] == [5] * 3
        llm.budget = Budget(exit_layer=2)
        (one,) = llm._requests.scheduler._streams.values()
        one.decoder.seen(one.key, 0.0)
        assert next(stream).exit_layer == 2


def test_switching_up_runs_the_pending_rows_and_says_so(llm: LLM) -> None:
    llm.budget = Budget(exit_layer=2)
    tokens = []
    for count, token in enumerate(llm.stream([1, 2, 3, 4], max_new_tokens=8, ignore_eos=True)):
        tokens.append(token)
        if count == 5:
            llm.budget = Budget()
    # When the sixth token is made, the prompt's four rows and five tokens are pending at stages 1 and 2.
    assert [token.pending_rows for token in tokens] == [4, 5, 6, 7, 8, 9, 0, 0]
    assert [token.caught_up_rows for token in tokens] == [0] * 6 + [18, 0]


def test_a_target_is_held_by_depth(llm: LLM) -> None:
    """With given prices the exits follow the target; benchmarks test the effect of the machine's noise."""
    units = (UnitCost(1.0, 0.001), UnitCost(1.0, 0.001), UnitCost(2.0, 0.001))
    costs = CostModel((2, 3, 5), units, (UnitCost(0.5),) * 3, UnitCost(0.5))
    llm.costs = costs
    for target, exit_layer in ((100.0, 5), (4.4, 3), (2.3, 2)):
        llm.budget = Budget(tpot_ms=target)
        first, second = llm.stream([1, 2], max_new_tokens=2, ignore_eos=True)
        assert (first.exit_layer, first.target_ms, second.target_ms) == (
            exit_layer,
            None,
            target,
        )  # its target is ttft_ms
        assert first.predicted_ms is None and not first.late
        assert first.decision.predicted_ms == pytest.approx(costs.steady_ms(exit_layer, 0), rel=0.2)
    llm.budget = Budget(tpot_ms=0.01, on_infeasible="error")
    with pytest.raises(
        InfeasibleError, match=r"infeasible: tpot_ms = 0\.01: a step takes 2\.0 ms at the shallowest exit"
    ):
        next(iter(llm.stream([1, 2], max_new_tokens=1)))
    llm.budget = Budget(tpot_ms=0.01)
    reply = llm.generate([1, 2], max_new_tokens=3, ignore_eos=True)
    assert reply.tokens_per_exit == {2: 3} and reply.late_tokens == 2


def test_backlog_is_worked_off_beside_the_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a shallow start under a generous target, chunks lead to the full depth, and results stay exact."""
    unit = UnitCost(10.0, 1.0)
    llm.costs = CostModel((2, 3, 5), (unit,) * 3, (UnitCost(1.0),) * 3, UnitCost(1.0))
    clock = SimpleNamespace(
        perf_counter_ns=iter(range(0, 10**15, 30_000_000)).__next__, monotonic=time.monotonic
    )  # every step takes 30 ms
    monkeypatch.setattr(decode_module, "time", clock)
    llm.budget = Budget(exit_layer=2)
    tokens = []
    for count, token in enumerate(llm.stream(list(range(1, 100)), max_new_tokens=60, ignore_eos=True)):
        tokens.append(token)
        if count == 3:
            llm.budget = Budget(tpot_ms=60.0, dwell_tokens=0)
    assert tokens[-1].exit_layer == 5 and tokens[-1].pending_rows == 0
    chunked = [token for token in tokens if token.caught_up_rows and token.exit_layer < 5]
    assert chunked and all("catching up" in token.reason for token in chunked)
    assert sum(token.caught_up_rows for token in tokens) >= 2 * 102  # all pending rows of stages 1 and 2


def test_prompts_that_do_not_fit(llm: LLM) -> None:
    with pytest.raises(
        ContextLengthError,
        match=r"256 tokens and a reply needs one more: this exceeds the available context size \(256 in this bundle\)",
    ):
        llm.stream([1] * 256)
    reply = llm.generate([1] * 250, ignore_eos=True)
    assert len(reply.tokens) == 6 and reply.finish_reason == "length"
    for count in (0, -3):
        with pytest.raises(InputError, match=f"max_new_tokens = {count}"):
            llm.stream([1], max_new_tokens=count)
    with pytest.raises(InputError, match="token 99999"):
        list(llm.stream([99999]))
    penalty = SamplingParams(repetition_penalty=1.1)
    for token in (99999, -1):
        with pytest.raises(InputError, match=f"token {token}: the vocabulary has 0 to"):
            llm.stream([1, token], sampling=penalty)
    with pytest.raises(InputError, match="the prompt is empty"):
        llm.stream("")
    short = llm.engine.new_sequence(max_length=8)
    tokens = list(llm.stream([1, 2, 3], sequence=short, ignore_eos=True))
    assert len(tokens) == 5 and tokens[-1].finish_reason == "length"
    with pytest.raises(ContextLengthError, match=r"\(8 in this sequence\): shorten the prompt, or give it a larger"):
        llm.stream([1] * 8, sequence=short)


def test_budgets_that_fit_no_exit_are_refused(llm: LLM, tiny: Any) -> None:
    with pytest.raises(BudgetError, match="exit_layer = 4, but this bundle has exits 2, 3, 5"):
        llm.budget = Budget(exit_layer=4)
    assert llm.budget == Budget()
    with pytest.raises(BudgetError, match="min_exit = 6"):
        balcony_edge.load(tiny.path, budget=Budget(min_exit=6))


def test_sampling_is_reproducible(llm: LLM) -> None:
    def draw(seed: int) -> list[int]:
        sampling = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        return [token.id for token in llm.stream([3, 4], max_new_tokens=20, sampling=sampling, ignore_eos=True)]

    assert draw(1) == draw(1) != draw(2)


def test_text_and_chat_prompts(llm: LLM) -> None:
    chat = llm.generate([{"role": "user", "content": "the fox"}], max_new_tokens=8)
    assert chat.text == llm.generate("the fox", max_new_tokens=8).text
    assert chat.prompt_tokens == len(llm.encode("the fox"))
    raw = llm.generate("the fox", max_new_tokens=8, chat=False)
    assert raw.prompt_tokens == len(llm.encode("the fox", chat=False)) < chat.prompt_tokens


def test_calibration_prices_every_graph(llm: LLM) -> None:
    costs = measure_prices(llm.engine)
    assert costs.exits == (2, 3, 5)
    assert all(unit.first_row_ms > 0 for unit in (*costs.stages, *costs.balconies, costs.head))
    shallow, middle, full = (costs.steady_ms(exit_layer, 100) for exit_layer in costs.exits)
    assert shallow > 0 and shallow < full * 10 and middle < full * 10


def test_prices_can_be_given_and_must_be_for_the_bundles_exits(llm: LLM) -> None:
    given = prices()
    llm.costs = given
    llm.budget = Budget(tpot_ms=5.0)
    assert llm.costs is given
    other = CostModel((4, 5), (UnitCost(1.0),) * 2, (UnitCost(1.0),) * 2, UnitCost(1.0))
    with pytest.raises(
        InputError, match="costs: are for exits 4, 5, but this bundle has 2, 3, 5: give prices of the same"
    ):
        llm.costs = other
    assert llm.costs is given


def test_the_library_logs_and_prints_nothing(
    tiny: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        caplog.at_level("INFO", "balcony_runtime"),
        balcony_edge.load(tiny.path, budget=Budget(tpot_ms=900.0)) as loaded,
    ):
        loaded.generate("the fox", max_new_tokens=3)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("balcony_runtime")]
    assert any("exits (2, 3, 5)" in message for message in messages)
    assert any(message.startswith("measured what a token costs: exit 2: ") for message in messages)
    assert capfd.readouterr() == ("", "")


def prices(step_ms: float = 1.0) -> CostModel:
    """Fixed prices of the tiny model's graphs, so that decisions do not depend on this machine."""
    unit = UnitCost(step_ms, step_ms / 100)
    return CostModel((2, 3, 5), (unit,) * 3, (UnitCost(step_ms / 2),) * 3, UnitCost(step_ms / 2))


def test_pace_waits_and_the_wait_goes_to_the_backlog(llm: LLM) -> None:
    llm.costs = prices()
    sequence = llm.engine.new_sequence(max_length=120)
    llm.budget = Budget(exit_layer=2)
    list(llm.stream(list(range(1, 61)), max_new_tokens=10, ignore_eos=True, sequence=sequence))
    assert sequence.stage_rows[-1] > 60
    llm.budget = Budget(max_pace_tps=20, max_exit=2)
    prompt = sequence.tokens[0].tolist()
    begin = time.perf_counter()
    tokens = list(llm.stream(prompt, max_new_tokens=8, ignore_eos=True, sequence=sequence))
    assert time.perf_counter() - begin >= 7 * 0.05
    assert {token.decision.period_ms for token in tokens[1:]} == {50}
    assert {token.exit_layer for token in tokens} == {2}
    assert min(token.pending_rows for token in tokens[-4:]) == 0  # although no deeper exit was used
    assert sum(token.caught_up_rows for token in tokens) > 60


def test_a_paced_stream_is_cancelled_in_the_middle_of_a_wait(llm: LLM) -> None:
    llm.costs = prices()
    llm.budget = Budget(max_pace_tps=0.05)  # a token every 20 s
    stream = llm.stream([1, 2, 3], max_new_tokens=5, ignore_eos=True)
    next(stream)
    threading.Timer(0.2, stream.cancel).start()
    begin = time.perf_counter()
    rest = list(stream)
    assert time.perf_counter() - begin < 10
    assert rest == [] and stream.reply.finish_reason == "cancelled"


def test_a_cancelled_wait_is_not_spent_on_backlog(llm: LLM) -> None:
    llm.budget = Budget(exit_layer=2)
    sequence = llm.engine.new_sequence()
    sequence.advance(2, [list(range(1, 200))])
    cancelled = threading.Event()
    cancelled.set()
    decision = Decision(2, 1.0, 1.0, period_ms=5000.0, idle_ms=5000.0)
    environment = Environment(lambda: (Budget(), None), tuple, llm._learned, 1, sleep=cancelled.wait)
    sampler = Sampler(SamplingParams(), np.zeros((1, 0), np.int64), 100)
    decoder = Decoder(sequence, np.zeros((1, 1), np.int64), sampler, environment)
    begin, waiting = time.perf_counter_ns(), sequence.pending_rows
    assert waiting > 100 and decoder._wait(decision, begin + 5 * 10**9) < 10**9
    assert sequence.pending_rows == waiting and time.perf_counter_ns() - begin < 10**9


def test_ceilings_are_held_by_what_the_sensors_say(tiny: Any) -> None:
    """Readings of a board without a fan; the real sensors have tests of their own."""

    def hot() -> tuple[Reading, ...]:
        return (Reading("board", "board", time.monotonic(), watts=9.0, celsius=80.0),)

    with balcony_edge.load(tiny.path) as plain, LLM(plain.engine, plain.codec, Budget(), readings=hot) as llm:
        llm.costs = prices()
        llm.budget = Budget(temperature_c=70, min_pace_tps=300)
        tokens = list(llm.stream([1, 2, 3], max_new_tokens=80, ignore_eos=True))
        assert "limited by temperature_c" in tokens[-1].reason
        assert tokens[-1].decision.period_ms == pytest.approx(
            1000 / 300
        )  # too hot for any pace, so the slowest one is used
        llm.budget = Budget(power_w=5, power_rail="gpu")
        time.sleep(2 * TICK_S)  # the slow loop runs again
        reasons = {token.reason for token in llm.stream([1, 2, 3], max_new_tokens=4, ignore_eos=True)}
        assert all("no reading for power_w: not held" in reason for reason in reasons)


def test_the_last_token_counts_for_the_ceilings(tiny: Any) -> None:
    """A reply of one token: the readings of its decision are those of an idle device."""
    asked = 0

    def readings() -> tuple[Reading, ...]:
        nonlocal asked
        asked += 1
        return (Reading("board", "board", time.monotonic(), watts=4.0 if asked < 3 else 40.0),)

    with balcony_edge.load(tiny.path) as plain, LLM(plain.engine, plain.codec, Budget(), readings=readings) as llm:
        llm.costs = prices()
        reply = llm.generate([1, 2, 3], budget=Budget(power_w=30), max_new_tokens=1)
        (verdict,) = (one for one in reply.verdicts if one.key == "power_w")
        assert asked == 3 and (verdict.held, verdict.reached) == (True, 22.0), "the mean of before and after"


def test_a_ceiling_that_nothing_measures_is_said_counted_and_refused(
    tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def warm() -> tuple[Reading, ...]:
        return (Reading("board", "board", time.monotonic(), celsius=50.0),)

    with balcony_edge.load(tiny.path) as plain, LLM(plain.engine, plain.codec, Budget(), readings=warm) as llm:
        llm.budget = Budget(power_w=5, temperature_c=70)
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            "power_w = 5: no sensor of this device measures it (`balcony-edge doctor` says what is missing): it is not held"
        ]
        reply = llm.generate([1, 2, 3], max_new_tokens=6, ignore_eos=True)
        assert reply.unseen_tokens == 6
        verdicts = {verdict.key: verdict for verdict in reply.verdicts}
        assert (verdicts["power_w"].held, verdicts["temperature_c"].held) == (None, True)
        assert (verdicts["temperature_c"].reached, verdicts["temperature_c"].asked) == (50.0, 70)
        before = llm.budget
        for refused in (Budget(power_w=5, on_infeasible="error"), Budget(memory_mb=9.0, on_infeasible="error")):
            with pytest.raises(
                InfeasibleError, match=r"^(power_w = 5|memory_mb = 9): no sensor of this device measures it"
            ):
                llm.budget = refused
        assert llm.budget is before
        llm.budget = Budget(temperature_c=70, on_infeasible="error")
        assert llm.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True).unseen_tokens == 0


def test_a_reply_says_whether_its_budget_was_held(llm: LLM) -> None:
    llm.costs = prices(step_ms=0.2)
    llm.budget = Budget(tpot_ms=5000.0, ttft_ms=1e-3, memory_mb=1e6)
    with llm.stream([1, 2, 3], max_new_tokens=8, ignore_eos=True) as stream:
        gaps = [token.latency_ms for token in stream]
        verdicts = {verdict.key: verdict for verdict in stream.reply.verdicts}
    assert (verdicts["tpot_ms"].held, verdicts["tpot_ms"].reached) == (True, sorted(gaps[1:])[6])
    assert (verdicts["ttft_ms"].held, verdicts["ttft_ms"].reached) == (False, gaps[0])
    assert verdicts["memory_mb"].held and (verdicts["memory_mb"].reached or 0) > 10
    llm.budget = Budget(critical_temperature_c=125)  # above that of any computer
    assert llm.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True).verdicts[0].key == "critical_temperature_c"


def test_a_recorded_run_replays(llm: LLM, tmp_path: Path) -> None:
    llm.costs = prices(step_ms=0.2)
    llm.budget = Budget(tpot_ms=1.0, ttft_ms=50.0, dwell_tokens=2, cpu_utilization=0.99)
    with TraceWriter(tmp_path / "run.jsonl") as trace:
        tokens = []
        for token in llm.stream([1, 2, 3, 4], max_new_tokens=60, ignore_eos=True, trace=trace):
            tokens.append(token)
            if len(tokens) == 30:
                llm.budget = Budget(tpot_ms=0.5)
    recorded = read_trace(tmp_path / "run.jsonl")
    assert [token.line["exit_layer"] for token in recorded] == [token.exit_layer for token in tokens]
    assert [token.line["latency_ms"] for token in recorded] == [token.latency_ms for token in tokens]
    again = list(replay(recorded))
    bare = [[decided._replace(words=()) for decided in run] for run in (again, [token.decision for token in tokens])]
    assert bare[0] == bare[1]  # everything except the wording
    assert [decision.reason for decision in again] == [token.reason for token in tokens]
    assert any(token.seen.readings for token in recorded)


def test_least_agreement_needs_an_evaluated_bundle(llm: LLM) -> None:
    with pytest.raises(
        BudgetError, match=r"^min_agreement = 0\.5, but this bundle was not evaluated: run `balcony-edge"
    ):
        llm.budget = Budget(min_agreement=0.5)
    assert llm.budget == Budget()


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda llm: llm.generate(b"hi"), InputError, "prompt of type bytes: give a text, messages or token ids"),
        (lambda llm: llm.generate(bytearray(b"hi")), InputError, "prompt of type bytearray"),
        (lambda llm: llm.generate(None), InputError, "prompt of type NoneType"),
        (lambda llm: llm.generate(5), InputError, "prompt of type int"),
        (lambda llm: llm.encode(None), InputError, "prompt of type NoneType"),
        (lambda llm: llm.decode([5, -1]), InputError, "token -1: the vocabulary has 0 to 319"),
        (lambda llm: llm.decode([2**40]), InputError, "token 1099511627776: the vocabulary has 0 to 319"),
        (lambda llm: llm.decode([1.5]), InputError, "tokens of type float64: must be integers"),
        (lambda llm: llm.generate_batch("ab", max_new_tokens=2), InputError, "prompts: one text: give a list"),
        (lambda llm: llm.stream("hi", sampling={"top_k": 1}), InputError, "sampling = .*: must be SamplingParams"),
        (
            lambda llm: llm.stream("hi", max_new_tokens=0),
            InputError,
            "max_new_tokens = 0: must be at least 1: give the largest number of tokens to make",
        ),
        (lambda llm: llm.stream("hi", max_new_tokens=2.5), InputError, "max_new_tokens = 2.5: must be a whole number"),
        (lambda llm: llm.stream("hi", max_new_tokens="2"), InputError, "max_new_tokens = '2': must be a whole number"),
        (lambda llm: llm.generate_batch([[1]], max_new_tokens=2.5), InputError, "max_new_tokens = 2.5"),
        (lambda llm: llm.generate_batch(7, max_new_tokens=2), InputError, "prompts: of type int: give a list"),
        (
            lambda llm: llm.generate_batch(["a"], max_new_tokens=2, budget=5),
            BudgetError,
            "budget = 5: must be a Budget",
        ),
        (
            lambda llm: llm.generate_batch(["a"], max_new_tokens=2, budget={}),
            BudgetError,
            "budget = .*: must be a Budget",
        ),
        (lambda llm: llm.stream("hi", logprobs=1.5), InputError, "logprobs = 1.5: must be a whole number"),
        (lambda llm: llm.stream("hi", stop=None), InputError, "stop = None: must be a list of non-empty strings"),
        (lambda llm: llm.stream([5, 2.9]), InputError, "prompt: token ids and something else"),
        (lambda llm: llm.stream([5, float("inf")]), InputError, "prompt: token ids and something else"),
        (lambda llm: llm.stream("hi", stop=iter(["a", ""])), InputError, "must be a list of non-empty strings"),
        (lambda llm: next(llm.together().add("hi")), InputError, "Together.step\\(\\) brings its tokens"),
        (lambda llm: llm.chat(system=5), InputError, "system of type int: give a text"),
        (lambda llm: llm.chat().send(5), InputError, "message of type int: give a text"),
        (lambda llm: setattr(llm, "budget", "nowhere.toml"), BudgetError, "nowhere.toml: there is no such file"),
        (lambda llm: setattr(llm, "budget", {"tpot_ms": 5}), BudgetError, "budget = .*: must be a Budget, the path of"),
        (
            lambda llm: setattr(llm.budget, "tpot_ms", 4),
            BudgetError,
            "tpot_ms = 4: a budget does not change: set a new",
        ),
    ],
)
def test_arguments_of_another_kind_are_one_line(tiny_llm: LLM, call: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern) as caught:
        call(tiny_llm)
    assert "\n" not in str(caught.value)


def test_a_budget_may_be_set_as_it_is_loaded(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "shallow.toml").write_text("exit_layer = 2\n")
    with balcony_edge.load(tiny.path) as llm:
        llm.budget = tmp_path / "shallow.toml"
        assert llm.budget == Budget(exit_layer=2)
        llm.budget = None
        assert llm.budget == Budget()


def test_a_closed_bundle_is_one_line(tiny: Any) -> None:
    llm = balcony_edge.load(tiny.path)
    left = llm.stream("the fox", max_new_tokens=9, ignore_eos=True)
    next(left)
    chat = llm.chat()
    llm.close()
    for call in (
        lambda: next(left),
        lambda: next(chat.send("hi")),
        lambda: llm.generate("hi"),
        llm.chat,
        lambda: llm.costs,
        lambda: setattr(llm, "budget", Budget(tpot_ms=5)),
    ):
        with pytest.raises(InputError, match="this bundle was closed: load it again"):
            call()


def test_counts_may_be_integers_of_numpys_and_no_truth_values(llm: LLM) -> None:
    """Small ones overflow: 127 + 1 is -128 in eight bits, and the reply had no tokens."""
    reply = llm.generate([1, 2, 3], max_new_tokens=np.int8(127), ignore_eos=True)
    assert len(reply.tokens) == 127 and reply.finish_reason == "length"
    (token,) = llm.generate([1, 2, 3], max_new_tokens=1, logprobs=np.uint8(2), ignore_eos=True).tokens
    assert len(token.top_logprobs) == 2
    logits = llm.engine.new_sequence().advance(5, [1] * 200, num_logits=np.int8(2))
    assert logits.shape[:2] == (1, 2)
    for options in ({"logprobs": False}, {"max_new_tokens": True}):
        with pytest.raises(InputError, match="must be a whole number"):
            llm.stream([1, 2, 3], **options)


def test_arrays_without_an_axis_are_no_prompts(llm: LLM) -> None:
    other: Any
    for other in (np.array("the fox"), np.array(5)):  # a text and a token that went through NumPy
        with pytest.raises(InputError, match="prompt of type ndarray: give a text, messages or token ids"):
            llm.stream(other)
