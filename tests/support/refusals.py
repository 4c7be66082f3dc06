"""Inputs that the command line refuses, and the line that it answers with.

tests/cli/test_refusals.py runs every entry for real. docs/generate.py writes the entries that have a description into
docs/errors.md, so this module imports nothing but the standard library.

Commands run in the directory that :func:`lay_out` fills.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DEVICE = Path(__file__).parents[2] / "profiles" / "devices" / "server-2-cores-epyc-int4.json"


class Refusal(NamedTuple):
    """One bad input.

    Attributes:
        arguments: the command line without the program's name.
        message: the whole line on stderr; ``…`` stands for any text.
        given: description for docs/errors.md; None leaves the entry out of that page.
    """

    arguments: tuple[str, ...]
    message: str
    given: str | None = None


def _cut_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _flip_a_bit(bundle: Path) -> None:
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[1000] ^= 4
    (bundle / "weights.bin").write_bytes(bytes(data))


def _set_model_type(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "model_type": name}))

    return change


#: Name of a damaged copy → what it is a copy of, and the damage.
COPIES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cut": ("model", _cut_weights),
    "neox": ("model", _set_model_type("gpt_neox")),
    "flipped": ("bundle", _flip_a_bit),
}
#: Name of a text file → its text.
TEXTS = {
    "chat.toml": "tpot = 12\n",
    "lossless.toml": 'policy = "lossless"\n',
    "trace.jsonl": '{"budget": {}}\n',
    "unique.json": '{"type": "array", "uniqueItems": true}\n',
    "text.jsonl": '{"text": "the quick brown fox"}\n',
    "profile.json": '{"schema_version": 99}\n',
}


def lay_out(directory: Path, model: Path, bundle: Path) -> None:
    """Fill a directory with what the commands name: a model, a bundle, damaged copies of both, and small files.

    The models ``moe`` and ``nan`` need torch, so the test itself makes them.
    """
    shutil.copytree(model, directory / "model")
    shutil.copytree(bundle, directory / "bundle")
    (directory / "empty").mkdir()
    for name, (source, damage) in COPIES.items():
        shutil.copytree(directory / source, directory / name)
        damage(directory / name)
    for name, text in TEXTS.items():
        (directory / name).write_text(text)
    shutil.copy(DEVICE, directory / "device.json")


def _export(model: str, *options: str) -> tuple[str, ...]:
    exits = () if "--exits" in options else ("--exits", "2")
    output = () if "-o" in options else ("-o", "out")
    return ("export", model, *exits, *output, *options)


REFUSALS = (
    Refusal(
        _export("model", "--exits", "3,2"),
        "--exits 3,2: 2 comes after 3: write exits in ascending order",
        "`export --exits 3,2`",
    ),
    Refusal(
        _export("model", "--exits", "99"),
        "--exits 99: '99' is exit layer 99: a model of 5 layers takes exits 1 to 4, or factors such as 0.5x",
        "`export --exits 99`",
    ),
    Refusal(
        _export("empty"),
        "empty: is not a model: give a Hugging Face directory (config.json and safetensors), a .gguf file or a hub name",
        "a directory that is not a model",
    ),
    Refusal(
        _export("nowhere"),
        "nowhere: does not exist: give a Hugging Face directory (config.json and safetensors), a "
        ".gguf file or a hub name",
        "a path that does not exist",
    ),
    Refusal(
        _export("model", "-o", "x" * 300), f"{'x' * 300}: cannot be written (File name too long): name another place"
    ),
    Refusal(
        ("eval", "x" * 300, "--text", "text.jsonl"),
        f"{'x' * 300}/bundle.json: cannot be used (File name too long): make it accessible, or name another path",
    ),
    Refusal(
        _export("cut"),
        "cut/model.safetensors: is 292844 bytes long, but its header says 292944: download it again",
        "truncated weights",
    ),
    Refusal(
        _export("moe"),
        "model type 'phimoe': its mixture of experts is not covered by parity tests: export supports llama, mistral, qwen2, …",
        "a mixture of experts of an architecture that export does not know",
    ),
    Refusal(
        _export("neox"),
        "model type 'gpt_neox': this architecture is not covered by parity tests: export supports llama, mistral, qwen2, …",
    ),
    Refusal(
        _export("nan"),
        "weight model.layers.3.mlp.up_proj.weight: holds NaN or infinity: use a checkpoint whose weights are finite",
        "a weight that is NaN",
    ),
    Refusal(
        _export("model", "--balconies", "empty"),
        "empty: has no balconies.json: give a directory that `balcony-edge train` wrote",
    ),
    Refusal(
        _export("model", "--context-length", "9999"),
        "context length 9999: this model takes 2 to 256: give a number in this range",
    ),
    Refusal(
        _export("model", "-o", "bundle"),
        "bundle: already exists: name another directory, or remove it first",
        "an output that exists",
    ),
    Refusal(
        _export("model", "--precision", "int4,block=48"),
        "--precision int4,block=48: 'block=48' is not known: give fp32, fp16, or int4 or int8 "
        "and any of block=32|64|128, …",
        "`export --precision int4,block=48`",
    ),
    Refusal(
        ("inspect", "flipped"),
        "flipped/weights.bin: SHA-256 … differs from the manifest's …: copy the bundle again",
        "one flipped byte in a bundle",
    ),
    Refusal(
        ("run", "flipped", "hi"), "flipped/weights.bin: SHA-256 … differs from the manifest's …: copy the bundle again"
    ),
    Refusal(
        ("inspect", "nowhere"), "nowhere: there is no such directory: name a bundle that `balcony-edge export` wrote"
    ),
    Refusal(
        ("run", "empty", "hi"),
        "empty: is not a bundle (it has no bundle.json): make one with `balcony-edge export`",
        "a directory that is not a bundle",
    ),
    Refusal(
        ("build", "bundle", "--sm", "90"),
        "--sm 90: tensorrt_rtx … builds for 75, 80, 86, 89, 120, 121; Orin (87) and Hopper (90) "
        "need --target tensorrt on a machine that has it",
        "`build --sm 90`",
    ),
    Refusal(
        ("run", "bundle", "hi", "--device", "tensorrt"),
        "bundle: has no engine set for tensorrt: make one with `balcony-edge build`",
        "`run --device tensorrt` before `build`",
    ),
    Refusal(
        ("run", "bundle", "hi", "--exit", "4"),
        "exit_layer = 4, but this bundle has exits 2, 3, 5: pick one of them or re-export with --exits",
        "`run --exit 4`",
    ),
    Refusal(
        ("run", "bundle", "hi", "--tpot-ms", "nan"),
        "tpot_ms = nan: must be a finite number above 0; give the milliseconds between two "
        "tokens, or leave it out for no target",
        "`run --tpot-ms nan`",
    ),
    Refusal(
        ("run", "bundle", "hi", "--tpot-ms", "-3"),
        "tpot_ms = -3.0: must be a finite number above 0; give the milliseconds between two "
        "tokens, or leave it out for no target",
    ),
    Refusal(
        ("run", "bundle", "hi", "--budget", "chat.toml"),
        "chat.toml: tpot = 12: no such key; did you mean tpot_ms?",
        "`tpot = 12` in a budget file",
    ),
    Refusal(
        ("run", "bundle", "hi", "--budget", "none.toml"),
        "none.toml: there is no such file; name a budget file such as profiles/interactive.toml",
        "a budget file that does not exist",
    ),
    Refusal(
        ("run", "bundle", "hi", "--budget", "lossless.toml", "--exit", "2"),
        "--budget with --tpot-ms or --exit: these are two budgets: give the file or the options",
        "two budgets",
    ),
    Refusal(
        ("run", "bundle", "hi", "--budget", "lossless.toml", "--policy", "plain"),
        "lossless.toml: policy = 'lossless' with --policy plain: give one of the two",
    ),
    Refusal(
        ("run", "bundle", "hi", "--policy", "confident"),
        "policy = 'confident': this bundle has no thresholds: measure them with `balcony-edge "
        "calibrate BUNDLE --text TEXT`",
        "`run --policy confident` before `calibrate`",
    ),
    Refusal(
        ("calibrate", "bundle", "--check", "text.jsonl"),
        "bundle: has no thresholds to check: calibrate it with --text first",
    ),
    Refusal(("run", "bundle", "  "), "the prompt is empty: give a text", "an empty prompt"),
    Refusal(
        ("run", "bundle", "fox " * 400),
        "the prompt has 418 tokens and a reply needs one more: this exceeds the available context size "
        "(256 in this bundle): shorten the prompt, "
        "or export with a larger --context-length",
        "a prompt longer than the context",
    ),
    Refusal(
        ("run", "bundle", "hi", "-n", "0"),
        "max_new_tokens = 0: must be at least 1: give the largest number of tokens to make, e.g. 256",
        "`run -n 0`",
    ),
    Refusal(
        ("run", "bundle", "hi", "--temperature", "-1"),
        "temperature = -1.0: must be a finite number, 0 or more: give 0 for greedy decoding, or a larger "
        "number for more varied text, e.g. 0.7",
        "`run --temperature -1`",
    ),
    Refusal(
        ("run", "bundle", "hi", "--json-schema", "unique.json"),
        'json_schema: is not supported (Unimplemented keys: ["uniqueItems"]): change it (docs/structured.md says what '
        "is supported)",
        "a JSON schema with a keyword that is not supported",
    ),
    Refusal(
        ("run", "bundle", "hi", "--regex", "(a"),
        "regex: is not supported (…unclosed group…): change it (docs/structured.md says what is supported)",
        "a regular expression that is not one",
    ),
    Refusal(
        ("run", "bundle", "hi", "--grammar", "none.lark"),
        "--grammar none.lark: not readable (No such file or directory): name a text file",
        "a grammar that is not there",
    ),
    Refusal(
        ("run", "bundle", "hi", "--regex", "a", "--grammar", "chat.toml"),
        "regex and grammar: a reply has one structure: give one of them",
        "`--regex` with `--grammar`",
    ),
    Refusal(
        ("run", "bundle", "hi", "--profile", "profile.json"),
        "profile.json: schema_version = 99, but this version of balcony-edge reads 1: measure "
        "again, or install the version that wrote it",
        "a device profile of another schema",
    ),
    Refusal(
        ("replay", "trace.jsonl"),
        "trace.jsonl: contains no tokens: record a trace with `balcony-edge run --record`",
        "a trace without a token",
    ),
    Refusal(
        ("simulate", "--profile", "device.json", "--tpot-ms", "30", "--load", "wave"),
        "load 'wave': must be one of idle, constant, step, ramp, square, bursts, or the file of a recorded trace",
        "a load that does not exist",
    ),
    Refusal(
        ("simulate", "--profile", "device.json", "--tpot-ms", "30", "--arrivals", "rate=0"),
        "--arrivals rate=0: rate must be 0.001 to 1000, e.g. rate=0.8,burst=3",
        "arrivals at an impossible rate",
    ),
)
