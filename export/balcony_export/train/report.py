"""Output of a training run for people: its progress, the paper's Table 2 for it, and a plot of its curves.

Owns words and axes only; it reads the metrics that :mod:`.trainer` wrote.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from balcony_edge.errors import InputError, MissingDependencyError, TrainingError
from balcony_edge.files import write_atomically

#: Base model → tokens of its pretraining, as published. SmolLM2-135M: 2T (model card).
PRETRAINING_TOKENS = {"smollm2-135m": 2_000_000_000_000}


@dataclass(frozen=True)
class StepReport:
    """Figures of one training step.

    Attributes:
        step: Number of steps done.
        done: Share of the run that is over, 0 to 1.
        loss: Exit layer → loss of this step.
        held_out: Exit layer → KL on the held-out rows, if it was measured after this step.
        tokens_per_s: Speed of the last steps.
        eta_s: Estimated time to the end, seconds.
    """

    step: int
    done: float
    loss: dict[int, float]
    held_out: dict[int, float] | None
    tokens_per_s: float
    eta_s: float


class Judged(NamedTuple):
    """Quality of an exit on the held-out rows."""

    kl: float
    agreement: float
    averaged: bool  # whether the averaged weights were measured


@dataclass(frozen=True)
class TrainingCost:
    """Training cost: a row of the paper's Table 2."""

    exits: int
    parameters_per_balcony: int
    tokens: int
    pretraining_tokens: int | None

    @property
    def share(self) -> float | None:
        """Tokens of the training divided by tokens of the pretraining; None if those are unknown."""
        return None if not self.pretraining_tokens else self.tokens / self.pretraining_tokens

    def lines(self) -> list[tuple[str, str]]:
        """``(name, value)`` as in Table 2."""
        each, all_of_them = self.parameters_per_balcony / 1e6, self.exits * self.parameters_per_balcony / 1e6
        share = "unknown: give --pretraining-tokens" if self.share is None else f"{100 * self.share:.2g} %"
        return [
            ("Number of tunable parameters", f"{self.exits} × {each:.2f}M = {all_of_them:.2f}M"),
            ("Training cost in tokens", f"{self.tokens / 1e6:.2f}M"),
            ("Percentage of pretraining tokens", share),
        ]


def pretraining_tokens(name: str, given: int | None) -> int | None:
    """Tokens of the pretraining: the number given, or the published number of a base model, by its name."""
    if given is not None:
        return given
    return next((tokens for key, tokens in PRETRAINING_TOKENS.items() if key in name.lower()), None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last line that is cut short.

    Raises:
        InputError: There is no such file.
    """
    if not path.is_file():
        raise InputError(f"{path}: does not exist: give the metrics.jsonl of a training run")
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def plot_curves(
    metrics: Sequence[dict[str, Any]],
    output: Path,
    title: str,
    loss: str = "kl",
    *,
    before: Mapping[int, float] | None = None,
    after: Mapping[int, float] | None = None,
) -> None:
    """Plot the loss over tokens as a PNG: one smoothed line per exit, with its held-out KL as points.

    ``before`` and ``after`` add points at both ends, so that even the plot of a short run shows whether training helped.

    Args:
        metrics: Lines of a run's metrics.jsonl.
        output: Path of the picture.
        title: Title of the picture.
        loss: Kind of the loss (see ``TrainConfig``).
        before: Exit layer → held-out KL before the first step, nats.
        after: Exit layer → held-out KL of the balconies that were written, nats.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        TrainingError: The picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  # an extra
        from matplotlib.ticker import StrMethodFormatter  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError("the plot needs matplotlib: pip install 'balcony-edge[plot]'") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, exit_layer in enumerate(metrics[0]["loss"] if metrics else ()):
        millions = [line["tokens"] / 1e6 for line in metrics]
        axes.plot(millions, _smooth([line["loss"][exit_layer] for line in metrics]), color=f"C{index}", linewidth=1.2)
        held_out = [
            (line["tokens"] / 1e6, line["held_out_kl"][exit_layer]) for line in metrics if "held_out_kl" in line
        ]
        if before is not None and (first := before.get(int(exit_layer))) is not None:
            held_out.insert(0, (0.0, first))
        if after is not None and (last := after.get(int(exit_layer))) is not None:
            held_out.append((millions[-1], last))
        label = f"exit {exit_layer}"
        points = zip(*held_out, strict=True) if held_out else ([], [])
        axes.plot(*points, "o--", ms=5, mfc="white", lw=0.8, color=f"C{index}", label=label)
    axes.set_xlabel("tokens (millions)")
    lines = "line training" if loss == "kl" else f"line training loss ({loss})"
    axes.set_ylabel(f"KL(full ‖ exit), nats: {lines}, circles held out")
    axes.set_yscale("log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(StrMethodFormatter("{x:g}"))
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    if metrics:
        figure.legend(loc="outside lower center", ncols=len(metrics[0]["loss"]))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(output, picture.getvalue(), TrainingError, "free space")


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average with a memory of 0.95, corrected for its start."""
    out: list[float] = []
    average = weight = 0.0
    for value in values:
        average, weight = 0.95 * average + 0.05 * value, 0.95 * weight + 0.05
        out.append(average / weight)
    return out
