"""From measured passes to the prices of a graph, by non-negative least squares.

A pass of r rows with q queries over k keys is priced as

    first row + Σ further rows × marginal row + (first query + Σ further queries × marginal query) × k / 1000

with the two marginal prices constant between measured row counts: small passes read weights, large ones multiply matrices, and
in between the price of a row bends. In a mixture of experts further rows also read further experts, which is one more price
(:class:`balcony_edge.device.costs.ExpertCost`); while that one still grows, the marginal prices have no bends.

All prices are at least 0 (a pass never gets cheaper with more rows). Errors are relative: a millisecond of a decode step
matters more than one of a prefill.

Whether attention pays for the live context or for a bucket of bound rows depends on the backend. Both are fitted, and the
better fit is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np

from balcony_edge.device.costs import Bend, ExpertCost, UnitCost, further_experts
from balcony_edge.device.profile import Residual
from balcony_runtime.decoding.prices import non_negative

#: Candidates for :attr:`UnitCost.key_bucket`: the live context, and the step in which the ONNX Runtime backend binds keys.
KEY_BUCKETS = (1, 128)

#: Share of the experts beyond the first row's from which on their price no longer changes with the number of rows.
USED = 0.95


@dataclass(frozen=True, slots=True)
class Pass:
    """One measured pass of ``rows`` rows; ``queries`` of them attend; the last is row ``end - 1`` of the sequence."""

    rows: int
    queries: int
    end: int
    ms: float


def fit_unit(passes: Sequence[Pass], share: float | None = None) -> UnitCost:
    """Fit the prices of one graph, without a bound on the rows of a pass.

    Args:
        passes: median times, one for each number of rows and end; at least one pass has one row.
        share: share of the experts that one row uses, in a mixture of experts.
    """
    fits = [_fit(passes, bucket, share) for bucket in KEY_BUCKETS]
    return min(fits, key=lambda unit: sum(error * error for error in errors(unit, passes)))


def errors(unit: UnitCost, passes: Sequence[Pass]) -> list[float]:
    """Relative error (predicted / measured - 1) of every pass."""
    return [unit.pass_ms(p.rows, p.end - 1, p.queries) / p.ms - 1 for p in passes]


def residual(part: str, shares: Sequence[float]) -> Residual:
    """Summary of the absolute errors of one part."""
    sizes = [abs(share) for share in shares]
    return Residual(part=part, points=len(sizes), median=median(sizes), p95=float(np.quantile(sizes, 0.95)))


def _fit(passes: Sequence[Pass], bucket: int, share: float | None) -> UnitCost:
    knots = sorted({1} | {p.rows for p in passes})
    if share is not None:  # a bend at every number of rows would describe the experts' price a second time
        knots = [1, *(rows for rows in knots[1:-1] if further_experts(share, rows) > USED), *knots[1:][-1:]]
    segments = list(pairwise(knots))
    attends = any(p.queries > 1 for p in passes)
    rows = []
    for p in passes:
        keys = -(-p.end // bucket) * bucket / 1000
        further = [max(min(p.rows, high) - low, 0) for low, high in segments]
        asking = [max(min(p.queries, high) - low, 0) * keys for low, high in segments] if attends else []
        read = [] if share is None else [further_experts(share, p.rows)]
        rows.append([1.0, keys, *further, *asking, *read])
    measured = np.array([p.ms for p in passes])
    prices = non_negative(np.array(rows) / measured[:, None], np.ones(len(measured)))
    marginal = prices[2 : 2 + len(segments)]
    marginal_context = prices[2 + len(segments) : 2 + 2 * len(segments)] if attends else [0.0] * len(segments)
    all_ms = prices[-1] if share is not None and segments else 0.0
    return UnitCost(
        first_row_ms=prices[0],
        marginal_row_ms=marginal[0] if segments else 0.0,
        context_ms_per_1k=prices[1],
        marginal_context_ms_per_1k=marginal_context[0] if segments else None,
        key_bucket=bucket,
        bends=tuple(
            Bend(low, row, context)
            for (low, _), row, context in zip(segments[1:], marginal[1:], marginal_context[1:], strict=True)
        ),
        experts=ExpertCost(share, all_ms) if share is not None and all_ms > 0 else None,
    )
