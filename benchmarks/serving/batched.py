"""Batched decoding: tokens a second of 1, 4 and 8 replies at once, compared with llama.cpp's continuous batching.

    python -m benchmarks.serving.attainment --install      # llama.cpp's server and its Q4_0 model, once
    python -m benchmarks.serving.batched BUNDLE [--rounds 5]

Both write the same number of tokens after prompts of the same random ids, at full depth, greedy, without an end. Ours are
replies of ``llm.together()`` in this process; llama.cpp's are the streams of one server with eight slots, timed by the server
itself (``timings.predicted_ms``), so that HTTP does not count. Every round runs each case once, in both programs. A figure is
the median over the rounds, a ratio that of the ratios within a round. Bar: not below llama.cpp. The output ends with one JSON
line; exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx

import balcony_edge
from balcony_edge.device.machine import best_threads, cpu_name
from balcony_runtime.llm import LLM
from benchmarks.peer_workers import server
from benchmarks.rounds import Neighbours, bar, interleave, print_bars, ratio
from benchmarks.serving.attainment import started
from benchmarks.serving.streams import NEW_TOKENS, prompts, rate

COUNTS = (1, 4, 8)
PORT = 8199


def peer_rate(url: str, llm: LLM, count: int, seed: int) -> float:
    """Tokens a second of llama.cpp's server, prompts left out."""

    def one(ids: list[int]) -> float:
        asked = {"prompt": ids, "n_predict": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = httpx.post(f"{url}/completion", json=asked, timeout=600).raise_for_status().json()
        made_ms: float = answer["timings"]["predicted_ms"]
        return made_ms / 1000

    with ThreadPoolExecutor(count) as threads:
        seconds = list(threads.map(one, prompts(llm, count, seed)))
    return count * (NEW_TOKENS - 1) / median(seconds)


def measure(llm: LLM, rounds: int) -> dict[str, Any]:
    command = [server.LLAMA_SERVER, "--model", server.Q4_0, "--port", PORT, "--threads", best_threads()]
    command += ["--parallel", max(COUNTS), "--ctx-size", 1024 * max(COUNTS), "--no-webui", "--no-cache-prompt"]
    url, seeds = f"http://127.0.0.1:{PORT}", iter(range(10**6))
    with started([str(word) for word in command], url):
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
    server.refuse_missing()
    neighbours = Neighbours()
    with balcony_edge.load(arguments.bundle) as llm:
        found = measure(llm, arguments.rounds)
    bars = {
        f"{count} streams / llama.cpp's": bar(value, 1.0, at_least=True)
        for count, value in found["of_llama_cpp"].items()
    }
    missed = print_bars(bars)
    document = {"benchmark": "batched", "cpu": cpu_name(), "bundle": arguments.bundle.name, **found}
    print(json.dumps(document | {"neighbours": neighbours.report(), "bars": bars}))
    return missed


if __name__ == "__main__":
    sys.exit(main())
