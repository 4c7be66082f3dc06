"""Sampling: exact probabilities of the filters, reproducible draws, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from balcony_edge.errors import InputError
from balcony_runtime.decoding.sampling import Sampler, SamplingParams, candidates, log_probabilities
from balcony_runtime.decoding.thresholds import measured

PROMPT = np.array([[2, 2, 4]])
LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.25, 0.1], np.float32))


def test_greedy_takes_the_largest_of_each_row() -> None:
    logits = np.array([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]], np.float32)
    assert Sampler(SamplingParams(), np.array([[0], [0]]), 3).pick(logits).tolist() == [1, 0]


def kept(logits: npt.NDArray[np.float32], **options: Any) -> dict[int, float]:
    """The tokens that pass the filters, with their probabilities."""
    ids, probabilities = candidates(logits, SamplingParams(**{"temperature": 1.0, **options}))
    assert len(set(ids.tolist())) == len(ids)
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))


def test_temperature_alone_is_the_softmax() -> None:
    assert kept(LOGITS) == pytest.approx({0: 0.1, 1: 0.5, 2: 0.05, 3: 0.25, 4: 0.1})
    assert kept(LOGITS, temperature=1e-308) == {0: 0.0, 1: 1.0, 2: 0.0, 3: 0.0, 4: 0.0}
    assert kept(LOGITS, temperature=0.5)[1] == pytest.approx(0.25 / (0.25 + 0.0625 + 0.01 + 0.01 + 0.0025))


def test_an_application_may_have_numpy_raise() -> None:
    """`np.seterr(all="raise")` at the top of a notebook, and a token that is banned with -100 as the messages advise."""
    logits = np.array([0.0, -100.0, 1.0], np.float32)
    with np.errstate(all="raise"):
        assert kept(logits, temperature=0.01)[2] == 1.0
        assert kept(logits, temperature=1e-308, top_p=0.9) == {2: 1.0}
        assert log_probabilities(logits[None], np.array([2]), 1)[1][0][0][0] == 2
        assert measured(logits[None], "margin").shape == (1,)
        logits[1] = -95.3  # the weight is a float32 that has lost digits, and loses more
        assert kept(logits)[1] > 0
        assert measured(logits[None], "entropy").shape == (1,)


def test_top_k_then_top_p_on_what_is_left() -> None:
    assert kept(LOGITS, top_k=2) == pytest.approx({1: 2 / 3, 3: 1 / 3})
    for top_p, tokens in ((0.4, {1}), (0.49, {1}), (0.51, {1, 3}), (0.6, {1, 3}), (1.0, {1, 3, 0, 4, 2})):
        found = kept(LOGITS, top_p=top_p)
        assert found.keys() == tokens, top_p
        assert sum(found.values()) == pytest.approx(1)
    assert kept(LOGITS, top_k=2, top_p=0.6).keys() == {1}


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint64, np.int8])
def test_top_k_may_be_an_integer_of_numpys(kind: Any) -> None:
    """Those without a sign have no negative."""
    logits = np.random.default_rng(3).normal(size=1000).astype(np.float32)
    assert kept(logits, top_k=kind(40)) == kept(logits, top_k=40)


@pytest.mark.parametrize("spread", [0.3, 2.5, 9.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"top_p": 0.99999},
        {"top_k": 40, "top_p": 0.9, "temperature": 0.7},
        {"min_p": 0.05, "temperature": 1.5},
        {"top_p": 0.9, "min_p": 0.2},
    ],
    ids=str,
)
def test_the_filters_are_those_of_transformers(spread: float, options: dict[str, Any]) -> None:
    import torch
    import transformers

    warpers = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    logits = np.random.default_rng(3).normal(0, spread, 5000).astype(np.float32)
    scores = torch.from_numpy(logits[None].astype(np.float64))
    for name, warper in warpers.items():
        if name in options:
            scores = warper(options[name])(None, scores)
    want = {i: p for i, p in enumerate(scores.softmax(-1)[0].tolist()) if p > 0}
    assert kept(logits, **options) == pytest.approx(want, rel=2e-5)


def test_top_k_keeps_the_order_of_the_tokens() -> None:
    """A seed draws by this order, so it may not follow the processor, nor the last bits of tokens that are not kept."""
    random = np.random.default_rng(3)
    for logits in (random.normal(size=1000), random.integers(0, 5, 1000)):  # the second with ties at the last place
        ids, _ = candidates(logits.astype(np.float32), SamplingParams(temperature=1.0, top_k=40))
        assert ids.tolist() == sorted(np.argsort(-logits, kind="stable")[:40].tolist())


def test_draws_follow_the_distribution_and_the_seed() -> None:
    params = SamplingParams(temperature=1.0, seed=4)
    rows = np.repeat(LOGITS[None], 20_000, axis=0)
    prompt = np.zeros((len(rows), 1), np.int64)
    drawn = Sampler(params, prompt, 5).pick(rows)
    share = np.bincount(drawn, minlength=5) / len(drawn)
    np.testing.assert_allclose(share, np.exp(LOGITS), atol=4 * np.sqrt(0.25 / len(drawn)))  # four standard errors
    assert Sampler(params, prompt, 5).pick(rows).tolist() == drawn.tolist()
    assert Sampler(SamplingParams(temperature=1.0, seed=5), prompt, 5).pick(rows).tolist() != drawn.tolist()
    assert len(Sampler(SamplingParams(temperature=1.0, seed=2**1024), prompt, 5).pick(rows)) == len(drawn)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"temperature": -1.0}, "temperature = -1.0: must be a finite number, 0 or more: give 0 for greedy decoding"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1: must be a whole number, 0 or more: give .* or 0 to keep all"),
        ({"top_p": 0.0}, "top_p = 0.0: must be a number above 0 and at most 1: give .* or 1 to keep all"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"seed": -1}, "seed = -1"),
        ({"temperature": 10**400}, "temperature = 1000"),
        ({"min_p": 1.0}, "min_p = 1.0"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"presence_penalty": float("inf")}, "presence_penalty = inf"),
        ({"frequency_penalty": "much"}, "frequency_penalty = 'much': must be a number within"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias = "),
        ({"logit_bias": {"a": 1.0}}, r"logit_bias = .'a': 1.0.: must give token ids a bias"),
        ({"logit_bias": {1: "a"}}, "logit_bias = .*: must give token ids a bias"),
        ({"logit_bias": {1.5: 1.0}}, "logit_bias = .*: must give token ids a bias"),
        ({"logit_bias": [1]}, r"logit_bias = \[1\]: must give token ids a bias"),
        ({"seed": 1.5}, r"seed = 1.5: must be a whole number"),
        ({"top_k": 1.5}, r"top_k = 1.5: must be a whole number"),
        ({"temperature": "hot"}, r"temperature = 'hot': must be a finite number"),
        ({"temperature": None}, r"temperature = None: must be a finite number"),
        ({"repetition_penalty": 1e308}, r"repetition_penalty = 1e\+308: must be a number from 1e-06 to 1e\+06"),
        ({"repetition_penalty": 1e-308}, r"repetition_penalty = 1e-308"),
        ({"presence_penalty": -1e308}, r"presence_penalty = -1e\+308: must be a number within ±1e\+06"),
        ({"logit_bias": {1: -1e39}}, r"between ±1e\+06 each; use -100"),
        ({"logit_bias": {1: 1e6}}, r"between ±1e\+06 each; use -100"),
        ({"seed": False}, "seed = False: must be a whole number, 0 or more, or None"),
        ({"top_k": True}, "top_k = True: must be a whole number"),
        ({"temperature": True}, "temperature = True: must be a finite number"),
        ({"logit_bias": {True: 1.0}}, "logit_bias = .*: must give token ids a bias"),
        ({"logit_bias": {1: True}}, "logit_bias = .*: must give token ids a bias"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "allowed", "cure"),
    [
        (
            {"temperature": -1.0},
            "a finite number, 0 or more",
            "give 0 for greedy decoding, or a larger number for more varied text, e.g. 0.7",
        ),
        (
            {"top_k": -1},
            "a whole number, 0 or more",
            "give the number of likeliest tokens to keep, e.g. 40, or 0 to keep all",
        ),
        (
            {"top_p": 1.5},
            "a number above 0 and at most 1",
            "give the probability to keep, e.g. 0.95, or 1 to keep all tokens",
        ),
        (
            {"min_p": 1.0},
            "a number, at least 0 and below 1",
            "give a share of the likeliest token's probability, e.g. 0.05, or 0 to keep all tokens",
        ),
        (
            {"repetition_penalty": 0.0},
            "a number from 1e-06 to 1e+06",
            "give a number above 1 for fewer repetitions, e.g. 1.1, or 1 for no penalty",
        ),
        (
            {"presence_penalty": 2e6},
            "a number within ±1e+06",
            "give a number above 0 for fewer repetitions, e.g. 0.5, or 0 for no penalty",
        ),
        (
            {"seed": -1},
            "a whole number, 0 or more, or None",
            "give an integer for the same text each time, or leave it out",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_refused_value_is_named_with_what_is_allowed_and_what_to_do(
    options: dict[str, Any], allowed: str, cure: str
) -> None:
    ((name, value),) = options.items()
    with pytest.raises(InputError) as caught:
        SamplingParams(**options)
    assert str(caught.value) == f"{name} = {value!r}: must be {allowed}: {cure}"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0},
        {"repetition_penalty": 1e-6, "presence_penalty": -1e6, "top_p": 1e-9, "min_p": 0.999},
        {"repetition_penalty": 1e6, "presence_penalty": 1e6, "logit_bias": {0: -999_999.0}},
    ],
)
def test_values_at_the_ends_of_their_ranges_are_taken(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    assert {name: getattr(params, name) for name in options} == options


def test_parameters_are_a_value_of_their_own() -> None:
    bias: Any = {3: 1.0}
    params = SamplingParams(logit_bias=bias, json_schema={"type": "object"})
    bias["a"] = "much"
    same = SamplingParams(logit_bias={3: 1.0}, json_schema={"type": "object"})
    assert params == same and len({params, same}) == 1


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({}, True),
        ({"top_k": 5, "seed": 3}, True),
        ({"temperature": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"logit_bias": {3: 1.0}}, False),
    ],
)
def test_a_sampler_is_greedy_if_it_takes_the_likeliest_token_as_it_is(options: dict[str, Any], greedy: bool) -> None:
    assert Sampler(SamplingParams(**options), PROMPT, 5).greedy is greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(temperature: float, bad: float) -> None:
    logits = LOGITS[None].copy()
    logits[0, 2] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        Sampler(SamplingParams(temperature=temperature), PROMPT, 5).pick(logits)


def test_ties_are_kept_by_min_p_and_ended_by_top_p() -> None:
    equal = np.zeros(4, np.float32)  # 0.25 each, exactly
    assert kept(equal, top_p=0.5).keys() == {0, 1}
    halved = np.array([1.0, 0.0], np.float32)
    share = float(np.exp(np.float32(-1.0)))
    assert kept(halved, min_p=share).keys() == {0, 1}
    assert kept(halved, min_p=np.nextafter(np.float32(share), np.float32(1))).keys() == {0}


def test_min_p_keeps_what_is_likely_enough() -> None:
    assert kept(LOGITS, min_p=0.3) == pytest.approx({1: 2 / 3, 3: 1 / 3})
    assert kept(LOGITS, min_p=0.19).keys() == {0, 1, 3, 4}


def test_bias_and_penalty_come_in_the_order_of_transformers() -> None:
    """A bias that changes a logit's sign shows the order: the penalty divides logits above 0 and multiplies the others."""
    import torch
    import transformers

    generator = np.random.default_rng(5)
    bias = {1: 3.0, 2: -3.0, 4: 0.5}
    processors = transformers.LogitsProcessorList(
        [
            transformers.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            transformers.RepetitionPenaltyLogitsProcessor(1.7),
        ]
    )
    for _ in range(200):
        logits = generator.normal(0, 2, (1, 5)).astype(np.float32)
        sampler = Sampler(SamplingParams(repetition_penalty=1.7, logit_bias=bias), PROMPT, 5)
        want = processors(torch.from_numpy(PROMPT), torch.from_numpy(logits)).argmax(-1)
        assert int(sampler.pick(logits)[0]) == int(want[0])


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).normal(size=(1, 5)).astype(np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=1.7), PROMPT, 5)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    history = PROMPT
    for _ in range(4):
        want = processor(torch.from_numpy(history), torch.from_numpy(logits.copy())).numpy()
        np.testing.assert_allclose(sampler._adjust(logits), want, rtol=1e-6)
        history = np.concatenate([history, sampler.pick(logits)[:, None]], axis=1)


def test_the_presence_penalty_counts_the_reply_only_and_once() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=2.0), PROMPT, 5)
    logits = np.array([[0.0, 0.5, 3.0, 1.5, 0.0]], np.float32)
    before = logits.copy()
    assert [int(sampler.pick(logits)[0]) for _ in range(4)] == [2, 3, 2, 2]  # 3.0; 1.5 > 1.0; 1.0 > 0.5; 1.0
    np.testing.assert_array_equal(logits, before)


def test_the_penalties_of_openai_follow_their_formula() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, with c the counts of the reply, of each member of a batch."""
    random, logits = np.random.default_rng(2), np.random.default_rng(3).normal(size=(2, 5)).astype(np.float32)
    params = SamplingParams(frequency_penalty=0.7, presence_penalty=-0.4, temperature=1.0, seed=5)
    sampler = Sampler(params, np.array([[1, 2], [3, 4]], np.int64), 5)
    counts = np.zeros((2, 5))
    for _ in range(12):
        want = logits - 0.7 * counts - -0.4 * (counts > 0)
        np.testing.assert_allclose(sampler._adjust(logits), want, rtol=1e-5, atol=1e-6)
        counts[[0, 1], sampler.pick(logits + random.normal(size=(2, 5)).astype(np.float32))] += 1
    assert counts.max() > 1 and sampler.fork()._adjust(logits) == pytest.approx(sampler._adjust(logits))


def test_a_bias_moves_the_choice() -> None:
    logits = LOGITS[None].copy()
    assert int(Sampler(SamplingParams(logit_bias={1: -100.0}), PROMPT, 5).pick(logits)[0]) == 3
    assert int(Sampler(SamplingParams(logit_bias={2: 50.0}), PROMPT, 5).pick(logits)[0]) == 2
    for token in (-1, 5):
        with pytest.raises(InputError, match=f"logit_bias for token {token}: the vocabulary has 0 to 4"):
            Sampler(SamplingParams(logit_bias={token: 1.0}), PROMPT, 5)


def test_log_probabilities_are_the_models_own() -> None:
    (own,), (best,) = log_probabilities(LOGITS[None] * 1.0 + 7.0, np.array([3]), 2)
    assert own == pytest.approx(np.log(0.25), abs=1e-6)
    assert [token for token, _ in best] == [1, 3]
    assert best[0][1] == pytest.approx(np.log(0.5), abs=1e-6)
    assert log_probabilities(LOGITS[None], np.array([1]), 0)[1] == [()]
    for odd in (np.nan, np.inf):
        with pytest.raises(InputError, match="NaN or infinity"):
            log_probabilities(np.where(np.arange(LOGITS.size) == 2, odd, LOGITS)[None], np.array([3]), 2)


def test_of_equal_tokens_the_first_are_listed() -> None:
    """As `argmax` takes the first: the token of a greedy reply heads its list. Logits of 16 bits are often equal."""
    logits = np.random.default_rng(3).integers(0, 5, (8, 300)).astype(np.float32)
    _, best = log_probabilities(logits, logits.argmax(-1), 5)
    assert [[token for token, _ in row] for row in best] == np.argsort(-logits, kind="stable")[:, :5].tolist()
