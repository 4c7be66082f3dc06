"""Distillation as a run: several processes, runs that are killed and resumed, and runs that end badly."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from balcony_edge.errors import CheckpointError, InputError, TrainingError
from balcony_export.data.corpus import Corpus, Rows
from balcony_export.model.balcony_files import load_balconies, rows_seen
from balcony_export.train.config import TrainConfig
from balcony_export.train.report import StepReport
from balcony_export.train.run_files import log_step
from balcony_export.train.states import _reserve
from balcony_export.train.trainer import METRICS, Start, Trainer
from tests.export.train.distilling import SEQ_LEN, losses_of, trainer_of
from tests.support.command import unmeasured

_CHILD = """
import sys, torch
from pathlib import Path
from balcony_edge.errors import InputError
from balcony_export.data.corpus import build_corpus
from tests.conftest import tiny_model, tiny_tokenizer
from tests.export.train.distilling import trainer_of
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
trainer.run()
held = [getattr(p, "_local_tensor", p).numel() / p.numel() for p in trainer.exits.parts.layers.parameters()]
(output / f"process {trainer.processes.index} of {trainer.processes.count}").write_text(f"{min(held)} to {max(held)}")
"""
)


def _script(source: str, text_file: Path, output: Path) -> list[str]:
    return [sys.executable, "-c", source, str(text_file), str(output)]


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[3]
    paths = [root, root / "export", root / "runtime"]
    return unmeasured() | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(("sharded", "held"), [("false", "1.0 to 1.0"), ("true", "0.5 to 0.5")])
def test_two_processes_make_the_run_of_one(
    sharded: str, held: str, make_tiny: Callable[..., Any], corpus: Corpus, text_file: Path, tmp_path: Path
) -> None:
    alone = trainer_of(make_tiny("llama"), corpus, tmp_path / "alone", steps=5, micro_rows=1)
    alone.run()
    with socket.socket() as kept:  # until the end: bound and silent, it keeps the port from all who ask for a free one
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch has it, which may therefore listen there
        kept.bind(("127.0.0.1", 0))
        port = str(kept.getsockname()[1])
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
            assert [child.wait(timeout=600) for child in children] == [0, 0]
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
    deadline = time.monotonic() + 600
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
    resumed._begin()  # as run() does once it has the directory for itself
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
            assert torch.equal(whole.learners[exit_layer].average[name], resumed.learners[exit_layer].average[name])


def test_an_interrupted_run_saves_its_step_and_goes_on_with_the_same_curve(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    """As in pieces of ten minutes: three of them make the run of one, bit for bit."""
    whole = trainer_of(make_tiny("llama"), corpus, tmp_path / "whole")
    whole.run()
    for piece, last in enumerate((4, 9, 12)):
        trainer = trainer_of(make_tiny("llama"), corpus, tmp_path / "pieces")
        assert trainer.resume() == bool(piece)

        def interrupt(progress: StepReport, trainer: Trainer = trainer, last: int = last) -> None:
            trainer.interrupted = last < 12 and progress.step == last - 1  # during the next step

        trainer.run(interrupt)
        assert (trainer.step, trainer.stopped) == (last, last < 12)
    assert losses_of(trainer) == losses_of(whole)
    for name in ("balcony_2.safetensors", "balcony_3.safetensors"):
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


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
    with pytest.raises(InputError, match=r"3 steps \(--steps or --tokens\): 4 are already done"):
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
        trainer.checkpoint()  # as after a step that was too large, when a checkpoint is due
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
    with pytest.raises(InputError, match="have no position for the loss"):
        trainer_of(make_tiny("llama"), empty, tmp_path, steps=1).run()


def test_balconies_that_a_run_began_from_are_only_replaced_by_better_ones(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    first = trainer_of(make_tiny("llama"), corpus, tmp_path / "first", steps=40)
    first.run()
    files = [f"balcony_{exit_layer}.safetensors" for exit_layer in (2, 3)]
    before = [(tmp_path / "first" / file).read_bytes() for file in files]
    # a rate that makes them worse: the old balconies stay, in their own directory and in another one
    for place in ("first", "second"):
        model = make_tiny("llama")
        begun = load_balconies(tmp_path / "first", model)
        spoilt = trainer_of(model, corpus, tmp_path / place, begun, rate=3.0, work=tmp_path / f"{place}-run")
        spoilt.run()
        assert [(tmp_path / place / file).read_bytes() for file in files] == before
        assert spoilt.best[2] == pytest.approx(first.best[2], rel=0.01)
        assert spoilt.evaluate()[2][0] > 1.2 * spoilt.best[2][0]


def test_two_runs_never_write_into_one_directory(make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path) -> None:
    first = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=2)
    second = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=2)
    refused = 0

    def start_the_other(_: StepReport) -> None:
        nonlocal refused
        with pytest.raises(TrainingError, match="another training writes there: wait for its end"):
            second.run()
        refused += 1

    first.run(start_the_other)
    assert refused == 2 and len(losses_of(first)) == 2
    second.run()


def test_a_balcony_that_a_killed_run_has_half_replaced_is_written_again(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    trainer_of(make_tiny("llama"), corpus, tmp_path, steps=2).run()
    (tmp_path / "balcony_2.safetensors").write_bytes((tmp_path / "balcony_3.safetensors").read_bytes())
    again = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=3)
    assert again.resume() and set(again.best) == {3}
    again.run()
    assert set(load_balconies(tmp_path, make_tiny("llama"))) == {2, 3}


def test_the_cache_survives_a_refused_command_and_another_size(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    first = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=len(corpus.train.tokens) // 2, cache_gb=1.0)
    first.run()
    rows, values = first.work / "states.rows", first.work / "states.bin"
    count, size = rows.stat().st_size, values.stat().st_size
    assert rows.read_bytes() == b"\1" * count
    with pytest.raises(TrainingError, match="made with another precision"):
        trainer_of(make_tiny("llama"), corpus, tmp_path, precision="bf16", cache_gb=1.0).resume()
    for capacity in (3, count):
        before = values.read_bytes()
        gigabytes = (capacity + 0.5) * size / count / 1e9
        trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=first.step + 1, cache_gb=gigabytes)
        trainer.resume()
        trainer.states.cache = trainer._open_cache()
        assert rows.read_bytes() == b"\1" * 3 + bytes(capacity - 3)
        assert (
            len(values.read_bytes()) == capacity * size // count
            and values.read_bytes()[: 3 * size // count] == before[: 3 * size // count]
        )


def test_a_run_that_left_no_checkpoint_leaves_no_curve(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    killed = trainer_of(make_tiny("llama"), corpus, tmp_path)
    killed.work.mkdir(parents=True)
    progress = StepReport(1, 1 / 12, killed.train_step(), None, 0.0, 0.0)
    log_step(killed.work / METRICS, progress, tokens=48, factor=1.0, wall_s=0.0)
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

    def fail(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(trainer.states, "at", fail)
    with pytest.raises(
        TrainingError, match=r"out of memory at 2 rows of 24 tokens.*checkpoint is kept.*lower --micro-rows"
    ):
        trainer.run()
    single = trainer_of(make_tiny("llama"), corpus, tmp_path, micro_rows=1)  # there is no lower setting
    single.resume()
    monkeypatch.setattr(single.states, "at", fail)
    with pytest.raises(TrainingError, match=r"out of memory at 1 rows .*checkpoint is kept: free memory and continue"):
        single.run()
    # with the lower setting the run works
    smaller = trainer_of(make_tiny("llama"), corpus, tmp_path, micro_rows=1)
    assert smaller.resume() and smaller.step == 2
    smaller.run()
    assert smaller.step == 12


def test_an_error_that_is_not_about_memory_stays_what_it_is(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path)

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trainer.states, "at", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.run()


@pytest.mark.parametrize("schedule", ["trapezoidal", "cosine"])
def test_the_rate_of_a_run_with_a_deadline_follows_its_time(
    schedule: Any, make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 1 s in three minutes; the first one compiles (60 s), and a pause takes 30 s. A second run begins anew."""
    options = {"steps": None, "minutes": 3.0, "exits": (2,), "checkpoint_minutes": 10**6, "warmup_steps": 0}
    model, now = make_tiny("llama", num_hidden_layers=3), 0.0
    for number in (0, 1):
        trainer = trainer_of(copy.deepcopy(model), corpus, tmp_path, **options, schedule=schedule)
        assert trainer.resume() == bool(number)
        step, began, begun_at = trainer.train_step, trainer.step, now
        slow = {began: 60.0, began + 21: 30.0}

        def timed(step: Callable[[], dict[int, float]] = step, trainer: Trainer = trainer, slow: Any = slow) -> Any:
            nonlocal now
            loss = step()
            now += slow.get(trainer.step - 1, 1.0)
            return loss

        trainer.clock = lambda: now
        monkeypatch.setattr(trainer, "train_step", timed)
        reports: list[StepReport] = []
        trainer.run(reports.append)
        assert (trainer.step - began, now - begun_at) == (92, 180.0)
        lines = [json.loads(line) for line in (trainer.work / METRICS).read_text().splitlines()][began:]
        times = [0.0, *range(60, 81), *range(110, 180)]  # of the clock when a step begins
        wanted = [
            min(1.0, (1 - time / 180) / 0.4) if schedule == "trapezoidal" else (1 + math.cos(math.pi * time / 180)) / 2
            for time in times
        ]
        assert [line["factor"] for line in lines] == pytest.approx(wanted, abs=1e-6)
        assert [reports[20].done, reports[20].eta_s] == pytest.approx([80 / 180, 100.0])
        assert reports[20].tokens_per_s == pytest.approx(2 * SEQ_LEN), "the first step compiles"
        groups = [group for optimizer in trainer.learners[2].optimizers for group in optimizer.param_groups]
        assert [group["lr"] / group["peak"] for group in groups] == pytest.approx([wanted[-1]] * len(groups))


def test_a_run_that_goes_on_with_more_steps_has_their_rate(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    """One that was killed follows the plan of the new length; one that had ended begins again at the full rate."""

    def factors(steps: int, until: int) -> list[float]:
        trainer = trainer_of(make_tiny("llama"), corpus, tmp_path, steps=steps, exits=(2,), warmup_steps=0)
        trainer.resume()

        def stop(progress: StepReport) -> None:
            if progress.step == until:
                trainer.checkpoint()
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            trainer.run(stop)
        return [json.loads(line)["factor"] for line in (trainer.work / METRICS).read_text().splitlines()]

    assert factors(5, 4) == pytest.approx([1, 1, 1, 1])
    assert factors(10, 99)[4:] == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25], abs=1e-6)
    assert factors(15, 99)[10:] == pytest.approx([1, 1, 1, 1, 0.5], abs=1e-6)
    assert len(factors(15, 99)) == 15, "it had ended"


def test_nothing_is_dropped_at_random(make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path) -> None:
    """A model with dropout: balconies are judged as they are exported, and repeated runs are the same."""
    kls = []
    for attempt in ("a", "b"):
        trainer = trainer_of(make_tiny("llama", attention_dropout=0.4), corpus, tmp_path / attempt, steps=3)
        torch.manual_seed(len(kls))
        before = trainer.evaluate()
        assert trainer.evaluate() == before
        trainer.run()
        kls.append((before, trainer.evaluate()))
    assert kls[0] == kls[1]


def test_an_output_that_cannot_hold_the_balconies_is_refused_before_the_training(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    trainer_of(make_tiny("llama"), corpus, tmp_path / "out", steps=1).run()
    with pytest.raises(CheckpointError, match="has balconies of kind 'decoder', not 'mlp'"):
        trainer_of(make_tiny("llama"), corpus, tmp_path / "out", module="mlp")
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(InputError, match="cannot be made"):
        trainer_of(make_tiny("llama"), corpus, tmp_path / "file")


def test_a_disk_that_fills_up_is_one_line(
    make_tiny: Callable[..., Any], corpus: Corpus, tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "other").write_bytes(bytes(72_000))  # three quarters, so that the curve fills the rest soon
    options = {"work": small_disk, "steps": 2000, "evaluate_every": 10_000}
    trainer = trainer_of(make_tiny("llama"), corpus, tmp_path / "out", **options)
    with pytest.raises(TrainingError, match=r"writing failed .No space left on device.: there was no checkpoint yet"):
        trainer.run()
    assert 0 < trainer.step < 2000
    with pytest.raises(TrainingError, match=r"states\.bin: no room for .* lower --cache-gb"):
        trainer_of(make_tiny("llama"), corpus, tmp_path / "out", work=small_disk, cache_gb=0.01).run()


def test_a_cache_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"states\.bin: no room for .*\(No such file or directory\)"):
        _reserve(tmp_path / "gone" / "states.bin", 1000)


def test_a_run_goes_on_after_the_rows_of_its_start_also_when_it_resumes(
    tiny: Any, tmp_path: Path, corpus: Corpus
) -> None:
    """Three steps, five more from their balconies, interrupted in the middle: no row comes twice."""
    learned: list[int] = []

    def run(output: Path, start: Path | None, steps: int, until: int, *, resume: bool = False) -> Trainer:
        begun = None
        if start is not None:
            model = copy.deepcopy(tiny.model)
            begun = Start(load_balconies(start, model), rows_seen(start, (2, 3), corpus.digest) or 0, start.resolve())
        config = TrainConfig(
            exits=(2, 3), steps=steps, seq_len=SEQ_LEN, positions=8, warmup_steps=1, rate=1e-3, vector_rate=1e-3,
            precision="fp32", checkpoint_minutes=0.0, average=0.0,
        )  # fmt: skip
        trainer = Trainer(copy.deepcopy(tiny.model), corpus, config, output, start=begun, compiled=False)
        assert trainer.resume() == resume
        begin, train_step = trainer.step, trainer.train_step

        def counted() -> dict[int, float]:
            if trainer.step - begin == until:
                raise KeyboardInterrupt
            learned.extend(trainer.order.rows(trainer.step).tolist())
            return train_step()

        trainer.train_step = counted
        with contextlib.suppress(KeyboardInterrupt):
            trainer.run()
        return trainer

    def rows_of(directory: Path) -> set[int]:
        entries = json.loads((directory / "balconies.json").read_text())["exits"]
        return {entry["training"]["rows"] for entry in entries.values()}

    first, second = tmp_path / "first", tmp_path / "second"
    run(first, None, 3, 99)
    assert rows_of(first) == {6}
    run(second, first, 5, 2)
    trainer = run(second, first, 5, 99, resume=True)
    assert trainer.order.first == 6 and trainer.step == 5
    assert learned == list(range(16)) and max(rows_of(second)) <= 16
    assert trainer.facts((1.0, 0.5))["rows"] == 16
