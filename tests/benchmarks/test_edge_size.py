"""Checkpoints of benchmarks/models/edge_size.py that were not written to their end."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.models import edge_size


def test_a_half_written_checkpoint_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def ends_early(*arguments: str) -> float:
        assert "--make" in arguments, "it went on with half a checkpoint"
        made.append(Path(arguments[2]))
        made[-1].mkdir()
        raise subprocess.CalledProcessError(-9, arguments)

    monkeypatch.setattr(edge_size, "_in_a_process", ends_early)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            edge_size.measure("qwen3-0.6b", "fp32", tmp_path)
    assert len(made) == 2
