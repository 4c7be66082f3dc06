"""Token ids: what a list of them may hold, and what two have in common."""

from __future__ import annotations

from balcony_edge.errors import InputError
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
