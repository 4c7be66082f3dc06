"""The installed ONNX Runtime: the module, or one line that names the problem and the cure; and the first line of its errors.

Owns the oldest version that runs bundles. The packages of :data:`PACKAGES` are builds of one module and overwrite each other,
so an environment may contain two of them, half of one, or the wrong one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from balcony_edge.bundle.manifest import ModelSpec
from balcony_edge.errors import MissingDependencyError

#: The first version with a CPU kernel of opset 24's ``TensorScatter``. Up to 1.29 the last bits of results differ from those of
#: 1.30 and newer, so texts in int4 differ (docs/platforms.md). pyproject.toml has the same number, and tests/test_packaging.py
#: runs that version.
OLDEST = "1.25"
#: Later versions that some bundles need, the newest first, by what they use: the model, and the bits of the caches of a
#: quantized bundle (None: it is not quantized). Tried with each release.
_LATER: tuple[tuple[str, str, Callable[[ModelSpec, int | None], object]], ...] = (
    ("1.31", "quantized experts", lambda model, kv_bits: model.mixture and kv_bits is not None),
    ("1.27", "int8 caches", lambda model, kv_bits: kv_bits == 8),
    ("1.25.1", "recurrent layers", lambda model, kv_bits: model.recurrent),
)
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-webgpu")
#: Builds of other vendors, which other programs bring; none was tried.
_OTHERS = tuple(f"onnxruntime-{name}" for name in ("directml", "openvino", "rocm", "migraphx", "cann", "windowsml"))
_INSTALL = "pip install 'balcony-edge[cpu]' (or '[gpu]', never both)"


def installed_packages() -> dict[str, str]:
    """Package → version of each build of ONNX Runtime in the first directory of the import path that has one."""
    builds = [(name, dist) for name in (*PACKAGES, *_OTHERS) for dist in importlib.metadata.distributions(name=name)]
    places = [str(dist.locate_file("")) for _, dist in builds]
    first = next((place for entry in sys.path if (place := str(Path(entry))) in places), None)
    return {name: dist.version for (name, dist), place in zip(builds, places, strict=True) if first in (place, None)}


def checked_onnxruntime() -> Any:
    """The module, if it can run bundles.

    Raises:
        MissingDependencyError: the module is not installed, damaged, installed twice, or too old.
    """
    found = installed_packages()
    if len(found) > 1:
        raise MissingDependencyError(
            f"{' and '.join(found)} are both installed and overwrite each other: {_again(*found)}"
        )
    # From 1.29 on its wheels tell Microsoft about the machine: by default, from the import on, and with an identifier and a
    # database in the user's cache. Their function for it stops a part; who sets the variable, to 0 as well, has decided.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        if not found:
            raise MissingDependencyError(f"ONNX Runtime is not installed: {_INSTALL}") from error
        raise MissingDependencyError(f"ONNX Runtime is damaged ({error}): {_again()}") from error
    missing = [name for name in ("__version__", "InferenceSession", "RunOptions") if not hasattr(module, name)]
    if missing:  # Python imports the directory that an uninstallation left as an empty package
        raise MissingDependencyError(f"ONNX Runtime is damaged (it has no {missing[0]}): {_again()}")
    _refuse_older(module, OLDEST, "bundles")
    return module


def refuse_too_old(model: ModelSpec, kv_bits: int | None) -> None:
    """Refuse an ONNX Runtime without the operators of a bundle's graphs.

    Args:
        model: model of the bundle.
        kv_bits: bits of the caches of a quantized bundle; None for a float one.

    Raises:
        MissingDependencyError: it is too old for the bundle.
    """
    for version, what, needs in _LATER:
        if needs(model, kv_bits):
            _refuse_older(importlib.import_module("onnxruntime"), version, f"bundles with {what}")
            return


def _refuse_older(module: Any, version: str, what: str) -> None:
    if _numbers(module.__version__) < _numbers(version):
        package = next(iter(installed_packages()), PACKAGES[0])
        cure = f"pip install --upgrade '{package}>={version}'" if package in PACKAGES else _again(package)
        raise MissingDependencyError(
            f"{package} {module.__version__} is too old: {what} need {version} or newer: {cure}"
        )


def _again(*packages: str) -> str:
    return f"pip uninstall {' '.join(dict.fromkeys((*PACKAGES, *packages)))}, then {_INSTALL}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def first_line(error: BaseException) -> str:
    """The first line of an error's text without the place in ONNX Runtime's source, at most 200 characters."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # The provider for CUDA names its place twice, in 500 characters of C++, before the reason.
    line = re.sub(r"\S*cuda_call\.cc:\d+ .*(?=\b\w+ failure \d)", "", line)
    return line.rpartition(" was false. ")[2][:200]
