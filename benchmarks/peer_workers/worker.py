"""The protocol of the workers over stdin and stdout, and the comparison of their distributions.

A worker is one process with one engine and one model. It imports its engine, then reads one JSON object per line and
answers each with one. It ends when its input ends. Everything that an engine prints goes to stderr. Every answer holds
``idle_s``, the time since the last answer, and ``idle_cpu_s``, the CPU time that a spinning pool used meanwhile. The
requests, and the other keys of their answers:

    {"do": "load", "model": PATH, "threads": N, "options": {"max_length": N, ...}}
                                                                      load_s, config, version
    {"do": "generate", "variant": V, "prompt": [...], "steps": N}     prefill_ms, step_ms (N of them), tokens
    {"do": "memory"}                                                  peak_rss_mb, private_mb, added_mb
    {"do": "score", "variant": V, "windows": [[...]], "first": N, "reference": PATH, "write": BOOL}
                                                                      kl (of each window), agreement

``variant`` selects one of several ways to run a loaded model: an exit of ours, null for the peers. Tokens are ids, so that
tokenizers make no difference. This module imports numpy and the standard library only, because it runs in every
environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class Timing(NamedTuple):
    """Times of one greedy reply: the prefill with the first token, and the steps of the later tokens."""

    prefill_ms: float
    step_ms: list[float]
    tokens: list[int]


class Peer(ABC):
    """One engine with one model loaded.

    Attributes:
        version: version of the engine.
        config: settings that the figures depend on.
    """

    version: str
    config: dict[str, Any]

    @abstractmethod
    def generate(self, prompt: list[int], steps: int, variant: int | None) -> Timing:
        """Run a new sequence: prefill, then ``steps`` greedy steps; an end token does not end it."""

    @abstractmethod
    def rows(self, tokens: list[int], first: int, variant: int | None) -> Iterator[FloatArray]:
        """Logits (V,) after ``tokens[:first]`` and after each later token, taken by decode steps as in a reply."""


class Stepper(Peer):
    """A peer whose engine returns logits; all of them share the decode loop."""

    @abstractmethod
    def begin(self, variant: int | None) -> None:
        """Start a sequence: end the last one and make room for caches. No engine is timed here."""

    @abstractmethod
    def prefill(self, tokens: list[int]) -> FloatArray:
        """Take in a prompt; returns the logits of its last token, (V,)."""

    @abstractmethod
    def step(self, token: int) -> FloatArray:
        """Append a token; returns its logits, (V,), valid until the next call."""

    def generate(self, prompt: list[int], steps: int, variant: int | None) -> Timing:
        """See :class:`Peer`."""
        self.begin(variant)
        clock = [time.perf_counter_ns()]
        tokens = [int(self.prefill(prompt).argmax())]
        clock.append(time.perf_counter_ns())
        for _ in range(steps):
            tokens.append(int(self.step(tokens[-1]).argmax()))
            clock.append(time.perf_counter_ns())
        return timing(clock, tokens)

    def rows(self, tokens: list[int], first: int, variant: int | None) -> Iterator[FloatArray]:
        """See :class:`Peer`."""
        self.begin(variant)
        yield self.prefill(tokens[:first])
        for token in tokens[first:]:
            yield self.step(token)


def timing(clock_ns: list[int], tokens: list[int]) -> Timing:
    """Compute the times of a reply from the instants of its start and of each token."""
    prefill_ms, *step_ms = (round((after - before) / 1e6, 4) for before, after in pairwise(clock_ns))
    return Timing(prefill_ms, step_ms, tokens)


def log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Log-probabilities of one row, (V,)."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def score(
    peer: Peer, windows: list[list[int]], first: int, variant: int | None, reference: Path, *, write: bool
) -> dict[str, Any]:
    """Mean KL(reference ‖ peer) in nats of each window, and the share of all rows with the same best token.

    Args:
        peer: peer whose rows are scored.
        windows: token windows; each gives a row after ``first`` tokens and one after each later token.
        first: number of tokens of a window that are prefilled.
        variant: exit of our runtime; None for the peers.
        reference: file of the reference's log-probabilities, float32 (rows, V).
        write: whether to write that file instead, because the peer is the reference.
    """
    if write:
        with reference.open("wb") as file:
            for window in windows:
                for logits in peer.rows(window, first, variant):
                    file.write(log_softmax(logits).astype(np.float32).tobytes())
        return {"kl": [0.0] * len(windows), "agreement": 1.0}
    counts = [len(window) - first + 1 for window in windows]
    log_p = iter(np.memmap(reference, np.float32, mode="r").reshape(sum(counts), -1))
    kl, agreed = [], 0
    for window, count in zip(windows, counts, strict=True):
        divergence = 0.0
        for logits in peer.rows(window, first, variant):
            p, log_q = next(log_p).astype(np.float64), log_softmax(logits)
            divergence += float(np.sum(np.exp(p) * (p - log_q)))
            agreed += int(p.argmax() == log_q.argmax())
        kl.append(divergence / count)
    return {"kl": kl, "agreement": agreed / sum(counts)}


def memory_mb() -> dict[str, float]:
    """Memory of this process in MB of 1,000,000 bytes, on Linux.

    ``rss`` is VmRSS and ``peak_rss`` VmHWM. ``pss`` counts a page that n processes map as 1/n of one, ``private`` the pages of
    this process alone, mapped files included. ``dirty`` counts the private pages without a file, which a second process with
    the same model needs again.
    """
    values = {}
    for path in ("/proc/self/status", "/proc/self/smaps_rollup"):
        for line in Path(path).read_text(encoding="ascii").splitlines():
            words = line.split()
            if len(words) == 3 and words[2] == "kB":
                values[words[0].rstrip(":")] = int(words[1]) * 1024 / 1e6
    return {
        "rss": values["VmRSS"],
        "peak_rss": values["VmHWM"],
        "pss": values["Pss"],
        "private": values["Private_Clean"] + values["Private_Dirty"],
        "dirty": values["Private_Dirty"],
    }


def serve(load: Callable[[Path, int, dict[str, Any]], Peer]) -> None:
    """Answer requests until the input ends. ``load(model, threads, options)`` makes the peer."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # keeps the output of engines apart from the answers
        bare = memory_mb()
        peer: Peer | None = None
        at, cpu = time.perf_counter(), time.process_time()
        for line in sys.stdin:
            idle = {"idle_s": time.perf_counter() - at, "idle_cpu_s": time.process_time() - cpu}
            request = json.loads(line)
            if request["do"] == "load":
                begin = time.perf_counter()
                peer = load(Path(request["model"]), request["threads"], request["options"])
                answer = {"load_s": time.perf_counter() - begin, "config": peer.config, "version": peer.version}
            elif request["do"] == "memory":
                now = memory_mb()
                answer = {
                    "peak_rss_mb": now["peak_rss"],
                    "private_mb": now["private"],
                    "added_mb": now["dirty"] - bare["dirty"],
                }
            elif peer is None:
                raise SystemExit("no model is loaded: send a load request first")
            elif request["do"] == "generate":
                answer = peer.generate(request["prompt"], request["steps"], request["variant"])._asdict()
            else:
                answer = score(
                    peer,
                    request["windows"],
                    request["first"],
                    request["variant"],
                    Path(request["reference"]),
                    write=request["write"],
                )
            print(json.dumps(answer | idle), file=answers, flush=True)
            at, cpu = time.perf_counter(), time.process_time()
