"""The statistics of evaluation computed by hand, their entries in the manifest, and wrong data files."""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
import random
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from balcony_export.evaluate.scorer import BundleScorer

pytest.importorskip("lm_eval", reason="tasks need lm-evaluation-harness: pip install 'balcony-edge[eval]'")

from balcony_edge.bundle.bundle import read_manifest
from balcony_edge.bundle.manifest import Estimate, Quality, TaskQuality, TaskSummary, TextQuality
from balcony_edge.bundle.quality import record_quality
from balcony_edge.cli.workstation.eval import _dropped, _keep
from balcony_edge.errors import BundleError, InputError
from balcony_export.evaluate.report import (
    _TITLES,
    PAPER_LLM_1B,
    ExitReport,
    Report,
    _task_row,
    markdown,
    paper_retention,
    tables,
)
from balcony_export.evaluate.tasks import TaskRun, _load, _loaded, _primary, _run, _spec, evaluate_tasks, offline_tasks
from balcony_export.evaluate.text import _add, _Sums, ratio_of_sums

ONE = Estimate(value=1.0)


def test_standard_error_of_a_ratio() -> None:
    values = [1.0, 3.0, 2.0, 6.0]
    found = ratio_of_sums(
        [(5 * v, 5) for v in values]
    )  # clusters of equal size: the plain standard error of their means
    assert found.value == 3.0 and found.stderr == pytest.approx(np.std(values, ddof=1) / 2)
    assert ratio_of_sums([(3.0, 4)]) == Estimate(value=0.75)
    # of unequal size: 1.5 per token, residuals 0.5, -3 and 2.5, and 3 / 2 of their squares over 10 tokens
    unequal = ratio_of_sums([(2.0, 1), (3.0, 4), (10.0, 5)])
    assert unequal.value == pytest.approx(1.5)
    assert unequal.stderr == pytest.approx(math.sqrt(1.5 * 15.5) / 10)


def test_the_full_depth_agrees_with_itself() -> None:
    """Two logits that differ in their last bit have one log-probability, because its last bit is worth more."""
    logits = torch.zeros(1, 1002)
    logits[0, :2] = torch.tensor([1.0, 1.0 + 2**-23])
    sums: dict[int, dict[int, _Sums]] = {30: {0: _Sums()}}
    _add(sums, 0, {30: logits}, logits, torch.tensor([0]))
    assert sums[30][0].hits == 1.0


def test_summary_pairs_examples() -> None:
    def run(*scores: list[float]) -> TaskRun:
        names = [f"t{i}" for i in range(len(scores))]
        quality = TaskQuality(metric="acc", examples=4, metrics={})
        return TaskRun(dict.fromkeys(names, quality), {n: np.array(s) for n, s in zip(names, scores, strict=True)})

    full, exit_ = run([1, 1, 0, 1], [1, 0, 0, 1]), run([1, 0, 0, 1], [1, 0, 0, 1])
    summary = exit_.summary(full)
    assert summary is not None and summary.retention is not None
    assert (summary.average.value, summary.drop.value) == (50.0, -12.5)
    assert summary.retention.value == pytest.approx(80.0)
    # residuals exit - 0.8 full: (0.2, -0.8, 0, 0.2) and (0.2, 0, 0, 0.2), variances of their means 0.17 / 3 and 0.01 / 3
    assert summary.retention.stderr == pytest.approx(100 * math.sqrt(0.18 / 3) / 2 / 0.625)
    # one of two tasks differs in one of four pairs: (0, -1, 0, 0) has standard error 0.25, the other 0
    assert summary.drop.stderr == pytest.approx(100 * 0.25 / 2)
    same = full.summary(full)
    assert same is not None and same.retention == Estimate(value=100.0, stderr=0.0) and same.drop.stderr == 0.0
    nothing = run([0, 0, 0, 0])
    assert (summary := nothing.summary(nothing)) is not None and summary.retention is None


def harness(task: str, metric: str, whole: float, values: list[Any]) -> dict[str, Any]:
    """Results in the harness's form: one metric of one task."""
    rows = [{"filter": "none", metric: value, "filtered_resps": ["x"]} for value in values]
    return {"results": {task: {f"{metric},none": whole, "alias": task}}, "samples": {task: rows}}


def test_a_metric_of_the_whole_is_no_score_of_its_examples() -> None:
    # Matthews' correlation: the harness gives pairs of gold and prediction, here all wrong
    run = _run({"cola": ["cola"]}, harness("cola", "mcc", -1.0, [(1, 0), (0, 1), (1, 0)]))
    assert run.qualities["cola"] == TaskQuality(metric="mcc", examples=3, metrics={"mcc": Estimate(value=-1.0)})
    assert run.scores == {} and run.summary(run) is None
    texts = _run({"wmt": ["wmt"]}, harness("wmt", "bleu", 12.5, [("a", "b"), ("c", "c")]))
    assert texts.qualities["wmt"].metrics == {"bleu": Estimate(value=12.5)} and texts.scores == {}
    # a share is shown in percent; what is out of 100 already is not
    for name, value, shown in (
        ("bleu", 12.5, "12.5"),
        ("f1", 50.0, "50.0"),
        ("acc", 0.25, "25.0"),
        ("perplexity", 9.0, "9.0"),
    ):
        quality = Quality(
            reference="full", tasks={"t": TaskQuality(metric=name, examples=3, metrics={name: Estimate(value=value)})}
        )
        report = ExitReport(exit_layer=2, depth_factor=0.4, parameters=10, quality=quality)
        assert shown in _task_row(report, ("t",))
    averaged = TaskSummary(tasks=("t",), average=ONE, drop=ONE, retention=None)
    tasks = {"t": TaskQuality(metric="f1", examples=3, metrics={"f1": Estimate(value=0.612)})}
    quality = Quality(reference="full", tasks=tasks, summary=averaged)
    assert "61.2" in _task_row(ExitReport(2, 0.4, 10, quality), ("t",)), "its examples have scores from 0 to 1"
    with pytest.raises(InputError, match="'glue' has no score per example"):
        _run({"glue": ["cola"] * 2}, harness("cola", "mcc", -1.0, [(1, 0), (0, 1)]))


def test_the_rows_of_both_tables_by_hand() -> None:
    """Shares in percent with their errors, also of the drop and the retention; perplexity and KL as they are."""
    text = TextQuality(
        documents=2, tokens=9, window=8, perplexity=Estimate(value=12.346, stderr=0.128),
        kl=Estimate(value=0.25, stderr=0.0123), agreement=Estimate(value=0.875, stderr=0.0612),
    )  # fmt: skip
    task = TaskQuality(metric="acc", examples=3, metrics={"acc": Estimate(value=0.25, stderr=0.128)})
    summary = TaskSummary(
        tasks=("t",), average=Estimate(value=50.0, stderr=1.5), drop=Estimate(value=-12.5, stderr=2.5),
        retention=Estimate(value=80.0, stderr=3.5),
    )  # fmt: skip
    quality = Quality(reference="full", text={"x": text}, tasks={"t": task}, summary=summary)
    tasks, texts = tables(Report("m", "full", (ExitReport(2, 0.4, 1_234_567, quality),)))
    lead = ("2", "0.40×", "1.2M")
    assert tasks.rows == ((*lead, "25.0 ± 12.8", "50.0 ± 1.5 (-12.5 ± 2.5)", "80.0 ± 3.5 %"),)
    assert texts.rows == ((*lead, "12.35 ± 0.13", "0.2500 ± 0.0123", "87.5 ± 6.1 %"),)


def test_accuracies_and_perplexities_are_scored_by_example() -> None:
    run = _run({"t": ["t"]}, harness("t", "acc", 0.75, [1.0, 1.0, 0.0, 1.0]))
    assert run.scores["t"].tolist() == [1, 1, 0, 1]
    assert run.qualities["t"].metrics["acc"] == Estimate(value=0.75, stderr=0.25)
    logs = [-1.0, -3.0]
    for leaves in (["p"], ["p", "p"]):  # a group has no aggregate: its parts' examples are put together
        run = _run({"p": leaves}, harness("p", "perplexity", math.exp(2.0), logs))
        found = run.qualities["p"].metrics["perplexity"]
        assert found.value == pytest.approx(math.exp(2.0)) and found.stderr is not None
        assert run.summary(run) is None  # no accuracy
    assert found.stderr == pytest.approx(math.exp(2.0) * math.sqrt(4 / 3) / 2)
    # points out of 100 are not a share: an average of them and accuracies would be meaningless
    run = _run({"f": ["f"]}, harness("f", "f1", 50.0, [0.0, 100.0]))
    assert run.qualities["f"].metrics["f1"].value == 50.0 and run.summary(run) is None


def test_a_group_without_a_shared_metric_is_refused_before_it_runs() -> None:
    """GLUE's parts have Matthews' correlation or accuracy; found at the end, it would cost the results of other tasks."""

    def parts(**metrics: tuple[str, ...]) -> Any:
        tasks = {name: SimpleNamespace(aggregation=lambda own=own: dict.fromkeys(own)) for name, own in metrics.items()}
        return SimpleNamespace(load=lambda _: {"tasks": tasks})

    assert _load(parts(mrpc=("acc", "f1"), sst2=("acc",)), {"some": "some"}).leaves == {"some": ("mrpc", "sst2")}
    with pytest.raises(InputError, match="'glue' has no score per example that all its parts share: name its parts"):
        _load(parts(cola=("mcc",), sst2=("acc",)), {"glue": "glue"})


def test_a_group_that_only_shares_metrics_of_the_whole_set_is_refused_before_it_runs() -> None:
    """As the harness's `iwslt2017`, whose parts have bleu, ter and chrf."""
    metrics = pytest.importorskip("lm_eval.api.metrics")
    task = SimpleNamespace(aggregation=lambda: {name: getattr(metrics, name) for name in ("bleu", "ter", "chrf")})
    manager = SimpleNamespace(load=lambda _: {"tasks": {"ar-en": task, "en-ar": task}})
    with pytest.raises(InputError, match="'iwslt2017' has no score per example that all its parts share"):
        _load(manager, {"iwslt2017": "iwslt2017"})


def test_a_task_of_two_names_is_refused() -> None:
    """A tag's own `arc_easy` has other prompts and examples than that of ``--data``; one would be taken for both."""

    def load(specs: list[str]) -> dict[str, Any]:
        (names,) = specs
        return {"tasks": {name: SimpleNamespace(aggregation=lambda: {"acc": None}) for name in names.split("+")}}

    manager = SimpleNamespace(load=load)
    apart = {"arc_easy": "arc_easy", "others": "boolq+piqa"}
    assert _load(manager, apart).leaves == {"arc_easy": ("arc_easy",), "others": ("boolq", "piqa")}
    with pytest.raises(InputError, match="'arc_easy' belongs to 'ai2_arc' and to an earlier name"):
        _load(manager, {"arc_easy": "arc_easy", "ai2_arc": "arc_challenge+arc_easy"})


@pytest.mark.parametrize(("mark", "words"), [("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "has images or sound")])
def test_tasks_that_the_harness_itself_refuses_are_refused_in_one_line(mark: str, words: str) -> None:
    task = SimpleNamespace(aggregation=lambda: {"acc": None}, **{mark: True})
    with pytest.raises(InputError, match=f"--tasks: 'part' {words}"):
        _load(SimpleNamespace(load=lambda _: {"tasks": {"part": task}}), {"group": "group"})


# ---- the manifest


def test_recording_adds_and_never_mixes_references(bundle_copy: Path) -> None:
    def text(name: str, reference: str) -> Quality:
        one = Estimate(value=1.0)
        found = TextQuality(documents=1, tokens=9, window=8, perplexity=one, kl=one, agreement=one)
        return Quality(reference=reference, text={name: found})

    task = TaskQuality(metric="acc", examples=3, metrics={"acc": Estimate(value=0.5, stderr=0.1)})
    own = read_manifest(bundle_copy).fingerprint
    record_quality(bundle_copy, {2: text("a", "x")}, own)
    record_quality(bundle_copy, {2: Quality(reference="x", tasks={"t": task})}, own)
    manifest = record_quality(bundle_copy, {2: text("b", "x")}, own)
    quality = manifest.exits[0].quality
    assert quality is not None and set(quality.text) == {"a", "b"} and set(quality.tasks) == {"t"}
    assert manifest.exits[1].quality is None
    quality = record_quality(bundle_copy, {2: text("c", "y")}, own).exits[0].quality
    assert (
        quality is not None and set(quality.text) == {"c"} and quality.reference == "y" and set(quality.tasks) == {"t"}
    )
    with pytest.raises(BundleError, match="has no exit 4: it has 2, 3, 5"):
        record_quality(bundle_copy, {4: text("a", "x")}, own)
    with pytest.raises(BundleError, match="another bundle has taken its place while it was measured: measure again"):
        record_quality(bundle_copy, {2: text("a", "x")}, "0" * 64)


def test_exits_keep_only_what_can_stand_beside_each_other(bundle_copy: Path) -> None:
    def quality(tokens: int, window: int, examples: int, *tasks: str) -> Quality:
        text = TextQuality(documents=1, tokens=tokens, window=window, perplexity=ONE, kl=ONE, agreement=ONE)
        task = TaskQuality(metric="acc", examples=examples, metrics={"acc": ONE})
        summary = TaskSummary(tasks=tasks, average=ONE, drop=ONE, retention=None)
        return Quality(reference="x", text={"a": text}, tasks=dict.fromkeys(tasks, task), summary=summary)

    own = read_manifest(bundle_copy).fingerprint

    def recorded(*layers: int, of: Quality) -> list[Quality | None]:
        return [exit_.quality for exit_ in record_quality(bundle_copy, dict.fromkeys(layers, of), own).exits]

    whole = quality(9, 8, 30, "s", "t", "u")
    recorded(2, 3, 5, of=whole)
    assert recorded(2, 5, of=whole) == [whole] * 3  # the same rows again
    other_window = quality(9, 4, 30, "s")
    two, three, five = recorded(2, 5, of=other_window)
    assert two == five and two is not None and two.text == other_window.text
    assert three is not None and three.text == {} and three.tasks == whole.tasks  # the same examples of the task
    assert three.summary is None  # an average over tasks that the other exits no longer have
    fewer = quality(9, 4, 7, "s")
    two, three, five = recorded(2, 5, of=fewer)
    assert two is not None and three is not None and two.tasks["s"].examples == 7 and two.tasks["t"].examples == 30
    assert set(three.tasks) == {"t", "u"} and three.summary is None and two.summary == fewer.summary
    # an average over several tasks outlives one over another task, until one of its own is measured again
    recorded(2, 3, 5, of=whole)
    two, *_ = recorded(2, 3, 5, of=quality(9, 8, 30, "v"))
    assert two is not None and two.summary == whole.summary and set(two.tasks) == {"s", "t", "u", "v"}
    again = quality(9, 8, 30, "t")
    two, *_ = recorded(2, 3, 5, of=again)
    assert two is not None and two.summary == again.summary


def test_every_text_that_is_dropped_is_named(bundle_copy: Path) -> None:
    """Also one that only some exits have, after a run with --exits and another model."""

    def text(name: str, reference: str) -> Quality:
        found = TextQuality(documents=1, tokens=9, window=8, perplexity=ONE, kl=ONE, agreement=ONE)
        return Quality(reference=reference, text={name: found})

    own = read_manifest(bundle_copy).fingerprint
    record_quality(bundle_copy, dict.fromkeys((2, 3, 5), text("a", "own depth")), own)
    before = record_quality(bundle_copy, dict.fromkeys((3, 5), text("b", "a model")), own)
    now = text("c", "own depth")
    report = Report("m", now.reference, tuple(ExitReport(layer, 1.0, 10, now) for layer in (2, 3, 5)))
    (line,) = _dropped(before, report)
    assert line.startswith("b: results that were compared with a model are dropped")
    after = record_quality(bundle_copy, report.qualities, own)
    assert [set(exit_.quality.text) for exit_ in after.exits if exit_.quality is not None] == [{"c"}] * 3


def test_only_a_run_with_a_limit_is_refused_for_fewer_examples(bundle_copy: Path) -> None:
    """Other files of a task may have fewer, such as a sample of HellaSwag: a run over all of them replaces the results."""

    def report(examples: int) -> Report:
        task = TaskQuality(metric="acc", examples=examples, metrics={"acc": ONE})
        found = Quality(reference="x", tasks={"t": task})
        return Report("m", "x", tuple(ExitReport(layer, 1.0, 10, found) for layer in (2, 3, 5)))

    record_quality(bundle_copy, report(30).qualities, read_manifest(bundle_copy).fingerprint)
    before = read_manifest(bundle_copy)
    with pytest.raises(InputError, match="t: the bundle has results on 30 examples, which these on 7 would replace"):
        _keep(bundle_copy, before, report(7), limit=7)
    assert read_manifest(bundle_copy) == before
    _keep(bundle_copy, before, report(7), limit=None)
    assert [one.quality and one.quality.tasks["t"].examples for one in read_manifest(bundle_copy).exits] == [7] * 3


# ---- data files


@pytest.mark.parametrize(
    ("task", "file", "content", "words"),
    [
        ("arc_easy", "arc_easy/test.jsonl", b"{\n", r"test\.jsonl:1: is not JSON"),
        ("arc_easy", "arc_easy/test.jsonl", b"", r"test\.jsonl: is empty"),
        (
            "arc_easy",
            "arc_easy/test.jsonl",
            b'{"question": "why", "choices": ["a", "b"]}\n',
            r"test\.jsonl:1: has no gold",
        ),
        *(
            (
                "arc_easy",
                "arc_easy/test.jsonl",
                b'{"question": "why", "choices": ["a", "b"], "gold": ' + gold + b"}\n",
                r"test\.jsonl:1: gold = .*: must be the index of a choice: give 0 to 1",
            )
            for gold in (b"-1", b"2", b'"A"', b"true")
        ),
        ("lambada_openai", "lambada_openai/lambada_test.jsonl", b'{"text": "a b"}\n{"txt": 1}\n', r":2: has no text"),
        ("mmlu", "mmlu/dev_5shot.jsonl", b"{", r"dev_5shot\.jsonl:1: is not JSON"),
        ("mmlu", "mmlu/dev_5shot.jsonl", b"\xff\xfe", r"dev_5shot\.jsonl:1: is not UTF-8"),
        (
            "mmlu",
            "mmlu/dev_5shot.jsonl",
            b'{"question": "q", "choices": "abcd", "answer": "A"}\n',
            r":1: has no subject",
        ),
        (
            "mmlu",
            "mmlu/dev_5shot.jsonl",
            b'{"subject": ["law"], "question": "q", "choices": ["a", "b", "c", "d"], "answer": "A"}\n',
            r"dev_5shot\.jsonl: subject = \['law'\]: must be a text",
        ),
        (
            "mmlu",
            "mmlu/dev_5shot.jsonl",
            b'{"subject": "law", "question": "q", "choices": ["a", "b", "c", "d"], "answer": "A"}\n' * 4,
            r"has 4 rows of law, but 5 are shown",
        ),
        *(
            (
                "mmlu",
                f"mmlu/{name}.jsonl",
                b'{"subject": "law", "question": "q", "choices": ' + choices + b', "answer": ' + answer + b"}\n",
                words,
            )
            for name in ("test_dev50", "dev_5shot")
            for choices, answer, words in (
                (b'["a", "b", "c", "d"]', b"0", r":1: answer = 0: must be a text: give one of A, B, C, D"),
                (b'["a", "b", "c"]', b'"A"', r":1: choices = .*: must be a list of 4 texts"),
                (b'"abcd"', b'"A"', r":1: choices = 'abcd': must be a list of 4 texts"),
            )
        ),
        (
            "winogrande",
            "winogrande/xl_validation.jsonl",
            b'{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": ""}\n',
            r":1: answer = '': must be a text: give one of 1, 2",
        ),
    ],
)
def test_data_files_that_are_wrong(task: str, file: str, content: bytes, words: str, tmp_path: Path) -> None:
    good = {"subject": "law", "question": "q", "choices": ["a", "b", "c", "d"], "answer": "A"}
    for name, lines in (("mmlu/test_dev50.jsonl", [good]), (file, [])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=words):
        _spec(task, tmp_path, tmp_path / "cache")


def test_the_examples_of_a_task_do_not_depend_on_the_tasks_before_it() -> None:
    """Some tasks shuffle the choices when they are read, e.g. GPQA's."""

    def read(specs: list[str]) -> dict[str, Any]:
        return {"tasks": {specs[0]: SimpleNamespace(order=random.random(), aggregation=lambda: {"acc": np.mean})}}

    both, alone = (
        _load(SimpleNamespace(load=read), dict(zip(names, names, strict=True))).harness["tasks"]
        for names in (("gpqa_diamond_zeroshot", "gpqa_main_zeroshot"), ("gpqa_main_zeroshot",))
    )
    assert both["gpqa_main_zeroshot"].order == alone["gpqa_main_zeroshot"].order


@pytest.mark.parametrize(("task", "metric"), [("openbookqa", "acc"), ("piqa", "acc"), ("arc_challenge", "acc_norm")])
def test_the_metric_of_a_task_of_the_paper(task: str, metric: str) -> None:
    """Table 4 has OpenBookQA down to 13.6 %, far below the chance of four choices: its acc, not normalized by length."""
    assert _primary(task, ("acc", "acc_norm")) == metric


def test_the_page_names_the_tasks_of_the_paper_that_have_no_files() -> None:
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    fetched = sorted(_TITLES.keys() - set(offline_tasks()), reverse=True)
    assert f"Of its ten tasks {' and '.join(f'`{task}`' for task in fetched)} have no files here" in page


def test_the_page_converts_hellaswag_as_the_harness_does() -> None:
    """Marks of WikiHow such as [title] and [step] would be scored as text."""
    code = inspect.getsource(pytest.importorskip("lm_eval.tasks.hellaswag.utils"))
    assert 'doc["ctx_b"].capitalize()' in code and 'replace(" [title]", ". ")' in code
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    (rule,) = re.findall(r"^- HellaSwag has (?:.+\n)+?(?=- )", page, re.MULTILINE)
    for step in ("`capitalize`", "` [title]` into `. `", "remove square brackets", "two spaces into one"):
        assert step in rule


def test_the_page_says_what_a_later_window_begins_with() -> None:
    """Perplexities follow from it: a model that expects its start token fails without it."""
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    assert "gets it at the beginning of every window" in page.split("## Text")[1].split("## Tasks")[0]


def test_the_notes_do_not_say_that_a_token_reads_all_experts() -> None:
    quality = Quality(reference="full", tasks={"t": TaskQuality(metric="acc", examples=3, metrics={"acc": ONE})})
    notes = markdown(Report("mixtral", "full", (ExitReport(2, 1.0, 46_700_000_000, quality),)))
    assert "that a token reads" not in notes and "of a mixture of experts, all" in notes


def test_the_page_and_the_report_have_the_same_figures_of_the_paper() -> None:
    """Table 4's averages on a frozen base, whose shares of the full model `eval` prints."""
    page = (Path(__file__).parents[3] / "docs/variants.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| balconies on a frozen base \| (.+) \|$", page, re.MULTILINE)
    means = [sum(scores) / 10 for scores in zip(*PAPER_LLM_1B.values(), strict=True)]
    assert sorted(means) == pytest.approx(list(map(float, row.split(" | "))), abs=0.06)
    assert paper_retention(PAPER_LLM_1B) == {0.81: 92.6, 0.56: 79.7, 0.31: 70.3}


def test_the_paper_is_compared_on_the_tasks_of_the_table() -> None:
    """Two of its ten tasks are near chance even at full depth, so an average over all ten falls less."""
    one = Estimate(value=50.0)
    summary = TaskSummary(tasks=("arc_easy", "hellaswag", "lambada_openai"), average=one, drop=one, retention=one)
    tasks = {name: TaskQuality(metric="acc", examples=3, metrics={"acc": ONE}) for name in summary.tasks}
    quality = Quality(reference="full", tasks=tasks, summary=summary)
    notes = markdown(Report("demo", "full", (ExitReport(30, 1.0, 10, quality),)))
    told = "89.3 % at 0.81×, 70.7 % at 0.56×, 56.9 % at 0.31× of its average over ARC-E, LAMBADA-Op."
    assert f"On tasks of this table: {told}" in notes


def test_the_readme_names_the_model_and_the_tasks_of_the_papers_figures() -> None:
    """Over its own ten tasks it keeps 70 to 93 %, and its LLaMA models keep 85 to 87 % at half of the depth (Table 1)."""
    text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    told = re.search(r"On these tasks the paper's LLM-1B keeps (\d+), (\d+), (\d+) % at 0\.31, 0\.56, 0\.81×", text)
    kept = paper_retention(("arc_easy", "hellaswag_10shot", "lambada_openai"))
    assert told is not None and list(map(int, told.groups())) == [round(kept[share]) for share in sorted(kept)]


def test_the_page_has_all_of_table_4() -> None:
    """Sorted fine-tuning was left out, where the paper and the page's own figures differ most."""
    page = (Path(__file__).parents[3] / "docs/variants.md").read_text(encoding="utf-8")
    table = page.split("| the paper's Table 4,", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| (balconies|sorted)\b[^|]* \| ([^|]+) \| .+ \| ([^|]+) \|$", table, re.MULTILINE)
    assert rows == [
        ("balconies", "35.2", "50.1"),
        ("sorted", "31.0", "45.8"),
        ("balconies", "41.8", "48.8"),
        ("sorted", "40.0", "47.2"),
    ]


def test_tasks_where_nothing_can_be_written_are_one_line(
    bundle_scorer: BundleScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose file systems are all read-only."""

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(InputError, match="name one in TMPDIR"):
        evaluate_tasks(bundle_scorer, ["arc_easy"])


def test_files_that_cannot_be_removed_lose_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows removes no file that is mapped, as the readers' copies are."""
    (tmp_path / "boolq").mkdir()
    row = {"passage": "A -- b", "question": "is it", "choices": ["yes", "no"], "gold": 1}
    (tmp_path / "boolq/validation.jsonl").write_text(json.dumps(row) + "\n")
    unlink = os.unlink

    def refuse(path: Any, **options: Any) -> None:
        if os.fspath(path).endswith(".arrow"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        unlink(path, **options)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "unlink", refuse)
    with _loaded(["boolq"], tmp_path) as loaded:
        assert loaded.leaves == {"boolq": ("boolq",)}
    assert list(tmp_path.glob("balcony-eval-*/**/*.arrow")), "one was refused"
