"""Hard cases of ceilings, in simulation: power gauges that are seconds late, and limits that cannot be held.

:mod:`benchmarks.control.controller` reports the rows and has their bars.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

from balcony_edge.budget import Budget
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.errors import InfeasibleError
from balcony_edge.simulation.loads import parse_load
from balcony_edge.simulation.plant import Physics, Plant
from balcony_edge.simulation.simulate import simulate
from tests.support.prices import windows_w

#: Name → properties of the gauge: the age of its value, the time of its average, the period of new values.
GAUGES: dict[str, dict[str, Any]] = {
    "instant": {},
    "0.5 s late": {"gauge_delay_s": 0.5},
    "1 s late": {"gauge_delay_s": 1.0},
    "2 s late": {"gauge_delay_s": 2.0},
    "once a second": {"gauge_period_s": 1.0},
    "mean of 1 s": {"gauge_average_s": 1.0},
    "mean of 2 s": {"gauge_average_s": 2.0},
    "mean of 5 s, every 5 s": {"gauge_average_s": 5.0, "gauge_period_s": 5.0},
    "mean of 10 s, every 10 s": {"gauge_average_s": 10.0, "gauge_period_s": 10.0},
}

#: Length of the windows in which a mean power is compared with its budget.
WINDOW_S = 5.0
#: Budget of the runs with each kind of gauge.
POWER_W = 6.0


def gauges(costs: CostModel, device: Physics) -> list[dict[str, Any]]:
    """Measure a power limit with every kind of gauge, on an idle device and under a load that comes and goes."""
    rows = []
    for load in ("idle", "square:high=1.5,period_s=20"):
        for name, gauge in GAUGES.items():
            plant = Plant(costs, replace(device, **gauge), parse_load(load))
            run = simulate(costs, plant, Budget(power_w=POWER_W), tokens=10**6, seconds=90)
            after_s = 30 if gauge.get("gauge_period_s", 0) > 1 else 20
            shares = [watts / POWER_W for watts in windows_w(run, after_s, WINDOW_S)]
            gaps = [token.latency_ms for token in run if token.time_s > 20]
            rows.append(
                {
                    "gauge": name,
                    "load": load,
                    "least": round(min(shares), 3),
                    "most": round(max(shares), 3),
                    "gap_of_mean": round(max(gaps) / fmean(gaps), 2),
                }
            )
    return rows


def out_of_reach(costs: CostModel) -> list[dict[str, Any]]:
    """Measure limits that cannot be held, with slow and fast steps.

    A row holds the seconds until the limit is reported as infeasible, and whether it raises an error if asked to.
    """
    fast = replace(
        costs,
        stages=tuple(UnitCost(unit.first_row_ms / 4, unit.marginal_row_ms / 4) for unit in costs.stages),
        head=UnitCost(costs.head.first_row_ms / 4),
    )
    device, rows = Physics(idle_w=2.0), []
    for name, model in (("steps of 12 ms", costs), ("steps of 3 ms", fast)):
        for limit in (Budget(power_w=1.0), Budget(temperature_c=35.0)):
            run = simulate(model, Plant(model, device, parse_load("idle")), limit, tokens=10**6, seconds=60)
            said = next((token.time_s for token in run if token.decision.infeasible), None)
            strict = limit.model_copy(update={"on_infeasible": "error"})
            try:
                simulate(model, Plant(model, device, parse_load("idle")), strict, tokens=10**6, seconds=60)
                raises = False
            except InfeasibleError:
                raises = True
            asked = limit.model_dump(exclude_defaults=True)
            rows.append({"limit": asked, "costs": name, "said_s": said and round(said, 1), "raises": raises})
    return rows
