"""Simulation: runs a budget offline against costs, a device and a load, and explains which target limited it when.

Owns the loop and its summary. The physics are in :mod:`.plant`, the loads in :mod:`.loads`. The decisions are the controller's
own, so a simulation shows what a device would do under such a load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from statistics import mean
from typing import Any, NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import Decision, Measurement, Observation
from balcony_edge.control.trace import TraceWriter
from balcony_edge.device.costs import CostModel
from balcony_edge.errors import InfeasibleError
from balcony_edge.simulation.plant import Plant


class SimulatedToken(NamedTuple):
    """One token: its time, the gap before it (``latency_ms``), the working part of the gap, and the decision."""

    time_s: float
    latency_ms: float
    step_ms: float
    slowdown: float
    watts: float
    celsius: float
    decision: Decision


def simulate(
    costs: CostModel,
    plant: Plant,
    budget: Budget,
    *,
    tokens: int,
    seconds: float = float("inf"),
    trace: TraceWriter | None = None,
) -> list[SimulatedToken]:
    """Run until ``tokens`` tokens are made, ``seconds`` seconds have passed, the battery is empty, or the budget asks for
    an error.

    Args:
        costs: prices that the controller uses; the plant has its own.
        plant: a new plant.
        budget: budget to hold.
        tokens, seconds: limits of the run.
        trace: trace that records the run.

    Raises:
        InfeasibleError: nothing meets the budget and its ``on_infeasible`` is ``error``.
    """
    controller, state = Controller(costs), ControllerState.initial()
    last: Measurement | None = None
    out: list[SimulatedToken] = []
    while len(out) < tokens and plant.now_s < seconds and not (out and plant.empty):
        rows = plant.rows_due()
        begin_s, begin_j = plant.now_s, plant.joules
        context = plant.length + (rows[0][0] - 1 if not out else 0)
        seen = Observation(budget, context, *rows, last, len(out), 0.0, begin_s, plant.busy_s, plant.readings)
        before, (state, decision) = state, controller.decide(state, seen)
        if (why := decision.refusal(budget)) is not None:
            raise InfeasibleError(f"after {len(out)} tokens, {begin_s:.1f} s: {why}")
        latency_ms, step_ms = plant.step(
            decision.exit_layer, decision.catch_up, period_ms=decision.period_ms, idle_ms=decision.idle_ms
        )
        last = Measurement(decision.exit_layer, decision.price_ms, step_ms) if out and decision.price_ms else None
        watts = (plant.joules - begin_j) / (plant.now_s - begin_s) if plant.now_s > begin_s else 0.0
        if trace is not None:
            trace.write(costs, (before, state), seen, decision, latency_ms, plant.pending_rows)
        out.append(
            SimulatedToken(plant.now_s, latency_ms, step_ms, state.slowdown.factor, watts, plant.celsius, decision)
        )
    return out


def missed_deadline(budget: Budget, made: int, took_s: float, *, ended_early: bool) -> bool | None:
    """Whether the tokens that a deadline is for come after it, or never.

    Args:
        budget: that of the reply.
        made: number of those tokens that were made.
        took_s: time of the last of them since the request.
        ended_early: whether the reply ended before it had the tokens that were asked for.

    Returns:
        False without a deadline; None where fewer tokens were asked for than it is for, and all came in time.
    """
    late = budget.deadline_s is not None and took_s > budget.deadline_s
    if late or budget.deadline_s is None or made >= (budget.expected_tokens or 0):
        return late
    return True if ended_early else None


def summary(tokens: Sequence[SimulatedToken], budget: Budget, *, empty: bool = False) -> dict[str, Any]:
    """Totals and means of a run, as a JSON-ready mapping.

    ``missed_deadline`` is None without a deadline and where it is unknown; an ``empty`` battery ended the run early.
    """
    later = tokens[1:]
    exits = [token.decision.exit_layer for token in tokens]
    late = None
    if budget.tpot_ms is not None:
        late = sum(token.latency_ms > budget.tpot_ms for token in later)
    missed, due = None, tokens[: budget.expected_tokens]
    if budget.deadline_s is not None:
        missed = missed_deadline(budget, len(due), due[-1].time_s, ended_early=empty)
    seconds = tokens[-1].time_s
    return {
        "tokens": len(tokens),
        "seconds": seconds,
        "ttft_ms": tokens[0].latency_ms,
        "tokens_a_second": len(later) / (seconds - tokens[0].time_s) if later and seconds > tokens[0].time_s else None,
        "tpot_mean_ms": mean(token.latency_ms for token in later) if later else None,
        "late_tokens": late,
        "missed_deadline": missed,
        "mean_exit": mean(exits),
        "tokens_per_exit": {str(layer): count for layer, count in sorted(Counter(exits).items())},
        "exit_switches": sum(a != b for a, b in pairwise(exits)),
        "mean_w": sum(t.watts * t.latency_ms for t in tokens) / max(sum(t.latency_ms for t in tokens), 1e-9),
        "max_c": max(token.celsius for token in tokens),
        "infeasible_tokens": sum(token.decision.infeasible for token in tokens),
    }


class Interval(NamedTuple):
    """Consecutive tokens at one exit."""

    begin_s: float
    end_s: float
    exit_layer: int
    tokens: int
    mean_ms: float
    slowdown: float
    reason: str


def explain(tokens: Sequence[SimulatedToken]) -> list[Interval]:
    """Split a run into intervals at one exit. The reason is that of the last token, whose decision saw the whole interval."""
    intervals: list[Interval] = []
    since_s = 0.0
    for exit_layer, group in groupby(tokens, lambda token: token.decision.exit_layer):
        part = list(group)
        last, timed = part[-1], part if intervals else part[1:] or part  # without the first token
        mean_ms = mean(token.latency_ms for token in timed)
        intervals.append(
            Interval(since_s, last.time_s, exit_layer, len(part), mean_ms, last.slowdown, last.decision.reason)
        )
        since_s = last.time_s
    return intervals
