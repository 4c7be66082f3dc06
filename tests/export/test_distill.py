"""Distillation as a run: what a step sees, the loop's promises, a run that is killed, ends that go wrong.

One tiny corpus and one way to make a trainer serve all of it, so one file holds it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from balcony_edge.errors import CheckpointError, InputError, TrainingError
from balcony_export.data.corpus import Corpus, Rows, build_corpus
from balcony_export.model.balcony import Balcony, load_balconies
from balcony_export.train.config import TrainConfig
from balcony_export.train.report import StepReport, plot_curves
from balcony_export.train.trainer import METRICS, Trainer

SEQ_LEN = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only waits, and sums come out the same in a child process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(text_file: Path, make_tokenizer: Callable[[], Any]) -> Corpus:
    return build_corpus([text_file], make_tokenizer(), seq_len=SEQ_LEN, held_out_rows=4)


def trainer_of(
    model: Any,
    corpus: Corpus,
    output: Path,
    start: dict[int, Balcony] | None = None,
    work: Path | None = None,
    **options: Any,
) -> Trainer:
    values: dict[str, Any] = {"exits": (2, 3), "steps": 12, "seq_len": SEQ_LEN, "positions": 8, "warmup_steps": 2}
    values |= {"rate": 3e-3, "vector_rate": 1e-3, "evaluate_every": 6, "checkpoint_minutes": 60.0, "precision": "fp32"}
    values |= options
    return Trainer(model, corpus, TrainConfig(**values), output, start=start, work=work, compiled=False)


def losses_of(trainer: Trainer) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (trainer.work / METRICS).read_text().splitlines()]


# -- the loss


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gemma3", "smollm3", "mistral"])
def test_the_copied_last_layer_at_the_last_exit_is_the_full_model(
    architecture: str, make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    # after N - 1 layers, last layer and final norm are what the full model does: any wrong state, mask or rope shows
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


def test_massive_activations_are_no_targets(make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, positions=0)
    rows = corpus.held_out
    states = trainer.states.of(rows.tokens)
    seeds = [[row] for row in range(len(rows.tokens))]
    before = trainer.positions_of(rows, states, seeds).tolist()
    for exit_ in (0, 1):  # at any exit: the deeper one alone may have it
        marked = states.clone()
        marked[exit_, 0, 5, 3] = 25_856.0
        after = trainer.positions_of(rows, marked, seeds).tolist()
        assert sorted(set(before) - set(after)) == [5]
    assert 0 not in before
    # padding says nothing about what is usual: here most of a row is padding of small states
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
    # a full row shows all of its positions before one comes again, whatever its length is divided by
    seen = np.concatenate([trainer.positions_of(rows, states, seeds, again).numpy() for again in range(6)])
    full = int(np.flatnonzero(rows.lengths == SEQ_LEN)[0])
    counts = np.bincount(seen[seen // SEQ_LEN == full] % SEQ_LEN, minlength=SEQ_LEN)
    assert counts[0] == 0 and set(counts[1:].tolist()) == {1, 2} and counts.sum() == 6 * 4


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

    cached.states.of = counting  # type: ignore[method-assign]
    cached.run()
    assert losses_of(plain) == losses_of(cached)
    assert passes <= steps // 2 + 1 + 2  # the first epoch, and the held-out rows


def test_a_reused_pass_is_made_once_and_a_resumed_run_makes_the_same_states(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steps": 25, "reuse": 3, "window_steps": 5, "evaluate_every": 100}
    whole = trainer_of(make_tiny("llama"), corpus, tmp_path / "whole", **options)
    passes, states = [], whole.states.of
    monkeypatch.setattr(whole.states, "of", lambda tokens: passes.append(len(tokens)) or states(tokens))
    whole.run()
    assert passes[:10] == [2] * 10  # 15 steps learn from the first five passes, the last ten from the next five
    assert len(passes) == 10 + 2  # and two of the held-out rows
    first = trainer_of(make_tiny("llama"), corpus, tmp_path / "parts", **options)
    first.work.mkdir(parents=True)
    while first.step < 8:  # in the second pass over a window
        first._log(StepReport(first.step, 25, first.train_step(), None, 0.0, 0.0), 1.0)
    first.checkpoint()
    second = trainer_of(make_tiny("llama"), corpus, tmp_path / "parts", **options)
    assert second.resume()
    second.run()
    assert losses_of(second)[8:] == losses_of(whole)[8:]
    for name, value in second.balconies[2].state_dict().items():
        assert torch.equal(value, whole.balconies[2].state_dict()[name])


_CHILD = """
import sys, torch
from pathlib import Path
from test_distill import InputError, trainer_of, build_corpus
from conftest import tiny_model, tiny_tokenizer
torch.set_num_threads(1)
corpus = build_corpus([Path(sys.argv[-2])], tiny_tokenizer(), seq_len=24, held_out_rows=4)
output = Path(sys.argv[-1])
"""
_KILLED = (
    _CHILD
    + """
trainer_of(tiny_model("llama"), corpus, output, steps=400, checkpoint_minutes=1e-3).run()
"""
)
_SHARED = (
    _CHILD
    + """
trainer = trainer_of(tiny_model("llama"), corpus, output, steps=5, micro_rows=1)
try:
    trainer_of(tiny_model("llama"), corpus, output / "again", steps=5, micro_rows=1, reuse=2)
    assert not trainer.processes.sharded
except InputError as error:
    assert trainer.processes.sharded and "--reuse 2 with a sharded backbone" in str(error)
trainer.run()
held = [getattr(p, "_local_tensor", p).numel() / p.numel() for p in trainer.exits.parts.layers.parameters()]
(output / f"process {trainer.processes.index} of {trainer.processes.count}").write_text(f"{min(held)} to {max(held)}")
"""
)


def _script(source: str, text_file: Path, output: Path) -> list[str]:
    return [sys.executable, "-c", source, str(text_file), str(output)]


def _environment() -> dict[str, str]:
    here = Path(__file__).parent
    paths = [here, here.parent, *(here.parents[1] / part for part in (".", "export", "runtime"))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(("sharded", "held"), [("false", "1.0 to 1.0"), ("true", "0.5 to 0.5")])
def test_two_processes_make_the_run_of_one(
    sharded: str, held: str, make_tiny: Callable[..., Any], corpus: Corpus, text_file: Path, tmp_path: Path
) -> None:
    alone = trainer_of(make_tiny("llama"), corpus, tmp_path / "alone", steps=5, micro_rows=1)
    alone.run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # what `accelerate launch` sets for each of several GPUs; on CPUs alone it would start one process
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    world |= {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_FSDP": sharded}  # the latter from its --use_fsdp
    children = [
        subprocess.Popen(
            _script(_SHARED, text_file, tmp_path / "shared"),
            env=_environment() | world | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    try:
        assert [child.wait(timeout=100) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    shared = [json.loads(line)["loss"] for line in (tmp_path / "shared/run/2-3" / METRICS).read_text().splitlines()]
    assert [path.read_text() for path in (tmp_path / "shared").glob("process * of 2")] == [held, held]
    assert len(shared) == 5
    for one, two in zip(losses_of(alone), shared, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_a_killed_run_goes_on_with_the_same_curve(
    make_tiny: Callable[..., Any], corpus: Corpus, text_file: Path, tmp_path: Path
) -> None:
    child = subprocess.Popen(_script(_KILLED, text_file, tmp_path), env=_environment())
    metrics = tmp_path / "run/2-3" / METRICS
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if (
            metrics.is_file()
            and metrics.read_text().count("\n") > 25
            and (metrics.parent / "checkpoint.safetensors").is_file()
        ):
            break
        time.sleep(0.05)
    assert child.poll() is None, "the run ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    with metrics.open("a") as file:
        file.write('{"step": 99')  # a line that the kill cut short
    whole = trainer_of(make_tiny("llama"), corpus, tmp_path / "whole", steps=400)
    resumed = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=400)
    assert resumed.resume()
    reached = resumed.step
    assert reached > 0
    while resumed.step < reached + 10:
        resumed.train_step()
    while whole.step < resumed.step:
        whole.train_step()
    kept = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in kept] == list(range(reached))
    for exit_layer in (2, 3):
        for name, value in whole.balconies[exit_layer].state_dict().items():
            assert torch.equal(value, resumed.balconies[exit_layer].state_dict()[name])
            assert torch.equal(whole.averages[exit_layer][name], resumed.averages[exit_layer][name])


def test_a_resumed_run_must_be_the_same_run(make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path) -> None:
    trainer_of(make_tiny("llama"), corpus, tmp_path, steps=2).run()
    with pytest.raises(TrainingError, match="made with another rate"):
        trainer_of(make_tiny("llama"), corpus, tmp_path, steps=4, rate=1e-4).resume()
    other = Corpus(corpus.train, corpus.held_out, {}, "another digest")
    with pytest.raises(TrainingError, match="made with another data"):
        trainer_of(make_tiny("llama"), other, tmp_path, steps=4).resume()
    longer = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=4)
    assert longer.resume()
    longer.run()
    assert longer.step == 4
    with pytest.raises(InputError, match=r"3 steps \(--steps or --tokens\): 4 are done already"):
        trainer_of(make_tiny("llama"), corpus, tmp_path, steps=3).resume()
    assert trainer_of(make_tiny("llama"), corpus, tmp_path, steps=4).resume()  # a run that had ended
    (longer.work / "checkpoint.safetensors").write_bytes(b"cut")
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors: is damaged"):
        longer.resume()


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    trainer_of(make_tiny("llama"), corpus, tmp_path, steps=2).run()
    before = {file.name: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    assert len(before) == 3
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=6)
    trainer.resume()
    trainer.balconies[3].norm.weight.data[0] = math.nan
    with pytest.raises(
        TrainingError, match=r"step 2: the loss of exit 3 is nan.*checkpoint is kept.*lower --rate, --start"
    ):
        trainer.run()
    with pytest.raises(TrainingError, match="step 2: the loss of exit 3 is nan"):
        trainer.checkpoint()  # as after a step that went too far when a checkpoint was due
    assert before == {file.name: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}


def test_a_last_step_that_goes_too_far_writes_nothing(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=1, rate=1e30)
    with pytest.raises(TrainingError, match=r"step 1: the loss of exit 2 is nan: there was no checkpoint yet"):
        trainer.run()
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "balconies.json").exists()


def test_held_out_rows_that_show_nothing_are_refused(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    rows = corpus.held_out
    empty = Corpus(corpus.train, Rows(rows.tokens, np.ones_like(rows.lengths)), {}, "")
    with pytest.raises(InputError, match="have no position that the loss looks at"):
        trainer_of(make_tiny("llama"), empty, tmp_path, steps=1).run()


def test_balconies_that_a_run_began_from_are_only_replaced_by_better_ones(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    first = trainer_of(make_tiny("llama"), corpus, tmp_path / "first", steps=40)
    first.run()
    files = [f"balcony_{exit_layer}.safetensors" for exit_layer in (2, 3)]
    before = [(tmp_path / "first" / file).read_bytes() for file in files]
    # a rate that spoils them: what they were stays, in the directory that they lay in and in another one
    for place in ("first", "second"):
        model = make_tiny("llama")
        begun = load_balconies(tmp_path / "first", model)
        spoilt = trainer_of(model, corpus, tmp_path / place, begun, rate=3.0, work=tmp_path / f"{place}-run")
        spoilt.run()
        assert [(tmp_path / place / file).read_bytes() for file in files] == before
        assert spoilt.best[2] == pytest.approx(first.best[2], rel=0.01)
        assert spoilt.evaluate()[2][0] > 1.2 * spoilt.best[2][0]


def test_a_run_that_left_no_checkpoint_leaves_no_curve(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    killed = trainer_of(make_tiny("llama"), corpus, tmp_path)
    killed.work.mkdir(parents=True)
    killed._log(StepReport(1, 12, killed.train_step(), None, 0.0, 0.0), 1.0)
    again = trainer_of(make_tiny("llama"), corpus, tmp_path)
    again.run()
    assert [json.loads(line)["step"] for line in (again.work / METRICS).read_text().splitlines()] == list(range(12))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_what_to_lower(
    error: Exception, make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=2)
    trainer.run()
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path)
    trainer.resume()

    def fail(rows: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(trainer, "states_of", fail)
    with pytest.raises(
        TrainingError, match=r"out of memory at 2 rows of 24 tokens.*checkpoint is kept.*lower --micro-rows"
    ):
        trainer.run()
    # and so it can be done
    smaller = trainer_of(make_tiny("llama"), corpus, tmp_path, micro_rows=1)
    assert smaller.resume() and smaller.step == 2
    smaller.run()
    assert smaller.step == 12


def test_an_error_that_is_not_about_memory_stays_what_it_is(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path)

    def fail(rows: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trainer, "states_of", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.run()


def test_a_run_with_a_deadline_ends_at_it_with_a_rate_of_zero(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 2.0  # several readings a step: a step takes a few seconds of this clock
        return now

    options = {"steps": None, "minutes": 10.0, "exits": (2,), "optimizer": "adamw", "checkpoint_minutes": 10**6}
    trainer = trainer_of(make_tiny("llama", num_hidden_layers=3), corpus, tmp_path, **options)
    trainer.clock = clock
    trainer.run()
    lines = [json.loads(line) for line in (trainer.work / METRICS).read_text().splitlines()]
    factors = [line["factor"] for line in lines]
    assert now == pytest.approx(600, rel=0.05)
    assert max(factors) == 1.0
    assert factors[-1] < 0.05
    decaying = sum(factor < 1.0 for factor in factors[2:]) / len(factors)
    assert 0.3 < decaying < 0.5  # the decay's share, 0.4


def test_a_deadline_is_not_planned_by_the_first_step_which_compiles(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": None, "minutes": 3.0, "exits": (2,), "checkpoint_minutes": 10**6}
    trainer = trainer_of(make_tiny("llama", num_hidden_layers=3), corpus, tmp_path, **options)
    now, step = 0.0, trainer.train_step

    def slow() -> dict[int, float]:
        nonlocal now
        now += 1.0 if trainer.step else 60.0
        return step()

    trainer.clock = lambda: now
    monkeypatch.setattr(trainer, "train_step", slow)
    trainer.run()
    assert (trainer.step, now) == (121, 180.0)
    assert trainer.schedule.factor(trainer.step - 1) < 0.05


def test_an_output_that_cannot_hold_the_balconies_is_refused_before_the_training(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    trainer_of(make_tiny("llama"), corpus, tmp_path / "out", steps=1).run()
    with pytest.raises(CheckpointError, match="holds balconies of kind 'decoder', not 'mlp'"):
        trainer_of(make_tiny("llama"), corpus, tmp_path / "out", module="mlp")
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(InputError, match="cannot be made"):
        trainer_of(make_tiny("llama"), corpus, tmp_path / "file")


def test_a_disk_that_fills_up_is_one_line(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, small_disk: Path
) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path / "out", work=small_disk, steps=2000)
    with pytest.raises(TrainingError, match=r"writing failed .No space left on device.: there was no checkpoint yet"):
        trainer.run()
    assert 0 < trainer.step < 2000
    with pytest.raises(TrainingError, match=r"states\.bin: no room for .* lower --cache-gb"):
        trainer_of(make_tiny("llama"), corpus, tmp_path / "out", work=small_disk, cache_gb=0.01)
