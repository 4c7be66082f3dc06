"""Optimizers of a balcony: the size of their steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from balcony_export.train.schedule import make_optimizers


@pytest.mark.parametrize("shape", [(32, 256), (256, 32)])
def test_a_step_of_muon_is_as_large_as_one_of_adamw(shape: tuple[int, int]) -> None:
    """A fifth of the rate for a weight, whatever the shape; by Muon's first rule a large matrix takes a tenth of that."""
    matrix, norm = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(4))
    muon, adamw = make_optimizers([norm, matrix], "muon", 0.5, 0.3, 0.0, torch.float32)
    matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    muon.step()
    assert 0.13 < float(matrix.detach().square().mean().sqrt()) / 0.5 < 0.26
    assert [group["betas"] for group in adamw.param_groups] == [(0.9, 0.95)]
