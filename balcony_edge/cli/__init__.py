"""The command line: one module per verb, heavy imports inside the verb.

Owns what holds for every verb: a `BalconyError` is one line on stderr and exit code 1 (a usage error 2, Ctrl-C 130); a
bug keeps its traceback. People get tables and progress bars, programs get ``--json``: one document on stdout.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from balcony_edge.cli import budget
from balcony_edge.cli.build import build
from balcony_edge.cli.calibrate import calibrate
from balcony_edge.cli.compare import compare
from balcony_edge.cli.doctor import doctor
from balcony_edge.cli.eval import evaluate
from balcony_edge.cli.export import export
from balcony_edge.cli.extract import extract
from balcony_edge.cli.inspect import inspect
from balcony_edge.cli.plan import plan
from balcony_edge.cli.profile import profile
from balcony_edge.cli.replay import replay
from balcony_edge.cli.run import run
from balcony_edge.cli.simulate import simulate
from balcony_edge.cli.train import train
from balcony_edge.cli.verify import verify
from balcony_edge.errors import BalconyError, is_out_of_memory

app = typer.Typer(
    name="balcony-edge",
    help="Run one frozen language model at several depths, inside budgets that move.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"balcony-edge {version('balcony-edge')}")  # noqa: T201 - for people and programs
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What holds before any verb."""


for verb in (
    export, build, extract, verify, inspect, run, train, doctor, profile, plan, compare, simulate, replay, calibrate
):  # fmt: skip
    app.command()(verb)
app.add_typer(budget.app, name="budget")
app.command("eval")(evaluate)  # its name is a builtin of Python

#: Packages that a device does not have.
WORKSTATION = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "gguf")


def main() -> None:
    """Entry point of the ``balcony-edge`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # an ASCII or Latin-1 locale has no box characters and no emoji: a question mark is better than no output
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments: who reads a text refuses what is not UTF-8
    reported(app)


def reported(action: Callable[[], object]) -> None:
    """Run a verb: a problem that it explains is one line on stderr and exit code 1."""
    try:
        try:
            action()
        finally:
            sys.stdout.flush()  # here, so that a full disk is reported and not found at the interpreter's exit
    except BalconyError as error:
        print(f"balcony-edge: {error}", file=sys.stderr)  # noqa: T201 - the one line that a user sees
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in WORKSTATION:
            raise
        cure = "this verb needs a workstation: pip install 'balcony-edge[export]'"
        print(f"balcony-edge: {error.name} is not installed: {cure}", file=sys.stderr)  # noqa: T201 - likewise
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cure = "free some, or take less at once (train: --micro-rows, --seq-len; eval: --window; export: --no-verify)"
        print(f"balcony-edge: out of memory: {cure}", file=sys.stderr)  # noqa: T201 - likewise
        sys.exit(1)
    except OSError as error:
        # an error of a file has its name; one of a standard stream has none
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes what is left at its exit
        if error.errno != errno.EPIPE:  # a reader such as `head` that has enough is no problem
            cure = "free space, or write to another place"
            print(f"balcony-edge: stdout: cannot be written ({error.strerror}): {cure}", file=sys.stderr)  # noqa: T201 - likewise
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # typer's code for Ctrl-C
            print("balcony-edge: interrupted", file=sys.stderr)  # noqa: T201 - likewise
        raise
