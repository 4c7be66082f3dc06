"""The parts of distillation: the loss against its definition, data, the order of rows, schedules, recipes."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn

from balcony_edge.errors import InputError
from balcony_export.data.corpus import Order, build_corpus, pack, start_tokens
from balcony_export.data.documents import read_documents
from balcony_export.model.balcony import init_balconies
from balcony_export.model.balcony_files import fingerprint, rows_seen, save_balconies
from balcony_export.train.attention import NAME, block_attention, use_block_attention
from balcony_export.train.config import TrainConfig
from balcony_export.train.loss import CHUNK, Head, HeadLoss, VocabularySample, chunk_size
from balcony_export.train.parallel import Processes
from balcony_export.train.report import TrainingCost, pretraining_tokens
from balcony_export.train.schedule import OptimizerKind, Schedule, make_optimizers, set_rate
from balcony_export.train.states import StateCache
from benchmarks.paper.training_cost import SETTINGS, gflop_per_token
from tests.export.train.distilling import SEQ_LEN


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("count", [5, CHUNK, 2 * CHUNK + 7])
def test_loss_and_gradient_are_those_of_the_definition(softcap: float | None, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 16, generator=generator)
    full, student = torch.randn(2, count, 16, generator=generator)
    head = HeadLoss(Head(weight, softcap), dtype=torch.float32, compiled=False)

    def logits(x: torch.Tensor) -> torch.Tensor:
        out = x @ weight.T
        return out if softcap is None else softcap * torch.tanh(out / softcap)

    reference = (3 * student).requires_grad_(True)
    wanted = nn.functional.kl_div(
        logits(reference).log_softmax(-1), logits(full).log_softmax(-1), log_target=True, reduction="sum"
    )
    wanted.backward()
    given = student.clone().requires_grad_(True)
    other = full.clone().requires_grad_(True)  # an exit that is the full model: no loss and no gradient
    loss, nothing = head.backward(full, [3 * given, other])
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5, abs=1e-4)
    assert nothing == pytest.approx(0.0, abs=1e-4)
    assert reference.grad is not None
    assert given.grad is not None
    torch.testing.assert_close(given.grad, 3 * reference.grad, rtol=1e-4, atol=1e-5)
    assert other.grad is not None
    torch.testing.assert_close(other.grad, torch.zeros_like(other), rtol=0, atol=1e-5)
    (kl, same), (_, itself) = head.compare(full, [student, full])
    assert float(kl.sum()) == pytest.approx(
        float(nn.functional.kl_div(logits(student).log_softmax(-1), logits(full).softmax(-1), reduction="sum")),
        rel=1e-4,
    )
    assert same.tolist() == (logits(full).argmax(-1) == logits(student).argmax(-1)).tolist()
    assert int(itself.sum()) == count


def test_chunks_are_as_long_as_a_gpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [
        chunk_size("cuda", *one)
        for one in ((32_000, 8192), (1_022, 8192), (90, 8192), (12_264, 49_152), (12_264, 1 << 17))
    ]
    assert sizes == [2048, 512, CHUNK, 512, 512] and chunk_size("cpu", 32_000, 8192) == CHUNK
    generator = torch.Generator().manual_seed(5)
    head = HeadLoss(Head(torch.randn(50, 16, generator=generator)), dtype=torch.float32, compiled=False)
    full, student = torch.randn(2, 2 * CHUNK + 40, 16, generator=generator)
    wanted = head.kl(full, [student])[0]
    monkeypatch.setattr("balcony_export.train.loss.chunk_size", lambda *_: 2 * CHUNK)
    for ours, theirs in zip(head.kl(full, [student])[0], wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_part_of_the_vocabulary_holds_the_text_the_likeliest_and_others_that_represent_the_rest() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, text = torch.randn(100, 16, generator=generator), torch.tensor([7, 7, 91, 3])
    whole = HeadLoss(Head(weight), dtype=torch.float32, compiled=False).whole
    sample = VocabularySample(20, torch.arange(99, -1, -1))  # 99 is the most probable
    part = sample.draw(whole, text, [0, 1, 0])
    rows = [int((weight == row).all(dim=1).nonzero()) for row in part.weight]
    assert {3, 7, 91} <= set(rows[:10]) and set(rows[:10]) - {3, 7, 91} == set(range(93, 100))
    assert len(set(rows)) == 20 and not set(rows[10:]) & set(rows[:10])
    assert part.offset[:10].tolist() == [0.0] * 10
    assert part.offset[10:].tolist() == pytest.approx([math.log(90 / 10)] * 10)
    again, other = (sample.draw(whole, text, [0, step, 0]) for step in (1, 2))
    assert torch.equal(again.weight, part.weight) and not torch.equal(other.weight, part.weight)
    # a text with more tokens than there is room for: the most probable of them, and half of the part is still drawn
    crowded = VocabularySample(20, torch.arange(99, -1, -1)).draw(whole, torch.arange(50), [0, 0])
    rows = [int((weight == row).all(dim=1).nonzero()) for row in crowded.weight]
    assert rows[:10] == list(range(49, 39, -1)) and len(set(rows)) == 20
    assert crowded.offset[10:].tolist() == pytest.approx([math.log(90 / 10)] * 10)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_sampled_loss_is_on_average_the_exact_one(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = 0.5 * torch.randn(400, 16, generator=generator)
    full, student = torch.randn(2, 64, 16, generator=generator)
    head = HeadLoss(Head(weight, softcap), dtype=torch.float32, compiled=False)
    ranking = head.ranking(full)
    assert int(ranking[0]) == int(head.head.logits(full, weight).softmax(-1).mean(0).argmax())
    sample = VocabularySample(200, ranking)
    ((exact, exact_slope),) = head.kl(full, [student])
    found = [head.kl(full, [student], sample.draw(head.whole, torch.tensor([0]), [seed]))[0] for seed in range(60)]
    assert float(torch.stack([kl.mean() for kl, _ in found]).mean()) == pytest.approx(float(exact.mean()), rel=0.02)
    slope = torch.stack([slope for _, slope in found]).mean(0)
    assert float((slope - exact_slope).norm() / exact_slope.norm()) < 0.06
    one = found[0][1]
    assert float((one - exact_slope).norm() / exact_slope.norm()) > 0.1  # a single part is not exact


#: Loading the compiler warns of what it uses itself.
loads_the_compiler = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@loads_the_compiler
@pytest.mark.parametrize("rows", [2, 33])
def test_attention_in_blocks_is_attention(rows: int) -> None:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, 6, rows, 8, generator=generator).transpose(1, 2).contiguous().transpose(1, 2)
    key, value = torch.randn(2, 2, 2, rows, 8, generator=generator)
    slope = torch.randn(2, rows, 6, 8, generator=generator)
    found, wanted = [], []
    for into in (found, wanted):
        given = [one.clone().requires_grad_(True) for one in (query, key, value)]
        if into is found:
            out, _ = block_attention(nn.Module(), *given, None, scaling=0.3)
        else:
            out = nn.functional.scaled_dot_product_attention(*given, is_causal=True, scale=0.3, enable_gqa=True)
            out = out.transpose(1, 2)
        out.backward(slope)
        into += [out.detach(), *(one.grad for one in given)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@loads_the_compiler
def test_attention_in_blocks_is_for_models_that_use_the_fused_kernel(make_tiny: Callable[..., Any]) -> None:
    tokens = torch.arange(40)[None] % 16
    fused, window, eager = make_tiny("llama"), make_tiny("gemma3"), make_tiny("gemma2")
    for model in (fused, window):
        model.set_attn_implementation("sdpa")
    before = [model(tokens).logits for model in (fused, window, eager)]
    for model in (fused, window, eager):
        use_block_attention(model)
    assert fused.config._attn_implementation == window.config._attn_implementation == NAME
    assert eager.config._attn_implementation == "eager"
    for model, wanted in zip((fused, window, eager), before, strict=True):
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_share_of_a_file_is_used_and_documents_of_every_file_are_held_out(
    tmp_path: Path, make_tokenizer: Callable[[], Any]
) -> None:
    words = ["the quick brown fox", "jumps over the lazy dog", "fox and dog", "the lazy fox jumps"]
    for name, count in (("a.jsonl", 40), ("b.jsonl", 120)):
        lines = [
            json.dumps({"text": f"{words[i % 4]} {words[i // 4 % 4]} {words[i // 16 % 4]} {i} {name}"})
            for i in range(count)
        ]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    tokenizer = make_tokenizer()
    whole = build_corpus([tmp_path], tokenizer, seq_len=32, held_out_rows=4)
    part = build_corpus([tmp_path], tokenizer, seq_len=32, held_out_rows=4, mix={"b.jsonl": 0.25})
    assert part.sources["a.jsonl"] == whole.sources["a.jsonl"]
    assert (part.sources["b.jsonl"]["documents"], part.sources["b.jsonl"]["share"]) == (30, 0.25)
    assert part.digest != whole.digest
    for corpus in (whole, part):  # every file gives its share of held-out tokens, which are not learned from
        tokens = {name: facts["tokens"] for name, facts in corpus.sources.items()}
        assert corpus.train.num_tokens + corpus.held_out.num_tokens <= sum(tokens.values())
        learned = {
            row[:length].tobytes() for row, length in zip(corpus.train.tokens, corpus.train.lengths, strict=True)
        }
        held = [
            row[:length].tobytes() for row, length in zip(corpus.held_out.tokens, corpus.held_out.lengths, strict=True)
        ]
        assert held and not learned & set(held)
    with pytest.raises(InputError, match=r"--mix c\.jsonl: is not a file of --data: name one of a\.jsonl, b\.jsonl"):
        build_corpus([tmp_path], tokenizer, seq_len=32, mix={"c.jsonl": 0.5})
    (tmp_path / "b.jsonl").rename(tmp_path / "u\u0308.jsonl")  # as macOS may write it
    part = build_corpus([tmp_path], tokenizer, seq_len=32, mix={"\u00fc.jsonl": 0.25})
    assert part.sources["u\u0308.jsonl"]["share"] == 0.25


def texts_of(rows: Any) -> set[bytes]:
    return {row[:length].tobytes() for row, length in zip(rows.tokens, rows.lengths, strict=True)}


def test_a_text_that_comes_twice_is_learned_or_held_out_and_not_both(
    tmp_path: Path, make_tokenizer: Callable[[], Any]
) -> None:
    lines = [json.dumps({"text": f"the quick brown fox jumps over dog {i}"}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines + lines) + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[::2]) + "\n")
    corpus = build_corpus([tmp_path], make_tokenizer(), seq_len=12, held_out_rows=5)
    assert texts_of(corpus.held_out) and not texts_of(corpus.held_out) & texts_of(corpus.train)


def test_the_beginning_of_a_long_text_is_not_learned_from_its_copy(
    tmp_path: Path, make_tokenizer: Callable[[], Any]
) -> None:
    """All documents are long, so the beginning of one is judged; the whole text stands in another file, too."""
    texts = [" ".join(f"fox {start + count}" for count in range(60 + start)) for start in (0, 100, 200)]
    for name, chosen in (("a.jsonl", (1, 2)), ("b.jsonl", (0, 1))):
        (tmp_path / name).write_text("".join(json.dumps({"text": texts[index]}) + "\n" for index in chosen))
    corpus = build_corpus([tmp_path], make_tokenizer(), seq_len=16, held_out_rows=6)
    assert len(texts_of(corpus.held_out)) >= 6 and not texts_of(corpus.held_out) & texts_of(corpus.train)


@pytest.mark.parametrize("bare", ["train.jsonl", "."])
def test_files_of_one_name_are_all_used(
    bare: str, tmp_path: Path, make_tokenizer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, word in (("more", "fox"), ("here", "dog")):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": f"the quick brown {word} number {count}"}) for count in range(30)]
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path / "here")
    corpus = build_corpus([tmp_path / "more" / "train.jsonl", Path(bare)], make_tokenizer(), seq_len=16)
    assert list(corpus.sources) == ["train.jsonl", str(tmp_path / "here" / "train.jsonl")]
    assert [facts["documents"] for facts in corpus.sources.values()] == [30, 30]


def test_a_run_begins_after_the_rows_that_its_start_has_seen(tmp_path: Path, make_tiny: Callable[..., Any]) -> None:
    order = Order(count=10, batch_rows=2, seed=0, first=7)
    assert order.rows(0).tolist() == [7, 8] and order.learned(2) == 11
    assert order.rows(1).tolist() == [9, Order(10, 2, seed=0).rows(5)[0]]
    model = make_tiny("llama")
    for exit_layer, rows in ((1, 40), (2, 60)):
        save_balconies(
            tmp_path, init_balconies(model, (exit_layer,)), fingerprint(model), {"corpus": "one", "rows": rows}
        )
    assert rows_seen(tmp_path, (1, 2), "one") == 60
    assert rows_seen(tmp_path, (1,), "one") == 40
    assert rows_seen(tmp_path, (1, 2), "another") is None, "no row of that corpus is known to be learned"
    assert rows_seen(tmp_path, (3,), "one") == 0


def test_texts_begin_as_they_do_in_use(tmp_path: Path, tiny: Any) -> None:
    """A model with a start token sees it before every piece of plain text; one without has the rows that it had."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{number} the quick brown fox " * 9}) + "\n" for number in range(30)))
    plain = build_corpus([text], tiny.tokenizer, seq_len=SEQ_LEN, held_out_rows=4)
    tokenizer = copy.deepcopy(tiny.tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing("f $A", special_tokens=[("f", 7)])
    assert start_tokens(tiny.tokenizer) == [] and start_tokens(tokenizer) == [7]
    begun = build_corpus([text], tokenizer, seq_len=SEQ_LEN, held_out_rows=4)
    for rows in (begun.train, begun.held_out):
        assert (rows.tokens[:, 0] == 7).all()
    assert begun.train.num_tokens > plain.train.num_tokens and not (plain.train.tokens == 7).any(axis=1).all()
    book = tmp_path / "book.txt"  # one document, whose beginning is held out
    book.write_text(" ".join(f"{number} the quick brown fox" for number in range(300)))
    assert (build_corpus([book], tokenizer, seq_len=SEQ_LEN, held_out_rows=4).train.tokens[:, 0] == 7).all()


def test_text_that_is_all_held_out_is_refused(tmp_path: Path, tiny: Any) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the quick brown fox jumps over the lazy dog"}) + "\n")
    text.write_text(text.read_text() * 50)
    with pytest.raises(InputError, match="all of it has the text of held-out documents"):
        build_corpus([text], tiny.tokenizer, seq_len=SEQ_LEN, held_out_rows=4)


def test_packing_loses_and_doubles_nothing() -> None:
    documents = [
        np.arange(start, start + size, dtype=np.int32) for start, size in ((0, 30), (100, 5), (200, 17), (300, 2))
    ]
    rows = pack(documents, 16, np.random.default_rng(0))
    kept = np.concatenate([row[:length] for row, length in zip(rows.tokens, rows.lengths, strict=True)])
    # the one-token tail of the document of 17 predicts nothing and is dropped
    assert sorted(kept) == sorted([*range(30), *range(100, 105), *range(200, 216), 300, 301])
    assert rows.num_tokens == len(kept)
    assert len(rows.tokens) == 4
    assert all(row[0] in (0, 16, 100, 200, 300) for row in rows.tokens)  # a row begins where a document or piece begins


def test_text_before_the_first_title_is_a_document(tmp_path: Path) -> None:
    (path := tmp_path / "wiki.raw").write_text("the beginning\n = Foxes = \n a fox\n = Dogs = \n a dog\n")
    assert [one.text.split()[0] for one in read_documents(path)] == ["the", "=", "="]
    path.write_text(" \n = Foxes = \n a fox\n")
    assert len(list(read_documents(path))) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("latin.txt", "café".encode("latin-1"), r"is not UTF-8 \(byte 3\)"),
        ("broken.jsonl", b'{"text": "the fox"}\n{"text"\n', r"broken\.jsonl:2: is not JSON"),
        pytest.param("deep.jsonl", b"[" * 100_000 + b"\n", r"deep\.jsonl:1: is not JSON", id="deep"),
        ("form.jsonl", b'{"title": "the fox"}\n', r"form\.jsonl:1: has no .text. and no chat"),
        ("list.jsonl", b"[1, 2]\n", r"list\.jsonl:1: has no .text. and no chat"),
        ("short.jsonl", b'{"text": "the fox jumps"}\n{"text": "a"}\n', r"short\.jsonl:2: has 1 token, and"),
        ("nothing.jsonl", b'{"text": ""}\n', r"nothing\.jsonl:1: has 0 tokens"),
        ("one.txt", b"the quick brown fox jumps", r"1 document\(s\) of \d+ tokens: too few to hold one out"),
        ("absent.jsonl", None, "cannot be read"),
        (".", None, r"has no \.jsonl or \.txt files"),
        ("text.jsonl", b'{"text": "half a pair \\ud800"}\n', r"text\.jsonl:1: is not JSON .*surrogates not allowed"),
        (
            "text.jsonl",
            b'{"messages": [{"role": "narrator", "content": "once"}]}\n',
            r"text\.jsonl:1: the model's chat template refuses it .no such role.: change its roles",
        ),
    ],
)
def test_data_that_cannot_be_used_is_named(
    name: str, content: bytes | None, words: str, tmp_path: Path, make_tokenizer: Callable[[], Any]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'narrator' %}{{ raise_exception('no such role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(InputError, match=words):
        build_corpus([tmp_path / name], tokenizer, seq_len=16)


def test_a_chat_has_the_same_text_on_every_day(tmp_path: Path, make_tokenizer: Callable[[], Any]) -> None:
    """Llama 3.2's template and others print the date: keys, order and held-out rows follow from the text."""
    tokenizer, digests, texts = make_tokenizer(), [], []
    for day in ("strftime_now('%d %b %Y')", "'01 January 2025'", "'02 January 2025'"):
        tokenizer.chat_template = "{{ " + day + " }}{% for m in messages %}{{ m.content }}{% endfor %}"
        lines = [json.dumps({"messages": [{"role": "user", "content": f"the fox {place}"}] * 3}) for place in range(40)]
        (tmp_path / "chats.jsonl").write_text("\n".join(lines))
        built = build_corpus([tmp_path / "chats.jsonl"], tokenizer, seq_len=16, held_out_rows=2)
        digests.append(built.digest)
        texts.append(tokenizer.decode(built.train.tokens[0]))
    assert digests[0] == digests[1] != digests[2] and "2025" in texts[0]


def test_every_epoch_has_every_row_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(count=300, batch_rows=2, seed=0)
    epochs = [[row for step in range(150) for row in order.rows(150 * epoch + step).tolist()] for epoch in range(3)]
    assert epochs[0] == list(range(300)), "the corpus is already shuffled"
    assert all(sorted(rows) == epochs[0] for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    odd = Order(count=299, batch_rows=2, seed=0)  # a step across two epochs
    assert odd.rows(149).tolist() == [298, np.random.default_rng([0, 1]).permutation(299)[0]]
    monkeypatch.setattr(np.random, "default_rng", lambda _: pytest.fail("an epoch is shuffled once, not at each step"))
    assert order.rows(449).tolist() == epochs[2][-2:]


def test_schedules_have_their_shapes() -> None:
    trapezoid = Schedule("trapezoidal", 10, 0.4)
    assert [trapezoid.factor(step, step / 100) for step in (0, 4, 9, 59, 60, 80, 99)] == pytest.approx(
        [0.1, 0.5, 1, 1, 1, 0.5, 0.025]
    )
    cosine = Schedule("cosine", 0, 0.4)
    assert [cosine.factor(step, step / 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    warming = [Schedule("cosine", 10, 0.4).factor(4, 0.5), Schedule("trapezoidal", 10, 0.4).factor(4, 0.8)]
    assert warming == pytest.approx([0.25, 0.25])
    assert Schedule("trapezoidal", 0, 0.0).factor(0, 1.0) == 1.0


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_rates_and_decay_reach_the_optimizers(kind: OptimizerKind) -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    made = make_optimizers([matrix, vector], kind, 0.2, 0.3, 0.05, torch.float32)
    for factor in (0.25, 0.5):
        set_rate(made, factor)
    groups = [(group, one) for optimizer in made for group in optimizer.param_groups for one in group["params"]]
    found = {id(one): (group["lr"], group["weight_decay"]) for group, one in groups}
    assert found == {id(matrix): (0.1, 0.05), id(vector): (0.15, 0.05)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "a run needs exactly one of them"),
        ({"steps": 1, "minutes": 1.0}, "a run needs exactly one of them"),
        ({"steps": 0}, "steps = 0: must be 1 or more"),
        ({"minutes": math.nan}, "must be a number above 0"),
        ({"minutes": math.inf}, "must be a number above 0"),
        ({"steps": 1, "checkpoint_minutes": math.nan}, "checkpoint_minutes = nan"),
        ({"steps": 1, "batch_rows": 3, "micro_rows": 2}, "multiple: give a --batch-rows that --micro-rows divides"),
        ({"steps": 1, "rate": math.nan}, "rate = nan"),
        ({"steps": 1, "clip": 0.0}, "clip = 0"),
        ({"steps": 1, "vocabulary": -1}, "vocabulary = -1"),
        ({"steps": 1, "vocabulary": 1}, "vocabulary = 1: half of it is drawn at random"),
        ({"steps": 1, "vector_rate": -1.0}, "vector_rate = -1.0: .* number: give another --vector-rate"),
        ({"steps": 1, "warmup_steps": -10}, "warmup_steps = -10: must be 0 to 1000000000: give another --warmup-steps"),
        ({"steps": 1, "cache_gb": math.nan}, "cache_gb = nan"),
        ({"steps": 1, "seed": -1}, "seed = -1"),
        ({"steps": 1, "positions": -1}, "positions = -1"),
        ({"steps": 1, "average": 1.0}, "average = 1.0"),
        ({"steps": 1, "decay_share": 1.5}, "decay_share = 1.5"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TrainConfig(exits=(2,), **options).check()


def test_table_2_counts_the_run() -> None:
    cost = TrainingCost(3, 3_540_672, 5_000_000, pretraining_tokens("SmolLM2-135M-Instruct", None))
    assert dict(cost.lines()) == {
        "Number of tunable parameters": "3 × 3.54M = 10.62M",
        "Training cost in tokens": "5.00M",
        "Percentage of pretraining tokens": "0.00025 %",
    }
    assert TrainingCost(1, 1, 1, pretraining_tokens("other", None)).share is None


# -- data


def test_corpus_holds_documents_out_and_follows_from_its_seed(
    text_file: Path, make_tokenizer: Callable[[], Any]
) -> None:
    tokenizer, seq_len = make_tokenizer(), 24
    corpus = build_corpus([text_file], tokenizer, seq_len=seq_len, held_out_rows=4)
    again = build_corpus([text_file], tokenizer, seq_len=seq_len, held_out_rows=4)
    other = build_corpus([text_file], tokenizer, seq_len=seq_len, held_out_rows=4, seed=1)
    assert again.digest == corpus.digest
    assert build_corpus([text_file.parent], tokenizer, seq_len=seq_len, held_out_rows=4).digest == corpus.digest
    assert other.digest != corpus.digest
    assert other.train.num_tokens == corpus.train.num_tokens
    assert 0 < corpus.held_out.num_tokens <= 4 * seq_len
    assert corpus.sources["text.jsonl"]["documents"] == 70
    texts = [
        tokenizer.decode(row[:length]) for row, length in zip(corpus.train.tokens, corpus.train.lengths, strict=True)
    ]
    assert any("<user>name the dog\n<assistant>lazy" in text for text in texts), "instructions go through the template"
    held = tokenizer.decode(corpus.held_out.tokens[0][: corpus.held_out.lengths[0]])
    assert held not in texts


@pytest.mark.parametrize("sizes", [(900, 40), (40, 900), (900, 60, 50), (900,)])
def test_no_long_document_is_kept_out_whole(
    sizes: tuple[int, ...], make_tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    tokenizer, words = (
        make_tokenizer(),
        ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "the", "balcony"],
    )
    files = [tmp_path / f"{index}.txt" for index in range(len(sizes))]
    for index, (file, size) in enumerate(zip(files, sizes, strict=True)):
        file.write_text(" ".join(words[(index + n) % len(words)] for n in range(size)))
    corpus = build_corpus(files, tokenizer, seq_len=24, held_out_rows=2)
    total = sum(source["tokens"] for source in corpus.sources.values())
    assert 24 < corpus.held_out.num_tokens <= 48  # two rows were asked for; every document is longer
    assert corpus.train.num_tokens + corpus.held_out.num_tokens >= total - len(sizes)  # tails of one token are dropped


def test_a_process_without_positions_gives_zeros_where_others_wait_for_it() -> None:
    one, several = nn.Linear(3, 2), Processes()
    assert several.gradients(one) == []
    several.count = 2
    assert [gradient.abs().sum().item() for gradient in several.gradients(one)] == [0.0, 0.0]
    assert one.weight.grad is not None and several.gradients(one)[0] is one.weight.grad


def test_a_disk_that_cannot_reserve_takes_the_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As glibc on NFS or exFAT: it reads and writes, and refuses a descriptor that cannot (posix_fallocate(3))."""

    def emulated(descriptor: int, offset: int, length: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_APPEND | os.O_WRONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        os.ftruncate(descriptor, max(os.fstat(descriptor).st_size, offset + length))

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    for capacity in (2, 3):  # a new file, and one that grows
        cache = StateCache(tmp_path / "states.bin", capacity, (2, 4, 8), torch.float32, "key")
        assert cache.values.shape == (capacity, 2, 4, 8)
        cache.put(np.array([0]), torch.ones(2, 1, 4, 8))
    assert cache.get(np.array([0])) is not None, "the rows of the shorter file are kept"


def test_the_cost_of_a_run_is_counted_from_its_shapes() -> None:
    """Products and full-square attention of SmolLM2-135M, by hand; a backward pass is twice a forward pass."""
    setting = SETTINGS["SmolLM2-135M, our recipe"]
    width, inner, keys, row = 576, 1536, 192, 512
    attention = 4 * row * width  # scores and their products with the values
    products = 2 * width * (2 * width + 2 * keys + 3 * inner)
    found = gflop_per_token(setting)
    assert found["backbone"] == pytest.approx(30 * (products + attention) / 1e9)
    assert found["balconies"] == pytest.approx(3 * 3 * (products + attention) / 1e9)
    assert found["heads"] == pytest.approx((1 + 2 * 3) * 2 * width * 8192 / 1e9)
    assert 0.1 < found["optimizer"] < 0.2
    larger = gflop_per_token(SETTINGS["SmolLM2-135M, 64 sequences a step"])
    assert larger["optimizer"] == pytest.approx(found["optimizer"] / 32) and larger["heads"] == found["heads"]
