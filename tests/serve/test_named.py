"""Names of models and budgets, as clients send them and as files have them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize
from unittest.mock import Mock

import pytest

from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError
from balcony_runtime.serve.bodies import named
from balcony_runtime.serve.bodies.named import LONGEST_NAME, Names
from balcony_runtime.serve.bodies.refusal import RefusedError
from tests.support.command import refused


def test_budget_files_that_may_not_be_listed_stay_as_they_are(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their directory, or one above it, became private. From Python 3.14 on, `is_dir` then says no."""
    (tmp_path / "voice.toml").write_text("tpot_ms = 30\n")
    names = Names("tiny", Budget(), Bundle.open(tiny.path).manifest, tmp_path)
    before = names.budgets

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def asked(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            if str(path) == str(tmp_path):
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, *arguments, **options)

        return asked

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    with pytest.raises(InputError, match=r"^--budgets .*: cannot be read \(Permission denied\): make it readable$"):
        names.read(Budget())
    assert names.budgets is before and "tiny:voice" in before


def test_hidden_files_are_no_budgets(tmp_path: Path) -> None:
    """A Mac writes ._voice.toml next to a file on a foreign drive, and Emacs a link to nowhere while it is edited."""
    (tmp_path / "voice.toml").write_text("tpot_ms = 30\n")
    (tmp_path / "._voice.toml").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X\xff")
    (tmp_path / ".#voice.toml").symlink_to("user@host.1")
    assert named.budget_files(tmp_path) == {tmp_path / "voice.toml": Budget(tpot_ms=30)}


def test_names_that_are_not_utf_8_are_not_served(tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """JSON cannot hold them: all of /v1/models would be an error."""
    for name in ("\udcff", "voice"):
        (tmp_path / f"{name}.toml").write_text("tpot_ms = 30\n")
    names = Names("tiny", Budget(), Bundle.open(tiny.path).manifest, tmp_path)
    assert "tiny:voice" in names.budgets and all(map(str.isprintable, names.budgets))
    assert "is not offered: its name is not UTF-8" in caplog.text
    refused(
        "--served-model-name: is not valid UTF-8", "serve", tmp_path, "--port", "0", "--served-model-name", "\udcff"
    )


def test_a_budget_file_of_a_mac_has_the_name_that_clients_send(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "fu\u0308r.toml").write_text("tpot_ms = 30\n")
    for own in ("tiny", "ti\u0308ny"):
        names = Names(own, Budget(), Bundle.open(tiny.path).manifest, tmp_path)
        for asked in (f"{own}:f\u00fcr", f"{own}:fu\u0308r"):  # the second one is the name of the file
            assert names.budget(asked, {}, None) == Budget(tpot_ms=30)
        assert names.budget(own, {}, None) is None


def test_a_long_name_is_cut_before_it_is_sorted(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks out of their order: an unpatched Python may take minutes for a name as long as a body, and all threads wait."""
    names, sorts = Names("tiny", Budget(), Bundle.open(tiny.path).manifest, None), Mock(side_effect=normalize)
    monkeypatch.setattr(named, "normalize", sorts)
    with pytest.raises(RefusedError, match="there is no such model"):
        names.budget("a" + "\u0315\u0300" * 50_000, {}, None)
    assert [len(call.args[1]) for call in sorts.call_args_list] == [LONGEST_NAME]
