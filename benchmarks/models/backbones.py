"""Hybrids and mixtures of real size: speed of our int4 bundles compared with llama.cpp's Q4_0, and the price of a rollback.

    python -m benchmarks.serving.attainment --install                        # llama.cpp's server, once
    python -m benchmarks.models.backbones DIR --prepare [--only NAME ...]    # export the bundles and write the GGUF files, once
    python -m benchmarks.models.backbones DIR [--only NAME ...] [--rounds 5]

The weights are random (:mod:`.backbone_shapes`), so this is about speed only. Every round runs each case once in both
programs: 24 tokens after a prompt of 128, and a prompt of 512. Ours are timed around ``TokenSequence.step`` and ``advance``,
llama.cpp's by its server (``timings``), so that HTTP does not count. Both figures of decoding are the time of all tokens after
the first one, divided by their number. Our LM head has 8 bits, llama.cpp's 6.6, as each has by default.

*Rollback.* A recurrent state cannot forget a row, so a rollback goes to an older state that is kept, and the rows after it are
pending again. After 400 decoded tokens, sequences of the shape ``ROLLBACK_SHAPE`` go back by some rows. The time until the next
token is compared with what prices predict that were measured in the same round, from the rows that are pending.

The last line on stdout is one JSON object; the tables go to stderr. Exit code 1 if a bar is missed. Its fields:

    benchmark, cpu, threads, rounds, versions, others_cpu_share, load_1m
    cases[]      shape; engine; depth: layers that run; note: difference from the published model; read_mb: bytes of weights
                 that a token reads; decode_ms: a token after 128; prefill_ms: a prompt of 512
    ratios[]     shape; decode, prefill: our speed at full depth / llama.cpp's, median of the rounds' ratios
    rollback[]   rows: distance; pending: rows that are pending after it; predicted_ms, measured_ms; ratio: measured /
                 predicted, median of the rounds' ratios
    bars         name → value, limit, holds: the predictions are right within 10 %
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gguf
import httpx
import onnxruntime
import transformers

from balcony_edge.device.machine import best_threads, cpu_name
from balcony_edge.errors import BalconyError, InputError
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import TokenSequence
from benchmarks.engine.decode import prompt
from benchmarks.models.backbone_shapes import SHAPES, bundle_of, gguf_of
from benchmarks.peer_workers import server
from benchmarks.rounds import Neighbours, aligned, bar, interleave, print_bars, ratio
from benchmarks.serving.attainment import started

PORT = 8198
PROMPT, LONG_PROMPT, STEPS = 128, 512, 24
#: Wait until the other program's threads sleep after its turn, as in :mod:`benchmarks.peers`.
SETTLE_S = 0.5
ROLLBACK, ROLLBACK_SHAPE = "rollback", "granite-4.0-h-350m"
DECODED, DISTANCES = 400, (20, 100, 300)
#: Bar of a predicted time after a rollback: largest relative error.
ERROR = 0.1
PEER = "llama.cpp Q4_0"


class Rollback(NamedTuple):
    """One rollback: rows that were pending after it, and the time until the next token."""

    pending: int
    predicted_ms: float
    measured_ms: float


def decode_ms(sequence: TokenSequence, exit_layer: int) -> float:
    """Milliseconds a token at an exit after a prompt."""
    time.sleep(SETTLE_S)
    sequence.rollback(0)
    sequence.advance(exit_layer, prompt(PROMPT))
    ids = sequence.tokens[0, :1]
    begin = time.perf_counter()
    for _ in range(STEPS):
        sequence.step(exit_layer, ids).argmax()
    return 1e3 * (time.perf_counter() - begin) / STEPS


def prefill_ms(sequence: TokenSequence, exit_layer: int) -> float:
    """Milliseconds until the first token of a long prompt."""
    time.sleep(SETTLE_S)
    sequence.rollback(0)
    begin = time.perf_counter()
    sequence.advance(exit_layer, prompt(LONG_PROMPT)).argmax()
    return 1e3 * (time.perf_counter() - begin)


def peer_ms(url: str, length: int, steps: int) -> tuple[float, float]:
    """Milliseconds of a prompt in llama.cpp's server, and of each token after the first one."""
    time.sleep(SETTLE_S)
    asked = {"prompt": prompt(length), "n_predict": steps + 1, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/completion", json=asked | {"cache_prompt": False}, timeout=600).raise_for_status()
    timings = answer.json()["timings"]
    if timings["prompt_n"] != length:
        raise InputError(f"llama.cpp's server ran {timings['prompt_n']} tokens of a prompt of {length}: start it anew")
    return timings["prompt_ms"], timings["predicted_ms"] / max(steps, 1)


def read_bytes(path: Path, experts: float) -> int:
    """Bytes of a GGUF file that one token reads; ``experts`` is the share of the experts that it uses."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return round(sum(size * (experts if "_exps" in name else 1.0) for name, size in sizes.items()))


def measure(name: str, directory: Path, threads: int, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure one shape in both programs: its rows of ``cases``, and its row of ``ratios``."""
    model = gguf_of(name, directory)
    command = server.command(model, PORT, threads, 1)
    with (
        Engine.open(bundle_of(name, directory), verify_hashes=False, threads=threads) as engine,
        started(command, f"http://127.0.0.1:{PORT}") as url,
    ):
        sequence = engine.new_sequence(max_length=LONG_PROMPT + 1)
        cases: dict[tuple[int | str, str], Callable[[], float]] = {}
        for exit_layer in engine.exit_layers:
            cases[exit_layer, "decode"] = partial(decode_ms, sequence, exit_layer)
            cases[exit_layer, "prefill"] = partial(prefill_ms, sequence, exit_layer)
        cases[PEER, "decode"] = lambda: peer_ms(url, PROMPT, STEPS)[1]
        cases[PEER, "prefill"] = lambda: peer_ms(url, LONG_PROMPT, 0)[0]
        found = interleave(cases, rounds)
        manifest, full = engine.manifest, engine.exit_layers[-1]
    mixture = manifest.model.mixture
    read: dict[int | str, int] = {layer: manifest.bytes_per_token(layer) for layer in manifest.exit_layers}
    read[PEER] = read_bytes(model, 1.0 if mixture is None else mixture.share)
    rows = [
        {
            "shape": name,
            "engine": PEER if subject == PEER else "ours, int4",
            "depth": full if subject == PEER else subject,
            "note": SHAPES[name].note,
            "read_mb": round(size / 1e6, 1),
            "decode_ms": round(median(found[subject, "decode"]), 2),
            "prefill_ms": round(median(found[subject, "prefill"]), 1),
        }
        for subject, size in read.items()
    ]
    speed = {figure: round(ratio(found[PEER, figure], found[full, figure]), 3) for figure in ("decode", "prefill")}
    return rows, {"shape": name, **speed}


def rollback(engine: Engine, distance: int) -> Rollback:
    """Decode, go back, and time the next token at the full depth."""
    full = engine.exit_layers[-1]
    prices = measure_prices(engine)
    sequence = engine.new_sequence(max_length=PROMPT + DECODED + 1)
    sequence.advance(full, prompt(PROMPT))
    ids = sequence.tokens[0, :1]
    for _ in range(DECODED):
        sequence.step(full, ids)
    sequence.rollback(sequence.length - distance)
    stages, balconies = sequence.rows_due(1)
    predicted_ms = prices.step_ms(full, stages, balconies, sequence.length)
    begin = time.perf_counter()
    sequence.step(full, ids).argmax()
    return Rollback(max(stages) - 1, predicted_ms, 1e3 * (time.perf_counter() - begin))


def measure_rollbacks(directory: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Compare the times after rollbacks with their predictions."""
    with Engine.open(bundle_of(ROLLBACK_SHAPE, directory), verify_hashes=False, threads=threads) as engine:
        found = interleave({distance: partial(rollback, engine, distance) for distance in DISTANCES}, rounds)
    return [
        {
            "rows": distance,
            "pending": samples[0].pending,
            "predicted_ms": round(median(sample.predicted_ms for sample in samples), 1),
            "measured_ms": round(median(sample.measured_ms for sample in samples), 1),
            "ratio": round(ratio([s.measured_ms for s in samples], [s.predicted_ms for s in samples]), 3),
        }
        for distance, samples in found.items()
    ]


def versions() -> dict[str, str]:
    """Versions of everything that the figures depend on.

    Raises:
        MissingDependencyError: llama.cpp's server is not installed.
    """
    server.refuse_missing(server.LLAMA_SERVER)
    shown = subprocess.run([server.LLAMA_SERVER, "--version"], check=True, capture_output=True, text=True)
    return {
        "onnxruntime": onnxruntime.__version__,
        "transformers": transformers.__version__,
        "llama.cpp": (shown.stdout + shown.stderr).splitlines()[0].removeprefix("version: "),
    }


def main() -> int:
    """Parse the command line, measure, print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Hybrids and mixtures of real size; see the module's docstring.")
    parser.add_argument("directory", type=Path, help="directory of the bundles and GGUF files, 2 GB")
    parser.add_argument("--prepare", action="store_true", help="only make missing bundles and GGUF files")
    parser.add_argument("--only", nargs="+", choices=[*SHAPES, ROLLBACK], default=[*SHAPES, ROLLBACK])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=best_threads())
    arguments = parser.parse_args()
    directory, threads, rounds = arguments.directory, arguments.threads, arguments.rounds
    chosen = [name for name in SHAPES if name in arguments.only]
    directory.mkdir(parents=True, exist_ok=True)
    if arguments.prepare:
        for name in chosen:
            print(bundle_of(name, directory), gguf_of(name, directory), file=sys.stderr)
        return 0
    try:
        document: dict[str, Any] = {"benchmark": "backbones", "cpu": cpu_name(), "threads": threads, "rounds": rounds}
        document["versions"], neighbours = versions(), Neighbours()
        measured = [measure(name, directory, threads, rounds) for name in chosen]
        document["cases"] = [row for rows, _ in measured for row in rows]
        document["ratios"] = [row for _, row in measured]
        document["rollback"] = measure_rollbacks(directory, threads, rounds) if ROLLBACK in arguments.only else []
    except BalconyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    document |= neighbours.report()
    document["bars"] = {
        f"rollback by {row['rows']}: error of the prediction": bar(round(abs(row["ratio"] - 1), 3), ERROR)
        for row in document["rollback"]
    }
    for table in ("cases", "ratios", "rollback"):
        if document[table]:
            lines = aligned([list(document[table][0]), *(list(row.values()) for row in document[table])])
            print(table, *lines, "", sep="\n", file=sys.stderr)
    missed = print_bars(document["bars"])
    print(json.dumps(document))
    return missed


if __name__ == "__main__":
    sys.exit(main())
