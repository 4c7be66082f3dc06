"""Lossless self-speculation: a shallow exit drafts, the full depth checks all drafts in one pass, the prefix that it agrees
with is kept.

Owns one round and the choice of where and how long to draft. Over lazy stages a round is `step` at the draft's exit, `advance`
at the full depth with the logits of the last rows, and `rollback`: the drafts' rows are what the deeper stages have pending,
so checking is catching up. Greedy replies are the full depth's own; sampled ones have its distribution (speculative sampling:
Leviathan et al., ICML 2023; the paper names self-speculation as future work).

The choice. With a the probability that a draft is kept, a round of g drafts gives 1 + a + ... + a^g tokens. Its price comes
from the cost model, corrected by what rounds and plain steps were measured to take; a is learned for each exit, from the
bundle's measured agreement on. A round is run only where it is expected to be `WORTH` times as fast as plain steps; where it
is not, one is tried every `PROBE_TOKENS` tokens, so that what was learned does not stay wrong for ever.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from balcony_edge.device.costs import CostModel
from balcony_runtime.backends.base import FloatArray, IntArray
from balcony_runtime.decoding.policy import Made, Turn
from balcony_runtime.decoding.sampling import Sampler
from balcony_runtime.engine import TokenSequence

#: Most drafts of a round: beyond that even nine of ten kept gain nothing.
MOST_DRAFTS = 8
#: How many times as fast as plain steps a round must be expected to be: prices are some percent off.
WORTH = 1.03
#: Tokens after which a round is tried although it is not expected to pay: costs less than 0.5 % where it does not.
PROBE_TOKENS = 512
#: Tokens after which a choice that came to nothing is made again: it takes half a millisecond with cold caches.
PLAN_TOKENS = 16
#: Weight of the bundle's agreement in the acceptance, in drafts, and of the past at every further round.
PRIOR_DRAFTS, MEMORY = 8.0, 0.97
#: Acceptance of an exit that was never evaluated.
UNKNOWN_AGREEMENT = 0.5
#: Share of a new sample in the ratios of measured to predicted times.
RATIO_RATE = 0.1


class Round(NamedTuple):
    """What a round is planned to be.

    Attributes:
        exit_layer: that drafts.
        drafts: how many.
        price_ms: of the whole round, by the cost model.
        speedup: expected, over plain steps.
    """

    exit_layer: int
    drafts: int
    price_ms: float
    speedup: float


class Outcome(NamedTuple):
    """What a round gave: tokens in order, the full depth's logits that each came from (n, V), and how many drafts were kept."""

    tokens: list[int]
    logits: FloatArray
    kept: int


class Speculator:
    """Chooses rounds, runs them and learns from them: a :class:`Policy`. One for all replies of a loaded bundle."""

    def __init__(self, exits: tuple[int, ...], agreement: Mapping[int, float | None]) -> None:
        self._exits = exits
        # (drafts that were kept, drafts that were judged) of each exit, the past fading
        self._counts = {
            exit_layer: (PRIOR_DRAFTS * (agreement.get(exit_layer) or UNKNOWN_AGREEMENT), PRIOR_DRAFTS)
            for exit_layer in exits[:-1]
        }
        self._round_ratio = self._plain_ratio = 1.0
        self._since_probe = self._plan_at = 0

    def acceptance(self, exit_layer: int) -> float:
        """Learned probability that a draft of an exit is kept."""
        kept, judged = self._counts[exit_layer]
        return kept / judged

    def attempt(self, turn: Turn) -> Made | None:
        """The tokens of one round, or None: a plain step is as fast, or stages have a backlog."""
        sequence = turn.sequence
        if any(sequence.stage_rows):
            return None
        room = sequence.max_length - sequence.length
        planned = self.plan(turn.costs, sequence.length, sequence.balcony_rows, room, turn.most_ms)
        if planned is None:
            return None
        backlog_ns = time.perf_counter_ns()
        sequence.run_balcony(planned.exit_layer, sequence.length)  # rows that plain steps left to it
        backlog_ns = time.perf_counter_ns() - backlog_ns
        outcome = run_round(sequence, turn.ids, turn.sampler, planned)
        self.learn(planned, outcome.kept, (time.perf_counter_ns() - turn.begin_ns - backlog_ns) / 1e6)
        return Made(
            [np.array([token], np.int64) for token in outcome.tokens],
            [row[None] for row in outcome.logits],
            self._exits[-1],
            f"drafted {planned.drafts} at {planned.exit_layer}, kept {outcome.kept}",
            planned.drafts,
        )

    def plan(
        self, costs: CostModel, context_length: int, balcony_rows: tuple[int, ...], room: int, most_ms: float
    ) -> Round | None:
        """The round that is worth running now, or None: a plain step is as fast.

        Args:
            costs: prices.
            context_length: rows before the new ones.
            balcony_rows: rows that each balcony has not seen, without the new ones.
            room: rows that the sequence can still take; a round of g drafts takes g + 1.
            most_ms: what a round may cost, at slowdown 1.
        """
        if self._since_probe < min(self._plan_at, PROBE_TOKENS):
            return None
        plain_ms = costs.steady_ms(self._exits[-1], context_length) * self._plain_ratio
        found: Round | None = None
        for index, exit_layer in enumerate(self._exits[:-1]):
            behind_ms = costs.balconies[index].pass_ms(balcony_rows[index], context_length, 1)
            acceptance = self.acceptance(exit_layer)
            draft_ms = costs.steady_ms(exit_layer, context_length)
            expected = 1.0
            for drafts in range(1, min(MOST_DRAFTS, room - 1) + 1):
                expected += acceptance**drafts
                price_ms = drafts * draft_ms + self._check_ms(costs, exit_layer, drafts, context_length)
                speedup = plain_ms * expected / (price_ms * self._round_ratio)
                if behind_ms + price_ms <= most_ms and (found is None or speedup > found.speedup):
                    found = Round(exit_layer, drafts, price_ms, speedup)
        if found is None or (found.speedup < WORTH and self._since_probe < PROBE_TOKENS):
            self._plan_at = self._since_probe + PLAN_TOKENS
            return None
        return found

    def learn_plain(self, predicted_ms: float, measured_ms: float) -> None:
        """Correct the price of plain steps, and count one until the next probe."""
        self._since_probe += 1
        self._plain_ratio += RATIO_RATE * (measured_ms / predicted_ms - self._plain_ratio)

    def learn(self, planned: Round, kept: int, measured_ms: float) -> None:
        """After a round, which took so long without what the draft's balcony was behind."""
        self._since_probe = self._plan_at = 0
        before, judged = self._counts[planned.exit_layer]
        tried = min(kept + 1, planned.drafts)  # those after the first that was refused were never judged
        self._counts[planned.exit_layer] = (MEMORY * before + kept, MEMORY * judged + tried)
        self._round_ratio += RATIO_RATE * (measured_ms / planned.price_ms - self._round_ratio)

    def _check_ms(self, costs: CostModel, exit_layer: int, drafts: int, context_length: int) -> float:
        """Price of the full depth's pass over the last draft, with the others pending behind the draft's exit."""
        index, count = self._exits.index(exit_layer), len(self._exits)
        rows = (1,) * (index + 1) + (drafts + 1,) * (count - index - 1)
        whole_ms = costs.step_ms(self._exits[-1], rows, (1,) * count, context_length)
        return whole_ms + costs.head.pass_ms(drafts + 1, context_length) - costs.head.pass_ms(1, context_length)


def run_round(sequence: TokenSequence, ids: IntArray, sampler: Sampler, planned: Round) -> Outcome:
    """Draft, check, keep the prefix that the full depth agrees with, roll the rest back.

    Args:
        sequence: its full depth and the draft's exit are up to date; of one member.
        ids: the token that is not in the sequence yet, (1,).
        sampler: of the reply; it remembers the tokens that are given out.
        planned: where and how many.
    """
    begin, drafter = sequence.length, sampler.fork()
    token, drafts = ids, []
    for _ in range(planned.drafts):
        proposal = drafter.propose(sequence.step(planned.exit_layer, token)[0])
        drafts.append(proposal)
        token = np.array([proposal.token], np.int64)
    logits = sequence.advance(sequence.exits[-1], token[:, None], num_logits=planned.drafts + 1)[0]  # (g + 1, V)
    tokens: list[int] = []
    for proposal, row in zip(drafts, logits, strict=False):
        tokens.append(sampler.judge(row, proposal))
        if tokens[-1] != proposal.token:
            break
    else:
        tokens.append(int(sampler.pick(logits[-1:])[0]))
    sequence.rollback(begin + len(tokens))
    return Outcome(tokens, logits[: len(tokens)], len(tokens) - 1)
