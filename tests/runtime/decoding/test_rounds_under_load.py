"""Rounds of drafts on a device with other load."""

from __future__ import annotations

from balcony_runtime.decoding.speculate import Speculator, Standing
from tests.runtime.decoding.test_speculate import EXITS, NONE, costs, planned


def test_a_load_counts_once_in_the_time_of_a_round() -> None:
    """The time that a target leaves is one at slowdown 1 already, and rounds at twice their price have the load in them."""
    speculator, standing = Speculator(EXITS, {2: 0.9, 3: 0.9}), Standing(50, 100, NONE)
    found = planned(speculator, costs())
    assert found is not None
    speculator._plain_ratio = speculator._round_ratio = 2.0
    assert speculator.plan(costs(), standing, found.price_ms + 0.01, 2.0) == found
    # without a load they are dearer than they seem, and do not fit
    assert speculator.plan(costs(), standing, found.price_ms + 0.01, 1.0) is None
