"""Export the bundles that the tests on Arm read, with their logits on this machine: `make test-arm` runs it on the host.

It is a module for pytest because the fixtures of the suite make the bundles. ``BALCONY_RECORDED`` names the directory. With
the logits go exact ones: PyTorch's for float32, and those without rounded activations for int4 and int8.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_export.export import ExportOptions, Traced, export_bundle, trace
from balcony_export.model.balcony import init_balconies
from balcony_export.model.exits import ExitModel
from balcony_export.quantize.blocks import parse_precision
from balcony_export.verify import at_level_1, reference_logits
from tests.conftest import EXITS, VOCABULARY, tiny_model, tiny_tokenizer
from tests.runtime.arm.reference import PROMPT, Logits, logits_of, tokens_of
from tests.runtime.conftest import ROWS
from tests.support.hybrids import HYBRIDS

#: Architectures of the tests that run on Arm; the first ones also with graphs of accelerators' engine sets.
WITH_ENGINE_SETS = ("llama", "qwen3", "gemma2", "gemma3", "smollm3", "lfm2")
ARCHITECTURES = (*WITH_ENGINE_SETS, "llama-small-heads", *HYBRIDS, "falcon-mamba")
#: Architecture and precision of the schedules in tests/runtime/test_precisions.py.
PRECISIONS = (("qwen3", "int4,level=1"), *(("llama", precision) for precision in ("int4", "int8", "int4,kv=8", "fp16")))
#: Precisions of a model that is wide enough for blocks of 64 to 256: every kind of product that a bundle can ask for. Its 192
#: inputs are no multiple of 128, so blocks of 128 are padded, as those of the demo's model are.
WIDE = (
    "fp32",
    "int4,block=64,down=256,head=4",
    "int4,block=64,down=256,head=4,level=1",
    "int4,block=128,down=256,head=4",
    "int4,block=128,down=256,head=4,level=1",
    "int4,asym",
    "int8,level=1",
    "int8,kv=8",
)


@pytest.fixture(scope="session")
def recorded() -> Path:
    path = Path(os.environ["BALCONY_RECORDED"])
    path.mkdir(parents=True)
    return path


def keep(path: Path, target: Path, exact: Logits) -> None:
    """Copy a bundle, and write its logits next to the copy, with exact ones as far as they are known."""
    shutil.copytree(path, target)
    exact = {f"exact_{name}": rows for name, rows in exact.items()}
    np.savez(target.parent / f"{target.name}.npz", **logits_of(target), **exact)


def keep_rounded(path: Path, target: Path, directory: Path) -> None:
    """Keep a bundle with the logits of its form whose products round no activations."""
    bundle = Bundle.open(path)
    rounded = bundle.manifest.quantization is not None and bundle.manifest.quantization.accuracy_level == 4
    keep(path, target, logits_of(at_level_1(bundle, directory)) if rounded else {})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture(
    recorded: Path, export_tiny: Callable[[str], Any], with_engine_sets: Callable[[str], Bundle], architecture: str
) -> None:
    source = export_tiny(architecture)
    tokens = tokens_of(VOCABULARY)[:PROMPT].tolist()
    logits = {f"prompt_{layer}": rows for layer, rows in reference_logits(source.exits.copy(), tokens).items()}
    keep(source.path, recorded / "float32" / architecture, logits)
    if architecture in WITH_ENGINE_SETS:
        shutil.copytree(with_engine_sets(architecture).path, recorded / "engine-sets" / architecture)


@pytest.mark.parametrize(("architecture", "precision"), PRECISIONS)
def test_precision(
    recorded: Path, with_precision: Callable[[str, str], Path], tmp_path: Path, architecture: str, precision: str
) -> None:
    keep_rounded(with_precision(architecture, precision), recorded / precision / architecture, tmp_path)


@pytest.fixture(scope="module")
def wide() -> tuple[ExitModel, Traced]:
    model = tiny_model("llama", hidden_size=192, intermediate_size=256, head_dim=32, tie_word_embeddings=True)
    exits = ExitModel(model, init_balconies(model, EXITS))
    return exits, trace(exits, ExportOptions("wide", trained=True))


@pytest.mark.parametrize("precision", WIDE)
def test_wide_model(recorded: Path, wide: tuple[ExitModel, Traced], tmp_path: Path, precision: str) -> None:
    exits, traced = wide
    calibration = ROWS if "asym" in precision or "kv=8" in precision else ()
    options = ExportOptions("wide", True, parse_precision(precision), calibration)
    export_bundle(exits.copy(), tiny_tokenizer(), tmp_path / "bundle", options, traced=traced)
    exact = tmp_path / "exact"
    exact.mkdir()
    keep_rounded(tmp_path / "bundle", recorded / precision / "wide", exact)
