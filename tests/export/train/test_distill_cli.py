"""Distillation as a command: `balcony-edge train` on real files, exits one at a time, and refusals before the training."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
)
from rich.console import Console
from typer.testing import CliRunner

from balcony_edge.cli import app
from balcony_edge.cli.workstation import train as verb
from balcony_edge.errors import BalconyError, CheckpointError, InputError, TrainingError, UnsupportedModelError
from balcony_export.model.balcony import init_balconies
from balcony_export.model.balcony_files import fingerprint, read_index, save_balconies
from balcony_export.model.checkpoint import load_model
from balcony_export.train.report import StepReport
from balcony_export.train.run_files import CHECKPOINT, read_state
from balcony_export.train.trainer import METRICS, Trainer

RECIPE = ("--seq-len", "24", "--held-out-rows", "4", "--json", "--positions", "8", "--no-compile")


def trained(model: Path, exits: str, text: Path, output: Path, *options: str) -> dict[str, Any]:
    """Output of the command."""
    command = ["train", str(model), "--exits", exits, "--data", str(text), "-o", str(output)]
    command += [*RECIPE, *options]
    result: dict[str, Any] = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    return result


def refused(kind: type[BalconyError], words: str, *arguments: Any) -> None:
    with pytest.raises(kind, match=words):
        trained(*arguments)


def recipe_of(work: Path) -> dict[str, Any]:
    state = read_state(work)
    assert state is not None
    return dict(state["recipe"])


def test_command_line_trains_resumes_and_refuses(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "balconies"
    command = (tiny_checkpoint, "2,3", text_file, out)
    document = trained(*command, "--tokens", "240")
    assert (document["steps"], document["tokens"], set(document["exits"])) == (5, 240, {"2", "3"})
    work = out / "run/2-3"
    assert (work / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert recipe_of(work)["state_weight"] == 0.5
    refused(TrainingError, "continue with --resume", *command, "--tokens", "240")
    before = (work / "checkpoint.safetensors").read_bytes()
    assert trained(*command, "--steps", "7", "--resume")["steps"] == 7
    assert (work / "checkpoint.safetensors").read_bytes() != before
    (work / "curve.png").unlink()
    (work / "curve.png").mkdir()  # a picture that cannot be written takes nothing else away
    assert trained(*command, "--minutes", "0.02", "--resume")["steps"] > 7
    # start from balconies in the output directory, whose index the first checkpoint changes
    (out / "run").rename(tmp_path / "old-run")
    assert trained(*command, "--steps", "2", "--start", str(out))["steps"] == 2
    assert recipe_of(work)["state_weight"] == 0.0, "states drawn together make trained balconies worse"
    (out / "run").rename(tmp_path / "run")
    refused(TrainingError, "already has balcony 2", *command, "--steps", "2")
    (out / "run/2-3").mkdir(parents=True)  # of a run that was killed before its first checkpoint
    refused(TrainingError, "already has balcony 2", *command, "--steps", "2")
    shutil.rmtree(out / "run")
    (tmp_path / "run").rename(out / "run")
    assert trained(*command, "--steps", "4", "--start", str(out), "--resume")["steps"] == 4


def test_a_refused_resume_leaves_the_packed_text(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    """Packing a large text takes minutes, and the command may only have named a wrong file."""
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    trained(tiny_checkpoint, "2", text_file, out, "--steps", "2")
    packed = out / "run/2/corpus.safetensors"
    before = packed.read_bytes()
    other.write_text(text_file.read_text() + json.dumps({"text": "the lazy dog jumps over the quick fox"}) + "\n")
    refused(TrainingError, "made with another data", tiny_checkpoint, "2", other, out, "--steps", "4", "--resume")
    assert packed.read_bytes() == before


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cure of a damaged one is to remove it; that of another account, such as root, is whole."""
    (tmp_path / CHECKPOINT).write_bytes(b"")

    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(TrainingError, match=r"cannot be read \(Permission denied\): make it readable"):
        read_state(tmp_path)


def test_a_document_has_no_colours(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FORCE_COLOR, which many CI services set, makes a terminal of every console."""
    monkeypatch.setattr(verb, "stdout", Console(force_terminal=True, color_system="truecolor"))
    assert trained(tiny_checkpoint, "2", text_file, tmp_path / "out", "--steps", "1")["steps"] == 1


def test_an_interrupt_saves_the_step(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C and SIGTERM, such as `timeout` sends; handlers are as before afterwards."""
    command = [
        "train",
        str(tiny_checkpoint),
        "--exits",
        "2",
        "--data",
        str(text_file),
        "-o",
        str(tmp_path),
        "--steps",
        "40",
    ]
    run, handlers = Trainer.run, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, resume in ((signal.SIGINT, []), (signal.SIGTERM, ["--resume"])):

        def interrupted(self: Trainer, report: Callable[[StepReport], None], number: int = number) -> None:
            def then(progress: StepReport) -> None:
                report(progress)
                if progress.step in (5, 11):
                    signal.raise_signal(number)

            run(self, then)

        monkeypatch.setattr(Trainer, "run", interrupted)
        ended = CliRunner().invoke(app, [*command, *RECIPE, *resume])
        assert ended.exit_code == 130 and not ended.stdout
        assert f"step {12 if resume else 6} is saved: continue with --resume" in " ".join(ended.stderr.split())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.setattr(Trainer, "run", run)
    assert trained(tiny_checkpoint, "2", text_file, tmp_path, "--steps", "40", "--resume")["steps"] == 40


def test_an_interrupt_saves_the_step_where_nobody_reads_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C also ends the reader of `train 2>&1 | tee log`."""

    def broken(*_: object) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    trainer: Any = SimpleNamespace(interrupted=False, clock=lambda: 0.0)
    with verb._saved_at_interrupts(trainer):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", broken)
            signal.raise_signal(signal.SIGINT)
        assert trainer.interrupted, "the run ends after its step"


def test_a_signal_that_comes_twice_is_one_request() -> None:
    """systemd and Slurm signal every process of a job, and `accelerate launch` then passes its own one on."""
    times = iter([5.0, 5.01, 7.0])
    trainer: Any = SimpleNamespace(interrupted=False, clock=lambda: next(times))
    with verb._saved_at_interrupts(trainer):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert trainer.interrupted, "the run ends after its step"
        with pytest.raises(KeyboardInterrupt):  # somebody waits no longer
            signal.raise_signal(signal.SIGINT)


def test_a_lost_connection_saves_the_step_unless_nohup_ignores_it() -> None:
    """SIGHUP, which the end of an ssh session sends, and `accelerate launch` to its processes, also under nohup."""
    trainer: Any = SimpleNamespace(interrupted=False, clock=lambda: 0.0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with verb._saved_at_interrupts(trainer):
            signal.raise_signal(signal.SIGHUP)
        assert not trainer.interrupted
        signal.signal(signal.SIGHUP, lambda *_: None)
        with verb._saved_at_interrupts(trainer):
            signal.raise_signal(signal.SIGHUP)
        assert trainer.interrupted, "the run ends after its step"
    finally:
        signal.signal(signal.SIGHUP, before)


def _without_a_place(*_: object, **__: object) -> None:
    """What importing matplotlib does where neither the home directory nor one for temporary files can be written."""
    raise OSError("Matplotlib requires access to a writable cache directory")


@pytest.mark.parametrize("plotting", [lambda *_, **__: None, _without_a_place])
def test_an_exit_that_began_as_the_full_model_has_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plotting: Any
) -> None:
    """A copy of the last layer after all layers before it: its KL is exactly 0 in Mamba in float32."""
    screen, facts = io.StringIO(), {"work": tmp_path, "output": tmp_path, "config": SimpleNamespace(loss="kl")}
    trainer: Any = SimpleNamespace(best={2: (0.0, 1.0)}, balconies={2: torch.nn.Linear(2, 2)}, tokens=48, **facts)
    (tmp_path / METRICS).touch()
    monkeypatch.setattr("balcony_export.train.report.plot_curves", plotting)
    monkeypatch.setattr(verb, "stdout", Console(file=screen, width=120))
    verb._finish(trainer, "tiny", None, {2: 0.0}, as_json=False)
    assert "100.0 %" in screen.getvalue()


def test_rows_that_come_again_are_said(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    for rows, words in (("2", ""), ("300", "the run takes 300 rows, and")):
        command = ["train", str(tiny_checkpoint), "--exits", "2", "--data", str(text_file), "-o", str(tmp_path / rows)]
        ended = CliRunner().invoke(app, [*command, *RECIPE, "--steps", "1", "--batch-rows", rows, "--micro-rows", rows])
        said = " ".join(ended.stderr.split())
        assert ended.exit_code == 0 and words in said and ("come again" in said) == bool(words)


def test_exits_are_added_one_at_a_time(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "balconies"
    trained(tiny_checkpoint, "2", text_file, out, "--steps", "3")
    files = ("balcony_2.safetensors", "run/2/metrics.jsonl", "run/2/checkpoint.safetensors", "run/2/curve.png")
    before = [(out / name).read_bytes() for name in files]
    trained(tiny_checkpoint, "3", text_file, out, "--steps", "3")
    assert [(out / name).read_bytes() for name in files] == before
    assert set(json.loads((out / "balconies.json").read_text())["exits"]) == {"2", "3"}
    refused(TrainingError, "already has balcony 3", tiny_checkpoint, "3,4", text_file, out, "--steps", "3")


def test_copies_of_another_layer_go_on_with_resume(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    """As `init_balconies(..., layer=...)` makes them (docs/backbones.md); a run that starts from them keeps their layer."""
    model, begun, out = load_model(str(tiny_checkpoint)), tmp_path / "begun", tmp_path / "out"
    save_balconies(begun, init_balconies(model, (2,), layer=1), fingerprint(model))
    command = (tiny_checkpoint, "2", text_file, out, "--start", str(begun))
    trained(*command, "--steps", "2")
    assert trained(*command, "--steps", "4", "--resume")["steps"] == 4
    assert read_index(out)["layer"] == 1


def test_a_run_does_not_go_on_with_balconies_of_a_larger_model(
    tiny_checkpoint: Path, make_tiny: Callable[..., Any], text_file: Path, tmp_path: Path
) -> None:
    """They are copies of its layer 8, and this model has five layers."""
    larger, begun, out = make_tiny("llama", num_hidden_layers=9), tmp_path / "begun", tmp_path / "out"
    save_balconies(begun, init_balconies(larger, (2,)), fingerprint(larger))
    command = (tiny_checkpoint, "2", text_file, out)
    trained(*command, "--steps", "2")
    again = ("--steps", "4", "--resume", "--start", str(begun))
    refused(CheckpointError, "belong to another base model", *command, *again)


def test_attention_that_the_fused_kernel_cannot_do_is_trained(
    make_tiny: Callable[..., Any], make_tokenizer: Callable[[], Any], text_file: Path, tmp_path: Path
) -> None:
    """Gemma 2 caps its scores, so transformers refuses PyTorch's fused attention for it."""
    make_tiny("gemma2").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    document = trained(tmp_path / "model", "2", text_file, tmp_path / "out", "--steps", "2")
    exit_ = document["exits"]["2"]
    assert document["steps"] == 2 and 0 < exit_["held_out_kl"] <= exit_["held_out_kl_before"]


def test_models_and_rows_that_cannot_be_are_refused_before_the_training(
    tiny_checkpoint: Path, make_tokenizer: Callable[[], Any], text_file: Path, tmp_path: Path
) -> None:
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 300, "n_positions": 32}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    out = tmp_path / "out"
    command = (text_file, out, "--steps", "1")
    refused(UnsupportedModelError, "model type 'gpt2'", tmp_path / "gpt2", "1", *command)
    too_long = (*command, "--seq-len", "100000")
    refused(InputError, r"--seq-len 100000: this model's context holds \d+ tokens", tiny_checkpoint, "2", *too_long)
    assert not out.exists()
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd.jsonl").write_text('{"text": "x"}\nodd\n')  # a text that would be refused, if all of it were read
    unwritable = (tmp_path / "odd.jsonl", tmp_path / "file", "--steps", "1")
    refused(TrainingError, "file: cannot be written", tiny_checkpoint, "2", *unwritable)


def test_the_commands_for_several_devices_are_ones_that_accelerate_takes() -> None:
    text = (Path(__file__).parents[3] / "docs/training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^ +accelerate launch (.+)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command, flag in zip(commands, ("multi_gpu", "use_fsdp"), strict=True):
        given = launch_command_parser().parse_args(shlex.split(command))
        checked, *_ = _validate_launch_command(given)
        assert getattr(checked, flag) and checked.num_processes == 4
    words = shlex.split(commands[0])
    rows, part = (int(words[words.index(option) + 1]) for option in ("--batch-rows", "--micro-rows"))
    assert rows == 4 * part >= 64, "with smaller passes, launches and Muon take longer than they do"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "5", "--minutes", "5"), "a run needs exactly one of them: give one"),
        (("--steps", "5", "--rate", "nan"), "rate = nan: must be a positive number"),
        (
            ("--steps", "5", "--batch-rows", "4", "--micro-rows", "3"),
            "4 rows a step in passes of 3: must be a multiple",
        ),
        (("--steps", "5", "--mix", "a.jsonl"), "--mix a.jsonl: expected FILE=SHARE"),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(
    options: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balcony_export.model.checkpoint.load_trainable", lambda *_: pytest.fail("it was loaded"))
    refused(InputError, words, tmp_path, "2", tmp_path / "t.txt", tmp_path / "out", *options)
