"""Mistakes on purpose: each is put into a copy of the code, and the tests that it names must fail.

    python tests/mutation/mutants.py [--only WORD ...]

Owns the loop; ``mutants.toml`` is the list. A mistake is one place in one file with another text. The tests are those that are
about it, so that a run takes minutes. ``make test-deep`` runs all of them and prints the share that was found. A mistake whose
text is no longer in its file is an error: the list follows the code. ``mutation.py`` makes mutants by rule instead.

Tests run in forks of one process that has imported torch and transformers already: that takes most of the time of a short test.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import shutil
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("balcony_edge", "runtime", "export", "tests", "profiles", "benchmarks", "docs", "pyproject.toml")
SLOW_TO_IMPORT = (
    "hypothesis",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pydantic",
    "torch.onnx",
    "transformers.modeling_utils",
)
LIMIT_S = 600
LOG = "pytest.log"
#: Options of pytest in a fork: stop at the first failure, no time limit by signal, and plugins may be imported already.
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", "-W", "ignore::pytest.PytestAssertRewriteWarning")


class Mutant(NamedTuple):
    """One mistake."""

    what: str
    file: str
    old: str
    new: str
    tests: str


def listed() -> list[Mutant]:
    """The mistakes of ``mutants.toml``."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return [
        Mutant(file=group["file"], tests=group["tests"], **row) for group in table["group"] for row in group["mistakes"]
    ]


def module_of(file: str) -> str:
    """Name of a file's module: packages lie in the root, in `runtime` and in `export`."""
    inner = file.removeprefix("runtime/").removeprefix("export/")
    return inner.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def copy_tree(folder: Path) -> None:
    """Copy what the tests need into a folder."""
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)


def import_slow() -> None:
    """Import the packages that take seconds, once for all forks. None of them starts a thread at import."""
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)


def forked(action: Callable[[], int], copy: Path, log: Path, limit_s: float | None) -> int:
    """Run an action in a fork of this process, inside the copy, and return its exit status.

    Args:
        action: What to run. It returns the exit status, 0 to 255.
        copy: Copy of the tree: the working directory, and where the project's packages are imported from.
        log: File for what the fork prints.
        limit_s: Seconds until the fork is killed; None for a fork that makes forks, which cannot have such a limit again.

    Returns:
        The exit status, 1 at the limit; minus the number of the signal if one ended the fork.
    """
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if limit_s is not None:
                faulthandler.dump_traceback_later(limit_s, exit=True)  # a thread of its own: tests use the signals
            os.chdir(copy)
            paths = [str(copy), str(copy / "export"), str(copy / "runtime")]
            sys.path[:0] = paths
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
            status = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def survives(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests pass with the mistake in."""
    file = copy / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.file}: {mutant.old!r} is there {text.count(mutant.old)} times: mend the list ({mutant.what})"
        )
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return passes(mutant.tests, copy)
    finally:
        file.write_text(text, encoding="utf-8")


def passes(tests: str, copy: Path) -> bool:
    """Whether tests pass in the copy; one that hangs does not."""
    if absent := [test for test in tests.split() if not (copy / test.partition("::")[0]).exists()]:
        raise SystemExit(f"{absent[0]}: is not there: mend the list")
    log = copy / LOG
    arguments = [*OPTIONS, *tests.split()]
    status = forked(lambda: pytest.main(arguments), copy, log, LIMIT_S)
    if status not in (0, 1):
        raise SystemExit(f"{tests}: pytest ended with {status}:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Put mistakes into the code and see tests fail.")
    parser.add_argument("--only", nargs="+", default=[], help="words of the mutants to run")
    words = parser.parse_args().only
    named = [(mutant, f"{mutant.what} {mutant.file}") for mutant in listed()]
    for word in words:
        if not any(word in name for _, name in named):
            parser.error(f"--only {word}: mutants.toml has no such mistake: name a file or words of one")
    chosen = [mutant for mutant, name in named if not words or any(word in name for word in words)]
    survivors = []
    import_slow()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_tree(copy)
        for tests in sorted({mutant.tests for mutant in chosen}):
            if not passes(tests, copy):
                raise SystemExit(
                    f"{tests}: fail without a mistake: mend them first\n{(copy / LOG).read_text(encoding='utf-8')[-2000:]}"
                )
        for mutant in chosen:
            alive = survives(mutant, copy)
            survivors += [mutant.what] if alive else []
            print(f"{'SURVIVES' if alive else 'found   '}  {mutant.file}: {mutant.what}", flush=True)  # noqa: T201
    found = len(chosen) - len(survivors)
    score = round(found / max(len(chosen), 1), 3)
    print(json.dumps({"mutants": len(chosen), "found": found, "score": score, "survivors": survivors}))  # noqa: T201
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
