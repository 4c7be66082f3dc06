"""Every verb on real files, and every bad input as one clear line that leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from typer.main import get_command

import balcony_edge
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import MANIFEST, Manifest
from balcony_edge.cli import app, reported
from balcony_edge.cli.console import depth_styles
from balcony_edge.cli.device.calibrate import _documents, _percent
from balcony_edge.cli.show import show_stream
from balcony_edge.errors import EngineBuildError, InfeasibleError
from balcony_runtime.backends.accelerator import tensorrt_builder
from tests.support.command import COMMAND, invoke, invoke_here, refused, unmeasured


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that the command line exported and verified."""
    path = tmp_path_factory.mktemp("cli") / "bundle"
    done = invoke_here("export", tiny_checkpoint, "--exits", "0.6x,0.8x", "-o", path, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["exits"] == [2, 3, 5] and document["verified"] is True
    assert "untrained" in done.stderr
    return path


def test_export_reports_for_people(small_checkpoint: Path, tmp_path: Path) -> None:
    command = ("export", small_checkpoint, "--exits", "1", "-o", tmp_path / "b", "--no-verify", "--precision", "fp16")
    done = invoke(*command, env=unmeasured())  # the one export in a process of its own that runs to its end
    assert done.returncode == 0, done.stderr
    assert "small-llama, exits 1, 2" in " ".join(done.stdout.split()) and "not verified" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_verify_passes_and_fails(
    exported: Path, tiny_checkpoint: Path, make_tiny: Any, tmp_path: Path, tiny: Any
) -> None:
    done = invoke_here("verify", exported, "--against", tiny_checkpoint)
    assert done.returncode == 0 and done.stdout.count("pass") == 15, done
    document = json.loads(invoke_here("verify", exported, "--against", tiny_checkpoint, "--json").stdout)
    assert {check["phase"] for check in document} == {
        *("prefill", "decode", "backbone.onnx"),
        *("prefill, portable", "decode, portable"),
    }
    other = make_tiny("llama")
    other.model.layers[4].mlp.down_proj.weight.data *= 1.01
    other.save_pretrained(tmp_path / "other")
    tiny.tokenizer.save_pretrained(tmp_path / "other")
    done = invoke_here("verify", exported, "--against", tmp_path / "other")
    assert done.returncode == 1 and "FAIL" in done.stdout
    assert "of the largest logit, more than the allowed 1e-04: compare it with tiny-llama" in done.stderr
    wide = make_tiny("llama", hidden_size=48)
    wide.save_pretrained(tmp_path / "wide")
    tiny.tokenizer.save_pretrained(tmp_path / "wide")
    refused(
        f"{exported}: was made from tiny-llama with hidden_size 32, but the given model has 48: name tiny-llama",
        *("verify", exported, "--against", tmp_path / "wide"),
    )


def test_a_quantized_export(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text, bundle = tmp_path / "text.jsonl", tmp_path / "b"
    text.write_text(
        "".join(json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 4}) + "\n" for _ in range(200))
    )
    common = ["export", tiny_checkpoint, "--exits", "2,3", "-o", bundle]
    done = invoke_here(*common, "--precision", "int8", "--calibration", text, "--evaluate", text)
    assert done.returncode == 0, done.stderr
    assert "exit 2 on text.jsonl: KL" in done.stdout and "verified on 4 prompts" in " ".join(done.stdout.split())
    document = json.loads(invoke_here("inspect", bundle, "--json").stdout)
    assert document["exits"][-1]["exit_layer"] == 5 and document["exits"][0]["quality"]["text"]["text.jsonl"]
    assert "agrees" in invoke_here("inspect", bundle).stdout
    refused(
        "documents of text.jsonl, which this run would replace",
        "eval",
        bundle,
        "--text",
        text,
        "--limit",
        "1",
    )
    refused("--model x without --text", "eval", bundle, "--tasks", "t", "--model", "x")
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["quantization"]["kv_bits"] == 32 and manifest["quantization"]["method"] == "gptq"
    assert manifest["exits"][0]["quality"]["text"]["text.jsonl"]["kl"]["value"] > 0.01
    assert manifest["exits"][2]["quality"]["text"]["text.jsonl"]["kl"]["value"] < 0.05
    assert "unpacks" not in done.stderr
    assert invoke_here("run", bundle, "the fox", "-n", "5", "--json").returncode == 0
    shutil.rmtree(bundle)
    done = invoke_here(*common, "--precision", "int4,level=1", "--no-verify")
    assert done.returncode == 0 and "unpacks 8-bit weights" in done.stderr
    shutil.rmtree(bundle)
    refused("only int8 and int4 are rounded", *common, "--calibration", text)
    refused("kv=8: needs --calibration", *common, "--precision", "int4,kv=8")
    refused("needs --evaluate TEXT and replaces --precision", *common, "--quality-budget", "kl=0.1")
    refused("another text has the same name", *common, "--evaluate", text, "--evaluate", text)
    refused(
        "engines are built from fp32 or fp16",
        *common,
        "--evaluate",
        text,
        "--quality-budget",
        "kl=1",
        "--tensorrt",
        "fp16",
    )
    refused("--quality-budget kl=x: must be kl= and nats", *common, "--quality-budget", "kl=x", "--evaluate", text)
    assert not bundle.exists()


def test_a_run_is_recorded_and_shares_packed_weights(exported: Path, tmp_path: Path) -> None:
    trace, packed = tmp_path / "run.jsonl", tmp_path / "packed"
    options = ("-n", "6", "--exit", "3", "--record", trace, "--packed", packed, "--json")
    done = invoke_here("run", exported, "the fox", *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    tokens = json.loads(done.stdout)["tokens"]
    assert len(lines) == 2 + len(tokens) and "costs" in lines[0] and lines[1] == {"budget": {"exit_layer": 3}}
    assert [line["exit_layer"] for line in lines[2:]] == [3] * len(tokens)
    assert len(list(packed.iterdir())) == 1
    done = invoke("run", exported, "the fox", "-n", "6", "--live", env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0 and "last decisions" in done.stderr, done
    done = invoke("run", exported, "the fox", "-n", "60", "--json", "--record", "/dev/full")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done  # after the reply
    assert len(json.loads(done.stdout)["tokens"]) > 30
    assert "/dev/full: writing failed (No space left on device): free space" in done.stderr
    done = invoke("run", exported, "the fox", "-n", "60", "--record", "/dev/full")
    assert done.returncode == 1 and done.stdout.endswith("\n") and "tokens after" in done.stderr, done


def test_inspect(exported: Path) -> None:
    done = invoke("inspect", exported, "--io", env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0
    for text in ("tiny-llama", "0.60×", "untrained", "past_key_2", "batch × rows × 32", "logits"):
        assert text in done.stdout, text
    refused("--io with --json: the document has the tables anyway", "inspect", exported, "--io", "--json")
    document = json.loads(invoke_here("inspect", exported, "--json").stdout)
    assert [row["exit_layer"] for row in document["exits"]] == [2, 3, 5]
    assert {row["module"] for row in document["exits"][:2]} == {"decoder"}, "what the manifest says of an exit"
    reads = [row["bytes_read"] for row in document["exits"]]
    assert [row["ideal_speedup"] for row in document["exits"]] == [round(reads[-1] / read, 3) for read in reads]
    assert document["exits"][2]["non_embedding_parameters"] == document["exits"][2]["parameters_read"] - 320 * 32


def test_run(exported: Path) -> None:
    done = invoke("run", exported, "the fox", "-n", "12", "--exit", "3")
    assert done.returncode == 0, done.stderr
    assert "tokens after" in done.stderr and "ms a token" in done.stderr
    text = json.loads(invoke_here("run", exported, "the fox", "-n", "12", "--exit", "3", "--json").stdout)["text"]
    assert done.stdout == f"{text}\n"  # only the reply
    options = ("--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--seed", "3")
    done = invoke_here("run", exported, "the fox", "-n", "12", "--tpot-ms", "1000", "--json", *options)
    document = json.loads(done.stdout)
    assert document["new_tokens"] == len(document["tokens"]) <= 12
    assert document["text"] == "".join(token["text"] for token in document["tokens"])
    assert document["tokens_per_exit"] == {"5": document["new_tokens"]} and document["late_tokens"] == 0
    assert [token["target_ms"] for token in document["tokens"]] == [None] + [1000.0] * (document["new_tokens"] - 1)


def test_run_with_a_structure(exported: Path, tmp_path: Path) -> None:
    """The reply follows the file's schema, and the summary counts what was forced."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"animal": {"enum": ["fox", "dog"]}}, "required": ["animal"], '
                      '"additionalProperties": false}', encoding="utf-8")  # fmt: skip
    document = json.loads(invoke_here("run", exported, "the", "--json-schema", schema, "--json").stdout)
    assert json.loads(document["text"]) in ({"animal": "fox"}, {"animal": "dog"})
    assert document["forced_tokens"] > 4 and document["finish_reason"] == "stop"
    assert sum(token["forced"] for token in document["tokens"]) == document["forced_tokens"]
    found = invoke_here("run", exported, "the", "--regex", "(fox|dog){3}", "--frequency-penalty", "1")
    assert found.stdout.strip().replace("fox", "").replace("dog", "") == "" and "forced" in found.stderr
    for name, text in (("lark", 'start: ("fox" | "dog") "!"'), ("gbnf", 'root ::= ("fox" | "dog") "!"')):
        grammar = tmp_path / f"animal.{name}"
        grammar.write_text(text, encoding="utf-8")
        assert invoke_here("run", exported, "the", "--grammar", grammar).stdout in ("fox!\n", "dog!\n")


@pytest.mark.parametrize(
    "profile", sorted(Path(__file__).parents[2].joinpath("profiles").glob("*.toml")), ids=lambda p: p.stem
)
def test_run_with_every_shipped_profile(exported: Path, profile: Path) -> None:
    done = invoke_here("run", exported, "the fox", "-n", "4", "--budget", profile, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] >= 1


def test_build(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "b"))
    common = ("build", bundle, "--context-length", "64")
    done = invoke_here(*common, "--sm", "86,89", "--json")
    assert done.returncode == 0 and done.stderr.strip() == "", done
    document = json.loads(done.stdout)
    assert document["name"] == "rtx-fp16" and document["builder"].startswith("tensorrt_rtx ")
    assert all(engine["bytes"] > 0 for engine in document["engines"] if engine["graph"] != "backbone")
    done = invoke_here(*common, "--graphs-only", "--target", "tensorrt", "--operators", "plain")
    assert done.returncode == 0 and "graphs only: build on the device" in " ".join(done.stdout.split()), done
    done = invoke_here("inspect", bundle, "--io")
    assert done.returncode == 0 and "tensorrt/tensorrt-fp16-plain" in done.stdout and "past_key_0" in done.stdout
    assert "tensorrt/rtx-fp16 stage_0 (stage_0.onnx)" in " ".join(done.stdout.split()), done.stdout
    assert "compute capability 86, 89" in " ".join(done.stdout.split())
    # A new set is built next to the old one, so a build that fails leaves the old set as it was.
    files = {path: path.read_bytes() for path in (bundle / "tensorrt/rtx-fp16").iterdir()}
    engines = Bundle.open(bundle).manifest.engines

    def fails(*_: Any) -> None:
        raise EngineBuildError("stage_1.onnx: no")

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_builder, "make_engines", fails)
        refused("stage_1.onnx: no", "build", bundle, "--context-length", "48", "--sm", "86")
    assert {path: path.read_bytes() for path in (bundle / "tensorrt/rtx-fp16").iterdir()} == files
    assert Bundle.open(bundle).manifest.engines == engines
    assert invoke_here(*(again := ("build", bundle, "--context-length", "48", "--sm", "86"))).returncode == 0
    changed = Bundle.open(bundle).manifest.engines
    assert changed.keys() == engines.keys() and changed["rtx-fp16"].context_length == 48
    places = [engines.directory or name for name, engines in changed.items()]
    assert sorted(path.name for path in (bundle / "tensorrt").iterdir()) == sorted(places)
    for option in (("--sm", "86"), ("--whole",), ("--timing-cache", tmp_path / "t")):
        refused("--graphs-only: --sm, --whole and --timing-cache", *common, "--graphs-only", *option)
    refused("--timing-cache: TensorRT-RTX does not time kernels", *common, "--timing-cache", tmp_path / "t")
    refused("--block with --rounded-as", *common, "--precision", "int4", "--block", "32", "--rounded-as", bundle)
    refused("not a multiple of --block 64", *common, "--precision", "int4")
    int4 = ("--precision", "int4", "--graphs-only")
    assert invoke_here(*common, *int4, "--block", "32").returncode == 0
    made = Bundle.open(bundle).manifest.engines["rtx-int4"]
    assert invoke_here(*common, *int4).returncode == 0  # without --block, graphs that are there are not rounded anew
    assert Bundle.open(bundle).manifest.engines["rtx-int4"] == made and made.block_size == 32
    assert invoke_here("build", bundle, "--context-length", "32", "--batch", "4", *int4).returncode == 0
    made = Bundle.open(bundle).manifest.engines["rtx-int4"]
    assert invoke_here("build", bundle, *int4).returncode == 0  # sizes that are not given are those that are there
    assert Bundle.open(bundle).manifest.engines["rtx-int4"] == made and made.batch_size == 4
    assert Bundle.open(bundle).manifest.engines["rtx-int4"].block_size == 32
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["engines"]["rtx-int4"]["rounded"] = True
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    assert invoke_here("build", bundle, *int4).returncode == 0  # the graphs stay
    larger = ("build", bundle, "--batch", "8", *int4)
    refused("would lose the integers that it has from another bundle: name that with --rounded-as", *larger)
    assert invoke_here(*larger, "--block", "32").returncode == 0
    assert not Bundle.open(bundle).manifest.engines["rtx-int4"].rounded
    refused("--block 7: give 32, 64 or 128", *common, "--precision", "int4", "--block", "7")
    refused("--block and --rounded-as are for int4", *common, "--block", "128")
    refused("tensorrt is not installed", *common, "--target", "tensorrt")
    refused("this bundle takes 1 to 256", "build", bundle, "--context-length", "257")
    refused("name one with --engines", "run", bundle, "the fox", "--device", "cuda")
    refused("CUDA", "run", bundle, "hi", "--device", "tensorrt", "--engines", "rtx-fp16")
    assert invoke_here("run", bundle, "the fox", "-n", "3", "--device", "cpu", "--engines", "rtx-fp16").returncode == 0
    assert invoke_here("run", bundle, "the fox", "-n", "3").returncode == 0  # auto: no GPU, so the CPU
    (Bundle.open(bundle).engine_directory("rtx-fp16") / "norm.engine").write_bytes(b"")
    run = ("run", bundle, "the fox", "-n", "3", "--device", "cpu", "--engines", "rtx-fp16")
    refused("norm.engine: 0 bytes", *run)
    with monkeypatch.context() as patch:  # the graphs are whole, so only engines are made again
        patch.setattr("balcony_export.tensorrt.engine_set.make_graphs", fails)
        assert invoke_here(*again).returncode == 0
    assert invoke_here(*run).returncode == 0


def test_extract(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    done = invoke_here("extract", tiny_checkpoint, "--exit", "1", "-o", tmp_path / "small", "--json")
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["layers"] == 2
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_hidden_layers"] == 2
    done = invoke_here("export", tmp_path / "small", "--exits", "1", "-o", tmp_path / "b", "--exit-module", "none")
    facts = json.loads(invoke_here("inspect", tmp_path / "b", "--json").stdout)["exits"]
    assert [exit_["depth_factor"] for exit_ in facts] == [0.5, 1.0]  # no layer after the first of two
    scored = invoke_here("eval", tmp_path / "b", "--text", text_file, "--limit", "1", "--json")
    assert [exit_["depth_factor"] for exit_ in json.loads(scored.stdout)["exits"]] == [0.5, 1.0]
    assert done.returncode == 0 and "untrained" not in done.stderr, done
    done = invoke_here("verify", tmp_path / "b", "--against", tmp_path / "small")
    assert done.returncode == 0, done
    refused("exit layer 5: a model of 5 layers", "extract", tiny_checkpoint, "--exit", "5", "-o", tmp_path / "x")
    refused("already exists", "extract", tiny_checkpoint, "--exit", "3", "-o", tmp_path / "small")
    common = ("export", tiny_checkpoint, "--exits", "2", "-o", tmp_path / "x", "--exit-module", "mlp")
    refused("--exit-module with --balconies", *common, "--balconies", tmp_path)


def test_training_needs_a_length(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    common = ("train", tiny_checkpoint, "--exits", "2,3", "--data", text_file, "-o", tmp_path / "out")
    refused("the length of the run is missing: give --tokens", *common)


def test_replay_says_what_would_be_decided_otherwise(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "core" / "control" / "golden.jsonl"
    done = invoke_here("replay", golden, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["decisions"] == sum(found["exits"].values()) == 120, done
    assert found["differences"] == []
    changed = tmp_path / "changed.jsonl"
    lines = golden.read_text().splitlines()
    last = json.loads(lines[-1])
    lines[-1] = json.dumps({**last, "exit_layer": 999, "reason": "because it was so"})
    changed.write_text("\n".join(lines) + "\n")
    done = invoke_here("replay", changed, "--json")
    assert done.returncode == 1
    (difference,) = json.loads(done.stdout)["differences"]
    assert difference["decision"] == 119 and difference["recorded"]["reason"] == "because it was so"
    assert difference["again"]["exit_layer"] == last["exit_layer"]
    done = invoke_here("replay", changed)
    text = " ".join(done.stdout.split())
    assert done.returncode == 1 and "decisions that differ now: 1" in text and "because it was" in text, text
    lines[-1] = json.dumps({**last, "infeasible": not last["infeasible"], "catch_up": [0, 3, False]})
    changed.write_text("\n".join(lines) + "\n")
    (difference,) = json.loads(invoke_here("replay", changed, "--json").stdout)["differences"]
    assert (difference["recorded"]["catch_up"], difference["again"]["catch_up"]) == ([0, 3, False], last["catch_up"])
    assert invoke_here("replay", changed).stdout.count("infeasible") >= 2, "both sides name what differs"
    lines[-1] = json.dumps({**last, "exit_layer": 999, "reason": "[/b]"})  # no markup of the table
    changed.write_text("\n".join(lines) + "\n")
    assert "[/b]" in invoke_here("replay", changed).stdout
    refused("not readable as a trace", "replay", tmp_path / "absent.jsonl")


def test_a_replay_leaves_the_last_digits_of_a_time_alone(tmp_path: Path) -> None:
    """A trace may come from another Python: from 3.12 on `sum` rounds floats in another way."""
    *lines, last = (Path(__file__).parents[1] / "core" / "control" / "golden.jsonl").read_text().splitlines()
    changed = tmp_path / "changed.jsonl"
    for more_ms, code in ((1e-12, 0), (1e-3, 1)):
        token = json.loads(last)
        changed.write_text("\n".join([*lines, json.dumps({**token, "period_ms": token["period_ms"] + more_ms})]))
        assert invoke_here("replay", changed).returncode == code


@pytest.mark.parametrize(("share", "shown"), [(0.999, "99.9%"), (0.0004, "0.04%"), (0.02, "2%"), (0.3, "30%")])
def test_a_promise_is_shown_as_it_was_made(share: float, shown: str) -> None:
    assert _percent(share) == shown


def test_calibrate_and_run_confident(exported: Path, tmp_path: Path) -> None:
    bundle, text = Path(shutil.copytree(exported, tmp_path / "b")), tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"the quick brown fox {i} jumps over dog {i * i}"}) + "\n" for i in range(80))
    )
    done = invoke_here("calibrate", bundle, "--text", text, "--max-disagreement", "30%", "--json")
    assert done.returncode == 0, done
    found = json.loads(done.stdout)
    assert (
        found["max_disagreement"] == 0.3
        and found["tokens"] >= 400
        and found["measure"] in ("top1", "margin", "entropy")
    )
    assert json.loads((bundle / "bundle.json").read_text())["confidence"] == found
    done = invoke_here("calibrate", bundle, "--text", text, "--max-disagreement", "0.3", "--tokens", "600")
    assert done.returncode == 0 and "promised: at most 30% of tokens" in " ".join(done.stdout.split()), done
    other = tmp_path / "other.txt"
    other.write_text("over the lazy dog and the balcony " * 60)
    done = invoke_here("calibrate", bundle, "--check", other, "--json")
    checked = json.loads(done.stdout)
    assert checked["text"] == "other.txt" and checked["tokens"] >= 400 and checked["promised"] == 0.3
    assert checked["exits"].keys() == {"2", "3"}
    assert all(0 <= held["disagreement"] <= held["exit_share"] <= 1 for held in checked["exits"].values())
    done = invoke_here("calibrate", bundle, "--check", other)
    assert done.returncode == 0 and "thresholds from text.jsonl" in " ".join(done.stdout.split()), done
    done = invoke_here("calibrate", bundle, "--check", other, "--document-tokens", "999")
    assert done.returncode == 0, "pieces are at most as long as the bundle's context"
    refused("give exactly one: --text to calibrate", "calibrate", bundle)
    done = invoke_here("run", bundle, "the fox", "-n", "9", "--policy", "confident", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["quality"].keys() == {"2", "3"}, done
    refused("--max-disagreement 0: must be above 0", "calibrate", bundle, "--text", text, "--max-disagreement", "0")
    refused("400 or more", "calibrate", bundle, "--text", text, "--tokens", "50")


def test_calibrate_reads_the_text_before_it_loads_the_model(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balcony_runtime.engine.Engine.of", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "bad.jsonl").write_text('{"words": 1}')
    refused('bad.jsonl:1: has no "text"', "calibrate", exported, "--text", tmp_path / "bad.jsonl")


def test_under_optimums_command_line(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """optimum finds `optimum-cli export balcony` in its namespace for commands of other packages."""
    from optimum.commands.optimum_cli import main as optimum

    common = ["optimum-cli", "export", "balcony", str(tiny_checkpoint), str(tmp_path / "b"), "--exits"]
    monkeypatch.setattr(sys, "argv", [*common, "2,3"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimum()
    assert json.loads(invoke_here("inspect", tmp_path / "b", "--json").stdout)["exits"][0]["exit_layer"] == 2
    monkeypatch.setattr(sys, "argv", [*common, "2"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        optimum()
    assert stop.value.code == 1 and capsys.readouterr().err.startswith("balcony-edge: ")


def test_ctrl_c_in_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, interruptible: Any) -> None:
    command = [*COMMAND, "export", str(tiny_checkpoint), "--exits", "2", "-o", str(tmp_path / "b")]
    process = interruptible(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(".b.partial-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_generation_ends_the_reply(exported: Path, interruptible: Any) -> None:
    command = [*COMMAND, "run", str(exported), "the fox", "-n", "230", "--json", "--temperature", "3", "--seed", "1"]
    # Slow every token down in the child, so that the signal arrives while it generates.
    command[4] = (
        "import sys, time; from balcony_runtime import token_sequence\n"
        "real = token_sequence.TokenSequence.step\n"
        "def slow(*a):\n    print('token', file=sys.stderr, flush=True); time.sleep(0.1); return real(*a)\n"
        "token_sequence.TokenSequence.step = slow\n"
        "from balcony_edge.cli import main; main()"
    )
    process = interruptible(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for _ in range(5):
        process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    document = json.loads(out)
    assert 1 <= document["new_tokens"] < 200 and document["finish_reason"] == "cancelled"


def test_every_part_of_a_text_begins_as_a_text_does(bundle_copy: Path, tmp_path: Path) -> None:
    file = bundle_copy / "tokenizer.json"
    tokenizer = Tokenizer.from_str(file.read_text())
    tokenizer.post_processor = TemplateProcessing("<end> $A", special_tokens=[("<end>", 0)])
    file.write_text(tokenizer.to_str())
    manifest = Manifest.model_validate_json((bundle_copy / MANIFEST).read_text())
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    for bos, starts in ((0, True), (None, False)):
        model = manifest.model.model_copy(update={"bos_token_id": bos})
        bundle = Bundle(bundle_copy, manifest.model_copy(update={"model": model}))
        parts = _documents(tmp_path / "t.txt", bundle, 60, 16)
        assert len(parts) > 3 and max(map(len, parts)) == 16 and sum(map(len, parts)) <= 60
        assert all(part[0] == 0 for part in parts) is starts and all(0 not in part[1:] for part in parts)


def test_every_kind_of_text_in_a_file_is_calibrated_on(tiny: Any, tmp_path: Path) -> None:
    """Although the file begins with one kind of it, and has more than is taken."""
    lines = [json.dumps({"text": f"{word} {word}"}) for word in ("fox", "dog") for _ in range(100)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    parts = _documents(tmp_path / "t.jsonl", Bundle.open(tiny.path), 100, 16)
    kinds = [sum(part == other for part in parts) for other in (parts[0], next(p for p in parts if p != parts[0]))]
    assert min(kinds) > len(parts) / 4


@pytest.mark.parametrize("allocate", [bytearray, torch.empty])
def test_memory_that_is_not_there_is_one_line(allocate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        reported(lambda: allocate(2**60))
    assert stop.value.code == 1
    assert re.fullmatch("balcony-edge: out of memory: .* --window; .*\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="shape"):  # a bug keeps its traceback
        reported(lambda: torch.zeros(2, 3) + torch.zeros(5, 7).view(3))


def test_help_of_every_verb_is_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = invoke("--help")
    assert done.returncode == 0
    verbs = list(getattr(get_command(app), "commands"))  # noqa: B009 - a group, which typer's types do not say
    assert {"export", "run", "plan"} <= {*verbs}
    for command in (*((verb,) for verb in verbs), ("budget", "check"), ("budget", "schema")):
        assert command[0] in done.stdout
        page = invoke_here(*command, "--help")
        assert page.returncode == 0 and not re.search("….?.?│$", page.stdout, re.MULTILINE), (
            page.stdout
        )  # a word was cut


def test_an_error_in_the_middle_of_a_reply_is_a_line_of_its_own(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def ending(tokens: Any) -> Any:
        yield next(tokens)
        raise InfeasibleError("critical_temperature_c = 90: too hot")

    with balcony_edge.load(tiny.path) as llm, llm.stream([5, 9], max_new_tokens=4, ignore_eos=True) as stream:
        stream._source = ending(stream._source)
        with pytest.raises(InfeasibleError):
            show_stream(stream, depth_styles(llm.exit_layers))
    assert capsys.readouterr().out.endswith("\n")
