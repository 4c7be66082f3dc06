"""Rounds of drafts on a device with other load, and on other text than what was evaluated."""

from __future__ import annotations

from dataclasses import replace

from balcony_edge.device.costs import UnitCost
from balcony_runtime.decoding.policy import PROBE_TOKENS
from balcony_runtime.decoding.speculate import Speculator, Standing
from tests.runtime.decoding.test_speculate import BY_HAND, EXITS, NONE, costs, planned


def test_a_load_counts_once_in_the_time_of_a_round() -> None:
    """The time that a target leaves is one at slowdown 1 already, and rounds at twice their price have the load in them."""
    speculator, standing = Speculator(EXITS, {2: 0.9, 3: 0.9}), Standing(50, 100, NONE)
    found = planned(speculator, costs())
    assert found is not None
    speculator._plain_ratio = speculator._round_ratio = 2.0
    assert speculator.plan(costs(), standing, found.price_ms + 0.01, 2.0) == found
    # without a load they are dearer than they seem, and do not fit
    assert speculator.plan(costs(), standing, found.price_ms + 0.01, 1.0) is None


def test_drafts_that_are_better_than_the_evaluated_ones_are_used_within_thousands_of_tokens() -> None:
    """Between trials nothing is learned of them, and each may judge one draft only. Here two of three must be kept."""
    speculator, rounds = Speculator(EXITS, {2: 0.2, 3: 0.2}), 0
    prices = replace(BY_HAND, stages=(UnitCost(40.0, 1.0), UnitCost(10.0, 1.0), UnitCost(20.0, 1.0)))
    for _ in range(9 * PROBE_TOKENS):
        if found := planned(speculator, prices):
            speculator.learn(found, found.drafts, found.price_ms)
            rounds += 1
        else:
            speculator.learn_plain(72.5, 72.5)
    assert rounds > PROBE_TOKENS


def test_a_load_that_begins_makes_two_rounds_late() -> None:
    """The controller learns nothing of it in rounds, and a mean over ten of them would go on with rounds that are late."""
    speculator, standing, rounds = Speculator(EXITS, {2: 0.9, 3: 0.9}), Standing(50, 100, NONE), 0
    found = planned(speculator, costs())
    assert found is not None
    most_ms = 2 * found.price_ms
    while (late := speculator.plan(costs(), standing, most_ms)) is not None:
        speculator.learn(late, late.drafts, 3 * late.price_ms)
        rounds += 1
    assert rounds == 2
    speculator.learn(found, found.drafts, found.price_ms)  # the load has ended
    assert speculator.plan(costs(), standing, most_ms) is not None
