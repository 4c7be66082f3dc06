"""Our runtime at every exit compared with other engines on the same model: speed, quality, memory and load time.

    python benchmarks/peers.py --install                                  # the peers' environments and models, once
    python benchmarks/peers.py BUNDLE [BUNDLE ...] --text wiki.valid.raw  # measure, all bundles in the same rounds
    python benchmarks/peers.py BUNDLE --text wiki.valid.raw --contexts 32,512,2048,4096,8000 --rounds 3

The physics. A decode step reads every weight once, so engines differ by the bytes that they read and by the time that they
lose between the reads. Fewer bits are faster and less exact, so each speed is reported with its KL. A float32 reference is
exact only if it has the same weights. The demo's model is a Q4_1 file, so float32 means its dequantized weights. llama.cpp's
Q4_1 as shipped therefore only loses by rounding activations; a fresh quantization should be compared with Q4_0.

Processes and rounds. Every engine is a process of its own (benchmarks/peer_workers) that answers one request at a time. A
process keeps the speed that it starts with: the placement of its memory makes pairs of equal engines differ by up to a
tenth. So every round starts all engines anew and runs every case once to warm up and three times to count (prompts of more
than 512 tokens only once, and at full depth alone), every other time in reverse order. Figures are medians over all counted
replies, and ratios are taken within one pass over the cases (:mod:`benchmarks.rounds`). Before each request the other
engines get time to fall asleep, and each reports the CPU time that it used while idle.

What is measured. Prompts are token ids of ``--text``, different in every reply of a process, so that no prefix cache
helps. Replies are greedy, and end tokens do not end them. A step is timed at the point where the engine's user receives
the token: around our ``TokenSequence.step``, llama.cpp's ``llama_decode`` and transformers' forward pass, each with
numpy's argmax; in ONNX Runtime GenAI around ``generate_next_token``; in OpenVINO GenAI between calls of the streamer. A
prompt's time begins when the engine has its room for caches, which ONNX Runtime GenAI also clears and llama.cpp keeps.
Memory and load time are those of each process before its round, on a warm disk. Quality is measured after the last
round, on rows of windows of ``--text`` that are produced by decode steps, as in a reply.

The last line on stdout is one JSON object; the table goes to stderr. Exit code 1 if a bar is missed. Its fields:

    benchmark, cpu, threads, huge_pages, packed, rounds, others_cpu_share, load_1m, seconds, text, score_rows
    cases[]    name; bundle and exit_layer of ours, null for a peer; version of the engine; config: settings that the figures
               depend on (precision, block_size, head: type of the stored LM head, activations of the products, spinning, ...)
               weights_mb: for ours the bytes read per token at the exit, for a GGUF file its tensors, for others the files
               of weights
               decode_N_tps: tokens a second after a prompt of N; prefill_N_tps: its tokens a second, up to the first new one
               kl: mean over the rows of the KL to transformers' float32, in nats; kl_se: standard error over the windows
               (null for one window); agreement: share of rows with the same best token
               load_s: time until the model is loaded and has made a first token (without imports); peak_rss_mb: VmHWM after
               a prompt of 512 and its reply, imports included; private_mb: pages that no other process shares;
               loaded_mb, added_mb: memory that a second process with the model needs again, above its imports (dirty
               pages), after loading and after that reply
               idle_cpu: CPU seconds per second between requests
    exits[]    name; bytes: bytes read at full depth / bytes read at the exit; decode_N: the exit's speed / the full depth's,
               median of the rounds' ratios; decode_N_of_bytes: this speed-up / bytes, which leaves out keys and values
    ratios[]   ours, peer: names of cases, ours at full depth; decode_N, prefill_N: our speed / the peer's,
               median of the rounds' ratios; kl_difference: our KL minus the peer's; weights: our bytes / the peer's
    bars       name → value, limit, holds: for every exit, and for an int4 bundle at full depth
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.device.machine import best_threads, cpu_name
from balcony_edge.errors import BalconyError, InputError
from benchmarks.peer_workers import install
from benchmarks.peer_workers.process import Worker
from benchmarks.rounds import Neighbours, aligned, bar, interleave, print_bars, ratio

#: Lengths of the prompts, unless ``--contexts`` gives others.
CONTEXTS = (32, 512)
#: Counted replies to one prompt of up to ``SHORT`` tokens for each start of the engines.
REPLIES = 3
#: Steps of a reply. The first two bring this engine's weights into the caches; the median of the others counts.
WARM_STEPS, STEPS = 2, 24
#: Prefilled tokens of a window of scoring, and rows that it gives.
WINDOW_PREFIX, WINDOW_ROWS = 32, 256
REFERENCE = "transformers fp32"
#: Wait until spinning pools sleep after a request. Measured: ggml's uses 90 ms of CPU time, ONNX Runtime's 30, OpenVINO's 2.
SETTLE_S = 0.5
#: Rounds, and windows for quality.
ROUNDS, WINDOWS = 9, 8
#: Longest prompt after which shallower exits are measured too. After longer ones keys and values count as well as weights.
SHORT = 512


class Subject(NamedTuple):
    """One model: the function that starts its worker, and its cases (variant → name)."""

    start: Callable[[], Worker]
    variants: dict[int | None, str]


class Case(NamedTuple):
    """Properties of a case that are known before it is measured. Without ``timed`` it is only the reference for quality."""

    subject: str
    variant: int | None
    bundle: str | None
    weight_bytes: int
    timed: bool = True
    deepest: bool = True


class Text(NamedTuple):
    """Token ids: prompts of the longest context, and windows to score."""

    prompts: list[list[int]]
    windows: list[list[int]]


def read_text(path: Path, bundle: Bundle, prompts: int, longest: int, windows: int) -> Text:
    """Read prompts of ``longest`` tokens from the start of a text file, and windows spread evenly over the rest.

    Raises:
        InputError: the file cannot be read or is too short.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path}: cannot be read ({error}): give a UTF-8 text file") from error
    tokens = Tokenizer.from_file(str(bundle.file("tokenizer.json"))).encode(content).ids
    window = WINDOW_PREFIX + WINDOW_ROWS - 1
    rest = len(tokens) - prompts * longest
    if rest < windows * window:
        needed = prompts * longest + windows * window
        raise InputError(f"--text {path}: has {len(tokens)} tokens, but {needed} are needed: give a longer text")
    starts = [prompts * longest + index * (rest // windows) for index in range(windows)]
    return Text(
        [tokens[index * longest : (index + 1) * longest] for index in range(prompts)],
        [tokens[start : start + window] for start in starts],
    )


def subjects_of(
    bundles: list[Bundle],
    models: Mapping[install.PeerModel, bool],
    threads: int,
    max_length: int,
    *,
    huge_pages: bool,
    packed: Path | None,
) -> tuple[dict[str, Subject], dict[str, Case]]:
    """The models to load, and their cases in the order of the table. ``models`` tells of each peer's whether it is timed."""
    subjects: dict[str, Subject] = {}
    cases: dict[str, Case] = {}
    worker = partial(Worker, threads=threads, huge_pages=huge_pages)
    for bundle in bundles:
        manifest, name = bundle.manifest, bundle.path.resolve().name
        options: dict[str, Any] = {
            "precision": manifest.precision, "packed": packed and str(packed.resolve()), "max_length": max_length,
        }  # fmt: skip
        if manifest.quantization is not None:
            options |= manifest.quantization.model_dump()
        full = manifest.exit_layers[-1]
        variants: dict[int | None, str] = {
            e: f"Balcony Edge {name}, " + ("full depth" if e == full else f"exit {e}") for e in manifest.exit_layers
        }
        subjects[name] = Subject(
            partial(worker, Path(sys.executable), "balcony", bundle.path.resolve(), options), variants
        )
        for e in reversed(manifest.exit_layers):
            cases[variants[e]] = Case(name, e, name, manifest.bytes_per_token(e), deepest=e == full)
    for model, timed in models.items():
        start = partial(
            worker,
            install.python_of(model.peer),
            install.WORKERS[model.peer],
            model.located(),
            {**model.options, "max_length": max_length},
        )
        subjects[model.name] = Subject(start, {None: model.name})
        cases[model.name] = Case(model.name, None, None, model.weight_bytes(), timed)
    return subjects, cases


def measure(
    subjects: dict[str, Subject], cases: dict[str, Case], text: Text, contexts: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Measure all cases. Each row also holds the rounds' times under ``_ms``, which :func:`ratios` removes."""
    prompts = {
        (name, context): cycle([prompt[:context] for prompt in text.prompts[1:]])
        for context in contexts  # one after the other, so that engines that are compared run close to each other
        for name, case in cases.items()
        if case.timed and (case.deepest or context <= SHORT)
    }
    samples: dict[tuple[str, int], list[dict[str, Any]]] = {key: [] for key in prompts}
    fresh: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for number in range(rounds):
        with ExitStack() as stack:
            workers = {name: stack.enter_context(subject.start()) for name, subject in subjects.items()}
            for name, subject in subjects.items():
                fresh[name].append(_fresh(workers[name], subject, text.prompts[0][:SHORT]))
            runs: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {
                key: partial(_reply, workers[cases[key[0]].subject], cases[key[0]].variant, prompts[key])
                for key in list(prompts)[:: -1 if number % 2 else 1]
            }
            for key, found in interleave({key: run for key, run in runs.items() if key[1] <= SHORT}, REPLIES).items():
                samples[key] += found
            for key, run in runs.items():
                if key[1] > SHORT:  # a longer prompt warms up by itself
                    samples[key].append(run())
            if number == rounds - 1:
                quality = _quality(workers, cases, text.windows)
    rows = []
    for name, case in cases.items():
        if not case.timed:
            continue
        worker = workers[case.subject]
        times = {
            f"{part}_{context}": [sample[f"{figure}_ms"] for sample in samples[name, context]]
            for part, figure in (("decode", "step"), ("prefill", "prefill"))
            for context in contexts
            if samples.get((name, context))
        }
        rows.append(
            {
                "name": name,
                "bundle": case.bundle,
                "exit_layer": case.variant,
                "version": worker.version,
                "config": worker.config,
                "weights_mb": round(case.weight_bytes / 1e6, 1),
                **{
                    f"{part}_{context}_tps": round(1e3 * tokens / median(times[f"{part}_{context}"]), 1)
                    for context in contexts
                    if f"decode_{context}" in times
                    for part, tokens in (("decode", 1), ("prefill", context))
                },
                **quality[name],
                **{
                    figure: round(median(sample[figure] for sample in fresh[case.subject]), digits)
                    for figure, digits in (
                        ("load_s", 3),
                        ("loaded_mb", 1),
                        ("added_mb", 1),
                        ("peak_rss_mb", 1),
                        ("private_mb", 1),
                    )
                },
                "idle_cpu": round(worker.idle_cpu, 3),
                "_ms": times,
            }
        )
    return rows


def exit_speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed-up of every exit over its bundle's full depth, and the speed-up that the bytes predict."""
    found: list[dict[str, Any]] = []
    full: dict[str, Any] = {}
    for row in (row for row in rows if row["bundle"] is not None):
        if full.get("bundle") != row["bundle"]:
            full = row  # a bundle's first case is its full depth
            continue
        predicted = full["weights_mb"] / row["weights_mb"]
        speedups = {
            figure: ratio(times, row["_ms"][figure])
            for figure, times in full["_ms"].items()
            if figure.startswith("decode_") and figure in row["_ms"]
        }
        found.append(
            {
                "name": row["name"],
                "bytes": round(predicted, 3),
                **{figure: round(value, 3) for figure, value in speedups.items()},
                **{f"{figure}_of_bytes": round(value / predicted, 3) for figure, value in speedups.items()},
            }
        )
    return found


def ratios(rows: list[dict[str, Any]], full_depths: set[str]) -> list[dict[str, Any]]:
    """Compare every case of ``full_depths`` with every peer; removes the rounds' times from ``rows``."""
    times = {row["name"]: row.pop("_ms") for row in rows}
    found = []
    for ours in (row for row in rows if row["name"] in full_depths):
        for peer in (row for row in rows if row["bundle"] is None):
            mine, theirs = times[ours["name"]], times[peer["name"]]
            speed = {figure: round(ratio(theirs[figure], mine[figure]), 3) for figure in mine}
            found.append(
                {
                    "ours": ours["name"],
                    "peer": peer["name"],
                    **speed,
                    "kl_difference": float(f"{ours['kl'] - peer['kl']:.4g}"),
                    "weights": round(ours["weights_mb"] / peer["weights_mb"], 3),
                }
            )
    return found


def bars(
    rows: list[dict[str, Any]], found: list[dict[str, Any]], exits: list[dict[str, Any]], int4: set[str]
) -> dict[str, dict[str, Any]]:
    """Bars of every exit, and of the cases named in ``int4`` if the peer was measured."""
    bars: dict[str, dict[str, Any]] = {}
    for row in (row for row in found if row["ours"] in int4):
        pair = f"{row['ours']} / {row['peer']}"
        if not row["peer"].startswith(("ONNX Runtime GenAI int4", "llama.cpp Q4_0")):
            continue
        for figure in (key for key in row if key.startswith(("decode_", "prefill_"))):
            bars[f"{pair}: {figure}"] = bar(row[figure], 1, at_least=True)
        bars[f"{pair}: kl_difference"] = bar(row["kl_difference"], 0)
        bars[f"{pair}: weights"] = bar(row["weights"], 1)
    for row in (row for row in rows if row["name"] in int4):
        bars[f"{row['name']}: load_s"] = bar(row["load_s"], 0.5)
        if row["config"]["packed"]:
            bars[f"{row['name']}: loaded_mb"] = bar(row["loaded_mb"], 50)
    for row in exits:
        for figure in (key for key in row if key.endswith("_of_bytes")):
            bars[f"{row['name']}: {figure}"] = bar(row[figure], 0.9, at_least=True)
    return bars


def show(document: dict[str, Any]) -> str:
    """The document as tables for people."""
    columns = [key for key in document["cases"][0] if key not in {"bundle", "exit_layer", "version", "config"}]
    lines = [
        f"{document['cpu']}, {document['threads']} threads, {document['rounds']} rounds; "
        f"others took {document['others_cpu_share']} of the CPU time",
        "",
        *aligned([columns, *([_short(row.get(key, "")) for key in columns] for row in document["cases"])]),
    ]
    for title, table in (("exit / full depth", document["exits"]), ("ours / peer", document["ratios"])):
        if table:
            lines += ["", title, *aligned([list(table[0]), *([_short(v) for v in row.values()] for row in table)])]
    return "\n".join([*lines, ""])


def _fresh(worker: Worker, subject: Subject, prompt: list[int]) -> dict[str, float]:
    """Load time and memory of a process that has just been started."""
    loaded_mb = worker.ask(do="memory")["added_mb"]
    worker.ask(do="generate", variant=next(reversed(subject.variants)), prompt=prompt, steps=STEPS)
    return {"load_s": worker.load_s, "loaded_mb": loaded_mb, **worker.ask(do="memory")}


def _reply(worker: Worker, variant: int | None, prompts: Iterator[list[int]]) -> dict[str, Any]:
    """Times of one reply: the prefill, and the median of the steps."""
    time.sleep(SETTLE_S)
    answer = worker.ask(do="generate", variant=variant, prompt=next(prompts), steps=WARM_STEPS + STEPS)
    return {"prefill_ms": answer["prefill_ms"], "step_ms": median(answer["step_ms"][WARM_STEPS:])}


def _quality(
    workers: dict[str, Worker], cases: dict[str, Case], windows: list[list[int]]
) -> dict[str, dict[str, float | None]]:
    """KL and agreement of every case. The reference's rows are in a file of 200 MB for every 1,000 rows."""
    found: dict[str, dict[str, float | None]] = {}
    with tempfile.TemporaryDirectory(dir=install.CACHE) as directory:
        for name in sorted(cases, key=lambda name: name != REFERENCE):
            time.sleep(SETTLE_S)
            answer = workers[cases[name].subject].ask(
                do="score",
                variant=cases[name].variant,
                windows=windows,
                first=WINDOW_PREFIX,
                reference=str(Path(directory) / "log_probabilities.f32"),
                write=name == REFERENCE,
            )
            kls = answer["kl"]
            found[name] = {
                "kl": float(f"{mean(kls):.4g}"),
                "kl_se": float(f"{stdev(kls) / len(kls) ** 0.5:.2g}") if len(kls) > 1 else None,
                "agreement": round(answer["agreement"], 4),
            }
    return found


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _selected(names: str) -> dict[install.PeerModel, bool]:
    """Models of the peers, or with the names, in a list; the reference is always among them, if only for quality."""
    wanted, known = set(names.split(",")), {*install.WORKERS, *(model.name for model in install.PEER_MODELS)}
    if unknown := wanted - known:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: give some of {','.join(install.WORKERS)}")
    found = {model: bool(wanted & {model.peer, model.name}) for model in install.PEER_MODELS}
    return {model: timed for model, timed in found.items() if timed or model.name == REFERENCE}


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        lengths = ()
    if not lengths or lengths[0] < 1:
        raise argparse.ArgumentTypeError(f"{text}: give numbers of tokens from 1 on, such as 32,512,4096")
    return lengths


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the measurements that the command line asks for; returns the document of the JSON line."""
    models, contexts = arguments.peers, arguments.contexts
    rounds, windows = (1, 1) if arguments.quick else (arguments.rounds, WINDOWS)
    if absent := install.missing(tuple(models)):
        raise InputError(f"{absent[0]}: is not installed: run with --install first, or name others with --peers")
    bundles = [Bundle.open(path) for path in arguments.bundles]
    if len({bundle.path.resolve().name for bundle in bundles}) < len(bundles):
        raise InputError("two bundles have the same directory name, but the results need different names: rename one")
    longest = max(*contexts, SHORT)  # memory is that after a prompt of SHORT tokens, whatever the contexts are
    max_length = max(longest, WINDOW_PREFIX + WINDOW_ROWS) + WARM_STEPS + STEPS + 1
    if max_length > (context := min(bundle.manifest.model.context_length for bundle in bundles)):
        raise InputError(f"--contexts {longest}: a reply ends at {max_length} tokens: the bundles take {context}")
    text = read_text(arguments.text, bundles[0], 1 + max(rounds, 1 + REPLIES), longest, windows)
    begin, neighbours = time.perf_counter(), Neighbours()
    subjects, cases = subjects_of(
        bundles, models, arguments.threads, max_length, huge_pages=arguments.huge_pages, packed=arguments.packed
    )
    rows = measure(subjects, cases, text, contexts, rounds)
    depths = {bundle.path.resolve().name: bundle.manifest for bundle in bundles}
    full = {
        name: depths[case.bundle]
        for name, case in cases.items()
        if case.bundle is not None and case.variant == depths[case.bundle].exit_layers[-1]
    }
    exits = exit_speedups(rows)
    found = ratios(rows, set(full))
    return {
        "benchmark": "peers",
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "huge_pages": arguments.huge_pages,
        "packed": arguments.packed is not None,
        "rounds": rounds,
        **neighbours.report(),
        "seconds": round(time.perf_counter() - begin, 1),
        "text": arguments.text.name,
        "score_rows": windows * WINDOW_ROWS,
        "cases": rows,
        "exits": exits,
        "ratios": found,
        "bars": bars(rows, found, exits, {name for name, manifest in full.items() if manifest.precision == "int4"}),
    }


def main() -> int:
    """Parse the command line, install or measure, print; 1 if a bar is missed or the input is bad."""
    parser = argparse.ArgumentParser(description="Our runtime compared with other engines; see the module's docstring.")
    parser.add_argument("bundles", nargs="*", type=Path, help="directories that `balcony-edge export demo` wrote")
    parser.add_argument("--install", action="store_true", help="make the missing environments and models of the peers")
    parser.add_argument("--text", type=Path, help="text for prompts and scored rows (WikiText-2 valid)")
    parser.add_argument(
        "--peers",
        type=_selected,
        default=dict.fromkeys(install.PEER_MODELS, True),
        help=f"peers, or names of the results' rows [default: {','.join(install.WORKERS)}]",
    )
    parser.add_argument(
        "--threads", type=int, default=best_threads(), help="threads of every engine [default: one for each fast core]"
    )
    parser.add_argument(
        "--contexts",
        type=_lengths,
        default=CONTEXTS,
        help="tokens of the prompts [default: 32,512]; more than 512 take long",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"starts of every engine [default: {ROUNDS}]")
    parser.add_argument("--huge-pages", action="store_true", help="use transparent huge pages for every engine's heap")
    parser.add_argument("--packed", type=Path, help="directory for packed weights; ours runs with packed weights")
    parser.add_argument("--plot", type=Path, help="write tokens a second over KL as a PNG (needs [plot])")
    parser.add_argument("--quick", action="store_true", help="one round: checks that it runs, not for figures")
    arguments = parser.parse_args()
    if arguments.bundles and arguments.text is None:
        parser.error("--text: measuring needs a text: give one, such as WikiText-2's wiki.valid.raw")
    if not arguments.bundles and not arguments.install:
        parser.error("give at least one bundle, or --install")
    try:
        if arguments.install:
            install.install(tuple(arguments.peers))
        if not arguments.bundles:
            return 0
        document = run(arguments)
    except BalconyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(show(document), file=sys.stderr)
    missed = print_bars(document["bars"])
    print(json.dumps(document, ensure_ascii=False))
    if arguments.plot is not None:
        from benchmarks.peer_workers.plot import plot  # noqa: PLC0415 - matplotlib is an extra

        plot(document, arguments.plot)
    return missed


if __name__ == "__main__":
    sys.exit(main())
