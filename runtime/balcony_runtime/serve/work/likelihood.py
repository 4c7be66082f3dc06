"""Log-probabilities of the tokens of a prompt, piece by piece, so that replies in progress do not wait for a long one.

Owns the pieces. The logits are the engine's own at one exit, before any sampling parameter.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager

import numpy as np

from balcony_runtime.decoding.sampling import log_probabilities
from balcony_runtime.engine import TokenSequence
from balcony_runtime.serve.work.jobs import Scores

#: Rows of one piece: 64 rows of a vocabulary of 49,152 take 13 MB.
PIECE = 64


def scored(
    borrowed: AbstractContextManager[TokenSequence], ids: Sequence[int], exit_layer: int, top: int
) -> Generator[None, None, Scores]:
    """Score a prompt; yields after every piece, and returns the scores.

    Args:
        borrowed: gives an empty sequence, which goes back at the end with the rows of the prompt: its reply begins with them.
        ids: tokens of the prompt.
        exit_layer: exit whose distribution is asked for.
        top: number of likeliest tokens to report at each place.

    Raises:
        ContextLengthError: the prompt does not fit the context.
        InputError: a token is outside the vocabulary.
    """
    logprobs: list[float | None] = [None]
    best: list[Sequence[tuple[int, float]]] = [()]
    with borrowed as sequence:
        for begin in range(0, len(ids) - 1, PIECE):
            piece = list(ids[begin : min(begin + PIECE, len(ids) - 1)])
            logits = sequence.advance(exit_layer, piece, len(piece))[0]
            found, likeliest = log_probabilities(logits, np.array(ids[begin + 1 : begin + 1 + len(piece)]), top)
            logprobs += found
            best += likeliest
            yield
    return Scores(logprobs, best)
