"""Table 3 of the paper on a GPU: tokens a second of every exit, with a prompt of 32 and 2,048 new tokens, one sequence.

    python -m benchmarks.nvidia.gpu BUNDLE [--device tensorrt|cuda] [--engines NAME] [--batch 1 2] [--graphs on off]
    python -m benchmarks.nvidia.gpu --shape llama-3-8b --output DIR    # export a random model of that shape, then run as above

Every exit decodes the same random prompt. The fastest of ``--rounds`` counts, because other load can only slow a GPU down.
``--graphs on off`` runs TensorRT with and without CUDA graphs. ``--batch 1 2`` also decodes two sequences at once, as in the
paper. Engines must be built for both (``build --context-length 2112 --batch 2``): by default they hold 2,048 rows of one
sequence.

The last line is JSON: ``gpu`` (name, driver, compute capability), ``engine``, ``runs`` (``batch``, ``exit_layer``,
``cuda_graphs``, ``tokens_per_s``, ``speedup`` over the full depth). On the 8B shape the exit at 0.5× should be at least 1.8
times as fast as the full depth.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.device.machine import this_device
from balcony_edge.errors import InputError
from balcony_runtime.backends.base import Backend
from balcony_runtime.backends.choose import open_backend
from balcony_runtime.engine import Engine

PROMPT_TOKENS = 32
#: Shape → arguments of `transformers.LlamaConfig`.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    }
}


def export_shape(shape: str, output: Path) -> None:
    """Export a random model of a shape in float16, with exits at 0.5×, 0.6× and 0.7×."""
    import torch  # noqa: PLC0415 - only this step needs a workstation's packages
    import transformers  # noqa: PLC0415 - likewise

    from balcony_export.export import ExportOptions, export_bundle  # noqa: PLC0415 - likewise
    from balcony_export.model.balcony import parse_exits  # noqa: PLC0415 - likewise
    from balcony_export.model.checkpoint import demo_model_path, load_tokenizer  # noqa: PLC0415 - likewise
    from balcony_export.model.exits import ExitModel  # noqa: PLC0415 - likewise

    torch.set_default_dtype(torch.float16)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[shape])).eval()
    exits = parse_exits("0.5x,0.6x,0.7x", SHAPES[shape]["num_hidden_layers"])
    tokenizer = load_tokenizer(demo_model_path())  # any tokenizer will do, because no text is made
    options = ExportOptions(shape, trained=False, precision="float16")
    export_bundle(ExitModel.open(model, exits), tokenizer, output, options)


def tokens_per_second(engine: Engine, exit_layer: int, batch: int, tokens: int) -> float:
    """Tokens a second of greedy decoding at one exit after a prompt."""
    sequence = engine.new_sequence(
        batch_size=batch, max_length=PROMPT_TOKENS + tokens
    )  # raises if the engines hold less
    prompt = np.random.default_rng(0).integers(0, engine.manifest.model.vocab_size, (batch, PROMPT_TOKENS))
    ids = sequence.advance(exit_layer, prompt)[:, -1].argmax(-1)
    ids = sequence.step_best(exit_layer, ids)  # captures the step
    count = sequence.max_length - sequence.length  # all tokens except the first two
    begin = time.perf_counter()
    for _ in range(count):
        ids = sequence.step_best(exit_layer, ids)
    return batch * count / (time.perf_counter() - begin)


def opened(bundle: Bundle, device: str, engines: str | None, graphs: bool) -> Backend:
    """Open the backend, with or without CUDA graphs."""
    if device == "tensorrt" and not graphs:
        from balcony_runtime.backends.accelerator import tensorrt  # noqa: PLC0415 - an extra

        return tensorrt.open_backend(bundle, engines or next(iter(bundle.manifest.engines)), capture=False)
    return open_backend(bundle, device, engines)  # type: ignore[arg-type]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the JSON document."""
    bundle = Bundle.open(options.bundle)
    if options.device != "tensorrt" and "off" in options.graphs:
        raise InputError(f"--graphs off with --device {options.device}: only TensorRT captures steps: leave it out")
    runs: list[dict[str, Any]] = []
    name = ""
    for graphs in options.graphs:
        with opened(bundle, options.device, options.engines, graphs == "on") as backend:
            name, engine = getattr(backend, "name", options.device), Engine(backend)
            for batch in options.batch:
                speeds = {
                    e: max(tokens_per_second(engine, e, batch, options.tokens) for _ in range(options.rounds))
                    for e in engine.exit_layers
                }
                full = speeds[engine.exit_layers[-1]]
                for exit_layer, speed in speeds.items():
                    run = {"batch": batch, "exit_layer": exit_layer, "cuda_graphs": graphs}
                    runs.append({**run, "tokens_per_s": speed, "speedup": speed / full})
                    print(f"batch {batch}, exit {exit_layer}, CUDA graphs {graphs}: {speed:.1f} tokens/s", flush=True)
    gpus = [gpu.model_dump() for gpu in this_device().gpus]
    return {"benchmark": "gpu", "gpu": gpus, "engine": name, "tokens": options.tokens, "runs": runs}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", choices=["tensorrt", "cuda", "cpu"], default="tensorrt")
    parser.add_argument("--engines")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--graphs", choices=["on", "off"], nargs="+", default=["on"])
    options = parser.parse_args()
    if options.shape is not None:
        if options.output is None:
            parser.error("--shape: needs a directory for the bundle: give it with --output")
        export_shape(options.shape, options.output)
    elif options.bundle is None:
        parser.error("no bundle: name one, or give --shape and --output to make one")
    else:
        print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
