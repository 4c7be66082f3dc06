"""The command line as tests run it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.cli import main

COMMAND = [sys.executable, "-W", "ignore", "-c", "from balcony_edge.cli import main; main()"]


def unmeasured() -> dict[str, str]:
    """The environment of a process without coverage, which doubles the time of an export."""
    return {name: value for name, value in os.environ.items() if "COVERAGE" not in name}


def printed(program: str, *arguments: str | Path, **environment: str) -> str:
    """Output of a Python program in a process of its own, which must end without an error."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def invoke(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``balcony-edge`` in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300, **options
    )


def invoke_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has already imported torch: importing it again would take six seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["balcony-edge", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def refused(pattern: str, *arguments: str | Path, code: int = 1) -> None:
    """Run a command that must fail with one line on stderr that contains ``pattern``, and nothing on stdout."""
    done = invoke_here(*arguments)
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    assert (done.returncode, done.stdout) == (code, ""), done
    if code == 1:
        assert len(lines) == 1 and lines[0].startswith("balcony-edge: "), lines
    assert pattern in done.stderr, done.stderr
