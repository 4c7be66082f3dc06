"""A resumed run, the checkpoint that it began with, and balconies of other runs next to its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from balcony_export.data.corpus import Corpus
from balcony_export.model.balcony_files import load_balconies
from balcony_export.train.states import StateCache
from tests.export.train.distilling import trainer_of

MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.is_file(), reason="needs the system's list of mapped files")
def test_a_resumed_run_does_not_map_its_checkpoint(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    """Windows replaces no file that is mapped, so the next checkpoint could not be written."""
    trainer_of(make_tiny("llama"), corpus, tmp_path, steps=2).run()
    resumed = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=4)
    assert resumed.resume() and str(resumed.work / "checkpoint.safetensors") not in MAPS.read_text()


def test_a_resumed_run_keeps_the_better_balcony_of_another_run(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    """As `train --exits 2 --start DIR -o DIR` makes it in a directory that has both exits."""
    first = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=2)
    first.run()
    model = make_tiny("llama")
    better = trainer_of(model, corpus, tmp_path, load_balconies(tmp_path, model, (2,)), exits=(2,), steps=60)
    better.run()
    assert better.best[2][0] < first.best[2][0]
    kept = (tmp_path / "balcony_2.safetensors").read_bytes()
    again = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=4)
    assert again.resume() and again.best[2] == pytest.approx(better.best[2], rel=0.01)
    assert again.best[3] == first.best[3]
    again.run()
    assert (tmp_path / "balcony_2.safetensors").read_bytes() == kept


def test_rows_are_marked_on_the_disk_after_their_states(tmp_path: Path) -> None:
    """The system writes the two files when it likes: if power is lost in between, zeros would be taken for states."""
    cache, marks = StateCache(tmp_path / "states.bin", 2, (2, 4, 8), torch.float32, "key"), tmp_path / "states.rows"
    cache.put(np.array([1]), torch.ones(2, 1, 4, 8))
    assert cache.get(np.array([1])) is not None and marks.read_bytes() == b"\0\0"
    cache.sync()
    assert marks.read_bytes() == b"\0\1"
