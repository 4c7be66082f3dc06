"""Everything that needs an NVIDIA GPU, in pieces of at most nine minutes, and one report: `make test-gpu`.

    python -m benchmarks.nvidia.gpu_report [--directory .cache/gpu-report] [--minutes 40] [--only NAME ...] [--again]

A piece is a few commands. Its result is a file in the directory, and a piece with a file is not run again, so the whole can be
interrupted and continued. A call takes at most `--minutes`: it starts no piece that could exceed them, and the next call goes
on. `--again` runs failed pieces once more. `--only` runs the pieces that it names, and what they need.
Nothing is downloaded: what the pieces need must be installed. Without a GPU each piece fails with one line.

The report is `report.md` in the directory: the card, driver and packages, then each piece with its result. Tests of the
TensorRT that this card does not use are not for this card, and do not run. The exit status is 1 if any other piece failed or
is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BALCONIES = ROOT / "balconies" / "smollm2-135m-instruct"
PYTHON = (sys.executable, "-m")
CLI = (sys.executable, "-c", "from balcony_edge.cli import main; main()")
PYTEST = (*PYTHON, "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "480", "-m", "gpu")
#: Text for the distillation: whatever is at hand, because only its speed and its way to a GPU are looked at.
TEXTS = ("README.md", "ARCHITECTURE.md", "docs/*.md", "benchmarks/*.md")
#: Room on the disk for the bundle, graphs and engines of an 8B model in float16, in GB.
BIG_GB = 55
PACKAGES = ("cuda-python", "tensorrt-rtx-cu13", "tensorrt", "tensorrt-cu13", "onnxruntime", "onnxruntime-gpu", "torch")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Piece:
    """A part of the report.

    Attributes:
        name: name of the piece, and of its result's file.
        about: what it shows.
        commands: commands in order; the first that fails ends the piece.
        needs: pieces that must have passed.
        limit_s: longest time that it may take.
        room_gb: free space on the disk that it needs.
        makes: directory that it makes; commands refuse to replace what an earlier attempt has left.
        target: TensorRT that it needs, ``rtx`` or ``tensorrt``; empty: none, or the one of the card.
    """

    name: str
    about: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ("card",)
    limit_s: float = 300.0
    room_gb: float = 1.0
    makes: str = ""
    target: str = ""


def pieces(directory: Path) -> tuple[Piece, ...]:
    """All pieces in their order."""
    demo, big, text = directory / "demo", directory / "llama-3-8b", directory / "text.txt"
    backends = "tests/runtime/backends"
    tests = (*PYTEST, f"{backends}/test_conformance.py", f"{backends}/test_device_pool.py", "-k")
    here = (*PYTHON, "benchmarks.nvidia.gpu_report")
    exits = ("--exits", "0.5x,0.6x,0.7x")
    train = (
        *CLI,
        "train",
        "demo",
        *exits,
        "--data",
        str(text),
        "--output",
        str(directory / "balconies"),
        "--minutes",
        "4",
    )
    return (
        Piece("card", "the GPU and what is installed", ((*CLI, "doctor"), (*here, "--card")), needs=(), limit_s=60),
        Piece("tests-rtx", "conformance suite on TensorRT-RTX", ((*tests, "tensorrt-rtx"),), limit_s=480, target="rtx"),
        Piece(
            "tests-tensorrt",
            "conformance suite on TensorRT",
            ((*tests, "tensorrt and not rtx"),),
            limit_s=480,
            target="tensorrt",
        ),
        Piece(
            "tests-cuda",
            "conformance suite on ONNX Runtime's CUDA provider",
            ((*here, "--provider"), (*tests, "cuda-fused")),
            limit_s=240,
        ),
        Piece(
            "bundle",
            "the demo model as a bundle",
            (
                (*CLI, "export", "demo", *exits, "--balconies", str(BALCONIES), "--output", str(demo)),
                (*CLI, "verify", str(demo), "--against", "demo", "--balconies", str(BALCONIES)),
            ),
            makes="demo",
        ),
        Piece("engines", "engines of the demo model", ((*here, "--build", str(demo)),), ("bundle",)),
        Piece(
            "table-3",
            "Table 3 of the paper on the demo model, for one sequence of 1,024 tokens, with and without CUDA graphs",
            ((*PYTHON, "benchmarks.nvidia.gpu", str(demo), "--graphs", "on", "off", "--tokens", "1024"),),
            ("engines",),
        ),
        Piece(
            "limits",
            "the controller against power_w and gpu_utilization",
            ((*PYTHON, "benchmarks.nvidia.gpu_limits", str(demo)),),
            ("engines",),
        ),
        Piece(
            "training",
            "distillation of the balconies",
            ((*here, "--torch"), (*train, "--json")),
            (),
            400,
            makes="balconies",
        ),
        Piece(
            "big-bundle",
            "a random model of the shape of Llama 3 8B",
            ((*PYTHON, "benchmarks.nvidia.gpu", "--shape", "llama-3-8b", "--output", str(big)),),
            limit_s=530,
            room_gb=BIG_GB,
            makes="llama-3-8b",
        ),
        Piece("big-engines", "its engines", ((*here, "--build", str(big)),), ("big-bundle",), 530, 36),
        Piece(
            "big-table-3",
            "Table 3 of the paper on that shape, for one sequence of 512 tokens",
            ((*PYTHON, "benchmarks.nvidia.gpu", str(big), "--tokens", "512", "--rounds", "1"),),
            ("big-engines",),
            530,
        ),
    )


def run(piece: Piece, directory: Path) -> dict[str, Any]:
    """Run a piece and write its result and its output."""
    begin, documents, output, problem = time.monotonic(), list[Any](), "", ""
    for command in piece.commands:
        left = piece.limit_s - (time.monotonic() - begin)
        done, ended = execute(command, left)
        output += f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n"
        if not ended:
            problem = f"not finished after {piece.limit_s:.0f} s"
            break
        documents += [document] if (document := last_json(done.stdout)) is not None else []
        if problem := failure(command, done):
            break
    told = summary(output, documents) if documents or not problem else ""  # a bar that was missed has its figures
    result = {
        "piece": piece.name,
        "about": piece.about,
        "passed": not problem,
        "line": ": ".join(part for part in (problem, told) if part),
        "seconds": round(time.monotonic() - begin, 1),
        "documents": documents,
    }
    (directory / f"{piece.name}.log").write_text(output, encoding="utf-8")
    partial = directory / f"{piece.name}.json.part"
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial.replace(directory / f"{piece.name}.json")
    return result


def execute(command: Sequence[str], limit_s: float) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Run a command, and whether it ended; after the limit it and all its processes are killed. Its output is kept."""
    with (
        tempfile.TemporaryFile("w+", errors="replace") as out,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=errors, start_new_session=True) as process,
    ):
        ended = False
        try:
            process.wait(limit_s)
            ended = True
        except subprocess.TimeoutExpired:
            pass
        finally:
            if not ended:  # also after an interrupt, which does not reach another session
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), errors.read()), ended


def failure(command: Sequence[str], done: subprocess.CompletedProcess[str]) -> str:
    """One line that says why a command failed; empty if it did not."""
    lines = [line for line in _COLOUR.sub("", f"{done.stdout}\n{done.stderr}").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no output"
    if command[: len(PYTEST)] != PYTEST:
        if done.returncode == 0:
            return ""
        document = last_json(done.stdout)
        return "a bar is missed" if isinstance(document, dict) and "benchmark" in document else last
    if done.returncode == 0 and " passed" in last:
        return ""
    reasons = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    return f"{last}{': ' if reasons else ''}{reasons[0] if reasons else ''}"


def last_json(text: str) -> Any:
    """The document in the last line, or in the whole text; None if there is none."""
    for part in (text, text.strip().rpartition("\n")[2]):
        try:
            document = json.loads(part)
        except ValueError:
            continue
        if isinstance(document, dict):
            return document
    return None


def summary(output: str, documents: Sequence[Any]) -> str:
    """One line about what a piece measured."""
    for document in documents:
        if document.get("benchmark") == "gpu":
            return "; ".join(
                f"exit {r['exit_layer']}, graphs {r['cuda_graphs']}: {r['tokens_per_s']:.1f}/s ({r['speedup']:.2f}×)"
                for r in document["runs"]
            )
        if document.get("benchmark") == "gpu_limits":
            return "; ".join(
                f"{r['key']} {r['asked']:.3g}: {r['got']:.3g} {'held' if r['held'] else 'NOT held'}"
                for r in document["runs"]
            )
    lines = [line.strip() for line in _COLOUR.sub("", output).splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def blocked(piece: Piece, directory: Path, free_gb: float) -> str:
    """Why a piece cannot run now; empty if it can."""
    for name in piece.needs:
        before = stored(directory, name)
        if before is None or not before["passed"]:
            return f"needs {name}, which has not passed"
    if free_gb < piece.room_gb:
        return f"needs {piece.room_gb:.0f} GB of disk, and {free_gb:.0f} GB are free"
    return ""


def misfit(piece: Piece, directory: Path) -> str:
    """Why a piece is not for this card; empty if it is, or if nothing is known about the card."""
    first = stored(directory, "card")
    targets = first["documents"][-1].get("targets") if first and first["documents"] else None
    if not piece.target or targets is None or piece.target in targets:
        return ""
    return f"engines for this card are built with --target {' or '.join(targets) or 'nothing'}"


def stored(directory: Path, name: str) -> Any:
    """The result of a piece; None if it has none."""
    file = directory / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def card() -> dict[str, Any]:
    """The GPU and the packages; the name says what is missing."""
    from balcony_edge.device.machine import this_device  # noqa: PLC0415 - the report also runs where it is not installed
    from balcony_edge.errors import BalconyError  # noqa: PLC0415 - likewise

    found: dict[str, Any] = {"packages": {}}
    for name in PACKAGES:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        from balcony_runtime.backends.accelerator.cuda import compute_capability  # noqa: PLC0415 - an extra

        found["capability"] = compute_capability()
        found["targets"] = targets(found["capability"], found["packages"])
    except BalconyError as error:
        found["problem"] = str(error)
    gpus = this_device().gpus
    found["name"] = ", ".join(f"{gpu.name}, driver {gpu.driver}" for gpu in gpus) or "no GPU"
    return found


def targets(capability: str, packages: Collection[str] = ()) -> list[str]:
    """The TensorRTs for a card, the first to be taken: TensorRT-RTX if it knows the card; the other if not, or if installed."""
    from balcony_edge.errors import BalconyError  # noqa: PLC0415 - the report also runs where it is not installed
    from balcony_runtime.backends.accelerator.tensorrt_builder import Builder  # noqa: PLC0415 - likewise

    try:
        found = ["rtx"] if capability in Builder("rtx").known_capabilities else []
    except BalconyError:  # not installed
        found = []
    if not found or any(name.startswith("tensorrt") and "rtx" not in name for name in packages):
        found.append("tensorrt")
    return found


def build(bundle: Path) -> None:
    """Build engines in float16 with the TensorRT that supports this GPU."""
    from balcony_edge.cli import main  # noqa: PLC0415 - only this needs it
    from balcony_runtime.backends.accelerator.cuda import compute_capability  # noqa: PLC0415 - an extra

    here = compute_capability()
    (name, *_), known = targets(here), ("--sm", here)
    target = ["--target", name, *(known if name == "rtx" else ())]
    sys.argv = ["balcony-edge", "build", str(bundle), "--precision", "fp16", "--context-length", "2112", *target]
    main()


def write_report(directory: Path, chosen: Sequence[Piece], waiting: dict[str, str]) -> bool:
    """Write the report; whether all pieces that are for this card passed."""
    first = stored(directory, "card")
    about: dict[str, Any] = {"name": "unknown GPU", "packages": {}}
    if first and first["documents"]:
        about = first["documents"][-1]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items()) or "none"
    capability = f", compute capability {about['capability']}" if "capability" in about else ""
    lines = [f"# {about['name']}{capability}", "", f"Packages: {packages}.", ""]
    lines += ["| piece | result | seconds | |", "|---|---|---|---|"]
    passed = True
    for piece in chosen:
        result = stored(directory, piece.name)
        if reason := misfit(piece, directory):
            lines.append(f"| {piece.name} | not for this card | | {reason} |")
            continue
        passed = passed and bool(result and result["passed"])
        if result is None:
            lines.append(f"| {piece.name} | not run | | {waiting.get(piece.name, piece.about)} |")
        else:
            line = result["line"].replace("|", "\\|")
            state = "passed" if result["passed"] else "FAILED"
            lines.append(f"| {piece.name} | {state} | {result['seconds']} | {line} |")
    (directory / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return passed


def main(arguments: Sequence[str] | None = None, made: Callable[[Path], tuple[Piece, ...]] = pieces) -> int:
    """Run what is missing, write the report, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=ROOT / ".cache" / "gpu-report")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--card", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--provider", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.card:
        print(json.dumps(found := card()))
        return complain(found.get("problem", ""))
    if options.torch:
        import torch  # noqa: PLC0415 - only this needs it

        return complain("" if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU")
    if options.provider:
        import onnxruntime  # noqa: PLC0415 - only this needs it

        cure = "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]>=1.25'"
        inside = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        return complain("" if inside else f"this build of ONNX Runtime has no CUDAExecutionProvider: {cure}")
    if options.build is not None:
        build(options.build)
        return 0
    directory, begin, waiting = options.directory.resolve(), time.monotonic(), {}
    directory.mkdir(parents=True, exist_ok=True)
    tried = (directory / "text.txt").is_file()  # by an earlier call
    texts = [file.read_text(encoding="utf-8") for pattern in TEXTS for file in sorted(ROOT.glob(pattern))]
    (directory / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    everything = made(directory)
    wanted = chosen(everything, options.only, parser)
    for piece in everything:
        before = stored(directory, piece.name)
        if piece.name not in wanted:
            continue
        if before is not None and (before["passed"] or not options.again):
            continue
        reason = misfit(piece, directory) or blocked(piece, directory, free_gb(directory))
        if not reason and time.monotonic() - begin + piece.limit_s > 60 * options.minutes:
            reason = "no time left for it: run again"
        if reason:
            waiting[piece.name] = reason
            print(f"{piece.name}: {reason}", flush=True)
            continue
        if piece.makes and tried:
            shutil.rmtree(directory / piece.makes, ignore_errors=True)
        result = run(piece, directory)
        print(f"{piece.name}: {'passed' if result['passed'] else 'FAILED'}: {result['line']}", flush=True)
    passed = write_report(directory, everything, waiting)
    print(directory / "report.md")
    return 0 if passed else 1


def chosen(everything: Sequence[Piece], only: Sequence[str] | None, parser: argparse.ArgumentParser) -> set[str]:
    """Names of the pieces to run: all, or those of ``--only`` and what they need."""
    names = [piece.name for piece in everything]
    if unknown := set(only or ()) - set(names):
        parser.error(f"--only {', '.join(sorted(unknown))}: must be of {', '.join(names)}")
    found = set(only or names)
    for piece in reversed(everything):  # what a piece needs comes before it
        found |= set(piece.needs) if piece.name in found else set()
    return found


def complain(problem: str) -> int:
    """Print a problem as the last line; the exit status."""
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


def free_gb(directory: Path) -> float:
    """Free space on the disk of a directory."""
    return shutil.disk_usage(directory).free / 1e9


if __name__ == "__main__":
    sys.exit(main())
