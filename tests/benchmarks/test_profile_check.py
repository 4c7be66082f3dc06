"""The judgement of benchmarks/control/profile_check.py on a device that does what its profile says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_edge.device.profile import DeviceProfile
from balcony_runtime.profiler.cells import Key, Switch
from benchmarks.control import profile_check

SHIPPED = Path(__file__).parents[2] / "profiles" / "devices" / "server-2-cores-epyc-int4.json"


def test_steps_at_fixed_exits_are_compared_with_prices_without_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """These steps have no decision, and the profile's prices have one: 0.04 ms, 1 % of a step."""
    profile = DeviceProfile.load(SHIPPED)
    fixed_ms = median(entry.timing.p50_ms for entry in profile.select("python") if entry.context == 0)
    costs, ones = replace(profile.costs, overhead_ms=fixed_ms), (1,) * len(profile.costs.exits)

    def switched(_: Any, __: Any, ___: int, after: int, tokens: list[int], ____: int) -> Switch:
        return Switch(ones, ones, len(tokens), costs.step_ms(after, ones, ones, len(tokens)))

    def decode(exit_layer: int, context: int) -> dict[Key, list[float]]:
        (entry,) = (one for one in profile.select("decode", exit_layer) if one.context == context)
        return {Key("decode", exit_layer, context=context): [entry.timing.p50_ms]}

    monkeypatch.setattr(profile_check, "switched", switched)
    monkeypatch.setattr(profile_check, "Bench", lambda *_: SimpleNamespace(decode=decode))
    sequence = SimpleNamespace(advance=lambda *_: None, catch_up=lambda: None)
    model = SimpleNamespace(context_length=2048, vocab_size=1000)
    engine = SimpleNamespace(manifest=SimpleNamespace(model=model), new_sequence=lambda **_: sequence)
    llm: Any = SimpleNamespace(engine=engine)
    found = profile_check.held_out(llm, profile, 10)
    assert (found["median_error"], found["p95_error"], found["bias"], found["drift"]) == (0.0, 0.0, 0.0, 1.0)
