"""The mean of the balconies of several runs (a model soup: Wortsman et al. 2022, arXiv:2203.05482).

Owns which balconies may be averaged. Runs that started from one another lie in one basin of the loss, so the mean of their
weights is a balcony like each of them, with less of each run's noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from balcony_edge.errors import CheckpointError, InputError
from balcony_export.model.balcony_files import check_finite, read_index, read_tensors, write_balconies
from balcony_export.output import fresh_directory

#: What identifies the balconies of an index: their model, their kind and the layer that they began as copies of.
_ALIKE = ("base", "module", "layer")


def average(directories: Sequence[Path], output: Path) -> tuple[int, ...]:
    """Write the mean of the balconies of several directories; returns their exit layers.

    Its record of training is that of the last directory, without held-out figures and with the files that it is the mean of.
    The rows that it has learned from are the most of any directory with the same corpus.

    Args:
        directories: Directories that `balcony-edge train` wrote, the last run last.
        output: Directory to make.

    Raises:
        InputError: There are fewer than two directories, or the output exists or cannot be made.
        CheckpointError: A directory is damaged, or they have other models, kinds or exits.
    """
    if len(directories) < 2:
        raise InputError(f"{len(directories)} directory to average: give two or more")
    runs = [(directory, read_index(directory)) for directory in directories]
    _, last = runs[-1]
    for directory, index in runs:
        differing = [key for key in _ALIKE if index[key] != last[key]]
        differing += ["exits"] if index["exits"].keys() != last["exits"].keys() else []
        if differing:
            raise CheckpointError(
                f"{directory}: has another {', '.join(differing)} than {directories[-1]}: give runs of the same exits of one "
                "model"
            )
    means: dict[int, dict[str, torch.Tensor]] = {}
    records: dict[int, dict[str, Any]] = {}
    for exit_, entry in last["exits"].items():
        found = [read_tensors(directory, index["exits"][exit_]) for directory, index in runs]
        shapes = [{name: value.shape for name, value in tensors.items()} for tensors in found]
        if any(one != shapes[-1] for one in shapes):
            raise CheckpointError(f"balcony {exit_}: the directories have tensors of other shapes: train them again")
        means[int(exit_)] = {name: torch.stack([one[name].float() for one in found]).mean(0) for name in found[-1]}
        check_finite(output, int(exit_), means[int(exit_)])
        record = dict(entry.get("training") or {})
        for figure in ("held_out_kl", "held_out_agreement"):
            record.pop(figure, None)
        if "rows" in record:  # a next run begins after the rows that any of them has learned from
            known = [index["exits"][exit_].get("training") or {} for _, index in runs]
            record["rows"] = max(one["rows"] for one in known if one.get("corpus") == record.get("corpus"))
        records[int(exit_)] = record | {"mean_of": [index["exits"][exit_]["sha256"] for _, index in runs]}
    with fresh_directory(output) as directory:
        write_balconies(directory, means, {key: last[key] for key in _ALIKE}, records)
    return tuple(means)
