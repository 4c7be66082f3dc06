"""Type of a run's passes: the faster one of this machine, and on a resume that of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from typer.testing import CliRunner

from balcony_edge.cli import app
from balcony_export.train import precision as module
from balcony_export.train.config import TrainConfig
from balcony_export.train.muon import Muon, orthogonal
from balcony_export.train.parallel import Processes
from balcony_export.train.precision import DTYPES, PassPrecision, native_precision
from balcony_export.train.run_files import read_state


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """The choice is made once in a process."""
    native_precision.cache_clear()
    yield
    native_precision.cache_clear()


@pytest.mark.parametrize(
    ("bf16_s", "fp32_s", "faster"),
    [(0.9, 0.002, "fp32"), (0.006, 0.002, "fp32"), (0.001, 0.002, "bf16")],
    ids=["AVX2", "AVX-512", "AVX-512 BF16"],
)
def test_passes_have_the_type_in_which_the_cpu_is_faster(
    bf16_s: float, fp32_s: float, faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(module, "_product_s", {"bf16": bf16_s, "fp32": fp32_s}.__getitem__)
    assert TrainConfig(exits=(2,)).precision == native_precision() == faster


@pytest.mark.parametrize(("has", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_says_whether_it_multiplies_in_bfloat16(
    has: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool) -> bool:
        return has or including_emulation

    monkeypatch.setattr(module, "has_gpu", lambda: True)
    monkeypatch.setattr(module, "_product_s", lambda _: pytest.fail("it is not about the CPU"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert native_precision() == precision


def test_a_product_is_timed_in_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[torch.dtype] = []
    clock = iter([0.0, 9.0, 20.0, 22.0, 30.0, 33.0, 40.0, 45.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda one, _: products.append(one.dtype), raising=True)
    assert module._product_s("bf16") == 2.0, "the first product sets up, and others may be disturbed"
    assert products == [torch.bfloat16] * 4


def _steps(precision: PassPrecision) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A matrix after steps with momentum, decay and another rate, and the gradients."""
    given = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(24, 16, generator=given))
    gradients = [torch.randn(24, 16, generator=given) for _ in range(3)]
    optimizer = Muon([matrix], 0.02, 0.1, DTYPES[precision])
    for rate, gradient in zip((0.02, 0.02, 0.01), gradients, strict=True):
        matrix.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return matrix.detach(), gradients


def test_steps_of_muon_follow_the_orthogonal_momentum() -> None:
    """With the singular value decomposition instead of its approximation, whose singular values are 0.87 to 1.13."""
    given = torch.Generator().manual_seed(0)
    start = torch.randn(24, 16, generator=given)
    wanted, momentum = start.clone(), torch.zeros(24, 16)
    made, gradients = _steps("fp32")
    for rate, gradient in zip((0.02, 0.02, 0.01), gradients, strict=True):
        momentum = 0.95 * momentum + 0.05 * gradient
        left, _, right = torch.linalg.svd(0.05 * gradient + 0.95 * momentum, full_matrices=False)
        wanted = wanted * (1 - rate * 0.1) - rate * 0.2 * 24**0.5 * (left @ right)
    assert float((made - wanted).norm() / (wanted - start).norm()) < 0.12


def test_products_of_muon_have_the_type_of_the_passes() -> None:
    made, _ = _steps("fp32")
    rounded, _ = _steps("bf16")
    assert 1e-4 < float((made - rounded).norm()) < 0.02


def test_each_process_orthogonalizes_its_part_of_the_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[torch.Tensor]] = []
    monkeypatch.setattr(Processes, "sum", lambda _, directions: found.append([one.clone() for one in directions]))
    for index, count in ((0, 1), (0, 2), (1, 2)):
        given = torch.Generator().manual_seed(0)
        matrices = [nn.Parameter(torch.randn(8, 6, generator=given)) for _ in range(3)]
        muon = Muon(matrices, 0.02, 0.0, torch.float32)
        muon.processes.index, muon.processes.count = index, count
        for matrix in matrices:
            matrix.grad = torch.randn(8, 6, generator=given)
        muon.step()
    for number, (alone, *parts) in enumerate(zip(*found, strict=True)):
        assert torch.equal(alone, parts[number % 2]) and alone.any() and not parts[1 - number % 2].any()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (192, 576)])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_singular_values_are_brought_near_one(shape: tuple[int, int], precision: PassPrecision) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert values.max() / values.min() > 2
    made = left.T @ orthogonal(matrix.to(DTYPES[precision])).float() @ right.T
    assert ((made.diagonal() > 0.86) & (made.diagonal() < 1.14)).all()
    assert (made - made.diagonal().diag()).abs().max() < (1e-5 if precision == "fp32" else 0.05)


def test_all_processes_take_the_type_that_the_first_has_measured(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each does a part of Muon, and several machines, or processes that disturb one another, measure differently."""
    for place in ("precision", "parallel"):
        monkeypatch.setattr(f"balcony_export.train.{place}.has_gpu", lambda: False)
    several = Processes()
    assert several.agreed("fp32") == "fp32"
    several.count = 2
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda found: found.__setitem__(0, "bf16"))
    assert several.agreed("fp32") == "bf16"
    monkeypatch.setattr(module, "_product_s", {"bf16": 2.0, "fp32": 1.0}.__getitem__)
    monkeypatch.setattr(Processes, "agreed", lambda _, found: {"fp32": "bf16"}[found])
    command = ["train", str(tiny_checkpoint), "--exits", "2", "--data", str(text_file), "-o", str(tmp_path / "out")]
    command += ["--seq-len", "24", "--held-out-rows", "4", "--steps", "1", "--json", "--no-compile"]
    CliRunner().invoke(app, command, catch_exceptions=False)
    state: Any = read_state(tmp_path / "out" / "run" / "2")
    assert state["recipe"]["precision"] == "bf16"


def test_a_resumed_run_keeps_the_type_of_its_checkpoint(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come from another machine."""
    command = ["train", str(tiny_checkpoint), "--exits", "2", "--data", str(text_file), "-o", str(tmp_path / "out")]
    command += ["--seq-len", "24", "--held-out-rows", "4", "--json", "--no-compile"]

    def trained(*options: str) -> Any:
        done = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
        return json.loads(done.stdout)["steps"], read_state(tmp_path / "out" / "run" / "2"), done.stderr

    for place in ("precision", "parallel"):
        monkeypatch.setattr(f"balcony_export.train.{place}.has_gpu", lambda: False)
    monkeypatch.setattr(module, "_product_s", {"bf16": 1.0, "fp32": 2.0}.__getitem__)
    steps, state, told = trained("--steps", "2")
    assert (steps, state["recipe"]["precision"]) == (2, "bf16") and "slower" not in told
    native_precision.cache_clear()
    monkeypatch.setattr(module, "_product_s", {"bf16": 2.0, "fp32": 1.0}.__getitem__)
    steps, state, told = trained("--steps", "3", "--resume")
    assert (steps, state["recipe"]["precision"]) == (3, "bf16")
    assert "passes in bf16 are slower here than in fp32: a new run takes fp32 by default" in told
