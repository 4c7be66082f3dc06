"""The program around the verbs: streams and encodings, where prompts come from, and places that cannot be written."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.cli.device.serve import JsonLines
from balcony_edge.errors import InputError
from balcony_export.data.documents import read_documents
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.serve.http.server import Settings
from balcony_runtime.serve.work.service import Limits
from tests.support.command import invoke_here, unmeasured
from tests.support.command import refused as refused_here

COMMAND = [sys.executable, "-W", "error", "-c", "from balcony_edge.cli import main; main()"]


def invoke(*arguments: str | Path | bytes, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"stdin": subprocess.DEVNULL, **options} if "input" not in options else options
    command: list[Any] = [*COMMAND, *(part if isinstance(part, bytes) else str(part) for part in arguments)]
    return subprocess.run(
        command, stdout=options.pop("stdout", subprocess.PIPE), stderr=subprocess.PIPE, text=True, check=False,
        timeout=300, errors="replace", **options,
    )  # fmt: skip


def refused(pattern: str, *arguments: str | Path | bytes, **options: Any) -> None:
    """Exactly one line on stderr, nothing on stdout, exit code 1."""
    done = invoke(*arguments, **options)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (1, "", 1) and lines[0].startswith("balcony-edge: "), done
    assert pattern in lines[0], lines


def test_the_version() -> None:
    assert invoke("--version").stdout == f"balcony-edge {version('balcony-edge')}\n"
    module = subprocess.run(
        [sys.executable, "-m", "balcony_edge", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout == f"balcony-edge {version('balcony-edge')}\n"


@pytest.mark.parametrize("arguments", [("inspect", "BUNDLE"), ("inspect", "BUNDLE", "--json"), ("run", "--help")])
def test_a_full_disk_under_stdout_is_one_line(tiny: Any, arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = invoke(*(str(tiny.path) if part == "BUNDLE" else part for part in arguments), stdout=full)
    wanted = "stdout: cannot be written (No space left on device): free space, or write to another place"
    assert (done.returncode, done.stderr) == (1, f"balcony-edge: {wanted}\n")


def test_a_reader_that_stops_early_is_not_an_error(tiny: Any) -> None:
    command = f"{sys.executable} -m balcony_edge inspect {tiny.path} --io | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and "tiny-llama" in done.stdout


@pytest.mark.parametrize("arguments", ["run BUNDLE fox -n 2", "inspect BUNDLE", "budget schema"])
def test_a_closed_stdout_is_not_an_error(tiny: Any, arguments: str) -> None:
    """As under cron and some supervisors."""
    command = f"{sys.executable} -m balcony_edge {arguments.replace('BUNDLE', str(tiny.path))} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_an_error_is_no_document_where_stderr_is_closed(tmp_path: Path) -> None:
    """Python's print() takes stdout then."""
    command = f"{sys.executable} -m balcony_edge inspect {tmp_path / 'none'} --json 2>&-"
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")


SAMPLED = ("the fox", "-n", "20", "--temperature", "3", "--seed", "1")


@pytest.fixture(scope="module")
def plain(tiny: Any) -> str:
    return invoke("run", tiny.path, *SAMPLED).stdout


@pytest.mark.parametrize("live", [(), ("--live",)])
@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_reply_in_a_file_has_no_colours(tiny: Any, plain: str, variable: str, live: tuple[str, ...]) -> None:
    """FORCE_COLOR, which many CI services set, makes a terminal of every console of rich."""
    done = invoke("run", tiny.path, *SAMPLED, *live, env={**os.environ, variable: "1", "TERM": "xterm"})
    assert done.returncode == 0 and done.stdout == plain, done
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("doctor",), ("train", "--help"), ("run", "BUNDLE", "the fox", "-n", "20")])
def test_a_stream_that_lacks_characters(tiny: Any, arguments: tuple[str, ...]) -> None:
    """Boxes, ×, ° and a model's output become question marks instead of a traceback."""
    command = [str(tiny.path) if part == "BUNDLE" else part for part in arguments]
    done = invoke(*command, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout and "Traceback" not in done.stderr, done


def test_prompts_from_files_and_pipes(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("the quick brown fox\n")
    wanted = invoke_here("run", tiny.path, "the quick brown fox", "-n", "8").stdout
    assert invoke_here("run", tiny.path, "--file", file, "-n", "8").stdout == wanted
    assert invoke("run", tiny.path, "--file", "-", "-n", "8", input="the quick brown fox\n").stdout == wanted
    assert invoke("run", tiny.path, "-n", "8", input="the quick brown fox\n").stdout == wanted
    document = json.loads(invoke("run", tiny.path, "-n", "8", "--json", input="the quick brown fox").stdout)
    assert document["text"] == wanted.removesuffix("\n")


def test_a_system_message_with_a_prompt(tiny: Any) -> None:
    plain = json.loads(invoke_here("run", tiny.path, "the fox", "-n", "2", "--json").stdout)
    led = json.loads(invoke_here("run", tiny.path, "the fox", "--system", "be brief", "-n", "2", "--json").stdout)
    ids = tiny.tokenizer("<system>be brief\n", add_special_tokens=False).input_ids
    assert led["prompt_tokens"] == plain["prompt_tokens"] + len(ids)


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("--file nowhere.txt: not readable (No such file or directory)", ("--file", "nowhere.txt")),
        ("--file with a prompt: these are two prompts", ("hi", "--file", "-")),
        ("--system with --raw", ("hi", "--raw", "--system", "be brief")),
        ("--logprobs without --json", ("hi", "--logprobs", "3")),
        ("--live with --json", ("hi", "--live", "--json")),
        ("--top-k with --temperature 0: greedy decoding", ("hi", "--top-k", "5")),
        ("--top-p with --temperature 0: greedy decoding", ("hi", "--top-p", "0.5")),
        ("--min-p with --temperature 0: greedy decoding", ("hi", "--min-p", "0.5")),
        ("--seed with --temperature 0: greedy decoding", ("hi", "--seed", "3")),
        (
            "--exit with --policy speculative: a fixed exit makes every token",
            ("hi", "--exit", "2", "--policy", "speculative"),
        ),
    ],
)
def test_what_run_refuses(tiny: Any, pattern: str, arguments: tuple[str, ...]) -> None:
    refused_here(pattern, "run", tiny.path, *arguments)


def test_prompts_that_are_not_texts(tiny: Any) -> None:
    refused("the prompt is not valid UTF-8 at character 5", "run", tiny.path, b"the \xff fox")
    refused("the prompt is empty", "run", tiny.path)


def test_input_that_is_not_utf_8(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("Käse".encode("latin-1"))
    refused_here(f"--file {file}: is not UTF-8 at byte 1", "run", tiny.path, "--file", file)


def test_a_byte_order_mark_is_no_text(tiny: Any, tmp_path: Path) -> None:
    """Editors on Windows begin files in UTF-8 with it."""
    (prompt := tmp_path / "prompt.txt").write_text("the quick brown fox\n", encoding="utf-8-sig")
    (budget := tmp_path / "b.toml").write_text("exit_layer = 2\n", encoding="utf-8-sig")
    (schema := tmp_path / "s.json").write_text('{"enum": ["fox"]}', encoding="utf-8-sig")
    common = ("run", tiny.path, "--json", "-n")
    marked = json.loads(invoke_here(*common, "6", "--file", prompt, "--budget", budget).stdout)
    plain = json.loads(invoke_here(*common, "6", "the quick brown fox", "--exit", "2").stdout)
    assert [marked[key] for key in ("prompt_tokens", "text")] == [plain[key] for key in ("prompt_tokens", "text")]
    assert json.loads(invoke_here(*common, "40", "fox", "--json-schema", schema).stdout)["text"] == '"fox"'
    for name, text in (("a.txt", "the fox"), ("a.jsonl", '{"text": "the fox"}'), ("a.raw", " = The fox = \n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        (document,) = read_documents(tmp_path / name)
        assert document.text.strip(" =\n").lower() == "the fox"


def test_results_are_kept_where_nobody_reads_what_is_shown(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich ends the process where the reader of a pipe has gone, such as a pager that was left."""

    (text := tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    for verb, options in (("device.calibrate", ("--max-disagreement", "90%")), ("workstation.eval", ("--limit", "1"))):
        monkeypatch.setattr(f"balcony_edge.cli.{verb}._show", lambda *_, **__: sys.exit(1))
        done = invoke_here(verb.rpartition(".")[2], bundle_copy, "--text", text, *options)
        assert done.returncode == 1, done
    manifest = Bundle.open(bundle_copy).manifest
    assert manifest.confidence is not None and manifest.exits[0].quality is not None


def test_engines_are_built_where_nobody_reads_what_is_shown(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `export ... --tensorrt fp16 | less`, which was left meanwhile: rich then ends the process."""

    built: list[Path] = []
    monkeypatch.setattr("balcony_runtime.backends.accelerator.tensorrt_builder.import_tensorrt", lambda _: None)
    monkeypatch.setattr("balcony_edge.cli.workstation.build.build_into", lambda path, *_: built.append(path))
    monkeypatch.setattr("balcony_edge.cli.workstation.export._report", lambda *_: sys.exit(1))
    options = ("--exits", "2,3", "-o", tmp_path / "b", "--no-verify", "--tensorrt", "fp16")
    assert invoke_here("export", tiny_checkpoint, *options).returncode == 1 and built == [tmp_path / "b"]


@pytest.mark.parametrize("verb", ["run", "inspect", "eval", "profile"])
def test_the_manifest_in_place_of_the_bundle(tiny: Any, verb: str, text_file: Path) -> None:
    more = {"run": ["hi"], "eval": ["--text", str(text_file)]}.get(verb, [])
    wanted = f"{tiny.path}/bundle.json: is a file of a bundle: give the bundle's directory, {tiny.path}"
    refused_here(wanted, verb, tiny.path / "bundle.json", *more)


def test_an_error_after_a_progress_bar_begins_on_the_first_line(tiny: Any, tmp_path: Path) -> None:
    refused("does not exist", "verify", tiny.path, "--against", tmp_path / "none", env=unmeasured())


@pytest.fixture
def read_only(bundle_copy: Path) -> Iterator[Path]:
    """A bundle that no one can write, not even root."""
    mounts = (["--bind", str(bundle_copy), str(bundle_copy)], ["-o", "remount,ro,bind", str(bundle_copy)])
    for arguments in mounts:
        if subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode:
            pytest.skip("this machine does not let root mount")
    try:
        yield bundle_copy
    finally:
        subprocess.run(["umount", str(bundle_copy)], check=True)


def test_results_that_cannot_be_kept_are_refused_before_the_work(
    read_only: Path, text_file: Path, tmp_path: Path
) -> None:
    why = f"{read_only}: cannot be written ({read_only} is read-only): make it writable"
    refused_here(f"{why}, or give --no-record", "eval", read_only, "--text", text_file)
    refused_here(why, "calibrate", read_only, "--text", text_file)
    refused_here("cannot be written", "profile", read_only, "-o", read_only / "deep" / "p.json")
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    done = invoke_here(
        "eval", read_only, "--text", tmp_path / "t.txt", "--limit", "2", "--no-record", "-o", tmp_path / "a" / "b"
    )
    assert done.returncode == 0 and "agreement" in done.stdout.lower(), done
    assert (tmp_path / "a" / "b" / "evaluation.json").is_file()


def test_missing_directories_of_outputs_are_made(tiny: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "a" / "run.jsonl"
    assert invoke_here("run", tiny.path, "the fox", "-n", "2", "--record", trace).returncode == 0 and trace.is_file()
    small = tmp_path / "b" / "c" / "small"
    done = invoke_here("extract", tiny_checkpoint, "--exit", "0.6x", "-o", small, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["layers"] == 3 and (small / "config.json").is_file()
    (tmp_path / "file").write_text("")
    refused_here("is not a directory", "extract", tiny_checkpoint, "--exit", "3", "-o", tmp_path / "file" / "small")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_extracted_exit_keeps_the_type_of_its_checkpoint(tiny: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    source, small = tmp_path / "source", tmp_path / "small"
    tiny.model.save_pretrained(source, state_dict={k: v.to(dtype) for k, v in tiny.model.state_dict().items()})
    config = json.loads((source / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    (source / "config.json").write_text(json.dumps(config))
    tiny.tokenizer.save_pretrained(source)
    done = invoke_here("extract", source, "--exit", "2", "-o", small)
    assert done.returncode == 0, done.stderr
    with safe_open(small / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {dtype}  # noqa: SIM118 - not a mapping
    assert (small / "model.safetensors").stat().st_size < (source / "model.safetensors").stat().st_size
    refused_here("--exit 2,3: extract writes one exit", "extract", source, "--exit", "2,3", "-o", tmp_path / "x")


def test_architectures_without_support_are_named(make_tokenizer: Any, tmp_path: Path) -> None:
    """GPT-2 and GPT-OSS load in transformers, but their layers do something that export cannot represent."""
    gpt2 = transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4)
    gpt_oss = transformers.GptOssConfig(
        hidden_size=32, vocab_size=320, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4,
    )  # fmt: skip
    models = {
        "this architecture is not covered by parity tests": transformers.GPT2LMHeadModel(gpt2),
        "its mixture of experts is not covered by parity tests": transformers.GptOssForCausalLM(gpt_oss),
    }
    for why, model in models.items():
        source = tmp_path / model.config.model_type
        model.save_pretrained(source)
        make_tokenizer().save_pretrained(source)
        refused_here(
            f"model type '{model.config.model_type}': {why}", "export", source, "--exits", "2", "-o", tmp_path / "x"
        )


def test_a_model_of_text_and_images_is_named(make_tokenizer: Any, tmp_path: Path) -> None:
    """Gemma 3 from 4B on loads whole, and the number of its layers is in a configuration inside the other."""
    text = {
        "hidden_size": 32, "vocab_size": 320, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    source = tmp_path / "gemma3"
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    for verb, exits in (("export", "--exits"), ("extract", "--exit")):
        refused_here(
            "model type 'gemma3': this architecture is not covered", verb, source, exits, "2", "-o", tmp_path / "x"
        )


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "no_proxy": "*"}
    refused(
        "and the hub did not answer with a model",
        "export",
        "some/model",
        "--exits",
        "2",
        "-o",
        tmp_path / "x",
        env={**unmeasured(), **hub},
    )


def test_the_context_of_engines_follows_the_bundle(tiny: Any, bundle_copy: Path) -> None:
    """The default must not be refused: this bundle's context is 256, less than the default's bound."""
    done = invoke_here("build", bundle_copy, "--graphs-only", "--precision", "fp32")
    assert done.returncode == 0 and "caches of 256 rows" in done.stdout, done
    refused_here(
        "--context-length 0: this bundle takes 1 to 256", "build", bundle_copy, "--graphs-only", "--context-length", "0"
    )


def test_a_device_that_cannot_write_graphs_names_those_that_it_has(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ("build", bundle_copy, "--graphs-only", "--precision", "fp32")
    assert invoke_here(*build).returncode == 0
    monkeypatch.delitem(sys.modules, "balcony_export.tensorrt.engine_set", raising=False)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    assert invoke_here(*build).returncode == 0  # the graphs are there
    refused_here(
        "the graphs of rtx-fp32 have --context-length 256, and 128 was asked", *build, "--context-length", "128"
    )
    cure = (
        "give the options of graphs that are there, or write others with --graphs-only on a workstation (onnx_ir is not"
    )
    refused_here(cure, *build, "--batch", "2")
    refused_here("has graphs of rtx-fp32, and rtx-fp16 was asked for", "build", bundle_copy, "--graphs-only")


def test_a_bundle_of_int4_is_not_sent_to_build(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    done = invoke_here("export", tiny_checkpoint, "--exits", "2,3", "-o", bundle, "--no-verify", "--precision", "int4")
    assert done.returncode == 0, done.stderr
    wanted = (
        "precision int4 has no graphs for cuda: run it with --device cpu, or export the model with --precision fp16"
    )
    refused_here(wanted, "run", bundle, "hi", "--device", "cuda")


@pytest.mark.parametrize("key", ["", " ", "\n"])
def test_a_key_that_no_client_can_send_opens_no_server(tiny: Any, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused_here("--api-key or BALCONY_EDGE_API_KEY: is empty", "serve", tiny.path, "--api-key", key)
    refused_here("letters that clients encode differently", "serve", tiny.path, "--api-key", f"{key}schlüssel")
    monkeypatch.setenv("BALCONY_EDGE_API_KEY", key)
    refused_here("--api-key or BALCONY_EDGE_API_KEY: is empty", "serve", tiny.path)


def test_options_of_a_run_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a value of its own, so that none can be taken for another."""
    found: dict[str, Any] = {}

    class Seen:
        exit_layers, codec = (2, 5), SimpleNamespace(has_chat_template=True)

        def encode(self, prompt: Any, **options: Any) -> list[int]:
            found.update(options, prompt=prompt)
            return [1]

        def stream(self, ids: list[int], **options: Any) -> Any:
            found.update(options)
            raise InputError("it was seen")

    def opened(bundle: Path, **options: Any) -> Any:
        found.update(options, bundle=bundle)
        return nullcontext(Seen())

    monkeypatch.setattr("balcony_edge.load", opened)
    drawn = "--temperature 0.7 --top-k 3 --top-p 0.9 --min-p 0.1 --seed 5"
    penalties = "--repetition-penalty 1.1 --presence-penalty 0.5 --frequency-penalty 0.25"
    others = "-n 7 --stop x --stop y --logprobs 4 --json --exit 2 --profile p.json --threads 2 --no-spin"
    refused_here(
        "it was seen", "run", tmp_path, "hi", *f"{drawn} {penalties} {others} --device cpu --engines e".split()
    )
    assert found.pop("trace") is None and found.pop("prompt") == "hi" and found.pop("bundle") == tmp_path
    penalised = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert found.pop("sampling") == SamplingParams(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, seed=5, **penalised)
    assert found.pop("chat") is True and not found.pop("control_tokens") and found.pop("packed") is None
    assert found == {
        "max_new_tokens": 7,
        "stop": ["x", "y"],
        "logprobs": 4,
        "budget": Budget(exit_layer=2),
        "profile": Path("p.json"),
        "threads": 2,
        "spin": False,
        "device": "cpu",
        "engines": "e",
    }


def test_options_of_the_server_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a value of its own, so that none can be taken for another."""
    found: list[Any] = []

    def opened(bundle: Path, **options: Any) -> Any:
        found.append({"bundle": bundle, **options})
        return SimpleNamespace(record_rounds=found.append)

    def served(open_llm: Callable[[], Any], settings: Settings) -> Any:
        found.append(settings)
        return SimpleNamespace(run=open_llm)

    monkeypatch.setattr("balcony_edge.load", opened)
    monkeypatch.setattr("balcony_runtime.serve.http.server.Server", served)
    options = "--host ::1 --port 81 --served-model-name edge --api-key key --allow-origin https://a.example --budgets b"
    bounds = "--parallel 3 --queue 5 --max-body-mb 9 --request-timeout 11 --drain-timeout 13 --saved-mb 17"
    kept = "--budget c.toml --prefix-mb 19 --prefix-dir kept --profile p.json --threads 2 --no-spin --device cpu --engines e"
    done = invoke_here("serve", tmp_path, *f"{options} {bounds} {kept}".split())
    assert done.returncode == 0, done
    settings, loaded, _ = found
    assert settings == Settings(
        host="::1",
        port=81,
        name="edge",
        budget=Path("c.toml"),
        budgets=Path("b"),
        api_key="key",
        limits=Limits(3, 5, body_bytes=9_000_000, bodies_bytes=72_000_000, request_s=11.0, saved_bytes=17_000_000),
        drain_s=13.0,
        origins=["https://a.example"],
    )
    assert loaded == {
        "bundle": tmp_path,
        "budget": Path("c.toml"),
        "profile": Path("p.json"),
        "packed": None,
        "threads": 2,
        "spin": False,
        "device": "cpu",
        "engines": "e",
        "prefix_mb": 19.0,
        "prefix_directory": Path("kept"),
    }


def test_every_line_of_the_servers_log_is_json() -> None:
    def line(text: str, error: Exception | None = None) -> dict[str, Any]:
        seen = None if error is None else (type(error), error, error.__traceback__)
        log = logging.getLogger("balcony_runtime.serve.requests")
        written = JsonLines().format(log.makeRecord(log.name, logging.INFO, "", 0, "%s", (text,), seen))
        assert "\n" not in written
        found: dict[str, Any] = json.loads(written)
        return found

    asked, failed = line('{"id": "cmpl-1", "status": 200}'), line("POST / failed", ValueError("two\nlines"))
    assert (asked["id"], asked["status"], asked["level"]) == ("cmpl-1", 200, "info")
    assert asked["time"].endswith("+00:00") and failed["message"] == "POST / failed"
    assert "ValueError: two\nlines" in failed["traceback"]


@pytest.mark.parametrize("option", ["--request-timeout", "--drain-timeout", "--prefix-mb"])
def test_what_is_no_number_is_a_usage_error(tiny: Any, option: str) -> None:
    for value in ("nan", "inf"):
        refused_here(f"Invalid value for '{option}'", "serve", tiny.path, option, value, code=2)


def test_run_names_the_budget_that_does_not_fit_the_bundle(tiny: Any, tmp_path: Path) -> None:
    budget = tmp_path / "b.toml"
    for text in ("exit_layer = 4", "min_exit = 9", "min_agreement = 0.5", "policy = 'confident'"):
        budget.write_text(text)
        refused_here(f"balcony-edge: {budget}: {text}", "run", tiny.path, "hi", "--budget", budget)


def test_a_current_directory_that_was_removed_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    line = "balcony-edge: the current directory was removed: change to another one"
    refused_here(line, "export", tiny_checkpoint, "--exits", "2", "-o", "out")
