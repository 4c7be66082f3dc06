"""One copy of the weights: what a process with every exit costs against one that has the full depth only.

Owns item (d) of :mod:`benchmarks.main_job`. Each bundle is measured in a process of its own (``python -m benchmarks.memory
BUNDLE`` prints that process's figures): it loads the engine, prefills a prompt at full depth, then takes one token at each
exit. Counted is everything the process holds, interpreter and libraries included:

    peak_rss_mb      VmHWM: the kernel's own high-water mark of resident memory; mapped files count
    peak_pss_mb      proportional set size, the highest of samples every 10 ms: a page that n processes map counts 1/n
    private_mb       pages that only this process has, at the end
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from balcony_edge.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS = 64
FIGURES = ("peak_rss_mb", "peak_pss_mb", "private_mb")


def measure(bundle: Bundle, full_depth: Bundle, rounds: int) -> dict[str, Any]:
    """Item ``memory`` of the JSON line: both processes' figures (medians) and the ratios between them."""
    pair = {"all_exits": bundle, "full_depth": full_depth}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in pair}
    for _ in range(rounds):
        for name, which in pair.items():
            command = [sys.executable, "-m", "benchmarks.memory", str(which.path.resolve())]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            samples[name].append(json.loads(done.stdout))
    typical = {
        name: {figure: round(median(sample[figure] for sample in found), 1) for figure in FIGURES}
        for name, found in samples.items()
    }
    ratios = {figure: round(typical["all_exits"][figure] / typical["full_depth"][figure], 3) for figure in FIGURES}
    return {**typical, "ratios": ratios, "ratio": max(ratios.values())}


def open_full_depth(bundle: Bundle, path: Path) -> Bundle:
    """The bundle with the full depth only at ``path``; exported from the demo's model where there is none yet.

    Exits with a message where it is not of the same model and precision as ``bundle``.
    """
    if not path.exists():
        _export_full_depth(path, bundle)
    found = Bundle.open(path, verify_hashes=False)
    ours, theirs = bundle.manifest, found.manifest
    if theirs.model != ours.model or theirs.precision != ours.precision or len(theirs.exits) != 1:
        raise SystemExit(f"{path}: not the full depth alone of {bundle.path}: remove it, or name one with --full-depth")
    return found


def _export_full_depth(path: Path, bundle: Bundle) -> None:
    from balcony_export.checkpoint import demo_model_path, load_model, load_tokenizer  # noqa: PLC0415 - torch is slow
    from balcony_export.export import export_bundle  # noqa: PLC0415 - likewise, and only where nothing is cached
    from balcony_export.quantize import Scheme  # noqa: PLC0415 - likewise

    model, source, blocks = bundle.manifest.model, demo_model_path(), bundle.manifest.quantization
    scheme = None if blocks is None else Scheme(**blocks.model_dump(exclude={"method", "calibration_tokens"}))
    print(f"exporting the full depth alone to {path}, once", file=sys.stderr)
    export_bundle(
        load_model(source),
        load_tokenizer(source),
        {},
        path,
        name=model.name,
        trained=False,
        precision=scheme or ("float16" if bundle.manifest.precision == "float16" else "float32"),
        context_length=model.context_length,
    )


def _run(path: Path) -> dict[str, float]:
    from balcony_runtime.engine import Engine  # noqa: PLC0415 - the child measures what loading this costs, too

    with _peak_pss() as peak, Engine.open(path) as engine:
        sequence = engine.new_sequence(max_length=2 * PROMPT_TOKENS)
        sequence.advance(engine.exit_layers[-1], [17] * PROMPT_TOKENS)
        for exit_layer in reversed(engine.exit_layers):
            sequence.advance(exit_layer, [17])
        now = _rollup()
    return {
        "peak_rss_mb": _kb("/proc/self/status")["VmHWM"] / 1e3,
        "peak_pss_mb": max(*peak, now["Pss"]) / 1e3,
        "private_mb": (now["Private_Clean"] + now["Private_Dirty"]) / 1e3,
    }


@contextmanager
def _peak_pss() -> Iterator[list[float]]:
    samples = [_rollup()["Pss"]]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            samples[0] = max(samples[0], _rollup()["Pss"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _rollup() -> dict[str, float]:
    return _kb("/proc/self/smaps_rollup")


def _kb(path: str) -> dict[str, float]:
    """``name: value kB`` lines of a proc file, in kilobytes of 1,000 bytes."""
    values = {}
    for line in Path(path).read_text(encoding="ascii").splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            values[words[0].rstrip(":")] = int(words[1]) * 1.024
    return values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory of one process with one bundle, as a JSON line.")
    parser.add_argument("bundle", type=Path)
    print(json.dumps(_run(parser.parse_args().bundle)))
