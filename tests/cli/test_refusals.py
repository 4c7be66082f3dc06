"""Every bad input of tests/support/refusals.py gets its one line and leaves nothing behind."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from balcony_edge.cli import reported
from tests.support.command import invoke_here
from tests.support.refusals import REFUSALS, Refusal, lay_out


@pytest.fixture(scope="module")
def directory(tiny: Any, make_tiny: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the commands name."""
    path = tmp_path_factory.mktemp("refusals")
    lay_out(path, tiny_checkpoint, tiny.path)
    broken = make_tiny("llama")
    broken.model.layers[3].mlp.up_proj.weight.data[0, 0] = float("nan")
    config = transformers.PhimoeConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=320,
    )
    for name, model in (("nan", broken), ("moe", transformers.PhimoeForCausalLM(config))):
        model.save_pretrained(path / name)
        tiny.tokenizer.save_pretrained(path / name)
    return path


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: " ".join(refusal.arguments)[:60])
def test_bad_input_is_refused_by_its_line(refusal: Refusal, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    before = sorted(directory.rglob("*"))
    done = invoke_here(*refusal.arguments)
    assert (done.returncode, done.stdout) == (1, ""), done
    line = ".*".join(map(re.escape, f"balcony-edge: {refusal.message}".split("…")))
    assert re.fullmatch(line, done.stderr.strip()), done.stderr
    assert sorted(directory.rglob("*")) == before, "a refused command left something behind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("run",), "Missing argument 'bundle'"), (("run", "bundle", "hi", "--speed"), "No such option")],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...], message: str) -> None:
    done = invoke_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr, done


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("no accelerate", name="accelerate"), "accelerate is not installed"),
        (ImportError("no GgufConfig", name="transformers"), "transformers cannot be used (no GgufConfig)"),
        (ModuleNotFoundError("no moe", name="transformers.integrations.moe"), "transformers cannot be used (no moe)"),
    ],
)
def test_a_workstations_package_that_is_missing_or_too_old_is_one_line(
    error: ImportError, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        reported(fails)
    line = f"balcony-edge: {told}: this verb needs a workstation: pip install 'balcony-edge[export]'\n"
    assert (stop.value.code, capsys.readouterr().err) == (1, line)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("can't start new thread"), "no more threads can be started: end other processes"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: free memory"),
        (
            type("InductorError", (RuntimeError,), {})("ImportError: x.so: failed to map segment\n\nSet TORCH"),
            "the loss cannot be compiled (ImportError: x.so: failed to map segment): train with --no-compile",
        ),
        (
            type("GPUTooOldForTriton", (RuntimeError,), {})("Found Tesla P100 which is too old to be supported"),
            "the loss cannot be compiled (Found Tesla P100 which is too old to be supported): train with --no-compile",
        ),
        (OSError(errno.ENFILE, "Too many", "w.bin"), "w.bin: cannot be used (Too many): free space or files"),
        (OSError(errno.ELOOP, "Too many links", "b/bundle.json"), "b/bundle.json: cannot be used (Too many links)"),
    ],
)
def test_a_system_that_has_no_more_is_one_line(error: Exception, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        reported(fails)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith(f"balcony-edge: {told}")
