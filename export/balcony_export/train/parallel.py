"""Several processes on one training run, as ``accelerate launch`` starts them.

Owns the sharing only: each process takes its part of a step's passes, gradients and losses are summed, process 0 writes.
A balcony is small (3.5M parameters for the demo model), so every process holds all of them. The frozen backbone lies whole on
every device, or, with ``accelerate launch --use_fsdp``, in equal parts: a layer's weights are gathered for its pass (FSDP2).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]  # accelerate ships no types
from torch import distributed, nn


class Processes:
    """Which of how many processes this is; one of one without ``accelerate launch``."""

    def __init__(self) -> None:
        # CUDA or the CPU: Apple's GPU lacks the float64 of the sums
        state = PartialState(cpu=not torch.cuda.is_available())
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device
        #: Whether the backbone's layers are spread over the processes.
        self.sharded = self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def shard(self, model: nn.Module, decoder: Any) -> None:
        """Put a frozen model on the devices, its decoder's layers in parts: the processes then make its passes together."""
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - half a second that few need
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - likewise

        mesh = init_device_mesh(self.device.type, (self.count,))
        own = set(decoder.parameters())
        for layer in decoder.layers:
            own -= set(layer.parameters())
            fully_shard(layer, mesh=mesh)
        # the decoder as their common root: they share its streams, and the next layer is gathered during a pass
        fully_shard(decoder, mesh=mesh, ignored_params=own)
        model.to(self.device)

    def share(self, passes: int) -> range:
        """The passes of a step that this process makes; ``passes`` is a multiple of the number of processes."""
        return range(self.index, passes, self.count)

    def gradients(self, module: nn.Module) -> list[torch.Tensor]:
        """Gradients of a module's parameters; a process that had none has zeros, or the others would wait for its part."""
        for parameter in module.parameters() if self.count > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]

    @torch.no_grad()
    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)
