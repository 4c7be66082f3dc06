"""The decode loop: asks the controller for an exit, advances the sequence, picks a token.

Owns the clock (``perf_counter``) and the order of a step. A step's latency is the gap that the receiver of the token sees,
less the time that the receiver itself kept the loop waiting. It knows no text; :mod:`.generate` turns ids into it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from balcony_edge.budget import Budget
from balcony_edge.controller import CatchUp, Controller, ControllerState, Decision, Measurement, Observation
from balcony_edge.errors import InfeasibleError
from balcony_edge.profile import CostModel, UnitCost
from balcony_runtime.backends.base import FloatArray, IntArray
from balcony_runtime.engine import Sequence
from balcony_runtime.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Step:
    """One token of each sequence of a batch.

    Attributes:
        ids: tokens, (B,).
        logits: that they were picked from, (B, V); the next step writes over them.
        decision: the controller's.
        target_ms: the budget's ``tpot_ms`` when it decided.
        latency_ms: from the request for the token to the token.
        caught_up_rows: backlog that was worked off in the same gap.
    """

    ids: IntArray
    logits: FloatArray
    decision: Decision
    target_ms: float | None
    latency_ms: float
    caught_up_rows: int


def steps(
    sequence: Sequence,
    prompt: IntArray,
    sampler: Sampler,
    exits: tuple[int, ...],
    budget_and_costs: Callable[[], tuple[Budget, CostModel | None]],
) -> Iterator[Step]:
    """Decode without end; the caller stops asking.

    Args:
        sequence: what to continue.
        prompt: rows to append first, (B, n), n ≥ 1.
        sampler: picks the tokens.
        exits: the engine's exits.
        budget_and_costs: asked before every step, so that a new budget takes effect at the next token. Costs may be None
            as long as the budget has no target.

    Raises:
        InfeasibleError: nothing meets the target and the budget asks for an error then.
        ContextLengthError: the sequence is full.
    """
    state = ControllerState.initial()
    ids: IntArray | None = None
    last: Measurement | None = None
    controller, priced = Controller(_unmeasured(exits)), None
    while True:
        begin = time.perf_counter_ns()
        budget, costs = budget_and_costs()
        if costs is not None and costs is not priced:
            controller, priced = Controller(costs), costs
        # the prompt's rows are due at any exit: the first exit is chosen by what the steps after it will cost
        stage_rows, balcony_rows = ([1] * len(exits),) * 2 if ids is None else sequence.rows_due(1)
        observation = Observation(budget, sequence.length, stage_rows, balcony_rows, last)
        state, decision = controller.decide(state, observation)
        if decision.infeasible and budget.on_infeasible == "error":
            raise InfeasibleError(
                f"tpot_ms = {budget.tpot_ms}: {decision.reason}: raise the target or allow less depth"
            )
        before = sequence.rows_run
        if decision.catch_up is not None:
            _catch_up(sequence, decision.catch_up, exits)
        exit_layer, prefill = decision.exit_layer, ids is None
        logits = sequence.advance(exit_layer, prompt)[:, -1] if ids is None else sequence.step(exit_layer, ids)
        ids = sampler.pick(logits)
        new_rows = (exits.index(exit_layer) + 1) * (prompt.shape[1] if prefill else 1)
        caught_up = sequence.rows_run - before - new_rows
        latency_ms = (time.perf_counter_ns() - begin) / 1e6
        # prefill is priced by other numbers than decoding: it says nothing about the slowdown of the next step
        last = None if prefill or costs is None else Measurement(exit_layer, decision.price_ms, latency_ms)
        yield Step(ids, logits, decision, budget.tpot_ms, latency_ms, caught_up)


def _catch_up(sequence: Sequence, chunk: CatchUp, exits: tuple[int, ...]) -> None:
    if chunk.balcony:
        sequence.run_balcony(exits[chunk.stage], chunk.rows)
    else:
        sequence.run_stage(chunk.stage, chunk.rows)


def _unmeasured(exits: tuple[int, ...]) -> CostModel:
    """Stands in while no budget has a target: then nothing is weighed against a price."""
    nothing = (UnitCost(0.0),) * len(exits)
    return CostModel(exits, nothing, nothing, nothing[0])
