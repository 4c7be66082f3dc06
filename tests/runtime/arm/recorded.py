"""A plugin in place of tests/conftest.py for a machine without torch: bundles that ``record.py`` made on another one.

BALCONY_RECORDED=DIRECTORY pytest --noconftest -p tests.fixtures -p tests.runtime.arm.recorded TESTS
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from balcony_edge.bundle.bundle import Bundle


@dataclass(frozen=True)
class Recorded:
    """A bundle; what it was made from stayed where it was made."""

    path: Path


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A copy of a bundle, by its kind (``float32``, ``engine-sets`` or a precision) and the name of its architecture."""
    made: dict[tuple[str, str], Path] = {}

    def copied(kind: str, architecture: str) -> Path:
        if (kind, architecture) not in made:
            source = Path(os.environ["BALCONY_RECORDED"]) / kind / architecture
            made[kind, architecture] = shutil.copytree(source, tmp_path_factory.mktemp("recorded") / architecture)
        return made[kind, architecture]

    return copied


@pytest.fixture(scope="session")
def export_tiny(recorded: Callable[[str, str], Path]) -> Callable[[str], Recorded]:
    """The bundle of a tiny model by the name of its architecture."""
    return lambda architecture: Recorded(recorded("float32", architecture))


@pytest.fixture(scope="session")
def tiny(export_tiny: Callable[[str], Recorded]) -> Recorded:
    """The tiny Llama's bundle; read only."""
    return export_tiny("llama")


@pytest.fixture(scope="session")
def with_engine_sets(recorded: Callable[[str, str], Path]) -> Callable[[str], Bundle]:
    """A tiny model's bundle with graphs for TensorRT in both sets of operators, by the name of its architecture."""
    return lambda architecture: Bundle.open(recorded("engine-sets", architecture))


@pytest.fixture(scope="session")
def with_precision(recorded: Callable[[str, str], Path]) -> Callable[[str, str], Path]:
    """A tiny model's bundle in a precision, by the name of its architecture and the words of ``--precision``."""
    return lambda architecture, precision: recorded(precision, architecture)
