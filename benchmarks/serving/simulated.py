"""Random arrivals of streams on a simulated device: how deep their replies are, compared with two that know more.

The *oracle* is our own joint decision without hysteresis, with a known slowdown and free pending rows. It does not know what
will come. The *bound* (:mod:`benchmarks.serving.clairvoyant`) knows everything that will come, and no scheduler can be deeper
with the misses of our run. But it shares passes better than any scheduler can, so it is near the full depth where the time is
enough for all on average.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from statistics import mean
from typing import Any

from balcony_edge.budget import Budget
from balcony_edge.control.company.joint import JointController
from balcony_edge.control.company.seen import CompanyState, Round, RoundSeen, StreamSeen
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.errors import BudgetError
from balcony_edge.simulation import company
from benchmarks.serving.clairvoyant import deepest

#: Prices like those of the demo model in int4 on two CPU cores, and the agreement of its exits.
INT4 = CostModel(
    exits=(14, 17, 20, 30),
    stages=(
        UnitCost(2.15, 0.5, 0.1),
        UnitCost(0.47, 0.11, 0.02),
        UnitCost(0.46, 0.11, 0.02),
        UnitCost(1.5, 0.37, 0.07),
    ),
    balconies=(UnitCost(0.2, 0.02), UnitCost(0.2, 0.02), UnitCost(0.2, 0.02), UnitCost(0.03)),
    head=UnitCost(0.8, 0.12),
    overhead_ms=0.15,
)
QUALITY = (0.60, 0.66, 0.74, 1.0)
#: Length of the bins of the bound; with bins of 30 ms the bound is hardly lower (0.985 for 0.991) and takes ten times as long.
BIN_S = 0.25


class _CaughtUp(company.CompanyPlant):
    """A device on which pending rows cost nothing: the next token of every stream finds its stages up to date."""

    @staticmethod
    def rows_due(stream: company.SimulatedStream) -> tuple[list[int], list[int]]:
        """One row each after the prompt."""
        stages, balconies = company.CompanyPlant.rows_due(stream)
        return ([1] * len(stages), [1] * len(balconies)) if stream.exits else (stages, balconies)


@lru_cache(maxsize=64)
def _at_once(budget: Budget) -> Budget:
    """The budget without anything that delays a change of exit."""
    return budget.model_copy(update={"hysteresis": 0.0, "dwell_tokens": 0})


def oracle(arrivals: Sequence[company.Arrival], seed: int) -> list[company.SimulatedStream]:
    """The deepest rounds in time if pending rows cost nothing, the device is known, and exits change at once."""
    controller, known = JointController(INT4, QUALITY), Slowdown(variance=1e-8, noise_variance=0.02**2)

    def decide(state: CompanyState, seen: RoundSeen) -> tuple[CompanyState, Round]:
        streams: tuple[StreamSeen, ...] = tuple(one._replace(budget=_at_once(one.budget)) for one in seen.streams)
        return controller.decide(state._replace(slowdown=known), seen._replace(streams=streams, last=None))

    return company.simulate_company(INT4, arrivals, quality=QUALITY, seed=seed, decide=decide, plant_class=_CaughtUp)


#: Key of a budget → values of random mixes, some beyond what the device can hold.
VALUES: dict[str, tuple[Any, ...]] = {
    "tpot_ms": (1.0, 8.0, 15.0, 40.0, 1e4),
    "ttft_ms": (1.0, 50.0, 500.0, 1e5),
    "deadline_s": (0.01, 1.0, 60.0),
    "max_pace_tps": (2.0, 20.0, 200.0),
    "power_w": (2.0, 5.0, 8.0, 500.0),
    "temperature_c": (30.0, 45.0, 90.0),
    "critical_temperature_c": (46.0, 100.0),
    "cpu_utilization": (0.1, 0.5),
    "energy_j_per_token": (0.01, 0.1),
    "weight": (0.01, 1.0, 100.0),
    "max_exit": INT4.exits,
    "min_exit": INT4.exits,
    "on_infeasible": ("error", "best_effort"),
    "probability": (0.5, 0.99),
    "dwell_tokens": (0, 4),
}


def _budget(chance: Random) -> Budget:
    while True:
        keys = {key: chance.choice(values) for key, values in VALUES.items() if chance.random() < 0.2}
        if "deadline_s" in keys:
            keys["expected_tokens"] = chance.choice((1, 12, 10**6))
        try:
            return Budget(**keys)
        except BudgetError:  # the keys contradict one another
            continue


def mixes(count: int) -> dict[str, Any]:
    """Item ``mixes`` of :mod:`benchmarks.serving.streams`: random mixes of random budgets, with admission, each to its end.

    An exception ends the benchmark with its seed.
    """
    wrong: list[int] = []
    streams = tokens = refused = most = 0
    for seed in range(count):
        chance = Random(seed)
        classes = [
            company.Arrival(0.0, chance.randint(1, 200), chance.randint(1, 6), _budget(chance)) for _ in range(6)
        ]
        rate, burst = chance.uniform(4, 60), chance.choice((1, 1, 4, 16))
        arrivals = company.poisson(rate, 1.0, classes, seed=seed, burst=burst)[:17]
        sizes = [0]

        def counted(_: float, found: Round, sizes: list[int] = sizes) -> None:
            sizes.append(len(found.moves))

        try:
            run = company.simulate_company(INT4, arrivals, quality=QUALITY, admission=True, seed=seed, log=counted)
        except Exception as error:
            raise RuntimeError(f"mix {seed}") from error
        if not all(_sound(one) for one in run):
            wrong.append(seed)
        streams, most = streams + len(run), max(most, *sizes)
        tokens += sum(len(one.exits) for one in run)
        refused += sum(one.refused_s is not None for one in run)
    return {
        "mixes": count,
        "streams": streams,
        "tokens": tokens,
        "refused": refused,
        "most_at_once": most,
        "wrong": wrong,
    }


def _sound(one: company.SimulatedStream) -> bool:
    """Whether a stream came to its end with finite gaps, at exits that its budget allows, or was refused as it may be."""
    budget = one.arrival.budget
    return (
        one.done
        and all(0 < gap < math.inf for gap in one.gaps_ms)
        and set(one.exits) <= set(budget.allowed_exits(INT4.exits))
        and (one.refused_s is None or budget.may_end)
    )


CLASSES = [
    company.Arrival(0.0, prompt, tokens, budget)
    for prompt, tokens, budget in (
        (30, 150, Budget(tpot_ms=8.0)),
        (60, 200, Budget(tpot_ms=15.0)),
        (100, 150, Budget(tpot_ms=30.0)),
        (40, 120, Budget(deadline_s=4.0, expected_tokens=120)),
        (30, 100, Budget()),
    )
]


def simulation(seeds: int) -> dict[str, Any]:
    """Item ``simulation`` of :mod:`benchmarks.serving.streams`: random arrivals of seven kinds."""
    rows: list[dict[str, Any]] = []
    spent_s: dict[int, list[float]] = {}  # number of streams → time of each decision
    controller = JointController(INT4, QUALITY)

    def timed(state: CompanyState, seen: RoundSeen) -> tuple[CompanyState, Round]:
        begin = time.thread_time()  # the thread's own time, so that other programs do not count
        found = controller.decide(state, seen)
        spent_s.setdefault(len(seen.streams), []).append(time.thread_time() - begin)
        return found

    for arrivals_a_second, burst in ((0.3, 1), (0.8, 1), (1.2, 1), (0.3, 3), (0.8, 3), (1.2, 3), (2.0, 8)):
        ratios, of_bound, late, ideal, switches, gaps = [], [], [], [], [], []
        missed, ideally_missed = [], []
        for seed in range(seeds):
            arrivals = company.poisson(arrivals_a_second, 30.0, CLASSES, seed=seed, burst=burst)
            if not arrivals:
                continue
            run = company.simulate_company(INT4, arrivals, quality=QUALITY, seed=seed, decide=timed)
            found = company.summary(run, INT4)
            best = company.summary(oracle(arrivals, seed), INT4)
            ratios.append(found["mean_depth"] / best["mean_depth"])
            of_bound.append(found["mean_depth"] / deepest(INT4, run, bin_s=BIN_S))
            late.append(found["late_share"])
            switches.append(found["switches"])
            gaps.append(found["longest_gap_ms"])
            ideal.append(best["late_share"])
            missed.append(found["deadlines_missed"])
            ideally_missed.append(best["deadlines_missed"])
        rows.append(
            {
                "arrivals_a_second": arrivals_a_second,
                "burst": burst,
                "depth_of_oracle": round(mean(ratios), 3),
                "depth_of_bound": round(mean(of_bound), 3),
                "late": round(mean(late), 4),
                "oracle_late": round(mean(ideal), 4),
                "deadlines_missed": round(mean(missed), 4),
                "oracle_deadlines_missed": round(mean(ideally_missed), 4),
                "switches_per_100_tokens": round(mean(switches), 1),
                "longest_gap_ms": round(max(gaps), 1),  # of streams without a target
            }
        )
    decisions = {count: round(1e6 * mean(spent_s[count]), 1) for count in sorted(spent_s) if count in (2, 4, 8, 16)}
    return {"rows": rows, "decision_us": decisions}
