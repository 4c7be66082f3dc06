"""The recipe of a training run, as one frozen record.

Owns names, defaults and the cross-field rules. docs/LOG.md has the trials behind the defaults.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from balcony_edge.errors import InputError
from balcony_export.model.balcony import BalconyKind
from balcony_export.train.loss import LossKind
from balcony_export.train.schedule import OptimizerKind, ScheduleKind

PassPrecision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. The defaults are the ones found for models of 135M parameters on budgets of 0.1 to 10M tokens."""

    exits: tuple[int, ...]
    steps: int | None = None
    minutes: float | None = None  # instead of steps: end at this time, re-planning the decay while running
    seq_len: int = 512
    batch_rows: int = 2  # rows per optimizer step: at equal tokens 2 beat 4 (KL 6.6 against 7.4 at 0.15M tokens)
    micro_rows: int = 2  # rows per pass: accumulation where it is smaller
    positions: int = 0  # sampled per row for the loss; 0: all, at equal tokens 4 % below 256 in KL and 11 % below 128
    vocabulary: int = 8192  # tokens of the vocabulary that a step compares (`VocabularySample`); 0: all
    reuse: int = 1  # steps that learn from one pass of the backbone
    window_steps: int = 64  # steps whose states are kept (2.4 MB a row in the demo model) for rows to come again
    optimizer: OptimizerKind = "muon"
    rate: float = 6e-3
    vector_rate: float = 3e-3  # of the norms
    weight_decay: float = 0.0
    schedule: ScheduleKind = "trapezoidal"
    warmup_steps: int = 50
    decay_share: float = 0.4
    clip: float = 1.0
    average: float = 0.99  # of the exponential moving average of the weights
    precision: PassPrecision = "bf16"  # of the passes; weights train in float32
    start: str = "last layer"  # or "random", or which balconies the run went on from
    module: BalconyKind = "decoder"
    loss: LossKind = "kl"
    seed: int = 0
    evaluate_every: int = 100
    checkpoint_minutes: float = 3.0
    cache_gb: float = 0.0

    def recipe(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it goes on with: all but its length and its upkeep."""
        upkeep = ("steps", "minutes", "micro_rows", "evaluate_every", "checkpoint_minutes", "cache_gb")
        return {key: value for key, value in json.loads(json.dumps(asdict(self))).items() if key not in upkeep}

    def check(self) -> None:
        """Raise InputError for values that make no sense together."""
        if (self.steps is None) == (self.minutes is None):
            raise InputError("give either --steps (or --tokens) or --minutes: a run needs one end")
        if self.minutes is not None and self.schedule == "cosine":
            raise InputError("--minutes with --schedule cosine: a cosine needs its length beforehand: use trapezoidal")
        for name in ("seq_len", "batch_rows", "micro_rows", "reuse", "window_steps", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: must be 1 or more")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps = {self.steps}: must be 1 or more")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes = {self.minutes}: must be more than 0")
        if self.vocabulary == 1:
            raise InputError("vocabulary = 1: half of it is drawn: give 2 or more, or 0 for all")
        if self.batch_rows % self.micro_rows:
            raise InputError(f"{self.batch_rows} rows a step in passes of {self.micro_rows}: must divide")
        for name in ("rate", "vector_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} = {getattr(self, name)}: must be a positive number")
        for name, low, high in (
            ("positions", 0, 10**9),
            ("vocabulary", 0, 10**9),
            ("average", 0.0, 0.99999),
            ("decay_share", 0.0, 1.0),
            ("weight_decay", 0.0, 1e3),
            ("warmup_steps", 0, 10**9),
            ("cache_gb", 0.0, 1e6),
            ("seed", 0, 2**63 - 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} = {getattr(self, name)}: must be {low} to {high}")
