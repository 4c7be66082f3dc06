"""An int8 KV cache: its scales, its size, and schedules over it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcony_edge.errors import InputError
from balcony_export.quantize.blocks import Scheme
from balcony_export.quantize.kv_cache import _turned
from balcony_runtime.engine import Engine
from tests.export.test_quantize import ROWS, exported
from tests.runtime.arm.reference import mean_kl


def test_an_int8_cache_takes_a_quarter_and_schedules_agree(tiny: Any, tmp_path: Path) -> None:
    scheme = Scheme(bits=8, accuracy_level=1)
    paths = [
        exported(tiny, tmp_path / f"kv{bits}", replace(scheme, kv_bits=bits), calibration=ROWS)  # type: ignore[arg-type]
        for bits in (32, 8)
    ]
    ids = [(5 * i) % 100 for i in range(60)]
    kept, logits = [], []
    for path in paths:
        with Engine.open(path) as engine:
            sequence = engine.new_sequence(max_length=60)
            logits.append(sequence.advance(5, ids, num_logits=60)[0])
            caches: Any = sequence.state._stages[1].cache.held.arrays  # type: ignore[attr-defined]
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


def test_keys_keep_their_range_at_positions_that_were_not_measured() -> None:
    """The rotary embedding turns pairs of channels; slow pairs turn far beyond the text that was measured."""
    generator = np.random.default_rng(3)
    keys = generator.normal(size=(50, 2, 10)).astype(np.float32) * np.array([9, 1, 0.1, 5, 0.2, 3, 1, 1, 7, 0.5])
    most = _turned(np.abs(keys).max(axis=0).astype(np.float32), 8)
    assert most.shape == (2, 10) and (most[:, 8:] == np.abs(keys).max(axis=0).astype(np.float32)[:, 8:]).all()
    for angle in np.linspace(0, 2 * np.pi, 60):
        first, second = keys[..., :4], keys[..., 4:8]
        turned = np.cos(angle) * first - np.sin(angle) * second, np.sin(angle) * first + np.cos(angle) * second
        assert (np.abs(np.concatenate(turned, axis=-1)) <= most[:, :8] * 1.0001).all()
    assert (most[:, :4] <= np.sqrt(2) * np.maximum(*np.split(np.abs(keys).max(axis=0)[:, :8], 2, axis=1)) + 1e-5).all()
