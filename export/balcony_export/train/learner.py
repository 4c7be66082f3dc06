"""One exit of a training run: its balcony, its optimizers and the moving average of its weights.

Owns what a step does with gradients: clipping, the rate, and how much of the past the average keeps. Where gradients come from,
and which of the two weights are written, is :mod:`.trainer`.
"""

from __future__ import annotations

import torch

from balcony_export.model.balcony import Balcony
from balcony_export.train.config import TrainConfig
from balcony_export.train.schedule import make_optimizers, set_rate


class Learner:
    """A balcony that is trained, in float32.

    Args:
        balcony: The balcony; it is moved to the device.
        config: The recipe.
        dtype: Type of Muon's products.
        device: The device of the process.

    Attributes:
        balcony: The balcony, with its current weights.
        optimizers: Its optimizers.
        average: Name of each weight → its moving average.
    """

    def __init__(self, balcony: Balcony, config: TrainConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._clip, self._most_memory = config.clip, config.average
        balcony.to(device).float().eval().requires_grad_(True)  # without dropout, which export has none of
        self.balcony = balcony
        self.optimizers: list[torch.optim.Optimizer] = make_optimizers(
            balcony.parameters(), config.optimizer, config.rate, config.vector_rate, config.weight_decay, dtype
        )
        self.average: dict[str, torch.Tensor] = {name: value.clone() for name, value in balcony.state_dict().items()}

    def update(self, step: int, factor: float) -> None:
        """Change the weights by the gradients that they have, which are then gone, and let the average follow them.

        Args:
            step: Number of steps done.
            factor: Fraction of the peak rate.
        """
        torch.nn.utils.clip_grad_norm_(self.balcony.parameters(), self._clip)
        set_rate(self.optimizers, factor)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # the memory grows with the steps, or an early average would still contain the initial weights
        memory = min(self._most_memory, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in self.balcony.state_dict().items():
                self.average[name].lerp_(value, 1 - memory)

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the weights of the balcony with their average."""
        for name, value in self.balcony.state_dict().items():
            kept = value.clone()
            value.copy_(self.average[name])
            self.average[name].copy_(kept)
