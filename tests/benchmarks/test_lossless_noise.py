"""When benchmarks/control/lossless.py calls divergences the rounding that every policy has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import balcony_edge
from balcony_runtime.decoding.prices import measure_prices
from benchmarks.control import lossless
from benchmarks.control.lossless import is_noise


def test_both_rates_have_an_error() -> None:
    """100 replies, 1 % of flips. Of 7,000 tokens that were compared, two errors are 0.3 points."""
    flips = {"replies": 100, "compared": 7000, "flip_rate": 0.01, "flip_se": 0.00088}
    assert is_noise({**flips, "divergence_rate": 85 / 7000}), "1.5 standard errors"
    assert not is_noise({**flips, "divergence_rate": 95 / 7000}), "2.4"


@pytest.mark.parametrize(
    ("precision", "level", "exact"),
    [("float32", None, True), ("float16", None, False), ("int4", 1, True), ("int4", 4, False)],
)
def test_replies_must_be_equal_where_products_are_exact(precision: str, level: int | None, exact: bool) -> None:
    quantization = None if level is None else SimpleNamespace(accuracy_level=level)
    manifest: Any = SimpleNamespace(precision=precision, quantization=quantization)
    assert lossless.has_exact_products(manifest) is exact


def test_rounds_are_forced_in_each_reply(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 replies those after the fortieth had none: plain steps between the rounds had taught the true prices."""
    monkeypatch.setattr(lossless, "TOKENS", 12)
    with balcony_edge.load(tiny.path) as llm:
        llm.costs = lossless.always_paying(measure_prices(llm.engine))
        llm._learned.speculator._plain_ratio = 1e-9
        _, rounds = lossless.spoilt_and_speculated(llm, [5, 9, 17], 0)
    assert rounds > 0
