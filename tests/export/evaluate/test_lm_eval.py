"""The adapter for lm-evaluation-harness, with the harness's own adapter as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="tasks need lm-evaluation-harness: pip install 'balcony-edge[eval]'")

from lm_eval.api.instance import Instance

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError
from balcony_export.evaluate import tasks
from balcony_export.evaluate.lm_eval import BalconyLM, Sweep
from balcony_export.evaluate.scorer import Block, BundleScorer, ScoringRequest, TorchScorer
from balcony_export.export import ExportOptions, export_bundle
from tests.conftest import Exported

TEXTS = (
    "the quick brown fox jumps over the lazy dog and the balcony",
    "a dog and a fox sat on the balcony; the dog was lazy, the fox was quick",
    "over and over the brown fox jumps",
    "1969: the year of the balcony.\n\nThe dog said nothing.",
)


def instances(*pairs: tuple[Any, ...]) -> list[Any]:
    return [Instance("loglikelihood", {}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def oracle(tiny: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=4, device="cpu")


def test_loglikelihoods_equal_the_harness_own_adapter(
    oracle: Any, bundle_scorer: BundleScorer, torch_scorer: TorchScorer
) -> None:
    context = "Question: who jumps over the dog?\nAnswer:"
    requests = instances(
        *((context, f" {answer}") for answer in ("the fox", "the lazy dog", "a", "b", "nobody at all")),
        (context + " ", "the fox"),  # a trailing space belongs to the continuation
        ("", "the quick brown fox"),
        ("x" * 700, " is too long for the context"),
    )
    wanted = oracle.loglikelihood(requests, disable_tqdm=True)
    texts = instances(("the fox. " * 90,), ("dog",))
    rolling = oracle.loglikelihood_rolling(texts, disable_tqdm=True)
    for scorer in (bundle_scorer, torch_scorer):
        lm = BalconyLM(sweep=Sweep(scorer))
        found = lm.loglikelihood(requests)
        np.testing.assert_allclose([a for a, _ in found], [a for a, _ in wanted], atol=1e-3, rtol=1e-6)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        np.testing.assert_allclose(lm.loglikelihood_rolling(texts), rolling, rtol=1e-6)


def test_generation_equals_the_harness_own_adapter_and_stops(
    oracle: Any, bundle_scorer: BundleScorer, torch_scorer: TorchScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"until": ["zzz"], "do_sample": False, "max_gen_toks": 24}
    requests = instances(*(("the quick brown", options), ("a dog", options)))
    wanted = oracle.generate_until(requests, disable_tqdm=True)
    # a prompt that leaves no room in the context of 256 for 24 tokens loses its beginning
    long = instances(("the fox. " * 90 + "a dog", options))
    wanted_long = oracle.generate_until(long, disable_tqdm=True)
    stop = wanted[0][5:7]
    for scorer in (bundle_scorer, torch_scorer):
        lm = BalconyLM(sweep=Sweep(scorer))
        assert lm.generate_until(requests) == wanted
        assert lm.generate_until(long) == wanted_long
        (cut,) = lm.generate_until(instances(("the quick brown", {"until": [stop], "max_gen_toks": 24})))
        assert cut == wanted[0].split(stop)[0]
        # the names that transformers has for the limit, and every token that ends a text
        (short,) = lm.generate_until(instances(("the quick brown", {"max_new_tokens": 5})))
        made = list(scorer.greedy(5, scorer.tokenizer.encode("the quick brown"), 24))
        assert short == scorer.tokenizer.decode(made[:5], skip_special_tokens=True)
        with monkeypatch.context() as patch:
            patch.setattr(scorer, "eos_ids", frozenset({made[7]}))
            (ended,) = lm.generate_until(instances(("the quick brown", options)))
        assert ended == scorer.tokenizer.decode(made[: made.index(made[7])], skip_special_tokens=True)
    for sampled in ({"do_sample": True, "temperature": 0.7}, {"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(InputError, match="samples"):
            lm.generate_until(instances(("a", sampled)))
    with pytest.raises(InputError, match="asks for 999 new tokens, and the context holds 256"):
        lm.generate_until(instances(("a", {"max_gen_toks": 999})))
    shallow = [
        BalconyLM(sweep=Sweep(scorer), exit_layer=2).generate_until(requests)
        for scorer in (bundle_scorer, torch_scorer)
    ]
    assert shallow[0] == shallow[1] != wanted


def test_a_base_model_begins_a_text_as_its_own_tokenizer_does(
    tiny: Any, make_tokenizer: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration has a bos_token_id by default (1 in a Llama), whatever its tokenizer has."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    monkeypatch.setattr(tiny.exits.model.config, "bos_token_id", 7)
    options = ExportOptions("base", trained=True)
    export_bundle(tiny.exits, tokenizer, tmp_path / "base", options, traced=tiny.traced)
    bundle = BundleScorer(Bundle.open(tmp_path / "base"))
    ours, own = (BalconyLM(sweep=Sweep(one)) for one in (bundle, TorchScorer(tiny.exits, tokenizer)))
    bundle.close()
    assert ours.prefix_token_id == own.prefix_token_id == tokenizer.eos_token_id != 7


def test_a_template_that_refuses_the_system_role_is_written_as_by_the_harness_own_adapter(
    oracle: Any, torch_scorer: TorchScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness makes a task's description a system message (MMLU), and Gemma 2's template refuses those."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = refuses + "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    for one in (oracle, torch_scorer):
        monkeypatch.setattr(one.tokenizer, "chat_template", template)
    chat = [{"role": "system", "content": "about rivers"}, {"role": "user", "content": "why?"}]
    found, wanted = (one.apply_chat_template(chat) for one in (BalconyLM(sweep=Sweep(torch_scorer)), oracle))
    assert found == wanted == "<user>why?\n"


def test_a_task_file_gives_the_harness_own_scores(
    oracle: Any, bundle_scorer: BundleScorer, tmp_path: Path, tiny: Any
) -> None:
    """A YAML task over a local file, through lm_eval itself, on every exit; the full depth against the hf adapter."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"q": text[:20], "c": [text[20:30], "dog", "the fox"], "g": i % 3} for i, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\nnum_fewshot: 0\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        'doc_to_text: "Q: {{q}}\\nA:"\ndoc_to_choice: c\ndoc_to_target: g\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = {}
    models = {
        "hf": (oracle, {}),
        "bundle": ("balcony", {"bundle": str(tiny.path)}),
        "shallow": ("balcony", {"bundle": str(tiny.path), "exit_layer": 2}),
        "sweep": (BalconyLM(sweep=Sweep(bundle_scorer), exit_layer=2), {}),
    }
    for name, (model, arguments) in models.items():
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        results = lm_eval.simple_evaluate(model, arguments, tasks=["tiny"], task_manager=manager, bootstrap_iters=0)
        found[name] = [[answer[0] for answer in sample["filtered_resps"]] for sample in results["samples"]["tiny"]]
    np.testing.assert_allclose(found["bundle"], found["hf"], atol=1e-4, rtol=1e-6)
    np.testing.assert_allclose(found["shallow"], found["sweep"], atol=1e-4)
    assert np.abs(np.subtract(found["shallow"], found["hf"])).max() > 0.1


def test_what_a_task_prints_is_no_part_of_a_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eval --json`: med_prescriptions prints the number of its examples, cnn_dailymail what is not installed."""

    class Talking:
        all_tasks = ("talk",)

        def load(self, _: list[Any]) -> dict[str, Any]:
            print("Final len filtered dataset: 9")  # noqa: T201 - as the task does
            return {"tasks": {}}

    monkeypatch.setattr(tasks, "_index", lambda _: Talking())
    with tasks._loaded(["talk"], None) as loaded:
        print("while the examples run")  # noqa: T201 - likewise
    assert loaded.leaves == {"talk": ()} and capsys.readouterr().out == ""


class Counting:
    """A scorer that counts the requests that reach it."""

    def __init__(self, scorer: Any) -> None:
        self._scorer, self.requests = scorer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def logits(self, requests: list[ScoringRequest]) -> Iterator[Block]:
        self.requests += len(requests)
        return self._scorer.logits(requests)


def test_exits_share_one_sweep(bundle_scorer: BundleScorer) -> None:
    counting = Counting(bundle_scorer)
    sweep = Sweep(counting)
    pairs = [([9, 8, 7], [3]), ([9, 8, 7], [4]), ([9, 8, 7], [5, 6, 5]), ([9, 8, 7, 5], [6, 5])]
    answers = {e: sweep.answers(pairs, e) for e in (2, 3, 5)}
    assert counting.requests == 2  # the first two are one input, and so are the last two
    assert len({tuple(answer) for answer in answers.values()}) == 3
    requests = instances(("the dog", " sits"), ("the dog", " jumps over"))
    for exit_layer in (2, 3, 5):
        BalconyLM(sweep=sweep, exit_layer=exit_layer).loglikelihood(requests)
    assert counting.requests == 4


@pytest.mark.parametrize("name", ["lfm2", "granite-hybrid", "qwen3.5", "olmoe"])
def test_other_backbones_equal_the_harness_own_adapter(family: Callable[[str], Exported], name: str) -> None:
    """Convolutions, recurrent states of two kinds, and a mixture: scores of several lengths, and a reply."""
    from lm_eval.models.huggingface import HFLM

    made = family(name)
    exits, tokenizer = made.exits, made.tokenizer
    scorer = BundleScorer(Bundle.open(made.path))
    # one request at a time, so that no padding passes through a recurrent layer
    oracle = HFLM(pretrained=exits.model, tokenizer=tokenizer, batch_size=1, device="cpu")
    context = "Question: who jumps over the dog?\nAnswer:"
    requests = instances(*((context, f" {answer}") for answer in ("the fox", "the lazy dog", "a")), ("", TEXTS[0]))
    wanted = oracle.loglikelihood(requests, disable_tqdm=True)
    texts = instances(("the fox. " * 90,), (TEXTS[3],))  # the first one is longer than the model's context
    rolling = oracle.loglikelihood_rolling(texts, disable_tqdm=True)
    prompts = instances(("the quick brown", {"until": ["zzz"], "do_sample": False, "max_gen_toks": 12}))
    reply = oracle.generate_until(prompts, disable_tqdm=True)
    try:
        for one in (scorer, TorchScorer(exits, tokenizer, name=name)):
            lm = BalconyLM(sweep=Sweep(one))
            found = lm.loglikelihood(requests)
            np.testing.assert_allclose([a for a, _ in found], [a for a, _ in wanted], atol=2e-3, rtol=1e-5)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
            np.testing.assert_allclose(lm.loglikelihood_rolling(texts), rolling, rtol=1e-5)
            assert lm.generate_until(prompts) == reply
    finally:
        scorer.close()
