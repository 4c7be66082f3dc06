"""Prices: those of a device profile, or a short measurement of what each graph costs on this device.

Owns the few passes that are measured (about a dozen decode steps) and turns them into a cost model. Repetitions of all
graphs are interleaved and their medians are used, so that a burst of another program's load hits all graphs alike.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np

from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.machine import this_device
from balcony_edge.device.profile import DeviceProfile
from balcony_edge.errors import ProfileError
from balcony_runtime.backends.base import State
from balcony_runtime.engine import Engine

_log = logging.getLogger(__name__)
#: Repetitions of each pass, after a first one that is discarded because it packs weights and touches memory.
REPEATS = 5
#: Rows of the many-row pass: enough to measure the price of a further row, and few enough to stay cheap.
MANY_ROWS = 9
#: Python's share of a step: decision, sampling, text, bindings (benchmarks/overhead.py measures 0.1 to 0.2 ms).
OVERHEAD_MS = 0.15


def measure_prices(engine: Engine) -> CostModel:
    """Measure every graph of ``engine`` on a scratch sequence.

    Returns:
        Prices for a device that is as busy as it is during the measurement.

    Raises:
        InputError: the engine was closed.
    """
    engine.refuse_closed()
    manifest = engine.manifest
    layers = manifest.exit_layers
    context = min(engine.max_length, 1024)
    many = min(MANY_ROWS, context)
    # Attention pays for the bound capacity, which only grows, so short and deep passes need a state each.
    short, long = engine.backend.new_state(1, many), engine.backend.new_state(1, context)
    ranges = {"one": (short, 0, 1), "many": (short, 0, many), "deep": (long, context - 1, context)}
    passes: dict[tuple[str, int, str], tuple[State, Callable[[], object]]] = {}
    for which, (state, start, stop) in ranges.items():
        state.embed(np.zeros((1, stop), np.int64), 0)
        for i in range(len(layers)):
            passes["stage", i, which] = state, partial(state.run_stage, i, start, stop)
            passes["exit", i, which] = state, partial(state.run_exit, i, start, stop, 1)
        passes["head", 0, which] = state, partial(state.logits, 1)
    samples: dict[tuple[str, int, str], list[float]] = {key: [] for key in passes}
    for repeat in range(REPEATS + 1):
        for key, (state, run) in passes.items():
            before = state.busy_ns
            run()
            state.wait()  # on a GPU, the pass has only been queued so far
            if repeat:
                samples[key].append((state.busy_ns - before) / 1e6)
    typical = {key: median(values) for key, values in samples.items()}

    def unit(kind: str, index: int) -> UnitCost:
        one, rows, deep = (typical[kind, index, which] for which in ("one", "many", "deep"))
        return UnitCost(
            first_row_ms=one,
            marginal_row_ms=max(rows - one, 0.0) / max(many - 1, 1),
            context_ms_per_1k=max(deep - one, 0.0) * 1000 / context,
        )

    return CostModel(
        exits=layers,
        stages=tuple(unit("stage", i) for i in range(len(layers))),
        balconies=tuple(unit("exit", i) for i in range(len(layers))),
        head=UnitCost(first_row_ms=typical["head", 0, "one"]),
        overhead_ms=OVERHEAD_MS,
    )


def profiled_prices(path: str | os.PathLike[str], engine: Engine) -> CostModel:
    """Load the costs of a device profile; warn if it is for another device, bundle or engine.

    Raises:
        ProfileError: the file cannot be read, or is for other exits.
    """
    profile, manifest = DeviceProfile.load(path), engine.manifest
    if profile.costs.exits != manifest.exit_layers:
        raise ProfileError(
            f"{os.fspath(path)}: is for exits {', '.join(map(str, profile.costs.exits))}, but this bundle has "
            f"{', '.join(map(str, manifest.exit_layers))}: measure with `balcony-edge profile`"
        )
    mismatches = profile.mismatches(this_device(), manifest.fingerprint, engine.backend.threads)
    for doubt in (*profile.doubts, *mismatches):
        _log.warning("%s: %s: its prices may not hold here", os.fspath(path), doubt)
    return profile.costs
