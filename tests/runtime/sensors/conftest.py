"""The NVML stand-in, compiled once per session with the path of the driver's library."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles the stand-in; returns the directory of its ``libnvidia-ml.so.1``, for ``LD_LIBRARY_PATH``."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the NVML stand-in is C: no compiler named cc here")

    def build(*definitions: str) -> Path:
        directory = tmp_path_factory.mktemp("nvml")
        source = Path(__file__).with_name("nvml_stand_in.c")
        flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *(f"-D{name}" for name in definitions)]
        subprocess.run([compiler, *flags, "-o", directory / "libnvidia-ml.so.1", source], check=True)
        return directory

    return build
