"""The command line of the mutation tests."""

from __future__ import annotations

import re
import sys
import tomllib

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


def test_every_mistake_has_its_text_in_its_file() -> None:
    """One whose line was changed would stop `make test-deep` in the middle."""
    texts = {one.file: (mutants.ROOT / one.file).read_text(encoding="utf-8") for one in mutants.listed()}
    assert [one.what for one in mutants.listed() if texts[one.file].count(one.old) != 1] == []


def test_what_the_named_tests_read_is_copied() -> None:
    """One that looks for a page in a copy without pages would stop all of `make test-deep` before the first mistake."""
    files = {test.partition("::")[0] for mutant in mutants.listed() for test in mutant.tests.split()}
    texts = [(mutants.ROOT / file).read_text(encoding="utf-8") for file in files]
    read = {folder for text in texts for folder in re.findall(r'parents\[\d\] / "(\w+)', text)}
    assert "docs" in read and {one for one in read if (mutants.ROOT / one).exists()} <= {*mutants.COPIED}


def test_the_list_by_rule_has_every_sensor_and_all_tests_of_a_package() -> None:
    """A module that came later would have no score, and a test that came later would find no mutant."""
    entries = tomllib.loads((mutants.ROOT / "tests/mutation/mutation.toml").read_text(encoding="utf-8"))["entry"]
    files, tests = ({one for entry in entries for one in entry[key]} for key in ("files", "tests"))
    sensors = {path.name for path in (mutants.ROOT / "runtime/balcony_runtime/sensors").glob("*.py")} - {"base.py"}
    assert [name for name in sensors if f"runtime/balcony_runtime/sensors/{name}" not in files] == []
    assert {"tests/core/company", "tests/runtime/sensors"} <= tests
