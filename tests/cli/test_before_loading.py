"""What is wrong is said before the minutes that a model takes to load."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from balcony_edge.cli.options import use_threads
from balcony_edge.errors import InputError
from balcony_export.data.documents import read_documents, refuse_unreadable
from tests.support.command import refused as refused_here


def loaded(*_: Any, **__: Any) -> None:
    """Stands for a function that loads a model."""
    pytest.fail("the model was loaded")


@pytest.mark.parametrize(("has", "cpus", "asked", "threads"), [(64, 2, None, 2), (1, 2, None, 1), (1, 2, 2, 2)])
def test_pytorch_has_no_more_threads_than_a_containers_quota(
    has: int, cpus: int, asked: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`docker run --cpus 2` on 64 CPUs, OMP_NUM_THREADS=1, and --threads: it counts the machine's cores by itself."""
    found: list[int] = []
    monkeypatch.setattr("balcony_edge.device.machine.available_cpus", lambda: cpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: has)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    use_threads(asked)
    assert found == [threads]


@pytest.mark.parametrize(
    "command",
    [
        ("export", "CHECKPOINT", "--exits", "2", "-o", "OUT"),
        ("train", "CHECKPOINT", "--exits", "2", "--data", "TEXT", "--steps", "1", "-o", "OUT"),
        ("cut", "CHECKPOINT", "--mlp", "8", "--calibration", "TEXT", "-o", "OUT"),
        ("eval", "CHECKPOINT", "--text", "TEXT"),
        ("verify", "BUNDLE", "--against", "CHECKPOINT"),
    ],
    ids=lambda command: command[0],
)
def test_threads_are_bounded_before_the_model_is_loaded(
    command: tuple[str, ...], tiny: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bounded(*_: object) -> None:
        raise InputError("bounded")

    (text := tmp_path / "text.jsonl").write_text('{"text": "the fox"}\n' * 9)
    for name in ("load_model", "load_trainable"):
        monkeypatch.setattr(f"balcony_export.model.checkpoint.{name}", loaded)
    monkeypatch.setattr(f"balcony_edge.cli.workstation.{command[0]}.use_threads", bounded)
    places = {"CHECKPOINT": tiny_checkpoint, "TEXT": text, "OUT": tmp_path / "out", "BUNDLE": tiny.path}
    refused_here("bounded", *(places.get(word, word) for word in command))


def test_run_refuses_a_place_for_its_trace_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balcony_edge.load", lambda *_, **__: pytest.fail("the bundle was loaded"))
    refused_here(f"{tmp_path}: not writable: name another place", "run", tmp_path, "hi", "--record", tmp_path)


def test_run_reads_the_device_profile_before_it_loads(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balcony_runtime.engine.Engine.of", lambda *_, **__: pytest.fail("the engine was loaded"))
    absent = tmp_path / "typo.json"
    refused_here(f"{absent}: there is no such file", "run", tiny.path, "hi", "--profile", absent)


@pytest.mark.parametrize("options", [("--precision", "int4", "--calibration"), ("--evaluate",)], ids=" ".join)
def test_export_reads_texts_before_it_loads_the_model(
    tiny_checkpoint: Path, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balcony_export.model.checkpoint.load_model", loaded)
    common = ("export", tiny_checkpoint, "--exits", "2", "-o", tmp_path / "b")
    refused_here("absent.jsonl: cannot be read (No such file", *common, *options, tmp_path / "absent.jsonl")


@pytest.mark.parametrize("option", ["--verify", "--no-verify"])
def test_an_export_that_compares_nothing_needs_no_engine_of_the_bundle(
    option: str, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`export_bundle` refuses an ONNX Runtime that is too old for the bundle only if a check runs it."""
    checks: list[object] = []

    def stopped(*_: object, check: object, **__: object) -> None:
        checks.append(check)
        raise InputError("stopped")

    monkeypatch.setattr("balcony_export.export.export_bundle", stopped)
    refused_here("stopped", "export", small_checkpoint, "--exits", "1", "-o", tmp_path / "b", option)
    assert [check is None for check in checks] == [option == "--no-verify"]


@pytest.mark.parametrize(("module", "keeps"), [("decoder", True), ("dense", False)])
def test_an_export_that_runs_the_model_loads_it_in_float32(
    module: str, keeps: bool, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense MLP begins with the experts that the model uses most: `verify` runs it in float32 to make the same one."""
    given: list[bool] = []

    def load_model(_: str, *, keep_dtype: bool) -> None:
        given.append(keep_dtype)
        raise InputError("stopped")

    monkeypatch.setattr("balcony_export.model.checkpoint.load_model", load_model)
    options = ("--exits", "2", "-o", tmp_path / "b", "--no-verify", "--exit-module", module)
    refused_here("stopped", "export", tiny_checkpoint, *options)
    assert given == [keeps]


def test_eval_looks_for_texts_before_it_loads_the_model(
    tiny: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in ("_open_bundle", "_open_model"):
        monkeypatch.setattr(f"balcony_edge.cli.workstation.eval.{verb}", loaded)
    for subject in (tiny.path, tiny_checkpoint):
        command = ("eval", subject, "--text", tmp_path / "absent.jsonl")
        refused_here("absent.jsonl: cannot be read (No such file", *command)


def test_engines_of_recurrent_layers_are_refused_before_the_export(
    tiny: Any, make_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny("granite-hybrid").save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("balcony_runtime.backends.accelerator.tensorrt_builder.import_tensorrt", lambda _: None)
    command = ("export", tmp_path / "model", "--exits", "2", "-o", tmp_path / "x", "--no-verify", "--tensorrt", "fp16")
    refused_here("--tensorrt: the model has recurrent layers", *command)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("verb", ["export", "verify", "extract", "eval", "cut"])
def test_balconies_are_looked_for_before_the_model_is_loaded(
    tiny: Any, tiny_checkpoint: Path, text_file: Path, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balcony_export.model.checkpoint.load_model", loaded)
    out = ("-o", tmp_path / "out")
    options: dict[str, tuple[Any, ...]] = {
        "export": (tiny_checkpoint, "--exits", "2", *out),
        "verify": (tiny.path, "--against", tiny_checkpoint),
        "extract": (tiny_checkpoint, "--exit", "2", *out),
        "eval": (tiny_checkpoint, "--text", text_file),
        "cut": (tiny_checkpoint, "--calibration", text_file, "--mlp", "8", *out),
    }
    typo = tmp_path / "balconeis"
    refused_here(f"{typo}: has no balconies.json", verb, *options[verb], "--balconies", typo)


@pytest.mark.parametrize(("verb", "option"), [("train", "--data"), ("train", "--start"), ("cut", "--calibration")])
def test_files_to_train_from_are_looked_for_before_the_model_is_loaded(
    tiny_checkpoint: Path, text_file: Path, verb: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_model", "load_trainable"):
        monkeypatch.setattr(f"balcony_export.model.checkpoint.{name}", loaded)
    options = {"train": {"--exits": "2", "--steps": "5", "--data": text_file}, "cut": {"--mlp": "8"}}
    given = {**options[verb], "-o": tmp_path / "out", option: tmp_path / "absent"}
    words = "absent: has no balconies.json" if option == "--start" else "absent: cannot be read (No such file"
    refused_here(words, verb, tiny_checkpoint, *itertools.chain.from_iterable(given.items()))


def test_a_pipe_is_not_emptied_by_the_look_at_it() -> None:
    """As in bash: `cut MODEL --calibration <(zcat text.jsonl.gz)`."""
    reads, writes = os.pipe()
    os.write(writes, b'{"text": "the fox"}\n{"text": "the dog"}\n')
    os.close(writes)
    pipe = Path(f"/dev/fd/{reads}")
    refuse_unreadable([pipe])
    assert [document.text for document in read_documents(pipe)] == ["the fox", "the dog"]
    os.close(reads)


def test_a_quality_budget_is_refused_by_the_bound_that_it_exceeds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = ("export", tiny_checkpoint, "--exits", "2", "-o", tmp_path / "b", "--quality-budget", "kl=100")
    refused_here("--quality-budget kl=100: must be kl= and nats above 0 and below 100: give e.g. kl=0.02", *command)


def test_gpus_are_not_named_for_the_tensorrt_that_builds_for_its_own(tmp_path: Path) -> None:
    """The builder would send the user to --target tensorrt, which is given."""
    command = ("build", tmp_path, "--target", "tensorrt", "--sm", "87")
    refused_here("--sm with --target tensorrt: it builds for the GPU of this machine only: leave --sm out", *command)


def test_too_little_text_to_calibrate_on_is_refused_before_the_model_is_loaded(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balcony_runtime.engine.Engine.of", loaded)
    (text := tmp_path / "t.txt").write_text("the quick brown fox " * 50)
    refused_here(
        "t.txt: 50 tokens are taken: give 400 or more", "calibrate", tiny.path, "--text", text, "--tokens", "50"
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("--schedule", "cosine", "--decay-share", "0.2"),
            "--decay-share with --schedule cosine, which falls over the whole",
        ),
        (
            ("--loss", "ce", "--vocabulary", "4096"),
            "--vocabulary with --loss ce, which compares all tokens: leave it out",
        ),
        (
            ("--loss", "ce", "--state-weight", "0.5"),
            "--state-weight with --loss ce, which learns from the text alone: leave it out",
        ),
    ],
)
def test_train_refuses_options_without_effect(
    tiny_checkpoint: Path, text_file: Path, options: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    common = ("train", tiny_checkpoint, "--exits", "2", "--steps", "5", "--seq-len", "32", "--data", text_file)
    common = (*common, "-o", tmp_path / "out")
    refused_here(line, *common, *options)
    refused_here("has no checkpoint: train without --resume first", *common, "--resume")
    papers = ("--loss", "ce", "--vocabulary", "0", "--state-weight", "0")  # what `ce` does by itself
    refused_here("has no checkpoint: train without --resume first", *common, *papers, "--resume")
