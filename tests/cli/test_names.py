"""File names that are no text, or look like markup: records hold them in a readable form, and tables show them as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.cli.workstation.export import _report
from tests.support.command import invoke_here

TEXT = "the quick brown fox jumps over the lazy dog. " * 50


def test_records_hold_a_name_that_is_no_text(bundle_copy: Path, tmp_path: Path) -> None:
    text = tmp_path / f"\udcff{'x' * 230}.txt"  # a byte that is no UTF-8, and longer than a line of the manifest
    text.write_text(TEXT)
    done = invoke_here("calibrate", bundle_copy, "--text", text, "--tokens", "450", "--max-disagreement", "90%")
    assert done.returncode == 0, done.stderr
    done = invoke_here("eval", bundle_copy, "--text", text, "--output", tmp_path / "report", "--limit", "1")
    assert done.returncode == 0, done.stderr
    manifest, name = Bundle.open(bundle_copy).manifest, f"\ufffd{'x' * 118}…"
    assert manifest.confidence is not None and manifest.confidence.text == name
    assert manifest.exits[0].quality is not None and list(manifest.exits[0].quality.text) == [name]
    assert name in (tmp_path / "report" / "evaluation.md").read_text(encoding="utf-8")


def test_a_profile_is_written_from_a_path_that_is_no_text(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "\udcff.json"
    grid = ("--quick", "-p", "16", "-n", "5", "-d", "0,40", "--pending", "2,5", "-r", "3", "--threads", "1")
    done = invoke_here("profile", tiny.path, "-o", path, *grid)
    assert done.returncode == 0 and path.read_bytes().startswith(b"{"), done.stderr


def test_tables_show_a_name_that_looks_like_markup(
    tiny: Any, tiny_checkpoint: Path, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke_here("extract", tiny_checkpoint, "--exit", "3", "-o", "small[int4]")
    assert "small[int4]" in done.stdout, done
    Path("text[int4].txt").write_text(TEXT)
    done = invoke_here("calibrate", bundle_copy, "--text", "text[int4].txt", "--tokens", "450")
    assert "text[int4].txt" in done.stdout, done
    _report(Path("out[int4]"), Bundle.open(tiny.path).manifest, [], False)
    assert "out[int4]: " in capsys.readouterr().out
