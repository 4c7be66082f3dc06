"""Fixtures and hooks that need no model library: tests/conftest.py takes them, and so does a machine without torch.

``tiny`` comes from there: exported in this process (tests/conftest.py), or earlier on another machine
(tests/runtime/arm/recorded.py).
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import settings

import balcony_edge
from balcony_edge.errors import BalconyError
from balcony_runtime.backends.onnxruntime.backend import open_session
from balcony_runtime.backends.webgpu.provider import find_provider
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM

# `make test` runs the same few examples every time; `make test-deep` runs many new ones (--hypothesis-profile=explore),
# `make test-arm` half of them (--hypothesis-profile=emulated)
settings.register_profile("test", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=2000)
settings.register_profile("emulated", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("test")


@pytest.fixture
def interruptible() -> Iterator[Callable[..., subprocess.Popen[Any]]]:
    """``Popen`` for processes that get a Ctrl-C; whatever a test leaves running is killed.

    They run without coverage: its tracer holds a lock now and then, and an interrupt raised there leaves every thread
    of the process waiting for it for ever.
    """
    started: list[subprocess.Popen[Any]] = []

    def start(command: list[str], *, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        untraced = {name: value for name, value in (env or os.environ).items() if "COVERAGE" not in name}
        # a test run in the background ignores SIGINT, and its children would inherit that
        process: subprocess.Popen[Any] = subprocess.Popen(
            command, env=untraced, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def pytest_configure(config: pytest.Config) -> None:
    """Let no variable of the machine change a result.

    An NVIDIA GPU is hidden from all runs but those of the tests for one: what the others compare is computed on CPUs.
    """
    if config.option.markexpr != "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    for name in ("FORCE_COLOR", "PY_COLORS", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "GITHUB_ACTIONS"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that make or run a model."""
    for item in items:
        if {"export_tiny", "make_tiny"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("model")


def pytest_collection_finish() -> None:
    """Take what the imports made out of the collector's sight: looking through it again and again costs a fifth of a run."""
    gc.collect()
    gc.freeze()


def find_gpu() -> None:
    """Raise if there is no NVIDIA GPU, or no package to ask for one."""
    from balcony_runtime.backends.accelerator.cuda import compute_capability

    compute_capability()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` or ``webgpu`` run where there is one."""
    for marker, find in (("gpu", find_gpu), ("webgpu", find_provider)):
        if item.get_closest_marker(marker) is not None:
            try:
                find()
            except BalconyError as error:
                pytest.skip(f"`make test-{marker}` runs it: {error}")


@pytest.fixture(scope="session", autouse=True)
def one_engine_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make ONNX Runtime's pool with one thread: two spend half of their time waiting for each other on tiny matrices.

    Programs that tests start take the default, a thread for each core.
    """
    path = tmp_path_factory.mktemp("pool") / "identity.onnx"
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "identity", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    open_session(path, threads=1)


@pytest.fixture
def bundle_copy(tiny: Any, tmp_path: Path) -> Path:
    """A copy of the tiny Llama's bundle that a test may damage."""
    return Path(shutil.copytree(tiny.path, tmp_path / "bundle"))


@pytest.fixture
def llm(tiny: Any) -> Iterator[LLM]:
    """The tiny bundle, loaded for one test."""
    with balcony_edge.load(tiny.path) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tiny_llm(tiny: Any) -> Iterator[LLM]:
    """The tiny bundle, loaded for the tests of a file that change nothing of it."""
    with balcony_edge.load(tiny.path) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tiny_engine(tiny: Any) -> Iterator[Engine]:
    """An engine over the tiny Llama's bundle."""
    with Engine.open(tiny.path) as engine:
        yield engine


@pytest.fixture
def sysfs_tree(tmp_path: Path) -> Callable[[str], Path]:
    """Builds the sysfs tree that ``tests/sysfs/<device>.txt`` lists: ``path = value`` or ``path -> where a link leads``."""

    def build(device: str) -> Path:
        root = tmp_path / device
        text = Path(__file__).with_name("sysfs").joinpath(f"{device}.txt").read_text(encoding="utf-8")
        for line in text.splitlines():
            if not line.startswith("#"):
                name, arrow, target = line.partition(" -> ")
                name, _, value = (name, "", "") if arrow else line.partition(" = ")
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if arrow:
                    path.symlink_to(target)
                else:
                    path.write_text(f"{value}\n", encoding="utf-8")
        return root

    return build


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)
