"""An int8 KV cache: its scales, its size, and schedules over it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError
from balcony_export.quantize.blocks import Scheme
from balcony_export.quantize.kv_cache import cache_scales
from balcony_runtime.engine import Engine
from tests.export.quantize.test_quantize import ROWS, exported
from tests.runtime.arm.reference import mean_kl


def test_an_int8_cache_takes_a_quarter_and_schedules_agree(tiny: Any, tmp_path: Path) -> None:
    scheme = Scheme(bits=8, accuracy_level=1)
    paths = [
        exported(tiny, tmp_path / f"kv{bits}", replace(scheme, kv_bits=bits), calibration=ROWS) for bits in (32, 8)
    ]
    ids = [(5 * i) % 100 for i in range(60)]
    kept, logits = [], []
    for path in paths:
        with Engine.open(path) as engine:
            sequence = engine.new_sequence(max_length=60)
            logits.append(sequence.advance(5, ids, num_logits=60)[0])
            caches: Any = sequence.state._stages[1].cache.held.arrays
            kept.append(sum(array.nbytes for array in caches))
            # a balcony's backlog is rounded in its own graph: the same logits as when its attention rounds
            sequence.run_balcony(3, 40)
            backlog = sequence.advance(3, [])
            scratch = engine.new_sequence(max_length=60)
            assert mean_kl(backlog[0], scratch.advance(3, ids)[0]) < 1e-4
            # and rows after the cursor still have no effect
            sequence.rollback(20)
            again = sequence.advance(5, ids[20:])
            assert mean_kl(again[0], logits[-1][-1:]) < 1e-4
    assert kept[1] * 4 == kept[0]
    assert mean_kl(*logits) < 0.02
    with pytest.raises(InputError, match="kv=8: needs --calibration"):
        exported(tiny, tmp_path / "none", replace(scheme, kv_bits=8))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("turned", [0, 4, 8])
def test_keys_keep_their_range_at_positions_that_were_not_measured(tiny: Any, turned: int) -> None:
    """Whatever the angle of a pair, its channels stay within its length, and no range is wider than that."""
    with Engine.open(tiny.path) as engine:
        sequence = engine.new_sequence(max_length=60)
        for exit_layer, ids in ((2, [(7 * i) % 100 for i in range(60)]), (3, []), (5, [])):
            sequence.advance(exit_layer, ids)
        stage: Any = sequence.state._graphs["stage_0"]
        found = sequence.state.largest_cached(turned)["stage_0"]
        for name, array in zip(stage.cache.names, stage.cache.held.arrays, strict=True):
            values, half = array[0, :, :60], turned // 2  # (H, S, d)
            plain = np.abs(values).max(axis=1)
            if "past_key" not in name:
                assert np.array_equal(found[name], plain)
                continue
            assert np.array_equal(found[name][:, turned:], plain[:, turned:])
            first, second = values[..., :half], values[..., half:turned]
            reached = np.zeros_like(found[name][:, :turned])
            for angle in np.linspace(0, 2 * np.pi, 721):
                turn = np.cos(angle) * first - np.sin(angle) * second, np.sin(angle) * first + np.cos(angle) * second
                reached = np.maximum(reached, np.abs(np.concatenate(turn, axis=-1)).max(axis=1))
            np.testing.assert_allclose(found[name][:, :turned], reached, rtol=1e-4)


def test_a_scale_holds_the_largest_value_of_all_rows(tiny: Any) -> None:
    """127 steps reach a tenth further than it."""
    first, second, both = (cache_scales(Bundle.open(tiny.path), rows, 0) for rows in (ROWS[:1], ROWS[1:2], ROWS[:2]))
    with Engine.open(tiny.path) as engine:
        sequence: Any = engine.new_sequence(max_length=60)
        for exit_layer, ids in ((2, ROWS[0]), (3, []), (5, [])):
            sequence.advance(exit_layer, ids)
        largest = sequence.state.largest_cached(0)
    assert {"stage_0", "balcony_2", "balcony_3"} <= first.keys()
    for graph, caches in first.items():
        for name, scale in caches.items():
            np.testing.assert_allclose(127 * scale, 1.1 * largest[graph][name], rtol=1e-3, atol=2e-4)
            np.testing.assert_allclose(both[graph][name], np.maximum(scale, second[graph][name]), rtol=1e-6)
