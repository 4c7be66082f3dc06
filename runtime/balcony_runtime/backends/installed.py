"""ONNX Runtime as it is installed here: the module, or one line that says what is wrong with it and how to put it right.

Owns the oldest version that runs bundles. The packages `onnxruntime` and `onnxruntime-gpu` are one module of two builds that
overwrite each other, so an environment may hold both, half of one, or the wrong one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any

from balcony_edge.errors import MissingDependencyError

#: The first version with a CPU kernel of opset 24's ``TensorScatter``. Up to 1.29 the last bits differ from those of 1.30 and
#: newer, and in int4 therefore texts do (docs/platforms.md). pyproject.toml says the same, tests/test_packaging.py runs it.
OLDEST = "1.25"
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_INSTALL = "pip install 'balcony-edge[cpu]' (or '[gpu]', never both)"


def installed_packages() -> dict[str, str]:
    """Package → version, of ONNX Runtime's builds that are installed."""
    return {name: dist.version for name in PACKAGES for dist in importlib.metadata.distributions(name=name)}


def checked_onnxruntime() -> Any:
    """The module, fit to run bundles.

    Raises:
        MissingDependencyError: it is not installed, damaged, installed twice, or too old.
    """
    found = installed_packages()
    if len(found) > 1:
        raise MissingDependencyError(
            f"onnxruntime and onnxruntime-gpu are both installed and overwrite each other: {_again()}"
        )
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        if not found:
            raise MissingDependencyError(f"ONNX Runtime is not installed: {_INSTALL}") from error
        raise MissingDependencyError(f"ONNX Runtime is damaged ({error}): {_again()}") from error
    missing = [name for name in ("__version__", "InferenceSession", "RunOptions") if not hasattr(module, name)]
    if missing:  # a directory that an uninstallation left is an empty package to Python
        raise MissingDependencyError(f"ONNX Runtime is damaged (it has no {missing[0]}): {_again()}")
    if _numbers(module.__version__) < _numbers(OLDEST):
        package = next(iter(found), PACKAGES[0])
        raise MissingDependencyError(
            f"{package} {module.__version__} is too old: bundles need {OLDEST} or newer: "
            f"pip install --upgrade '{package}>={OLDEST}'"
        )
    return module


def _again() -> str:
    return f"pip uninstall {' '.join(PACKAGES)}, then {_INSTALL}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
