"""Tasks of lm-evaluation-harness at all exits, with standard errors.

Owns the offline tasks (offline_tasks/*.yaml, in the harness's own format with three more keys) and the statistics over tasks.
All exits answer the same examples, so the loss of an exit is estimated from pairs, which is much more precise than the
difference of two means.

    data_files   split → file below the data directory; only the "json" and "text" readers of the library are used, and
                 nothing is fetched
    shots        file, count, text (a template), by (a field that must be equal): context before each example, as {{shots}},
                 made of the first rows other than the example itself
    answers      the values that the field "answer" may have; with "choices" there is one choice for each
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import io
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from jinja2 import Environment, meta

from balcony_edge.bundle.manifest import Estimate, TaskQuality, TaskSummary
from balcony_edge.errors import InputError, MissingDependencyError, shown
from balcony_export.data.documents import read_records
from balcony_export.evaluate.scorer import Scorer

try:
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import apply_template
except ImportError as error:
    raise MissingDependencyError("tasks need lm-evaluation-harness: pip install 'balcony-edge[eval]'") from error

from balcony_export.evaluate.lm_eval import BalconyLM, Sweep

TASKS = Path(__file__).parent / "offline_tasks"
#: The metric of a table, in this order where a task has several; normalized by length where leaderboards report that.
_METRICS = ("acc", "exact_match", "acc_norm", "f1", "word_perplexity", "perplexity")
_NORMALIZED = ("arc_challenge", "hellaswag", "hellaswag_10shot")


@dataclass(frozen=True)
class TaskRun:
    """Results of one exit.

    Attributes:
        qualities: Task → its metrics.
        scores: Task → one score per example, if the table's metric is a mean over examples (log-likelihoods for a perplexity).
    """

    qualities: dict[str, TaskQuality]
    scores: dict[str, npt.NDArray[np.float64]]

    def summary(self, full: TaskRun) -> TaskSummary | None:
        """Average over the tasks whose metric is an accuracy, and its drop and retention relative to the full depth.

        None without such tasks. Standard errors: the average's comes from the examples of each task, the drop's from the
        differences of pairs, and that of the retention r = average / full average from the residuals exit - r × full (delta
        method).
        """
        pairs = {task: (scores, full.scores[task]) for task, scores in self.scores.items() if task in full.scores}
        tasks = [task for task, pair in pairs.items() if all(((s >= 0) & (s <= 1)).all() for s in pair)]
        if not tasks:
            return None
        ours, theirs = [pairs[task][0] for task in tasks], [pairs[task][1] for task in tasks]
        average, base = (float(np.mean([scores.mean() for scores in group])) for group in (ours, theirs))
        share = average / base if base else 0.0
        drop = _error([a - b for a, b in zip(ours, theirs, strict=True)])
        kept = _error([a - share * b for a, b in zip(ours, theirs, strict=True)])
        error = _error(ours)
        return TaskSummary(
            tasks=tuple(tasks),
            average=Estimate(value=100 * average, stderr=_percent(error)),
            drop=Estimate(value=100 * (average - base), stderr=_percent(drop)),
            retention=Estimate(value=100 * share, stderr=_percent(kept and kept / base)) if base else None,
        )


@dataclass(frozen=True)
class Loaded:
    """Tasks in the harness's own form, and the names of the tasks that belong to each requested name."""

    harness: dict[str, dict[str, Any]]
    leaves: dict[str, tuple[str, ...]]


def offline_tasks() -> tuple[str, ...]:
    """Names of the tasks whose examples come from a data directory."""
    return tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))


def evaluate_tasks(
    scorer: Scorer,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[int, TaskRun]:
    """Run tasks at every exit; the exits share one pass over the examples, except where texts are generated.

    Args:
        scorer: Source of the exits' logits.
        tasks: Names of offline tasks (with ``data``), or of tasks and groups of the harness.
        data: Directory of the offline tasks' files.
        limit: Number of examples per task; None for all.
        progress: Called with the current step and the share that is done.

    Raises:
        InputError: A task is unknown, a file is missing, or the harness cannot load a task here.
    """

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("tasks", done / total)

    sweep = Sweep(scorer, report)
    with _loaded(tasks, data) as loaded:
        return {e: _evaluate(BalconyLM(sweep=sweep, exit_layer=e), loaded, limit) for e in scorer.exit_layers}


def evaluate_model(lm: Any, tasks: Sequence[str], *, data: Path | None = None, limit: int | None = None) -> TaskRun:
    """Run the same tasks with any model adapter of the harness, to compare it with an exit; see :func:`evaluate_tasks`."""
    with _loaded(tasks, data) as loaded:
        return _evaluate(lm, loaded, limit)


def refuse_unknown(tasks: Sequence[str], data: Path | None) -> None:
    """Refuse what :func:`evaluate_tasks` would without a look at the examples of the harness: names, and files of ``data``."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _manager([_spec(task, data, Path()) for task in tasks])
    if data is not None and not set(tasks) & set(offline_tasks()):
        raise InputError(
            f"--data {data}: {', '.join(tasks)} would be fetched, and not read from there: leave it out, or name one of "
            f"{', '.join(offline_tasks())}"
        )


@contextlib.contextmanager
def _loaded(tasks: Sequence[str], data: Path | None) -> Iterator[Loaded]:
    """The tasks, while nothing goes to stdout; the readers' copies of their files are removed at the end."""
    if not tasks:
        raise InputError("--tasks: is empty: name tasks, separated by commas")
    for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError as error:  # all file systems are read-only or full
        raise InputError(
            "--tasks: there is no directory for temporary files that can be written: name one in TMPDIR"
        ) from error
    # Windows removes no file that is mapped, as these are until the tasks are gone. That must not lose the results.
    with (
        tempfile.TemporaryDirectory(prefix="balcony-eval-", dir=place, ignore_cleanup_errors=True) as cache,
        contextlib.redirect_stdout(io.StringIO()),  # the harness prints, and so do some tasks when they are loaded
    ):
        specs = [_spec(task, data, Path(cache)) for task in tasks]
        yield _load(_manager(specs), dict(zip(tasks, specs, strict=True)))


def _evaluate(lm: Any, loaded: Loaded, limit: int | None) -> TaskRun:
    for task in loaded.harness["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness's default: every model gets the same shots
    # no bootstrap: it forks processes; errors are computed from the examples
    results: Any = lm_eval.evaluate(lm=lm, task_dict=loaded.harness, limit=limit, bootstrap_iters=0)
    return _run(loaded.leaves, results)


def _percent(error: float | None) -> float | None:
    return None if error is None else 100 * error


def _error(scores: Sequence[npt.NDArray[np.float64]]) -> float | None:
    """Standard error of the mean over tasks of the means over examples."""
    if any(len(values) < 2 for values in scores):
        return None
    variances = [float(values.var(ddof=1)) / len(values) for values in scores]
    return math.sqrt(sum(variances)) / len(scores)


def _spec(task: str, data: Path | None, cache: Path) -> str | dict[str, Any]:
    """The name of one of the harness's own tasks, or the configuration of an offline task."""
    path = TASKS / f"{task}.yaml"
    if data is None or not path.is_file():
        return task
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    files = {split: _data_file(data, name) for split, name in config.pop("data_files").items()}
    config["dataset_kwargs"] = {
        # The library reads paths as patterns: the pattern run[1] matches the directory run1, not run[1].
        "data_files": {split: glob.escape(str(file)) for split, file in files.items()},
        "cache_dir": str(cache),
    }
    answers = tuple(config.pop("answers", ()))
    if config["dataset_path"] == "json":
        wanted = _fields(*(config.get(key) for key in ("doc_to_text", "doc_to_choice", "doc_to_target")))
        for file in files.values():
            _records(file, wanted - {"shots"}, answers)
    if (shots := config.pop("shots", None)) is not None:
        config["process_docs"] = _with_shots(_data_file(data, shots["file"]), shots, answers)
    return config


def _fields(*templates: Any) -> set[str]:
    """Fields of an example that a task's entries use: the variables of a template, or a field by its bare name."""
    environment, found = Environment(), set()
    for template in templates:
        if isinstance(template, str):
            found |= meta.find_undeclared_variables(environment.parse(template)) if "{{" in template else {template}
    return found


def _records(path: Path, fields: set[str], answers: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of a JSON Lines file.

    The harness looks at a wrong answer only after all examples have run, which may take hours.

    Raises:
        InputError: The file cannot be used, a line lacks a field, or its choices or its answer are of another form.
    """
    form = f"JSON Lines with {', '.join(sorted(fields))}"
    records = []
    for where, record in read_records(path, form):
        if not isinstance(record, dict) or not fields <= record.keys():
            absent = sorted(fields - record.keys() if isinstance(record, dict) else fields)
            raise InputError(f"{where}: has no {absent[0]}: give {form}")
        gold, choices, answer = (record.get(key) for key in ("gold", "choices", "answer"))
        if "choices" in fields and not _texts(choices, len(answers)):
            count = f"{len(answers)} texts" if answers else "texts"
            raise InputError(f"{where}: choices = {shown(choices)}: must be a list of {count}: give them in this form")
        if "gold" in fields and isinstance(choices, list) and not (type(gold) is int and 0 <= gold < len(choices)):
            raise InputError(
                f"{where}: gold = {shown(gold)}: must be the index of a choice: give 0 to {len(choices) - 1}"
            )
        if answers and answer not in answers:
            raise InputError(f"{where}: answer = {shown(answer)}: must be a text: give one of {', '.join(answers)}")
        records.append(record)
    return records


def _texts(value: Any, count: int) -> bool:
    """Whether it is a list of texts, of any number if the count is 0."""
    return (
        isinstance(value, list) and all(isinstance(one, str) for one in value) and len(value) == (count or len(value))
    )


def _data_file(data: Path, name: str) -> Path:
    path = data / name
    if not path.is_file():
        raise InputError(f"{path}: is missing: --data must name the directory that has {name}")
    return path.resolve()


def _with_shots(path: Path, shots: Mapping[str, Any], answers: Sequence[str]) -> Callable[[Any], Any]:
    """A function that puts the field ``shots`` into each example of a data set."""
    by, count, template = shots.get("by"), int(shots["count"]), str(shots["text"])
    rows = _records(path, _fields(template) | ({by} if by else set()), answers)
    pools: dict[Any, list[tuple[dict[str, Any], str]]] = {}
    for row in rows:
        if by and not isinstance(row[by], str):
            raise InputError(f"{path}: {by} = {shown(row[by])}: must be a text: give its name")
        pool = pools.setdefault(row[by] if by else None, [])
        if len(pool) <= count:  # one more than are shown, because an example is never its own shot
            pool.append((row, apply_template(template, row)))
    for name, pool in pools.items():
        if len(pool) < count:
            raise InputError(
                f"{path}: has {len(pool)} rows{f' of {name}' if by else ''}, but {count} are shown: give more"
            )

    def add(example: dict[str, Any]) -> dict[str, str]:
        key = example[by] if by else None
        if key not in pools:
            raise InputError(f"{path}: has no rows of {key}: give {count} of every {by}")
        pool = pools[key]
        shown = [text for row, text in pool if any(example.get(key) != value for key, value in row.items())]
        return {"shots": "".join(shown[:count])}

    def process(examples: Any) -> Any:
        return examples.map(add, load_from_cache_file=False)

    return process


@functools.cache
def _index(whole: bool) -> Any:
    """The harness's task index; its own thousands of tasks take seconds to read."""
    return TaskManager(include_defaults=whole)


def _manager(specs: Sequence[str | dict[str, Any]]) -> Any:
    """The harness's task index, with its own tasks only if one of them is named."""
    named = [spec for spec in specs if isinstance(spec, str)]
    manager = _index(bool(named))
    known = set(manager.all_tasks)
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            but = f" (but {', '.join(near)})" if near else ""
            raise InputError(
                f"--tasks: lm-evaluation-harness has no task '{name}'{but}: name "
                f"one of its tasks (lm_eval ls tasks), or with --data one of {', '.join(offline_tasks())}"
            )
    return manager


def _load(manager: Any, specs: Mapping[str, str | dict[str, Any]]) -> Loaded:
    """Load each name separately, so that the tasks of a group or tag are known."""
    harness: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    leaves = {}
    for name, spec in specs.items():
        # The harness's own seeds, for each name: some tasks shuffle the choices when they are read, and the examples of a
        # task must not depend on the tasks before it.
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            found = manager.load([spec])
        except InputError:
            raise
        except Exception as error:  # missing data sets and files of another form raise a dozen unrelated classes
            line = " ".join(str(error).split())[:200]
            raise InputError(
                f"--tasks: the examples of '{name}' cannot be loaded ({line}): make the data set available, or give "
                f"--data for one of {', '.join(offline_tasks())}"
            ) from error
        _check_loaded(name, found["tasks"], harness["tasks"])
        leaves[name] = tuple(found["tasks"])
        for key, members in harness.items():
            members.update(found.get(key, {}))
    return Loaded(harness, leaves)


#: Functions of the harness that take pairs or texts of all examples: none of these is a score of one example.
_WHOLE = {
    *("bleu", "chrf", "chrfpp", "ter", "f1_score", "matthews_corrcoef", "brier_score"),
    *("bits_per_byte", "weighted_perplexity"),
}


def _check_loaded(name: str, tasks: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Refuse what would fail only after all examples have run, which would cost the results of all other tasks as well."""
    for leaf, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"--tasks: '{leaf}' runs code that the model writes, which eval does not do: leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"--tasks: '{leaf}' has images or sound, and exits take text only: leave it out")
        if leaf in earlier:  # results are kept by this name, and the two may differ in prompts, shots and examples
            raise InputError(
                f"--tasks: '{leaf}' belongs to '{name}' and to an earlier name: evaluate the two in runs of their own"
            )
    metrics = [
        {metric for metric, how in task.aggregation().items() if getattr(how, "__name__", "") not in _WHOLE}
        for task in tasks.values()
    ]
    if len(metrics) > 1 and not set.intersection(*metrics):
        raise InputError(_nothing_shared(name))


def _run(tasks: Mapping[str, Sequence[str]], results: Any) -> TaskRun:
    samples = results["samples"]
    qualities, scores = {}, {}
    for task, leaves in tasks.items():
        rows = [row for leaf in leaves for row in samples[leaf] if row["filter"] == samples[leaf][0]["filter"]]
        first = _aggregated(results["results"][leaves[0]])
        whole = first if len(leaves) == 1 else {}
        columns = {name: column for name in first if (column := _column(name, rows, whole.get(name))) is not None}
        # a group has no aggregate, and the aggregates of its parts can only be combined for means over examples
        metrics = {name: Estimate(value=value) for name, value in whole.items()}
        metrics |= {name: _estimate(name, column) for name, column in columns.items()}
        if not metrics:
            raise InputError(_nothing_shared(task))
        metric = _primary(task, list(columns) or list(metrics))
        if metric in columns:
            scores[task] = columns[metric]
        qualities[task] = TaskQuality(metric=metric, examples=len(rows), metrics=metrics)
    return TaskRun(qualities, scores)


def _nothing_shared(task: str) -> str:
    return f"--tasks: '{task}' has no score per example that all its parts share: name its parts"


def _aggregated(row: Mapping[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "x"}`` → ``{"acc": 0.5}``, of the first filter."""
    found: dict[str, float] = {}
    for key, value in row.items():
        name, _, kind = key.partition(",")
        if kind and not name.endswith("_stderr") and isinstance(value, int | float):
            found.setdefault(name, float(value))
    return found


def _column(metric: str, rows: Sequence[Mapping[str, Any]], aggregated: float | None) -> npt.NDArray[np.float64] | None:
    """Scores of the examples, whose mean is the metric (a perplexity is exp(-mean)); None if the metric is not such a mean.

    For metrics of the whole set (``mcc``, ``f1``) the harness gives pairs of gold and prediction, for ``bleu`` texts, and for
    perplexities per word a log-likelihood with a count of words. None of these is a score of one example.
    """
    values = [row.get(metric) for row in rows]
    if not all(isinstance(value, int | float | np.number | np.bool_) for value in values):
        return None
    column = np.array(values, np.float64)
    whole = _estimate(metric, column).value
    return column if aggregated is None or math.isclose(aggregated, whole, rel_tol=1e-9, abs_tol=1e-12) else None


def _estimate(metric: str, column: npt.NDArray[np.float64]) -> Estimate:
    """A metric with its standard error: the mean of the examples' scores, or exp(-mean) of their log-likelihoods."""
    mean = float(column.mean())
    error = float(column.std(ddof=1) / math.sqrt(len(column))) if len(column) > 1 else None
    if metric == "perplexity":
        return Estimate(value=math.exp(-mean), stderr=None if error is None else math.exp(-mean) * error)
    return Estimate(value=mean, stderr=error)


def _primary(task: str, metrics: Sequence[str]) -> str:
    order = ("acc_norm", *_METRICS) if task in _NORMALIZED else _METRICS
    return next((name for name in order if name in metrics), metrics[0])
