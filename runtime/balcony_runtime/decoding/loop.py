"""The decode loop: asks the controller for an exit, waits where a pace is asked for, advances the sequence, picks a token.

Owns the clocks (``perf_counter`` for durations, ``monotonic`` for moments) and the order of a step. A token's latency is the
gap that its receiver sees, less the time that the receiver itself kept the loop waiting. It knows no text;
:mod:`balcony_runtime.llm` turns ids into it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from balcony_edge.budget import Budget
from balcony_edge.bundle.manifest import ConfidenceSpec
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import CatchUp, Decision, Measurement, Observation
from balcony_edge.control.trace import TraceWriter
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.readings import Reading
from balcony_edge.errors import InfeasibleError
from balcony_runtime.backends.base import FloatArray, IntArray
from balcony_runtime.decoding.confident import Confident, Trial, run_trial
from balcony_runtime.decoding.sampling import Sampler
from balcony_runtime.decoding.speculate import Round, Speculator, run_round
from balcony_runtime.engine import TokenSequence

#: Rows of one portion of idle work: the most that whoever ends the idleness waits for is the end of one portion.
IDLE_ROWS = 8


class Step(NamedTuple):
    """One token of each sequence of a batch.

    Attributes:
        ids: tokens, (B,).
        logits: that they were picked from, (B, V); the next step writes over them. None where nobody wants them and the engine
            picks tokens itself.
        decision: the controller's.
        target_ms: the budget's ``tpot_ms`` when it decided.
        latency_ms: from the request for the token to the token, waiting for its pace included.
        caught_up_rows: backlog that was worked off in the same gap.
        budget: that it was decided for.
        readings: what the sensors said then; empty where the budget needs none.
        read_s: when that was.
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


class Learned:
    """What replies leave for the next one: the controller's state, and the time that we kept the device busy.

    Replies that run at once share it: each starts from what was left last, and all of them are our own load.
    """

    def __init__(
        self, exits: tuple[int, ...], agreement: Mapping[int, float | None], confidence: ConfidenceSpec | None = None
    ) -> None:
        self.state = ControllerState.initial()
        self.busy_ns = 0
        self.speculator = Speculator(exits, agreement)
        self.confident = Confident(exits, confidence)


class Surroundings(NamedTuple):
    """What a decode loop is given beside the sequence.

    Attributes:
        budget_and_costs: asked before every step, so that a new budget takes effect at the next token. Costs may be None
            as long as the budget has no target.
        readings: the latest of every sensor; asked where the budget needs them, or where there is a trace.
        sleep: waits so many seconds, or less when the stream is cancelled; true when it was.
        trace: where the run is recorded.
        learned: what is known of the device from replies before.
        keep_logits: whether steps carry the logits.
    """

    budget_and_costs: Callable[[], tuple[Budget, CostModel | None]]
    readings: Callable[[], tuple[Reading, ...]] = tuple
    sleep: Callable[[float], object] = time.sleep
    trace: TraceWriter | None = None
    learned: Learned | None = None
    keep_logits: bool = True


def steps(
    sequence: TokenSequence, prompt: IntArray, sampler: Sampler, exits: tuple[int, ...], around: Surroundings
) -> Iterator[Step]:
    """Decode without end; the caller stops asking.

    Args:
        sequence: what to continue.
        prompt: rows to append first, (B, n), n ≥ 1.
        sampler: picks the tokens.
        exits: the engine's exits.
        around: budget, costs, sensors, trace.

    Raises:
        InfeasibleError: nothing meets the targets and the budget asks for an error then.
        ContextLengthError: the sequence is full.
    """
    learned = around.learned or Learned(exits, {})
    deciding = _Deciding(sequence, prompt.shape[1], exits, around, learned)
    picks_inside = sequence.picks_inside and sampler.greedy and not around.keep_logits
    early: dict[int, int] = {}
    last: Measurement | None = None
    ids, made, emitted_ns = prompt[:, -1], 0, 0
    while True:
        begin, run_before = time.perf_counter_ns(), sequence.rows_run
        decision = deciding.decide(made, last)
        budget, priced, policies = deciding.budget, deciding.priced, made and deciding.policies
        planned = _round(sequence, budget, priced, decision, learned) if policies else None
        if planned is not None:
            ids, count, emitted_ns = yield from _speculated(
                planned, sequence, ids, sampler, exits, decision, begin, deciding, learned
            )
            made, last = made + count, None
            continue
        if decision.catch_up is not None:
            _catch_up(sequence, decision.catch_up, exits)
        trial = _trial(sequence, budget, priced, decision, learned) if policies else None
        if trial is None:
            ids, logits = _advanced(sequence, ids if made else prompt, sampler, decision.exit_layer, picks_inside)
            given = decision
        else:
            ids, logits, given = _tried(sequence, ids, sampler, decision, trial, learned.confident, early)
        done_ns = time.perf_counter_ns()
        measured = made and decision.price_ms and trial is None
        # prefill is priced by other numbers than decoding: it says nothing about the slowdown of the next step
        last = Measurement(decision.exit_layer, decision.price_ms, (done_ns - begin) / 1e6) if measured else None
        if policies:
            _learn_plain(learned, budget, priced, decision, sequence, (done_ns - begin) / 1e6)
        learned.busy_ns += done_ns - begin
        if decision.period_ms:  # after the step, so that what it took too long is taken from the wait
            learned.busy_ns += _wait(sequence, decision, emitted_ns + int(decision.period_ms * 1e6), around.sleep)
            done_ns = time.perf_counter_ns()
        latency_ns, emitted_ns = done_ns - begin, done_ns
        # what was run beyond the new rows is backlog
        due = run_before + (exits.index(given.exit_layer) + 1) * (1 if made else prompt.shape[1])
        made += 1
        if around.trace is not None:
            # a replay decides again: what it must come to is the decision, whatever a balcony was sure of
            deciding.record(given._replace(exit_layer=decision.exit_layer), latency_ns / 1e6)
        yield Step(
            ids, logits, given, budget.tpot_ms, latency_ns / 1e6, sequence.rows_run - due, budget, *deciding.read
        )


class _Deciding:
    """The controller beside one decode loop: what it is asked, what it said last, and the trace of both.

    Attributes:
        budget: that the last decision was made for.
        priced: the costs that it weighed; None where nothing was.
        policies: whether that budget drafts tokens or lets sure ones exit.
        read: what the sensors said when it was made (empty where nothing needs them), and when that was.
    """

    def __init__(
        self, sequence: TokenSequence, prompt_rows: int, exits: tuple[int, ...], around: Surroundings, learned: Learned
    ) -> None:
        self._sequence, self._prompt_rows, self._around, self._learned = sequence, prompt_rows, around, learned
        self._unmeasured = _unmeasured(exits)
        self._controller = Controller(self._unmeasured)
        self._state, self._decision = learned.state.for_next_reply(), None  # type: ControllerState, Decision | None
        self._seen: Observation | None = None
        self._started_s = time.monotonic()
        self.budget, self.priced = Budget(), None  # type: Budget, CostModel | None
        self.policies = self._senses = False
        self.read: tuple[tuple[Reading, ...], float] = (), 0.0
        self._only: Decision | None = None  # the one that there is without a target
        if around.trace is not None:
            around.trace.begin(self._state)

    def decide(self, made: int, last: Measurement | None) -> Decision:
        """The next token's.

        Args:
            made: tokens so far.
            last: what the step before took, where that says something.

        Raises:
            InfeasibleError: nothing meets the targets and the budget asks for an error then.
        """
        budget, costs = self._around.budget_and_costs()
        if budget is not self.budget:  # what follows from it costs as much as a decision
            self.budget, self._senses = budget, budget.needs_sensors
            self.policies = budget.speculates or budget.confident
            self._only = self._controller.settled(budget)
        if costs is not None and costs is not self.priced:
            self._controller, self.priced, self._decision = Controller(costs), costs, None
            self._only = self._controller.settled(budget)
        decision, sequence = self._decision, self._sequence
        if decision is not None and self._around.trace is None:
            if decision is self._only:  # as long as that holds there is nothing to observe
                return decision
            if made and sequence.up_to_date(decision.exit_layer):
                stayed = self._controller.stays(budget, self._state, sequence.length, last)
                if stayed is not None:
                    self._state, self._decision = stayed
                    self._learned.state = stayed[0]
                    return stayed[1]
        return self._weighed(budget, made, last)

    def _weighed(self, budget: Budget, made: int, last: Measurement | None) -> Decision:
        rows, sequence, around = 1 if made else self._prompt_rows, self._sequence, self._around
        now_s = time.monotonic()
        self.read = around.readings() if around.trace is not None or self._senses else (), now_s
        self._seen = Observation(
            budget,
            sequence.length + rows - 1,
            *sequence.rows_due(rows),
            last,
            made,
            self._started_s,
            now_s,
            self._learned.busy_ns / 1e9,
            self.read[0],
        )
        self._state, self._decision = self._controller.decide(self._state, self._seen)
        self._learned.state = self._state
        if self._decision.ends(budget):
            raise InfeasibleError(f"{self._decision.reason}: raise the target or allow less depth")
        return self._decision

    def record(self, decided: Decision, latency_ms: float) -> None:
        """A line of the trace, where there is one."""
        trace = self._around.trace
        if trace is not None and self._seen is not None:
            trace.write(self.priced or self._unmeasured, self._seen, decided, latency_ms, self._sequence.pending_rows)


def _advanced(
    sequence: TokenSequence, new: IntArray, sampler: Sampler, exit_layer: int, picks_inside: bool
) -> tuple[IntArray, FloatArray | None]:
    """Tokens (B,) and logits at an exit after a prompt (B, n) or one token of each (B,)."""
    if new.ndim == 2:
        logits = sequence.advance(exit_layer, new)[:, -1]
    elif picks_inside:
        return sequence.step_best(exit_layer, new), None
    else:
        logits = sequence.step(exit_layer, new)
    return sampler.pick(logits), logits


def _learn_plain(
    learned: Learned,
    budget: Budget,
    costs: CostModel | None,
    decision: Decision,
    sequence: TokenSequence,
    measured_ms: float,
) -> None:
    """Tell the speculator what a plain full-depth step took."""
    if budget.speculates and costs is not None and decision.exit_layer == costs.exits[-1]:
        expected_ms = decision.price_ms or costs.steady_ms(decision.exit_layer, sequence.length - 1)
        learned.speculator.learn_plain(expected_ms, measured_ms)


def _tried(
    sequence: TokenSequence,
    ids: IntArray,
    sampler: Sampler,
    decision: Decision,
    trial: Trial,
    policy: Confident,
    early: dict[int, int],
) -> tuple[IntArray, FloatArray, Decision]:
    """A token where a balcony may be sure enough: ids, logits, and the decision as it came out."""
    ids, logits, exit_layer, sure = run_trial(sequence, ids, sampler, trial, policy, early)
    words = (f"{sure:.2f} sure at {trial.exit_layer}, asked {trial.threshold:.2f}", *decision.words)
    return ids, logits, decision._replace(exit_layer=exit_layer, words=words)


def _speculated(
    planned: Round,
    sequence: TokenSequence,
    ids: IntArray,
    sampler: Sampler,
    exits: tuple[int, ...],
    decision: Decision,
    begin_ns: int,
    deciding: _Deciding,
    learned: Learned,
) -> Generator[Step, None, tuple[IntArray, int, int]]:
    """A round in the place of a full-depth step; returns its last token, how many there were, and when they were out."""
    behind_ns = time.perf_counter_ns()
    sequence.run_balcony(planned.exit_layer, sequence.length)  # what a stretch of plain steps left it
    round_ns = time.perf_counter_ns()
    outcome = run_round(sequence, ids, sampler, exits, planned)
    done_ns = time.perf_counter_ns()
    latency_ms = (done_ns - begin_ns) / 1e6
    learned.speculator.learn(planned, outcome.kept, latency_ms - (round_ns - behind_ns) / 1e6)
    learned.busy_ns += done_ns - begin_ns
    words = (f"drafted {planned.drafts} at {planned.exit_layer}, kept {outcome.kept}", *decision.words)
    checked = decision._replace(words=words, drafted=planned.drafts)
    deciding.record(checked, latency_ms)
    budget = deciding.budget
    for token, row in zip(outcome.tokens, outcome.logits, strict=True):
        ids = np.array([token], np.int64)
        yield Step(ids, row[None], checked, budget.tpot_ms, latency_ms, 0, budget, *deciding.read)
        latency_ms = 0.0  # the others of the round came with the first
    return ids, len(outcome.tokens), done_ns


def _round(
    sequence: TokenSequence, budget: Budget, costs: CostModel | None, decision: Decision, learned: Learned
) -> Round | None:
    """The round that is worth running in the place of this full-depth step; None where it is none, paced, or has a backlog."""
    if (
        not budget.speculates
        or costs is None
        or any(sequence.stage_rows)
        or not _free_full_step(sequence, budget, costs, decision)
    ):
        return None
    most_ms = _slack_ms(budget, decision)  # a round is one gap
    room = sequence.max_length - sequence.length
    return learned.speculator.plan(costs, sequence.length, sequence.balcony_rows, room, most_ms)


def _trial(
    sequence: TokenSequence, budget: Budget, costs: CostModel | None, decision: Decision, learned: Learned
) -> Trial | None:
    """Where a full-depth token is worth trying to exit early; None where nowhere is, or a pace or a deadline asks for more."""
    if not budget.confident or costs is None or not _free_full_step(sequence, budget, costs, decision):
        return None
    allowed = budget.allowed_exits(costs.exits)
    return learned.confident.plan(costs, sequence.length, sequence.balcony_rows, allowed, _slack_ms(budget, decision))


def _free_full_step(sequence: TokenSequence, budget: Budget, costs: CostModel, decision: Decision) -> bool:
    """Whether a step is one sequence's at the full depth, with neither a pace nor a deadline that asks for more."""
    alone = sequence.batch_size == 1 and decision.exit_layer == costs.exits[-1]
    return alone and not decision.period_ms and budget.deadline_s is None


def _slack_ms(budget: Budget, decision: Decision) -> float:
    """What one gap may cost at slowdown 1."""
    slowdown = decision.predicted_ms / decision.price_ms if decision.price_ms else 1.0
    return math.inf if budget.tpot_ms is None else budget.tpot_ms / slowdown


def _wait(sequence: TokenSequence, decision: Decision, until: int, sleep: Callable[[float], object]) -> int:
    """Wait until a token is due, backlog first; returns the nanoseconds that went to the backlog."""
    begin = worked = time.perf_counter_ns()
    work_until = min(until, begin + int(decision.idle_ms * 1e6))
    portion_ns = int(decision.predicted_ms * 1e6)  # a portion is taken for a step until one was timed
    while worked + portion_ns <= work_until and not sleep(0) and sequence.catch_up(IDLE_ROWS):
        before, worked = worked, time.perf_counter_ns()
        portion_ns = worked - before
    if until > worked:
        sleep((until - worked) / 1e9)
    return worked - begin


def _catch_up(sequence: TokenSequence, chunk: CatchUp, exits: tuple[int, ...]) -> None:
    if chunk.balcony:
        sequence.run_balcony(exits[chunk.stage], chunk.rows)
    else:
        sequence.run_stage(chunk.stage, chunk.rows)


def _unmeasured(exits: tuple[int, ...]) -> CostModel:
    """Stands in while no budget has a target: then nothing is weighed against a price."""
    nothing = (UnitCost(0.0),) * len(exits)
    return CostModel(exits, nothing, nothing, nothing[0])
