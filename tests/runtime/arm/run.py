"""`make test-arm`: the wheel of this source tree and the switching suite on aarch64, in qemu's emulation of user programs.

    python -m tests.runtime.arm.run DIRECTORY

DIRECTORY has what ``prepare.py`` and ``record.py`` made. The numbers are compared on several processors, because ONNX Runtime
chooses its kernels by their instructions; the suite runs on one of them. A report is written to ``DIRECTORY/report.txt``.

The suite plays every architecture on every backend that needs no GPU, but only half of the random examples of `make test`
(the profile ``emulated`` of tests/fixtures.py). A schedule takes about two seconds in the emulation, so all of them take a
quarter of an hour. A quarter of them would be two for each recurrent architecture, and hypothesis tries the shortest first.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.runtime.arm.prepare import ROOT, build_wheel, install, require_tools, site_packages

#: Processor as qemu names it → instructions that kernels depend on.
PROCESSORS = {
    "cortex-a53": "neither dot products nor float16",
    "cortex-a76": "dot products and float16",
    "neoverse-v1": "i8mm, bf16 and SVE of 256 bits",
    "max": "i8mm, bf16, SVE2 of 512 bits and SME",
}
#: Processor of the suite: that of a Raspberry Pi 5.
MAIN = "cortex-a76"
#: Tests of the device side that make exact switching, and run without what only a workstation has.
SUITE = (
    "backends/test_conformance.py",
    "backends/test_recurrent.py",
    "backends/test_recurrent_states.py",
    "test_precisions.py",
    "scheduling/test_pool.py",
    "test_engine.py",
    "test_packed.py",
    "backends/test_onnxruntime_state.py",
    "decoding/test_token_sequence.py",
    "scheduling/test_scheduler.py",
    "scheduling/test_admission.py",
    "test_sessions.py",
)
#: Largest page of an Arm kernel, in bytes.
LARGEST_PAGE = 1 << 16
#: Stand-ins need a C compiler, and so does the first test, which uses one. The second calls the export; the third reads
#: resident pages from /proc/self/pagemap, whose entries are those of qemu's own address space.
LEFT_OUT = " and ".join(
    f"not {name}"
    for name in (
        "stand-in",
        "test_a_likeliest_token_that_is_none_means_nan",
        "test_devices_without_the_operators_are_refused_by_name",
        "test_memory_is_taken_as_rows_come_and_reported_as_it_is",
    )
)


class Machine:
    """The emulated machine, and the report of what ran on it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.passed = directory, True
        self.python = directory / "venv" / "bin" / "python3"
        self.work = directory / "work"
        self._report = (directory / "report.txt").open("w", encoding="utf-8")

    def note(self, text: str) -> None:
        """Write a line to the report only."""
        print(text, file=self._report, flush=True)

    def say(self, text: str) -> None:
        """Write a line to the report and to stdout."""
        print(text, flush=True)  # noqa: T201 - a program for people
        self.note(text)

    def run(
        self, title: str, *arguments: str | Path, cpu: str = MAIN, accepts: Callable[[int, str], bool] | None = None
    ) -> str:
        """Run the emulated Python outside the source tree, and report whether it did what was expected.

        Args:
            title: what runs, for the report.
            arguments: arguments of ``python3``.
            cpu: processor to emulate.
            accepts: whether an exit code and an output are right; by default the exit code must be 0.

        Returns:
            The output, stderr included.
        """
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE"))}
        environment = {
            **clean,
            "QEMU_CPU": cpu,
            "BALCONY_RECORDED": str(self.directory / "recorded"),
            "PYTHONPATH": str(self.directory / "testing") if "pytest" in arguments else "",
        }
        begin = time.monotonic()
        command = ["nice", str(self.python), *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=self.work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        right = accepts(done.returncode, done.stdout) if accepts else done.returncode == 0
        self.passed = self.passed and right
        self.say(f"{'passed' if right else 'FAILED'}  {time.monotonic() - begin:5.0f} s  {cpu:12}  {title}")
        if not right:
            self.say(done.stdout)
        return done.stdout


_IMPORTS = """
import importlib, pkgutil, platform, sys
import balcony_edge, balcony_runtime, numpy, onnxruntime
assert "site-packages" in balcony_edge.__file__ and platform.machine() == "aarch64"
count = 0
for package in (balcony_edge, balcony_runtime):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
            count += 1
        except balcony_edge.MissingDependencyError as error:
            assert module.name.endswith((".cuda", ".tensorrt")), error
print(f"Python {platform.python_version()}, ONNX Runtime {onnxruntime.__version__}, NumPy {numpy.__version__}: {count} modules")
"""


def least_alignment(library: Path) -> int:
    """Smallest alignment of the parts of a 64-bit ELF file that are mapped: it loads where pages are at most as large."""
    content = library.read_bytes()
    (headers,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    parts = [headers + size * index for index in range(count)]
    aligned = [
        (struct.unpack_from("<I", content, at)[0], struct.unpack_from("<Q", content, at + 48)[0]) for at in parts
    ]
    return min(alignment for kind, alignment in aligned if kind == 1)  # PT_LOAD


def pages(machine: Machine) -> None:
    """Kernels with pages of 16 kB (Raspberry Pi 5, Asahi) and 64 kB exist; qemu's user mode has the host's pages only."""
    libraries = {path: least_alignment(path) for path in site_packages(machine.directory).rglob("*.so*")}
    small = [path.name for path, alignment in libraries.items() if alignment < LARGEST_PAGE]
    machine.passed = machine.passed and bool(libraries) and not small
    machine.say(
        f"{'FAILED' if small else 'passed'}  {len(libraries)} libraries load where pages are 64 kB {' '.join(small)}"
    )


def command_line(machine: Machine, bundle: Path) -> None:
    """Every verb that a device has for a bundle, and one that needs a workstation."""
    module = ("-W", "error", "-m", "balcony_edge")
    doctor = machine.run(
        "balcony-edge doctor", *module, "doctor", "--json", accepts=lambda code, out: code == 0 and '"aarch64"' in out
    )
    machine.say(f"          {json.loads(doctor)['device']}")
    machine.run(
        "balcony-edge inspect", *module, "inspect", bundle, accepts=lambda code, out: code == 0 and "llama" in out
    )
    machine.run("balcony-edge run", *module, "run", bundle, "the fox", "-n", "8", "--tpot-ms", "900")
    machine.run("balcony-edge profile", *module, "profile", bundle, "--quick", "-o", "profile.json")
    cure = "pip install 'balcony-edge[export]'"
    machine.run(
        "balcony-edge verify names its cure", *module, "verify", bundle, "--against", "demo",
        accepts=lambda code, out: code == 1 and cure in out and out.count("\n") == 1,
    )  # fmt: skip


def numbers(machine: Machine) -> None:
    """Logits of every precision on every processor, and packed weights of each processor in one directory."""
    packed = machine.directory / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    bundles = len(list((machine.directory / "recorded").glob("*/*.npz")))
    for index, (cpu, instructions) in enumerate(PROCESSORS.items(), 1):
        out = machine.run(
            f"logits: {instructions}",
            "-m",
            "tests.runtime.arm.numbers",
            machine.directory / "recorded",
            packed,
            cpu=cpu,
        )
        for line in out.splitlines():
            if line.startswith("{"):
                machine.note(f"          {line}")
        made = sum(path.is_dir() for path in packed.iterdir())
        if made != index * bundles:
            machine.passed = False
            machine.say(
                f"FAILED  {made} directories of packed weights: {index} processors x {bundles} bundles expected"
            )


def main() -> int:
    require_tools()
    directory = Path(sys.argv[1]).resolve()
    begin = time.monotonic()
    machine = Machine(directory)
    install(site_packages(directory), "--no-deps", build_wheel(directory))
    shutil.rmtree(machine.work, ignore_errors=True)
    for part in ("tests", "docs"):  # tests compare pages with the code
        shutil.copytree(ROOT / part, machine.work / part, ignore=shutil.ignore_patterns("__pycache__", "pictures"))
    shutil.copy(ROOT / "pyproject.toml", machine.work)
    version = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True).stdout
    machine.say(f"{version.splitlines()[0]} on {platform.machine()}, Linux {platform.release()}")
    machine.say(
        f"          {machine.run('every module of the device side imports', '-W', 'error', '-c', _IMPORTS).strip()}"
    )
    pages(machine)
    command_line(machine, directory / "recorded" / "float32" / "llama")
    numbers(machine)
    pytest = ["-m", "pytest", "-q", "--noconftest", "-p", "tests.fixtures", "-p", "tests.runtime.arm.recorded"]
    pytest += ["-p", "no:cacheprovider", "--hypothesis-profile=emulated", "--timeout", "1800"]
    pytest += ["-k", LEFT_OUT, "-m", "not deep and not gpu and not webgpu"]
    for name in SUITE:
        out = machine.run(name, *pytest, f"tests/runtime/{name}")
        machine.say(f"          {out.strip().splitlines()[-1]}")
    machine.say(f"{'passed' if machine.passed else 'FAILED'} in {(time.monotonic() - begin) / 60:.0f} minutes")
    return 0 if machine.passed else 1


if __name__ == "__main__":
    sys.exit(main())
