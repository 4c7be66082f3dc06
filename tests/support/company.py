"""Streams, settled filters and decisions of the joint controller that several test files use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from balcony_edge.budget import Budget
from balcony_edge.control.company.joint import JointController
from balcony_edge.control.company.seen import CompanyState, Round, RoundSeen, StreamSeen
from balcony_edge.control.slowdown import Slowdown
from tests.support.prices import SETTLED_DEVIATION, SMALL

QUALITY = (0.5, 0.7, 1.0)
#: A filter that has learned that the prices hold; at probability 0.9 a step may take 0.975 of a target.
SETTLED = CompanyState(Slowdown(variance=1e-8, noise_variance=SETTLED_DEVIATION**2))
ONES = (1, 1, 1)


def stream(key: int, budget: Budget | None = None, **values: Any) -> StreamSeen:
    """A stream that has caught up and asked for its token a moment ago."""
    fields = {"context_length": 0, "stage_rows": ONES, "balcony_rows": ONES, "made_tokens": 9, "started_s": 0.0}
    return StreamSeen(key=key, budget=budget or Budget(), **{**fields, "asked_s": 10.0, **values})


def decided(streams: Sequence[StreamSeen], state: CompanyState = SETTLED, **seen: Any) -> tuple[CompanyState, Round]:
    return JointController(SMALL, QUALITY).decide(state, RoundSeen(tuple(streams), **{"now_s": 10.0, **seen}))


def exits(found: Round) -> dict[int, int]:
    return {move.key: move.decision.exit_layer for move in found.moves}
