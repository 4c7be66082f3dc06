"""Several processes of one training run, as ``accelerate launch`` starts them.

Owns only the sharing: each process takes its part of a step's passes and of Muon's matrices, what they find is summed, and
process 0 writes. A balcony is small (3.5M parameters for the demo model), so every process has all of them. The frozen backbone
is on every device as a whole or, with ``accelerate launch --use_fsdp``, in equal parts: the weights of a layer are gathered for
its pass (FSDP2).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from accelerate import PartialState  # type: ignore[import-untyped]  # accelerate ships no types
from torch import distributed, nn

from balcony_export.model.gpu import has_gpu

_T = TypeVar("_T")


class Processes:
    """Index of this process and number of processes, which is 1 without ``accelerate launch``."""

    def __init__(self) -> None:
        # CUDA or the CPU: Apple's GPU has no float64, which the sums need
        state = PartialState(cpu=not has_gpu())
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device
        #: Whether the backbone's layers are distributed over the processes.
        self.sharded = self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def shard(self, model: nn.Module, decoder: Any) -> None:
        """Move a frozen model to the devices, its decoder layers in parts; afterwards all processes make each pass together."""
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - takes half a second, and few runs need it
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - likewise

        mesh = init_device_mesh(self.device.type, (self.count,))
        own = set(decoder.parameters())
        for layer in decoder.layers:
            own -= set(layer.parameters())
            fully_shard(layer, mesh=mesh)
        # with the decoder as their root, layers share its streams, and the next layer is gathered during a pass
        fully_shard(decoder, mesh=mesh, ignored_params=own)
        model.to(self.device)

    def agreed(self, value: _T) -> _T:
        """The value of process 0."""
        found = [value]
        if self.count > 1:
            distributed.broadcast_object_list(found)
        return found[0]

    def share(self, parts: int) -> range:
        """Those of the passes of a step, or of other parts of the work, that this process does."""
        return range(self.index, parts, self.count)

    def gradients(self, module: nn.Module) -> list[torch.Tensor]:
        """Gradients of a module's parameters. A process without any gives zeros, or the others would wait for it."""
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
