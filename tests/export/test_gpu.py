"""Which GPUs PyTorch's work goes to, as far as a machine without one can test it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from balcony_export.model.gpu import has_gpu, move_to_gpu

BUILT = ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built", "has"),
    [
        ((6, 1), BUILT, False),  # a GTX 1080, whose driver runs CUDA 13: "no kernel image is available"
        ((7, 0), BUILT, False),
        ((7, 5), BUILT, True),
        ((12, 1), BUILT, True),
        ((9, 0), ["gfx90a"], True),  # AMD's names
    ],
)
def test_a_gpu_that_pytorch_was_not_built_for_is_not_used(
    capability: tuple[int, int], built: list[str], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert has_gpu() is has


def test_a_model_that_a_gpu_has_no_room_for_stays_in_main_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    places: list[str] = []

    class Large(torch.nn.Module):
        def to(self, place: Any) -> Any:
            places.append(place)
            if place == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self

    monkeypatch.setattr("balcony_export.model.gpu.has_gpu", lambda: True)
    move_to_gpu(Large())
    assert places == ["cuda", "cpu"] and "it runs on the CPU" in caplog.text
