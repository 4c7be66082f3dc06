"""Several processes on one training run, as ``accelerate launch`` starts them.

Owns the sharing only: each process takes its part of a step's passes, gradients and losses are summed, process 0 writes.
A balcony is small (3.5M parameters for the demo model) and the backbone is frozen, so nothing is wrapped or sharded: every
process holds the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState  # type: ignore[import-untyped]  # accelerate ships no types
from torch import distributed


class Processes:
    """Which of how many processes this is; one of one without ``accelerate launch``."""

    def __init__(self) -> None:
        # CUDA or the CPU: Apple's GPU lacks the float64 of the sums
        state = PartialState(cpu=not torch.cuda.is_available())
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def share(self, passes: int) -> range:
        """The passes of a step that this process makes; ``passes`` is a multiple of the number of processes."""
        return range(self.index, passes, self.count)

    @torch.no_grad()
    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)
