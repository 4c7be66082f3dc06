"""The command line: one module per verb, heavy imports inside the verb.

Owns what holds for every verb: a `BalconyError` is one line on stderr and exit code 1 (a usage error 2, Ctrl-C 130); a
bug keeps its traceback. People get tables and progress bars, programs get ``--json``: one document on stdout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

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
    reported(app)


def reported(action: Callable[[], object]) -> None:
    """Run a verb: a problem that it explains is one line on stderr and exit code 1."""
    try:
        action()
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
    except SystemExit as stop:
        if stop.code == 130:  # typer's code for Ctrl-C
            print("balcony-edge: interrupted", file=sys.stderr)  # noqa: T201 - likewise
        raise
