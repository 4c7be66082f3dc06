"""Policies: other ways to make the token of a full-depth step than one plain step.

Owns the protocol between the decode loop and a policy, and when one is planned and tried.
:class:`~balcony_runtime.decoding.speculate.Speculator` drafts several tokens and checks them in one pass;
:class:`~balcony_runtime.decoding.confident.EarlyExits` takes a shallow exit's token if its balcony is sure. A
policy does not know the pace of the tokens or the controller's rules.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from balcony_edge.budget import Budget
from balcony_edge.device.costs import CostModel
from balcony_runtime.backends.base import FloatArray, IntArray
from balcony_runtime.decoding.sampling import Sampler
from balcony_runtime.token_sequence import TokenSequence

#: Expected speed-up over plain steps from which a policy is used. It is above 1 because prices are some percent off.
WORTH = 1.03
#: Tokens after which it is tried even if it is not expected to pay. A useless trial costs less than 0.5 %.
PROBE_TOKENS = 512
#: Weight of the past at such a trial, which stands for so many tokens: a few of them say more than the calibration's text.
PROBE_MEMORY = 0.8
#: Tokens until the next choice after one that found nothing: a choice takes half a millisecond with cold caches.
PLAN_TOKENS = 16


class Probing:
    """When a policy is planned, and when it is tried although it is not expected to pay.

    Attributes:
        tokens: full-depth tokens since its last use.
    """

    def __init__(self) -> None:
        self.tokens = self._plan_at = 0

    def plan_now(self) -> None:
        """Plan for the next token, because something was learned."""
        self._plan_at = 0

    def put_off(self) -> None:
        """Plan again after ``PLAN_TOKENS``."""
        self._plan_at = self.tokens + PLAN_TOKENS

    def is_due(self) -> bool:
        """Whether to plan: a plan that was not worth it is made again after ``PLAN_TOKENS``."""
        return self.tokens >= self._plan_at or self.tokens == PROBE_TOKENS

    @property
    def tries(self) -> bool:
        """Whether a plan is used now that is not expected to pay."""
        return self.tokens >= PROBE_TOKENS

    def memory(self, usual: float) -> float:
        """Weight of the past for what this use shows, if it has its ``usual`` weight at uses that are expected to pay."""
        return PROBE_MEMORY if self.tries else usual

    def is_worth(self, speedup: float | None) -> bool:
        """Whether to use a plan with this expected speed-up (None: there is no plan), or to try it after so many tokens."""
        if speedup is not None and (speedup >= WORTH or self.tries):
            return True
        self.put_off()
        return False


class Turn(NamedTuple):
    """One full-depth token that a policy may make.

    Attributes:
        sequence: sequence of one member, without the previous token.
        ids: previous token, (1,).
        sampler: picks the tokens of the reply.
        budget: budget of this token.
        costs: prices of this device.
        most_ms: longest time that the budget allows for one gap, at slowdown 1; infinite without a target.
        slowdown: slowdown of the device by which that time is shorter than the target.
        begin_ns: start of the step, on ``time.perf_counter_ns``.
        left: most tokens that the reply may still have.
    """

    sequence: TokenSequence
    ids: IntArray
    sampler: Sampler
    budget: Budget
    costs: CostModel
    most_ms: float
    slowdown: float
    begin_ns: int
    left: int


class Made(NamedTuple):
    """Tokens of one step, in order.

    Attributes:
        ids: tokens, each (B,).
        logits: logits from which each was picked, (B, V); None if the engine picked the token itself.
        exit_layer: exit of the last token.
        words: reason in plain words; empty for a plain step.
        drafted: number of drafts in the round that gave the tokens; 0 without drafts.
        price_ms: price of what a policy ran, for the slowdown; 0 if that says nothing about it.
    """

    ids: list[IntArray]
    logits: list[FloatArray | None]
    exit_layer: int
    words: str = ""
    drafted: int = 0
    price_ms: float = 0.0


class Policy(Protocol):
    """Another way to make full-depth tokens, used if it is measured to be faster."""

    def attempt(self, turn: Turn) -> Made | None:
        """Make the tokens of this step, or return None: then a plain step makes them.

        None if a plain step is as fast (nothing has run then), or if a round made nothing that can be used (it is undone).
        Else the sequence has one more row for each token that was made: the previous token and all made ones but the last. The
        sampler has picked or judged each of them once, they are at most ``turn.left``, and the budget allows their exit.
        """
        ...

    def learn_plain(self, predicted_ms: float, measured_ms: float) -> None:
        """Learn from a plain full-depth step: its price at slowdown 1, and its measured time."""
        ...
