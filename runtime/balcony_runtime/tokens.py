"""Token ids: what a list of them may hold, and what two have in common; and whole numbers that callers give."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from balcony_edge.errors import InputError, shown
from balcony_runtime.backends.base import IntArray


def refuse_foreign(tokens: IntArray, vocabulary: int) -> None:
    """Refuse tokens (at least one) if any is outside the vocabulary.

    Raises:
        InputError: a token is outside the vocabulary; the message names the first.
    """
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        bad = int(tokens[(tokens < 0) | (tokens >= vocabulary)][0])
        raise InputError(f"token {bad}: the vocabulary has 0 to {vocabulary - 1}: tokenize with the bundle's tokenizer")


def common_length(some: IntArray, others: IntArray) -> int:
    """Number of first tokens that two lists (n,) have in common."""
    length = min(len(some), len(others))
    differs = (some[:length] != others[:length]).nonzero()[0]
    return int(differs[0]) if len(differs) else length


def checked(given: IntArray | Sequence[int], batch_size: int, vocabulary: int) -> IntArray:
    """Tokens as an array (B, n).

    Args:
        given: tokens (B, n); those of one member may be (n,).
        batch_size: number of members B.
        vocabulary: size of the vocabulary.

    Raises:
        InputError: they have another shape or type, or one is outside the vocabulary.
    """
    wanted = "(n,) or (1, n)" if batch_size == 1 else f"({batch_size}, n), one line per member"
    try:
        tokens = np.asarray(given)
    except ValueError as error:  # members of different lengths
        raise InputError(f"tokens: {error}: give {wanted}") from error
    if tokens.size == 0:
        return np.zeros((batch_size, 0), np.int64)
    if tokens.dtype.kind not in "iu":
        raise InputError(f"tokens of type {tokens.dtype}: must be integers: give token ids")
    lines = np.atleast_2d(tokens).astype(np.int64)
    if lines.ndim != 2 or lines.shape[0] != batch_size:
        raise InputError(f"tokens of shape {tokens.shape}: must be {wanted}")
    refuse_foreign(lines, vocabulary)
    return lines


def whole(name: str, value: int, least: int | None = None, *, cure: str = "give a larger number") -> int:
    """Check that a value is an integer of at least ``least`` and return it.

    Args:
        name: name of the value, with which the message begins.
        value: value to check.
        least: smallest allowed value; None allows all.
        cure: advice for a value below ``least``, with which that message ends.

    Raises:
        InputError: the value is not an integer, or is less than ``least``.
    """
    try:
        if isinstance(value, bool):  # False is not None: ``logprobs=False`` would ask for log-probabilities
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} = {shown(value)}: must be a whole number: give an integer") from None
    if least is not None and number < least:
        raise InputError(f"{name} = {shown(number)}: must be at least {least}: {cure}")
    return number
