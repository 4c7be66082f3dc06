"""Prices: those of a device profile, or a short measurement of what each graph costs on this device.

Owns the few passes that are measured (about a dozen decode steps) and turns them into a cost model. Repetitions of all
graphs are interleaved and their medians are used, so that a burst of another program's load hits all graphs alike.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.manifest import Manifest
from balcony_edge.device.costs import CostModel, ExpertCost, UnitCost, further_experts
from balcony_edge.device.machine import this_device
from balcony_edge.errors import ProfileError
from balcony_runtime.backends.base import State
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import rows_of_a_pass

_log = logging.getLogger(__name__)
#: Repetitions of each pass, after a first one that is discarded because it packs weights and touches memory.
REPEATS = 3
#: Rows of the many-row pass: enough to measure the price of a further row, and few enough to stay cheap.
MANY_ROWS = 9
#: Rows of a pass in between, which is measured for mixtures of experts: further rows use further experts, but ever fewer.
FEW_ROWS = 3
#: Python's share of a step: decision, sampling, text, bindings (benchmarks/engine/overhead.py measures 0.1 to 0.2 ms).
OVERHEAD_MS = 0.15


def measure_prices(engine: Engine) -> CostModel:
    """Measure every graph of ``engine`` on a scratch sequence.

    Returns:
        Prices for a device that is as busy as it is during the measurement.

    Raises:
        InputError: the engine was closed.
    """
    engine.refuse_closed()
    try:
        return _measured(engine)
    except KeyError:  # another thread closed the engine meanwhile, and its graphs are gone
        engine.refuse_closed()
        raise


def _measured(engine: Engine) -> CostModel:
    """:func:`measure_prices` while the engine stays open."""
    manifest = engine.manifest
    layers = manifest.exit_layers
    context = min(engine.max_length, 1024)
    many = min(MANY_ROWS, context)
    # Attention pays for the bound capacity, which only grows, so short and deep passes need a state each.
    short, long = engine.backend.new_state(1, many), engine.backend.new_state(1, context)
    _take_memory(long, context - 1, len(layers))
    ranges = {"one": (short, 0, 1), "many": (short, 0, many), "deep": (long, context - 1, context)}
    mixture = manifest.model.mixture
    if mixture is not None:
        ranges["few"] = (short, 0, min(FEW_ROWS, many))
    passes: dict[tuple[str, int, str], tuple[State, Callable[[], object]]] = {}
    for which, (state, start, stop) in ranges.items():
        state.embed(np.zeros((1, stop), np.int64), 0)
        for i in range(len(layers)):
            passes["stage", i, which] = state, partial(state.run_stage, i, start, stop)
            passes["exit", i, which] = state, partial(state.run_exit, i, start, stop, 1)
        if which in ("one", "many"):
            passes["head", 0, which] = state, partial(state.logits, stop)
    samples: dict[tuple[str, int, str], list[float]] = {key: [] for key in passes}
    for repeat in range(REPEATS + 1):
        for key, (state, run) in passes.items():
            if key == ("head", 0, "many"):  # one query for each row, as for several replies at once
                state.run_exit(len(layers) - 1, 0, many, many)
                state.wait()
            before = state.busy_ns
            run()
            state.wait()  # on a GPU, the pass has only been queued so far
            if repeat:
                samples[key].append((state.busy_ns - before) / 1e6)
    typical = {key: median(values) for key, values in samples.items()}

    def unit(kind: str, index: int) -> UnitCost:
        one_ms, many_ms, deep_ms = (typical[kind, index, which] for which in ("one", "many", "deep"))
        marginal_ms, experts = max(many_ms - one_ms, 0.0) / max(many - 1, 1), None
        if mixture is not None and kind == "stage":  # of a balcony's pending rows only keys and values are computed
            further_ms = {FEW_ROWS: typical[kind, index, "few"] - one_ms, many: many_ms - one_ms}
            marginal_ms, experts = split_experts(mixture.share, further_ms)
        return UnitCost(
            first_row_ms=one_ms,
            marginal_row_ms=marginal_ms,
            experts=experts,
            context_ms_per_1k=max(deep_ms - one_ms, 0.0) * 1000 / context,
            pass_rows=rows_of_a_pass(manifest, 1, engine.max_length),
        )

    return CostModel(
        exits=layers,
        stages=tuple(unit("stage", i) for i in range(len(layers))),
        balconies=tuple(unit("exit", i) for i in range(len(layers))),
        head=UnitCost(
            first_row_ms=typical["head", 0, "one"],
            marginal_row_ms=max(typical["head", 0, "many"] - typical["head", 0, "one"], 0.0) / max(many - 1, 1),
        ),
        overhead_ms=OVERHEAD_MS,
    )


def _take_memory(state: State, rows: int, exits: int) -> None:
    """Write zeros to the rows before a pass: memory that nobody has written reads as one page, which stays in the cache."""
    cursors = [rows] * exits
    parts = state.parts(cursors, cursors)  # the memory itself, or what was read from a device
    for part in parts.values():
        part[...] = 0
    state.fill(cursors, cursors, parts)


def stand_at(state: State, rows: int, manifest: Manifest) -> None:
    """Let passes that are only timed begin after some rows: recurrent layers need a state there, whatever it holds."""
    if manifest.model.recurrent:
        cursors = [rows] * len(manifest.exit_layers)
        state.fill(cursors, cursors, state.parts(cursors, cursors))


def split_experts(share: float, further_ms: Mapping[int, float]) -> tuple[float, ExpertCost | None]:
    """Split the price of further rows into a part for each row and a part for the experts that they use.

    Args:
        share: Share of the experts that one row uses.
        further_ms: Number of rows → price of a pass beyond that of one row.

    Returns:
        Price of a further row, and that of further experts; of all non-negative pairs the one of least squared error.
    """
    design = np.array([[rows - 1, further_experts(share, rows)] for rows in further_ms])
    target = np.array(list(further_ms.values()))
    marginal_ms, all_ms = non_negative(design, target)
    return marginal_ms, ExpertCost(share, all_ms) if all_ms > 0 else None


def non_negative(design: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> list[float]:
    """The x ≥ 0 that minimises |design · x - target| (Lawson and Hanson 1974, chapter 23)."""
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0
    design = design / scale
    x = np.zeros(design.shape[1])
    free = np.zeros(design.shape[1], bool)
    for _ in range(10 * len(x)):
        gradient = design.T @ (target - design @ x)
        gradient[free] = 0
        if gradient.max() <= 1e-10:
            break
        free[gradient.argmax()] = True
        while True:
            candidate = np.zeros_like(x)
            candidate[free] = np.linalg.lstsq(design[:, free], target, rcond=None)[0]
            below = free & (candidate <= 0)
            if not below.any():
                break
            step = (x[below] / (x[below] - candidate[below])).min()
            x = x + step * (candidate - x)
            free &= x > 1e-12
            x[~free] = 0
        x = candidate
    return [float(value) for value in x / scale]


def profiled_prices(path: str | os.PathLike[str], manifest: Manifest) -> Callable[[Engine], CostModel]:
    """Load the costs of a device profile, before the engine, which may take minutes to load.

    Returns:
        Function that gives the costs for an engine, and warns if they are for another device, bundle or engine.

    Raises:
        ProfileError: the file cannot be read, or is for other exits.
    """
    from balcony_edge.device.profile import DeviceProfile  # noqa: PLC0415 - slow to import

    profile = DeviceProfile.load(path)
    if profile.costs.exits != manifest.exit_layers:
        raise ProfileError(
            f"{os.fspath(path)}: is for exits {', '.join(map(str, profile.costs.exits))}, but this bundle has "
            f"{', '.join(map(str, manifest.exit_layers))}: measure with `balcony-edge profile`"
        )

    def prices(engine: Engine) -> CostModel:
        backend = engine.backend
        known = backend.name, backend.graphs, backend.threads
        for doubt in (*profile.doubts, *profile.mismatches(this_device(), manifest.fingerprint, *known)):
            _log.warning("%s: %s: its prices may not hold here", os.fspath(path), doubt)
        return profile.costs

    return prices
