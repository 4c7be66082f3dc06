"""Batched decoding: tokens a second of 1, 4 and 8 replies at once, compared with llama.cpp's continuous batching.

    python -m benchmarks.serving.attainment --install      # llama.cpp's server and its Q4_0 model, once
    python -m benchmarks.serving.batched BUNDLE [--rounds 5]

Both write the same number of tokens after prompts of the same random ids, at full depth, greedy, without an end. Ours are
replies of ``llm.together()`` in this process; llama.cpp's are the replies of one server with eight slots to one request with
all prompts, timed by the server itself (``timings.predicted_ms``), so that neither HTTP nor prompts count. Every round runs
each case once, in both programs. A figure is the median over the rounds, a ratio that of the ratios within a round. Bar: not
below llama.cpp. The output ends with one JSON line; exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx

import balcony_edge
from balcony_edge.device.machine import best_threads, cpu_name
from balcony_edge.errors import BalconyError
from balcony_runtime.llm import LLM
from benchmarks.peer_workers import server
from benchmarks.rounds import Neighbours, bar, interleave, print_bars, ratio
from benchmarks.serving.attainment import started
from benchmarks.serving.streams import NEW_TOKENS, prompts, rate

COUNTS = (1, 4, 8)
PORT = 8199


def peer_rate(url: str, llm: LLM, count: int, seed: int) -> float:
    """Tokens a second of llama.cpp's server, prompts left out.

    One request has all prompts, so they run before the first step. In requests of their own, late prompts and the clients that
    send them would be timed as steps of the first replies.
    """
    asked = {"prompt": prompts(llm, count, seed), "n_predict": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    asked |= {"cache_prompt": False}
    answer = httpx.post(f"{url}/completion", json=asked, timeout=600).raise_for_status().json()
    replies = answer if isinstance(answer, list) else [answer]  # of one prompt it is the reply itself
    made_ms: float = median(reply["timings"]["predicted_ms"] for reply in replies)
    return count * (NEW_TOKENS - 1) / (made_ms / 1000)


def measure(llm: LLM, rounds: int) -> dict[str, Any]:
    command = server.command(server.Q4_0, PORT, best_threads(), max(COUNTS))
    url, seeds = f"http://127.0.0.1:{PORT}", iter(range(10**6))
    with started(command, url):
        cases = {}
        for count in COUNTS:
            cases[f"ours, {count}"] = partial(lambda n: rate(llm, n, "together", next(seeds)), count)
            cases[f"llama.cpp, {count}"] = partial(lambda n: peer_rate(url, llm, n, next(seeds)), count)
        found = interleave(cases, rounds)
    return {
        "tokens_a_second": {name: round(median(rates), 1) for name, rates in found.items()},
        "of_llama_cpp": {n: round(ratio(found[f"ours, {n}"], found[f"llama.cpp, {n}"]), 3) for n in COUNTS},
        "of_one_stream": {n: round(ratio(found[f"ours, {n}"], found["ours, 1"]), 3) for n in COUNTS},
        "of_one_stream_llama_cpp": {
            n: round(ratio(found[f"llama.cpp, {n}"], found["llama.cpp, 1"]), 3) for n in COUNTS
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    neighbours = Neighbours()
    try:
        server.refuse_missing(server.LLAMA_SERVER, server.Q4_0)
        with balcony_edge.load(arguments.bundle) as llm:
            found = measure(llm, arguments.rounds)
    except BalconyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bars = {
        f"{count} streams / llama.cpp's": bar(value, 1.0, at_least=True)
        for count, value in found["of_llama_cpp"].items()
    }
    missed = print_bars(bars)
    document = {"benchmark": "batched", "cpu": cpu_name(), "bundle": arguments.bundle.name, **found}
    print(json.dumps({**document, **neighbours.report(), "bars": bars}))
    return missed


if __name__ == "__main__":
    sys.exit(main())
