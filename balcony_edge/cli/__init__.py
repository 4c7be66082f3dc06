"""The command line: one module per verb, in three groups, with heavy imports inside the verb.

Owns the rules that hold for every verb. A ``BalconyError`` becomes one line on stderr and exit code 1; a usage error has exit
code 2, Ctrl-C 130; a bug keeps its traceback. People get tables and progress bars; with ``--json`` programs get one document
on stdout.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from balcony_edge.cli.budgets.budget import app as budget
from balcony_edge.cli.budgets.compare import compare
from balcony_edge.cli.budgets.plan import plan
from balcony_edge.cli.budgets.replay import replay
from balcony_edge.cli.budgets.simulate import simulate
from balcony_edge.cli.console import VisibleLines, visible
from balcony_edge.cli.device.calibrate import calibrate
from balcony_edge.cli.device.doctor import doctor
from balcony_edge.cli.device.inspect import inspect
from balcony_edge.cli.device.profile import profile
from balcony_edge.cli.device.run import run
from balcony_edge.cli.device.serve import serve
from balcony_edge.cli.workstation.average import average
from balcony_edge.cli.workstation.build import build
from balcony_edge.cli.workstation.cut import cut
from balcony_edge.cli.workstation.eval import evaluate
from balcony_edge.cli.workstation.export import export
from balcony_edge.cli.workstation.extract import extract
from balcony_edge.cli.workstation.train import train
from balcony_edge.cli.workstation.verify import verify
from balcony_edge.errors import BalconyError, is_out_of_memory

app = typer.Typer(
    name="balcony-edge",
    help="Run one frozen language model at several depths, within budgets that may change at any time.",
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
    """Options before the verb."""


WORK, RUN, PLAN = "Make a bundle", "Run it on a device", "Choose a budget"
for heading, verbs in {
    WORK: (train, average, cut, export, build, verify, extract),
    RUN: (inspect, run, serve, doctor, profile, calibrate),
    PLAN: (plan, compare, simulate, replay),
}.items():
    for verb in verbs:
        app.command(rich_help_panel=heading)(verb)
app.command("eval", rich_help_panel=WORK)(evaluate)  # the function cannot be called eval, which is a builtin
app.add_typer(budget, name="budget", rich_help_panel=PLAN)

#: Packages that only a workstation has.
WORKSTATION = ("torch", "transformers", "accelerate", "onnx", "onnxscript", "onnx_ir", "safetensors", "gguf")


def main() -> None:
    """Entry point of the ``balcony-edge`` command."""
    # The next file would be the descriptor of a closed stream, and get what native libraries print.
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    if sys.stderr is None:  # closed: print() would write errors to stdout
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the whole process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Windows takes its code page for files and pipes, which would lose most of what is not English in a reply.
            given = sys.platform != "win32" or stream.isatty() or "PYTHONIOENCODING" in os.environ
            # An ASCII or Latin-1 locale has no box characters and no emoji; a question mark is better than no output.
            stream.reconfigure(encoding=None if given else "utf-8", errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Decode invalid bytes as in arguments; the code that reads a text refuses input that is not UTF-8.
        sys.stdin.reconfigure(errors="surrogateescape")
    if logging.lastResort is not None:  # writes the warnings of all verbs but serve
        logging.lastResort.setFormatter(VisibleLines())
    # On Windows typer would expand variables and patterns, also in a prompt: it does not see what was quoted.
    reported(lambda: app(windows_expand_args=False))


def reported(action: Callable[[], object]) -> None:
    """Run a verb and turn an error that it explains into one line on stderr and exit code 1."""
    try:
        try:
            action()
        finally:
            if sys.stdout is not None:  # a closed one
                sys.stdout.flush()  # reports a full disk here; at the interpreter's exit it would be a traceback
    except BalconyError as error:
        print(f"balcony-edge: {visible(str(error))}", file=sys.stderr)  # noqa: T201 - the one line that a user sees
        sys.exit(1)
    except ImportError as error:  # also a name that an older version does not have
        package = (error.name or "").partition(".")[0]
        if package not in WORKSTATION:
            raise
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        why = "is not installed" if absent else f"cannot be used ({' '.join(str(error).split())})"
        cure = "this verb needs a workstation: pip install 'balcony-edge[export]'"
        print(f"balcony-edge: {package} {why}: {cure}", file=sys.stderr)  # noqa: T201 - likewise
        sys.exit(1)
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            less = "train: --micro-rows, --seq-len; eval: --window; export: --no-verify"
            cure = f"free memory, or use less at once ({less})"
            print(f"balcony-edge: out of memory: {cure}", file=sys.stderr)  # noqa: T201 - likewise
        elif str(error) == "can't start new thread":
            cure = "end other processes, or raise the limit (ulimit -u; a container's limit of processes)"
            print(f"balcony-edge: no more threads can be started: {cure}", file=sys.stderr)  # noqa: T201 - likewise
        # of torch.compile, as where /tmp is full or runs no programs; the others for a GPU without Triton, as on Windows
        elif type(error).__name__ in ("InductorError", "GPUTooOldForTriton", "TritonMissing"):
            why = " ".join(str(error).partition("\n")[0].split())[:200]
            cure = "train with --no-compile, or name a directory with room in TMPDIR, from which programs may run"
            print(f"balcony-edge: the loss cannot be compiled ({why}): {cure}", file=sys.stderr)  # noqa: T201 - likewise
        elif not isinstance(error, OSError) or not _explain(error):
            raise
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # typer's code for Ctrl-C
            print("balcony-edge: interrupted", file=sys.stderr)  # noqa: T201 - likewise
        raise


def _explain(error: OSError) -> bool:
    """Print the line for a path that may not be used or a standard stream that fails; False for anything else."""
    no_space = (errno.EDQUOT, errno.EFBIG, errno.ENOSPC)
    full = error.errno in (*no_space, errno.EMFILE, errno.ENFILE)
    cure = "free space or files, or name another path" if full else "make it accessible, or name another path"
    line = f"balcony-edge: {error.filename}: cannot be used ({error.strerror}): {cure}"
    closed = (errno.EACCES, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS)
    gone = {errno.EPIPE}  # of a pipe whose reader has ended
    # A failed call of Windows itself, which has a winerror, is EINVAL for any reason that Python does not know.
    if sys.platform == "win32" and getattr(error, "winerror", None) is None:
        gone.add(errno.EINVAL)
    known = full or error.errno in closed
    if error.filename is None and error.errno == errno.ENOENT:  # of os.getcwd, for a relative path
        known, line = True, "balcony-edge: the current directory was removed: change to another one"
    elif error.filename is None:  # an error of a standard stream
        line = f"balcony-edge: stdout: cannot be written ({error.strerror}): free space, or write to another place"
        known = error.errno in (*no_space, errno.EIO, *gone)
        if known:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes the rest of stdout at its exit
    if known and error.errno not in gone:  # a reader such as `head` may stop early without an error
        print(line, file=sys.stderr)  # noqa: T201 - likewise
    return known
