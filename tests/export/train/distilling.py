"""A short training run on tiny data, for the tests of distillation and the processes that they start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from balcony_export.data.corpus import Corpus, Rows
from balcony_export.model.balcony import Balcony
from balcony_export.train.config import TrainConfig
from balcony_export.train.trainer import METRICS, Start, Trainer

SEQ_LEN = 24


def random_corpus() -> Corpus:
    """Eight rows of random tokens to train on, and two that are held out."""
    random = np.random.default_rng(3)
    rows = [
        Rows(random.integers(1, 320, (count, 32)).astype(np.int32), np.full(count, 32, np.int32)) for count in (8, 2)
    ]
    return Corpus(rows[0], rows[1], {}, "a digest")


def trainer_of(
    model: Any,
    corpus: Corpus,
    output: Path,
    start: dict[int, Balcony] | None = None,
    work: Path | None = None,
    teacher: Any = None,
    **options: Any,
) -> Trainer:
    values: dict[str, Any] = {"exits": (2, 3), "steps": 12, "seq_len": SEQ_LEN, "positions": 8, "warmup_steps": 2}
    values |= {"rate": 3e-3, "vector_rate": 1e-3, "evaluate_every": 6, "checkpoint_minutes": 60.0, "precision": "fp32"}
    values |= options
    begin = None if start is None else Start(start)
    return Trainer(
        model, corpus, TrainConfig(**values), output, start=begin, teacher=teacher, work=work, compiled=False
    )


def losses_of(trainer: Trainer) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (trainer.work / METRICS).read_text().splitlines()]
