"""Names of variants that benchmarks/paper/ablations.py does not have are refused before it trains anything."""

from __future__ import annotations

import sys

import pytest

from benchmarks.paper import ablations


def test_an_unknown_variant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ablations, "make_tokenizer", lambda _: None)
    monkeypatch.setattr(ablations, "build_corpus", lambda *_, **__: None)
    monkeypatch.setattr(ablations, "JointTrainer", lambda *_: pytest.fail("trained first"))
    monkeypatch.setattr(sys, "argv", ["ablations", "--data", "text.jsonl", "--only", "MLP only"])
    with pytest.raises(SystemExit, match="2"):
        ablations.main()
    assert "--only 'MLP only': is not a variant: give some of" in capsys.readouterr().err
