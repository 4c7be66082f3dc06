"""What a person sees on a terminal."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import balcony_edge
from balcony_edge import cli
from balcony_edge.cli import console, reported
from balcony_edge.cli.show import show_summary
from balcony_edge.control.verdict import Verdict


@pytest.mark.parametrize(("platform", "wanted"), [("win32", "牛 – ż".encode()), ("linux", "? – ?".encode("cp1252"))])
def test_a_reply_in_a_file_keeps_its_letters_on_windows(
    platform: str, wanted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run BUNDLE --file question.txt > answer.txt`: the question is read as UTF-8, whatever the code page is."""
    written = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(cli, "reported", lambda _: console.write_text("牛 – ż"))
    cli.main()
    written.flush()
    assert written.buffer.getvalue() == wanted  # type: ignore[attr-defined]  # it is a BytesIO


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


def test_a_terminal_that_cannot_move_its_cursor_gets_a_line_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``TERM=dumb``, as Emacs and some screen readers have it, rich shows no bar."""
    file = io.StringIO()
    dumb = Console(file=file, force_terminal=True, force_interactive=False, color_system=None)
    monkeypatch.setattr(console, "stderr", dumb)
    with console.progress_bar() as report:
        for step, done in (("trace [1]", 0.0), ("trace [1]", 0.25), ("check", 0.5)):
            report(step, done)
    assert file.getvalue() == "  0% trace [1]\n 50% check\n"


@pytest.mark.parametrize(("latency_ms", "shown"), [(2500.0, "0.4 tokens a second"), (17.7, "56 tokens a second")])
def test_a_slow_device_makes_more_than_no_tokens(tiny: Any, latency_ms: float, shown: str) -> None:
    with balcony_edge.load(tiny.path) as llm:
        reply = llm.generate("the fox", max_new_tokens=4, ignore_eos=True)
        slow = dataclasses.replace(reply, tokens=tuple(one._replace(latency_ms=latency_ms) for one in reply.tokens))
        file = io.StringIO()
        show_summary(slow, console.depth_styles(llm.exit_layers), Console(file=file, width=200))
    assert f"({shown})" in file.getvalue()


@pytest.mark.parametrize(
    ("key", "asked", "reached", "shown"),
    [
        ("memory_mb", 16000.0, 12345.6, "12345.6 (highest)"),
        ("tpot_ms", 24.0, 24.003, "24.003 (highest)"),
        ("tpot_ms", 24.0, 20.1312, "20.13 (highest)"),
    ],
)
def test_a_verdict_shows_what_was_reached(tiny: Any, key: str, asked: float, reached: float, shown: str) -> None:
    with balcony_edge.load(tiny.path) as llm:
        reply = llm.generate("the fox", max_new_tokens=4, ignore_eos=True)
        verdict = Verdict(key, asked, reached, reached <= asked, (asked - reached) / asked, "highest")
        file = io.StringIO()
        judged = dataclasses.replace(reply, verdicts=(verdict,))
        show_summary(judged, console.depth_styles(llm.exit_layers), Console(file=file, width=200))
    assert shown in file.getvalue()


def test_a_prompt_is_taken_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows typer expands %PATH%, $PATH, ~ and *, also in words that were quoted."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(cli, "app", lambda **options: given.update(options))
    cli.main()
    assert given == {"windows_expand_args": False}


def test_a_reader_that_stops_early_is_not_an_error_on_windows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows reports a pipe without a reader as an invalid argument."""
    other: Any = OSError(errno.EINVAL, "The paging file is too small")
    other.winerror = 1455
    gone = OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def write(error: OSError) -> None:
        raise error

    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with pytest.raises(OSError, match="Invalid argument"):
        reported(lambda: write(gone))
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit):
        reported(lambda: write(gone))
    with pytest.raises(OSError, match="paging file"):
        reported(lambda: write(other))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "0<&- >&- 2>&-"])
def test_no_file_gets_the_descriptor_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    """Native libraries would write their messages into it."""
    opened = "cli.app = lambda **_: print(os.open(os.devnull, os.O_RDONLY), file=open('found', 'w'))"
    program = f"import os; from balcony_edge import cli; {opened}; cli.main()"
    subprocess.run(f'{sys.executable} -c "{program}" {closed}', shell=True, check=True, cwd=tmp_path, timeout=120)
    assert int((tmp_path / "found").read_text()) > 2


@pytest.mark.parametrize(("arguments", "wanted"), [(["--help"], "Usage"), (["run", "--nosuch"], "nosuch")])
def test_a_terminal_of_no_columns_still_shows_text(arguments: list[str], wanted: str) -> None:
    """`docker exec -e COLUMNS="$(tput cols)"` and serial consoles say 0: unknown."""
    command = [sys.executable, "-m", "balcony_edge", *arguments]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "0"}, capture_output=True, text=True, check=False)
    assert wanted in done.stdout + done.stderr


def test_a_file_under_stdout_that_may_not_grow_is_one_line(tiny: Any, tmp_path: Path) -> None:
    """A limit of the shell (`ulimit -f`) or of the file system; a quota fails in the same way, with EDQUOT."""
    command = f"ulimit -f 1; exec {sys.executable} -m balcony_edge inspect {tiny.path} --json > {tmp_path / 'out'}"
    # coverage's own file may not grow either
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )
    wanted = "stdout: cannot be written (File too large): free space, or write to another place"
    assert (done.returncode, done.stderr) == (1, f"balcony-edge: {wanted}\n")
