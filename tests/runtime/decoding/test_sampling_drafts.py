"""Drafting with a sampler: proposals, their judgement, and forks that draft on a memory of their own."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from balcony_runtime.decoding.sampling import Proposal, Sampler, SamplingParams
from balcony_runtime.decoding.speculate import DraftRound, run_round

PROMPT = np.array([[2]])
LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.25, 0.1], np.float32))
OTHER = np.log(np.array([0.4, 0.1, 0.1, 0.3, 0.1], np.float32))


def sampler(**options: float | int) -> Sampler:
    return Sampler(SamplingParams(**options), PROMPT, 5)


def test_a_greedy_proposal_is_the_likeliest_token_without_a_distribution() -> None:
    assert sampler().propose(LOGITS) == Proposal(1, None)
    assert sampler().judge(OTHER, Proposal(1, None)) == 0


def test_a_drawn_proposal_has_the_distribution_that_it_was_drawn_from() -> None:
    token, distribution = sampler(temperature=1.0, top_k=2, seed=3).propose(LOGITS)
    assert token in (1, 3) and distribution is not None
    np.testing.assert_allclose(distribution, [0, 2 / 3, 0, 1 / 3, 0], rtol=1e-6)


def test_a_proposal_from_the_models_own_distribution_is_always_kept() -> None:
    drawing = sampler(temperature=1.0, seed=3)
    for _ in range(50):
        proposal = drawing.propose(LOGITS)
        assert drawing.judge(LOGITS, proposal) == proposal.token


def test_judged_tokens_follow_the_models_distribution_whatever_was_proposed() -> None:
    drawing, count = sampler(temperature=0.9, top_k=2, seed=5), 4000
    tokens = [drawing.judge(OTHER, drawing.propose(LOGITS)) for _ in range(count)]
    share = np.bincount(tokens, minlength=5) / count
    expected = np.where(np.exp(OTHER) > 0.2, np.exp(OTHER / 0.9), 0)
    expected /= expected.sum()
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / count))  # four standard errors
    assert set(tokens) == {0, 3}, "what top-k leaves out never comes"


def test_a_token_that_the_model_never_takes_is_replaced() -> None:
    only_three = np.array([-50.0, -50.0, -50.0, 0.0, -50.0], np.float32)
    offered = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
    assert sampler(temperature=1.0, seed=1).judge(only_three, Proposal(1, offered)) == 3


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_proposed_and_judged_tokens_are_remembered_for_the_penalties(temperature: float) -> None:
    drafting = sampler(temperature=temperature, presence_penalty=5.0, seed=1)
    assert [drafting.propose(LOGITS).token for _ in range(2)] == [1, 3]
    judging = sampler(temperature=temperature, presence_penalty=5.0, seed=1)
    # the first proposal is what the model takes; after it, the memory has moved on and so does the model's choice
    first = judging.fork().propose(LOGITS)
    assert judging.judge(LOGITS, first) == 1
    assert judging.pick(LOGITS[None]).tolist() == [3]


def test_a_fork_keeps_its_own_memory_and_the_same_random_numbers() -> None:
    whole = sampler(presence_penalty=5.0, repetition_penalty=2.0)
    assert whole.pick(LOGITS[None]).tolist() == [1]
    fork = whole.fork()
    assert fork.pick(LOGITS[None]).tolist() == [3]  # what was made before counts
    assert whole.pick(LOGITS[None]).tolist() == [3]  # what the fork makes does not
    drawing = sampler(temperature=1.0, seed=7)
    rows = LOGITS[None]
    turns = [draw.pick(rows).item() for draw in (drawing, drawing.fork()) * 20]
    alone = sampler(temperature=1.0, seed=7)
    assert turns == [alone.pick(rows).item() for _ in range(40)]


class Overflowing:
    """A sequence of two tokens that are as likely as one another; after token 1 the balcony's logits are NaN."""

    exits, length = (2, 5), 0

    def checkpoint(self) -> None:
        pass

    def rollback(self, length: int) -> None:
        self.length = length

    def step(self, exit_layer: int, ids: Any) -> Any:
        self.length += 1
        return np.full((1, 2), np.nan if ids[0] == 1 else 0.0, np.float32)

    def advance(self, exit_layer: int, tokens: Any, num_logits: int = 1) -> Any:
        self.length += np.size(tokens)
        return np.zeros((1, num_logits, 2), np.float32)


def test_a_token_after_which_drafts_fail_comes_as_often_as_without_them() -> None:
    drawing, count = Sampler(SamplingParams(temperature=1.0, seed=1), np.array([[0]]), 2), 2000
    ones = 0
    for _ in range(count):
        outcome = run_round(cast(Any, Overflowing()), np.array([0]), drawing, DraftRound(2, 2, 1.0, 1.0))
        first = outcome[0][0] if outcome is not None else drawing.pick(np.zeros((1, 2), np.float32)).item()
        ones += first == 1
    assert ones / count == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / count))  # four standard errors
