"""What HTTP costs: tokens a second of 1 and 8 streams of the server, compared with ``llm.stream`` in this process.

    python -m benchmarks.serving.server_overhead BUNDLE [--tokens 128] [--rounds 5]

The server runs in this process, and all its clients in one other. Each round has both ways, every other one in the other
order, on two copies of the loaded bundle; the ratio of a round is HTTP's rate over that of ``llm.stream`` in threads, and
the figure is the median of the rounds. Greedy, at full depth, without a target. Bars: at least 0.97 with one stream and
0.92 with eight. The output ends with one JSON line; exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import balcony_edge
from balcony_runtime.llm import LLM
from benchmarks.serving.server_abuse import FAILED, server_of

PROMPT = "The history of the city begins with a river, and with the people who crossed it."
#: Streams at once → least rate, compared with that in process.
BARS = {1: 0.97, 8: 0.92}


def together(count: int, work: Callable[[], None]) -> float:
    """Seconds that some threads take to do the same work. A failure in one of them is raised here: it has no time."""
    with ThreadPoolExecutor(count) as threads:
        begin = time.perf_counter()
        for done in [threads.submit(work) for _ in range(count)]:
            done.result()
        return time.perf_counter() - begin


def in_process(llm: LLM, count: int, tokens: int) -> float:
    """Tokens a second of ``llm.stream``."""

    def one() -> None:
        made = sum(1 for _ in llm.stream(PROMPT, chat=False, max_new_tokens=tokens, ignore_eos=True))
        assert made == tokens

    return count * tokens / together(count, one)


def http_rate(pipe: Connection, count: int, tokens: int) -> float:
    """Tokens a second of the other process's streams; exits with a message if one of them failed."""
    pipe.send((count, tokens))
    found = pipe.recv()
    if isinstance(found, str):
        raise SystemExit(f"a stream over HTTP failed: {found}")
    return float(found)


def clients(port: int, pipe: Connection) -> None:
    """Process of the clients: for every (streams, tokens) that the pipe gives, returns tokens a second, or what failed."""
    while (asked := pipe.recv()) is not None:
        count, tokens = asked
        body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        try:
            pipe.send(count * tokens / together(count, lambda body=body: _read(port, body)))  # type: ignore[misc]
        except (AssertionError, OSError, http.client.HTTPException) as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _read(port: int, body: dict[str, Any]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    last = b""
    for line in connection.getresponse():
        assert not line.startswith(FAILED), f"it ended with {line!r}"
        last = line if line.strip() else last
    assert last.startswith(b"data: [DONE]"), f"it ended with {last!r}"
    connection.close()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Streams over HTTP, compared with streams in process.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    server, thread = server_of(options.bundle)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=clients, args=(int(server.url.rpartition(":")[2]), there))
    process.start()
    rates: dict[int, list[tuple[float, float]]] = {count: [] for count in BARS}
    try:
        with balcony_edge.load(options.bundle) as llm:
            for number in range(options.rounds + 1):  # the first one is not counted
                for count, found in rates.items():
                    over_http = http_rate(here, count, options.tokens) if number % 2 else None
                    own = in_process(llm, count, options.tokens)
                    over_http = over_http or http_rate(here, count, options.tokens)
                    if number:
                        found.append((own, over_http))
                        print(f"{count} streams: {own:.1f} tokens/s, over HTTP {over_http:.1f}", file=sys.stderr)
    finally:
        here.send(None)
        process.join()
        server.stop()
        thread.join()
    ratios = {count: round(statistics.median(b / a for a, b in found), 4) for count, found in rates.items()}
    passed = {count: ratios[count] >= bar for count, bar in BARS.items()}
    document = {
        "benchmark": "server_overhead",
        "bundle": options.bundle.name,
        "tokens": options.tokens,
        "tokens_per_s": {count: [[round(a, 2), round(b, 2)] for a, b in found] for count, found in rates.items()},
        "ratios": ratios,
        "bars": BARS,
        "passed": passed,
    }
    print(json.dumps(document))
    sys.exit(0 if all(passed.values()) else 1)


if __name__ == "__main__":
    main()
