"""Decode speed at every exit, and the chain of stages compared with one whole-depth graph.

Owns items (a) and (b) of :mod:`benchmarks.engine.main_job`; both are measured in the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from balcony_edge.bundle.bundle import Bundle
from balcony_runtime.backends.base import FloatArray
from balcony_runtime.engine import Engine
from benchmarks.engine.whole_graph import WholeGraph
from benchmarks.rounds import interleave, ratio

#: Rows in the KV cache when a block of steps starts: a short chat and a long one.
CONTEXTS = (64, 512)
#: Steps of a block. The first two bring this case's weights into the caches; the median of the others counts.
WARM_STEPS, STEPS = 2, 8
#: Token of every step; the cost does not depend on it. A step includes the argmax, as in greedy decoding.
TOKEN = 17
#: Largest difference between the logits of chain and whole graph, as a share of the largest logit.
TOLERANCE = 1e-4


class Step(NamedTuple):
    """Median decode step of a block: wall time, and the part inside ONNX Runtime."""

    wall_ms: float
    ort_ms: float


def prompt(length: int) -> list[int]:
    """Fixed tokens; the cost does not depend on their values."""
    return [100 + 7 * i % 1000 for i in range(length)]


def measure(engine: Engine, bundle: Bundle, session: ort.InferenceSession, rounds: int) -> dict[str, Any]:
    """Measure items ``decode`` and ``chain`` of the JSON line."""
    layers = engine.exit_layers
    full = layers[-1]
    cases: dict[tuple[int, int], Callable[[], Step]] = {}
    differences = {}
    for context in CONTEXTS:
        for exit_layer in layers:
            cases[exit_layer, context] = block(engine, exit_layer, context)
        whole = WholeGraph(bundle, session, prompt(context))
        differences[context] = _difference(engine, whole, context)
        cases[0, context] = partial(_typical, partial(whole.step, TOKEN), partial(getattr, whole, "ort_ns"))
    samples = interleave(cases, rounds)
    wall = {key: [step.wall_ms for step in steps] for key, steps in samples.items()}
    inside = {key: [step.ort_ms for step in steps] for key, steps in samples.items()}
    decode, chain = [], []
    for context in CONTEXTS:
        for exit_layer in layers:
            speedup = ratio(wall[full, context], wall[exit_layer, context])
            predicted = bundle.manifest.bytes_per_token(full) / bundle.manifest.bytes_per_token(exit_layer)
            decode.append(
                {
                    "exit_layer": exit_layer,
                    "context": context,
                    "ms": round(median(wall[exit_layer, context]), 3),
                    "speedup": round(speedup, 3),
                    "predicted": round(predicted, 3),
                    "achieved": round(speedup / predicted, 3),
                }
            )
        chain.append(
            {
                "context": context,
                "chain_ms": round(median(wall[full, context]), 3),
                "whole_ms": round(median(wall[0, context]), 3),
                "ratio": round(ratio(wall[0, context], wall[full, context]), 3),
                "ort_ratio": round(ratio(inside[0, context], inside[full, context]), 3),
                "logits_difference": float(f"{differences[context]:.1e}"),
            }
        )
    return {"decode": decode, "chain": chain}


def block(engine: Engine, exit_layer: int, context: int) -> Callable[[], Step]:
    """A case for :func:`.rounds.interleave`: decode steps at an exit after a prompt, the same steps each time."""
    sequence, ids = engine.new_sequence(max_length=context + WARM_STEPS + STEPS), np.array([TOKEN])
    sequence.advance(exit_layer, prompt(context))

    def run() -> Step:
        found = _typical(partial(sequence.step, exit_layer, ids), lambda: sequence.state.busy_ns)
        sequence.rollback(context)
        return found

    return run


def _typical(step: Callable[[], FloatArray], inside_ns: Callable[[], int]) -> Step:
    """The median of a block of steps; ``inside_ns`` gives the time inside ONNX Runtime so far."""
    steps = []
    for _ in range(WARM_STEPS + STEPS):
        begin, busy = time.perf_counter_ns(), inside_ns()
        step().argmax()
        steps.append(((time.perf_counter_ns() - begin) / 1e6, (inside_ns() - busy) / 1e6))
    wall, inside = zip(*steps[WARM_STEPS:], strict=True)
    return Step(median(wall), median(inside))


def _difference(engine: Engine, whole: WholeGraph, context: int) -> float:
    """Largest difference between the logits of chain and whole graph, as a share of the largest logit.

    Exits with a message if the two do not compute the same.
    """
    sequence = engine.new_sequence(max_length=context + 1)
    sequence.advance(engine.exit_layers[-1], prompt(context))
    ours, theirs = sequence.advance(engine.exit_layers[-1], [TOKEN]), whole.step(TOKEN)
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not difference <= TOLERANCE:
        raise SystemExit(
            f"chain and whole graph differ by {difference:.1e} at {context} tokens: they cannot be compared"
        )
    return difference
