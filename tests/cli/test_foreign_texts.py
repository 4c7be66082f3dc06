"""Texts from files of strangers on a terminal: names in profiles, traces and manifests do not command it."""

from __future__ import annotations

import io
import logging

import pytest

from balcony_edge import cli
from balcony_edge.cli import console, reported
from balcony_edge.errors import InputError


def test_what_is_shown_does_not_command_the_terminal() -> None:
    file = io.StringIO()
    screen = type(console.stdout)(file=file, force_terminal=True, color_system=None, width=40)
    screen.print("a \x1b]52;c;aGk=\x1b\\", markup=False)
    assert file.getvalue() == "a ␛]52;c;aGk=␛\\\n"


def test_what_is_refused_does_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise InputError("p.json: \x1b[2J: Extra inputs are not permitted")

    with pytest.raises(SystemExit):
        reported(fails)
    assert capsys.readouterr().err == "balcony-edge: p.json: ␛[2J: Extra inputs are not permitted\n"


def test_what_is_logged_does_not_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run --profile p.json` warns with the notes and the names of the device that are in the file."""
    monkeypatch.setattr(cli, "reported", lambda _: None)
    cli.main()
    assert logging.lastResort is not None
    logging.lastResort.handle(logging.makeLogRecord({"msg": "p.json: \x1b[2J", "levelno": logging.WARNING}))
    assert capsys.readouterr().err == "p.json: ␛[2J\n"


def test_words_between_colons_are_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    console.stdout.print("a:key:b.txt, at 10:100:20", markup=False)
    console.stderr.print("[bold]a:key:b.txt[/]")
    assert capsys.readouterr() == ("a:key:b.txt, at 10:100:20\n", "a:key:b.txt\n")


def test_the_progress_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval` shows there the file that it measures on."""
    monkeypatch.setenv("TERM", "xterm")  # rich draws no bar on a dumb one
    file = io.StringIO()
    screen = type(console.stderr)(file=file, force_terminal=True, color_system=None, width=100, emoji=False)
    monkeypatch.setattr(console, "stderr", screen)
    with console.progress_bar() as report:
        report("a:key:b[v2].txt", 0.5)
    assert "a:key:b[v2].txt" in file.getvalue()
