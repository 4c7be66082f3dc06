"""The NVIDIA GPU that PyTorch uses here, if it has kernels and room for the work."""

from __future__ import annotations

import logging
import re

import torch
from torch import nn

_log = logging.getLogger(__name__)


def has_gpu() -> bool:
    """Whether PyTorch sees an NVIDIA GPU and was built for it: builds for CUDA 13 have no kernels for cards before 7.5."""
    if not torch.cuda.is_available():
        return False
    built = [int(found[1]) for name in torch.cuda.get_arch_list() if (found := re.match(r"sm_(\d+)", name))]
    major, minor = torch.cuda.get_device_capability()
    return not built or 10 * major + minor >= min(built)


def move_to_gpu(model: nn.Module) -> None:
    """Move a model to the GPU; without one that has room for it, the model stays in main memory."""
    if has_gpu():
        try:
            model.to("cuda")
        except torch.OutOfMemoryError:
            model.to("cpu")  # the weights that had room
            _log.warning("the GPU has no room for the model: it runs on the CPU")
