"""Plans: which exits would meet which target of a budget on a profiled device, and what the controller would do.

Owns the arithmetic of expectations. The decisions are the controller's own: it runs against a simulated device with the
profile's prices, spread and power. Pure: no clock, no sensor, no engine. A target on a quantity that the profile does not
contain is unknown here, neither met nor missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean

from balcony_edge.budget import UNEVALUATED_BUNDLE, UNEVALUATED_PROFILE, Budget
from balcony_edge.control.controller import probability_of, quantile_of
from balcony_edge.control.deadline import BURST_TOKENS
from balcony_edge.control.governor import NEARLY_NOTHING, needed_tps, paced_ms
from balcony_edge.device.profile import DeviceProfile, QualityFigure, least_agreement
from balcony_edge.simulation.plant import Physics, Plant
from balcony_edge.simulation.simulate import SimulatedToken, simulate

#: Tokens of the simulated reply if the budget has no ``expected_tokens``.
REPLY_TOKENS = 128
#: Targets that chance plays a part in.
_BY_CHANCE = ("tpot_ms", "ttft_ms", "deadline_s")
#: Targets that a profile cannot predict: they depend on the room, on other processes or on the battery.
_UNKNOWN = ("temperature_c", "critical_temperature_c", "gpu_utilization", "cpu_utilization", "battery_floor_percent")


@dataclass(frozen=True, slots=True)
class Check:
    """One target at one exit.

    Attributes:
        target: key of the budget.
        asked: value of that key.
        expected: value that the profile predicts; None if it cannot.
        probability: probability that the target is met; None if chance plays no part.
        met: whether the target is met with the budget's probability; None if the profile cannot tell.
    """

    target: str
    asked: float
    expected: float | None
    probability: float | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class ExitPlan:
    """One exit at the planned context: steady decoding, first token, energy and quality; None where it was not measured.

    Energy includes the waiting for the budget's pace.
    """

    exit_layer: int
    allowed: bool
    tpot_ms: float
    ttft_ms: float
    tokens_per_s: float
    watts: float | None
    joules_per_token: float | None
    agreement: float | None
    checks: tuple[Check, ...]

    @property
    def met(self) -> bool | None:
        """Whether every target is met; None if one is unknown and none is missed."""
        answers = [check.met for check in self.checks]
        return False if False in answers else None if None in answers else True


@dataclass(frozen=True, slots=True)
class Plan:
    """Expectations for a budget.

    Attributes:
        exits: plans of the single exits.
        shares: exit layer → share of the tokens that the controller makes there.
        reason: reason of the controller's decision for the last token.
        tokens_per_s, tpot_ms, joules_per_token, agreement: expected values of this mix of exits; None if unknown.
        feasible: whether some allowed exit meets every target that the profile can predict.
        nearest: target → nearest value that some allowed exit meets; empty if the budget is feasible.
        notes: targets that the profile cannot predict, one line each.
    """

    exits: tuple[ExitPlan, ...]
    shares: dict[int, float]
    reason: str
    tokens_per_s: float
    tpot_ms: float
    joules_per_token: float | None
    agreement: float | None
    feasible: bool
    nearest: dict[str, float]
    notes: tuple[str, ...]


def make_plan(
    profile: DeviceProfile,
    budget: Budget,
    *,
    prompt_tokens: int = 64,
    quality: tuple[QualityFigure, ...] | None = None,
) -> Plan:
    """Plan a reply to a prompt.

    Args:
        profile: profile of the device and bundle.
        budget: budget to hold.
        prompt_tokens: length of the prompt.
        quality: figures of the bundle's evaluation; by default those in the profile.

    Raises:
        BudgetError: the budget leaves none of the profile's exits.
    """
    figures = profile.quality if quality is None else quality
    agreement = least_agreement(profile.costs.exits, figures)
    whose = UNEVALUATED_PROFILE if quality is None else UNEVALUATED_BUNDLE
    resolved = budget.for_bundle(agreement, unevaluated=whose)
    allowed = resolved.allowed_exits(profile.costs.exits)
    planner = _Planner(profile, budget, prompt_tokens, agreement)
    exits = tuple(planner.exit_plan(layer, layer in allowed) for layer in profile.costs.exits)
    possible = [plan for plan in exits if plan.allowed]
    feasible = any(plan.met is not False for plan in possible)
    shares, reason, gaps_ms, joules = planner.simulated(resolved)
    unknown = {check.target for plan in possible for check in plan.checks if check.met is None}
    return Plan(
        exits=exits,
        shares=shares,
        reason=reason,
        tokens_per_s=1000 / fmean(gaps_ms),
        tpot_ms=fmean(gaps_ms),
        joules_per_token=joules,
        agreement=_mixed(shares, planner.agreement),
        feasible=feasible,
        nearest={} if feasible else planner.nearest(possible),
        notes=tuple(f"{target}: this profile does not say whether it is met" for target in sorted(unknown)),
    )


class _Planner:
    def __init__(
        self, profile: DeviceProfile, budget: Budget, prompt_tokens: int, agreement: dict[int, float | None]
    ) -> None:
        self.profile, self.budget, self.rail = profile, budget, profile.rail_of(budget)
        self.power = profile.powered(self.rail)
        self.agreement = {**agreement, profile.costs.exits[-1]: 1.0}
        self.prompt_tokens, self.tokens = prompt_tokens, budget.expected_tokens or REPLY_TOKENS
        self.context = prompt_tokens + self.tokens // 2
        # a median error is 0.674 standard deviations
        self.price_errors = {residual.part: residual.median / 0.674 for residual in profile.residuals}

    def _deviation(self, target: str) -> float:
        """Relative standard deviation of the time that a target is about; noise averages out, except within bursts."""
        tokens = self.tokens if target == "deadline_s" else 1
        noise = self.profile.spread * math.sqrt(min(BURST_TOKENS / tokens, 1.0))
        price_error = self.price_errors.get("prefill steps" if target == "ttft_ms" else "decode steps", 0.0)
        return max(math.hypot(noise, price_error), 1e-6)

    def exit_plan(self, exit_layer: int, allowed: bool) -> ExitPlan:
        costs = self.profile.costs
        tpot_ms, power = costs.steady_ms(exit_layer, self.context), self.profile.power_at(exit_layer, self.rail)
        plan = ExitPlan(
            exit_layer=exit_layer,
            allowed=allowed,
            tpot_ms=tpot_ms,
            ttft_ms=costs.prefill_ms(exit_layer, self.prompt_tokens),
            tokens_per_s=1000 / tpot_ms,
            watts=None if power is None else power.busy_w,
            joules_per_token=self._joules(exit_layer, tpot_ms),
            agreement=self.agreement[exit_layer],
            checks=(),
        )
        return replace(plan, checks=tuple(self._checks(plan)))

    def nearest(self, possible: list[ExitPlan]) -> dict[str, float]:
        """Target that no allowed exit meets → nearest value that one of them meets."""
        found, quantile = {}, quantile_of(self.budget.probability)

        def reachable(plan: ExitPlan, check: Check) -> float:
            """Value of a target that an exit meets. Waits may bring power down to that of the slowest pace."""
            expected = check.expected or 0.0
            if check.probability is not None:
                return expected * math.exp(quantile * self._deviation(check.target))
            return self._least_w(plan, expected) if check.target == "power_w" else expected

        for target in dict.fromkeys(check.target for plan in possible for check in plan.checks):
            checks = [(plan, check) for plan in possible for check in plan.checks if check.target == target]
            values = [reachable(plan, check) for plan, check in checks if check.expected is not None]
            if values and all(check.met is False for _, check in checks):
                found[target] = max(values) if target == "min_agreement" else min(values)
        if not found:
            # Every target is met by some exit, but no exit meets all: use the exit that misses fewest.
            best = min(possible, key=lambda plan: sum(check.met is False for check in plan.checks))
            missed = [check for check in best.checks if check.met is False and check.expected is not None]
            found = {check.target: reachable(best, check) for check in missed}
        return found

    def _least_w(self, plan: ExitPlan, busy_w: float) -> float:
        """Watts at an exit with the longest waits that the budget allows."""
        if self.power is None:
            return busy_w
        idle_w, needs_tps = self.power[0], needed_tps(self.budget, 0, 0.0)
        longest_ms = paced_ms(self.budget, NEARLY_NOTHING, plan.tpot_ms, needs_tps)
        return idle_w + (busy_w - idle_w) * plan.tpot_ms / max(longest_ms, plan.tpot_ms)

    def simulated(self, budget: Budget) -> tuple[dict[int, float], str, list[float], float | None]:
        """Simulate a reply on the profiled device.

        Returns:
            Shares of exits, reason for the last token, gaps between tokens (ms), and joules a token.
        """
        profile, power = self.profile, self.power
        known = {"on_infeasible": "shallowest"} if budget.on_infeasible == "error" else {}
        unknown = dict.fromkeys(_UNKNOWN)
        memory = profile.memory.simulated(len(profile.costs.exits))
        if not memory:
            unknown["memory_mb"] = None
        physics = replace(Physics(noise=profile.spread, throttle_c=math.inf), **memory)
        if power is None:
            keys = ("power_w", "energy_j_per_token", "power_rail", "power_window_s")
            unknown |= {key: Budget.model_fields[key].default for key in keys}
        else:
            physics = replace(physics, idle_w=power[0], busy_w=power[1], rail=self.rail)
        measurable = budget.model_copy(update={**unknown, **known})
        plant = Plant(profile.costs, physics, lambda _: 1.0, prompt_tokens=self.prompt_tokens)
        tokens = simulate(profile.costs, plant, measurable, tokens=max(self.tokens, 2))
        later = tokens[1:]
        counts = dict.fromkeys(profile.costs.exits, 0)
        for token in later:
            counts[token.decision.exit_layer] += 1
        shares = {layer: count / len(later) for layer, count in counts.items() if count}
        gaps_ms = [token.latency_ms for token in later]
        step_j = _mixed(shares, {layer: self._step_j(layer) for layer in shares})
        joules = step_j
        if step_j is not None and any(token.latency_ms > token.step_ms for token in later):  # rows may run in the waits
            joules = None if power is None else fmean(map(self._token_j, later))
        return shares, tokens[self.tokens - 1].decision.reason, gaps_ms, joules

    def _token_j(self, token: SimulatedToken) -> float:
        """Energy of a simulated token. The simulated device draws at every exit what the real one draws at full depth."""
        layer, (idle_w, busy_w) = token.decision.exit_layer, self.power or (0.0, 0.0)
        step_w = 1000 * (self._step_j(layer) or 0.0) / self.profile.costs.steady_ms(layer, self.context)
        ratio = (step_w - idle_w) / busy_w if busy_w else 1.0
        return (idle_w + (token.watts - idle_w) * ratio) * token.latency_ms / 1000

    def _checks(self, plan: ExitPlan) -> list[Check]:
        budget, memory = self.budget, self.profile.memory
        rows = self.prompt_tokens + self.tokens
        held_bytes = memory.sequence_bytes + memory.per_1k_tokens_bytes * rows / 1000
        held_mb = None if memory.loaded_bytes is None else (memory.loaded_bytes + held_bytes) / 1e6
        expectations: dict[str, float | None] = {
            "tpot_ms": plan.tpot_ms,
            "ttft_ms": plan.ttft_ms,
            "deadline_s": (plan.ttft_ms + (self.tokens - 1) * plan.tpot_ms) / 1000,
            "power_w": plan.watts,
            "energy_j_per_token": plan.joules_per_token,
            "memory_mb": held_mb,
            "min_agreement": plan.agreement,
            **dict.fromkeys(_UNKNOWN),
        }
        gap_ms = self._gap_ms(plan.tpot_ms)
        paced_s = (plan.ttft_ms + (self.tokens - 1) * gap_ms) / 1000
        # what is met, with the waits of max_pace_tps, which the end of the time cuts
        paced = {"tpot_ms": gap_ms, "deadline_s": min(paced_s, budget.deadline_s or math.inf)}
        checks = []
        for target, expected in expectations.items():
            asked = getattr(budget, target)
            if asked is None:
                continue
            probability, met = None, None
            if expected is not None and target in _BY_CHANCE:
                probability = probability_of(asked, expected, self._deviation(target))
                met = probability >= budget.probability
            elif expected is not None:
                met = expected >= asked if target == "min_agreement" else expected <= asked
            if target == "power_w" and expected is not None and met is False and budget.pacing:
                # this is the power without waits, which may bring it down
                met = None if self.power is None or self._least_w(plan, expected) <= asked else False
            checks.append(Check(target, asked, paced.get(target, expected) if met else expected, probability, met))
        if any(check.target == "power_w" and check.met is None and check.expected is not None for check in checks):
            # waits for the watts are in none of these
            waits = ("tpot_ms", "deadline_s", "energy_j_per_token")
            checks = [replace(check, met=None) if check.target in waits and check.met else check for check in checks]
        return checks

    def _gap_ms(self, tpot_ms: float) -> float:
        """From one token to the next, with the wait of ``max_pace_tps``."""
        return max(tpot_ms, 1000 / (self.budget.max_pace_tps or math.inf))

    def _joules(self, exit_layer: int, tpot_ms: float) -> float | None:
        """Energy from one token to the next, including that of the idle device while it waits for the pace."""
        wait_s = (self._gap_ms(tpot_ms) - tpot_ms) / 1000
        step_j = self._step_j(exit_layer)
        if step_j is None or not wait_s:
            return step_j
        return None if self.power is None else step_j + self.power[0] * wait_s

    def _step_j(self, exit_layer: int) -> float | None:
        """Energy of a step at the planned context: the measured one, times the ratio of the times of the two steps."""
        power, costs = self.profile.power_at(exit_layer, self.rail), self.profile.costs
        if power is None:
            return None
        context = self.profile.least_context if power.context is None else power.context
        longer = costs.steady_ms(exit_layer, self.context) / costs.steady_ms(exit_layer, context)
        return power.joules_per_token * longer


def _mixed(shares: dict[int, float], values: dict[int, float | None]) -> float | None:
    parts = [(share, values[layer]) for layer, share in shares.items()]
    return None if any(value is None for _, value in parts) else sum(share * (value or 0.0) for share, value in parts)
