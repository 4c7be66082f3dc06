"""The record of benchmarks/paper/compression.py, which holds half an hour of training for each point."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.paper import compression


def test_a_full_disk_loses_no_earlier_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def fills_up(path: Path, text: str, *arguments: Any, **options: Any) -> int:
        if "width 8" not in text:
            return write(path, text, *arguments, **options)
        write(path, text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fills_up)
    found = [compression.Method(depth=True), compression.Method(width=8)]
    monkeypatch.setattr(compression, "methods", lambda *_: found)
    for name in ("fingerprint", "learned", "export_bundle"):
        monkeypatch.setattr(compression, name, lambda *_: None)
    monkeypatch.setattr(compression, "judged", lambda *_: {"2": {"bytes": 1e6, "kl": 0.1, "agreement": 0.5}})
    subject: Any = SimpleNamespace(
        model=None, corpus=SimpleNamespace(digest="d"), widths=(8,), rank=1, tokenizer=None, exits=(2,)
    )
    with pytest.raises(OSError, match="No space"):
        compression.make(subject, tmp_path, 4, None)
    assert list(json.loads((tmp_path / "points.json").read_text())["points"]) == ["depth"]
