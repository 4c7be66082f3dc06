"""Thresholds of confidence exits, with a promise: learned on text and tested on other text of the same kind.

Owns the measures of confidence, the test and the calibration of a bundle. The promise: with the asked confidence, at most
``max_disagreement`` of all tokens exit early with another token than the full depth's, each given the same text before it.
CALM (Schuster et al., NeurIPS 2022), whose method this is, bounds the difference of whole replies instead.

The method is learn-then-test. Half of the text is used to choose the measure and the candidate thresholds. On the other
half the candidates are tested by the exact binomial tail, beginning with the strictest. The last one before the first that
fails is taken (fixed-sequence testing, which needs no correction for the number of candidates). The test assumes that
tokens are independent draws, which is not quite true of neighbouring tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.manifest import ConfidenceMeasure, ConfidenceSpec, ThresholdSpec
from balcony_edge.errors import InputError
from balcony_runtime.backends.base import FloatArray, likeliest
from balcony_runtime.engine import Engine

MEASURES: tuple[ConfidenceMeasure, ...] = get_args(ConfidenceMeasure)
#: Number of steps from the strictest candidate threshold to the loosest; candidates are quantiles of the confidence.
CANDIDATES = 200
#: Number of rows whose logits are in memory at once.
_CHUNK = 64
#: Smallest number of tokens for a useful test.
MIN_TOKENS = 400


class Compared(NamedTuple):
    """Comparison of the exits over the same tokens.

    Attributes:
        sure: measure → exit → confidence of every token.
        agrees: exit → whether its likeliest token is the full depth's, for every token.
    """

    sure: dict[ConfidenceMeasure, dict[int, npt.NDArray[np.float64]]]
    agrees: dict[int, npt.NDArray[np.bool_]]


def measured(logits: FloatArray, measure: ConfidenceMeasure) -> npt.NDArray[np.float64]:
    """Confidence of each row of logits (n, V), from 0 to 1.

    ``top1`` is the largest probability, ``margin`` the largest minus the second largest, and ``entropy`` is 1 minus the
    entropy as a share of log V.
    """
    shifted = logits - logits.max(-1, keepdims=True)
    with np.errstate(under="ignore"):  # the application may have made NumPy raise for it
        weights = np.exp(shifted)
    total = weights.sum(-1, dtype=np.float64)
    if measure == "top1":
        found: npt.NDArray[np.float64] = 1 / total  # the largest weight is 1
        return found
    if measure == "margin":
        second = np.partition(weights, -2, axis=-1)[..., -2]
        margin: npt.NDArray[np.float64] = (1 - second) / total
        return margin
    with np.errstate(under="ignore"):
        entropy = np.log(total) - (weights * shifted).sum(-1, dtype=np.float64) / total
    sure: npt.NDArray[np.float64] = 1 - entropy / math.log(logits.shape[-1])
    return sure


def binomial_tail(most: int, draws: int, probability: float) -> float:
    """P(X ≤ most) of a binomial distribution with ``draws`` draws."""
    if most < 0:
        return 0.0
    if most >= draws or probability <= 0:
        return 1.0
    if probability >= 1:
        return 0.0
    ratio, base = math.log(probability), math.log1p(-probability)
    whole = math.lgamma(draws + 1)
    terms = (
        whole - math.lgamma(k + 1) - math.lgamma(draws - k + 1) + k * ratio + (draws - k) * base
        for k in range(most + 1)
    )
    return min(sum(math.exp(term) for term in terms), 1.0)


def last_accepted(
    sure: npt.NDArray[np.float64],
    agrees: npt.NDArray[np.bool_],
    candidates: Iterable[float],
    max_disagreement: float,
    confidence: float,
) -> float | None:
    """Return the last candidate before the first one that the test rejects, or None if the first one is rejected.

    Args:
        sure: confidence of each token at the exit.
        agrees: whether the exit's likeliest token is the full depth's, for each token.
        candidates: thresholds in descending order, chosen without these tokens.
        max_disagreement: share of all tokens that may exit early with another token.
        confidence: probability that the promise holds.
    """
    best = None
    for threshold in candidates:
        wrong = int(((sure >= threshold) & ~agrees).sum())
        if binomial_tail(wrong, len(sure), max_disagreement) > 1 - confidence:
            break
        best = threshold
    return best


def least_tokens(exits: int, max_disagreement: float, confidence: float) -> int:
    """Smallest number of tokens on which so many exits can keep a promise; on fewer, even one that is never wrong fails."""
    tested = math.log((1 - confidence) / exits) / math.log1p(-max_disagreement)
    return max(MIN_TOKENS, 2 * math.ceil(tested))


def learn(compared: Compared, text: str, max_disagreement: float, confidence: float) -> ConfidenceSpec:
    """Learn and test the thresholds of every exit. Several promises need only one comparison of the exits.

    Args:
        compared: what :func:`compare_exits` found on documents that resemble the expected replies.
        text: name of the text, for the record.
        max_disagreement: share of all tokens that may exit early with another token than the full depth's.
        confidence: probability that the promise holds.

    Raises:
        InputError: too little text.
    """
    sure, agrees = compared
    count = len(next(iter(agrees.values())))
    if count < (least := least_tokens(len(agrees), max_disagreement, confidence)):
        raise InputError(f"{text}: {count} tokens to calibrate on: give {least} or more for this promise")
    # The caller gives documents of every kind of text in turn, so that both halves contain all kinds.
    half = count // 2
    levels = np.linspace(1, 0, CANDIDATES + 1)
    shares = {
        name: sum(_largest_share(sure[name][e][:half], agrees[e][:half], max_disagreement) for e in agrees)
        for name in MEASURES
    }
    measure = max(MEASURES, key=shares.__getitem__)
    thresholds = {}
    # Any exit may be used, so all promises must hold at once (Bonferroni).
    each = 1 - (1 - confidence) / len(agrees)
    for exit_layer in agrees:
        candidates = np.quantile(sure[measure][exit_layer][:half], levels).tolist()
        held, fits = sure[measure][exit_layer][half:], agrees[exit_layer][half:]
        threshold = last_accepted(held, fits, candidates, max_disagreement, each)
        if threshold is not None:
            early = held >= threshold
            wrong = float((early & ~fits).mean())
            thresholds[exit_layer] = ThresholdSpec(
                threshold=threshold, exit_share=float(early.mean()), disagreement=wrong
            )
    return ConfidenceSpec(
        measure=measure,
        max_disagreement=max_disagreement,
        confidence=confidence,
        text=text,
        tokens=count,
        thresholds=thresholds,
    )


class Held(NamedTuple):
    """Effect of a threshold on a text, as shares of all its tokens.

    Attributes:
        exit_share: share of tokens that exit early.
        disagreement: share of tokens that exit early with another token than the full depth's.
    """

    exit_share: float
    disagreement: float


def held_out(compared: Compared, spec: ConfidenceSpec) -> tuple[int, dict[int, Held]]:
    """Measure the effect of thresholds on text from which they were not learned.

    Args:
        compared: what :func:`compare_exits` found on that text.
        spec: measure and thresholds.

    Returns:
        The number of tokens, and exit → effect of its threshold.

    Raises:
        InputError: too little text.
    """
    sure, agrees = compared
    count = len(next(iter(agrees.values())))
    if count < MIN_TOKENS:
        raise InputError(f"{count} tokens to check on: give {MIN_TOKENS} or more, thousands are better")
    found = {}
    for exit_layer, known in spec.thresholds.items():
        early = sure[spec.measure][exit_layer] >= known.threshold
        found[exit_layer] = Held(float(early.mean()), float((early & ~agrees[exit_layer]).mean()))
    return count, found


def _largest_share(sure: npt.NDArray[np.float64], agrees: npt.NDArray[np.bool_], most: float) -> float:
    """Largest share of these tokens that can exit early with at most the share ``most`` of all tokens wrong."""
    order = np.argsort(-sure, kind="stable")
    wrong = np.cumsum(~agrees[order]) / len(sure)
    return float((wrong <= most).sum() / len(sure))


def compare_exits(
    engine: Engine, documents: Sequence[Sequence[int]], progress: Callable[[float], None] = lambda done: None
) -> Compared:
    """Run every exit over documents of tokens; ``progress`` is called with the share that is done.

    Raises:
        InputError: logits are not finite: of such rows no confidence and no agreement is known.
    """
    exits = engine.exit_layers
    sure: dict[ConfidenceMeasure, dict[int, list[npt.NDArray[np.float64]]]] = {
        measure: {e: [] for e in exits[:-1]} for measure in MEASURES
    }
    agrees: dict[int, list[npt.NDArray[np.bool_]]] = {e: [] for e in exits[:-1]}
    for number, document in enumerate(documents):
        sequence = engine.new_sequence(max_length=max(len(document), 1))
        for start in range(0, len(document), _CHUNK):
            rows = list(document[start : start + _CHUNK])
            # Run the full depth first, so that the stages of the shallower exits are already done.
            wanted = likeliest(sequence.advance(exits[-1], rows, num_logits=len(rows))[0])
            for exit_layer in exits[:-1]:
                logits = sequence.advance(exit_layer, [], num_logits=len(rows))[0]
                agrees[exit_layer].append(likeliest(logits) == wanted)
                for measure in MEASURES:
                    sure[measure][exit_layer].append(measured(logits, measure))
        progress((number + 1) / len(documents))
    joined = {m: {e: np.concatenate(parts) for e, parts in by_exit.items() if parts} for m, by_exit in sure.items()}
    return Compared(joined, {e: np.concatenate(parts) if parts else np.zeros(0, bool) for e, parts in agrees.items()})
