"""The part of a step that draws an exit's states to those of the full model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from balcony_export.data.corpus import Corpus
from balcony_export.train.loss import Head, HeadLoss
from tests.export.train.distilling import trainer_of


def test_states_are_drawn_along_their_distance_as_hard_as_the_kl_draws() -> None:
    generator = torch.Generator().manual_seed(1)
    head = HeadLoss(Head(torch.randn(50, 16, generator=generator), None), dtype=torch.float32, compiled=False)
    full, student = torch.randn(2, 9, 16, generator=generator)
    gradients, sums = [], []
    for weight in (0.0, 0.5):
        given, same = student.clone().requires_grad_(True), full.clone().requires_grad_(True)
        sums.append(head.backward(full, [given, same], state_weight=weight))
        assert given.grad is not None and same.grad is not None
        gradients.append(given.grad)
        assert float(same.grad.abs().max()) < 1e-4, "a state without distance"
    plain, drawn = gradients
    apart = student - full
    for position in range(9):  # each by itself, so that passes over fewer rows give the same step
        along = apart[position] / apart[position].norm()
        torch.testing.assert_close(drawn[position], plain[position] + 0.5 * plain[position].norm() * along)
    assert sums[0] == sums[1], "what is shown is the KL"


def test_a_pass_without_positions_adds_nothing() -> None:
    """A row of two tokens has none if the text is part of the loss; other passes of the step have some."""
    head = HeadLoss(Head(torch.ones(50, 16), None), dtype=torch.float32, compiled=False, kind="kl+ce")
    nothing, labels = torch.zeros(0, 16), torch.zeros(0, dtype=torch.long)
    assert head.backward(nothing, [nothing.clone().requires_grad_(True)], labels, state_weight=0.5) == [0.0]


def test_states_are_drawn_less_and_less(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=4, state_weight=0.8)
    backward, weights = trainer.head.backward, list[float]()

    def noted(*arguments: Any) -> list[float]:
        weights.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(trainer.head, "backward", noted)
    trainer.run()
    assert weights == pytest.approx([0.8, 0.6, 0.4, 0.2])
