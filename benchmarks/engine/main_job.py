"""The main job's figures on one bundle, in one run: ``python benchmarks/engine/main_job.py BUNDLE [--quick] [--only ITEMS]``.

The physics of a decode step. It multiplies one row by every weight on its way. This is about two floating-point operations
for each weight that must come from memory, while a core could do some dozens in that time. So a step takes as long as its
weights take to arrive, and an exit saves the weights that it does not read. The ideal speed-up of exit e is
bytes_per_token(full) / bytes_per_token(e), balcony and LM head included. A smaller speed-up is due to overhead. A larger one
is possible if the shallower sweep fits into a cache and the deeper one does not. The bytes do not include the KV cache (at
512 tokens 4 % of the demo model's bytes).

The physics of a switch. A pass of many rows reads the weights once for all of them. So skipped rows are cheap to catch up
in one pass, and a switch up costs as much as a prefill of the pending rows through the missing stages. A balcony that was
not used needs only keys and values of the rows since then.

How it is measured: :mod:`benchmarks.rounds` (interleaved rounds, medians, ratios within a round). Wall time around
``TokenSequence.step`` with the argmax (decode) or ``TokenSequence.advance`` (switches), in one process with the runtime's
shared thread pool. Stop everything else; repeat a run whose ``others_cpu_share`` is above some percent.

The last line on stdout is one JSON object; the table goes to stderr. Exit code 1 if a bar is missed. Its fields:

    benchmark, model, precision, fingerprint, onnxruntime, cpu, threads, packed, quick, others_cpu_share, load_1m, seconds
    decode[]       exit_layer, context, ms; speedup over the full depth, predicted by bytes, achieved = speedup / predicted
    chain[]        context; chain_ms: full depth through the stages (with --packed: joined); whole_ms: the same operators as
                   one graph (benchmarks/engine/whole_graph.py); ratio = whole / chain; ort_ratio: the same of the time inside
                   ONNX Runtime; logits_difference of the two
    switch_up[]    from_exit, pending; advance_ms: the full-depth step with the pending rows and the new one;
                   switch_ms: advance_ms minus the part that does not depend on pending rows (stages without a backlog,
                   norm, head); prefill_ms: the pending rows (one fewer than in switch_ms) through the missing stages by
                   State.run_stage; ratio = switch_ms / prefill_ms; advance_ratio = advance_ms / prefill_ms;
                   extra_ms: advance_ms minus a full-depth step without a backlog; extra_ratio = extra_ms / prefill_ms,
                   which has the bar: a switch costs the time by which its step is longer than one without a switch
    switch_down[]  to_exit; switch_ms: the first step at the exit after 512 tokens at full depth; steady_ms: a later step;
                   extra_ms: their difference; extra_full_tokens: extra_ms in full-depth tokens (full_depth_ms)
    memory         all_exits, full_depth: peak_rss_mb, peak_pss_mb, private_mb of one process each (:mod:`.memory`);
                   ratios: all_exits / full_depth of each; ratio: the largest of them
    overhead[]     budget; median_us and p95_us of a step's time outside ONNX Runtime (:mod:`.overhead`)
    bars           name → value, limit, holds; the worst case of each item
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime as ort

from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.device.machine import best_threads, cpu_name
from balcony_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.text.codec import TextCodec
from benchmarks.engine import decode, memory, overhead, switching
from benchmarks.engine.whole_graph import open_whole_graph
from benchmarks.rounds import Neighbours, aligned, bar, print_bars

ITEMS = ("decode", "switch", "memory", "overhead")
#: Rounds of each item: (full, quick). On 2 cores without other load a full run takes some 2 minutes, a quick one 1.
ROUNDS = {"decode": (11, 3), "switch": (5, 2), "memory": (2, 1), "overhead": (5, 2)}


def run(
    path: Path, items: tuple[str, ...], *, quick: bool, full_depth: Path | None, packed: Path | None
) -> dict[str, Any]:
    """Measure ``items`` of the bundle at ``path``; returns the document of the JSON line without its bars."""
    rounds = {item: counts[quick] for item, counts in ROUNDS.items()}
    bundle = Bundle.open(path)
    begin, neighbours = time.perf_counter(), Neighbours()
    found: dict[str, Any] = {}
    if "memory" in items:  # measured before this process holds weights itself
        other = memory.open_full_depth(bundle, full_depth or path.with_name(f"{path.name}-full"))
        found["memory"] = memory.measure(bundle, other, rounds["memory"])
    if set(items) - {"memory"}:
        with LLM(Engine(OnnxRuntimeBackend(bundle, packed=packed)), TextCodec(bundle), Budget()) as llm:
            if "decode" in items:
                # The directory is next to the bundle, so that hard links work.
                with tempfile.TemporaryDirectory(dir=path.parent) as directory:
                    session = open_whole_graph(bundle, Path(directory))
                    found |= decode.measure(llm.engine, bundle, session, rounds["decode"])
                    del session
            if "switch" in items:
                found |= switching.measure(llm.engine, rounds["switch"])
            if "overhead" in items:
                found["overhead"] = overhead.measure(llm, rounds["overhead"])
    manifest = bundle.manifest
    return {
        "benchmark": "main_job",
        "model": manifest.model.name,
        "precision": manifest.precision,
        "fingerprint": manifest.fingerprint[:16],
        "onnxruntime": ort.__version__,
        "cpu": cpu_name(),
        "threads": best_threads(),
        "packed": packed is not None,
        "quick": quick,
        **neighbours.report(),
        "seconds": round(time.perf_counter() - begin, 1),
        **found,
    }


def bars(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare the worst case of each item with its bar."""
    bars: dict[str, dict[str, Any]] = {}

    if "decode" in found:
        full = max(row["exit_layer"] for row in found["decode"])  # left out: its speed-up is 1 by definition
        achieved = min(row["achieved"] for row in found["decode"] if row["exit_layer"] != full)
        bars["speed-up / predicted"] = bar(achieved, 0.9, at_least=True)
        bars["whole / chain"] = bar(min(row["ratio"] for row in found["chain"]), 0.98, at_least=True)
    if "switch_up" in found:
        bars["switch up, extra / prefill"] = bar(max(row["extra_ratio"] for row in found["switch_up"]), 1.3)
        bars["switch down, full tokens"] = bar(max(row["extra_full_tokens"] for row in found["switch_down"]), 1.0)
    if "memory" in found:
        bars["memory, all exits / full"] = bar(found["memory"]["ratio"], 1.2)
    if "overhead" in found:
        unbarred = (overhead.SAMPLED, overhead.BARE)
        greedy = [row["median_us"] for row in found["overhead"] if not row["budget"].startswith(unbarred)]
        bars["Python a step, median µs"] = bar(max(greedy), 150.0)
    return bars


def show(document: dict[str, Any]) -> str:
    """The document as a readable table."""
    lines = [
        f"{document['model']} {document['precision']} on {document['cpu']}, {document['threads']} threads, "
        f"onnxruntime {document['onnxruntime']}; others took {document['others_cpu_share']} of the CPU time"
    ]
    for item, rows in document.items():
        if item == "memory":
            rows = [{"process": name, **rows[name]} for name in ("all_exits", "full_depth", "ratios")]  # noqa: PLW2901
        if isinstance(rows, list) and rows:
            lines += ["", item.replace("_", " "), *aligned([list(rows[0]), *(list(row.values()) for row in rows)])]
    return "\n".join([*lines, "", "bars (worst case of each)"])


def _items(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(ITEMS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: give some of {','.join(ITEMS)}")
    return names


def main() -> int:
    """Parse the command line, measure, print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Figures of the main job on one bundle; see the module's docstring.")
    parser.add_argument("bundle", type=Path, help="directory that `balcony-edge export` wrote")
    parser.add_argument("--quick", action="store_true", help="few rounds: checks that it runs, not for figures")
    parser.add_argument("--only", type=_items, default=ITEMS, help=f"some of {','.join(ITEMS)} [default: all]")
    parser.add_argument("--full-depth", type=Path, help="bundle with the full depth only [default: BUNDLE-full]")
    parser.add_argument("--packed", type=Path, help="directory for packed weights; runs with packed weights")
    arguments = parser.parse_args()
    document = run(
        arguments.bundle,
        arguments.only,
        quick=arguments.quick,
        full_depth=arguments.full_depth,
        packed=arguments.packed,
    )
    document["bars"] = bars(document)
    print(show(document), file=sys.stderr)
    missed = print_bars(document["bars"])
    print(json.dumps(document, ensure_ascii=False))
    return missed


if __name__ == "__main__":
    sys.exit(main())
