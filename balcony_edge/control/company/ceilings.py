"""Ceilings of several budgets on one device: the strictest of each holds for all.

Owns the merging. Watts, degrees and utilization are those of the device, so a reply cannot have more of them than another one
allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from balcony_edge.budget import Budget, Rail
from balcony_edge.control.governor import slowest_tps

#: Ceilings with rules of their own; of each other the lowest holds.
_OWN_RULES = ("power_w", "energy_j_per_token", "battery_floor_percent")
#: Rails in the order in which their watts count: the board's include those of its parts.
_RAILS: tuple[Rail, ...] = ("board", "cpu", "gpu")


def merged_ceilings(budgets: Sequence[Budget]) -> Budget:
    """One budget with the strictest ceilings of several, of which some have any, and what else of them governs the device.

    The lowest ``power_w`` of the board counts, or else of the CPU, or of the GPU, with its window; without watts, joules do by
    the same order. Watts and joules of other rails are then not held (:func:`left_out`).
    No token is delayed if one budget forbids it; else the highest ``min_pace_tps`` is left, and the latency targets, too, if
    one budget has them before its ceilings.
    If all replies have a pace, the fastest is kept, because a token also takes the joules of its wait.
    """
    return _merged(frozenset(budgets))


@lru_cache(maxsize=64)
def _merged(budgets: frozenset[Budget]) -> Budget:
    kept: dict[str, object] = {}
    asked = [budget.ceilings for budget in budgets]
    for key in {key for ceilings in asked for key in ceilings}.difference(_OWN_RULES):
        kept[key] = min(ceilings[key] for ceilings in asked if key in ceilings)
    floors = [budget.battery_floor_percent for budget in budgets if budget.battery_floor_percent is not None]
    if floors:
        kept["battery_floor_percent"] = max(floors)
    powered = [budget for budget in budgets if budget.power_w is not None]
    frugal = [budget for budget in budgets if budget.energy_j_per_token is not None]
    if powered:
        strictest = min(powered, key=lambda one: (_RAILS.index(one.power_rail), one.power_w, one.power_window_s))
        kept |= {key: getattr(strictest, key) for key in ("power_w", "power_rail", "power_window_s")}
    elif frugal:
        kept["power_rail"] = min((budget.power_rail for budget in frugal), key=_RAILS.index)
    joules = [budget.energy_j_per_token or 0.0 for budget in frugal if budget.power_rail == kept["power_rail"]]
    if joules:
        kept["energy_j_per_token"] = min(joules)
    hottest, critical = kept.get("temperature_c"), kept.get("critical_temperature_c")
    if isinstance(hottest, float) and isinstance(critical, float) and hottest >= critical:
        del kept["temperature_c"]  # the critical temperature of another budget is below it and acts first
    if any(budget.priority == "latency" for budget in budgets):
        kept["priority"] = "latency"
    if any(not budget.pacing for budget in budgets):
        kept["pacing"] = False
    elif any(budget.min_pace_tps is not None for budget in budgets):
        kept["min_pace_tps"] = max(map(slowest_tps, budgets))
    paces = [budget.max_pace_tps for budget in budgets if budget.max_pace_tps is not None]
    if paces and len(paces) == len(budgets):  # else a round comes as soon as the one before has ended
        kept["max_pace_tps"] = max(paces)
    return Budget.model_validate(kept)


def longest_pause_s(budgets: Sequence[Budget], asking: Sequence[Budget]) -> float:
    """Longest time between two rounds that the ceilings of these budgets leave those who ask; 0 without any ceiling.

    Who has gone asks for no pause, and who is paused for no pace.
    """
    return 1 / max(map(slowest_tps, asking)) if any(budget.needs_sensors for budget in budgets) else 0.0


def left_out(budget: Budget, ceilings: Budget) -> str | None:
    """Why watts or joules of a budget are not held next to those of others, in words; None if they are, or it has none."""
    if budget.power_rail == ceilings.power_rail or (budget.power_w is None and budget.energy_j_per_token is None):
        return None
    return f"no ceiling for the {budget.power_rail} rail: another reply has one for the {ceilings.power_rail} rail"
