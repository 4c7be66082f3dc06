"""A resumed run and the checkpoint that it began with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from balcony_export.data.corpus import Corpus
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
