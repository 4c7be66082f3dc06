"""Files of a training run: its checkpoint, everything that the next step depends on, and its metrics, a line a step.

The checkpoint is one file, safetensors (nothing is pickled) with the counters as JSON in its metadata. It is written under a
temporary name and renamed, so that a kill -9 at any moment leaves the last good file. Randomness in a run follows from seed
and step, so no generator state is needed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from balcony_edge.errors import TrainingError
from balcony_export.model.balcony_files import write_file
from balcony_export.train.learner import Learner
from balcony_export.train.report import StepReport

CHECKPOINT = "checkpoint.safetensors"
#: The text as rows of tokens, which a later piece of the run reads.
PACKED = "corpus.safetensors"
#: Directory with the balconies of a run's last step, which need not be the best.
END = "end"


def run_directory(output: Path, exits: tuple[int, ...]) -> Path:
    """Directory of a run's checkpoint and metrics, next to those of runs for other exits."""
    return output / "run" / "-".join(map(str, exits))


def save_run(directory: Path, learners: dict[int, Learner], state: dict[str, Any]) -> None:
    """Write the run's state; ``state`` has everything that is not a tensor (step, best loss, configuration)."""
    tensors: dict[str, torch.Tensor] = {}
    for exit_layer, learner in learners.items():
        for name, value in learner.balcony.state_dict().items():
            tensors[f"{exit_layer}.weight.{name}"] = value
        for name, value in learner.average.items():
            tensors[f"{exit_layer}.average.{name}"] = value
        for index, optimizer in enumerate(learner.optimizers):
            for parameter, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    tensors[f"{exit_layer}.optimizer.{index}.{parameter}.{slot}"] = torch.as_tensor(value)
    content = save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {"state": json.dumps(state)}
    )
    write_file(directory / CHECKPOINT, content)


def read_state(directory: Path) -> dict[str, Any] | None:
    """The state of the run in this directory, or None if it has no checkpoint."""
    path = directory / CHECKPOINT
    if not path.is_file():
        return None
    try:
        path.open("rb").close()
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror}): make it readable") from error
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path}: is damaged: remove it and train again") from error
    assert isinstance(state, dict)
    return state


def load_run(directory: Path, learners: dict[int, Learner]) -> None:
    """Restore the weights, averages and optimizer states that :func:`save_run` wrote.

    All are copies, so that nothing maps the file: Windows would not replace it, and Linux would keep its blocks.
    """
    slots: dict[tuple[int, int], dict[int, dict[str, torch.Tensor]]] = {}
    with safe_open(directory / CHECKPOINT, "pt") as file:
        for key in file.keys():  # noqa: SIM118  # safe_open has no iterator
            exit_text, kind, name = key.split(".", 2)
            exit_layer, value = int(exit_text), file.get_tensor(key)
            if kind == "weight":
                learners[exit_layer].balcony.state_dict()[name].copy_(value)
            elif kind == "average":
                learners[exit_layer].average[name].copy_(value)
            else:
                index, parameter, slot = name.split(".")
                slots.setdefault((exit_layer, int(index)), {}).setdefault(int(parameter), {})[slot] = value.clone()
    for exit_layer, learner in learners.items():
        for index, optimizer in enumerate(learner.optimizers):
            document = optimizer.state_dict()
            document["state"] = slots.get((exit_layer, index), {})
            optimizer.load_state_dict(document)


def log_step(path: Path, progress: StepReport, *, tokens: int, factor: float, wall_s: float) -> None:
    """Add a line to the metrics.

    Args:
        path: The metrics file.
        progress: The step.
        tokens: Tokens that the run has seen, with repeats.
        factor: Fraction of the peak rate that the step had.
        wall_s: Time spent training, seconds.
    """
    line: dict[str, Any] = {
        "step": progress.step - 1,
        "tokens": tokens,
        "factor": round(factor, 6),
        "loss": {str(e): round(value, 6) for e, value in progress.loss.items()},
        "tokens_per_s": round(progress.tokens_per_s, 1),
        "wall_s": round(wall_s, 2),
    }
    if progress.held_out is not None:
        line["held_out_kl"] = {str(e): round(value, 6) for e, value in progress.held_out.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def trim_metrics(path: Path, step: int) -> None:
    """Remove lines of the metrics from a step on: a killed run may have written lines, or half of one, after the checkpoint."""
    if path.is_file():
        kept = [line for line in path.read_text(encoding="utf-8").split("\n") if _step_of(line) < step]
        write_file(path, "".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
