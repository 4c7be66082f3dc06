"""The device side needs neither torch nor transformers nor onnx: it runs in a process where they cannot be imported."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_edge.errors import MissingDependencyError
from balcony_runtime.backends.installed import refuse_too_old
from tests.support.command import printed

_PROGRAM = """
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "matplotlib", "balcony_export"):
    sys.modules[name] = None  # any import of it raises
import pkgutil, importlib
import balcony_edge, balcony_runtime
for package in (balcony_edge, balcony_runtime):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
with balcony_edge.load(sys.argv[1], budget=balcony_edge.Budget(exit_layer=2)) as llm:
    print(len(llm.generate("the fox", max_new_tokens=4, ignore_eos=True).tokens))
"""
_LOAD = """
import sys, balcony_edge
try:
    balcony_edge.load(sys.argv[1])
except balcony_edge.BalconyError as error:
    print(error)
"""


def test_the_device_side_runs_without_the_workstations_packages(tiny: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM, str(tiny.path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_importing_the_package_loads_no_engine() -> None:
    """Importing the package does not import pydantic either, which takes 0.1 s; names are loaded on first use."""
    heavy = "{'onnxruntime', 'numpy', 'torch', 'pydantic', 'balcony_edge.budget'}"
    assert printed(f"import sys, balcony_edge; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


def test_the_engine_keeps_and_sends_nothing_about_the_machine(tiny: Any, tmp_path: Path) -> None:
    """ONNX Runtime's wheels would, except where they see a test or a CI service."""
    plain = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    command = [sys.executable, "-c", _LOAD, str(tiny.path)]
    subprocess.run(command, check=True, env=plain | {"HOME": str(tmp_path)})
    assert list(tmp_path.rglob(".onnxruntime")) == []


def test_a_missing_engine_names_its_cure(tiny: Any) -> None:
    said = printed(f"import sys; sys.modules['onnxruntime'] = None\n{_LOAD}", tiny.path)
    assert "pip install 'balcony-edge[cpu]'" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("__version__ = '1.24.4'; InferenceSession = RunOptions = None",
         "onnxruntime 1.24.4 is too old: bundles need 1.25 or newer: pip install --upgrade 'onnxruntime>=1.25'"),
        ("raise ImportError('libonnxruntime.so: no such file')",
         "ONNX Runtime is damaged (libonnxruntime.so: no such file): pip uninstall onnxruntime onnxruntime-gpu "
         "onnxruntime-webgpu, then "
         "pip install 'balcony-edge[cpu]' (or '[gpu]', never both)"),
        ("# what an uninstallation left",
         "ONNX Runtime is damaged (it has no __version__): pip uninstall onnxruntime onnxruntime-gpu onnxruntime-webgpu, then "
         "pip install 'balcony-edge[cpu]' (or '[gpu]', never both)"),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_run_bundles_names_its_cure(
    tiny: Any, tmp_path: Path, package: str, message: str
) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(package)
    assert printed(_LOAD, tiny.path, PYTHONPATH=str(tmp_path)) == f"{message}\n"
    doctor = "from balcony_edge.cli import main; main()"
    report = json.loads(printed(doctor, "doctor", "--json", PYTHONPATH=str(tmp_path)))
    assert report["engines"][0]["note"] == message


@pytest.mark.parametrize("other", ["onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"])
def test_two_engines_that_overwrite_each_other_are_refused(tiny: Any, tmp_path: Any, other: str) -> None:
    """Of another program's build, an upgrade of ours is no cure: pip says that it is there already."""
    for package in ("onnxruntime", other):
        facts = tmp_path / f"{package.replace('-', '_')}-1.32.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Name: {package}\nVersion: 1.32.0\n")
    program = f"import sys; sys.path.insert(0, sys.argv[2])\n{_LOAD}"
    said = printed(program, tiny.path, tmp_path)
    assert f"onnxruntime and {other} are both installed and overwrite each other: pip uninstall onnxruntime" in said
    assert other in said.partition("pip uninstall")[2]
    assert said.count("\n") == 1
    # A build in another directory overwrites nothing: the first directory of the import path decides.
    shutil.rmtree(tmp_path / "onnxruntime-1.32.0.dist-info")
    assert printed(program, tiny.path, tmp_path) == ""


def test_public_names_are_these() -> None:
    import balcony_edge

    errors = {
        *(
            "BalconyError",
            "BudgetError",
            "BundleError",
            "BusyError",
            "CheckpointError",
            "ContextLengthError",
            "DeviceError",
        ),
        *(
            "EngineBuildError",
            "InfeasibleError",
            "InputError",
            "MissingDependencyError",
            "ProfileError",
            "TrainingError",
        ),
        *("UnsupportedModelError", "VerificationError"),
    }
    others = {
        *("Budget", "Bundle", "CallReader", "Chat", "CostModel", "DeviceProfile", "Engine", "LLM", "Reply"),
        *("RoundTraceWriter", "SamplingParams", "Sensors", "Together", "Token", "TokenSequence", "TokenStream"),
        *("TraceWriter", "Verdict", "device_sources", "load", "load_budget"),
    }
    assert set(balcony_edge.__all__) == errors | others
    assert set(balcony_edge.__all__) <= set(dir(balcony_edge))
    for name in errors:
        assert issubclass(getattr(balcony_edge, name), balcony_edge.BalconyError)
    for name in others:
        text = inspect.cleandoc(getattr(balcony_edge, name).__doc__)
        example = re.search(r"\nExample:\n((?:    .+\n?)+)", text)
        assert example and compile(textwrap.dedent(example[1]), name, "exec").co_names, name
    with pytest.raises(AttributeError):
        balcony_edge.nonsense  # noqa: B018


def test_a_missing_web_framework_names_its_cure() -> None:
    program = (
        "import sys; sys.modules['starlette'] = None\n"
        "from balcony_edge.errors import MissingDependencyError\n"
        "try:\n    import balcony_runtime.serve.http.server\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    assert printed(program) == "starlette is not installed: pip install 'balcony-edge[serve]' for the server\n"


def test_the_server_says_that_it_does_not_run_on_windows() -> None:
    program = (
        "import sys\nfrom balcony_edge.errors import InputError\nimport balcony_runtime\nsys.platform = 'win32'\n"
        "try:\n    import balcony_runtime.serve\n"
        "except InputError as error:\n    print(error)\n"
    )
    assert printed(program) == "serve: does not run on Windows: run it under WSL, or use the Python API\n"


def test_a_mac_is_not_sent_for_packages_that_do_not_exist_for_it() -> None:
    """Of `[tensorrt]` nothing is installed there, and `[gpu]` cannot be."""
    program = (
        "import sys\nfrom balcony_edge.errors import MissingDependencyError\n"
        "import balcony_runtime.backends.accelerator.device\nsys.platform, sys.modules['cuda'] = 'darwin', None\n"
        "try:\n    import balcony_runtime.backends.accelerator.cuda\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    assert printed(program) == "macOS has no CUDA: run with --device cpu\n"


@pytest.mark.parametrize(
    ("installed", "changes", "words"),
    [
        ("1.25.0", {}, None),
        ("1.25.0", {"recurrent": True}, "bundles with recurrent layers need 1.25.1 or newer"),
        ("1.25.1", {"recurrent": True}, None),
        ("1.26.0", {"kv_bits": 8}, "bundles with int8 caches need 1.27 or newer"),
        ("1.27.1", {"kv_bits": 8}, None),
        ("1.30.2", {"mixture": object(), "kv_bits": 8}, "bundles with quantized experts need 1.31 or newer"),
        ("1.31.0", {"mixture": object(), "kv_bits": 8}, None),
        ("1.25.0", {"mixture": object(), "kv_bits": None}, None),
    ],
)
def test_some_bundles_need_a_newer_engine(
    installed: str, changes: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = changes.pop("kv_bits", None)
    model: Any = SimpleNamespace(**{"recurrent": False, "mixture": None} | changes)
    monkeypatch.setattr("onnxruntime.__version__", installed)
    if words is None:
        refuse_too_old(model, bits)
    else:
        with pytest.raises(MissingDependencyError, match=f"onnxruntime {installed} is too old: {words}"):
            refuse_too_old(model, bits)
