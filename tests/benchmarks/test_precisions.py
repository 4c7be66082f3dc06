"""Which bundles of an earlier run benchmarks/models/precisions.py takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.models.precisions import work_of


def test_bundles_of_other_balconies_or_texts_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "balconies").mkdir()
    files = {name: tmp_path / name for name in ("balconies/exit_14.safetensors", "judged.raw", "calibration.jsonl")}
    for name, path in files.items():
        path.write_text(name, encoding="utf-8")
    options = argparse.Namespace(
        work=tmp_path / "work",
        balconies=tmp_path / "balconies",
        evaluate=files["judged.raw"],
        calibration=files["calibration.jsonl"],
    )
    first = work_of(options)
    assert first.parent == options.work and work_of(options) == first
    places = {first}
    for path in files.values():
        path.write_text("other", encoding="utf-8")
        places.add(work_of(options))
    assert len(places) == 4
