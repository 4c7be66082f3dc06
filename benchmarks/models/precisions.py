"""Comparison of precisions: quality of every exit, bytes and speed.

    python -m benchmarks.models.precisions --balconies balconies/smollm2-135m-instruct --evaluate wiki.valid.raw \
        --calibration wikipedia_sample.jsonl [--only "int4,block=64,head=4" ...] [--work DIR]

The physics. A decode step reads every weight once, so the bytes decide the speed as long as the kernels are as fast as the
memory. At accuracy level 1 and with zero points they may be slower. The loss by rounding is measured on the same tokens for
all precisions.

How it is measured: the demo model is exported at each precision (kept below ``--work`` for the next run with the same
balconies and texts). Quality comes from the judge of ``export --evaluate`` (the first 8,192 tokens of the text). Then decode
steps after a short prompt are timed in interleaved rounds (:mod:`benchmarks.rounds`), with all bundles loaded in one process.
The word ``gptq`` after a precision means that it is rounded with ``--calibration``.

The last line is JSON: ``benchmark``, ``text``, ``others_cpu_share``, and ``precisions``: name → ``weights_mb`` (read per token
at full depth), ``decode_tps`` (exit → tokens a second), ``speed`` (full depth, against float32 within the rounds), and ``kl``,
``kl_se``, ``agreement``, ``perplexity`` (exit → value).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import Manifest
from balcony_export.export import ExportOptions, export_bundle, trace
from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer
from balcony_export.model.exits import ExitModel
from balcony_export.precision import Judge, read_judged_texts
from balcony_export.quantize.blocks import parse_precision
from balcony_export.quantize.gptq import calibration_rows
from balcony_runtime.engine import Engine
from benchmarks.engine.decode import block
from benchmarks.rounds import Neighbours, aligned, interleave, ratio

PRECISIONS = (
    "fp32",
    "int8,block=64",
    "int8,block=32,asym",
    "int4,block=32",
    "int4,block=32,asym",
    "int4,block=64",
    "int4,block=32,head=4",
    "int4,block=64,head=4",
    "int4,block=64,head=4,asym",
    "int4,block=64,head=4,level=1",
    "int4,block=64,head=4,kv=8 gptq",
    "int4,block=128,head=4",
    "int4,block=64,head=4 gptq",
    "int4,block=64,down=256,head=4 gptq",
    "int4,block=128,down=256,head=4 gptq",
    "int4,block=32,head=4 gptq",
    "int4,block=32 gptq",
)
CONTEXT, ROUNDS = 32, 5


def export_all(names: list[str], options: argparse.Namespace) -> dict[str, Bundle]:
    """Export a bundle of each precision, with its quality in its manifest."""
    bundles: dict[str, Bundle] = {}
    missing = [name for name in names if not _place(options.work, name).is_dir()]
    if missing:
        model, tokenizer = load_model(demo_model_path()), load_tokenizer(demo_model_path())
        exits = ExitModel.open(model, None, options.balconies)
        judge = Judge(exits, tokenizer, read_judged_texts([options.evaluate], tokenizer), name="demo")
        rows = calibration_rows([options.calibration], tokenizer)
        wanted = ExportOptions("demo", trained=True, context_length=2048)
        traced = trace(exits, wanted)
        for name in missing:
            words, _, method = name.partition(" ")
            this = replace(wanted, precision=parse_precision(words), calibration=rows if method else ())
            place = _place(options.work, name)
            export_bundle(exits, tokenizer, place, this, traced=traced, check=judge.measure)
            print(f"{name}: exported and judged", file=sys.stderr, flush=True)
    for name in names:
        bundles[name] = Bundle.open(_place(options.work, name), verify_hashes=False)
    return bundles


def work_of(options: argparse.Namespace) -> Path:
    """Directory of the bundles of these balconies and texts, below ``--work``: others give other bundles and other figures."""
    found = hashlib.sha256()
    balconies = sorted(path for path in options.balconies.iterdir() if path.is_file())
    for path in (*balconies, options.evaluate, options.calibration):
        with path.open("rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    directory: Path = options.work / found.hexdigest()[:12]
    return directory


def _place(work: Path, name: str) -> Path:
    return work / re.sub(r"\W+", "-", name)


def decode_ms(bundles: dict[str, Bundle]) -> dict[tuple[str, int], list[float]]:
    """``(precision, exit) → milliseconds of a decode step``, one value per round."""
    with ExitStack() as stack:
        engines = {name: stack.enter_context(Engine.of(bundle)) for name, bundle in bundles.items()}
        cases = {(name, e): block(engine, e, CONTEXT) for name, engine in engines.items() for e in engine.exit_layers}
        return {key: [step.wall_ms for step in steps] for key, steps in interleave(cases, ROUNDS).items()}


def row_of(manifest: Manifest, text: str, times: dict[int, list[float]], float32_ms: list[float]) -> dict[str, Any]:
    """Results of one precision."""
    full, qualities = manifest.exit_layers[-1], {}
    for exit_ in manifest.exits:
        assert exit_.quality is not None
        qualities[str(exit_.exit_layer)] = exit_.quality.text[text]
    return {
        "weights_mb": round(manifest.bytes_per_token(full) / 1e6, 1),
        "decode_tps": {str(e): round(1e3 / median(samples), 1) for e, samples in times.items()},
        "speed": round(ratio(float32_ms, times[full]), 2),
        "kl": {e: round(q.kl.value, 4) for e, q in qualities.items()},
        "kl_se": {e: round(q.kl.stderr or 0.0, 4) for e, q in qualities.items()},
        "agreement": {e: round(q.agreement.value, 4) for e, q in qualities.items()},
        "perplexity": {e: round(q.perplexity.value, 2) for e, q in qualities.items()},
    }


def main() -> None:
    """Export what is missing, measure, print."""
    parser = argparse.ArgumentParser(description="Comparison of precisions; see the module's docstring.")
    parser.add_argument("--balconies", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, required=True, help="text for measuring quality (WikiText-2 valid)")
    parser.add_argument("--calibration", type=Path, required=True, help="calibration text for GPTQ")
    parser.add_argument("--only", nargs="+", choices=PRECISIONS[1:], default=list(PRECISIONS[1:]), metavar="PRECISION")
    parser.add_argument("--work", type=Path, default=Path(".cache/precisions"), help="directory for the bundles")
    options = parser.parse_args()
    options.work = work_of(options)
    options.work.mkdir(parents=True, exist_ok=True)
    names = ["fp32", *options.only]
    bundles, neighbours = export_all(names, options), Neighbours()
    found = decode_ms(bundles)
    rows = {}
    for name, bundle in bundles.items():
        times = {e: found[name, e] for e in bundle.manifest.exit_layers}
        full = bundle.manifest.exit_layers[-1]
        rows[name] = row_of(bundle.manifest, options.evaluate.name, times, found["fp32", full])
    header = [
        "precision",
        "MB a token",
        "tokens/s",
        "× float32",
        "KL by exit",
        "agreement by exit",
        "perplexity by exit",
    ]
    table = [
        [
            name, row["weights_mb"], next(reversed(row["decode_tps"].values())), row["speed"],
            *(" / ".join(f"{value:.4g}" for value in row[key].values()) for key in ("kl", "agreement", "perplexity")),
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    print("\n".join(aligned([header, *table])), file=sys.stderr)
    document = {"benchmark": "precisions", "text": options.evaluate.name, **neighbours.report(), "precisions": rows}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
