"""Distillation step by step: rows, positions and loss of a step, and the result of training."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from balcony_export.data.corpus import Corpus, Rows, build_corpus
from balcony_export.data.documents import read_documents
from balcony_export.model.averaging import average
from balcony_export.model.balcony_files import is_whole, load_balconies, read_index, read_tensors
from balcony_export.train.attention import can_compile
from balcony_export.train.loss import CHUNK, Head, HeadLoss, VocabularySample
from balcony_export.train.report import StepReport, plot_curves
from balcony_export.train.run_files import END
from balcony_export.train.trainer import METRICS
from tests.export.train.distilling import SEQ_LEN, losses_of, trainer_of

# -- the loss


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gemma3", "smollm3", "mistral"])
def test_the_copied_last_layer_at_the_last_exit_is_the_full_model(
    architecture: str, make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    # after N - 1 layers, the last layer and the final norm give the full model: a wrong state, mask or rope would show
    trainer = trainer_of(make_tiny(architecture), corpus, tmp_path, exits=(2, 4), positions=0)
    held_out = trainer.evaluate()
    assert held_out[4][0] == pytest.approx(0.0, abs=2e-6)
    assert held_out[4][1] == 1.0
    assert held_out[2][0] > 0.05


def test_loss_is_a_token_mean_that_no_padding_enters(make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(1, 300, size=(2, SEQ_LEN)).astype(np.int32)
    lengths = np.array([SEQ_LEN, 7], dtype=np.int32)
    model = make_tiny("llama")
    seen = []
    for filler in (0, 5):
        tokens[1, 7:] = filler
        rows = Rows(tokens.copy(), lengths)
        trainer = trainer_of(model, Corpus(rows, rows, {}, str(filler)), tmp_path / str(filler), positions=0)
        seen.append(trainer.train_step())
    assert seen[0] == seen[1]
    # the definition, position by position: 23 of the first row (never the first position), 6 of the second
    model = make_tiny("llama")
    trainer = trainer_of(model, Corpus(rows, rows, {}, ""), tmp_path / "reference", positions=0)
    out = model(torch.from_numpy(tokens).long(), output_hidden_states=True)
    balcony = trainer.balconies[2]
    student = model.lm_head(balcony(out.hidden_states[2], **trainer.layer_arguments)).log_softmax(-1)
    full = out.logits.log_softmax(-1)
    kl = (full.exp() * (full - student)).sum(-1)
    states = trainer.states.of(tokens)
    where = trainer.positions_of(rows, states, [[0], [1]])
    assert where.tolist() == [*range(1, SEQ_LEN), *range(SEQ_LEN + 1, SEQ_LEN + 7)]
    assert seen[0][2] == pytest.approx(float(kl.detach().flatten()[where].mean()), rel=1e-5)


def test_the_gradient_is_that_of_the_mean_loss_and_is_clipped(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("llama")
    trainer = trainer_of(model, corpus, tmp_path, positions=0, clip=0.25, state_weight=0.0)
    balcony, seen, clip = trainer.balconies[2], [], torch.nn.utils.clip_grad_norm_

    def recording(parameters: Iterable[torch.nn.Parameter], bound: float) -> torch.Tensor:
        kept = list(parameters)
        seen.append(([one.grad.clone() for one in kept if one.grad is not None], bound))
        return clip(kept, bound)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    which = trainer.order.rows(0)
    rows = Rows(corpus.train.tokens[which], corpus.train.lengths[which])
    where = trainer.positions_of(rows, trainer.states.of(rows.tokens), [[0], [1]])
    out = model(torch.from_numpy(rows.tokens).long(), output_hidden_states=True)
    student = model.lm_head(balcony(out.hidden_states[2], **trainer.layer_arguments)).log_softmax(-1)
    kl = (out.logits.softmax(-1) * (out.logits.log_softmax(-1) - student)).sum(-1).flatten()[where].mean()
    wanted = torch.autograd.grad(kl, list(balcony.parameters()))
    trainer.train_step()
    (found, bound), (_, other) = seen
    assert bound == other == 0.25
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    # the first of two steps of warm-up
    rates = {group["lr"] for optimizer in trainer.learners[2].optimizers for group in optimizer.param_groups}
    assert rates == {0.5 * 3e-3, 0.5 * 1e-3}


@pytest.mark.parametrize("loss", ["ce", "kl+ce"])
def test_the_label_of_a_position_is_the_next_token(
    loss: str, make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions are all but the first and the last of a row."""
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, loss=loss, positions=0)
    backward = Mock(wraps=trainer.head.backward)
    monkeypatch.setattr(trainer.head, "backward", backward)
    which = trainer.order.rows(0)
    trainer.train_step()
    rows = zip(corpus.train.tokens[which], corpus.train.lengths[which], strict=True)
    assert backward.call_args.args[2].tolist() == [int(token) for row, length in rows for token in row[2:length]]


def test_a_compiled_loss_sees_one_shape() -> None:
    """Passes of few positions differ in their number, and after eight shapes the compiler gives up."""
    generator = torch.Generator().manual_seed(6)
    head = HeadLoss(Head(torch.randn(50, 16, generator=generator)), dtype=torch.float32, compiled=False)
    states, plain = torch.randn(2, CHUNK + 7, 16, generator=generator), head.kernel
    shapes: set[tuple[int, ...]] = set()

    def compiled(full: torch.Tensor, student: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.add(tuple(full.shape))
        return plain(full, student, offset)

    for count in (5, 90, CHUNK, CHUNK + 7):
        full, student = states[:, :count]
        head.kernel = plain
        wanted = head.kl(full, [student])[0]
        head.kernel = compiled
        for ours, theirs in zip(head.kl(full, [student])[0], wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert shapes == {(CHUNK, 50)}


def test_a_step_compares_its_own_part_of_the_vocabulary(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("llama")
    trainer = trainer_of(model, corpus, tmp_path, vocabulary=64, seed=3)
    backward = Mock(wraps=trainer.head.backward)
    monkeypatch.setattr(trainer.head, "backward", backward)
    parts, sample = [], trainer.sample
    assert sample is not None
    for step in range(2):
        text = corpus.train.tokens[trainer.order.rows(step)]
        want = sample.draw(trainer.head.whole, torch.from_numpy(text).long().flatten(), [3, step])
        trainer.train_step()
        parts.append(backward.call_args.args[3])
        assert len(parts[-1].weight) == 64 and torch.equal(parts[-1].weight, want.weight)
    assert not torch.equal(parts[0].weight[32:], parts[1].weight[32:]), "the drawn half is drawn anew"
    # ranked by the full model's mean probability on the first rows, without their padding
    rows = corpus.train.take(16)
    used = torch.arange(SEQ_LEN)[None] < torch.from_numpy(rows.lengths)[:, None]
    with torch.no_grad():
        mean = model(torch.from_numpy(rows.tokens).long()).logits[used].softmax(-1).mean(0)
    ranked = mean[sample.ranking]
    assert bool((ranked[1:] <= ranked[:-1] * (1 + 1e-5)).all())
    for options in ({"vocabulary": 320}, {"vocabulary": 0}, {"vocabulary": 64, "loss": "ce"}):
        assert trainer_of(make_tiny("llama"), corpus, tmp_path, **options).sample is None


def test_a_part_of_the_vocabulary_has_the_teachers_own_rows() -> None:
    """The head of a cut model may be rounded: through it, the teacher's states would give another distribution."""
    own, teachers = torch.randn(2, 100, 16, generator=torch.Generator().manual_seed(8))
    whole = HeadLoss(Head(own), Head(teachers), dtype=torch.float32, compiled=False).whole
    part = VocabularySample(20, torch.arange(100)).draw(whole, torch.tensor([7]), [0])
    ids = [int((own == row).all(dim=1).nonzero()) for row in part.weight]
    assert torch.equal(part.full, teachers[ids])


def test_massive_activations_are_no_targets(make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, positions=0)
    rows = corpus.held_out
    states = trainer.states.of(rows.tokens)
    seeds = [[row] for row in range(len(rows.tokens))]
    before = trainer.positions_of(rows, states, seeds).tolist()
    for exit_ in (0, 1):  # at any exit, for example only at the deeper one
        marked = states.clone()
        marked[exit_, 0, 5, 3] = 25_856.0
        after = trainer.positions_of(rows, marked, seeds).tolist()
        assert sorted(set(before) - set(after)) == [5]
    assert 0 not in before
    # padding does not count for the median: here most of a row is padding with small states
    short = Rows(rows.tokens[:1], np.array([8], dtype=np.int32))
    quiet = states[:, :1].clone()
    quiet[:, :, 8:] *= 1e-3
    assert trainer.positions_of(short, quiet, [[0]]).tolist() == list(range(1, 8))


def test_sampled_positions_are_distinct_and_follow_from_the_row(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, positions=4)
    rows = corpus.held_out
    states = trainer.states.of(rows.tokens)
    seeds = [[0, place] for place in range(len(rows.tokens))]
    first = trainer.positions_of(rows, states, seeds).tolist()
    assert first == trainer.positions_of(rows, states, seeds).tolist()
    assert first != trainer.positions_of(rows, states, [[1, place] for _, place in seeds]).tolist()
    per_row = np.bincount(np.array(first) // SEQ_LEN, minlength=len(corpus.held_out.tokens))
    assert per_row.tolist() == [min(4, length - 1) for length in rows.lengths]
    # all positions but the first are drawn sooner or later, and no padding ever
    drawn = {
        place for again in range(60) for place in trainer.positions_of(rows, states, [[again]] * len(seeds)).tolist()
    }
    assert drawn == {row * SEQ_LEN + at for row, length in enumerate(rows.lengths) for at in range(1, length)}


# -- the loop


def test_training_lowers_the_loss_and_leaves_the_model_alone(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    model = make_tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(model, corpus, tmp_path, steps=60, average=0.9, rate=1e-2, vector_rate=1e-2)
    start = trainer.evaluate()
    trainer.run()
    for exit_layer in (2, 3):
        assert trainer.best[exit_layer][0] < 0.75 * start[exit_layer][0]
        assert trainer.best[exit_layer][1] > start[exit_layer][1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = load_balconies(tmp_path, model)
    facts = json.loads((tmp_path / "balconies.json").read_text())["exits"]["2"]["training"]
    assert facts["tokens"] == 60 * 2 * SEQ_LEN
    assert facts["held_out_kl"] == pytest.approx(trainer.best[2][0], abs=1e-4)
    trainer.balconies[2].load_state_dict(loaded[2].state_dict())
    assert trainer.evaluate()[2][0] == pytest.approx(trainer.best[2][0], rel=0.05)  # stored in bfloat16
    lines = [json.loads(line) for line in (trainer.work / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(60))
    assert [line["step"] for line in lines if "held_out_kl" in line] == list(range(5, 60, 6))
    plot_curves(lines, tmp_path / "curve.png", "tiny")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_exit_trained_alone_is_bit_equal_to_one_trained_beside_others(
    optimizer: Any, make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    together = trainer_of(make_tiny("llama"), corpus, tmp_path / "a", optimizer=optimizer, steps=4)
    alone = trainer_of(make_tiny("llama"), corpus, tmp_path / "b", optimizer=optimizer, steps=4, exits=(2,))
    together.run()
    alone.run()
    assert (tmp_path / "a/balcony_2.safetensors").read_bytes() == (tmp_path / "b/balcony_2.safetensors").read_bytes()
    before = (tmp_path / "b/balcony_2.safetensors").read_bytes()
    added = trainer_of(make_tiny("llama"), corpus, tmp_path / "b", optimizer=optimizer, steps=4, exits=(3,))
    added.work = tmp_path / "work"
    added.run()
    assert (tmp_path / "b/balcony_2.safetensors").read_bytes() == before
    assert (tmp_path / "a/balcony_3.safetensors").read_bytes() == (tmp_path / "b/balcony_3.safetensors").read_bytes()


def test_accumulated_passes_equal_one_pass(make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path) -> None:
    weights = []
    for micro_rows in (4, 1):
        trainer = trainer_of(
            make_tiny("llama"), corpus, tmp_path / str(micro_rows), batch_rows=4, micro_rows=micro_rows, positions=0
        )
        first = trainer.train_step()
        trainer.train_step()
        weights.append((first, trainer.balconies[2].state_dict()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    for name, value in weights[0][1].items():
        torch.testing.assert_close(value, weights[1][1][name], rtol=0, atol=2e-4)


def test_averages_by_hand(make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path) -> None:
    """The memory grows, 1/10 and 2/11 and 3/12, until it is what was asked for."""
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, average=0.2, rate=0.1, vector_rate=0.1)
    want = {name: value.clone() for name, value in trainer.balconies[2].state_dict().items()}
    for memory in (1 / 10, 2 / 11, 0.2):
        trainer.train_step()
        for name, value in trainer.balconies[2].state_dict().items():
            want[name] = memory * want[name] + (1 - memory) * value
            torch.testing.assert_close(trainer.learners[2].average[name], want[name])


def test_the_better_of_the_current_and_the_averaged_weights_is_written(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit by exit, with the figures of the weights that are written."""
    model = make_tiny("llama")
    trainer = trainer_of(model, corpus, tmp_path)
    trainer.work.mkdir(parents=True)
    trainer.train_step()
    for learner in trainer.learners.values():
        for value in learner.average.values():
            value.add_(1.0)  # far from the current weights
    current, averaged = {2: (2.0, 0.9), 3: (1.0, 0.4)}, {2: (1.5, 0.2), 3: (4.0, 0.5)}
    monkeypatch.setattr(trainer, "evaluate", lambda **given: averaged if given else current)
    before = copy.deepcopy({e: balcony.state_dict() for e, balcony in trainer.balconies.items()})
    trainer.checkpoint(trainer.judged())
    assert trainer.best == {2: (1.5, 0.2), 3: (1.0, 0.4)}
    written, index = load_balconies(tmp_path, model), read_index(tmp_path)["exits"]
    for exit_layer, kept in ((2, trainer.learners[2].average), (3, before[3])):
        assert index[str(exit_layer)]["training"]["held_out_kl"] == trainer.best[exit_layer][0]
        for name, value in written[exit_layer].state_dict().items():
            torch.testing.assert_close(value, kept[name], rtol=0.01, atol=0.01)
        for name, value in trainer.balconies[exit_layer].state_dict().items():
            assert torch.equal(value, before[exit_layer][name]), "the training goes on with the current weights"


def test_cached_states_give_the_same_run(make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path) -> None:
    steps = len(corpus.train.tokens)  # two epochs
    plain = trainer_of(make_tiny("llama"), corpus, tmp_path / "plain", steps=steps, optimizer="adamw")
    cached = trainer_of(make_tiny("llama"), corpus, tmp_path / "cached", steps=steps, cache_gb=1.0, optimizer="adamw")
    plain.run()
    passes = 0
    states = cached.states.of

    def counting(tokens: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return states(tokens)

    cached.states.of = counting
    cached.run()
    assert losses_of(plain) == losses_of(cached)
    assert passes <= steps // 2 + 1 + 2  # the first epoch, and the held-out rows


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path, make_tokenizer: Callable[[], Any]) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"the quick fox {n}"}) for n in range(30)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"the lazy dog {n}"}) for n in range(30)))
    whole = build_corpus([tmp_path], make_tokenizer(), seq_len=16)
    twice = build_corpus([tmp_path, tmp_path / "a.jsonl", tmp_path / "a.jsonl"], make_tokenizer(), seq_len=16)
    assert (whole.digest, list(whole.sources)) == (twice.digest, list(twice.sources))


@pytest.mark.parametrize("count", [10, 60])
def test_many_small_files_keep_their_beginnings(count: int, tmp_path: Path, make_tokenizer: Callable[[], Any]) -> None:
    """The held-out part of each would be its first three tokens (10 files), or none, which was refused (60 files)."""
    for number in range(count):
        text = " ".join([f"the quick brown fox {number} jumps over the lazy dog"] * 3)
        (tmp_path / f"{number}.txt").write_text(text)
    tokenizer = make_tokenizer()
    corpus = build_corpus([tmp_path], tokenizer, seq_len=64, held_out_rows=1)
    first = tokenizer("the")["input_ids"][0]
    for rows in (corpus.train, corpus.held_out):
        assert len(rows.tokens) and (rows.tokens[:, 0] == first).all()


@pytest.mark.parametrize("count", [30, 60])
def test_many_small_files_of_two_documents_give_whole_ones(
    count: int, tmp_path: Path, make_tokenizer: Callable[[], Any]
) -> None:
    """The held-out part of each would be two tokens (30 files), or one, which was refused (60 files)."""
    for number in range(count):
        texts = [" ".join([f"the quick brown fox {number} jumps over {place} lazy dog"] * 3) for place in ("the", "a")]
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = make_tokenizer()
    corpus = build_corpus([tmp_path], tokenizer, seq_len=64, held_out_rows=1)
    assert "lazy dog the quick brown fox" in tokenizer.decode(corpus.held_out.tokens[0])


def test_a_short_file_is_not_all_that_is_held_out(tmp_path: Path, make_tokenizer: Callable[[], Any]) -> None:
    """A note of three words next to a book: a run would be judged on these three."""
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)
    (tmp_path / "note.txt").write_text("the lazy fox")
    corpus = build_corpus([tmp_path], make_tokenizer(), seq_len=16, held_out_rows=4)
    assert corpus.held_out.lengths.sum() > 48


def test_a_short_file_next_to_many_books_is_not_all_that_is_held_out(
    tmp_path: Path, make_tokenizer: Callable[[], Any]
) -> None:
    """The part of each book is less than a sequence, so all files count as one, in which only the note is short."""
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"the quick brown fox {number} jumps over the lazy dog " * 20)
    (tmp_path / "note.txt").write_text("the lazy fox")
    corpus = build_corpus([tmp_path], make_tokenizer(), seq_len=16, held_out_rows=4)
    assert corpus.held_out.lengths.sum() > 48


def test_no_more_than_a_tenth_of_a_short_text_is_held_out(tmp_path: Path, make_tokenizer: Callable[[], Any]) -> None:
    """`--held-out-rows` alone would take all of it."""
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)
    corpus = build_corpus([tmp_path], make_tokenizer(), seq_len=16, held_out_rows=10_000)
    (source,) = corpus.sources.values()
    assert 0 < corpus.held_out.num_tokens <= source["tokens"] // 10
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    assert "but at most a tenth of each file" in re.sub(r"\s+", " ", page)


def test_a_chat_comes_before_a_text_that_repeats_it(tmp_path: Path) -> None:
    """Alpaca's rows have both: the text is in a template of its own."""
    row = {"instruction": "Name a fox.", "response": "Red.", "text": "### Instruction: Name a fox. ### Response: Red."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (document,) = read_documents(tmp_path / "rows.jsonl", chats=True)
    assert document.text == "" and document.chat is not None
    (document,) = read_documents(tmp_path / "rows.jsonl")
    assert document.text == row["text"]


def test_every_evaluation_keeps_the_best_and_a_checkpoint_needs_none(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=12, evaluate_every=5, checkpoint_minutes=0.0)
    evaluated, evaluate = [], trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda **given: evaluated.append(trainer.step) or evaluate(**given))
    kept: dict[int, dict[int, tuple[float, float]]] = {}
    trainer.run(lambda progress: kept.setdefault(progress.step, dict(trainer.best)))
    assert evaluated == [5, 5, 10, 10, 12, 12]  # the current and the averaged weights
    assert not kept[4] and kept[5] and is_whole(tmp_path, 2)


def test_states_of_a_residual_sum_in_float32_are_cached(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    """Mamba keeps it so, whatever the precision of the run."""
    model = make_tiny("mamba2", residual_in_fp32=True)
    trainer = trainer_of(model, corpus, tmp_path, steps=3, precision="bf16", cache_gb=0.1)
    trainer.run()
    assert trainer.states.cache is not None and trainer.states.cache.dtype == torch.float32
    assert trainer.states.cache.filled.any()
    other = trainer_of(make_tiny("mamba2", residual_in_fp32=True), corpus, tmp_path, precision="fp32", cache_gb=0.1)
    cache = other._open_cache()
    assert cache is not None and not cache.filled.any(), "passes in another precision give other states"


def test_the_end_of_a_run_is_kept_where_its_start_was_better(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    """`average` takes both: the mean of a good start and a noisy end may be better than each."""

    def weights(directory: Path) -> list[torch.Tensor]:
        exits = read_index(directory)["exits"]
        tensors = [read_tensors(directory, exits[exit_layer]) for exit_layer in ("2", "3")]
        return [torch.cat([one[name].float().flatten() for name in sorted(one)]) for one in tensors]

    model, first = make_tiny("llama"), tmp_path / "first"
    trainer_of(copy.deepcopy(model), corpus, first, steps=40).run()
    begun = load_balconies(first, model)
    run = trainer_of(copy.deepcopy(model), corpus, tmp_path / "out", begun, steps=2, rate=10.0)
    run.run()
    average([run.work / END, first], tmp_path / "mean")
    for start, kept, end, mean in zip(
        *map(weights, (first, run.output, run.work / END, tmp_path / "mean")), strict=True
    ):
        assert torch.equal(start, kept) and not torch.equal(start, end)
        assert torch.allclose(mean, (start + end) / 2, rtol=1e-2, atol=1e-4)


def test_a_report_that_ends_the_process_comes_after_the_checkpoint(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    """As rich does where nobody reads the pipe any more: `train 2>&1 | tee log`, whose tee was ended."""
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path)

    def report(progress: StepReport) -> None:
        if progress.held_out is not None:
            raise SystemExit(1)

    with pytest.raises(SystemExit):
        trainer.run(report)
    again = trainer_of(make_tiny("llama"), corpus, tmp_path)
    assert again.resume() and again.step == 6 and is_whole(tmp_path, 2)


def test_windows_compiles_with_its_own_compiler_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch asks for `cl` there, and fails in the first step with the g++ of MinGW or Strawberry Perl alone."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "is_file", lambda _: True)  # Python.h, also where it is not installed
    for found, can in (("g++", False), ("cl", True)):
        monkeypatch.setattr(shutil, "which", lambda name, found=found: name if name == found else None)
        assert can_compile() is can
