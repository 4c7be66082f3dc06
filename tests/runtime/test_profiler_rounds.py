"""Rounds of a profile: the first does not count, and each cell is measured until its interval is tight."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_runtime.profiler import run
from balcony_runtime.profiler.cells import Cell, Key
from balcony_runtime.profiler.grid import Grid

CALM, WILD = Key("norm", 4), Key("lm_head", 4)


@pytest.mark.parametrize(
    ("seconds", "whole", "calm", "wild"),
    [
        (600.0, True, run.LEAST_TIGHT, 12),
        (1e-9, False, run.LEAST_ROUNDS, run.LEAST_ROUNDS),  # the time is over, and two rounds are made all the same
    ],
)
def test_rounds_go_on_for_what_is_not_sure_yet(seconds: float, whole: bool, calm: int, wild: int) -> None:
    """A cell that takes 5 ms, after a first call that packs weights; and one whose time jumps between 1 and 2 ms."""
    calm_ms = itertools.chain([100.0], itertools.repeat(5.0))
    wild_ms = itertools.cycle([1.0, 2.0])
    cells = (Cell("calm", lambda: {CALM: [next(calm_ms)]}), Cell("wild", lambda: {WILD: [next(wild_ms)]}))
    grid, blocks = replace(Grid.make(256, rounds=12), seconds=seconds), defaultdict[Key, list[list[float]]](list)
    watch: Any = SimpleNamespace(look=lambda: None)
    assert list(run._rounds(cells, grid, blocks, watch, lambda *_: None)) == [True, whole]
    assert blocks[CALM] == [[5.0]] * calm and len(blocks[WILD]) == wild
