"""The profiler on a tiny bundle: its grid, its fit, and the measurements that it keeps when it is stopped."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import onnxruntime
import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.observed import watts
from balcony_edge.device.costs import Bend, ExpertCost, UnitCost, further_experts
from balcony_edge.device.profile import Power
from balcony_edge.device.readings import Reading
from balcony_edge.errors import ContextLengthError, DeviceError, InputError
from balcony_runtime.decoding.prices import split_experts
from balcony_runtime.llm import LLM
from balcony_runtime.profiler import conditions, run
from balcony_runtime.profiler.cells import Bench, Key
from balcony_runtime.profiler.conditions import (
    ConditionWatch,
    Meter,
    measured_rails,
    peak_bytes,
    private_bytes,
    why_no_power,
)
from balcony_runtime.profiler.fit import Pass, errors, fit_unit
from balcony_runtime.profiler.grid import Grid, parse_values
from balcony_runtime.profiler.results import entries, fit_costs
from balcony_runtime.profiler.run import _power, measure_profile
from balcony_runtime.profiler.timing import _rank, chance_ms, summarise
from balcony_runtime.sensors import Absence, Sensors, SourceSample
from balcony_runtime.sensors.system import System

SMALL = {"quick": True, "prompts": (16,), "tokens": 5, "depths": (0, 40), "pending": (2,), "rounds": 2}


@pytest.fixture(scope="module")
def llm(tiny: Any) -> Iterator[LLM]:
    with LLM.open(tiny.path, threads=1) as llm:
        yield llm


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("32,512", (32, 512)),
        ("0-2048+512", (0, 512, 1024, 1536, 2048)),
        ("1-64*4", (1, 4, 16, 64)),
        ("7-9,8, 1", (1, 7, 8, 9)),
    ],
)
def test_sweeps_are_written_as_in_llama_bench(text: str, values: tuple[int, ...]) -> None:
    assert parse_values("-p", text) == values


@pytest.mark.parametrize("text", ["", "a", "1-", "4-2", "1-9+0", "1-9*1", "0-9*2", "-3", "1,,2", "0-999999"])
def test_a_sweep_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^-p "):
        parse_values("-p", text)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompts": (300,)}, "-p: 301 tokens are needed, but this bundle's context holds 256"),
        ({"depths": (250,)}, "-d and -n: 261 tokens are needed"),
        ({"pending": (260,)}, "--pending: "),
        ({"tokens": 2}, "-n 2: the first two tokens of a decode block only warm up"),
        ({"prompts": (0,)}, "-p 0: must be at least 1"),
    ],
)
def test_a_grid_fits_the_context(asked: dict[str, Any], words: str) -> None:
    with pytest.raises((ContextLengthError, InputError), match=words):
        Grid.make(256, quick=True, **asked)
    for context in (16, 17, 256, 2048, 8192):  # the defaults fit every context
        for quick in (True, False):
            grid = Grid.make(context, quick=quick, tokens=3)
            assert all(rows <= end <= context for rows, end in grid.passes())


def test_the_fit_finds_the_prices_that_made_the_passes() -> None:
    true = UnitCost(20.0, 1.5, 6.0, 2.0, 128, 256, (Bend(4, 0.8, 1.0), Bend(32, 0.5, 0.25)))
    points = [(rows, end) for end in (16, 130, 512, 1024, 2048) for rows in (1, 2, 4, 32, 128, 256) if rows <= end]
    passes = [Pass(rows, rows, end, true.pass_ms(rows, end - 1)) for rows, end in points]
    fitted = dataclasses.replace(fit_unit(passes), pass_rows=256)
    assert fitted.key_bucket == 128
    for rows, context in ((1, 700), (3, 90), (20, 1500), (300, 1999), (700, 1200)):
        assert fitted.pass_ms(rows, context) == pytest.approx(true.pass_ms(rows, context), rel=1e-6)
    live = UnitCost(3.0, 0.25, 4.0, 4.0, 1, 256)
    fitted = fit_unit([Pass(rows, 1, end, live.pass_ms(rows, end - 1, 1)) for rows, end in points])
    assert fitted.key_bucket == 1 and fitted.context_ms_per_1k == pytest.approx(4.0, rel=1e-6)
    assert fitted.pass_ms(50, 600, 1) == pytest.approx(live.pass_ms(50, 600, 1), rel=1e-6)


def test_the_fit_of_noisy_passes_has_no_negative_price_and_says_how_far_off_it_is() -> None:
    generator = random.Random(1)
    true = UnitCost(20.0, 0.01, 0.05, 0.001, 1, 256)
    passes = [
        Pass(rows, rows, end, true.pass_ms(rows, end - 1) * generator.gauss(1, 0.05))
        for end in (16, 64, 256)
        for rows in (1, 2, 4, 8, 16)
    ]
    fitted = fit_unit(passes)  # UnitCost refuses a negative price
    assert 0.005 < median(abs(error) for error in errors(fitted, passes)) < 0.06
    assert fitted.first_row_ms == pytest.approx(20.0, rel=0.05)


def test_a_stage_costs_what_it_adds_to_a_step() -> None:
    """A shallow exit whose weights stay in the cache takes 8 ms, although its pass in a full sweep takes 10 ms."""
    passes = {
        Key(kind, layer, rows=rows, context=end - 1): [[ms * (1 + 0.1 * (rows - 1))]]
        for kind, layer, ms in (("catch_up", 4, 10.0), ("catch_up", 8, 10.0), ("balcony", 4, 1.0))
        for end in (16, 300)
        for rows in (1, 2, 8)
    }
    ends = {Key("norm", 8, context=15): [[0.5]], Key("lm_head", 8, context=15): [[2.0]]}
    ends |= {Key("lm_head", 8, rows=rows, context=15): [[2.0 + 0.3 * (rows - 1)]] for rows in (2, 8)}
    steps = {Key("decode", 4, context=100): [[11.0]], Key("decode", 8, context=100): [[22.5]]}
    costs, _ = fit_costs({**passes, **ends, **steps}, (4, 8))
    assert costs.steady_ms(4, 100) == pytest.approx(11.0) and costs.steady_ms(8, 100) == pytest.approx(22.5)
    assert [stage.first_row_ms for stage in costs.stages] == pytest.approx([8.0, 12.0])
    assert (costs.head.first_row_ms, costs.head.marginal_row_ms) == pytest.approx((2.0, 0.3))
    # A price is never below 0; the next stage then takes the difference.
    steps = {Key("decode", 4, context=100): [[1.0]], Key("decode", 8, context=100): [[22.5]]}
    costs, _ = fit_costs({**passes, **ends, **steps}, (4, 8))
    assert costs.stages[0].first_row_ms == 0.0 and costs.steady_ms(8, 100) == pytest.approx(22.5)
    # The price of further rows does not change.
    assert costs.stages[0].pass_ms(8, 100) - costs.stages[0].pass_ms(1, 100) == pytest.approx(7.0)


def test_a_price_includes_the_decision() -> None:
    """A step at a fixed exit takes 14 ms, 0.1 of them in Python, which takes 0.4 ms under a target."""
    passes = {Key("catch_up", 4, rows=rows, context=end - 1): [[9.0 + rows]] for rows in (1, 2, 8) for end in (16, 300)}
    ends = {Key("norm", 4, context=15): [[0.5]], Key("lm_head", 4, context=15): [[2.0]]}
    steps = {Key("decode", 4): [[14.0]], Key("python", 4): [[0.1]], Key("controller", 4): [[0.4]]}
    blocks = {**passes, **ends, **steps}
    costs, _ = fit_costs(blocks, (4,))
    assert costs.overhead_ms == 0.4 and costs.steady_ms(4, 0) == pytest.approx(14.3)
    # The step was measured without a decision, so that is no error of its price.
    (step,) = (found for found in entries(blocks, costs) if found.kind == "decode")
    assert step.predicted_ms == pytest.approx(14.0)


def test_percentiles_and_intervals() -> None:
    assert chance_ms([[10.0], [12.0]]) == pytest.approx(12.71 * 2**0.5 / 2**0.5)
    # With nine rounds, the second and the eighth value bound the median, independent of the outlier.
    assert chance_ms([[value] for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0, 1000.0)]) == pytest.approx(3.5)
    assert summarise([[1.0, 2.0, 3.0, 4.0, 5.0]]).p95_ms == pytest.approx(4.8)
    timing = summarise([[1.0, 2.0], [3.0, 100.0]])
    assert (timing.samples, timing.rounds, timing.p50_ms, timing.max_ms) == (4, 2, 2.5, 100.0)


@pytest.mark.parametrize("rounds", [9, 11, 12, 14, 16, 30])
def test_intervals_hold_the_median_as_often_as_they_say(rounds: int) -> None:
    # Exact: ranks r and n - 1 - r miss the median if at most r of n fair coins fall on one side.
    rank = _rank(rounds)
    assert 2 * sum(math.comb(rounds, k) for k in range(rank + 1)) <= 0.05 * 2**rounds
    assert 2 * sum(math.comb(rounds, k) for k in range(rank + 2)) > 0.05 * 2**rounds
    generator = random.Random(7)
    hits = 0
    for _ in range(400):
        blocks = [[generator.lognormvariate(0, 0.1)] for _ in range(rounds)]
        typical = median(value for block in blocks for value in block)
        hits += abs(typical - 1.0) <= chance_ms(blocks)
    assert 0.9 <= hits / 400 <= 1.0


def test_a_profile_of_a_tiny_bundle(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balcony_runtime.profiler.run.BURST_S", 0.2)
    llm.budget = budget = Budget(exit_layer=3)
    seen: list[float] = []
    grid = Grid.make(256, **SMALL)
    with Sensors([NoPower()]) as sensors:
        profile = measure_profile(
            llm, sensors, grid, lambda _, share: seen.append(share), sustain_s=1.0, command="the command"
        )
    assert llm.budget is budget
    assert seen == sorted(seen) and 0 <= seen[0] <= seen[-1] <= 1
    exits = llm.exit_layers
    keys = {entry.key for entry in profile.entries}
    assert len(keys) == len(profile.entries)
    for layer in exits:
        assert {("decode", layer, None, 1, 0), ("decode", layer, None, 1, 40), ("prefill", layer, None, 16, 0)} <= keys
        assert {("catch_up", layer, None, rows, 39) for rows in (1, 2, 8, 32)} <= keys
    assert {
        ("switch_up", 5, 2, 3, 42),
        ("switch_down", 3, 5, 3, 42),
        ("lm_head", 5, None, 1, 39),
        ("lm_head", 5, None, 2, 15),
    } <= keys
    assert profile.engine.version == onnxruntime.__version__
    assert profile.costs.exits == exits and profile.bundle.fingerprint == llm.engine.manifest.fingerprint
    assert (
        profile.command == "the command" and profile.power == () and "rapl: permission denied" in profile.power_reason
    )
    assert {r.part for r in profile.residuals} >= {"stage 0", "balcony 2", "decode steps", "switch_up steps"}
    assert profile.sustained is not None and profile.sustained.exit_layer == 5 and profile.sustained.seconds >= 1
    model = llm.engine.manifest.model
    caches = 2 * (model.num_layers + 2) * model.kv_width * 4
    rows = (len(exits) + 1) * model.hidden_size * 4
    # Whole pages and the logits take a large share with the few short rows of a tiny model.
    assert 1 <= profile.memory.per_1k_tokens_bytes / (1000 * (caches + rows)) <= 1.6
    assert {e.exit_layer for e in profile.select("controller")} == set(exits)
    assert profile.costs.overhead_ms == pytest.approx(
        median(e.timing.p50_ms for e in profile.select("controller")), rel=0.3
    )
    # Python's share and the engine's calls add up to the gap between tokens.
    for layer in exits:
        (gap,) = (e.timing.p50_ms for e in profile.select("decode", layer) if e.context == 0)
        (python,) = (e.timing.p50_ms for e in profile.select("python", layer) if e.context == 0)
        assert 0 < python < gap


def test_the_memory_of_a_loaded_bundle_is_what_a_ceiling_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (private_bytes() or 0) > 10**7
    for readings, told in (((Reading("psutil:process", "process", 0.0, memory_bytes=7),), 7), ((), None)):
        monkeypatch.setattr(System, "read", lambda _, now_s, readings=readings: SourceSample(readings))
        assert private_bytes() == told


def test_the_peak_is_that_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ru_maxrss` is also that of the program that started it."""
    status = "VmPeak:\t  9000 kB\nVmHWM:\t    7000 kB\nVmRSS:\t    6000 kB"
    monkeypatch.setattr(conditions, "text_of", lambda _: status)
    assert peak_bytes() == 7000 * 1024
    monkeypatch.setattr(conditions, "text_of", lambda _: None)  # macOS, or gVisor
    assert (peak_bytes() or 0) > 10**7


def test_cells_leave_their_sequences_as_they_found_them(llm: LLM) -> None:
    bench = Bench(llm, Grid.make(256, **SMALL))
    cells = bench.cells()
    first = [set(cell.run()) for cell in cells]
    lengths = {use: sequence.length for use, sequence in bench._filled.items()}
    assert [set(cell.run()) for cell in reversed(cells)] == first[::-1]
    assert lengths == {use: sequence.length for use, sequence in bench._filled.items()}
    assert all(length == use[1] for use, length in lengths.items())
    blocks = bench.decode(3, 40)
    assert len(blocks[Key("decode", 3, context=40)]) == 5 - 2


def test_ctrl_c_keeps_what_is_measured(llm: LLM) -> None:
    def stop_in(round_name: str) -> Any:
        """Ctrl-C at the twentieth cell of a round."""
        seen: list[str] = []

        def progress(step: str, _: float) -> None:
            seen.append(step)
            if sum(step.startswith(round_name) for step in seen) == 20:
                raise KeyboardInterrupt

        return progress

    grid = Grid.make(256, **SMALL)
    with Sensors([NoPower()]) as sensors:
        profile = measure_profile(llm, sensors, grid, stop_in("round 2"))
        assert not profile.complete and any("interrupted" in note for note in profile.conditions.notes)
        assert all(entry.timing.rounds >= 1 for entry in profile.entries)
        with pytest.raises(KeyboardInterrupt):
            measure_profile(llm, sensors, grid, stop_in("round 0"))
        with pytest.raises(KeyboardInterrupt):  # passes of one row are measured by then, but not everything
            measure_profile(llm, sensors, grid, stop_in("round 1"))
    with Sensors([Counter()], rate_hz=10) as sensors:  # one that reports throttling
        notes = measure_profile(llm, sensors, grid, stop_in("round 2")).conditions.notes
        assert any(note.startswith("clocks were held down") for note in notes)


class NoPower:
    """A source that may not be read."""

    name = "rapl"

    def discover(self) -> None:
        pass

    def read(self, now_s: float) -> SourceSample:
        return SourceSample(absences=(Absence("rapl", "permission denied", "sudo chmod a+r it"),))

    def close(self) -> None:
        pass


class Counter(NoPower):
    """An energy counter that grows by 20 J a second, and a thermometer that reports throttling."""

    def read(self, now_s: float) -> SourceSample:
        return SourceSample(
            (
                Reading("rapl:package-0", "cpu", now_s, joules=20.0 * now_s),
                Reading("thermal:cpu", "cpu", now_s, celsius=71.0, throttled=True),
            )
        )


class TwoSockets(NoPower):
    """Two packages from one source, a second source for the first package, and two readings of the board."""

    def read(self, now_s: float) -> SourceSample:
        watts = {"rapl:package-0": 60.0, "rapl:package-1": 55.0, "hwmon:package-0": 61.0}
        boards = {"ina238:VIN": 140.0, "ina238:VDD": 20.0}
        return SourceSample(
            (
                *(Reading(source, "cpu", now_s, watts=value) for source, value in watts.items()),
                *(Reading(source, "board", now_s, watts=value) for source, value in boards.items()),
            )
        )


def test_parts_of_a_rail_add_up_as_they_do_for_the_controller() -> None:
    with Sensors([TwoSockets()], rate_hz=10) as sensors:
        rails = measured_rails(sensors)
        assert rails == {"board": ("ina238:VIN",), "cpu": ("rapl:package-0", "rapl:package-1")}
        found = Meter(sensors, rails).run(0.3)
        assert found == {"board": pytest.approx(140.0, rel=1e-3), "cpu": pytest.approx(115.0, rel=1e-3)}
        for rail, mean_w in found.items():
            sample = watts(sensors.latest(), rail, time.monotonic())
            assert sample is not None and sample.value == pytest.approx(mean_w, rel=1e-3)


def test_power_is_the_slope_of_the_energy_counter() -> None:
    with Sensors([Counter()], rate_hz=10) as sensors:
        rails = measured_rails(sensors)
        assert rails == {"cpu": ("rapl:package-0",)}
        watch = ConditionWatch(sensors)
        assert Meter(sensors, rails).run(0.5) == {"cpu": pytest.approx(20.0, rel=1e-6)}
        watch.look()
        conditions = watch.report()
        assert conditions.others_cpu_share is not None and 0 <= conditions.others_cpu_share <= 1
        assert conditions.celsius == (71.0, 71.0) and conditions.throttled is True


def test_energy_per_token_is_power_over_speed(llm: LLM) -> None:
    grid = dataclasses.replace(Grid.make(256, **SMALL), power_s=0.3)
    with Sensors([Counter()], rate_hz=10) as sensors:
        profile = measure_profile(llm, sensors, grid, lambda *_: None)
    assert [power.exit_layer for power in profile.power] == list(llm.exit_layers) and profile.power_reason is None
    for power in profile.power:
        assert power.busy_w == pytest.approx(20.0, rel=1e-6) == power.idle_w
        # Blocks of five tokens, a prompt of one token, and time between blocks: more than one gap, less than 20 gaps.
        (entry,) = (e for e in profile.select("decode", power.exit_layer) if e.context == 0)
        assert entry.timing.min_ms < power.joules_per_token / 20 * 1000 < 20 * entry.timing.p95_ms


def test_why_there_is_no_power_is_one_line_with_its_cure() -> None:
    with Sensors([NoPower()]) as sensors:
        assert why_no_power(sensors) == "no sensor measures power: rapl: permission denied (sudo chmod a+r it)"


def test_the_price_of_experts_is_fitted_next_to_that_of_rows() -> None:
    share = 2 / 8
    true = UnitCost(3.0, 0.3, 0.2, 0.1, key_bucket=1, pass_rows=512, experts=ExpertCost(share, 8.0))
    points = [(rows, end) for end in (16, 512, 2048) for rows in (1, 2, 4, 8, 16, 32, 64, 128) if rows <= end]
    passes = [Pass(rows, rows, end, true.pass_ms(rows, end - 1)) for rows, end in points]
    fitted = fit_unit(passes, share)
    assert fitted.experts is not None and fitted.experts.all_ms == pytest.approx(8.0, rel=0.01)
    assert fitted.marginal_row_ms == pytest.approx(0.3, rel=0.01)
    for rows in (3, 5, 12):  # between the measured numbers of rows, where straight lines are too low
        assert fitted.pass_ms(rows, 100) == pytest.approx(true.pass_ms(rows, 100), rel=0.01)
        assert fit_unit(passes).pass_ms(rows, 15) < 0.995 * true.pass_ms(rows, 15)
    assert fit_unit([Pass(1, 1, 16, 2.0)], share).experts is None


@pytest.mark.parametrize(("marginal_ms", "all_ms"), [(0.2, 5.0), (0.0, 5.0), (0.7, 0.0)])
def test_a_short_measurement_separates_rows_and_experts(marginal_ms: float, all_ms: float) -> None:
    further_ms = {rows: (rows - 1) * marginal_ms + all_ms * further_experts(0.25, rows) for rows in (3, 9)}
    found_ms, experts = split_experts(0.25, further_ms)
    assert found_ms == pytest.approx(marginal_ms, abs=1e-9)
    assert (0.0 if experts is None else experts.all_ms) == pytest.approx(all_ms, abs=1e-9)
    # noise that neither explains: a convex price is all rows, and no price is below 0
    assert split_experts(0.25, {3: 0.0, 9: 8.0})[1] is None
    assert split_experts(0.25, {3: -1.0, 9: -1.0}) == (0.0, None)


def test_prompts_run_on_an_empty_sequence(llm: LLM) -> None:
    """The pool would give back the rows of the last round's prompt."""
    bench = Bench(llm, Grid.make(256, **SMALL | {"prompts": (64,)}))
    assert llm.pool is not None
    before = llm.pool.reused.rows
    for _ in range(3):
        bench._prefill(llm.exit_layers[-1], 64)
    assert llm.pool.reused.rows == before


class Late(NoPower):
    """A gauge that shows the power of 0.3 s ago: 5 W without load, 20 W while ``busy`` is set."""

    def __init__(self) -> None:
        self.past: list[tuple[float, float]] = [(0.0, 20.0)]

    def read(self, now_s: float) -> SourceSample:
        watts = next(value for time_s, value in reversed(self.past) if time_s <= now_s - 0.3)
        return SourceSample((Reading("ina:board", "board", now_s, watts=watts),))


def test_the_power_is_not_that_of_the_load_before(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    source, bench, drawn = Late(), Bench(llm, Grid.make(256, **SMALL)), {2: 11.0, 3: 14.0, 5: 20.0}
    decode = bench.decode

    def loaded(layer: int, depth: int) -> Any:
        if source.past[-1][1] != drawn[layer]:
            source.past.append((time.monotonic(), drawn[layer]))
        return decode(layer, depth)

    monkeypatch.setattr(bench, "decode", loaded)
    rails: dict[Any, tuple[str, ...]] = {"board": ("ina:board",)}
    with Sensors([source], rate_hz=10) as sensors:
        source.past.append((time.monotonic(), 5.0))  # the load has just ended
        found, lost = _power(bench, Meter(sensors, rails), rails, 0.5)
    assert {power.idle_w for power in found} == {5.0} and lost == []
    assert {power.exit_layer: power.busy_w for power in found} == pytest.approx(drawn, rel=1e-3)


class Unplugged(NoPower):
    """A counter of the CPU, and one of the board that ends after the measurement without load."""

    def __init__(self) -> None:
        self.there = True

    def read(self, now_s: float) -> SourceSample:
        board = (Reading("ina:board", "board", now_s, joules=40.0 * now_s),) if self.there else ()
        return SourceSample((*board, Reading("rapl:package-0", "cpu", now_s, joules=20.0 * now_s)))


def test_a_rail_that_vanishes_is_named_and_not_half_there(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    source, grid = Unplugged(), dataclasses.replace(Grid.make(256, **SMALL), power_s=0.3)

    def then_unplugged(**given: Any) -> Any:
        source.there = False
        return Power(**given)

    monkeypatch.setattr(run, "Power", then_unplugged)
    with Sensors([source], rate_hz=10) as sensors:
        profile = measure_profile(llm, sensors, grid, lambda *_: None)
    assert [power.rail for power in profile.power] == ["cpu"] * 3 and profile.power_reason is None
    assert "power of the board rail was lost while it was measured" in profile.conditions.notes


class Hot(Counter):
    """A device that is too hot only while its power is measured."""

    hot = False

    def read(self, now_s: float) -> SourceSample:
        return SourceSample(tuple(dataclasses.replace(one, throttled=self.hot) for one in super().read(now_s).readings))


def test_clocks_that_are_held_down_while_power_is_measured_are_named(llm: LLM) -> None:
    source, grid = Hot(), dataclasses.replace(Grid.make(256, **SMALL), power_s=0.3)

    def progress(step: str, _: float) -> None:
        source.hot = step == "power"

    with Sensors([source], rate_hz=10) as sensors:
        conditions = measure_profile(llm, sensors, grid, progress).conditions
    assert conditions.throttled is True
    assert any(note.startswith("clocks were held down while power was measured") for note in conditions.notes)


def test_an_error_after_the_measurement_keeps_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> Any:
        raise DeviceError("CUDA: the launch failed")

    with Sensors([Counter()], rate_hz=10) as sensors:
        monkeypatch.setattr(run, "_power", lost)
        profile = measure_profile(llm, sensors, Grid.make(256, **SMALL), lambda *_: None)
        assert not profile.complete and profile.power_reason == "the profile ended before it"
        assert any(note.endswith("until then: CUDA: the launch failed") for note in profile.conditions.notes)
        assert any(note.startswith("clocks were held down") for note in profile.conditions.notes)
        monkeypatch.setattr(run, "_rounds", lost)
        with pytest.raises(DeviceError):
            measure_profile(llm, sensors, Grid.make(256, **SMALL), lambda *_: None)


def test_an_error_in_the_sustained_run_keeps_what_it_measured(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = iter([[1.0], [2.0]])

    def then_lost(_: Bench) -> list[float]:
        if (found := next(blocks, None)) is None:
            raise DeviceError("CUDA: the launch failed")
        return found

    monkeypatch.setattr(run, "BURST_S", 0.0)
    monkeypatch.setattr(run, "_gaps", then_lost)
    with Sensors([NoPower()]) as sensors:
        profile = measure_profile(llm, sensors, Grid.make(256, **SMALL), lambda *_: None, sustain_s=60.0)
    assert profile.sustained is not None and profile.sustained.slowdown == 2.0 and not profile.complete
    assert any(note.endswith("until then: CUDA: the launch failed") for note in profile.conditions.notes)


def test_watts_of_a_moment_are_the_boards() -> None:
    with Sensors([TwoSockets()], rate_hz=10) as sensors:
        assert ConditionWatch(sensors).watts() == 140.0
