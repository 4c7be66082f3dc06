"""The command line of the mutation tests."""

from __future__ import annotations

import sys

import pytest

from tests.mutation import mutants


def test_a_word_that_names_no_mistake_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also next to one that does: otherwise the run says nothing of it, and passes."""
    monkeypatch.setattr(mutants, "import_slow", lambda: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--only", "costs.py", "csots.py"])
    with pytest.raises(SystemExit):
        mutants.main()
    assert "--only csots.py: mutants.toml has no such mistake" in capsys.readouterr().err
