"""The decode loop: asks the controller for an exit, advances the sequence, picks a token, and waits if a pace is asked for.

Owns the clocks (``perf_counter`` for durations, ``monotonic`` for moments) and the order of a step. A token's latency is the
gap that its receiver sees, without the time for which the receiver kept the loop waiting. This module does not know text;
:mod:`balcony_runtime.telling` turns steps into text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from balcony_edge.budget import Budget
from balcony_edge.control.catching_up import IDLE_ROWS, PORTION_MEMORY
from balcony_edge.control.company.seen import Chunk, CompanyState, StreamSeen
from balcony_edge.control.controller import Controller, ControllerState, quantile_of
from balcony_edge.control.decision import CatchUp, Decision, Measurement, Observation
from balcony_edge.control.governor import Governor
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.readings import Reading
from balcony_edge.errors import InfeasibleError, InputError
from balcony_runtime.backends.base import FloatArray, IntArray
from balcony_runtime.decoding.confident import EarlyExits
from balcony_runtime.decoding.learned import Learned
from balcony_runtime.decoding.policy import Made, Policy, Turn
from balcony_runtime.decoding.sampling import Sampler
from balcony_runtime.token_sequence import TokenSequence

if TYPE_CHECKING:
    from balcony_edge.control.trace import TraceWriter

#: Latest reading of every sensor, and the time at which they were read.
Readings = tuple[tuple[Reading, ...], float]


class Step(NamedTuple):
    """One token of each sequence of a batch.

    Attributes:
        ids: tokens, (B,).
        logits: logits from which they were picked, (B, V); the next step overwrites them. Can be None
            if the environment does not keep logits, and always is for forced tokens.
        decision: decision of the controller.
        target_ms: ``tpot_ms`` of the budget at the time of the decision; for the first token, ``ttft_ms``.
        latency_ms: time from the request for the token to the token, waiting for its pace included.
        caught_up_rows: pending rows that were worked off in the same gap.
        budget: budget of the decision.
        readings: readings of the sensors at the time of the decision; empty if the budget needs none.
        read_s: time of the readings.
        forced: whether the reply's structure left no other token, so that the engine did not run for it.
    """

    ids: IntArray
    logits: FloatArray | None
    decision: Decision
    target_ms: float | None
    latency_ms: float
    caught_up_rows: int
    budget: Budget
    readings: tuple[Reading, ...]
    read_s: float
    forced: bool = False


class Environment(NamedTuple):
    """What a decoder needs around it: budget, prices, sensors, trace and learned values.

    Attributes:
        budget_and_costs: gives budget and prices before every step, so that a new budget takes effect at the next token.
            Prices may be None as long as the budget has no target.
        readings: gives the latest reading of every sensor; called if the budget needs them or a trace is recorded.
        learned: what earlier replies learned about the device.
        max_new_tokens: largest number of tokens of the reply; the sequence has room for them.
        sleep: waits for that many seconds, or less if the stream is cancelled; returns whether it was.
        trace: record of the run.
        keep_logits: whether steps must carry the logits.
        asked_s: time of the request on ``time.monotonic``; None for the time at which the decoder is made.
    """

    budget_and_costs: Callable[[], tuple[Budget, CostModel | None]]
    readings: Callable[[], tuple[Reading, ...]]
    learned: Learned
    max_new_tokens: int
    sleep: Callable[[float], object] = time.sleep
    trace: TraceWriter | None = None
    keep_logits: bool = False
    asked_s: float | None = None


class Decoder:
    """Decodes one reply: asks the controller, runs the step or the budget's policy, keeps the pace, records the trace.

    Args:
        sequence: sequence to continue, of one member or of a batch.
        prompt: tokens to append, (B, n), n ≥ 1.
        sampler: picks the tokens.
        environment: budget, prices, sensors, trace.
    """

    def __init__(self, sequence: TokenSequence, prompt: IntArray, sampler: Sampler, environment: Environment) -> None:
        #: Sequence of the reply.
        self.sequence = sequence
        self._sampler, self._environment = sampler, environment
        #: Rows of the prompt that need not run.
        self.kept_rows = sequence.stage_cursor[0]
        self._ids = prompt[:, -1]  # the last token of each member, (B,)
        self._last: Measurement | None = None
        #: Time of the last token, on ``time.perf_counter_ns``.
        self.emitted_ns = 0
        self._learned = environment.learned
        self._picks_inside = sequence.engine.backend.picks_inside and sampler.greedy and not environment.keep_logits
        self._early_exits = EarlyExits(self._learned.confident)
        self._budget = Budget()
        self._costs: CostModel | None = None
        self._policy: Policy | None = None
        #: Whether the budget that was last seen needs sensors.
        self.senses = False
        self._unmeasured = unmeasured(sequence.exits)
        self._controller = Controller(self._unmeasured)
        self._latest = self._learned.state
        self._before = self._state = self._latest.for_next_reply()  # before and after the last decision
        self._decision: Decision | None = None
        self._settled: tuple[ControllerState, Decision] | None = None  # a decision that stands until something changes
        self._followed: tuple[int, Slowdown, Governor] | None = None  # the last round, until a step is made alone
        self._seen: Observation | None = None
        self._read: Readings = (), 0.0
        #: Time of the request.
        self.started_s = time.monotonic() if environment.asked_s is None else environment.asked_s
        #: Number of tokens that were made.
        self.made = 0
        self._late = self._forced = self._portion_ns = 0
        self._rows_run = sequence.rows_run  # at the last token
        #: Tokens that were made, and that nobody has taken yet: an interrupt may come in between, or while a token waits for
        #: its pace. The next step brings them. Who takes them empties the list.
        self.untold: list[Step] = []
        sequence.append(prompt)

    def steps(self) -> Generator[Step]:
        """Decode without end; the caller stops asking.

        Raises:
            InfeasibleError: nothing meets the targets, and the budget asks for an error in that case.
            ContextLengthError: the sequence is full.
        """
        waited_ms = 1000 * (time.monotonic() - self.started_s)
        while True:
            found, self.untold = self.step(waited_ms), []
            waited_ms = 0.0
            yield from found

    def step(self, waited_ms: float = 0.0) -> list[Step]:
        """Make the next token, or the next tokens if a policy makes several at once; errors as for :meth:`steps`.

        ``waited_ms`` is the time since the token was asked for.
        """
        if self.untold:
            return self.untold
        sequence, learned, ids = self.sequence, self._learned, self._ids
        begin_ns, rows_before, first = time.perf_counter_ns(), sequence.rows_run, not self.made
        decision = self._decide(self._last)
        # At once: with cold caches each name costs a microsecond (docs/LOG.md, "Python's share of a step, once more").
        exit_layer, _, price_ms, _, _, catch_up, period_ms, *_ = decision
        if catch_up is not None:
            run_chunk(sequence, catch_up)
        policy, run_before = self._policy, sequence.rows_run
        attempted = None if policy is None else self._attempt(policy, ids, decision, begin_ns)
        # A round without a usable token has run: its time must not count as that of the plain step after it.
        undone = attempted is None and sequence.rows_run > run_before
        made = attempted or self._step(ids, exit_layer)
        if first:
            sequence.checkpoint()  # the end of the prompt, to which the next reply may go back
        self._ids = made.ids[-1]
        forced = self._force(self._ids, len(made.ids)) if self._sampler.guided else []
        done_ns = time.perf_counter_ns()
        self._last, took_ms = None, (done_ns - begin_ns) / 1e6
        if not first and attempted is None:  # the time of a prompt says nothing about the slowdown of the next step
            if policy is not None:
                self._teach(policy, decision, took_ms, sequence.rows_run - rows_before)
            if price_ms and not undone:
                self._last = Measurement(exit_layer, price_ms, took_ms)
        elif made.price_ms:
            self._last = Measurement(made.exit_layer, made.price_ms, took_ms)
        learned.busy_ns += done_ns - begin_ns
        try:  # wait after the step, so that a slow step shortens the wait
            if period_ms:
                learned.busy_ns += self._wait(decision, self.emitted_ns + int(period_ms * 1e6))
        finally:  # the token is made: an interrupt ends its wait only
            steps = self._told(made, decision, forced, waited_ms - begin_ns / 1e6)
        return steps

    def _caught_up(self, exit_layer: int, forced: int = 0) -> int:
        """Number of rows that ran since the last token besides the new ones up to an exit; the count begins anew.

        With the first token, those of the prompt are new; ``forced`` rows were appended after them.
        """
        sequence, before = self.sequence, self._rows_run
        self._rows_run = rows_run = sequence.rows_run
        new_rows = 1 if self.made else sequence.length - forced - self.kept_rows
        return max(rows_run - before - (sequence.exits.index(exit_layer) + 1) * new_rows, 0)

    def _told(self, made: Made, decision: Decision, forced: list[int], since_ms: float) -> list[Step]:
        """The steps of tokens that are due now; ``since_ms`` is added to the time for their latency."""
        self.emitted_ns = time.perf_counter_ns()
        latency_ms = since_ms + self.emitted_ns / 1e6
        ids_made, logits_made, exit_layer, words, drafted, _ = made
        given = decision
        if words:  # of a policy
            given = decision._replace(exit_layer=exit_layer, words=(words, *decision.words), drafted=drafted)
        if self._environment.trace is not None:
            self._record(self._environment.trace, given, decision.exit_layer, latency_ms)
        steps, caught_up, budget = [], self._caught_up(exit_layer, len(forced)), self._budget
        target_ms = budget.tpot_ms if self.made else budget.ttft_ms
        self._late += bool(self.made) and latency_ms > (target_ms or math.inf)
        if drafted:  # the further rows are those of the drafts
            caught_up = 0
        readings, read_s = self._read
        for ids, logits in zip(ids_made, logits_made, strict=True):
            steps.append(Step(ids, logits, given, target_ms, latency_ms, caught_up, budget, readings, read_s))
            latency_ms = 0.0  # the other tokens of a round came with the first
        self.made += len(steps)
        self.untold = steps + self._forced_steps(forced, steps[-1]) if forced else steps
        return self.untold

    def _decide(self, last: Measurement | None) -> Decision:
        """Decide about the next token.

        Args:
            last: measurement of the previous step, if it says something about the next one.

        Raises:
            InfeasibleError: nothing meets the targets, and the budget asks for an error in that case.
        """
        (budget, costs), latest, settled = self._environment.budget_and_costs(), self._learned.state, self._settled
        if settled is not None and latest is settled[0] and budget is self._budget and costs is self._costs:
            return settled[1]
        if budget is not self._budget:
            self._take_up(budget)
        if self._followed is not None:
            self._go_on_from(*self._followed)
        if latest is not self._latest:  # the slow loop is the device's: others have gone on with it
            # Until its first token, so is what they have learned.
            self._state = self._state._replace(governor=latest.governor) if self.made else latest.for_next_reply()
        if costs is not None and costs is not self._costs:
            self._controller, self._costs, self._decision = Controller(costs), costs, None
        decision, sequence = self._decision, self.sequence
        self._before, found = self._state, None
        if decision is not None and self._environment.trace is None and sequence.up_to_date(decision.exit_layer):
            found = self._controller.shortcut(budget, self._state, sequence.length, last)
            self._settled = found if found is not None and found[0] is self._state else None
        if found is None:
            found = self._controller.decide(self._state, self._observe(budget, last))
        self._state, decision = found
        self._decision, self._latest, self._learned.state = decision, self._state, self._state
        if (decision.infeasible or decision.stops) and (why := decision.refusal(budget)) is not None:
            raise InfeasibleError(why)
        return decision

    def _take_up(self, budget: Budget) -> None:
        """Let the next token have this new budget, and what follows from it."""
        self._budget, self._policy, self.senses = budget, self._policy_of(budget), budget.needs_sensors
        self._settled = None  # a joint decision may see the budget before the next step does

    def _observe(self, budget: Budget, last: Measurement | None) -> Observation:
        environment, sequence, now_s = self._environment, self.sequence, time.monotonic()
        self._read = environment.readings() if self.senses or environment.trace is not None else (), now_s
        rows = self._appended_rows
        stage_rows, balcony_rows = sequence.rows_due(rows)
        self._seen = Observation(
            budget,
            context_length=sequence.length + rows - 1,
            stage_rows=stage_rows,
            balcony_rows=balcony_rows,
            last=last,
            made_tokens=self.made,
            started_s=self.started_s,
            now_s=now_s,
            busy_s=self._learned.busy_ns / 1e9,
            readings=self._read[0],
            forced_tokens=self._forced,
        )
        return self._seen

    @property
    def _appended_rows(self) -> int:
        """Number of rows that the next token appends to the sequence: none at first, where the prompt is in it already."""
        return 1 if self.made else 0

    @property
    def rows_due(self) -> int:
        """Number of rows that the last stage to its deepest exit must take in before the next token; no stage has more."""
        exits = self.sequence.exits
        return self.sequence.rows_due(self._appended_rows)[0][exits.index(self.budget.allowed_exits(exits)[-1])]

    @property
    def budget(self) -> Budget:
        """The budget of the next token."""
        return self._environment.budget_and_costs()[0]

    def seen(self, key: int, asked_s: float, shares: bool = True) -> StreamSeen:
        """What a joint decision must know of this stream.

        Args:
            key: number of the stream.
            asked_s: time at which its next token was asked for, on ``time.monotonic``.
            shares: whether its rows share passes with those of others.
        """
        if (budget := self.budget) is not self._budget:
            self._take_up(budget)
        sequence, new = self.sequence, self._appended_rows
        stage_rows, balcony_rows = sequence.rows_due(new)
        context, made, started_s, late = sequence.length + new - 1, self.made, self.started_s, self._late
        forced = self._forced
        return StreamSeen(
            key, budget, context, stage_rows, balcony_rows, made, started_s, asked_s, shares, late, forced
        )

    @property
    def last_token(self) -> int:
        """The token that the next step of the only member begins with."""
        return int(self._ids[0])

    def take(
        self, logits: FloatArray, decision: Decision, asked_s: float, read: Readings, company: CompanyState
    ) -> None:
        """Take the logits (1, V) of a round as the next token's, as if :meth:`step` had made them; :meth:`taken` tells it.

        ``asked_s`` is when the token was asked for, on ``time.monotonic``. After it the reply may go on alone: from
        its exit, and with what the rounds have learned about the device (``company``).
        """
        if not self.made:
            self.sequence.checkpoint()
        ids = self._sampler.pick(logits)
        kept = logits.copy() if self._environment.keep_logits else None  # the next round overwrites them
        caught_up, budget = self._caught_up(decision.exit_layer), self._budget
        target_ms = budget.tpot_ms if self.made else budget.ttft_ms
        latency_ms = 1000 * (time.monotonic() - asked_s)  # an interrupted round tells it with this one
        step = Step(ids, kept, decision, target_ms, latency_ms, caught_up, budget, *read)
        self._ids = ids
        forced = self._force(ids) if self._sampler.guided else []
        self._last, self.emitted_ns = None, time.perf_counter_ns()
        self.made += 1
        self.untold = [step, *self._forced_steps(forced, step)] if forced else [step]
        self._followed, self._decision = (decision.exit_layer, company.slowdown, company.governor), None

    def taken(self, latency_ms: float) -> list[Step]:
        """The steps of :meth:`take`. All tokens of a round come when the last of them has been picked."""
        first, step = self.made == len(self.untold), self.untold[0]
        self._late += not first and latency_ms > (step.target_ms or math.inf)
        self.untold[0] = step._replace(latency_ms=latency_ms)
        return self.untold

    def _force(self, ids: IntArray, new: int = 1) -> list[int]:
        """Take over the tokens that the structure leaves no choice about after the last of ``new`` ones, and return them.

        All of them except the last become pending rows at once, which run when logits are next asked for. Log-probabilities
        need the model's opinion of each token, and a pace needs them one by one: they are then made like all others.
        """
        budget, sequence = self._budget, self.sequence
        if sequence.batch_size > 1 or self._environment.keep_logits or budget.max_pace_tps is not None:
            self._sampler.prepare()
            return []
        forced = self._sampler.forced(self._environment.max_new_tokens - self.made - new)
        if forced:
            sequence.append([int(ids[0]), *forced[:-1]])
            self._ids = np.array(forced[-1:], np.int64)
        self._sampler.prepare()
        return forced

    def _forced_steps(self, forced: list[int], last: Step) -> list[Step]:
        """Steps of forced tokens, which came with another token."""
        self.made += len(forced)
        self._forced += len(forced)
        decision, target_ms = last.decision._replace(drafted=0), self._budget.tpot_ms
        given = last._replace(
            logits=None, decision=decision, target_ms=target_ms, latency_ms=0.0, caught_up_rows=0, forced=True
        )
        return [given._replace(ids=np.array([token], np.int64)) for token in forced]

    def _go_on_from(self, exit_layer: int, slowdown: Slowdown, governor: Governor) -> None:
        """Take up what :meth:`take` was told last; each round replaces all of what the one before has told."""
        learned = self._state.slowdown.moved(slowdown)._replace(surprise=0, drift=0.0)
        self._state = self._state._replace(
            exit_layer=exit_layer, tokens_since_switch=1, catching_up=False, slowdown=learned, governor=governor
        )
        self._followed = None

    def _policy_of(self, budget: Budget) -> Policy | None:
        if self.sequence.batch_size > 1:  # a policy makes tokens of one sequence, and knows steps of one row
            return None
        if budget.policy == "confident":
            return self._early_exits
        return self._learned.speculator if budget.speculates else None

    def _attempt(self, policy: Policy, ids: IntArray, decision: Decision, begin_ns: int) -> Made | None:
        """Let the policy make the tokens; None if a plain step is due.

        A policy applies only to full-depth steps without a pace or a deadline.
        """
        sequence, budget, costs = self.sequence, self._budget, self._costs
        if costs is None or not self.made:
            return None
        if decision.exit_layer != sequence.exits[-1] or decision.period_ms or budget.deadline_s is not None:
            return None
        slowdown = decision.predicted_ms / decision.price_ms if decision.price_ms else 1.0
        most_ms = math.inf
        if budget.tpot_ms is not None:  # as for plain steps, with the probability asked for
            margin = math.exp(quantile_of(budget.probability) * self._state.slowdown.deviation)
            most_ms = budget.tpot_ms / slowdown / margin
        left = self._environment.max_new_tokens - self.made
        turn = Turn(sequence, ids, self._sampler, budget, costs, most_ms, slowdown, begin_ns, left)
        before, made = sequence.length, policy.attempt(turn)
        # else all later tokens would follow from another context, and nothing would show it
        rows = 0 if made is None else len(made.ids)
        assert sequence.length == before + rows, f"a policy left {sequence.length - before} rows for {rows} tokens"
        return made

    def _step(self, ids: IntArray, exit_layer: int) -> Made:
        """Make one token of each member at an exit, after the prompt or the previous token (B,)."""
        sequence, sampler = self.sequence, self._sampler
        if not self.made:
            logits = sequence.advance(exit_layer, ())[:, -1]
        elif self._picks_inside:
            return Made([sequence.step_best(exit_layer, ids)], [None], exit_layer)
        else:
            logits = sequence.step(exit_layer, ids)
        return Made([sampler.pick(logits)], [logits], exit_layer)

    def _teach(self, policy: Policy, decision: Decision, measured_ms: float, rows_run: int) -> None:
        """Teach a policy a plain full-depth step; it knows steps of one row, so not one that ran pending rows."""
        exits, costs, exit_layer = self.sequence.exits, self._costs, decision.exit_layer
        if costs is not None and exit_layer == exits[-1] and rows_run <= len(exits):
            price_ms = decision.price_ms or costs.steady_ms(exit_layer, self.sequence.length - 1)
            policy.learn_plain(price_ms, measured_ms)

    def _wait(self, decision: Decision, until_ns: int) -> int:
        """Wait until a token is due and work off backlog meanwhile; returns the nanoseconds spent on backlog."""
        sequence, sleep = self.sequence, self._environment.sleep
        begin_ns = worked_ns = time.perf_counter_ns()
        work_until_ns = min(until_ns, begin_ns + int(decision.idle_ms * 1e6))
        portion_ns = max(int(decision.predicted_ms * 1e6), self._portion_ns)  # as long as a step until one was timed
        self._portion_ns -= self._portion_ns // PORTION_MEMORY
        while worked_ns + portion_ns <= work_until_ns and not sleep(0) and sequence.catch_up(IDLE_ROWS):
            before_ns, worked_ns = worked_ns, time.perf_counter_ns()
            portion_ns = self._portion_ns = worked_ns - before_ns
        if until_ns > worked_ns:
            sleep((until_ns - worked_ns) / 1e9)
        return worked_ns - begin_ns

    def _record(self, trace: TraceWriter, given: Decision, decided_exit: int, latency_ms: float) -> None:
        """Write a line of the trace: a replay re-runs only the controller, not the policy. A full disk ends no reply."""
        if self._seen is None:
            return
        costs, decided = self._costs or self._unmeasured, given._replace(exit_layer=decided_exit)
        states, pending_rows = (self._before, self._state), self.sequence.pending_rows
        try:
            trace.write(costs, states, self._seen, decided, latency_ms, pending_rows, given.exit_layer)
        except InputError:
            if trace.failure is None:
                raise
            self._environment = self._environment._replace(trace=None)


def run_chunk(sequence: TokenSequence, chunk: CatchUp | Chunk) -> None:
    """Run pending rows through one graph."""
    if chunk.balcony:
        sequence.run_balcony(sequence.exits[chunk.stage], chunk.rows)
    else:
        sequence.run_stage(chunk.stage, chunk.rows)


def unmeasured(exits: tuple[int, ...]) -> CostModel:
    """Prices of 0, for budgets without a target, which do not use prices."""
    nothing = (UnitCost(0.0),) * len(exits)
    return CostModel(exits, nothing, nothing, nothing[0])
