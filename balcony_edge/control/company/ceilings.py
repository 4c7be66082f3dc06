"""Ceilings of several budgets on one device: the strictest of each holds for all.

Owns the merging. Watts, degrees and utilization are those of the device, so a reply cannot have more of them than another one
allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from balcony_edge.budget import Budget

#: Ceilings of which the lowest holds, and the one of which the highest holds.
_LOWEST = (
    "temperature_c",
    "critical_temperature_c",
    "gpu_utilization",
    "cpu_utilization",
    "memory_mb",
)
_HIGHEST = "battery_floor_percent"


def merged_ceilings(budgets: Sequence[Budget]) -> Budget:
    """One budget with the strictest ceilings of several, of which some have any, and what else of them governs the device.

    The lowest ``power_w`` counts with its own rail and window. Joules of another rail are then not held.
    No token is delayed if one budget forbids it; else the highest ``min_pace_tps`` is left, and the latency targets, too, if
    one budget has them before its ceilings.
    """
    return _merged(frozenset(budgets))


@lru_cache(maxsize=64)
def _merged(budgets: frozenset[Budget]) -> Budget:
    kept: dict[str, object] = {}
    for key in _LOWEST:
        given = [value for budget in budgets if (value := getattr(budget, key)) is not None]
        if given:
            kept[key] = min(given)
    floors = [budget.battery_floor_percent for budget in budgets if budget.battery_floor_percent is not None]
    if floors:
        kept[_HIGHEST] = max(floors)
    powered = [budget for budget in budgets if budget.power_w is not None]
    frugal = [budget for budget in budgets if budget.energy_j_per_token is not None]
    if powered:
        strictest = min(powered, key=lambda budget: (budget.power_w, budget.power_rail, budget.power_window_s))
        kept |= {key: getattr(strictest, key) for key in ("power_w", "power_rail", "power_window_s")}
    elif frugal:
        kept["power_rail"] = min(frugal, key=lambda budget: (budget.energy_j_per_token, budget.power_rail)).power_rail
    joules = [budget.energy_j_per_token or 0.0 for budget in frugal if budget.power_rail == kept["power_rail"]]
    if joules:
        kept["energy_j_per_token"] = min(joules)
    hottest, critical = kept.get("temperature_c"), kept.get("critical_temperature_c")
    if isinstance(hottest, float) and isinstance(critical, float) and hottest >= critical:
        del kept["temperature_c"]  # the critical temperature of another budget is below it and acts first
    if any(budget.priority == "latency" for budget in budgets):
        kept["priority"] = "latency"
    paces = [budget.min_pace_tps for budget in budgets if budget.min_pace_tps is not None]
    if any(not budget.pacing for budget in budgets):
        kept["pacing"] = False
    elif paces:
        kept["min_pace_tps"] = max(paces)
    return Budget.model_validate(kept)
