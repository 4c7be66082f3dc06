"""Cold start: from the start of a process to its first token.

    python -m benchmarks.engine.cold_start BUNDLE [--rounds 9] [--target-ms 60] [--packed DIR] [--before SOURCE_TREE]

Every sample is a process of its own that imports, loads the bundle and streams the first token of a prompt of 32 tokens, once
without a target (``plain``) and once with one (``target``), for which it must know what a token costs. ``--packed`` repeats
both with packed weights. The files are in the page cache. Times in ms are medians over interleaved rounds:

    python   the interpreter's own start
    imports  modules of the package
    load     ``balcony_edge.load``: checks of the files, sessions, prices
    first    from ``stream`` to its first token
    total    all of them

Peers whose environments are installed (``python benchmarks/peers.py --install``) are measured in the same rounds, and so is
another source tree with ``--before``. The output ends with one JSON line: ``cases``: name → these times, ``ratios``: peer or
tree, or ``target, packed`` → our ``target`` total over theirs, the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

from balcony_edge.device.machine import best_threads, cpu_name
from benchmarks.engine.decode import prompt
from benchmarks.peer_workers import install
from benchmarks.peer_workers.process import Worker
from benchmarks.rounds import Neighbours, aligned, interleave, ratio

PROMPT_TOKENS = 32
PARTS = ("python", "imports", "load", "first")
#: Peers that run the demo's model in int4.
PEERS = ("llama.cpp Q4_0", "ONNX Runtime GenAI int4")
#: The process: bundle, target or nothing, prompt; prints the moments at the ends of its parts.
CHILD = """
import time
moments = [time.monotonic()]
import json, sys
import balcony_edge
balcony_edge.LLM, balcony_edge.Budget
moments.append(time.monotonic())
path, target_ms, packed, prompt = json.loads(sys.argv[1])
llm = balcony_edge.load(path, packed=packed, budget=balcony_edge.Budget(tpot_ms=target_ms))
moments.append(time.monotonic())
next(llm.stream(prompt, max_new_tokens=8))
moments.append(time.monotonic())
print(json.dumps(moments))
"""

Times = dict[str, float]


def ours(bundle: Path, target_ms: float | None, packed: Path | None, tree: Path, compiled: str) -> Times:
    """Times of one process of a source tree, in ms; ``compiled`` is the directory of compiled modules."""
    environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'runtime'}", "PYTHONPYCACHEPREFIX": compiled}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    asked = json.dumps([str(bundle), target_ms, None if packed is None else str(packed), prompt(PROMPT_TOKENS)])
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, asked], env=environment, cwd=bundle, stdout=subprocess.PIPE, check=True
    )
    moments = [begin, *json.loads(done.stdout)]
    times = {part: 1e3 * (end - start) for part, (start, end) in zip(PARTS, pairwise(moments), strict=True)}
    return times | {"total": 1e3 * (moments[-1] - begin)}


def peer(model: install.PeerModel, threads: int) -> Times:
    """Times of one process of a peer, in ms; ``load`` has the first token of a prompt of one token."""
    begin = time.monotonic()
    options = {**model.options, "max_length": 2048}
    module, python = install.WORKERS[model.peer], install.python_of(model.peer)
    with Worker(python, module, model.located(), options, threads=threads, huge_pages=False) as worker:
        loaded = time.monotonic()
        first_ms = worker.ask(do="generate", variant=None, prompt=prompt(PROMPT_TOKENS), steps=0)["prefill_ms"]
        load_ms = 1e3 * worker.load_s
    total = 1e3 * (loaded - begin) + first_ms
    return {"imports": total - load_ms - first_ms, "load": load_ms, "first": first_ms, "total": total}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--target-ms", type=float, default=60.0, help="time per output token that `target` asks for")
    parser.add_argument("--packed", type=Path, help="directory for packed weights, which the first round writes")
    parser.add_argument("--before", type=Path, help="another source tree, to compare with")
    options = parser.parse_args()
    neighbours, bundle = Neighbours(), options.bundle.resolve()
    ways = {"": None} | ({", packed": options.packed.resolve()} if options.packed else {})
    trees = {"": install.ROOT} | ({"before: ": options.before.resolve()} if options.before else {})
    with tempfile.TemporaryDirectory() as compiled:  # written in the first round, which does not count
        cases: dict[str, Callable[[], Times]] = {
            f"{name}{budget}{way}": partial(ours, bundle, target_ms, packed, tree, compiled)
            for name, tree in trees.items()
            for budget, target_ms in (("plain", None), ("target", options.target_ms))
            for way, packed in ways.items()
        }
        for model in install.PEER_MODELS:
            if model.name in PEERS and install.python_of(model.peer).exists() and model.located().exists():
                cases[model.name] = partial(peer, model, best_threads())
        samples = interleave(cases, options.rounds)
    found = {
        name: {part: round(median(one[part] for one in times), 1) for part in times[0]}
        for name, times in samples.items()
    }
    totals = {name: [one["total"] for one in times] for name, times in samples.items()}
    others = [name for name in cases if name != "target" and not name.removeprefix("before: ").startswith("plain")]
    ratios = {name: round(ratio(totals["target"], totals[name]), 3) for name in others}
    columns = [*PARTS, "total"]
    print("\n".join(aligned([["", *columns], *([n, *(t.get(c, "") for c in columns)] for n, t in found.items())])))
    document = {"benchmark": "cold_start", "cpu": cpu_name(), "rounds": options.rounds, **neighbours.report()}
    print(json.dumps({**document, "cases": found, "ratios": ratios}))


if __name__ == "__main__":
    main()
