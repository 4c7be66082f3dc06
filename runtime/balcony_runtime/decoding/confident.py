"""Confidence exits: try a shallow exit, and run the full depth only if the balcony is unsure.

Owns the choice of the exit to try, the online checks, and what is learned from both. When the full depth runs for an
unsure token, the pending rows of tokens that exited early run with it. So checking those tokens costs only the LM head.
The checks are counted and reported as quality telemetry. They raise the threshold of an exit whose disagreement rises
above the promise of :mod:`.thresholds` (after CALM: Schuster et al., NeurIPS 2022; the paper names such exits in section 6).

The choice follows from prices, as in self-speculation. An exit is tried if it is expected to be ``policy.WORTH`` times as fast
as plain full-depth tokens; the share of tokens that exit there is learned online. If no exit is expected to pay, one token in
``policy.PROBE_TOKENS`` is still tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from balcony_edge.bundle.manifest import ConfidenceSpec
from balcony_edge.control.controller import SPIKE
from balcony_edge.device.costs import CostModel
from balcony_runtime.decoding.policy import Made, Probing, Turn
from balcony_runtime.decoding.thresholds import binomial_tail, measured

#: Weight of the calibration's share of early exits, in tokens, and weight of the past at every further token.
PRIOR_TOKENS, MEMORY = 64.0, 0.995
#: Largest number of early tokens that one full-depth pass checks, and number of trials between two checks. With these
#: values the price stays below 1 %.
MOST_CHECKED, CHECK_EVERY = 4, 32
#: Probability, under the promise, of at least as many disagreements as were seen; below it the threshold is raised.
SLIPPED = 0.01
#: Largest number of checks of an exit that count. Beyond it half of them are forgotten: old ones would hide a promise that
#: does not hold any more, and the test takes time for every disagreement.
MOST_COUNTED = 4096
#: Share of the distance to certainty by which a threshold is raised.
RAISE = 0.3


class Trial(NamedTuple):
    """A planned early exit: the exit, its threshold, and the expected speed-up over plain tokens."""

    exit_layer: int
    threshold: float
    speedup: float


class Telemetry(NamedTuple):
    """Checks of an exit's tokens by the full depth: the number of checks, and the number of disagreements."""

    checked: int
    disagreed: int


class Confident:
    """Chooses trials and learns from them. One object serves all replies of a loaded bundle."""

    def __init__(self, exits: tuple[int, ...], spec: ConfidenceSpec | None) -> None:
        self._exits, self.spec = exits, spec
        known = {} if spec is None else spec.thresholds
        #: Exit layer → threshold.
        self.thresholds = {e: known[e].threshold for e in exits[:-1] if e in known}
        # Exit → (tokens that exited, tokens that tried), with exponential forgetting.
        self._counts = {e: (PRIOR_TOKENS * known[e].exit_share, PRIOR_TOKENS) for e in self.thresholds}
        #: Exit → the last checks of its tokens, since its threshold was last raised, and checks in total.
        self._recent = dict.fromkeys(exits[:-1], Telemetry(0, 0))
        self.telemetry = dict.fromkeys(exits[:-1], Telemetry(0, 0))
        self._probing, self._since_check, self._memory = Probing(), 0, MEMORY

    def plan(
        self,
        costs: CostModel,
        context_length: int,
        due: tuple[Sequence[int], Sequence[int]],
        allowed: tuple[int, ...],
        most_ms: float,
    ) -> Trial | None:
        """Return the trial for the next token, or None if a plain token is as fast.

        Args:
            costs: prices of this device.
            context_length: number of rows before the new one.
            due: rows that each stage and each balcony would run for the new row.
            allowed: exits that the budget allows.
            most_ms: longest time that an unsure token may take, at slowdown 1.
        """
        self._probing.tokens += 1
        if not self._probing.is_due():
            return None
        full, count = self._exits[-1], len(self._exits)
        plain_ms = costs.steady_ms(full, context_length)
        best: Trial | None = None
        for exit_layer, threshold in self.thresholds.items():
            if exit_layer not in allowed:
                continue
            exited, tried = self._counts[exit_layer]
            share, index = exited / tried, self._exits.index(exit_layer)
            rows = 1 + round(share / max(1 - share, 0.05))  # early tokens wait for the next unsure one
            shallower, deeper = (0,) * (index + 1), count - index - 1
            shallow_ms = costs.steady_ms(exit_layer, context_length)
            deep_ms = costs.step_ms(full, shallower + (rows,) * deeper, (1,) * count, context_length)
            speedup = plain_ms / (shallow_ms + (1 - share) * deep_ms)
            # A token of which the balcony is not sure takes all rows that are pending now.
            unsure_ms = costs.step_ms(exit_layer, *due, context_length)
            unsure_ms += costs.step_ms(full, (*shallower, *due[0][index + 1 :]), (1,) * count, context_length)
            if unsure_ms <= most_ms and (best is None or speedup > best.speedup):
                best = Trial(exit_layer, threshold, speedup)
        if not self._probing.is_worth(None if best is None else best.speedup):
            return None
        self._memory, self._probing = self._probing.memory(MEMORY), Probing()
        return best

    def learn(self, exit_layer: int, exited: bool) -> None:
        """Learn from a trial."""
        self._since_check += 1
        self._probing.plan_now()
        before, tried = self._counts[exit_layer]
        self._counts[exit_layer] = (self._memory * before + exited, self._memory * tried + 1)

    def due(self, waiting: int) -> int:
        """Number of early tokens to check in the next full-depth pass, which runs the rows of ``waiting`` early tokens."""
        if not waiting or self._since_check < CHECK_EVERY:
            return 0
        self._since_check = 0
        return min(waiting, MOST_CHECKED)

    def check(self, exit_layer: int, agreed: bool) -> None:
        """Count the check of an early token, and raise the exit's threshold if the promise no longer holds."""
        self.telemetry[exit_layer] = _counted(self.telemetry[exit_layer], agreed)
        recent = _counted(self._recent[exit_layer], agreed)
        if recent.checked > MOST_COUNTED:
            recent = Telemetry(recent.checked // 2, recent.disagreed // 2)
        self._recent[exit_layer] = recent
        assert self.spec is not None  # the token exited by a threshold
        # The promise is about all tokens, so a larger share of the tokens that exit early may disagree.
        exited, tried = self._counts[exit_layer]
        allowed = min(self.spec.max_disagreement / max(exited / tried, 1e-3), 1.0)
        if 1 - binomial_tail(recent.disagreed - 1, recent.checked, allowed) < SLIPPED:
            old = self.thresholds[exit_layer]
            self.thresholds[exit_layer] = old + RAISE * (1 - old)
            self._recent[exit_layer] = Telemetry(0, 0)


def _counted(seen: Telemetry, agreed: bool) -> Telemetry:
    return Telemetry(seen.checked + 1, seen.disagreed + (not agreed))


class EarlyExits:
    """Confidence exits in one reply: a :class:`Policy`.

    Args:
        confident: choice of trials and learned values, shared by all replies.
    """

    def __init__(self, confident: Confident) -> None:
        self._confident = confident
        #: Place in the sequence → exit, for tokens that exited early and were not checked.
        self._unchecked: dict[int, int] = {}

    def attempt(self, turn: Turn) -> Made | None:
        """Make one token at the trial's exit if its balcony is sure, else at the full depth. None without a trial."""
        sequence, costs, most_ms = turn.sequence, turn.costs, turn.most_ms
        full = costs.exits[-1]
        if turn.budget.has_target and turn.budget.tpot_ms is None:  # then the controller has a bound of its own
            most_ms = SPIKE * costs.steady_ms(full, sequence.length)
        if most_ms < math.inf:
            # An early token leaves a row. If the next full step had no time for all of them, the controller would leave the
            # full depth, and take tokens of which no balcony is sure.
            stage_rows, balcony_rows = sequence.rows_due(2)
            if costs.step_ms(full, (1, *stage_rows[1:]), balcony_rows, sequence.length + 1) > most_ms:
                return None
        allowed = turn.budget.allowed_exits(costs.exits)
        trial = self._confident.plan(costs, sequence.length, sequence.rows_due(1), allowed, most_ms)
        return None if trial is None else self._run(turn, trial)

    def learn_plain(self, predicted_ms: float, measured_ms: float) -> None:
        """Do nothing: the choice of a trial depends on prices only."""

    def _run(self, turn: Turn, trial: Trial) -> Made:
        sequence, sampler, costs = turn.sequence, turn.sampler, turn.costs
        policy, unchecked = self._confident, self._unchecked
        context = sequence.length
        price_ms = costs.step_ms(trial.exit_layer, *sequence.rows_due(1), context)
        logits = sequence.step(trial.exit_layer, turn.ids)
        assert policy.spec is not None  # a trial has a threshold
        sure = float(measured(logits, policy.spec.measure)[0])
        words = f"{sure:.2f} sure at {trial.exit_layer}, asked {trial.threshold:.2f}"
        # The promise is about the likeliest token, so it must be one that the reply's structure allows.
        exited = sure >= trial.threshold and sampler.allows(int(logits[0].argmax()))
        policy.learn(trial.exit_layer, exited)
        end = sequence.length
        if exited:
            unchecked[end] = trial.exit_layer
            return Made([sampler.pick(logits)], [logits], trial.exit_layer, words, price_ms=price_ms)
        # Count the last early tokens in a row. Sampled tokens are not checked, because they need not be the likeliest.
        run = 0
        while sampler.greedy and end - run - 1 in unchecked:
            run += 1
        checked = policy.due(run)
        full = sequence.exits[-1]
        price_ms += (
            costs.step_ms(full, sequence.rows_due(0)[0], (1,) * len(sequence.exits), context) - costs.overhead_ms
        )
        price_ms += costs.head.pass_ms(checked + 1, context) - costs.head.pass_ms(1, context)
        rows = sequence.advance(full, [], num_logits=checked + 1)[0]  # (checked + 1, V)
        # The full depth's choice for a token is at the row before the token's place.
        wrong = 0
        for place, said in zip(range(end - checked, end), rows[:-1].argmax(-1).tolist(), strict=True):
            agreed = said == int(sequence.tokens[0, place])
            policy.check(unchecked[place], agreed)
            wrong += not agreed
        if checked:
            words += f", {wrong} of the last {checked} tokens are not the full depth's"
        unchecked.clear()  # the deeper stages have now run their rows
        last = np.ascontiguousarray(rows[-1:])
        return Made([sampler.pick(last)], [last], full, words, price_ms=price_ms)
