"""One copy of the weights: memory of a process with all exits compared with one that has the full depth only.

Owns item (d) of :mod:`.main_job`. Each bundle is measured in a process of its own, whose figures ``python -m
benchmarks.engine.memory BUNDLE`` prints. The process loads the engine, prefills a prompt at full depth, then takes one token
at each exit. All memory of the process counts, interpreter and libraries included:

    peak_rss_mb      VmHWM: the kernel's own high-water mark of resident memory; mapped files count
    peak_pss_mb      proportional set size, the highest of samples every 10 ms: a page that n processes map counts 1/n
    private_mb       pages that only this process has, at the end

``python -m benchmarks.engine.memory BUNDLE --idle`` measures waiting conversations: the memory of 1, 8 and 64 of them, each
after one turn. It also measures the time to the first token of a short prompt, with the whole context and with a limit of 20
tokens. Each of the kernel's three settings for large pages is measured in a process of its own; setting them needs root.

    used_mb          tokens in use × bytes of their keys, values and rows at the boundaries
    taken_mb         growth of the process's private memory
    reported_mb      sum of the sequences' ``memory_bytes``
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from balcony_edge.bundle.bundle import Bundle
from benchmarks.peer_workers.worker import memory_mb
from benchmarks.rounds import aligned, bar, interleave, print_bars, ratio

ROOT = Path(__file__).resolve().parents[2]
PROMPT_TOKENS = 64
#: Repetitions of a sentence of some 22 tokens, which make a turn of some 220.
IDLE_REPEATS = 9
FIGURES = ("peak_rss_mb", "peak_pss_mb", "private_mb")


def measure(bundle: Bundle, full_depth: Bundle, rounds: int) -> dict[str, Any]:
    """Measure item ``memory`` of the JSON line: both processes' figures (medians) and the ratios between them."""
    pair = {"all_exits": bundle, "full_depth": full_depth}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in pair}
    for _ in range(rounds):
        for name, which in pair.items():
            command = [sys.executable, "-m", "benchmarks.engine.memory", str(which.path.resolve())]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            samples[name].append(json.loads(done.stdout))
    typical = {
        name: {figure: round(median(sample[figure] for sample in found), 1) for figure in FIGURES}
        for name, found in samples.items()
    }
    ratios = {figure: round(typical["all_exits"][figure] / typical["full_depth"][figure], 3) for figure in FIGURES}
    return {**typical, "ratios": ratios, "ratio": max(ratios.values())}


#: Fields of a quantization that change no sizes.
_BY_CALIBRATION = {"method", "calibration_tokens"}


def open_full_depth(bundle: Bundle, path: Path) -> Bundle:
    """Open the bundle with the full depth only at ``path``; export it from the demo's model if it does not exist.

    Exits with a message if its model or precision differs from that of ``bundle``.
    """
    if not path.exists():
        _export_full_depth(path, bundle)
    found = Bundle.open(path, verify_hashes=False)
    ours, theirs = bundle.manifest, found.manifest
    schemes = [one.quantization and one.quantization.model_dump(exclude=_BY_CALIBRATION) for one in (ours, theirs)]
    if (
        theirs.model != ours.model
        or theirs.precision != ours.precision
        or schemes[0] != schemes[1]
        or len(theirs.exits) != 1
    ):
        raise SystemExit(
            f"{path}: is not the full depth alone of {bundle.path}: remove it, or name another with --full-depth"
        )
    return found


def _export_full_depth(path: Path, bundle: Bundle) -> None:
    from balcony_export.export import ExportOptions, export_bundle  # noqa: PLC0415 - torch is slow to import
    from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer  # noqa: PLC0415 - likewise
    from balcony_export.model.exits import ExitModel  # noqa: PLC0415 - likewise
    from balcony_export.quantize.blocks import Scheme  # noqa: PLC0415 - likewise

    model, source, blocks = bundle.manifest.model, demo_model_path(), bundle.manifest.quantization
    scheme = None if blocks is None else Scheme(**blocks.model_dump(exclude=_BY_CALIBRATION))
    print(f"exporting the full depth alone to {path}, once", file=sys.stderr)
    half = bundle.manifest.precision == "float16"
    precision = scheme or ("float16" if half else "float32")
    options = ExportOptions(model.name, False, precision, context_length=model.context_length)  # type: ignore[arg-type]
    export_bundle(ExitModel(load_model(source)), load_tokenizer(source), path, options)


def idle(path: Path) -> dict[str, Any]:
    """Run a process under each setting of large pages; returns setting → figures, with both bars. Prints the table."""
    before = _setting()
    report: dict[str, Any] = {}
    try:
        for setting in ("always", "madvise", "never"):
            if not _set(setting):
                continue
            command = [sys.executable, "-m", "benchmarks.engine.memory", str(path.resolve()), "--idle-here"]
            report[setting] = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    finally:
        _set(before)
    rows: list[Any] = [
        ("large pages", "chats", "tokens", "used MB", "taken MB", "reported MB", "taken/used", "ttft ratio")
    ]
    for setting, found in report.items():
        for one in found["chats"]:
            figures = (one["used_mb"], one["taken_mb"], one["reported_mb"], one["ratio"], found["first_token_ratio"])
            rows.append((setting, one["chats"], one["tokens"], *figures))
    print("\n".join(aligned(rows)), file=sys.stderr)
    last = [found["chats"][-1]["ratio"] for found in report.values()]
    ratios = [found["first_token_ratio"] for found in report.values()]
    return {**report, "bars": {"64 chats": bar(max(last), 1.1), "first token": bar(max(ratios), 1.1)}}


_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _setting() -> str:
    return _LARGE_PAGES.read_text(encoding="ascii").partition("[")[2].partition("]")[0]


def _set(setting: str) -> bool:
    """Try to set large pages; returns whether the kernel has that setting now."""
    with suppress(OSError):
        _LARGE_PAGES.write_text(setting, encoding="ascii")
    return _setting() == setting


def _idle_here(path: Path) -> dict[str, Any]:
    import balcony_edge  # noqa: PLC0415 - the child also measures the memory of this import

    text = "The balcony looks over the river, and in the evening the lamps along the quay are lit one after the other. "
    with balcony_edge.load(path, verify_hashes=False) as llm:
        manifest, model = llm.engine.manifest, llm.engine.manifest.model
        row_bytes = model.hidden_size * (1 + len(llm.exit_layers)) * np.dtype(manifest.float_dtype).itemsize
        row_bytes += 2 * model.num_layers * model.kv_width * np.dtype(manifest.kv_dtype).itemsize
        chats: list[Any] = []
        report: dict[str, Any] = {"chats": []}

        def speak() -> Any:
            chat = llm.chat()
            for _ in chat.send(text * IDLE_REPEATS, max_new_tokens=8, ignore_eos=True):
                pass
            return chat

        speak()  # makes everything that is made only once
        gc.collect()
        before = memory_mb()["private"]
        for count in (1, 8, 64):
            chats += [speak() for _ in range(count - len(chats))]
            gc.collect()
            tokens = sum(chat.sequence.length for chat in chats)
            used_mb, taken_mb = tokens * row_bytes / 1e6, memory_mb()["private"] - before
            reported_mb = sum(chat.sequence.state.memory_bytes for chat in chats) / 1e6
            figures = {
                "used_mb": used_mb,
                "taken_mb": taken_mb,
                "reported_mb": reported_mb,
                "ratio": taken_mb / used_mb,
            }
            rounded = {name: round(value, 3) for name, value in figures.items()}
            report["chats"].append({"chats": count, "tokens": tokens, **rounded})

        ids = llm.encode("hi")

        def first_token_ms(limit: int | None) -> float:
            begin = time.perf_counter()
            # Of its own: members of the pool all have the whole context.
            sequence = llm.engine.new_sequence(max_length=None if limit is None else len(ids) + limit)
            with llm.stream(ids, max_new_tokens=limit, sequence=sequence) as stream:
                next(stream)
            return (time.perf_counter() - begin) * 1e3

        samples = interleave({limit: partial(first_token_ms, limit) for limit in (None, 20)}, 20)
        report["first_token_ms"] = {str(limit): round(median(found), 2) for limit, found in samples.items()}
        report["first_token_ratio"] = round(ratio(samples[None], samples[20]), 3)
    return report


def _run(path: Path) -> dict[str, float]:
    from balcony_runtime.engine import Engine  # noqa: PLC0415 - the child also measures the memory of this import

    with _peak_pss() as peak, Engine.open(path) as engine:
        sequence = engine.new_sequence(max_length=2 * PROMPT_TOKENS)
        sequence.advance(engine.exit_layers[-1], [17] * PROMPT_TOKENS)
        for exit_layer in reversed(engine.exit_layers):
            sequence.advance(exit_layer, [17])
        peak.append(memory_mb()["pss"])
    now = memory_mb()
    return {"peak_rss_mb": now["peak_rss"], "peak_pss_mb": max(peak), "private_mb": now["private"]}


@contextmanager
def _peak_pss() -> Iterator[list[float]]:
    samples = [memory_mb()["pss"]]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            samples[0] = max(samples[0], memory_mb()["pss"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory of one process with one bundle, as a JSON line.")
    parser.add_argument("bundle", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--idle", action="store_true", help="measure waiting conversations under each setting of large pages"
    )
    which.add_argument("--idle-here", action="store_true", help="the same under the present setting only")
    options = parser.parse_args()
    document: dict[str, Any] = (idle if options.idle else _idle_here if options.idle_here else _run)(options.bundle)
    print(json.dumps(document))
    sys.exit(print_bars(document.get("bars", {})))
