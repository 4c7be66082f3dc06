"""The recipe of a training run, as one frozen record.

Owns names, defaults and the rules across fields. The experiments behind the defaults are in docs/LOG.md,
"Distillation".
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from balcony_edge.errors import InputError
from balcony_export.model.balcony import BalconyKind
from balcony_export.train.loss import LossKind
from balcony_export.train.precision import PassPrecision, native_precision
from balcony_export.train.schedule import OptimizerKind, ScheduleKind


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. The defaults were found for models of 135M parameters and runs of 0.1 to 10M tokens."""

    exits: tuple[int, ...]
    steps: int | None = None
    minutes: float | None = None  # end after this time instead
    seq_len: int = 512
    batch_rows: int = 2  # per optimizer step; at equal tokens 2 are better than 4 (KL 6.6 and 7.4 at 0.15M tokens)
    micro_rows: int = 2  # rows per pass; if fewer than batch_rows, gradients accumulate
    # per row in the loss; 0: all, which at equal tokens has 4 % less KL than 256, 11 % less than 128
    positions: int = 0
    vocabulary: int = 8192  # tokens that a step compares (see `VocabularySample`); 0: all
    state_weight: float = 0.5  # of the full model's states (see `HeadLoss.backward`); it falls to 0 over the run
    optimizer: OptimizerKind = "muon"
    rate: float = 6e-3
    vector_rate: float = 3e-3  # learning rate of all that is no matrix: norms, convolutions, experts (three axes)
    weight_decay: float = 0.0
    schedule: ScheduleKind = "trapezoidal"
    warmup_steps: int = 50
    decay_share: float = 0.4
    clip: float = 1.0
    average: float = 0.99  # memory of the exponential moving average of the weights
    # of the passes and of Muon's products; weights are trained in float32
    precision: PassPrecision = field(default_factory=native_precision)
    start: str = "last layer"  # or "random", or the digest of the balconies that the run started from
    module: BalconyKind = "decoder"
    loss: LossKind = "kl"
    seed: int = 0
    evaluate_every: int = 500
    checkpoint_minutes: float = 5.0
    cache_gb: float = 0.0

    def recipe(self) -> dict[str, Any]:
        """The settings that a resumed run must share with its checkpoint: all except its length and its housekeeping."""
        housekeeping = ("steps", "minutes", "micro_rows", "evaluate_every", "checkpoint_minutes", "cache_gb")
        return {key: value for key, value in json.loads(json.dumps(asdict(self))).items() if key not in housekeeping}

    def check_processes(self, processes: int) -> None:
        """Raise InputError for values that do not suit the number of processes."""
        passes = self.batch_rows // self.micro_rows
        if passes % processes or (processes > 1 and self.minutes is not None):
            raise InputError(
                f"{processes} processes with {passes} passes a step: the number of passes (rows a step / rows a pass) must be "
                "a multiple of the number of processes, and --minutes is only for one process"
            )
        if processes > 1 and self.cache_gb:
            raise InputError(
                f"{processes} processes with --cache-gb: the cache works for one process only: leave it out"
            )

    def check(self) -> None:
        """Raise InputError for values that are out of range or exclude each other."""
        if (self.steps is None) == (self.minutes is None):
            raise InputError("--steps (or --tokens) and --minutes: a run needs exactly one of them: give one")
        for name in ("seq_len", "batch_rows", "micro_rows", "evaluate_every"):
            if getattr(self, name) < 1:
                raise self._refusal(name, "must be 1 or more")
        if self.steps is not None and self.steps < 1:
            raise self._refusal("steps", "must be 1 or more")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise self._refusal("minutes", "must be a number above 0")
        if self.vocabulary == 1:
            raise InputError("vocabulary = 1: half of it is drawn at random: give 2 or more, or 0 for all")
        if self.batch_rows % self.micro_rows:
            raise InputError(
                f"{self.batch_rows} rows a step in passes of {self.micro_rows}: must be a multiple: give a --batch-rows that "
                "--micro-rows divides"
            )
        for name in ("rate", "vector_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise self._refusal(name, "must be a positive number")
        for name, low, high in (
            ("positions", 0, 10**9),
            ("vocabulary", 0, 10**9),
            ("state_weight", 0.0, 100.0),
            ("average", 0.0, 0.99999),
            ("decay_share", 0.0, 1.0),
            ("weight_decay", 0.0, 1e3),
            ("warmup_steps", 0, 10**9),
            ("cache_gb", 0.0, 1e6),
            ("checkpoint_minutes", 0.0, 1e9),
            ("seed", 0, 2**63 - 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise self._refusal(name, f"must be {low} to {high}")

    def _refusal(self, name: str, allowed: str) -> InputError:
        """The error for a value that is out of range; options of `balcony-edge train` have the names of the settings."""
        return InputError(f"{name} = {getattr(self, name)}: {allowed}: give another --{name.replace('_', '-')}")
