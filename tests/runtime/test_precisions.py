"""Exact switching in the precisions other than float32: any schedule gives what a pass from scratch gives, as far as it can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_runtime.engine import Engine
from balcony_runtime.scheduling.shared_step import PoolMove
from balcony_runtime.sessions import file
from tests.runtime.arm.reference import mean_kl
from tests.support.pools import new_pool


def one_row_and_many(engine: Engine, exit_layer: int, ids: list[int]) -> tuple[np.ndarray[Any, Any], ...]:
    """Logits of all rows: one pass, and row by row."""
    many = engine.new_sequence(max_length=len(ids)).advance(exit_layer, ids, num_logits=len(ids))[0]
    sequence = engine.new_sequence(max_length=len(ids))
    single = np.concatenate([sequence.advance(exit_layer, [token])[0] for token in ids])
    return many, single


def test_schedules_at_accuracy_level_1_are_exact(with_precision: Callable[[str, str], Path]) -> None:
    with Engine.open(with_precision("qwen3", "int4,level=1")) as engine:
        random = np.random.default_rng(11)
        for batch in (1, 2):
            sequence = engine.new_sequence(batch_size=batch, max_length=120)
            for _ in range(25):
                kept = int(random.integers(0, sequence.length + 1)) if random.random() < 0.2 else sequence.length
                sequence.rollback(kept)
                new = int(random.integers(1, 6))
                exit_layer = int(random.choice(engine.exit_layers))
                tokens = random.integers(0, 100, (batch, new))
                if sequence.length + new > 120:
                    break
                found = sequence.advance(exit_layer, tokens)
                sequence.catch_up(int(random.integers(0, 6)))
                scratch = engine.new_sequence(batch_size=batch, max_length=120)
                wanted = scratch.advance(exit_layer, sequence.tokens)
                assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("precision", ["int4", "int8", "int4,kv=8", "fp16"])
def test_schedules_of_rounding_precisions_are_as_far_apart_as_one_row_and_many(
    precision: str, with_precision: Callable[[str, str], Path]
) -> None:
    """The row count of a pass changes the last bits, and rounding amplifies them: chunks, steps and idle work at every exit."""
    random = np.random.default_rng(2)
    with Engine.open(with_precision("llama", precision)) as engine:
        bars: dict[int, list[float]] = {e: [] for e in engine.exit_layers}
        apart: dict[int, list[float]] = {e: [] for e in engine.exit_layers}
        for _ in range(6):
            ids = random.integers(0, 100, 60).tolist()
            whole = {e: one_row_and_many(engine, e, ids) for e in engine.exit_layers}
            sequence = engine.new_sequence(max_length=60)
            rows: dict[int, tuple[list[int], list[Any]]] = {e: ([], []) for e in engine.exit_layers}
            while (at := sequence.length) < 60:
                exit_layer, new = int(random.choice(engine.exit_layers)), min(int(random.integers(1, 5)), 60 - at)
                if new == 1 and at:
                    logits = sequence.step(exit_layer, np.array(ids[at : at + 1]))[0].copy()
                else:
                    logits = sequence.advance(exit_layer, ids[at : at + new])[0, -1]
                sequence.catch_up(int(random.integers(0, 4)))
                rows[exit_layer][0].append(at + new - 1)
                rows[exit_layer][1].append(logits)
            for e, (places, found) in rows.items():
                many, single = whole[e]
                bars[e].append(mean_kl(many, single))
                apart[e].append(mean_kl(many[places], np.stack(found)))
        for e in engine.exit_layers:
            # a tiny model's rounding flips once in some hundred rows, and then by 4e-5; a row too few or stale is 1e-2
            assert np.mean(apart[e]) <= 2 * np.mean(bars[e]) + 1e-4, e


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_rounding_precisions_in_company_packed_and_saved(
    precision: str, with_precision: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Shared passes are as far from a pass from scratch as its rounding; packed weights change no bit; a file goes on."""
    path, random = with_precision("llama", precision), np.random.default_rng(4)
    with Engine.open(path) as engine:
        pool = new_pool(engine, 3)
        members = [pool.take() for _ in range(3)]
        sequences = [sequence for sequence in members if sequence is not None]
        for length, sequence in enumerate(sequences, 20):
            sequence.advance(5, random.integers(0, 100, length))
        for _ in range(4):
            moves = [PoolMove(one, int(random.choice(engine.exit_layers)), 7) for one in sequences]
            for move, logits in zip(moves, [row[0].copy() for row in pool.step(moves)], strict=True):
                many, single = one_row_and_many(engine, move.exit_layer, move.sequence.tokens[0].tolist())
                assert np.abs(logits - single[-1]).max() <= 2e-2 * np.abs(many[-1]).max()
        tokens = sequences[0].tokens[0].tolist()
        whole, _ = one_row_and_many(engine, 5, tokens)
        file.save(tmp_path / "rows", sequences[0], int8=True)
        file.load(tmp_path / "rows", back := engine.new_sequence())
        assert np.abs(back.advance(5, [3]) - sequences[0].advance(5, [3])).max() <= 0.2 * np.abs(whole).max()
        with Engine.of(Bundle.open(path), packed=tmp_path / "packed") as packed:
            np.testing.assert_array_equal(one_row_and_many(packed, 5, tokens)[0], whole)
