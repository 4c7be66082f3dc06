"""Cost of a switch of exits: up with a backlog in the missing stages, down with a backlog in the balcony.

Owns item (c) of :mod:`.main_job`. Every sample has a fresh sequence, so that growing and rebinding a cache is paid
at the same points as in a reply. The times for comparison are measured right after the switch on the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from balcony_runtime.engine import Engine
from benchmarks.engine.decode import TOKEN, prompt
from benchmarks.rounds import interleave, ratio

#: Tokens at full depth before the tokens at the shallow exit.
CONTEXT = 192
PENDING = (1, 16, 128)
#: Tokens at full depth before a switch down.
DEEP_TOKENS = 512
#: Number of steady steps for comparison with a switch down.
STEADY_STEPS = 5


class _Up(NamedTuple):
    advance_ms: float  # the step that switches, with the pending rows and the new one
    own_ms: float  # the part without pending rows: stages without a backlog, norm, head
    prefill_ms: float  # only the pending rows, through the missing stages
    steady_ms: float  # a full-depth step without a backlog


class _Down(NamedTuple):
    switch_ms: float
    steady_ms: float
    full_ms: float


def measure(engine: Engine, rounds: int) -> dict[str, Any]:
    """Measure items ``switch_up`` and ``switch_down`` of the JSON line."""
    shallow = engine.exit_layers[:-1]
    ups: dict[tuple[int, int], Callable[[], _Up]] = {
        (exit_layer, pending): partial(_up, engine, exit_layer, pending)
        for exit_layer in shallow
        for pending in PENDING
    }
    downs: dict[int, Callable[[], _Down]] = {exit_layer: partial(_down, engine, exit_layer) for exit_layer in shallow}
    return {
        "switch_up": [_up_row(*key, samples) for key, samples in interleave(ups, rounds).items()],
        "switch_down": [_down_row(key, samples) for key, samples in interleave(downs, rounds).items()],
    }


def _up(engine: Engine, exit_layer: int, pending: int) -> _Up:
    layers = engine.exit_layers
    full, index = layers[-1], layers.index(exit_layer)
    tokens = prompt(CONTEXT + pending)
    sequence = engine.new_sequence(max_length=CONTEXT + pending + 2)
    sequence.advance(full, tokens[: CONTEXT - 1])
    # Run a step, so that the bindings of steps exist, as in a reply.
    sequence.advance(full, tokens[CONTEXT - 1 : CONTEXT])
    if pending > 1:
        sequence.advance(exit_layer, tokens[CONTEXT:-1])
    sequence.advance(exit_layer, tokens[-1:])
    advance_ms = _timed(lambda: sequence.advance(full, [TOKEN]))
    first, last, state = CONTEXT, CONTEXT + pending, sequence.state

    def missing() -> None:
        for stage in range(index + 1, len(layers)):
            state.run_stage(stage, first, last)

    def own() -> None:
        for stage in range(index + 1):
            state.run_stage(stage, last, last + 1)
        state.run_exit(len(layers) - 1, last, last + 1, 1)
        state.logits(1)

    own_ms, prefill_ms = _timed(own), _timed(missing)
    sequence.rollback(last)
    return _Up(advance_ms, own_ms, prefill_ms, _timed(lambda: sequence.advance(full, [TOKEN])))


def _up_row(exit_layer: int, pending: int, samples: list[_Up]) -> dict[str, Any]:
    switch_ms = [sample.advance_ms - sample.own_ms for sample in samples]
    prefill_ms = [sample.prefill_ms for sample in samples]
    return {
        "from_exit": exit_layer,
        "pending": pending,
        "advance_ms": _median(sample.advance_ms for sample in samples),
        "switch_ms": _median(switch_ms),
        "prefill_ms": _median(prefill_ms),
        "ratio": round(ratio(switch_ms, prefill_ms), 3),
        "advance_ratio": round(ratio((sample.advance_ms for sample in samples), prefill_ms), 3),
        "extra_ms": _median(sample.advance_ms - sample.steady_ms for sample in samples),
        "extra_ratio": round(ratio((sample.advance_ms - sample.steady_ms for sample in samples), prefill_ms), 3),
    }


def _down(engine: Engine, exit_layer: int) -> _Down:
    full, ids = engine.exit_layers[-1], np.array([TOKEN])
    sequence = engine.new_sequence(max_length=DEEP_TOKENS + 1 + STEADY_STEPS)
    sequence.advance(full, prompt(DEEP_TOKENS))  # like 512 steps at full depth: 512 rows are pending in the balcony
    switch_ms = _timed(lambda: sequence.advance(exit_layer, [TOKEN]))
    steady_ms = [_timed(lambda: sequence.step(exit_layer, ids)) for _ in range(STEADY_STEPS)]
    sequence.rollback(DEEP_TOKENS + 1)
    sequence.advance(full, [])  # run the row that only the shallow stages have run
    full_ms = [_timed(lambda: sequence.step(full, ids)) for _ in range(STEADY_STEPS)]
    return _Down(switch_ms, median(steady_ms), median(full_ms))


def _down_row(exit_layer: int, samples: list[_Down]) -> dict[str, Any]:
    extra_ms = [sample.switch_ms - sample.steady_ms for sample in samples]
    full_ms = [sample.full_ms for sample in samples]
    return {
        "to_exit": exit_layer,
        "switch_ms": _median(sample.switch_ms for sample in samples),
        "steady_ms": _median(sample.steady_ms for sample in samples),
        "extra_ms": _median(extra_ms),
        "full_depth_ms": _median(full_ms),
        "extra_full_tokens": round(ratio(extra_ms, full_ms), 3),
    }


def _median(values: Iterable[float]) -> float:
    return round(median(values), 3)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e6
