"""Impossible values are dropped and counted; an energy counter only grows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcony_edge.device.readings import Reading
from balcony_runtime.sensors.plausible import LIMITS, MAX_WATTS, Plausibility

READING = Reading("x", "gpu", 1.0, watts=5.0, celsius=50.0, utilization=0.5, charge=1.0, memory_bytes=7)


def test_what_can_be_passes_unchanged() -> None:
    plausibility = Plausibility()
    assert plausibility.clean(READING) is READING
    assert (plausibility.dropped, plausibility.last_dropped) == (0, "")


@pytest.mark.parametrize(
    ("field", "value"),
    [("celsius", -40000.0), ("celsius", -256.0), ("celsius", math.nan), ("watts", -0.4), ("watts", math.inf),
     ("watts", 4294967.295), ("utilization", 1.2), ("utilization", -0.1), ("own_utilization", math.nan), ("charge", 1.3),
     ("memory_bytes", -1), ("joules", -5.0), ("joules", math.inf)],
)  # fmt: skip
def test_what_cannot_be_is_dropped_alone(field: str, value: float) -> None:
    plausibility = Plausibility()
    cleaned = plausibility.clean(replace(READING, **{field: value}))
    assert cleaned == replace(READING, **{field: None})
    assert plausibility.dropped == 1 and plausibility.last_dropped == f"x: {field} = {value:g}"


def test_a_reading_with_nothing_left_is_none() -> None:
    plausibility = Plausibility()
    assert plausibility.clean(Reading("t", "cpu", 1.0, celsius=-256.0)) is None
    assert plausibility.clean(Reading("t", "cpu", 1.0)) is None
    assert plausibility.clean(Reading("t", "cpu", 1.0, throttled=False)) is not None
    assert plausibility.dropped == 1


def joules(plausibility: Plausibility, time_s: float, value: float) -> float | None:
    cleaned = plausibility.clean(Reading("e", "gpu", time_s, watts=1.0, joules=value))
    assert cleaned is not None
    return cleaned.joules


def test_a_counter_that_starts_again_goes_on_where_it_was() -> None:
    plausibility = Plausibility()
    series = [(0.0, 1000.0), (0.2, 1010.0), (0.4, 3.0), (0.6, 8.0), (0.8, 5e9), (1.0, 5e9 + 2), (1.2, 5e9 + 2)]
    assert [joules(plausibility, *point) for point in series] == [1000.0, 1010.0, None, 1015.0, None, 1017.0, 1017.0]
    assert plausibility.dropped == 2 and plausibility.last_dropped == "e: joules jumped by 5e+09 in 0.2 s"


def test_rounding_never_takes_a_counter_below_zero() -> None:
    plausibility = Plausibility()
    series = [(0.0, 0.0), (0.1, 9007200328482816.0), (0.2, 3.0), (0.3, 2.0), (0.4, 2.0)]
    assert [joules(plausibility, *point) for point in series] == [0.0, None, None, None, 0.0]


def test_counters_of_one_source_do_not_mix() -> None:
    plausibility = Plausibility()
    for name, value in (("a", 100.0), ("b", 5.0), ("a", 101.0), ("b", 6.0)):
        cleaned = plausibility.clean(Reading(name, "cpu", 0.0, joules=value))
        assert cleaned is not None and cleaned.joules == value


anything = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True, width=32))


@given(st.lists(st.tuples(st.floats(0, 10), st.fixed_dictionaries(dict.fromkeys(LIMITS, anything)))))
def test_nothing_impossible_gets_through(steps: list[tuple[float, dict[str, float | None]]]) -> None:
    plausibility, now_s, last_j, last_s = Plausibility(), 0.0, None, 0.0
    for elapsed_s, fields in steps:
        now_s += elapsed_s
        cleaned = plausibility.clean(Reading("x", "gpu", now_s, **fields))
        for field, (least, most) in LIMITS.items():
            value = None if cleaned is None else getattr(cleaned, field)
            assert value is None or (math.isfinite(value) and least <= value <= most)
        if cleaned is not None and cleaned.joules is not None:
            if last_j is not None:
                rise = cleaned.joules - last_j
                assert -1e-6 * last_j <= rise <= MAX_WATTS * (now_s - last_s + 1) * 1.001 + 1e-6 * last_j
            last_j, last_s = cleaned.joules, now_s
