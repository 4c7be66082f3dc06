"""What a person sees on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from balcony_edge.cli import console


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\n", "a\tb\n"),
        ("\x1b]52;c;aGk=\x07", "␛]52;c;aGk=␇"),
        ("\x9b8m\x7f\r\0", "\ufffd8m␡␍␀"),
        ("é 牛 🙂", "é 牛 🙂"),
    ],
)
def test_a_reply_does_not_command_the_terminal(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a tab become spaces: what is copied is what was written."""
    file = io.StringIO()
    monkeypatch.setattr(console, "stdout", Console(file=file, force_terminal=True, color_system=None, width=20))
    console.write_text(text)
    assert file.getvalue() == shown
