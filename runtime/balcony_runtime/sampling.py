"""From logits to the next token: greedy, temperature, top-k and top-p, with a seed.

Owns the order of the filters, which is that of transformers' and llama.cpp's defaults: temperature, then top-k, then
top-p on what is left. It knows nothing of exits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from balcony_edge.errors import InputError
from balcony_runtime.backends.base import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick a token.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest of the most likely tokens whose probabilities reach p; 1 keeps all.
        seed: of the random numbers; None takes fresh ones.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature = {self.temperature}: must be a finite number, 0 (greedy) or more")
        if self.top_k < 0:
            raise InputError(f"top_k = {self.top_k}: must be 0 (keep all) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p}: must be above 0 and at most 1 (keep all)")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed = {self.seed}: must be 0 or more, or none")


class Sampler:
    """Draws tokens with one stream of random numbers."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)

    def pick(self, logits: FloatArray) -> IntArray:
        """Next token of each sequence, (B,), from logits (B, V).

        Raises:
            InputError: logits that are not numbers; the model or its precision is at fault.
        """
        if self._params.temperature == 0:
            best: IntArray = logits.argmax(axis=-1)
            if not np.isfinite(np.take_along_axis(logits, best[:, None], axis=-1)).all():
                raise InputError("the logits hold NaN or infinity: run `balcony-edge verify` on this bundle")
            return best
        return np.array([self._draw(row) for row in logits], np.int64)

    def _draw(self, logits: FloatArray) -> int:
        ids, probabilities = candidates(logits, self._params)
        return int(ids[self._random.choice(len(ids), p=probabilities)])


def candidates(logits: FloatArray, params: SamplingParams) -> tuple[IntArray, FloatArray]:
    """Tokens that the filters leave and their probabilities, most likely first (temperature above 0).

    Args:
        logits: (V,).
        params: the filters.

    Raises:
        InputError: logits that are not numbers.
    """
    if not np.isfinite(logits).all():
        raise InputError("the logits hold NaN or infinity: run `balcony-edge verify` on this bundle")
    count = len(logits)
    kept = min(params.top_k or count, count)
    ids = np.argpartition(logits, count - kept)[count - kept :] if kept < count else np.arange(count)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    scaled = logits[ids].astype(np.float64) / params.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        # the token that crosses p stays, so at least one does
        last = int(np.searchsorted(probabilities.cumsum(), params.top_p)) + 1
        ids, probabilities = ids[:last], probabilities[:last]
        probabilities /= probabilities.sum()
    return ids, probabilities
