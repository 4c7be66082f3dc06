"""Logits of a bundle over fixed tokens: made on the host, made again on the other processor, and compared.

Owns the tokens and passes, and the distances of two results. It imports what a device has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.bundle import Bundle
from balcony_runtime.engine import Engine

#: Tokens of the prompt, and of the steps after it.
PROMPT, STEPS = 24, 24

Logits = dict[str, npt.NDArray[np.float32]]


def tokens_of(vocabulary: int) -> npt.NDArray[np.int64]:
    """The tokens of the comparison, (PROMPT + STEPS,)."""
    return np.random.default_rng(20261127).integers(0, vocabulary, PROMPT + STEPS)


def logits_of(bundle: Path | Bundle, packed: Path | None = None) -> Logits:
    """Run a bundle: a prompt at every exit, and steps whose exits change at every token.

    Returns:
        ``prompt_E`` for each exit layer E, (PROMPT, V), and ``steps``, (STEPS, V).
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    with Engine.of(opened, packed=packed, threads=1) as engine:
        tokens, found = tokens_of(engine.manifest.model.vocab_size), {}
        for layer in engine.exit_layers:
            sequence = engine.new_sequence(max_length=len(tokens))
            found[f"prompt_{layer}"] = sequence.advance(layer, tokens[:PROMPT], num_logits=PROMPT)[0]
        sequence = engine.new_sequence(max_length=len(tokens))
        sequence.advance(engine.exit_layers[-1], tokens[:PROMPT])
        steps = [
            sequence.step(engine.exit_layers[index % len(engine.exit_layers)], token)[0].copy()
            for index, token in enumerate(tokens[PROMPT:, None])
        ]
    return {**found, "steps": np.stack(steps)}


def mean_kl(p: npt.NDArray[Any], q: npt.NDArray[Any]) -> float:
    """Mean KL of the rows of ``q`` from those of ``p``, in nats."""
    logs = [rows.astype(np.float64) for rows in (p, q)]
    logs = [rows - rows.max(-1, keepdims=True) for rows in logs]
    logs = [rows - np.log(np.exp(rows).sum(-1, keepdims=True)) for rows in logs]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


@dataclass(frozen=True)
class Distance:
    """Distance of two results.

    Attributes:
        difference: largest difference of a logit, as a share of the largest logit of its pass.
        kl: mean KL of all rows, nats.
        other_token: share of rows with another likeliest token.
    """

    difference: float
    kl: float
    other_token: float


def distance(found: Logits, wanted: Logits) -> Distance:
    """Distance from the results in ``wanted``."""
    pairs = [(found[name], rows) for name, rows in wanted.items()]
    got, want = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return Distance(
        max(float(np.abs(found - wanted).max() / np.abs(wanted).max()) for found, wanted in pairs),
        mean_kl(want, got),
        float(np.mean(got.argmax(-1) != want.argmax(-1))),
    )
