"""Positions of a row that count in the loss of a distillation.

Owns the choice: no padding, no attention sink, and if a recipe samples, positions that follow from a seed.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from balcony_export.data.corpus import Rows
from balcony_export.train.loss import LossKind

#: A position has a massive activation if its root mean square is more than this many times the row's median (demo model: 25,856
#: in one channel of the first position, sometimes of the second; root mean square above 1,000 instead of 6 to 9). It is an
#: attention sink: the balcony attends to it, but it does not count in the loss.
MASSIVE = 20.0


def pick_positions(
    rows: Rows, states: torch.Tensor, seeds: list[list[int]], positions: int, loss: LossKind
) -> torch.Tensor:
    """Flat indices of the positions in the loss: no padding, no massive activation at any exit, sampled  # (n,)

    Args:
        rows: The rows  # (B, T)
        states: Their states at the exits, and the final normed ones  # (exits + 1, B, T, D)
        seeds: Seed of each row's sample.
        positions: Number of positions per row; 0 for all.
        loss: Kind of the loss.
    """
    seq_len = rows.tokens.shape[1]
    places, lengths = torch.arange(seq_len)[None], torch.from_numpy(rows.lengths)[:, None]  # (1, T), (B, 1)
    valid = places < lengths  # (B, T)
    sizes = torch.linalg.vector_norm(states[:-1], dim=-1, dtype=torch.float32).cpu()  # (exits, B, T)
    usual = sizes.masked_fill(~valid, math.nan).nanmedian(dim=2, keepdim=True).values  # (exits, B, 1)
    valid &= (sizes < MASSIVE * usual).all(dim=0)
    valid[:, 0] = False  # the sink, massive or not
    if loss != "kl":  # the last token of a row has no next token
        valid &= places < lengths - 1
    if not positions:
        return valid.flatten().nonzero()[:, 0]
    draws = np.stack([np.random.default_rng(seed).random(seq_len) for seed in seeds])
    order = torch.from_numpy(draws).masked_fill(~valid, 2.0).argsort(dim=1)  # (B, T), valid positions first
    kept = torch.zeros_like(valid).scatter_(1, order[:, :positions], True) & valid
    return kept.flatten().nonzero()[:, 0]
