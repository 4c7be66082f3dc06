"""What a restored conversation saves: the time to its next token, compared with reading the conversation again.

    python -m benchmarks.serving.sessions BUNDLE --text wiki.valid.raw [--tokens 4000] [--rounds 3]

A conversation whose first message is a text of that many tokens is answered, saved, and loaded. In every round the first token
of the next turn is timed three ways: in a fresh sequence that reads everything, after :meth:`Chat.load`, and after loading the
file with keys and values in 8 bits. Files are in the page cache. Bars: the restored one takes at most 5 % of the fresh one, and
its logits equal those of the conversation that was saved: to the bit where nothing is rounded (8 bits are only reported). The
output ends with one JSON line; exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import balcony_edge
from balcony_edge import Chat
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Token
from benchmarks.rounds import interleave, ratio

MOST_SHARE = 0.05
NEXT = "And what happened after that?"


def first_token(chat: Chat) -> Token:
    """The first token of the next turn, at full depth, with log-probabilities."""
    with chat.send(NEXT, max_new_tokens=1, ignore_eos=True, logprobs=8) as stream:
        return next(stream)


def measure(llm: LLM, text: str, folder: Path, rounds: int) -> dict[str, Any]:
    chat = llm.chat(system="Answer in one sentence.")
    for _ in chat.send(text, max_new_tokens=16, ignore_eos=True):
        pass
    whole, small = folder / "whole.session", folder / "small.session"
    saves, sizes = [], []
    for path, int8 in ((whole, False), (small, True)):
        begin = time.perf_counter()
        sizes.append(chat.save(path, int8=int8))
        saves.append(time.perf_counter() - begin)
    messages = list(chat.messages)

    def fresh() -> Chat:
        again = llm.chat()
        again.messages = list(messages)
        return again

    cases: dict[str, Callable[[], Chat]] = {
        "fresh": fresh,
        "restored": partial(Chat.load, llm, whole),
        "restored, 8 bits": partial(Chat.load, llm, small),
    }
    found: dict[str, Token] = {}

    def timed(name: str) -> float:
        begin = time.perf_counter()
        found[name] = first_token(cases[name]())
        return time.perf_counter() - begin

    seconds = interleave({name: partial(timed, name) for name in cases}, rounds)
    live, rows = first_token(chat), chat.sequence.length
    likeliest, logprob = live.top_logprobs[0]
    best = {name: dict(token.top_logprobs) for name, token in found.items()}
    return {
        "rows": rows,
        "fresh_s": round(statistics.median(seconds["fresh"]), 3),
        "restored_s": round(statistics.median(seconds["restored"]), 3),
        "restored_8_bits_s": round(statistics.median(seconds["restored, 8 bits"]), 3),
        "share": round(ratio(seconds["restored"], seconds["fresh"]), 4),
        "equal_to_the_bit": dict(live.top_logprobs) == best["restored"],
        "difference_8_bits": round(abs(best["restored, 8 bits"].get(likeliest, math.inf) - logprob), 4),
        "file_mb": [round(size / 1e6, 1) for size in sizes],
        "save_s": [round(took, 3) for took in saves],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="text of the conversation")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of the first message")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with balcony_edge.load(arguments.bundle) as llm, tempfile.TemporaryDirectory() as folder:
        ids = llm.encode(arguments.text.read_text(encoding="utf-8")[: 12 * arguments.tokens], chat=False)
        found = measure(llm, llm.decode(ids[: arguments.tokens]), Path(folder), arguments.rounds)
    for name, value in found.items():
        print(f"{name:>20}  {value}", file=sys.stderr)
    held = found["share"] <= MOST_SHARE and found["equal_to_the_bit"]
    print(json.dumps({"benchmark": "sessions", **found, "bar_share": MOST_SHARE, "held": held}))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
