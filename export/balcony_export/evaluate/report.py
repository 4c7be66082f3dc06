"""Evaluation results for people and programs: tables in the form of the paper's Table 1, Markdown, JSON, and the manifest.

Owns no measurement. The full depth comes first, then the exits from deep to shallow, as in the paper. The loss against the
full depth is in brackets, and every mean has its standard error after ±.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from balcony_edge.bundle.manifest import Estimate, Quality, TaskQuality, TextQuality
from balcony_edge.errors import InputError
from balcony_edge.files import write_together
from balcony_export.evaluate.scorer import Scorer

if TYPE_CHECKING:
    from balcony_export.evaluate.tasks import TaskRun

#: Share of the parameters at the exits of the paper's Table 4.
_PAPER_SHARES = (0.81, 0.56, 0.31)
#: Table 4, LLM-1B with a frozen base: task → score at full depth and at these exits, percent.
PAPER_LLM_1B = {
    "arc_challenge": (37.6, 32.8, 24.9, 22.3),
    "arc_easy": (74.3, 66.3, 58.7, 51.7),
    "boolq": (58.4, 61.4, 61.4, 62.0),
    "lambada_openai": (50.4, 45.1, 29.5, 19.3),
    "lambada_standard": (43.3, 36.4, 20.5, 8.2),
    "openbookqa": (30.0, 25.4, 21.8, 17.4),
    "piqa": (74.9, 71.3, 67.8, 64.1),
    "winogrande": (59.8, 57.6, 53.4, 52.2),
    "hellaswag_10shot": (46.4, 41.3, 34.3, 30.3),
    "mmlu": (25.9, 26.3, 27.2, 24.6),
}
#: Task → its name in the paper's tables.
_TITLES = {
    "arc_challenge": "ARC-C",
    "arc_easy": "ARC-E",
    "boolq": "BoolQ",
    "hellaswag": "HellaSwag",
    "hellaswag_10shot": "HellaSwag (10)",
    "lambada_openai": "LAMBADA-Op",
    "lambada_standard": "LAMBADA-ST",
    "mmlu": "MMLU",
    "openbookqa": "OpenBookQA",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
}


@dataclass(frozen=True)
class Table:
    """Content of a table."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ExitReport:
    """One exit: its size and its measurements."""

    exit_layer: int
    depth_factor: float
    parameters: int
    quality: Quality


@dataclass(frozen=True)
class Report:
    """All exits of one model, the full depth last."""

    model: str
    reference: str
    exits: tuple[ExitReport, ...]

    @property
    def qualities(self) -> dict[int, Quality]:
        """Exit layer → its entry in the manifest."""
        return {exit_.exit_layer: exit_.quality for exit_ in self.exits}


def build_report(
    scorer: Scorer,
    reference: str,
    text: Mapping[str, Mapping[int, TextQuality]],
    tasks: Mapping[int, TaskRun],
) -> Report:
    """Combine measurements.

    Args:
        scorer: The evaluated scorer, with its full depth.
        reference: Name of the model that KL and agreement compare with.
        text: File name → exit layer → quality.
        tasks: Exit layer → run; may be empty.
    """
    layers = scorer.exit_layers
    depth = layers[-1]
    exits = []
    for exit_layer in layers:
        run = tasks.get(exit_layer)
        quality = Quality(
            reference=reference,
            text={name: found[exit_layer] for name, found in text.items()},
            tasks={} if run is None else run.qualities,
            summary=None if run is None else run.summary(tasks[depth]),
        )
        factor = scorer.layers[exit_layer] / depth
        exits.append(ExitReport(exit_layer, round(factor, 3), scorer.parameters[exit_layer], quality))
    return Report(scorer.name, reference, tuple(exits))


def tables(report: Report) -> list[Table]:
    """The tables: tasks in the paper's form, then each text."""
    ordered = report.exits[::-1]
    full = ordered[0]
    found = []
    if full.quality.tasks:
        names = tuple(full.quality.tasks)
        titles = tuple(_title(name, full.quality.tasks[name]) for name in names)
        header = ("exit", "depth", "# params", *titles, "avg (drop)", "retention")
        found.append(Table(f"Tasks, {report.model}", header, tuple(_task_row(exit_, names) for exit_ in ordered)))
    for name, whole in full.quality.text.items():
        header = ("exit", "depth", "# params", "perplexity", "KL to the full model", "top-1 agreement")
        rows_of = f"{whole.documents} documents, {whole.tokens} tokens in windows of {whole.window}"
        title = f"{name}: {rows_of}, against {report.reference}"
        rows = tuple((*_lead(exit_), *_text_cells(exit_.quality.text[name])) for exit_ in ordered)
        found.append(Table(title, header, rows))
    return found


def markdown(report: Report) -> str:
    """The tables as Markdown, with notes on the numbers and the paper's own results."""
    parts = []
    for table in tables(report):
        lines = [_line(table.header), _line(("---",) * len(table.header)), *(_line(row) for row in table.rows)]
        parts.append(f"**{table.title}**\n\n" + "\n".join(lines))
    notes = [
        "# params: parameters of the layers that run, without token table and LM head; of a mixture of experts, all. ±: "
        "standard error (text: over documents, or windows if few documents hold nearly all tokens; tasks: over examples; "
        "drop and retention: over pairs)."
    ]
    if (summary := report.exits[-1].quality.summary) is not None:
        kept = _kept_by_the_paper(PAPER_LLM_1B)
        notes.append(f"The paper's LLM-1B (Table 4, balconies of 15.7 billion tokens) keeps {kept}.")
        if shared := [task for task in summary.tasks if task in PAPER_LLM_1B]:
            notes[-1] += f" On tasks of this table: {_kept_by_the_paper(shared)}."
    return "\n\n".join([*parts, *notes]) + "\n"


def as_document(report: Report) -> dict[str, Any]:
    """The report for programs."""
    return {
        "model": report.model,
        "reference": report.reference,
        "exits": [
            {
                "exit_layer": exit_.exit_layer,
                "depth_factor": exit_.depth_factor,
                "non_embedding_parameters": exit_.parameters,
                **exit_.quality.model_dump(mode="json", exclude={"reference"}),
            }
            for exit_ in report.exits
        ],
        "paper_llm_1b_retention": {str(share): kept for share, kept in paper_retention(PAPER_LLM_1B).items()},
    }


def paper_retention(tasks: Iterable[str]) -> dict[float, float]:
    """Share of the parameters → what the paper's LLM-1B keeps there of its average over some tasks of Table 4, percent."""
    full, *exits = (sum(scores) for scores in zip(*(PAPER_LLM_1B[task] for task in tasks), strict=True))
    return {share: round(100 * kept / full, 1) for share, kept in zip(_PAPER_SHARES, exits, strict=True)}


def _kept_by_the_paper(tasks: Iterable[str]) -> str:
    kept = ", ".join(f"{value} % at {share}×" for share, value in paper_retention(tasks).items())
    return f"{kept} of its average over {', '.join(map(_TITLES.__getitem__, tasks))}"


def write_report(report: Report, directory: Path) -> None:
    """Write evaluation.json and evaluation.md into a directory, which is made if needed.

    Raises:
        InputError: The directory cannot be written.
    """
    contents = {
        "evaluation.json": json.dumps(as_document(report), indent=1, ensure_ascii=False) + "\n",
        "evaluation.md": markdown(report),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {directory}: cannot be written ({error.strerror}): name another place") from error
    files = {directory / name: content.encode() for name, content in contents.items()}
    write_together(files, InputError, "name another place with --output")


def _lead(exit_: ExitReport) -> tuple[str, str, str]:
    return str(exit_.exit_layer), f"{exit_.depth_factor:.2f}×", f"{exit_.parameters / 1e6:.1f}M"


def _task_row(exit_: ExitReport, names: tuple[str, ...]) -> tuple[str, ...]:
    cells = []
    for name in names:
        task = exit_.quality.tasks[name]
        shown = task.metrics[task.metric]
        # Averaged ones have scores within 0 and 1; others are perplexities, or out of 100 already.
        averaged = exit_.quality.summary is not None and name in exit_.quality.summary.tasks
        share = averaged or task.metric.startswith(("acc", "exact_match", "mcc"))
        cells.append(_plus_minus(shown, 100 if share else 1, 1))
    summary = exit_.quality.summary
    if summary is None:
        return (*_lead(exit_), *cells, "", "")
    average = f"{_plus_minus(summary.average, 1, 1)} ({_plus_minus(summary.drop, 1, 1)})"
    kept = "" if summary.retention is None else f"{_plus_minus(summary.retention, 1, 1)} %"
    return (*_lead(exit_), *cells, average, kept)


def _text_cells(text: TextQuality) -> tuple[str, str, str]:
    return (
        _plus_minus(text.perplexity, 1, 2),
        _plus_minus(text.kl, 1, 4),
        f"{_plus_minus(text.agreement, 100, 1)} %",
    )


def _plus_minus(estimate: Estimate, scale: float, digits: int) -> str:
    form = f".{digits}f" if abs(estimate.value) < 1e5 else ".1e"  # perplexities of untrained exits
    text = f"{estimate.value * scale:{form}}"
    return text if estimate.stderr is None else f"{text} ± {estimate.stderr * scale:{form}}"


def _title(name: str, task: TaskQuality) -> str:
    title = _TITLES.get(name, name)
    return title if task.metric == "acc" else f"{title} {task.metric}"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
