"""Requests with targets at rising load: our server compared with llama.cpp's.

    python -m benchmarks.serving.attainment --install                      # llama.cpp's server and the load generator, once
    python -m benchmarks.serving.attainment BUNDLE --text wiki.valid.raw   # about 30 minutes; --plot FILE.png for the picture

Two classes of requests arrive at random, as users do (Poisson): *voice* (first token within 500 ms, then 40 ms a token) and
*background* (the whole reply within 30 s). The load is given as a multiple of what one model at full depth can do alone, one
request after another, which is measured first. Every load is offered to every server in turn, with the same prompts at the
same rate. A request *attains* its target if the reply is complete and in time; a refused one does not. Servers may not know of
targets (llama.cpp's does not); ours gets them as each request's ``budget``. No server starts
a prompt from rows of an earlier one.

At low load our server must give what the full depth gives. So the first replies of each load are compared, afterwards, with
those of a fresh server at a fixed full depth to the same prompts, one after another. In int4 a pass of several replies' rows
rounds differently from a pass of one row, and one near tie changes the rest of a greedy text. So the bar is on the replies that
were alone from their first to their last moment; ``same_text`` is about all.

NVIDIA's AIPerf generates the load and records when each piece of each reply arrived. All judging is done here, on its records,
and is the same for all servers. All programs share the machine's cores; ``generator_cpu_s`` is what the generator took of them.

The last line on stdout is one JSON object; the table goes to stderr. Exit code 1 if a bar is missed. Its fields:

    benchmark, cpu, threads, bundle, text, seconds, others_cpu_share, load_1m
    capacity          requests a second of our server at a fixed full depth, one after another
    generator_cpu_s   CPU seconds of the load generator, its many starts included
    points[]          server; load; requests; attained: share of the requests; voice, background: the same of a class; errors
                      goodput: attained requests a second; quality_goodput: tokens a second of attained requests, each counted
                      with the agreement of its exit with the full depth (1 for llama.cpp)
                      ttft_p95_ms, tpot_p95_ms: of complete voice replies; mean_depth: in layers, of our replies' tokens
                      same_text: share of our first COMPARED complete replies whose text is that of the full depth without load;
                      alone: how many of them ran while no other did; same_alone: the same share of those
    bars              name → value, limit, holds
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import httpx
from matplotlib.figure import Figure

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.device.machine import best_threads, cpu_name
from balcony_edge.errors import BalconyError, InputError
from benchmarks.peer_workers import server
from benchmarks.rounds import Neighbours, aligned, bar, p95, print_bars

LOADS = (0.25, 0.5, 1.0, 2.0, 3.0)
#: Marker and colour of each server's line: one without the other would not tell them apart in print.
LOOKS = tuple({"marker": mark, "color": name} for mark, name in (("o", "#1f77b4"), ("s", "#b35900"), ("D", "#1b7337")))
#: Slots of llama.cpp's server: replies that it writes at once; further requests wait.
SLOTS = (1, 4)
#: Seconds during which requests of a load arrive by default, and seconds after which a request is given up.
ARRIVAL_S, GIVE_UP_S = 60.0, 60.0
#: Requests before each measurement: a server that was idle has lost its caches, and maybe pages of its weights.
WARM_REQUESTS = 3
#: Requests that measure the capacity, least number of requests at a load, and most replies of a load whose texts are compared.
CAPACITY_REQUESTS, LEAST_REQUESTS, COMPARED = 12, 12, 12
TTFT_MS, TPOT_MS, DEADLINE_S = 500.0, 40.0, 30.0


class Kind(NamedTuple):
    """A class of requests: its share, words of a prompt, tokens of a reply, and budget."""

    share: float
    words: int
    tokens: int
    budget: dict[str, float]


KINDS = {
    "voice": Kind(0.7, 40, 48, {"ttft_ms": TTFT_MS, "tpot_ms": TPOT_MS}),
    "background": Kind(0.3, 250, 150, {"deadline_s": DEADLINE_S}),
}


class Answer(NamedTuple):
    """One reply as its client saw it.

    Attributes:
        kind: class of the request.
        text: the reply; None if the request failed.
        ttft_s: time to the first piece of text.
        tpot_s: mean time of a token after the first one.
        took_s: time to the last piece.
        exits: exit → number of tokens, of our server.
        number: place of the request among those of its load.
        began_s: time at which it was sent, by the generator's clock.
    """

    kind: str
    text: str | None
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    took_s: float = 0.0
    exits: Mapping[int, int] = {}
    number: int = 0
    began_s: float = 0.0

    @property
    def attained(self) -> bool:
        """Whether the reply is complete and in time."""
        if self.text is None:
            return False
        if self.kind == "voice":
            return self.ttft_s <= TTFT_MS / 1000 and self.tpot_s <= TPOT_MS / 1000
        return self.took_s <= DEADLINE_S


def requests(words: Sequence[str], count: int, seed: int, model: str) -> list[tuple[str, dict[str, Any]]]:
    """Random requests, each with its class; every prompt is another place of the text.

    Raises:
        InputError: the text is too short.
    """
    chance = random.Random(seed)
    longest = max(kind.words for kind in KINDS.values())
    if len(words) < 4 * longest:
        raise InputError(f"the text has {len(words)} words: must be at least {4 * longest}: give a longer file")
    found = []
    for _ in range(count):
        (name,) = chance.choices(list(KINDS), [kind.share for kind in KINDS.values()])
        kind = KINDS[name]
        start = chance.randrange(len(words) - kind.words)
        prompt = "Continue this text:\n" + " ".join(words[start : start + kind.words])
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": kind.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "budget": kind.budget,
        }
        found.append((name, body))
    return found


def offer(
    url: str, asked: Sequence[tuple[str, dict[str, Any]]], per_second: float | None, tokenizer: Path
) -> list[Answer]:
    """Send requests at random times (None: one after another), and wait until each has ended or is given up.

    The generator takes :data:`WARM_REQUESTS` of them to warm the server, and as many fewer answers come back. So no prompt
    comes twice, and no server has rows of one that counts.
    """
    with tempfile.TemporaryDirectory() as directory:
        bodies, out = Path(directory, "requests.jsonl"), Path(directory, "out")
        bodies.write_text("".join(json.dumps(body) + "\n" for _, body in asked), encoding="utf-8")
        rate = ["--concurrency", "1"]
        if per_second is not None:
            rate = ["--request-rate", f"{per_second:.4f}", "--arrival-pattern", "poisson"]
        server.run(
            [
                *(
                    server.AIPERF,
                    "profile",
                    "--model-names",
                    "any",
                    "--url",
                    url,
                    "--endpoint-type",
                    "chat",
                    "--streaming",
                ),
                *("--custom-dataset-type", "raw-payload", "--input-file", bodies),
                *(
                    "--dataset-sampling-strategy",
                    "sequential",
                    "--request-count",
                    str(len(asked) - WARM_REQUESTS),
                    *rate,
                ),
                *("--warmup-request-count", str(WARM_REQUESTS), "--warmup-concurrency", "1"),
                *("--random-seed", "7", "--request-timeout-seconds", f"{GIVE_UP_S:g}", "--tokenizer", tokenizer),
                *("--output-artifact-dir", out, "--export-level", "raw", "--ui", "none"),
                *("--no-gpu-telemetry", "--no-server-metrics"),
            ]
        )
        lines = (out / "profile_export_raw.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [_answer(asked, record) for record in records if record["metadata"]["benchmark_phase"] == "profiling"]


def _answer(asked: Sequence[tuple[str, dict[str, Any]]], record: dict[str, Any]) -> Answer:
    number = int(record["metadata"]["conversation_id"].rsplit("_", 1)[1]) % len(asked)
    name, body = asked[number]
    begin_ns = record["start_perf_ns"]
    pieces: list[tuple[int, str]] = []
    exits: dict[int, int] = {}
    done = broken = False
    for response in record.get("responses") or ():
        for packet in response.get("packets", ()):
            value = packet["value"]
            if value == "[DONE]":
                done = True
            elif packet["name"] == "data":
                document = json.loads(value)
                broken |= "error" in document  # ours sends [DONE] after it
                exits |= {int(key): n for key, n in document.get("balcony", {}).get("tokens_per_exit", {}).items()}
                if text := "".join(one["delta"].get("content") or "" for one in document.get("choices", ())):
                    pieces.append((response["perf_ns"], text))
    if broken or not (done and pieces and record.get("status") == 200):
        why = (
            f"status {record.get('status')}, {len(pieces)} pieces, {'' if done else 'not '}done, {record.get('error')}"
        )
        print(f"a {name} request failed: {why}", file=sys.stderr)
        return Answer(name, None, number=number, began_s=begin_ns / 1e9)
    first_ns, last_ns = pieces[0][0], pieces[-1][0]
    return Answer(
        name,
        "".join(text for _, text in pieces),
        ttft_s=(first_ns - begin_ns) / 1e9,
        tpot_s=(last_ns - first_ns) / 1e9 / (body["max_tokens"] - 1),
        took_s=(last_ns - begin_ns) / 1e9,
        exits=exits,
        number=number,
        began_s=begin_ns / 1e9,
    )


def judged(answers: Sequence[Answer], seconds: float, quality: Mapping[int, float]) -> dict[str, Any]:
    """Figures of one server at one load."""

    def share(kind: str | None) -> float:
        of = [answer.attained for answer in answers if kind in (None, answer.kind)]
        return round(mean(of), 6) if of else 1.0  # 113 of 119 are below 0.95, and bars are compared with this

    def worth(answer: Answer) -> float:
        if not answer.exits:
            return float(KINDS[answer.kind].tokens)
        return sum(count * quality[layer] for layer, count in answer.exits.items())

    voice = [answer for answer in answers if answer.kind == "voice" and answer.text is not None]
    at_exits = [(layer, count) for answer in answers for layer, count in answer.exits.items()]
    tokens = sum(count for _, count in at_exits)
    return {
        "requests": len(answers),
        "attained": share(None),
        "voice": share("voice"),
        "background": share("background"),
        "errors": sum(answer.text is None for answer in answers),
        "goodput": round(sum(answer.attained for answer in answers) / seconds, 3),
        "quality_goodput": round(sum(worth(answer) for answer in answers if answer.attained) / seconds, 1),
        "ttft_p95_ms": round(1000 * p95([answer.ttft_s for answer in voice])) if voice else None,
        "tpot_p95_ms": round(1000 * p95([answer.tpot_s for answer in voice]), 1) if voice else None,
        "mean_depth": round(sum(layer * count for layer, count in at_exits) / tokens, 3) if tokens else None,
        "same_text": None,
        "alone": None,
        "same_alone": None,
    }


def picked(answers: Sequence[Answer]) -> list[Answer]:
    """The complete replies of a load whose texts are compared."""
    return sorted((one for one in answers if one.text is not None), key=lambda one: one.number)[:COMPARED]


def compared(answers: Sequence[Answer], texts: Mapping[int, str]) -> dict[str, Any]:
    """Figures of the texts of one load; ``texts``: number of a request → its reply at the full depth without load."""

    def is_alone(one: Answer) -> bool:
        def meets(other: Answer) -> bool:
            # a reply that failed may have taken any time
            end_s = other.began_s + (GIVE_UP_S if other.text is None else other.took_s)
            return other.began_s < one.began_s + one.took_s and one.began_s < end_s

        return not any(meets(other) for other in answers if other is not one)

    def share(of: Sequence[Answer]) -> float | None:
        return round(mean(one.text == texts[one.number] for one in of), 3) if of else None

    alone = [one for one in picked(answers) if is_alone(one)]
    return {"same_text": share(picked(answers)), "alone": len(alone), "same_alone": share(alone)}


def full_depth_text(url: str, body: Mapping[str, Any], model: str) -> str:
    """A request's whole reply under another name of the model and without a budget."""
    asked = {**body, "model": model, "stream": False}
    del asked["budget"]
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=GIVE_UP_S)
    return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])


@contextmanager
def started(command: Sequence[str | Path], url: str) -> Iterator[str]:
    """A server in a process of its own, from the time it answers."""
    with contextlib.suppress(httpx.TransportError):
        httpx.get(f"{url}/health", timeout=5)
        raise InputError(f"{url}: something answers there already: end it first")
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            for _ in range(600):
                if process.poll() is not None:
                    log.seek(0)
                    tail = log.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise InputError(f"{command[0]} ended before it answered ({' '.join(tail)}): see its options")
                try:
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            else:
                raise InputError(f"{command[0]} did not answer at {url} in time: see its options")
            yield url
        finally:
            process.terminate()


def measure(bundle: Bundle, text: Path, loads: Sequence[float], arrival_s: float, folder: Path) -> dict[str, Any]:
    """Offer every load to every server."""
    manifest, threads = bundle.manifest, best_threads()
    words = text.read_text(encoding="utf-8").split()
    quality = {layer: value for layer, value in manifest.agreement.items() if value is not None}
    quality[manifest.exit_layers[-1]] = 1.0
    if len(quality) < len(manifest.exit_layers):
        raise InputError(f"{bundle.path}: its exits were not evaluated: run `balcony-edge eval BUNDLE --text TEXT`")
    name = manifest.model.name
    tokenizer = server.tokenizer(bundle, folder)
    ours: list[str | Path] = [
        Path(sys.executable).with_name("balcony-edge"),
        "serve",
        bundle.path,
        "--threads",
        str(threads),
    ]
    commands: dict[str, list[str | Path]] = {"balcony-edge": [*ours, "--port", "{port}"]}
    for slots in SLOTS:
        peer = f"llama.cpp, {slots} slot{'s' if slots > 1 else ''}"
        commands[peer] = [*server.command(server.Q4_0, "{port}", threads, slots)]
    full = f"{name}:exit-{manifest.exit_layers[-1]}"
    points: list[dict[str, Any]] = []
    ours_at: list[tuple[dict[str, Any], list[Answer], list[tuple[str, dict[str, Any]]]]] = []
    with ExitStack() as stack:
        urls = {}
        for port, (title, command) in enumerate(commands.items(), 8191):
            filled = [str(word).format(port=port) for word in command]
            urls[title] = stack.enter_context(started(filled, f"http://127.0.0.1:{port}"))
        first = requests(words, CAPACITY_REQUESTS + WARM_REQUESTS, 1, full)
        for _, body in first:
            body.pop("budget")
        alone = offer(urls["balcony-edge"], first, None, tokenizer)
        if failed := sum(answer.text is None for answer in alone):
            raise InputError(f"{failed} of {len(alone)} requests without load failed: see what the server logs")
        capacity = len(alone) / sum(answer.took_s for answer in alone)
        for load in loads:
            rate = load * capacity
            count = max(round(rate * arrival_s), LEAST_REQUESTS)
            asked = requests(words, count + WARM_REQUESTS, round(1000 * load), name)
            for title, url in urls.items():
                answers = offer(url, asked, rate, tokenizer)
                points.append({"server": title, "load": load, **judged(answers, count / rate, quality)})
                print(json.dumps(points[-1]), file=sys.stderr)
                if title == "balcony-edge":
                    ours_at.append((points[-1], answers, asked))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)  # the servers count only after their end
    with started([*ours, "--port", "8190"], "http://127.0.0.1:8190") as url:
        for point, answers, asked in ours_at:
            texts = {one.number: full_depth_text(url, asked[one.number][1], full) for one in picked(answers)}
            point.update(compared(answers, texts))
    return {
        "capacity": round(capacity, 3),
        "generator_cpu_s": round(used.ru_utime + used.ru_stime),
        "points": points,
    }


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw attainment and quality-weighted goodput over the load."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    servers = dict.fromkeys(point["server"] for point in document["points"])
    for title, look in zip(servers, LOOKS, strict=False):
        points = [point for point in document["points"] if point["server"] == title]
        loads = [point["load"] for point in points]
        left.plot(loads, [100 * point["attained"] for point in points], **look, label=title)
        right.plot(loads, [point["quality_goodput"] for point in points], **look, label=title)
    left.set_ylabel("requests answered in time, %")
    right.set_ylabel("tokens in time a second × agreement")
    for axes in (left, right):
        axes.set_xlabel("load, compared with one model at full depth")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(f"{document['bundle']}, {document['threads']} threads, {document['cpu']}", fontsize=10)
    figure.savefig(path, dpi=120)


def bars(points: Sequence[Mapping[str, Any]], layers: int) -> dict[str, Any]:
    """The figures that were fixed before; ``layers``: of the full depth."""
    ours = {point["load"]: point for point in points if point["server"] == "balcony-edge"}
    peers = [point for point in points if point["server"] != "balcony-edge"]
    best = {load: max(point["attained"] for point in peers if point["load"] == load) for load in ours}
    lowest = ours[min(ours)]
    held = {"mean depth at the lowest load / full depth": bar(lowest["mean_depth"] / layers, 0.98, at_least=True)}
    if lowest["same_alone"] is not None:
        held["same text as without load, replies alone at the lowest load"] = bar(
            lowest["same_alone"], 1.0, at_least=True
        )
    if below := [load for load, attained in best.items() if attained < 0.5]:
        held[f"attained at {min(below):g} times the capacity, where llama.cpp falls below 0.5"] = bar(
            ours[min(below)]["attained"], 0.95, at_least=True
        )
    return held


def _loads(given: str) -> tuple[float, ...]:
    return tuple(map(float, given.split(",")))


def main() -> int:
    """Parse the command line, run, print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Requests with targets at rising load.")
    parser.add_argument("bundle", type=Path, nargs="?", help="int4 bundle of the demo's model")
    parser.add_argument("--text", type=Path, help="plain text that prompts are taken from")
    parser.add_argument(
        "--install", action="store_true", help="make what is missing: llama.cpp's server, AIPerf, the Q4_0 model"
    )
    parser.add_argument("--plot", type=Path, help="picture to write (PNG)")
    parser.add_argument("--loads", type=_loads, default=LOADS, help="multiples of the capacity, separated by commas")
    parser.add_argument(
        "--seconds", type=float, default=ARRIVAL_S, help="time over which the requests of a load arrive"
    )
    arguments = parser.parse_args()
    if arguments.bundle is None and not arguments.install:
        parser.error("give a bundle, or --install")
    try:
        if arguments.install:
            server.install()
        if arguments.bundle is None:
            return 0
        if arguments.text is None or not arguments.text.is_file():
            raise InputError(f"--text {arguments.text}: is not a file: give a plain text that prompts are taken from")
        server.refuse_missing(server.LLAMA_SERVER, server.AIPERF, server.Q4_0)
        bundle = Bundle.open(arguments.bundle)
        neighbours, begin = Neighbours(), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(bundle, arguments.text, arguments.loads, arguments.seconds, Path(folder))
    except BalconyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {
        "benchmark": "attainment",
        "cpu": cpu_name(),
        "threads": best_threads(),
        "bundle": f"{bundle.manifest.model.name}, {bundle.manifest.precision}",
        "text": arguments.text.name,
        "seconds": round(time.monotonic() - begin),
        **neighbours.report(),
        **measured,
    }
    found["bars"] = bars(found["points"], bundle.manifest.exit_layers[-1])
    columns = list(found["points"][0])
    for line in aligned([columns, *([point[key] for key in columns] for point in found["points"])]):
        print(line, file=sys.stderr)
    missed = print_bars(found["bars"])
    print(json.dumps(found, ensure_ascii=False))
    if arguments.plot is not None:  # last: a picture that cannot be written costs no figures
        plot(found, arguments.plot)
    return missed


if __name__ == "__main__":
    sys.exit(main())
