"""From samples to percentiles and an interval.

Every round gives a cell a block of samples. Samples of one block share clock, heat and other load. The interval is therefore
that of the rounds' medians: the interval of single samples would be too narrow. With few rounds it comes from Student's t, with
nine and more from their ranks (the binomial interval of a median). The difference between two processes of the same build is
added in quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean, median, stdev

import numpy as np

from balcony_edge.device.profile import Timing

#: 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)
#: Least number of rounds for an interval from ranks; an outlier among them then does not widen the interval.
LEAST_RANKED = len(_T) + 2
#: Relative difference between two processes of the same build, from the placement of weights and caches in memory and of
#: threads on CPUs. It is an allowance: `benchmarks/control/profile_check.py` tells whether two profiles agree within it.
REPEATABILITY = 0.02


def chance_ms(blocks: Sequence[Sequence[float]]) -> float:
    """Half the width of the 95 % interval of the median by chance alone; for a single sample, the sample itself."""
    medians = [median(block) for block in blocks]
    count = len(medians)
    if count >= LEAST_RANKED:
        low = _rank(count)
        ordered = sorted(medians)
        return (ordered[-1 - low] - ordered[low]) / 2
    if count > 1:
        return _T[count - 2] * stdev(medians) / math.sqrt(count)
    (block,) = blocks
    if len(block) < 2:
        return medians[0]
    # 1.253: standard error of a median divided by that of a mean, for normal samples.
    return 1.96 * 1.253 * stdev(block) / math.sqrt(len(block))


@lru_cache(maxsize=64)
def _rank(count: int) -> int:
    """The largest rank, from 0, that with its mirror image bounds the median of ``count`` values with 95 % or more."""
    tail, rank = 1, 0
    while 40 * tail <= 2**count:  # tail: 2^count × P(rank or fewer of them lie below the median)
        rank += 1
        tail += math.comb(count, rank)
    return max(rank - 1, 0)


def summarise(blocks: Sequence[Sequence[float]]) -> Timing:
    """Summary of all samples of a cell, in milliseconds, one block per round."""
    samples = [sample for block in blocks for sample in block]
    typical = median(samples)
    return Timing(
        samples=len(samples),
        rounds=len(blocks),
        p50_ms=typical,
        p95_ms=float(np.quantile(samples, 0.95)),
        p99_ms=float(np.quantile(samples, 0.99)),
        mean_ms=fmean(samples),
        min_ms=min(samples),
        max_ms=max(samples),
        uncertainty_ms=math.hypot(chance_ms(blocks), REPEATABILITY * typical),
    )
