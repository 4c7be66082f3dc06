"""Mutants made by rule: every operator, number, argument and assignment of a module is changed once, and a test must fail.

    python tests/mutation/mutation.py [--only WORD ...] [--sample COUNT] [--seed NUMBER]

mutmut makes the mutants: it writes a copy of each file that holds all of them, and an environment variable picks one. It leaves
out constants of a module or class, properties, and text inside f-strings; ``mutants.py`` has mistakes of that kind. This module
owns the rest: the sample, the runs and the score. ``mutation.toml`` lists the modules and the tests that are about them.

Each entry of the list is one session of pytest. The tests run once without a mutant, which prepares the shared fixtures (an
export takes a minute) and shows which tests call which function. Then the process forks for each mutant. The fork runs the
tests that call the mutated function until one fails: first those that found most mutants so far, then the shortest. If none
calls it, the fork runs all tests, because some start processes of their own. A fork without a mutant comes first and must pass.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import random
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from mutants import LOG, OPTIONS, ROOT, copy_tree, forked, import_slow, module_of
from mutmut.mutation import trampoline
from mutmut.mutation.file_mutation import mutate_file_contents

SEED = 20261127
RESULTS = "results.jsonl"
MUTANT_LOG = "mutant.log"
VARIABLE = "MUTANT_UNDER_TEST"  # mutmut's: the name of the mutant that runs
#: A mutant that never ends costs this long, and four times what its tests take.
LEAST_LIMIT_S = 20.0
#: Property tests draw the same examples in each run, and a failure is not made smaller.
HYPOTHESIS = """
from hypothesis import Phase, settings
settings.register_profile("mutation", derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutation")
"""


class Mutant(NamedTuple):
    """One changed place. ``name`` is ``module.function__mutmut_number``, ``old`` and ``new`` are the lines that differ."""

    name: str
    file: str
    old: str
    new: str

    @property
    def function(self) -> str:
        return self.name.partition("__mutmut_")[0]


class Entry(NamedTuple):
    """Modules and the tests that are about them."""

    files: list[str]
    tests: list[str]
    sample: int = 0  # mutants of each file; 0 is all
    deselect: tuple[str, ...] = ()


def mutate(copy: Path, file: str, sample: int, seed: int) -> tuple[list[Mutant], int]:
    """Write all mutants of a file into the copy; return a sample of them, in the order of the code, and how many there are.

    Args:
        copy: Copy of the tree.
        file: The file, relative to the root.
        sample: Mutants to draw; 0 is all.
        seed: Seed of the draw.
    """
    path = copy / file
    made = mutate_file_contents(file, path.read_text(encoding="utf-8"))
    path.write_text(made.code, encoding="utf-8")
    lines = made.code.splitlines()

    def body(name: str) -> list[str]:
        span = made.line_span_by_function_name[name]
        return [line.strip().replace(name, "") for line in lines[span.start - 1 : span.end]]

    count = len(made.mutant_names)
    mutants = []
    for index in sorted(random.Random(seed).sample(range(count), min(sample or count, count))):
        name = made.mutant_names[index]
        before, after = body(name.partition("__mutmut_")[0] + "__mutmut_orig"), body(name)
        changed = list(difflib.unified_diff(before, after, n=0))[2:]  # without the names of the two
        old, new = (" ".join(line[1:] for line in changed if line.startswith(sign)).strip() for sign in "-+")
        mutants.append(Mutant(f"{module_of(file)}.{name}", file, old, new))
    return mutants, count


class Session:
    """The plugin of one entry: instead of pytest's loop, the tests run once, then once in a fork for each mutant."""

    def __init__(self, mutants: list[Mutant], copy: Path, equivalent: set[tuple[str, str, str]]) -> None:
        self._mutants = mutants
        self._copy = copy
        self._equivalent = equivalent
        self._stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")  # pytest's goes to a log
        self._called: set[str] = set()
        self._called_by_fixture: dict[str, set[str]] = defaultdict(set)
        self._made: set[Any] = set()  # fixtures that call mutated functions
        trampoline.record_trampoline_hit = lambda name, caller: self._called.add(name)

    def pytest_configure(self) -> None:
        exec(compile(HYPOTHESIS, "hypothesis", "exec"))  # noqa: S102  # hypothesis is imported after pytest has started

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """A test calls what its fixtures call, also where another test made them."""
        before, self._called = self._called, set()
        try:
            return (yield)
        finally:
            self._called_by_fixture[fixturedef.argname] |= self._called
            self._made |= {fixturedef} if self._called else set()
            self._called |= before

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:
            return None
        torch.set_num_threads(1)  # after the conftest: a pool of threads does not survive a fork
        os.environ[VARIABLE] = "stats"
        callers: dict[str, list[pytest.Item]] = defaultdict(list)
        seconds: dict[pytest.Item, float] = {}
        for item, following in zip(session.items, [*session.items[1:], session.items[0]], strict=True):
            self._called, begin = set(), time.perf_counter()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                raise SystemExit(1)
            seconds[item] = time.perf_counter() - begin
            called = self._called.union(*(self._called_by_fixture[name] for name in getattr(item, "fixturenames", ())))
            for function in called:
                callers[function].append(item)
        session._setupstate.teardown_exact(session)  # all but what the session shares
        control = Mutant("", "", "", "")  # a fork without a mutant must pass, or what it finds means nothing
        if by := self._finds(control, session, session.items, LEAST_LIMIT_S + 4 * sum(seconds.values())):
            raise SystemExit(f"{by.nodeid} fails in a fork:\n{(self._copy / MUTANT_LOG).read_text()[-2000:]}")
        found: Counter[tuple[str, pytest.Item]] = Counter()
        with (self._copy / RESULTS).open("a", encoding="utf-8") as results:
            for mutant in self._mutants:
                # A function that no test calls here may be called in the processes that tests start.
                items = sorted(
                    callers[mutant.function] or session.items,
                    key=lambda item: (-found[mutant.function, item], -found["", item], seconds[item]),
                )
                by = self._finds(mutant, session, items, LEAST_LIMIT_S + 4 * sum(seconds[item] for item in items))
                if by:
                    found.update({(mutant.function, by): 1, ("", by): 1})
                equivalent = not by and mutant[1:] in self._equivalent
                row = {"file": mutant.file, "found": by is not None, "equivalent": equivalent}
                print(json.dumps(row), file=results, flush=True)
                if not by and not equivalent:
                    survivor = f"SURVIVES  {mutant.name} ({len(items)} tests)\n    - {mutant.old}\n    + {mutant.new}"
                    print(survivor, file=self._stdout, flush=True)
        return True

    def _finds(
        self, mutant: Mutant, session: pytest.Session, items: list[pytest.Item], limit_s: float
    ) -> pytest.Item | None:
        """The test that fails with the mutant in, or None."""
        progress = self._copy / "progress"

        def run() -> int:
            os.environ[VARIABLE] = mutant.name
            for (
                fixture
            ) in self._made:  # made again, by the mutant; the old one stays open, its threads are not in this fork
                fixture.cached_result = None
                fixture._finalizers.clear()
            for index, (item, following) in enumerate(zip(items, [*items[1:], None], strict=True)):
                progress.write_text(str(index), encoding="utf-8")
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following or session)
                if session.testsfailed:
                    return 1
            return 0

        progress.write_text("0", encoding="utf-8")
        if not items or not forked(run, self._copy, self._copy / MUTANT_LOG, limit_s):
            return None
        return items[int(progress.read_text(encoding="utf-8"))]


def run_entry(
    entry: Entry, sample: int | None, seed: int, equivalent: set[tuple[str, str, str]]
) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Try the mutants of an entry, and print those that survive, unless they are known to be equivalent.

    Yields:
        For each file: its name, how many mutants it has, and a result for each that was tried.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_tree(copy)
        tried, counts = [], {}
        for file in entry.files:
            mutants, counts[file] = mutate(copy, file, entry.sample if sample is None else sample, seed)
            tried += mutants
        arguments = [*OPTIONS, *entry.tests, *(f"--deselect={test}" for test in entry.deselect)]

        session = Session(tried, copy, equivalent)
        if forked(lambda: int(pytest.main(arguments, plugins=[session])), copy, copy / LOG, None):
            raise SystemExit(
                f"{' '.join(entry.tests)}: fail without a mutant: mend them first\n{(copy / LOG).read_text()[-3000:]}"
            )
        rows = [json.loads(line) for line in (copy / RESULTS).read_text(encoding="utf-8").splitlines()]
    for file, count in counts.items():
        yield file, count, [row for row in rows if row["file"] == file]


def interval(found: int, tried: int) -> tuple[float, float]:
    """Wilson's interval of a share, at 95 %."""
    if not tried:
        return 0.0, 1.0
    share, z = found / tried, 1.96
    middle = share + z * z / (2 * tried)
    half = z * math.sqrt(share * (1 - share) / tried + z * z / (4 * tried * tried))
    return (middle - half) / (1 + z * z / tried), (middle + half) / (1 + z * z / tried)


def score_of(file: str, count: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The score of a file: the share that was found of the mutants that were tried and are not equivalent."""
    found, equivalent = sum(row["found"] for row in rows), sum(row["equivalent"] for row in rows)
    counted = len(rows) - equivalent
    score = {"file": file, "mutants": count, "tried": len(rows), "found": found, "equivalent": equivalent}
    score["score"] = round(found / max(counted, 1), 3)
    if len(rows) < count:
        score["interval"] = [round(bound, 3) for bound in interval(found, counted)]
    return score


def main() -> int:
    parser = argparse.ArgumentParser(description="Make mutants by rule and see tests fail.")
    parser.add_argument("--only", nargs="+", default=[], help="words of the files to mutate")
    parser.add_argument("--sample", type=int, help="mutants of each file; 0 is all (default: as in mutation.toml)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of the sample (default: {SEED})")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    equivalent = {(row["file"], row["old"], row["new"]) for row in table["equivalent"]}
    for file, old, _ in sorted(equivalent):
        if old not in (ROOT / file).read_text(encoding="utf-8"):
            parser.error(f"mutation.toml: {file} has no {old!r} any more: mend the entry or remove it")
    entries = [Entry(**values) for values in table["entry"]]
    words = arguments.only
    for word in words:
        if not any(word in file for entry in entries for file in entry.files):
            parser.error(f"--only {word}: mutation.toml has no such file: add an entry for it, or name another one")
    import_slow()
    scores = []
    for entry in entries:
        chosen = [file for file in entry.files if not words or any(word in file for word in words)]
        if chosen:
            for result in run_entry(entry._replace(files=chosen), arguments.sample, arguments.seed, equivalent):
                scores.append(score_of(*result))
                print(json.dumps(scores[-1]), flush=True)  # noqa: T201
    low = [score["file"] for score in scores if score["score"] < table["least_score"]]
    print(json.dumps({"least_score": table["least_score"], "below": low}))  # noqa: T201
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
