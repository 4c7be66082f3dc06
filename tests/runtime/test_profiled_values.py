"""The numbers of a device profile, from samples that are known."""

from __future__ import annotations

import errno
import math
import os
import time
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from balcony_edge.bundle.manifest import Estimate
from balcony_edge.device.costs import CostModel
from balcony_edge.device.readings import Reading
from balcony_runtime.llm import LLM
from balcony_runtime.profiler import conditions, run
from balcony_runtime.profiler.cells import Bench, Key
from balcony_runtime.profiler.conditions import ConditionWatch, Meter
from balcony_runtime.profiler.grid import Grid
from balcony_runtime.profiler.results import entries, fit_costs, quality_figures, spread
from balcony_runtime.profiler.timing import chance_ms, summarise
from balcony_runtime.sensors import Sensors
from tests.runtime.test_profiler import SMALL, Counter, NoPower

MOVES = {
    Key(kind, layer, rows=rows, context=end - 1): [[first_ms + further_ms * (rows - 1)]]
    for kind, layer, first_ms, further_ms in (
        ("catch_up", 4, 10.0, 1.0),
        ("catch_up", 8, 12.0, 1.2),
        ("balcony", 4, 1.0, 0.1),
    )
    for end in (16, 300)
    for rows in (1, 2, 8)
} | {Key("norm", 8, context=15): [[0.5]], Key("lm_head", 8, context=15): [[2.0]]}


def costs_with(switches: dict[Key, list[list[float]]]) -> CostModel:
    return fit_costs(MOVES | switches, (4, 8))[0]


def test_a_switch_costs_what_it_takes_beyond_its_rows() -> None:
    assert costs_with({}).switch_ms == 0.0
    # three rows at the second stage: 10 + 12 + 2 × 1.2 + 0.5 + 2
    up = {Key("switch_up", 8, 4, rows=3, context=102): [[26.9 + 0.7]]}
    assert costs_with(up).switch_ms == pytest.approx(0.7)
    # three rows at the balcony: 10 + 1 + 2 × 0.1 + 2
    down = {Key("switch_down", 4, 8, rows=3, context=102): [[13.2 + 0.4]]}
    assert costs_with(down).switch_ms == pytest.approx(0.4)
    assert costs_with({Key("switch_up", 8, 4, rows=3, context=102): [[20.0]]}).switch_ms == 0.0


def test_a_long_block_is_priced_at_its_middle() -> None:
    """`-d 0 -n 1003`: attention takes 10 ms per 1,000 keys, so the block's median is 5 ms above a step after 0 tokens."""
    passes = {
        Key("catch_up", 4, rows=rows, context=end - 1): [[9.0 + rows + 0.01 * end]]
        for end in (16, 300, 2000)
        for rows in (1, 2, 8)
    }
    ends = {Key("norm", 4, context=15): [[0.5]], Key("lm_head", 4, context=15): [[2.0]]}
    block = [12.5 + 0.01 * (context + 1) for context in range(2, 1003)]
    blocks = {**passes, **ends, Key("decode", 4): [block, block]}
    costs, _ = fit_costs(blocks, (4,))
    assert costs.steady_ms(4, 0) == pytest.approx(12.51)
    (step,) = (found for found in entries(blocks, costs) if found.kind == "decode")
    assert step.context == 0 and step.predicted_ms == pytest.approx(step.timing.p50_ms)


def test_prices_know_how_many_rows_a_pass_has(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BURST_S", 0.1)
    with LLM.open(tiny.path, threads=1) as llm, Sensors([NoPower()]) as sensors:
        scores = 4 * llm.engine.manifest.model.num_attention_heads * llm.engine.max_length  # bytes for one row
        monkeypatch.setattr("balcony_runtime.token_sequence.MAX_SCORE_BYTES", 64 * scores)
        costs = run.measure_profile(llm, sensors, Grid.make(256, **SMALL), lambda *_: None).costs
    assert {unit.pass_rows for unit in (*costs.stages, *costs.balconies[:-1])} == {64}


def test_the_spread_is_that_of_the_log_normal() -> None:
    ratios = [math.exp(0.1 * NormalDist().inv_cdf((place + 0.5) / 1000)) for place in range(1000)]
    fast, slow = ([factor * ratio for ratio in ratios] for factor in (5.0, 9.0))
    blocks = {Key("decode", 4, context=5): [fast[:500], fast[500:]], Key("decode", 8, context=5): [slow]}
    assert spread(blocks) == pytest.approx(0.1, rel=0.02)
    assert spread({Key("prefill", 4, rows=5): [fast]}) == 0.0


def test_figures_of_an_evaluation_keep_their_names() -> None:
    """Plans and budgets with ``min_agreement`` go by them."""
    agreement, kl, perplexity, average = (Estimate(value=value, stderr=value / 10) for value in (0.5, 0.25, 8.0, 40.0))
    text = SimpleNamespace(agreement=agreement, kl=kl, perplexity=perplexity)
    tasks = SimpleNamespace(tasks=("arc", "piqa"), average=average)
    shallow = SimpleNamespace(exit_layer=4, quality=SimpleNamespace(text={"wiki": text}, summary=tasks))
    manifest: Any = SimpleNamespace(exits=(shallow, SimpleNamespace(exit_layer=8, quality=None)))
    found = [(one.exit_layer, one.metric, one.on, one.value, one.stderr) for one in quality_figures(manifest)]
    assert found == [
        (4, "agreement", "wiki", 0.5, 0.05),
        (4, "kl", "wiki", 0.25, 0.025),
        (4, "perplexity", "wiki", 8.0, 0.8),
        (4, "average", "arc, piqa", 40.0, 4.0),
    ]


def test_intervals_of_few_rounds() -> None:
    assert chance_ms([[1.0], [2.0], [3.0]]) == pytest.approx(4.30 / math.sqrt(3))
    assert chance_ms([[1.0, 2.0, 3.0]]) == pytest.approx(1.96 * 1.253 / math.sqrt(3))
    assert chance_ms([[7.0]]) == 7.0
    assert summarise([[10.0] * 3] * 9).uncertainty_ms == pytest.approx(0.2)  # two processes of one build differ by 2 %


@pytest.mark.parametrize(("own_s", "share", "note"), [(3.0, 0.5, True), (8.0, 0.0, False), (7.6, 0.04, False)])
def test_a_busy_device_is_noted(own_s: float, share: float, note: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(0.0, 0.0, 0.0), (10.0, 8.0, own_s)])
    monkeypatch.setattr(conditions, "_cpu_seconds", lambda: next(times))
    with Sensors([NoPower()]) as sensors:
        found = ConditionWatch(sensors).report()
    assert found.others_cpu_share == pytest.approx(share)
    assert any(one.startswith("other processes used") for one in found.notes) is note


def test_the_time_of_others_is_busy_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten seconds of all CPUs four are idle, and three are ours: one is of a program that we started."""
    own = iter([(1.0, 1.0, 0.0, 0.0, 50.0), (2.0, 2.0, 0.5, 0.5, 55.0)])
    kinds = iter([(100.0, 50.0, 7.0), (104.0, 55.0, 8.0)])
    monkeypatch.setattr(os, "times", lambda: next(own))
    monkeypatch.setattr(conditions, "cpu_seconds", lambda: next(kinds))
    with Sensors([NoPower()]) as sensors:
        found = ConditionWatch(sensors).report()
    assert found.others_cpu_share == pytest.approx(0.3)


def test_a_system_that_hides_its_load_tells_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's ProcSubset=pid leaves neither /proc/stat nor /proc/loadavg."""

    def hidden() -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", hidden)
    monkeypatch.setattr(os, "getloadavg", hidden)
    with Sensors([NoPower()]) as sensors:
        found = ConditionWatch(sensors).report()
    assert (found.others_cpu_share, found.load_1m, found.notes) == (None, None, ())


def test_a_pass_of_many_rows_is_timed_whole(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM.open(tiny.path, threads=1) as llm:
        bench = Bench(llm, Grid.make(256, **SMALL))
        state = bench._sequence("pass", 40, room=0).state
        monkeypatch.setattr(state, "run_stage", lambda stage, start, stop: time.sleep(0.002 * (stop - start)))
        found = bench._sweep(8, 40)
    assert all(found[Key("catch_up", layer, rows=8, context=39)][0] >= 16.0 for layer in bench.exits)


def test_joules_are_those_of_one_token(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM.open(tiny.path, threads=1) as llm, Sensors([Counter()], rate_hz=10) as sensors:
        bench = Bench(llm, Grid.make(256, **SMALL | {"depths": (40,)}))
        monkeypatch.setattr(bench, "decode", lambda *_: time.sleep(0.05))
        rails: dict[Any, tuple[str, ...]] = {"cpu": ("rapl:package-0",)}
        found, lost = run._power(bench, Meter(sensors, rails), rails, 0.3)
    assert len(found) == len(llm.exit_layers) and not lost
    for power in found:  # 20 W, five tokens in 50 ms or a little more
        assert 0.9 <= (power.joules_per_token or 0) / (20 * 0.05 / 5) <= 2.5
    assert {power.context for power in found} == {42}  # that of the third of five tokens


@pytest.mark.parametrize(("answers_s", "found"), [(math.inf, {"cpu": 20.0}), (0.0, {})])
def test_a_block_that_takes_half_a_minute_has_watts(
    answers_s: float, found: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 tokens of 1.5 s, where a run takes 5 s; a sensor that has stopped answering ends it."""
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(conditions, "time", SimpleNamespace(monotonic=lambda: clock.now_s))

    def latest() -> tuple[Reading, ...]:
        now_s = clock.now_s
        return (Reading("rapl:package-0", "cpu", now_s, joules=20.0 * now_s),) if now_s < 100 + answers_s else ()

    def block() -> None:
        clock.now_s += 27.0

    sensors: Any = SimpleNamespace(latest=latest)
    assert Meter(sensors, {"cpu": ("rapl:package-0",)}).run(5.0, block) == pytest.approx(found)
    assert clock.now_s == 154.0


def test_the_sustained_speed_is_that_of_the_end(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []

    def block(_: Bench) -> list[float]:
        """Hot after 0.7 of the second."""
        begun.append(time.perf_counter())
        time.sleep(0.02)
        return [1.0] if begun[-1] < begun[0] + 0.7 else [3.0]

    monkeypatch.setattr(run, "_gaps", block)
    with LLM.open(tiny.path, threads=1) as llm, Sensors([NoPower()]) as sensors:
        bench = Bench(llm, Grid.make(256, **SMALL))
        found, stopped = run._sustain(bench, 1.0, [[1.0]], ConditionWatch(sensors), lambda *_: None)
    assert found is not None and stopped is None
    assert (found.burst.p50_ms, found.sustained.p50_ms, found.slowdown) == (1.0, 3.0, 3.0)
    assert found.moments[0].p50_ms == 1.0 and found.moments[-1].p50_ms == 3.0
