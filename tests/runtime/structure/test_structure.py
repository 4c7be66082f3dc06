"""Structured replies: always valid, the masked model's own tokens and distribution, forced tokens for free, clear refusals."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import psutil
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.errors import InputError
from balcony_runtime.decoding.confident import Trial
from balcony_runtime.decoding.policy import Made, Turn
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.structure.asked import structure_of
from balcony_runtime.structure.grammar import Grammars, Guide
from benchmarks.serving import schemas
from tests.support.properties import CHANCE, examples

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PROMPT = [5, 9, 17, 33, 60]
END = 0
#: Prices under which rounds of drafts always pay.
CHEAP_DRAFTS = CostModel(
    (2, 3, 5), (UnitCost(1.0, 0.01), UnitCost(50.0, 0.01), UnitCost(50.0, 0.01)), (UnitCost(0.1),) * 3, UnitCost(0.1)
)


@pytest.fixture(scope="module")
def llm(tiny: Any) -> Iterator[LLM]:
    with balcony_edge.load(tiny.path) as loaded:
        loaded.costs = CHEAP_DRAFTS
        yield loaded


@pytest.fixture(autouse=True)
def full_depth(llm: LLM) -> None:
    llm.budget = Budget()


def guide_of(grammars: Grammars, **asked: Any) -> Guide:
    found = structure_of(**asked)
    assert found is not None
    return grammars.guide(found)


def naive(engine: Engine, guide: Guide, exit_layer: int, most: int = 90) -> list[int]:
    """The likeliest allowed token at every place, each from a pass over the whole text."""
    tokens: list[int] = []
    while len(tokens) < most:
        logits = engine.new_sequence(max_length=200).advance(exit_layer, [*PROMPT, *tokens])[0, -1]
        allowed = guide.allowed()
        assert allowed is not None
        tokens.append(int(np.where(allowed, logits, -np.inf).argmax()))
        guide.accept(tokens[-1])
        if tokens[-1] == END:
            break
    return tokens


def ids(llm: LLM, params: SamplingParams, **options: Any) -> list[int]:
    return [token.id for token in llm.stream(PROMPT, sampling=params, max_new_tokens=90, **options)]


STRUCTURES: list[dict[str, Any]] = [
    {"json_schema": PERSON},
    {"regex": "(the|quick|brown){2,5} (fox|dog)[0-9]{1,3}"},
    {"grammar": 'start: "the " animal ("," animal)~1..3 "."\nanimal: "fox" | "dog" | "balcony"'},
]


@pytest.mark.parametrize("asked", STRUCTURES, ids=lambda one: next(iter(one)))
@pytest.mark.parametrize(
    "budget",
    [Budget(), Budget(exit_layer=2), Budget(policy="lossless"), Budget(tpot_ms=1e6), Budget(max_pace_tps=1e5)],
    ids=["plain", "exit 2", "lossless", "target", "pace"],
)
def test_greedy_replies_are_the_masked_models(
    llm: LLM, grammars: Grammars, budget: Budget, asked: dict[str, Any]
) -> None:
    """Forced tokens that wait as pending rows, and drafts under a mask, change nothing."""
    exit_layer = budget.exit_layer or 5
    wanted = naive(llm.engine, guide_of(grammars, **asked), exit_layer)
    reply = llm.generate(PROMPT, sampling=SamplingParams(**asked), budget=budget, max_new_tokens=90)
    assert [token.id for token in reply.tokens] == wanted
    assert reply.finish_reason == "stop" and wanted[-1] == END
    assert reply.forced_tokens + sum(reply.tokens_per_exit.values()) == len(wanted)
    assert (reply.forced_tokens > 0) == (budget.max_pace_tps is None)


def test_drafts_are_used_and_refused_under_a_mask(llm: LLM, grammars: Grammars) -> None:
    """A structure with little that is forced: most of its tokens come from rounds, and all are the masked model's."""
    asked = {"regex": "[a-z ]{60,80}"}
    wanted = naive(llm.engine, guide_of(grammars, **asked), 5)
    reply = llm.generate(PROMPT, sampling=SamplingParams(**asked), budget=Budget(policy="lossless"), max_new_tokens=90)
    assert [token.id for token in reply.tokens] == wanted
    assert sum(token.decision.drafted > 0 for token in reply.tokens) > len(wanted) / 2


def test_a_reply_that_was_cut_leaves_no_rows_of_tokens_that_were_not_told(llm: LLM) -> None:
    """The limit falls into a run of forced tokens, whose rows were there already."""
    prompt = PROMPT * 8  # shorter sequences are not kept
    for count in (2, 3, 4):
        reply = llm.generate(prompt, sampling=SamplingParams(json_schema=PERSON), max_new_tokens=count)
        assert reply.tokens[-1].forced and llm.pool is not None
        tokens = [*prompt, *(token.id for token in reply.tokens)]
        assert llm.pool.forget(tokens) == len(tokens) - 1


def test_a_reply_that_ends_in_its_first_step_leaves_no_rows_of_forced_tokens(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client goes away while the prompt runs, so none of its tokens is told."""
    prompt = PROMPT * 8
    stream = llm.stream(prompt, sampling=SamplingParams(json_schema=PERSON))
    forced = stream.request.sampler.forced

    def gone(most: int) -> list[int]:
        stream.cancel()
        return forced(most)

    monkeypatch.setattr(stream.request.sampler, "forced", gone)
    assert list(stream) == [] and llm.pool is not None
    assert llm.pool.forget(prompt) == len(prompt)


def test_forced_tokens_run_no_engine(llm: LLM) -> None:
    """They come with the token before, wait as pending rows, and run with the next token that needs logits."""
    tokens = list(llm.stream(PROMPT, sampling=SamplingParams(json_schema=PERSON)))
    assert tokens[0].forced is False and tokens[1].forced
    run, runs = 0, []
    for before, token in itertools.pairwise(tokens):
        if token.forced:
            assert token.latency_ms == 0 and token.exit_layer == before.exit_layer and token.pending_rows > 0
            run += 1
            continue
        # The token before the run and all of the run except its last were pending in three stages.
        assert token.caught_up_rows == 3 * run
        runs, run = [*runs, run], 0
    assert max(runs) >= 3 and tokens[-1].forced  # the end of sequence is forced, too


def test_sampled_replies_are_valid_and_end_by_themselves(llm: LLM) -> None:
    check = jsonschema_rs.validator_for(PERSON)
    texts = set()
    for seed in range(12):
        budget = [Budget(), Budget(policy="lossless"), Budget(exit_layer=3), Budget(policy="speculative")][seed % 4]
        params = SamplingParams(json_schema=PERSON, temperature=1.0, top_p=0.95, seed=seed, frequency_penalty=0.3)
        reply = llm.generate(PROMPT, sampling=params, budget=budget)
        assert reply.finish_reason == "stop"
        check.validate(json.loads(reply.text))
        texts.add(reply.text)
    assert len(texts) > 6


@pytest.mark.hypothesis
def test_forced_tokens_are_those_of_masks_with_one_token(grammars: Grammars) -> None:
    """Random walks through random schemas: ``forced`` gives what single-token masks would have given."""
    forced = 0

    @examples(15)
    @given(CHANCE)
    def property_holds(chance: random.Random) -> None:
        nonlocal forced
        quick = guide_of(grammars, json_schema=schemas.schema(chance))
        slow = quick.fork()
        for _ in range(60):
            for token in quick.forced(100):
                allowed = slow.allowed()
                assert allowed is not None and np.flatnonzero(allowed).tolist() == [token]
                slow.accept(token)
                forced += 1
            allowed = quick.allowed()
            if allowed is None:
                break
            token = int(chance.choice(np.flatnonzero(allowed)))
            quick.accept(token)
            slow.accept(token)

    property_holds()
    assert forced > 300


class Masks(Guide):
    """A guide whose masks are given: token → which may follow."""

    def __init__(self, masks: np.ndarray, last: int = 0) -> None:
        self._masks, self._last = masks, last

    def allowed(self) -> Any:
        return self._masks[self._last]

    def permits(self, token: int) -> bool:
        return bool(self._masks[self._last][token])

    def accept(self, token: int) -> None:
        assert self._masks[self._last][token]
        self._last = token

    def forced(self, most: int) -> list[int]:
        return []

    def fork(self) -> Masks:
        return Masks(self._masks, self._last)


def test_a_sampled_draft_has_the_masked_models_distribution() -> None:
    """Chi-square over 6,000 draws of two tokens, drafted from q and judged by p under masks that follow the first token."""
    random = np.random.default_rng(0)
    logits_q, logits_p = random.normal(size=(2, 6)).astype(np.float32) * 1.5
    masks = random.random((6, 6)) < 0.6
    masks[:, 1] = True
    params = SamplingParams(temperature=0.9, seed=1)
    counts, random_numbers = np.zeros((6, 6)), None
    for _ in range(6_000):
        sampler = Sampler(params, np.zeros((1, 1), np.int64), 6, [Masks(masks)])
        random_numbers = random_numbers or sampler._random
        sampler._random = random_numbers
        drafter = sampler.fork()
        first, second = drafter.propose(logits_q), drafter.propose(logits_q)
        token = sampler.judge(logits_p, first)
        next_token = sampler.judge(logits_p, second) if token == first.token else int(sampler.pick(logits_p[None])[0])
        counts[token, next_token] += 1

    def law(row: np.ndarray) -> np.ndarray:
        weights = np.where(row, np.exp(logits_p.astype(float) / 0.9), 0)
        return weights / weights.sum()

    wanted = 6_000 * law(masks[0])[:, None] * np.array([law(row) for row in masks])
    assert counts[wanted == 0].sum() == 0
    kept = wanted > 5
    statistic = float(((counts[kept] - wanted[kept]) ** 2 / wanted[kept]).sum())
    assert kept.sum() > 8 and statistic < kept.sum() + 4 * np.sqrt(2 * kept.sum())


def test_a_sure_balcony_may_not_break_the_structure(llm: LLM, grammars: Grammars, monkeypatch: Any) -> None:
    """An early exit is taken only if the balcony's likeliest token is allowed; else the full depth is asked."""
    confident = llm._learned.confident
    monkeypatch.setattr(confident, "spec", type("Spec", (), {"measure": "top1", "max_disagreement": 0.02}))
    monkeypatch.setattr(confident, "plan", lambda *_: Trial(2, 0.0, 2.0))  # every balcony is sure enough
    monkeypatch.setattr(confident, "learn", lambda *_: None)
    monkeypatch.setattr(llm.engine, "manifest", llm.engine.manifest.model_copy(update={"confidence": object()}))
    reply = llm.generate(PROMPT, sampling=SamplingParams(json_schema=PERSON), budget=Budget(policy="confident"))
    jsonschema_rs.validator_for(PERSON).validate(json.loads(reply.text))
    guide = guide_of(grammars, json_schema=PERSON)
    engine, before, exits = llm.engine, list(PROMPT), []
    for token in reply.tokens:
        allowed = guide.allowed()
        if not token.forced and before != PROMPT:
            likeliest = int(engine.new_sequence(max_length=200).advance(2, before)[0, -1].argmax())
            assert allowed is not None and token.exit_layer == (2 if allowed[likeliest] else 5)
            exits.append(token.exit_layer)
        guide.accept(token.id)
        before.append(token.id)
    assert set(exits) == {2, 5}


def test_replies_in_company_are_those_alone(llm: LLM) -> None:
    """A batch, and streams of several threads, with and without a structure."""
    prompts = [PROMPT, [8, 9, 10], [40, 41, 42, 43]]
    params = SamplingParams(json_schema=PERSON)
    alone = [llm.generate(prompt, sampling=params, max_new_tokens=90).text for prompt in prompts]
    assert llm.generate_batch(prompts, sampling=params, max_new_tokens=90) == alone
    rows = [[*prompt, 7][:4] for prompt in prompts]
    alone_too = [llm.generate(prompt, sampling=params, max_new_tokens=90).text for prompt in rows]
    requests = [llm._requests.of(row, sampling=params, max_new_tokens=90) for row in rows]
    assert llm._lockstep.texts(requests, params) == alone_too
    free = llm.generate(PROMPT, max_new_tokens=40, ignore_eos=True).text
    found: dict[int, str] = {}

    def reply(place: int) -> None:
        options: Any = {"max_new_tokens": 40, "ignore_eos": True} if place == 3 else {"sampling": params}
        found[place] = llm.generate(PROMPT if place == 3 else prompts[place], **options).text

    threads = [threading.Thread(target=reply, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {**dict(enumerate(alone)), 3: free}


def test_the_limit_cuts_a_structure_as_any_reply(llm: LLM) -> None:
    params = SamplingParams(json_schema=PERSON)
    whole = ids(llm, params)
    for most in range(1, len(whole)):
        reply = llm.generate(PROMPT, sampling=params, max_new_tokens=most)
        assert [token.id for token in reply.tokens] == whole[:most] and reply.finish_reason == "length"
    sequence = llm.engine.new_sequence(max_length=len(PROMPT) + 4)  # a sequence without room for all that is forced
    assert ids(llm, params, sequence=sequence) == whole[:4]
    sequence = llm.engine.new_sequence()  # one with room: tokens after the last one are not made
    with llm.stream(PROMPT, sampling=params, max_new_tokens=2, sequence=sequence) as stream:
        next(stream)
        assert sequence.length <= len(PROMPT) + 1


def test_tokens_after_the_last_one_are_not_made_after_several_at_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(turn: Turn) -> Made | None:
        """A round whose only draft is kept."""
        if turn.left < 2:
            return None
        found = [turn.ids]
        for _ in range(2):
            found.append(turn.sampler.pick(turn.sequence.step(5, found[-1])))
        return Made(found[1:], [None, None], 5)

    monkeypatch.setattr(llm._learned.speculator, "attempt", two)
    params, budget = SamplingParams(json_schema=PERSON), Budget(policy="lossless")
    for most in range(2, len(ids(llm, params))):
        sequence = llm.engine.new_sequence()
        with llm.stream(PROMPT, sampling=params, max_new_tokens=most, budget=budget, sequence=sequence) as stream:
            for _ in range(most - 1):
                next(stream)
            assert sequence.length <= len(PROMPT) + most - 1


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    """With log-probabilities every token runs through the model, so that each has its own."""
    params = SamplingParams(json_schema=PERSON)
    tokens = list(llm.stream(PROMPT, sampling=params, logprobs=2))
    assert [token.id for token in tokens] == ids(llm, params) and not any(token.forced for token in tokens)
    logits = llm.engine.new_sequence(max_length=200).advance(5, [*PROMPT, tokens[0].id])[0, -1].astype(float)
    expected = logits[tokens[1].id] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert tokens[1].logprob == pytest.approx(expected, abs=1e-4)


def test_a_seed_gives_the_same_text_with_log_probabilities(llm: LLM) -> None:
    """Forced tokens draw no number, whether they run through the model or not."""
    for seed in range(4):
        params = SamplingParams(temperature=1.0, seed=seed, json_schema=PERSON)
        whole = [token.id for token in llm.stream(PROMPT, sampling=params, logprobs=0)]
        assert ids(llm, params) == whole


def test_a_chat_goes_on_after_a_structured_turn(llm: LLM) -> None:
    chat = llm.chat()
    for _ in chat.send("the fox", sampling=SamplingParams(regex="(fox|dog) and balcony")):
        pass
    history = [*chat.messages, {"role": "user", "content": "the dog"}]
    free = [token.id for token in chat.send("the dog", max_new_tokens=12, ignore_eos=True)]
    assert free == [token.id for token in llm.stream(history, max_new_tokens=12, ignore_eos=True)]


class Person(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=4)
    age: int = pydantic.Field(ge=0, le=9)


@pytest.mark.parametrize("form", [Person, json.dumps(Person.model_json_schema()), Person.model_json_schema()])
def test_the_forms_of_a_schema(llm: LLM, form: Any) -> None:
    text = llm.generate(PROMPT, sampling=SamplingParams(json_schema=form, temperature=1.0, seed=4)).text
    Person.model_validate_json(text)


def test_llama_cpps_grammars(llm: LLM) -> None:
    grammar = 'root ::= "the " animal\nanimal ::= "fox" | "dog"'
    assert llm.generate(PROMPT, sampling=SamplingParams(grammar=grammar)).text in {"the fox", "the dog"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a", "json_schema": {}}, "json_schema and regex: a reply has one structure: give one of them"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: \\["uniqueItems"\\]'),
        ({"json_schema": 3}, "json_schema = 3: must be a JSON object"),
        ({"json_schema": {"a": object()}}, "json_schema: is not JSON"),
        ({"regex": 3}, "regex = 3: must be a text"),
        ({"regex": "a" * 300_000}, "regex: has 300,000 characters; at most 256,000"),
    ],
)
def test_what_is_refused(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm.generate(PROMPT, sampling=SamplingParams(**options))


def test_a_structure_ends_a_reply_itself(llm: LLM) -> None:
    with pytest.raises(InputError, match="ignore_eos: the structure of a reply decides where it ends"):
        llm.generate(PROMPT, sampling=SamplingParams(regex="a"), ignore_eos=True)


@pytest.fixture
def grown_mb() -> Callable[[], float]:
    """Growth of this process's memory at its height since the beginning of the test."""
    begin = psutil.Process().memory_info().rss
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets earlier heights
    except OSError as error:
        pytest.skip(f"the kernel does not forget heights: {error}")

    def grown() -> float:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return (1024 * int(status.split("VmHWM:")[1].split()[0]) - begin) / 1e6

    return grown


@pytest.mark.parametrize("name", schemas.hostile())
def test_hostile_structures_are_refused_in_one_line(llm: LLM, name: str, grown_mb: Callable[[], float]) -> None:
    begin_s = time.process_time()
    with pytest.raises(InputError) as raised:
        llm.compile_grammar(SamplingParams(**schemas.hostile()[name]))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert time.process_time() - begin_s < 120  # 3 s here at most
    assert grown_mb() < 500  # 300 MB here at most


@pytest.mark.parametrize("name", schemas.bounded())
def test_large_structures_run_in_bounded_time(llm: LLM, name: str, grown_mb: Callable[[], float]) -> None:
    begin_s = time.process_time()
    params = SamplingParams(**schemas.bounded()[name], temperature=1.0, seed=1)
    assert llm.generate(PROMPT, sampling=params, max_new_tokens=20).tokens
    assert time.process_time() - begin_s < 60  # 2 s here at most
    assert grown_mb() < 300


def test_an_error_in_mid_reply_ends_that_reply_only(llm: LLM, monkeypatch: Any) -> None:
    calls = iter(range(1000))
    accept = Guide.accept

    def fails(self: Guide, token: int) -> None:
        if next(calls) == 3:
            raise InputError("json_schema: is not supported (too large): change it")
        accept(self, token)

    with llm.together() as replies:
        free = replies.add(PROMPT, max_new_tokens=20, ignore_eos=True)
        bad = replies.add(PROMPT, sampling=SamplingParams(json_schema=PERSON))
        monkeypatch.setattr(Guide, "accept", fails)
        errors = []
        while replies.open:
            errors += [(stream, found) for stream, found in replies.step() if isinstance(found, InputError)]
    assert [stream for stream, _ in errors] == [bad]
    assert len(free.reply.tokens) == 20


@examples(40)
@given(CHANCE, st.integers(0, 1000), st.sampled_from([Budget(), Budget(policy="speculative")]))
def test_replies_to_random_schemas_are_valid(llm: LLM, chance: random.Random, seed: int, budget: Budget) -> None:
    """At temperature 1; `python -m benchmarks.serving.structured --only schemas` does the same with 2,000."""
    schema = schemas.schema(chance)
    reply = llm.generate(PROMPT, sampling=SamplingParams(json_schema=schema, temperature=1.0, seed=seed), budget=budget)
    if reply.finish_reason == "length":  # the context of 256 is full
        return
    jsonschema_rs.validator_for(schema, validate_formats=True).validate(json.loads(reply.text))


@examples(12)
@given(CHANCE)
def test_unsupported_keywords_are_named(llm: LLM, chance: random.Random) -> None:
    keyword, schema = schemas.unsupported(chance)
    with pytest.raises(InputError, match=f'"{keyword}"'):
        llm.compile_grammar(SamplingParams(json_schema=schema))


def test_a_rule_of_llama_cpps_grammars_may_be_named_start(llm: Any) -> None:
    grammar = 'root ::= start "b" [start] # start\nstart ::= "start"'
    reply = llm.generate(PROMPT, sampling=SamplingParams(grammar=grammar, temperature=1.0, seed=1))
    assert reply.text[:6] == "startb" and reply.text[6:] in "start" and len(reply.text) == 7
