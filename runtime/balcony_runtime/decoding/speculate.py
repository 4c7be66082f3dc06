"""Lossless self-speculation: a shallow exit drafts tokens, and the full depth checks all of them in one pass.

The prefix of drafts that the full depth agrees with is kept. Greedy replies equal those of the full depth; sampled replies
have its distribution (speculative sampling: Leviathan et al., ICML 2023; the paper names self-speculation as future work).

Owns one round, and the choice of the exit and number of drafts. Over lazy stages a round is `step` at the draft's exit,
`advance` at the full depth with the logits of the last rows, and `rollback`. The drafts' rows are pending in the deeper
stages anyway, so checking them is catching up.

The choice. With a the probability that a draft is kept, a round of g drafts gives 1 + a + ... + a^g tokens. Its price comes
from the cost model, corrected by the measured times of rounds and plain steps. The probability a is learned for each exit
and starts at the bundle's measured agreement. A round is run only if it is expected to be
``policy.WORTH`` times as fast as plain steps. If it is not, one round is tried every ``policy.PROBE_TOKENS`` tokens, so that a
wrong estimate is corrected at some point.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from balcony_edge.device.costs import CostModel
from balcony_edge.errors import InputError
from balcony_runtime.backends.base import FloatArray, IntArray, NotFiniteError
from balcony_runtime.decoding.policy import Made, Probing, Turn
from balcony_runtime.decoding.sampling import Sampler
from balcony_runtime.token_sequence import TokenSequence

#: Largest number of drafts in a round: with more, even an acceptance of nine in ten gains nothing.
MOST_DRAFTS = 8
#: Tokens of rounds after which a plain step is made: rounds alone would never correct the price of plain steps.
ROUND_TOKENS = 64
#: Weight of the bundle's agreement in the acceptance, in drafts, and weight of the past at every further round.
PRIOR_DRAFTS, MEMORY = 8.0, 0.97
#: Acceptance of an exit that was never evaluated.
UNKNOWN_AGREEMENT = 0.5
#: Share of a new sample in the ratios of measured to predicted times.
RATIO_RATE = 0.1
#: Largest sample, in present ratios: a step that hung, or in which the process was stopped, says nothing about the next ones.
MOST_RATIO = 3.0


class Standing(NamedTuple):
    """A sequence, as far as the price of a round depends on it.

    Attributes:
        context_length: number of rows before the new ones.
        room: most rows of the sequence, and tokens of the reply, that may still come; a round of g drafts takes g + 1.
        balcony_rows: pending rows of each balcony, without the new ones.
        stage_rows: pending rows of each stage, which the round's passes take along.
        replays: whether the rows that a round keeps run again, because the model has recurrent layers.
    """

    context_length: int
    room: int
    balcony_rows: tuple[int, ...]
    stage_rows: tuple[int, ...] = ()
    replays: bool = False


class DraftRound(NamedTuple):
    """A planned round.

    Attributes:
        exit_layer: exit layer at which the drafts are made.
        drafts: number of drafts.
        price_ms: price of the whole round, by the cost model.
        speedup: expected speed-up over plain steps.
    """

    exit_layer: int
    drafts: int
    price_ms: float
    speedup: float


class Speculator:
    """Chooses rounds, runs them and learns from them: a :class:`Policy`. One object serves all replies of a bundle."""

    def __init__(self, exits: tuple[int, ...], agreement: Mapping[int, float | None]) -> None:
        self._exits = exits
        # Exit → (drafts that were kept, drafts that were judged), with exponential forgetting.
        self._counts = {
            exit_layer: (PRIOR_DRAFTS * (UNKNOWN_AGREEMENT if share is None else share), PRIOR_DRAFTS)
            for exit_layer, share in ((exit_layer, agreement.get(exit_layer)) for exit_layer in exits[:-1])
        }
        self._round_ratio = self._plain_ratio = 1.0
        self._latest = 0.0, 0.0  # samples of the last two rounds: if both are slow, a load has begun
        self._probing = Probing()
        self._since_plain = 0  # tokens of rounds since the last plain step

    def acceptance(self, exit_layer: int) -> float:
        """Learned probability that a draft of an exit is kept."""
        kept, judged = self._counts[exit_layer]
        return kept / judged

    def attempt(self, turn: Turn) -> Made | None:
        """Make the tokens of one round, or return None if a plain step is as fast or stages have a backlog."""
        sequence = turn.sequence
        backlog = max(sequence.stage_rows) > (MOST_DRAFTS if sequence.replays else 0)  # a round leaves at most so many
        if backlog or self._since_plain >= ROUND_TOKENS or turn.left < 2:
            return None
        room = min(sequence.max_length - sequence.length, turn.left)
        standing = Standing(sequence.length, room, sequence.balcony_rows, sequence.stage_rows, sequence.replays)
        planned = self.plan(turn.costs, standing, turn.most_ms, turn.slowdown)
        if planned is None:
            if turn.left == 2:  # the next reply has room for more drafts
                self._probing.plan_now()
            return None
        backlog_ns = time.perf_counter_ns()
        sequence.run_balcony(planned.exit_layer, sequence.length)  # rows that plain steps left pending
        backlog_ns = time.perf_counter_ns() - backlog_ns
        outcome = run_round(sequence, turn.ids, turn.sampler, planned)
        if outcome is None:  # counts as a refused draft, or a balcony whose logits are NaN would run at every token
            self._count(planned.exit_layer, 0, 1)
            self._probing.put_off()
            return None
        tokens, logits, drafts = outcome
        kept = len(tokens) - 1
        took_ms = (time.perf_counter_ns() - turn.begin_ns - backlog_ns) / 1e6
        # The price is that of all planned drafts: the time of fewer says nothing about it.
        self.learn(planned._replace(drafts=drafts), kept, took_ms if drafts == planned.drafts else None)
        return Made(
            [np.array([token], np.int64) for token in tokens],
            [row[None] for row in logits],
            self._exits[-1],
            f"drafted {drafts} at {planned.exit_layer}, kept {kept}, expected {planned.speedup:.2f} times as fast",
            drafts,
        )

    def plan(self, costs: CostModel, standing: Standing, most_ms: float, slowdown: float = 1.0) -> DraftRound | None:
        """Return the round that is worth running now, or None if a plain step is as fast.

        Args:
            costs: prices of this device.
            standing: the sequence.
            most_ms: longest time that a round may take, at slowdown 1.
            slowdown: slowdown of the device by which that time is shorter than the target.
        """
        if not self._probing.is_due():
            return None
        context_length, room, balcony_rows, stage_rows, replays = standing
        plain_ms = costs.steady_ms(self._exits[-1], context_length) * self._plain_ratio
        pending_ms = _further_ms(costs, stage_rows, context_length)
        found: DraftRound | None = None
        for index, exit_layer in enumerate(self._exits[:-1]):
            behind_ms = costs.balconies[index].pass_ms(balcony_rows[index], context_length, 1)
            acceptance = self.acceptance(exit_layer)
            draft_ms = costs.steady_ms(exit_layer, context_length)
            expected = 1.0
            for drafts in range(1, min(MOST_DRAFTS, room - 1) + 1):
                expected += acceptance**drafts
                price_ms = drafts * draft_ms + self._check_ms(costs, exit_layer, drafts, context_length)
                if replays:  # unless all drafts are kept
                    again = (round(expected),) * len(self._exits)
                    price_ms += (1 - acceptance**drafts) * _further_ms(costs, again, context_length)
                speedup = plain_ms * expected / (price_ms * self._round_ratio)
                # most_ms is a time at slowdown 1, and the ratio of rounds to their prices has the slowdown in it. A
                # trial goes by the price: rounds that a load made too long, and that never run, keep their ratio for ever.
                ratio = max(self._round_ratio, min(self._latest))
                longer = 1.0 if self._probing.tries else max(ratio / slowdown, 1.0)
                takes_ms = (pending_ms + behind_ms + price_ms) * longer
                if takes_ms <= most_ms and (found is None or speedup > found.speedup):
                    found = DraftRound(exit_layer, drafts, price_ms, speedup)
        return found if self._probing.is_worth(None if found is None else found.speedup) else None

    def learn_plain(self, predicted_ms: float, measured_ms: float) -> None:
        """Correct the price of plain steps, and count this step towards the next probe."""
        self._probing.tokens += 1
        self._since_plain = 0
        self._plain_ratio = _corrected(self._plain_ratio, measured_ms / predicted_ms)

    def learn(self, planned: DraftRound, kept: int, measured_ms: float | None) -> None:
        """Learn from a round; ``measured_ms`` excludes the time for the pending rows of the draft's balcony; None: unknown."""
        self._since_plain += kept + 1
        tried = min(kept + 1, planned.drafts)  # drafts after the first refused one were never judged
        self._count(planned.exit_layer, kept, tried)
        if measured_ms is not None:
            self._latest = self._latest[1], measured_ms / planned.price_ms
            self._round_ratio = _corrected(self._round_ratio, self._latest[1])

    def _count(self, exit_layer: int, kept: int, judged: int) -> None:
        """Count the drafts of a round, from which the next plan is made."""
        memory, self._probing = self._probing.memory(MEMORY), Probing()
        before, judged_before = self._counts[exit_layer]
        self._counts[exit_layer] = (memory * before + kept, memory * judged_before + judged)

    def _check_ms(self, costs: CostModel, exit_layer: int, drafts: int, context_length: int) -> float:
        """Price of the full depth's pass over the last draft; the other rows are pending after the draft's exit."""
        index, count = self._exits.index(exit_layer), len(self._exits)
        rows = (1,) * (index + 1) + (drafts + 1,) * (count - index - 1)
        whole_ms = costs.step_ms(self._exits[-1], rows, (1,) * count, context_length)
        return whole_ms + costs.head.pass_ms(drafts + 1, context_length) - costs.head.pass_ms(1, context_length)


def _corrected(ratio: float, sample: float) -> float:
    """A ratio of measured to predicted times after one more of them."""
    return ratio + RATIO_RATE * (min(sample, MOST_RATIO * ratio) - ratio)


def _further_ms(costs: CostModel, rows: tuple[int, ...], context_length: int) -> float:
    """Price of rows that passes of the stages take along."""
    pairs = zip(costs.stages, rows, strict=False)
    return sum(one.pass_ms(1 + more, context_length) - one.pass_ms(1, context_length) for one, more in pairs)


def run_round(
    sequence: TokenSequence, ids: IntArray, sampler: Sampler, planned: DraftRound
) -> tuple[list[int], FloatArray, int] | None:
    """Draft tokens, check them, keep the prefix that the full depth agrees with, and roll back the rest.

    Gives n tokens, of which all but the last are drafts, the logits of the full depth from which each was taken, (n, V),
    and the number of drafts that were made.
    None if no draft can be made (a balcony's logits are NaN), or the structure has no token after one: a plain step follows.
    Drafts that were made before a balcony's logits became NaN are checked: where they become so depends on the drafts, and
    to draw such tokens anew would make them rarer than at the full depth.

    Args:
        sequence: sequence of one member, without pending rows at the draft's exit. Rows that the previous round's rollback
            left pending run together with the new ones.
        ids: token that is not in the sequence yet, (1,).
        sampler: sampler of the reply; it remembers the tokens that are given out.
        planned: exit and number of drafts.
    """
    begin, drafter = sequence.length, sampler.fork()
    sequence.checkpoint()
    token, drafts = ids, []
    try:
        for _ in range(planned.drafts):
            proposal = drafter.propose(sequence.step(planned.exit_layer, token)[0])
            drafts.append(proposal)
            token = np.array([proposal.token], np.int64)
    except InputError as error:
        rows = sequence.length - begin
        sequence.rollback(begin)
        if isinstance(error, NotFiniteError):
            # Some graphs read rows after the end, under a mask, and 0 × NaN is NaN: a token that ran takes their place.
            sequence.advance(planned.exit_layer, [int(ids[0])] * rows)
            sequence.rollback(begin)
        if not drafts or not isinstance(error, NotFiniteError):
            return None
        token = np.array([int(ids[0]), *(proposal.token for proposal in drafts)], np.int64)
    logits = sequence.advance(sequence.exits[-1], token, num_logits=len(drafts) + 1)[0]  # (g + 1, V)
    tokens: list[int] = []
    for proposal, row in zip(drafts, logits, strict=False):
        tokens.append(sampler.judge(row, proposal))
        if tokens[-1] != proposal.token:
            break
    else:
        tokens.append(int(sampler.pick(logits[-1:])[0]))
    sequence.rollback(begin + len(tokens))
    return tokens, logits[: len(tokens)], len(drafts)
