"""Evaluation against hand computations, PyTorch against bundles, tasks with their prompts, reports, and the command."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("lm_eval", reason="tasks need lm-evaluation-harness: pip install 'balcony-edge[eval]'")


from balcony_edge.bundle.bundle import Bundle, read_manifest
from balcony_edge.bundle.manifest import Estimate
from balcony_edge.bundle.quality import record_quality
from balcony_edge.cli.workstation import eval as verb
from balcony_edge.errors import BalconyError, VerificationError
from balcony_export import precision
from balcony_export.evaluate import text as text_module
from balcony_export.evaluate.lm_eval import BalconyLM, Sweep
from balcony_export.evaluate.report import Report, Table, as_document, build_report, markdown, tables
from balcony_export.evaluate.scorer import BundleScorer, ScoringRequest, TorchScorer
from balcony_export.evaluate.tasks import evaluate_tasks, offline_tasks
from balcony_export.evaluate.text import evaluate_text, ratio_of_sums, tokenized_documents
from balcony_export.model.balcony_files import fingerprint, save_balconies
from balcony_export.precision import read_judged_texts

DATA = Path(__file__).parents[4] / "shared" / "data"
TEXTS = (
    "the quick brown fox jumps over the lazy dog and the balcony",
    "a dog and a fox sat on the balcony; the dog was lazy, the fox was quick, and neither of them jumped at all",
    "over and over the brown fox jumps",
    "1969: the year of the balcony.\n\nThe dog said nothing.",
)


def documents(tokenizer: Any, texts: tuple[str, ...] = TEXTS) -> list[tuple[int, ...]]:
    return [tuple(tokenizer(text).input_ids) for text in texts]


# ---- text


def test_the_full_model_against_itself(bundle_scorer: Any, torch_scorer: Any, tiny: Any) -> None:
    for scorer in (bundle_scorer, torch_scorer):
        full = evaluate_text(scorer, documents(tiny.tokenizer))[5]
        assert full.kl == Estimate(value=0.0, stderr=0.0) and full.agreement == Estimate(value=1.0, stderr=0.0)
        assert full.documents == 4 and full.tokens == sum(len(one) - 1 for one in documents(tiny.tokenizer))


def test_perplexity_kl_and_agreement_by_hand(torch_scorer: TorchScorer, tiny: Any) -> None:
    """Windows of 16 that overlap by one token: every token but the first is predicted once, within its window."""
    (document,) = documents(tiny.tokenizer, TEXTS[1:2])
    found = evaluate_text(torch_scorer, [document], window=16)
    nll, kl, hits, count = 0.0, 0.0, 0, 0
    tokens = torch.tensor(document)
    for start in range(0, len(tokens) - 1, 15):
        piece = tokens[start : start + 16]
        with torch.no_grad():
            out = tiny.model(piece[None, :-1], output_hidden_states=True)
            captured: dict[str, Any] = {}
            handle = tiny.model.model.layers[-1].register_forward_pre_hook(
                lambda _m, _a, kw, into=captured: into.update(kw), with_kwargs=True
            )
            tiny.model(piece[None, :-1], use_cache=False)
            handle.remove()
            shallow = tiny.model.lm_head(tiny.balconies[2](out.hidden_states[2], **captured))[0]
        full = torch.log_softmax(out.logits[0], -1)
        nll -= float(full.gather(1, piece[1:, None]).sum())
        log = torch.log_softmax(shallow, -1)
        kl += float((full.exp() * (full - log)).sum())
        hits += int((log.argmax(-1) == full.argmax(-1)).sum())
        count += len(piece) - 1
    assert found[5].tokens == count == len(tokens) - 1
    assert found[5].perplexity.value == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found[2].kl.value == pytest.approx(kl / count, rel=1e-4)
    assert found[2].agreement.value == pytest.approx(hits / count)
    assert found[2].perplexity.stderr is not None  # one document: its windows are the clusters


def test_documents_are_the_clusters(torch_scorer: TorchScorer, tiny: Any) -> None:
    """Also where a document has several windows; the error of a perplexity is in perplexities, not in nats."""
    texts = documents(tiny.tokenizer)
    each = [evaluate_text(torch_scorer, [one], window=16)[2] for one in texts]
    assert max(one.tokens for one in each) > 15
    found = evaluate_text(torch_scorer, texts, window=16)[2]
    kl = ratio_of_sums([(one.kl.value * one.tokens, one.tokens) for one in each])
    nll = ratio_of_sums([(math.log(one.perplexity.value) * one.tokens, one.tokens) for one in each])
    assert kl.stderr is not None and nll.stderr is not None
    assert found.kl.stderr == pytest.approx(kl.stderr, rel=1e-5)
    assert found.perplexity.stderr == pytest.approx(found.perplexity.value * nll.stderr, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_bundle_and_pytorch_agree_at_every_exit(
    architecture: str, export_tiny: Callable[[str], Any], torch_scorer: Any
) -> None:
    made = export_tiny(architecture)
    bundle = BundleScorer(Bundle.open(made.path))
    model = TorchScorer(made.exits, made.tokenizer)
    texts = documents(made.tokenizer)
    ours, theirs = evaluate_text(bundle, texts, window=20), evaluate_text(model, texts, window=20)
    against = evaluate_text(bundle, texts, window=20, reference=model)
    bundle.close()
    assert list(ours) == list(theirs) == [2, 3, 5]
    assert bundle.parameters == model.parameters
    for exit_layer, quality in ours.items():
        for other in (theirs[exit_layer], against[exit_layer]):
            assert quality.perplexity.value == pytest.approx(other.perplexity.value, rel=1e-4)
            assert quality.kl.value == pytest.approx(other.kl.value, rel=1e-3, abs=1e-6)
            assert quality.agreement.value == pytest.approx(other.agreement.value, abs=0.02)


def test_logits_that_are_not_finite_are_refused(tiny: Any) -> None:
    exits = tiny.exits.copy()
    next(exits.balconies[3].layer.parameters()).data[0, 0] = math.nan
    with pytest.raises(VerificationError, match=r"exit 3 gives logits that are not finite: .*fp16, export with fp32"):
        evaluate_text(TorchScorer(exits, tiny.tokenizer), documents(tiny.tokenizer)[:1])


def test_tasks_refuse_logits_that_are_not_finite(tiny: Any, data: Path) -> None:
    """The harness would take the first choice of each example, which is right for some."""
    exits = tiny.exits.copy()
    next(exits.balconies[3].layer.parameters()).data[0, 0] = math.nan
    refused(
        "exit 3 gives logits that are not finite",
        lambda: evaluate_tasks(TorchScorer(exits, tiny.tokenizer), ["boolq"], data=data),
    )


def test_few_documents_are_clustered_by_windows(torch_scorer: TorchScorer, tiny: Any) -> None:
    """A long document and the rest of another one: the difference of these two is no error."""
    one, two = documents(tiny.tokenizer, TEXTS[:2])
    long, rest = one * 12, two[:4]
    (alone,) = (evaluate_text(torch_scorer, [long], window=16)[2],)
    both = evaluate_text(torch_scorer, [long, rest], window=16)[2]
    assert alone.kl.stderr and both.kl.stderr == pytest.approx(alone.kl.stderr, rel=0.3)


def test_every_window_begins_as_the_model_expects(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later windows get the start token too, and still predict every token once."""
    scorer = TorchScorer(tiny.exits, tiny.tokenizer)
    monkeypatch.setattr(text_module, "start_tokens", lambda _: [7])
    seen: list[ScoringRequest] = []
    logits = scorer.logits
    monkeypatch.setattr(scorer, "logits", lambda requests: seen.extend(requests) or logits(requests))
    tokens = (7, *range(20, 60))
    found = evaluate_text(scorer, [tokens], window=16)[5]
    assert all(request.tokens[0] == 7 and len(request.tokens) <= 15 for request in seen)
    predicted = [token for request in seen for token in request.tokens[len(request.tokens) - request.rows :][1:]]
    assert found.tokens == sum(request.rows for request in seen) == 40 and set(predicted) < set(tokens)
    seen.clear()
    evaluate_text(scorer, [tokens[1:]], window=16)
    assert seen[1].tokens[0] != 7, "a document without it has none"


def test_blocks_and_prefixes_give_the_logits_of_a_whole_pass(
    bundle_scorer: BundleScorer, torch_scorer: TorchScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared, shorter, longer and equal prefixes in any order, with blocks smaller than the requests."""
    monkeypatch.setattr("balcony_export.evaluate.scorer.CHUNK", 3)
    base = tuple(range(20, 60))
    requests = [
        ScoringRequest(base, 10),
        ScoringRequest(base[:30], 30),
        ScoringRequest((*base[:30], 7, 8, 9), 4),
        ScoringRequest(base, 40),
        ScoringRequest((9, 8), 1),
        ScoringRequest((9, 8), 2),
    ]
    whole = list(torch_scorer.logits(requests))
    for mine, theirs in zip(bundle_scorer.logits(requests), whole, strict=True):
        assert (mine.request, mine.start) == (theirs.request, theirs.start)
        for exit_layer, logits in theirs.logits.items():
            torch.testing.assert_close(mine.logits[exit_layer], logits, rtol=1e-4, atol=1e-3)


# ---- tasks


def write_data(directory: Path) -> None:
    """The layout of a data directory, a few rows of each file."""
    subjects = ("old_towns", "rivers")
    shots = [
        {"subject": s, "question": f"{s} {i}?", "choices": ["a", "b", "c", "d"], "answer": "ABCD"[i % 4]}
        for s in subjects
        for i in range(5)
    ]
    files: dict[str, list[dict[str, Any]]] = {
        "arc_easy/test.jsonl": [
            {"id": str(i), "question": "why?", "choices": ["x", "yy", "z"], "gold": i} for i in range(3)
        ],
        "boolq/validation.jsonl": [
            {"idx": 0, "passage": "A -- b", "question": "is it", "choices": ["yes", "no"], "gold": 1}
        ],
        "hellaswag/validation_dev2000.jsonl": [
            {"row": i, "query": f"the fox {i}", "choices": ["jumps", "sits", "is", "was"], "gold": i % 4}
            for i in range(12)
        ],
        "winogrande/xl_validation.jsonl": [
            {"sentence": "Sarah saw Maria so _ said 'hi'.", "option1": "Sarah", "option2": "Maria", "answer": "2"}
        ],
        "lambada_openai/lambada_test.jsonl": [{"text": "the quick brown fox"}, {"text": "the lazy dog"}],
        "mmlu/dev_5shot.jsonl": shots,
        "mmlu/test_dev50.jsonl": [{**shots[i], "question": f"new {i}?", "index": i} for i in (0, 7)],
    }
    files["arc_challenge/test.jsonl"] = files["arc_easy/test.jsonl"]
    for name, rows in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "lambada_standard").mkdir()
    (directory / "lambada_standard/lambada_test_plain_text.txt").write_text("a brown fox\nthe old balcony\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_data(path)
    return path


class Recording:
    """A scorer that keeps the texts of the requests."""

    def __init__(self, scorer: Any) -> None:
        self._scorer = scorer
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def plan(self, requests: list[ScoringRequest]) -> list[int]:
        self.texts = [self._scorer.tokenizer.decode(request.tokens) for request in requests]
        return list(self._scorer.plan(requests))


def test_every_offline_task_runs_with_its_prompts(bundle_scorer: BundleScorer, data: Path) -> None:
    assert len(offline_tasks()) == 9
    recording = Recording(bundle_scorer)
    bundle_scorer.context_length = 4096  # byte-level tokens are many
    try:
        seen: dict[str, list[str]] = {}
        for task in offline_tasks():
            if task in ("hellaswag_10shot", "mmlu"):
                continue  # below
            runs = evaluate_tasks(recording, [task], data=data)
            assert list(runs) == [2, 3, 5]
            seen[task] = recording.texts
            quality = runs[5].qualities[task]
            assert quality.metric == ("acc_norm" if task in ("arc_challenge", "hellaswag") else "acc")
            assert quality.examples == len(runs[5].scores[task])
    finally:
        bundle_scorer.context_length = 256
    assert any(text.startswith("Question: why?\nAnswer: y") for text in seen["arc_easy"])
    assert set(seen["boolq"]) == {"A -- b\nQuestion: is it?\nAnswer: ye", "A -- b\nQuestion: is it?\nAnswer: n"}
    assert any(text.startswith("Sarah saw Maria so Maria said 'hi'") for text in seen["winogrande"])
    assert any(text.startswith("the quick brown") for text in seen["lambada_openai"])


def test_shots_come_from_their_file(bundle_scorer: BundleScorer, data: Path) -> None:
    """The context is cut to 256 tokens from the left; the texts are checked before that, in the task's examples."""
    from balcony_export.evaluate.tasks import _load, _manager, _spec

    specs = {task: _spec(task, data, data / "cache") for task in ("mmlu", "hellaswag_10shot")}
    tasks = _load(_manager(list(specs.values())), specs).harness["tasks"]
    mmlu = [tasks["mmlu"].doc_to_text(doc) for doc in tasks["mmlu"].test_docs()]
    assert mmlu[1].startswith(
        "The following are multiple choice questions (with answers) about rivers.\n\nrivers 0?\nA. a\n"
    )
    assert mmlu[1].endswith("D. d\nAnswer: A\n\nnew 7?\nA. a\nB. b\nC. c\nD. d\nAnswer:") and "old" not in mmlu[1]
    swag = [tasks["hellaswag_10shot"].doc_to_text(doc) for doc in tasks["hellaswag_10shot"].validation_docs()]
    shown = [f"the fox {i} {('jumps', 'sits', 'is', 'was')[i % 4]}\n\n" for i in range(11)]
    assert swag[11] == "".join(shown[:10]) + "the fox 11"
    assert swag[3] == "".join(shown[:3] + shown[4:]) + "the fox 3"  # never its own shot


def test_a_directory_of_data_is_no_pattern(data: Path, tmp_path: Path) -> None:
    from balcony_export.evaluate.tasks import _load, _manager, _spec

    shutil.copytree(data, tmp_path / "run[1]")
    specs = {"arc_easy": _spec("arc_easy", tmp_path / "run[1]", tmp_path / "cache")}
    tasks = _load(_manager(list(specs.values())), specs).harness["tasks"]
    assert len(list(tasks["arc_easy"].test_docs())) > 0


@pytest.mark.slow
@pytest.mark.skipif(
    not DATA.is_dir(), reason="needs the files of docs/evaluation.md in shared/data beside the repository"
)
def test_shared_data_fits_the_task_files(bundle_scorer: BundleScorer) -> None:
    runs = evaluate_tasks(bundle_scorer, offline_tasks(), data=DATA, limit=2)
    assert all(run.qualities[task].examples == 2 for run in runs.values() for task in offline_tasks())
    wiki = list(tokenized_documents(DATA / "wikitext2_raw/wiki.valid.raw", bundle_scorer.tokenizer))
    assert len(wiki) == 60  # the articles of WikiText-2's validation split


# ---- reports and the manifest


def test_report_and_manifest(bundle_copy: Path, data: Path) -> None:
    before = Bundle.open(bundle_copy).manifest
    scorer = BundleScorer(Bundle.open(bundle_copy), threads=1)
    text = {"texts": evaluate_text(scorer, documents(scorer.tokenizer))}
    runs = evaluate_tasks(scorer, ["arc_easy", "lambada_openai"], data=data)
    scorer.close()
    report = build_report(scorer, "itself", text, runs)
    record_quality(bundle_copy, report.qualities, read_manifest(bundle_copy).fingerprint)
    after = Bundle.open(bundle_copy)  # every check of the bundle still holds
    assert after.manifest.fingerprint == before.fingerprint and after.manifest.files == before.files
    assert not list(bundle_copy.rglob("*partial*"))
    kept = {exit_.exit_layer: exit_.quality for exit_ in after.manifest.exits}
    assert kept == report.qualities
    assert kept[2] is not None and set(kept[2].tasks) == {"arc_easy", "lambada_openai"}
    found = tables(report)
    assert found[0].header[:6] == ("exit", "depth", "# params", "ARC-E", "LAMBADA-Op", "avg (drop)")
    assert [row[0] for row in found[0].rows] == ["5", "3", "2"]
    assert "| 5 | 1.00× | 0.1M |" in markdown(report) and "LLM-1B" in markdown(report)
    assert "windows if few documents hold nearly all tokens" in markdown(report)
    document = as_document(report)
    assert [exit_["depth_factor"] for exit_ in document["exits"]] == [0.6, 0.8, 1.0]
    json.dumps(document, allow_nan=False)


def test_no_number_of_a_wide_table_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tasks do not fit 80 columns, which a file or a pipe has as well."""
    numbers = tuple(f"{number}.25" for number in range(101, 115))
    wide = Table("Tasks, tiny", tuple(f"task{number}" for number in numbers), (numbers, numbers))
    monkeypatch.setattr("balcony_export.evaluate.report.tables", lambda _: [wide])
    monkeypatch.setattr(verb, "stdout", Console(file=(shown := io.StringIO()), width=80))
    verb._show(Report("tiny", "itself", ()), as_json=False)
    assert {*numbers, *wide.header} <= set(shown.getvalue().split())


# ---- bad input: one line that says what to do


def bad(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_bad_text(tmp_path: Path, bundle_scorer: BundleScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "empty.txt": (b" \n", "is empty"),
        "short.txt": (b"a", "has 1 token, and"),
        "latin.txt": (b"caf\xe9 au lait", "is not UTF-8 \\(byte 3\\)"),
        "short.jsonl": (b'{"text": "two tokens"}\n{"text": ""}\n', "short.jsonl:2: has 0 tokens"),
        "other.jsonl": (b'{"words": "x"}\n', 'other.jsonl:1: has no "text"'),
        "broken.jsonl": (b"{\n", "broken.jsonl:1: is not JSON"),
    }
    for name, (content, message) in cases.items():
        path = bad(tmp_path, name, content)
        refused(message, lambda path=path: list(tokenized_documents(path, bundle_scorer.tokenizer)))
    early = bad(
        tmp_path, "early.jsonl", b'{"text": "the quick brown fox"}\n{"text": "a dog and a fox"}\n{"text": ""}\n'
    )
    monkeypatch.setattr(precision, "JUDGED_TOKENS", 6)
    (judged,) = read_judged_texts([early], bundle_scorer.tokenizer).values()
    assert [len(one) for one in judged] == [4, 2], "the rest of the file is not tokenized"
    refused("cannot be read", lambda: list(tokenized_documents(tmp_path / "absent.txt", bundle_scorer.tokenizer)))
    refused("takes 2 to 256", lambda: evaluate_text(bundle_scorer, documents(bundle_scorer.tokenizer), window=1000))


def test_bad_tasks_and_exits(tmp_path: Path, bundle_scorer: BundleScorer, tiny: Any, data: Path) -> None:
    refused("--tasks: is empty", lambda: evaluate_tasks(bundle_scorer, [], data=data))
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    (broken / "arc_easy/test.jsonl").write_text("{\n")
    refused("test.jsonl:1: is not JSON", lambda: evaluate_tasks(bundle_scorer, ["arc_easy"], data=broken))
    rows = (broken / "mmlu/test_dev50.jsonl").read_text().replace("rivers", "lakes")
    (broken / "mmlu/test_dev50.jsonl").write_text(rows)
    refused("has no rows of lakes", lambda: evaluate_tasks(bundle_scorer, ["mmlu"], data=broken))
    refused("has no exit 4: it has 2, 3, 5", lambda: BundleScorer(Bundle.open(tiny.path), (4,)))
    refused("exit_layer = 4", lambda: BalconyLM(sweep=Sweep(bundle_scorer), exit_layer=4))
    refused("give either model", BalconyLM)
    refused("a continuation has 300 tokens", lambda: Sweep(bundle_scorer).answers([([1], [2] * 300)], 5))


def refused(pattern: str, action: Callable[[], Any]) -> None:
    with pytest.raises(BalconyError, match=pattern) as caught:
        action()
    assert "\n" not in str(caught.value)


# ---- the command


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        from balcony_edge.cli import app

        try:
            code = app([str(argument) for argument in arguments], standalone_mode=False) or 0
        except BalconyError as error:
            return 1, "", str(error)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_command_on_a_bundle(
    command: Any,
    bundle_copy: Path,
    tiny_checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = bad(tmp_path, "some.jsonl", b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS))
    arguments = ("eval", bundle_copy, "--exits", "3", "--text", text, "--tasks", "arc_easy", "--data", data)
    code, out, _ = command(*arguments, "--limit", 2, "-o", tmp_path / "out", "--json")
    document = json.loads(out)
    assert code == 0 and [exit_["exit_layer"] for exit_ in document["exits"]] == [3, 5]
    assert document["exits"][0]["text"]["some.jsonl"]["documents"] == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "evaluation.md"}
    recorded = Bundle.open(bundle_copy).manifest.exits
    assert recorded[0].quality is None and recorded[1].quality is not None and recorded[2].quality is not None
    only = ("eval", bundle_copy, "--exits", "3", "--tasks", "arc_easy", "--data", data)
    code, _, error = command(*only, "--limit", 1, "-o", tmp_path / "fewer")
    assert code == 1 and "results on 2 examples, which these on 1 would replace" in error
    assert (tmp_path / "fewer" / "evaluation.json").is_file(), "what took hours is not lost"
    assert Bundle.open(bundle_copy).manifest.exits == recorded
    code, _, error = command(*arguments[:-4], "--model", tiny_checkpoint)
    assert code == 0 and "some.jsonl: results that were compared with full depth of" in error and "tiny-llama" in error
    assert "leave --model out to compare with the same" in error
    code, out, _ = command(*arguments, "--no-record", "--device", "auto")
    assert code == 0 and "ARC-E" in out and "retention" in out
    monkeypatch.setattr("balcony_export.evaluate.tasks.evaluate_tasks", lambda *_, **__: pytest.fail("hours too early"))
    code, _, error = command(*arguments, "--window", "5000")
    assert code == 1 and "--window 5000: this model takes 2 to 256" in error
    code, _, error = command(*arguments, "--model", tmp_path / "typo")
    assert code == 1 and "typo" in error


def test_command_on_a_model(command: Any, tiny: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_balconies(tmp_path / "balconies", tiny.balconies, fingerprint(tiny.model))
    text = bad(tmp_path, "some.txt", TEXTS[1].encode())
    code, out, _ = command("eval", tiny_checkpoint, "--balconies", tmp_path / "balconies", "--text", text, "--json")
    document = json.loads(out)
    assert code == 0 and [exit_["exit_layer"] for exit_ in document["exits"]] == [2, 3, 5]
    code, out, _ = command("eval", tiny.path, "--model", tiny_checkpoint, "--text", text, "--json", "--no-record")
    against = json.loads(out)
    assert against["reference"] == "tiny-llama"
    # the bundle holds the balconies in float32, the checkpoint of balconies in bfloat16: the full depth is the same
    assert against["exits"][2]["text"]["some.txt"]["kl"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_command_refuses(command: Any, tiny: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = bad(tmp_path, "t.txt", b"the dog")
    (tmp_path / "sub").mkdir()
    other = bad(tmp_path / "sub", "t.txt", b"the fox")
    cases: dict[str, tuple[Any, ...]] = {
        "no text and no task is given": (tiny.path,),
        "leave --balconies out": (tiny.path, "--balconies", tmp_path, "--text", text),
        "leave --model out": (tiny_checkpoint, "--model", "demo", "--text", text),
        "leave --device and --engines out": (tiny_checkpoint, "--device", "webgpu", "--text", text),
        "give --no-record, too": (tiny.path, "--device", "auto", "--text", text),
        "two files have the name t.txt": (tiny.path, "--text", text, "--text", other),
        "cannot be written": (tiny.path, "--text", text, "--no-record", "-o", text / "x"),
    }
    for message, arguments in cases.items():
        code, _, error = command("eval", *arguments)
        assert code == 1 and message in error and "\n" not in error, error


def test_command_looks_for_tasks_before_it_loads_a_model(
    command: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "_open_bundle", lambda *_: pytest.fail("the model was loaded"))
    cases: dict[str, tuple[Any, ...]] = {
        "has no task 'arc_eazy'": ("arc_eazy",),
        "arc_easy/test.jsonl: is missing": ("arc_easy", "--data", tmp_path),
        f"--data {tmp_path}: sciq would be fetched, and not read from there": ("sciq", "--data", tmp_path),
    }
    for message, arguments in cases.items():
        code, _, error = command("eval", tiny.path, "--no-record", "--tasks", *arguments)
        assert code == 1 and message in error, error
