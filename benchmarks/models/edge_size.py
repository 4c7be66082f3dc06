"""Models of edge size: random checkpoints of real shapes are exported, loaded and timed.

    python -m benchmarks.models.edge_size DIR [--shape qwen3-0.6b llama-3.2-1b] [--precision fp32 int4,block=64]

The model is a checkpoint in shards with random weights, because the measured figures do not depend on their values. Each
step is a process of its own, as users run it: ``balcony-edge export`` without its comparison, which needs both models at
once, then a decode loop of every exit. Peak memory is the process's own largest resident set, imports included.

The last line is JSON: ``shapes`` (name and precision → ``checkpoint_gb``, ``export_s``, ``export_peak_gb``, ``bound_gb``,
``load_s``, ``decode_ms`` by exit, ``peak_gb`` of the decoding process) and ``bars``: the export's peak is at most 1.3 times
the checkpoint's weights and 1 GB. Exit code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from balcony_edge.files import partial_directory
from benchmarks.rounds import interleave

CONTEXT, ROUNDS = 64, 3
EXPORT = "from balcony_edge.cli import main; main()"
#: Shape → transformers' configuration class and its arguments, from each model's config.json on Hugging Face.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": (
        "Qwen3Config",
        {
            "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
            "rope_theta": 1e6, "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "LlamaConfig",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096,
            "rope_theta": 5e5, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


def write_checkpoint(shape: str, path: Path) -> None:
    """Write a random checkpoint in bfloat16, in shards of half a gigabyte, with the demo model's tokenizer."""
    import torch  # noqa: PLC0415 - only the process that writes a checkpoint needs a workstation's packages
    import transformers  # noqa: PLC0415 - likewise

    from balcony_export.model.checkpoint import demo_model_path, load_tokenizer  # noqa: PLC0415 - likewise

    name, options = SHAPES[shape]
    config = getattr(transformers, name)(**options, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path, max_shard_size="500MB")
    load_tokenizer(demo_model_path()).save_pretrained(path)


def decode(bundle: Path) -> dict[str, Any]:
    """Measure load time, milliseconds per token of every exit, and the peak memory of this process."""
    from balcony_runtime.engine import Engine  # noqa: PLC0415 - timed without the parent's imports
    from benchmarks.engine.decode import block  # noqa: PLC0415 - likewise
    from benchmarks.peer_workers.worker import memory_mb  # noqa: PLC0415 - likewise

    begin = time.perf_counter()
    with Engine.open(bundle, verify_hashes=False) as engine:
        load_s = time.perf_counter() - begin
        found = interleave(
            {exit_layer: block(engine, exit_layer, CONTEXT) for exit_layer in engine.exit_layers}, ROUNDS
        )
    times = {str(e): round(median(step.wall_ms for step in steps), 2) for e, steps in found.items()}
    return {"load_s": round(load_s, 2), "decode_ms": times, "peak_gb": round(memory_mb()["peak_rss"] / 1e3, 2)}


def _in_a_process(*arguments: str) -> float:
    """Run Python in a process and return its largest resident set in GB.

    Raises:
        CalledProcessError: the process failed.
    """
    process = subprocess.Popen([sys.executable, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return round(usage.ru_maxrss * 1024 / 1e9, 2)


def measure(shape: str, precision: str, directory: Path) -> dict[str, Any]:
    """Measure one shape at one precision; the checkpoint is kept, the bundle is not."""
    checkpoint, bundle = directory / shape, directory / f"{shape}-bundle"
    if not checkpoint.is_dir():
        with partial_directory(checkpoint.absolute()) as part:  # shards without their last one are no checkpoint
            _in_a_process("-m", "benchmarks.models.edge_size", str(part / shape), "--make", shape)
            (part / shape).rename(checkpoint)
    size_gb = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 1e9
    shutil.rmtree(bundle, ignore_errors=True)
    begin = time.perf_counter()
    options = ["--exits", "0.5x,0.6x,0.7x", "--precision", precision, "--context-length", "1024", "--no-verify"]
    peak_gb = _in_a_process("-c", EXPORT, "export", str(checkpoint), *options, "-o", str(bundle))
    seconds = time.perf_counter() - begin
    command = [sys.executable, "-m", "benchmarks.models.edge_size", str(bundle), "--decode"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(bundle)
    return {
        "checkpoint_gb": round(size_gb, 2),
        "export_s": round(seconds, 1),
        "export_peak_gb": peak_gb,
        "bound_gb": round(1.3 * size_gb + 1, 2),
        **json.loads(done.stdout.splitlines()[-1]),
    }


def main() -> int:
    """Parse the command line, run, print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Random models of real shapes; see the module's docstring.")
    parser.add_argument("directory", type=Path, help="directory for the checkpoints, some GB")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precision", nargs="+", default=["fp32", "int4,block=64"])
    parser.add_argument("--make", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make is not None:
        write_checkpoint(arguments.make, arguments.directory)
        return 0
    if arguments.decode:
        print(json.dumps(decode(arguments.directory)))
        return 0
    found = {}
    for shape in arguments.shape:
        for precision in arguments.precision:
            row = found[f"{shape} {precision}"] = measure(shape, precision, arguments.directory)
            print(f"{shape} {precision}: {row}", file=sys.stderr)
    bars = {f"{name}: export's peak": row["export_peak_gb"] <= row["bound_gb"] for name, row in found.items()}
    print(json.dumps({"benchmark": "edge_size", "shapes": found, "bars": bars}))
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
