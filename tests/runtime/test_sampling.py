"""Sampling: exact probabilities of the filters, reproducible draws, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from balcony_edge.errors import InputError
from balcony_runtime.sampling import Sampler, SamplingParams, candidates

LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.25, 0.1], np.float32))


def test_greedy_takes_the_largest_of_each_row() -> None:
    logits = np.array([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]], np.float32)
    assert Sampler(SamplingParams()).pick(logits).tolist() == [1, 0]


def test_temperature_alone_is_the_softmax() -> None:
    ids, probabilities = candidates(LOGITS, SamplingParams(temperature=1.0))
    assert ids[:2].tolist() == [1, 3]
    np.testing.assert_allclose(probabilities, [0.5, 0.25, 0.1, 0.1, 0.05], rtol=1e-6)
    _, sharp = candidates(LOGITS, SamplingParams(temperature=0.5))
    np.testing.assert_allclose(sharp[0], 0.25 / (0.25 + 0.0625 + 0.01 + 0.01 + 0.0025), rtol=1e-6)


def test_top_k_then_top_p_on_what_is_left() -> None:
    ids, probabilities = candidates(LOGITS, SamplingParams(temperature=1.0, top_k=2))
    assert ids.tolist() == [1, 3]
    np.testing.assert_allclose(probabilities, [2 / 3, 1 / 3], rtol=1e-6)
    for top_p, kept in ((0.4, [1]), (0.49, [1]), (0.51, [1, 3]), (0.6, [1, 3]), (1.0, [1, 3, 0, 4, 2])):
        ids, probabilities = candidates(LOGITS, SamplingParams(temperature=1.0, top_p=top_p))
        assert sorted(ids.tolist()) == sorted(kept), top_p
        np.testing.assert_allclose(probabilities.sum(), 1.0)
    ids, _ = candidates(LOGITS, SamplingParams(temperature=1.0, top_k=2, top_p=0.6))
    assert ids.tolist() == [1]


def test_draws_follow_the_distribution_and_the_seed() -> None:
    params = SamplingParams(temperature=1.0, seed=4)
    rows = np.repeat(LOGITS[None], 20_000, axis=0)
    drawn = Sampler(params).pick(rows)
    share = np.bincount(drawn, minlength=5) / len(drawn)
    np.testing.assert_allclose(share, np.exp(LOGITS), atol=4 * np.sqrt(0.25 / len(drawn)))  # four standard errors
    assert Sampler(params).pick(rows).tolist() == drawn.tolist()
    assert Sampler(SamplingParams(temperature=1.0, seed=5)).pick(rows).tolist() != drawn.tolist()


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        SamplingParams(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(temperature: float, bad: float) -> None:
    logits = LOGITS[None].copy()
    logits[0, 2] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        Sampler(SamplingParams(temperature=temperature)).pick(logits)
