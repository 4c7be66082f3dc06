"""Output directories appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from balcony_export.output import fresh_directory


def test_all_of_an_output_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If power is lost, a directory of empty files would have the name, and the next export would refuse it."""
    flushed: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    with fresh_directory(tmp_path / "out") as directory:
        (directory / "config.json").write_text("{}")
        (directory / "balconies").mkdir()
        (directory / "balconies" / "balconies.json").write_text("{}")
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) == 2 and {path.stat().st_ino for path in written} == flushed
