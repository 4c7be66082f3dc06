"""What `make test-gpu` runs, as far as it goes without a GPU: the report's logic, Table 3 over stand-ins, ceilings over a
GPU whose watts and load follow from the replies."""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import balcony_edge
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.cli import app
from balcony_edge.device.readings import Reading
from balcony_edge.errors import DeviceError
from balcony_runtime.backends.accelerator.tensorrt_builder import Builder
from benchmarks.nvidia import gpu, gpu_limits, gpu_report
from benchmarks.nvidia.gpu_report import Piece
from tests.runtime.backends.cuda_stand_in import runtime as cuda_runtime
from tests.runtime.backends.cuda_stand_in import tensorrt as stand_in

ROOT = Path(__file__).parents[3]
SAYS = (sys.executable, "-c")


def report(directory: Path, *arguments: str, made: Callable[[Path], tuple[Piece, ...]]) -> tuple[int, str]:
    status = gpu_report.main(["--directory", str(directory), *arguments], made)
    return status, (directory / "report.md").read_text()


def test_pieces_run_once_and_the_report_names_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setattr(gpu_report, "free_gb", lambda _: 100.0)
    ran.write_text("")
    card = json.dumps({"name": "Stand-in GPU, driver 1", "capability": "89", "packages": {"torch": "2"}})
    note = f"open({str(ran)!r}, 'a').write('x'); print('done')"
    broken = "import sys; print('one'); sys.exit('a line | with a bar')"
    lock, survived = tmp_path / "lock", tmp_path / "survived"
    late = f"import time; time.sleep(12); open({str(survived)!r}, 'w')"
    hangs = (
        f"import fcntl, subprocess, sys; lock = open({str(lock)!r}, 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('has begun', flush=True)\n"
        f"subprocess.run([sys.executable, '-c', {late!r}], pass_fds=[lock.fileno()])"
    )

    def made(directory: Path) -> tuple[Piece, ...]:
        return (
            Piece("card", "the card", ((*SAYS, f"print('and more'); print({card!r})"),), ()),
            Piece("good", "it works", ((*SAYS, note), (*SAYS, note))),
            Piece("bad", "it fails", ((*SAYS, broken), (*SAYS, note))),
            Piece("after", "it waits", ((*SAYS, note),), ("bad",)),
            Piece("slow", "it takes long", ((*SAYS, hangs),), limit_s=8),
            Piece("large", "it needs a disk", ((*SAYS, note),), room_gb=1e9),
        )

    status, text = report(tmp_path, made=made)
    assert status == 1 and ran.read_text() == "xx"
    assert text.startswith("# Stand-in GPU, driver 1, compute capability 89\n\nPackages: torch 2.\n")
    for row in (
        r"\| good \| passed \| [\d.]+ \| done \|",
        r"\| bad \| FAILED \| [\d.]+ \| a line \\\| with a bar \|",
        r"\| after \| not run \| \| needs bad, which has not passed \|",
        r"\| slow \| FAILED \| [\d.]+ \| not finished after 8 s \|",
        r"\| large \| not run \| \| needs 1000000000 GB of disk, and \d+ GB are free \|",
    ):
        assert re.search(row, text), row
    assert "$ " in (tmp_path / "bad.log").read_text()
    assert "has begun" in (tmp_path / "slow.log").read_text()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits until no process of the piece is left
    assert not survived.exists()
    # A second run repeats nothing; --again repeats what failed, --only one piece.
    assert report(tmp_path, made=made) == (status, text)
    capsys.readouterr()
    report(tmp_path, "--again", "--only", "bad", made=made)
    assert capsys.readouterr().out.splitlines()[0] == "bad: FAILED: a line | with a bar"
    (tmp_path / "good.json").unlink()
    (tmp_path / "good.json.part").write_text("half")  # an interrupted piece
    assert "| good | not run | | no time left for it: run again |" in report(tmp_path, "--minutes", "1", made=made)[1]
    assert "| good | passed |" in report(tmp_path, made=made)[1]  # a call has 40 minutes
    assert ran.read_text() == "xxxx"


def test_tests_of_the_other_tensorrt_are_not_for_a_card(tmp_path: Path) -> None:
    known = Builder("rtx").known_capabilities
    assert "90" not in known and "89" in known
    assert gpu_report.targets("90") == ["tensorrt"] and gpu_report.targets("89") == ["rtx"]
    assert gpu_report.targets("89", ["tensorrt-rtx-cu13"]) == ["rtx"]
    assert gpu_report.targets("89", ["tensorrt-cu13"]) == ["rtx", "tensorrt"]
    for capability, other in (("90", "tests-rtx"), ("89", "tests-tensorrt")):
        card = json.dumps({"name": "x", "packages": {}, "targets": gpu_report.targets(capability)})

        def made(directory: Path, card: str = card) -> tuple[Piece, ...]:
            says, there = (*SAYS, f"print({card!r})"), gpu_report.pieces(directory)
            tests = [replace(piece, commands=((*SAYS, "print('ran')"),)) for piece in there if piece.target]
            return (Piece("card", "the card", (says,), ()), *tests)

        status, text = report(tmp_path / capability, made=made)
        assert status == 0 and text.count("passed") == 2
        assert f"| {other} | not for this card | | engines for this card are built with --target " in text


def test_a_bar_that_is_missed_is_told_with_its_figures(tmp_path: Path) -> None:
    run = {"key": "power_w", "asked": 10.0, "got": 12.0, "held": False}
    says = f"import sys; print({json.dumps({'benchmark': 'gpu_limits', 'runs': [run]})!r}); sys.exit(1)"
    broken = "import sys; print('{\"name\": \"x\"}'); sys.exit('no card')"
    pieces = (
        Piece("limits", "the ceilings", ((*SAYS, says),), ()),
        Piece("other", "no benchmark", ((*SAYS, broken),), ()),
    )
    status, text = report(tmp_path, made=lambda _: pieces)
    assert status == 1 and re.search(r"\| other \| FAILED \| [\d.]+ \| no card", text)
    assert re.search(r"\| limits \| FAILED \| [\d.]+ \| a bar is missed: power_w 10: 12 NOT held \|", text)


def test_the_cuda_provider_is_named_where_it_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--provider"]) == 1
    assert "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]>=1.25'" in capsys.readouterr().err
    (piece,) = (piece for piece in gpu_report.pieces(Path("d")) if piece.name == "tests-cuda")
    assert "--provider" in piece.commands[0]


@pytest.mark.parametrize(
    ("status", "output", "line"),
    [
        (0, "....\n4 passed, 9 deselected in 3.2s", ""),
        (0, "ss\nSKIPPED [2] a.py:3: no card\n2 skipped in 0.1s", "2 skipped in 0.1s: SKIPPED [2] a.py:3: no card"),
        (
            1,
            "\x1b[31mF\x1b[0m\nFAILED a.py::b - no\n1 failed, 3 passed in 2s",
            "1 failed, 3 passed in 2s: FAILED a.py::b - no",
        ),
        (5, "9 deselected in 1.0s", "9 deselected in 1.0s"),
    ],
)
def test_tests_that_were_all_skipped_have_not_passed(status: int, output: str, line: str) -> None:
    done = subprocess.CompletedProcess([], status, stdout=output, stderr="")
    assert gpu_report.failure((*gpu_report.PYTEST, "tests"), done) == line


def test_every_test_that_needs_a_gpu_is_in_a_piece() -> None:
    marked = [
        file.relative_to(ROOT).as_posix()
        for file in sorted((ROOT / "tests").rglob("*.py"))
        if re.search(r"mark\.gpu\b|\bNEEDS\b", file.read_text(encoding="utf-8")) and file != Path(__file__)
    ]
    pieces = gpu_report.pieces(Path("d"))
    tests = [piece.commands[-1] for piece in pieces if piece.name.startswith("tests-")]
    assert all([word for word in line if word.endswith(".py")] == marked for line in tests), marked
    names = [piece.name for piece in pieces]
    assert all(need in names[: names.index(piece.name)] for piece in pieces for need in piece.needs)
    assert all(piece.limit_s < 540 for piece in pieces)  # nine minutes hold each of them, and the start of the program
    (other,) = {piece.limit_s for piece in pieces if piece.target}  # often one of the TensorRTs is not for the card
    first = sum(piece.limit_s for piece in pieces if not piece.name.startswith("big-")) - other
    assert first <= 40 * 60  # one call holds all but the 8B shape, however slow they are
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8"))
    assert f"with tests of both TensorRTs it may take {(first + other) / 60:.0f} minutes" in page
    from tests.runtime.backends.test_conformance import NEEDS

    chosen = [piece.commands[-1][-1] for piece in pieces if piece.name.startswith("tests-")]
    assert chosen == ["tensorrt-rtx", "tensorrt and not rtx", "cuda-fused"]
    assert {name for name, mark in NEEDS.items() if mark.name == "gpu"} == {"tensorrt-rtx", "tensorrt", "cuda-fused"}


def test_every_command_line_of_a_piece_is_one() -> None:
    group = get_command(app)
    lines = [line[len(gpu_report.CLI) :] for piece in gpu_report.pieces(Path("d")) for line in piece.commands
             if line[: len(gpu_report.CLI)] == gpu_report.CLI]  # fmt: skip
    assert {"doctor", "export", "verify", "train"} <= {line[0] for line in lines}
    for verb, *rest in lines:
        group.commands[verb].make_context(verb, list(rest))


def test_an_attempt_replaces_what_the_one_before_has_left(tmp_path: Path) -> None:
    makes = f"import pathlib; pathlib.Path({str(tmp_path / 'made')!r}).mkdir()"
    piece = Piece("a", "", ((*SAYS, makes), (*SAYS, "raise SystemExit(3)")), needs=(), makes="made")
    for _ in range(2):
        status, text = report(tmp_path, "--again", made=lambda _: (piece,))
        assert status == 1 and "FileExistsError" not in text
    (tmp_path / "other" / "made" / "keep").mkdir(parents=True)
    report(tmp_path / "other", made=lambda _: (piece,))
    assert (tmp_path / "other" / "made" / "keep").is_dir(), "this was not made by an attempt"


def test_table_3_over_stand_ins(
    with_engine_sets: Callable[[str], Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(with_engine_sets("llama").path, tmp_path / "bundle"))
    options = argparse.Namespace(
        bundle=path, device="tensorrt", engines="rtx-fp32", graphs=["on", "off"], batch=[1], tokens=24, rounds=1
    )
    with cuda_runtime.installed() as cuda, stand_in.installed(cuda, "rtx"):
        stand_in.with_engines(Bundle.open(path), "rtx-fp32")
        document = gpu.measure(options)
        assert cuda.count("cudaGraphLaunch") == 3 * 24  # with graphs, each step is one launch
    assert [(run["cuda_graphs"], run["exit_layer"]) for run in document["runs"]] == [
        (graphs, exit_layer) for graphs in ("on", "off") for exit_layer in (2, 3, 5)
    ]
    assert gpu_report.summary("", [document]).startswith("exit 2, graphs on: ")
    assert capsys.readouterr().out.count("tokens/s") == 6


def test_ceilings_on_a_gpu(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watts and load of a simulated GPU follow from the tokens of the last half second."""
    monkeypatch.setattr(gpu_limits, "SHARES", (0.5,))
    with balcony_edge.load(tiny.path) as llm:
        made: list[float] = []
        stream = llm.stream

        def counted(*given: Any, **named: Any) -> Any:
            for token in stream(*given, **named):
                made.append(time.monotonic())
                yield token

        def look() -> tuple[Reading, ...]:
            now = time.monotonic()
            rate = sum(at > now - 0.5 for at in made) / 0.5
            load = min(rate / 1000, 1.0)
            return (Reading("nvml:0", "gpu", now, watts=40 + 200 * load, utilization=load),)

        llm.stream = counted
        llm._sensors._latest = look
        document = gpu_limits.measure(llm, look, 4.0)
    assert [run["key"] for run in document["runs"]] == ["power_w", "gpu_utilization"]
    for run in document["runs"]:
        assert run["tokens_per_s"] > 0 and sum(run["exits"].values()) > 0
        assert run["got"] < (document["busy"]["watts"] if run["key"] == "power_w" else document["busy"]["utilization"])
    assert "power_w" in gpu_report.summary("", [document])
    with pytest.raises(DeviceError, match="no sensor gives the watts and utilization of a GPU"):
        gpu_limits.gpu_reading(lambda: [Reading("nvml:0", "gpu", 0.0, watts=3.0)])


def test_a_mean_over_time_weighs_by_it() -> None:
    assert gpu_limits.over_time([(0.0, 10.0), (1.0, 0.0), (4.0, 99.0)]) == 2.5
    assert gpu_limits.over_time([(0.0, 10.0)]) == 10.0


def test_a_piece_says_where_it_is_shorter_than_the_papers_table() -> None:
    """The paper decodes 2,048 tokens."""
    tables = [piece for piece in gpu_report.pieces(Path("d")) if "Table 3" in piece.about]
    assert len(tables) == 2
    for piece in tables:
        (command,) = piece.commands
        tokens = int(command[command.index("--tokens") + 1])
        assert tokens == 2048 or f"{tokens:,} tokens" in piece.about


def test_the_page_builds_engines_that_hold_table_3() -> None:
    """The engines that `build` makes by default hold neither prompt and reply of the paper nor two sequences."""
    block = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8").split("\n## Checking\n", 1)[1]
    (built,) = re.findall(r"^    balcony-edge build (.+?) +#", block, re.MULTILINE)
    (measured,) = re.findall(r"^    python -m benchmarks\.nvidia\.gpu bundle .*?--batch ([\d ]+)", block, re.MULTILINE)
    group: Any = get_command(app)
    options = group.commands["build"].make_context("build", shlex.split(built)).params
    assert options["batch_size"] >= max(map(int, measured.split()))
    assert options["context_length"] >= gpu.PROMPT_TOKENS + 2048  # the default of --tokens


def test_the_page_says_how_a_piece_that_failed_runs_once_more() -> None:
    """`make test-gpu` runs none again, and those that need it wait for ever."""
    page = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    assert "`python -m benchmarks.nvidia.gpu_report --again`" in page


def test_a_named_piece_brings_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory without results `ONLY=limits` ran nothing, and a misspelt name ran nothing without a word."""
    monkeypatch.setattr(gpu_report, "free_gb", lambda _: 100.0)
    card, says = json.dumps({"name": "x", "packages": {}}), (*SAYS, "print('done')")

    def made(directory: Path) -> tuple[Piece, ...]:
        first = Piece("card", "the card", ((*SAYS, f"print({card!r})"),), ())
        return (
            first,
            Piece("bundle", "", (says,)),
            Piece("limits", "", (says,), ("bundle",)),
            Piece("other", "", (says,)),
        )

    _, text = report(tmp_path, "--only", "limits", made=made)
    assert (
        all(f"| {name} | passed |" in text for name in ("card", "bundle", "limits")) and "| other | not run |" in text
    )
    with pytest.raises(SystemExit):
        report(tmp_path, "--only", "limit", made=made)
