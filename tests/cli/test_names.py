"""File names that are no text, or look like markup: records hold them in a readable form, and tables show them as they are."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.cli.workstation.export import _report
from tests.support.command import COMMAND, invoke_here, refused

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


def test_the_engine_reads_no_name_that_is_not_utf_8(tiny: Any, tmp_path: Path) -> None:
    """ONNX Runtime gets text and makes UTF-8 of it: it would look for a file that is not there, and call it damaged."""
    bundle, packed = tmp_path / "\udcff", tmp_path / "packed-\udcff"
    shutil.copytree(tiny.path, bundle)
    line = "ONNX Runtime reads names of UTF-8 only, in a locale of UTF-8 (now utf-8): rename it"
    refused(line, "run", bundle, "fox", "-n", "2")
    refused(line, "run", tiny.path, "fox", "--packed", packed)
    assert not packed.exists()


def test_the_engine_reads_names_in_utf_8_whatever_the_locale(tiny: Any, tmp_path: Path) -> None:
    """In another locale, Python writes the same text as other bytes."""
    bundle = os.fsencode(tmp_path) + "/é".encode()
    shutil.copytree(os.fsencode(tiny.path), bundle)
    posix = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*COMMAND, "run", bundle, "fox", "-n", "2"]
    done = subprocess.run(command, env=posix, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "(now ascii): rename it, or set LC_ALL=C.UTF-8" in done.stderr, done
