"""What the benchmarks with llama.cpp's server say where it is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.peer_workers import server
from benchmarks.serving import batched


def test_a_missing_server_is_one_line_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "LLAMA_SERVER", tmp_path / "llama-server")
    monkeypatch.setattr(sys, "argv", ["batched", str(tmp_path / "bundle")])
    assert batched.main() == 2
    cure = "run `python -m benchmarks.serving.attainment --install`"
    assert capsys.readouterr().err == f"error: {tmp_path / 'llama-server'} does not exist: {cure}\n"
