"""From blocks of samples to the parts of a device profile: entries, prices, residuals, and facts of the bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from statistics import median

import numpy as np

from balcony_edge.bundle.manifest import Estimate, Manifest
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.profile import BundleFacts, Entry, Kind, Metric, QualityFigure, Residual
from balcony_runtime.profiler.cells import WARM_TOKENS, Key
from balcony_runtime.profiler.fit import Pass, errors, fit_unit, residual
from balcony_runtime.profiler.timing import summarise
from balcony_runtime.token_sequence import MAX_PASS_ROWS

#: Samples, in milliseconds: for every quantity one list per round.
Blocks = Mapping[Key, list[list[float]]]


def bundle_facts(manifest: Manifest, context_length: int) -> BundleFacts:
    """Facts of a bundle that a profile keeps; the context is that of the engine."""
    return BundleFacts(
        model=manifest.model.name,
        fingerprint=manifest.fingerprint,
        precision=manifest.precision,
        exit_layers=manifest.exit_layers,
        context_length=context_length,
        bytes_per_token={layer: manifest.bytes_per_token(layer) for layer in manifest.exit_layers},
    )


def quality_figures(manifest: Manifest) -> tuple[QualityFigure, ...]:
    """The bundle's evaluation as a flat list; empty without an evaluation."""
    found = []
    for spec in manifest.exits:
        if spec.quality is None:
            continue

        def add(metric: Metric, on: str, estimate: Estimate, layer: int = spec.exit_layer) -> None:
            figure = QualityFigure(exit_layer=layer, metric=metric, on=on, value=estimate.value, stderr=estimate.stderr)
            found.append(figure)

        for name, text in spec.quality.text.items():
            add("agreement", name, text.agreement)
            add("kl", name, text.kl)
            add("perplexity", name, text.perplexity)
        if (summary := spec.quality.summary) is not None:
            add("average", ", ".join(summary.tasks), summary.average)
    return tuple(found)


def fit_costs(
    blocks: Blocks, exits: tuple[int, ...], share: float | None = None, pass_rows: int = MAX_PASS_ROWS
) -> tuple[CostModel, list[Residual]]:
    """Prices of every graph, from the medians of its passes and anchored in decoding, and their errors on the passes.

    Decoding and switches are measured at fixed exits, without a decision, and fitted with that share of Python. A price then
    has the share that a decision takes.

    ``share`` is the share of the experts that one row uses, in a mixture of experts; ``pass_rows`` is the most rows of one pass
    in a sequence of the bundle's full length. Measured passes have no more.
    """
    typical = _typical(blocks)
    residuals = []

    def unit(kind: Kind, exit_layer: int, name: str) -> UnitCost:
        passes = [
            Pass(key.rows, key.rows if kind == "catch_up" else 1, key.context + 1, ms)
            for key, ms in typical.items()
            if (key.kind, key.exit_layer) == (kind, exit_layer)
        ]
        if kind in ("norm", "lm_head"):  # the context does not matter
            one_ms = median(one.ms for one in passes if one.rows == 1)
            further = [(one.ms - one_ms) / (one.rows - 1) for one in passes if one.rows > 1]
            return UnitCost(one_ms, max(median(further), 0.0) if further else 0.0)
        # of a balcony's pending rows only keys and values are computed, so only stages read further experts
        fitted = replace(fit_unit(passes, share if kind == "catch_up" else None), pass_rows=pass_rows)
        residuals.append(residual(name, errors(fitted, passes)))
        return fitted

    full = exits[-1]
    stages = tuple(unit("catch_up", layer, f"stage {index}") for index, layer in enumerate(exits))
    balconies = tuple(unit("balcony", layer, f"balcony {layer}") for layer in exits[:-1])
    overhead = [ms for key, ms in typical.items() if key.kind == "controller"]
    costs = CostModel(
        exits=exits,
        stages=stages,
        balconies=(*balconies, unit("norm", full, "norm")),
        head=unit("lm_head", full, "LM head"),
        overhead_ms=fixed_ms(typical),
    )
    anchored = _anchored(costs, typical)
    decided_ms = median(overhead) if overhead else anchored.overhead_ms
    return replace(anchored, switch_ms=_switch_ms(anchored, typical), overhead_ms=decided_ms), residuals


def _typical(blocks: Blocks) -> dict[Key, float]:
    return {
        _middle(key, found): median([sample for block in found for sample in block]) for key, found in blocks.items()
    }


def _middle(key: Key, found: list[list[float]]) -> Key:
    """The key with the context of a decode block's middle step: its median is the time of that step, not of its first."""
    if key.kind != "decode":
        return key
    return replace(key, context=key.context + WARM_TOKENS + (len(found[0]) - 1) // 2)


def fixed_ms(typical: Mapping[Key, float]) -> float:
    """Python's share of a step at a fixed exit, where it was also measured with a decision."""
    keys = (replace(key, kind="python") for key in typical if key.kind == "controller")
    found = [typical[key] for key in keys if key in typical]
    return median(found) if found else 0.0


def _switch_ms(costs: CostModel, typical: Mapping[Key, float]) -> float:
    """Measured time of switches beyond the price of their rows."""
    beyond = [
        ms - (predicted_ms(costs, key) or 0.0)
        for key, ms in typical.items()
        if key.kind in ("switch_up", "switch_down")
    ]
    return max(median(beyond), 0.0) if beyond else 0.0


def _anchored(costs: CostModel, typical: Mapping[Key, float]) -> CostModel:
    """Adjust the prices of first rows, so that steady steps cost the measured time of decoding at each exit.

    Passes are measured in a sweep through all graphs. A step at a shallow exit reads fewer weights, and if these stay in the
    last-level cache, every layer of the step is faster (0.11 compared with 0.16 ms a layer in int4). A deeper stage therefore
    adds more than its own pass: the layers before it then also come from memory. Its price is all the time that it *adds*.
    """
    stages, shift_ms = list(costs.stages), 0.0
    for index, layer in enumerate(costs.exits):
        gaps = [
            ms - costs.steady_ms(layer, key.context)
            for key, ms in typical.items()
            if (key.kind, key.exit_layer) == ("decode", layer)
        ]
        if gaps:
            stage = stages[index]
            first_row_ms = max(stage.first_row_ms + median(gaps) - shift_ms, 0.0)
            shift_ms += first_row_ms - stage.first_row_ms  # less than needed if the price would fall below 0
            stages[index] = replace(stage, first_row_ms=first_row_ms)
    return replace(costs, stages=tuple(stages))


def predicted_ms(costs: CostModel, key: Key) -> float | None:
    """Price of a quantity; None for Python's shares, which are part of every price."""
    exits = costs.exits
    index, count = exits.index(key.exit_layer), len(exits)
    ones = (1,) * count
    if key.kind == "switch_up" and key.from_exit is not None:
        kept = exits.index(key.from_exit) + 1
        return costs.step_ms(key.exit_layer, (*ones[:kept], *(key.rows,) * (count - kept)), ones, key.context)
    prices: dict[Kind, Callable[[], float]] = {
        "prefill": lambda: costs.prefill_ms(key.exit_layer, key.rows),
        "decode": lambda: costs.steady_ms(key.exit_layer, key.context),
        "switch_down": lambda: costs.step_ms(key.exit_layer, ones, (key.rows,) * count, key.context),
        "catch_up": lambda: costs.stages[index].pass_ms(key.rows, key.context),
        "balcony": lambda: costs.balconies[index].pass_ms(key.rows, key.context, query_rows=1),
        "norm": lambda: costs.balconies[index].pass_ms(1, key.context),
        "lm_head": lambda: costs.head.pass_ms(key.rows, key.context),
    }
    return prices[key.kind]() if key.kind in prices else None


def entries(blocks: Blocks, costs: CostModel) -> tuple[Entry, ...]:
    """The entry of each quantity, with its predicted time: its price without a decision, since all exits are fixed here."""
    fixed = replace(costs, overhead_ms=fixed_ms(_typical(blocks)))
    return tuple(
        Entry(**asdict(key), timing=summarise(found), predicted_ms=predicted_ms(fixed, _middle(key, found)))
        for key, found in blocks.items()
    )


def step_residuals(entries: tuple[Entry, ...]) -> list[Residual]:
    """Errors of the prices of whole steps, as a user sees them. The fit only used one of these numbers for each exit."""
    found = []
    for kind in ("decode", "prefill", "switch_up", "switch_down"):
        shares = [
            entry.predicted_ms / entry.timing.p50_ms - 1
            for entry in entries
            if entry.kind == kind and entry.predicted_ms is not None and entry.timing.p50_ms
        ]
        if shares:
            found.append(residual(f"{kind} steps", shares))
    return found


def spread(blocks: Blocks) -> float:
    """Spread of decode steps: the standard deviation of a log-normal with the same median and 95th percentile."""
    ratios = []
    for key, found in blocks.items():
        if key.kind == "decode":
            samples = [sample for block in found for sample in block]
            typical = median(samples)
            ratios += [math.log(sample / typical) for sample in samples if sample > 0]
    return max(float(np.quantile(ratios, 0.95)), 0.0) / 1.645 if ratios else 0.0
