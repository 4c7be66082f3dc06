"""The profile file: what it keeps, what it refuses and in which words; planning with it, comparing two of them, tables."""

from __future__ import annotations

import csv
import io
import json
import math
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from balcony_edge.budget import Budget, load_budget
from balcony_edge.device.compare import compare_profiles
from balcony_edge.device.costs import Bend, CostModel, ExpertCost, UnitCost
from balcony_edge.device.machine import Machine, this_device
from balcony_edge.device.profile import (
    BundleFacts,
    Conditions,
    DeviceProfile,
    EngineFacts,
    Entry,
    MemoryUse,
    Power,
    QualityFigure,
    Residual,
    Timing,
)
from balcony_edge.device.tables import render
from balcony_edge.errors import BudgetError, ProfileError
from balcony_edge.simulation.plan import _mixed, make_plan

DEVICE = Machine(board=None, cpu="Fast", cpus=2, architecture="x86_64", memory_bytes=8 * 10**9, system="Linux 6")
STAGE = UnitCost(10.0, 1.0, 2.0, 0.5, 128, 512, (Bend(4, 0.5, 0.25),))
COSTS = CostModel((4, 8), (STAGE, STAGE), (UnitCost(2.0), UnitCost(1.0)), UnitCost(4.0), 0.5)
SHIPPED = sorted((Path(__file__).parents[2] / "profiles" / "devices").glob("*.json"))


def timing(p50_ms: float, uncertainty_ms: float = 0.1) -> Timing:
    return Timing(
        samples=40,
        rounds=5,
        p50_ms=p50_ms,
        p95_ms=p50_ms * 1.1,
        p99_ms=p50_ms * 1.2,
        mean_ms=p50_ms,
        min_ms=p50_ms * 0.9,
        max_ms=p50_ms * 2,
        uncertainty_ms=uncertainty_ms,
    )


def entry(kind: Any, exit_layer: int, p50_ms: float, uncertainty_ms: float = 0.1, **keys: Any) -> Entry:
    return Entry(kind=kind, exit_layer=exit_layer, timing=timing(p50_ms, uncertainty_ms), **keys)


def make_profile(**changes: Any) -> DeviceProfile:
    values: dict[str, Any] = {
        "created": "2026-01-01T00:00:00+00:00",
        "tool": "0.1.0",
        "command": "balcony-edge profile bundle",
        "complete": True,
        "device": DEVICE,
        "bundle": BundleFacts(
            model="tiny",
            fingerprint="f" * 64,
            precision="float32",
            exit_layers=(4, 8),
            context_length=512,
            bytes_per_token={4: 100, 8: 200},
        ),
        "engine": EngineFacts(name="onnxruntime", version="1.32.0", threads=2),
        "conditions": Conditions(seconds=10.0),
        "entries": (
            entry("decode", 4, 16.8, context=128, predicted_ms=17.0),
            entry("decode", 8, 26.0, context=128, predicted_ms=26.0),
            entry("prefill", 8, 80.0, rows=64),
        ),
        "costs": COSTS,
        "residuals": (Residual(part="decode steps", points=2, median=0.0, p95=0.01),),
        "spread": 0.05,
        "memory": MemoryUse(loaded_bytes=10**9, peak_bytes=2 * 10**9, per_1k_tokens_bytes=10**7),
    }
    return DeviceProfile(**values | changes)


def test_the_page_of_profiling_names_every_price() -> None:
    """A program in another language computes what a step costs from the file."""
    page = (Path(__file__).parents[2] / "docs" / "profiling.md").read_text(encoding="utf-8")
    keys = {key.name for kind in (CostModel, UnitCost, Bend, ExpertCost) for key in fields(kind)}
    assert not [key for key in sorted(keys) if f"`{key}`" not in page]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    profile = make_profile(
        power=(Power(exit_layer=4, rail="cpu", source="r", busy_w=9, idle_w=3, joules_per_token=0.1),)
    )
    (tmp_path / "p.json").write_text(render(profile, "json"), encoding="utf-8")
    loaded = DeviceProfile.load(tmp_path / "p.json")
    assert loaded == profile and loaded.costs == COSTS
    assert loaded.joules_per_token(4, "cpu") == 0.1
    assert loaded.joules_per_token(4, "board") is None and loaded.joules_per_token(8, "cpu") is None
    (tmp_path / "p.json").write_text(render(profile, "json"), encoding="utf-8-sig")  # as PowerShell writes it
    assert DeviceProfile.load(tmp_path / "p.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 99}, "schema_version = 99, but this version of balcony-edge reads 1"),
        ({"schema_version": True}, "schema_version = True"),
        ({"spread": -1}, "spread: Input should be greater than or equal to 0"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"costs": {"exits": [4]}}, "costs.stages: "),
        ({"exits": [4, 9]}, "costs are for exits (4, 9), but the bundle has (4, 8)"),
        ({"first_row_ms": -2.0}, "first_row_ms = -2.0: a price is 0 to 3.6e+06 ms"),
        ({"head": {"key_bucket": 10**400}}, "key_bucket = 10000000000000000000: must be 1 to 2147483648"),
        ({"quality": [{"exit_layer": 4, "metric": "agreement", "on": "a", "value": math.nan}]}, "quality.0.value: "),
        ({"entry": 7}, "exit 7 was measured, but the bundle has (4, 8)"),
    ],
)
def test_a_damaged_file_is_one_line(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    document = make_profile().model_dump(mode="json")
    if "exits" in change:
        document["costs"]["exits"] = change["exits"]
    elif "first_row_ms" in change or "head" in change:
        document["costs"]["head"] |= change.get("head", change)
    elif "entry" in change:
        document["entries"][0]["exit_layer"] = change["entry"]
    else:
        document |= change
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError) as caught:
        DeviceProfile.load(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and words in message and "\n" not in message and "measure again" in message


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100_000])
def test_what_is_no_profile_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ProfileError, match=r"p\.json: .*measure again"):
        DeviceProfile.load(path)
    with pytest.raises(ProfileError, match="there is no such file: make one with"):
        DeviceProfile.load(tmp_path / "missing.json")
    with pytest.raises(ProfileError, match=r"cannot be read \(Is a directory\): name a device profile"):
        DeviceProfile.load(tmp_path)


def test_a_budget_file_is_no_profile_and_the_other_way_round() -> None:
    """The directory ``profiles/`` has both, and a user who takes one for the other need not measure for minutes."""
    with pytest.raises(ProfileError, match=r"voice\.toml: not readable as JSON .*: name a device profile, or measure"):
        DeviceProfile.load(SHIPPED[0].parents[1] / "voice.toml")
    with pytest.raises(BudgetError, match=r"\.json: not readable as TOML .*; name a budget file, or correct it"):
        load_budget(SHIPPED[0])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profiles_load_and_keep_their_bars(path: Path) -> None:
    profile = DeviceProfile.load(path)
    assert profile.complete and (profile.conditions.others_cpu_share or 0.0) < 0.1
    assert all(entry.timing.rounds >= 2 for entry in profile.entries)


def test_mismatches_are_named() -> None:
    profile = make_profile()
    assert profile.mismatches(DEVICE, "f" * 64, "onnxruntime", "lowered", 2) == ()
    other = DEVICE.model_copy(update={"cpus": 4, "memory_bytes": 4 * 10**9, "system": "Linux 7", "power_mode": "15W"})
    assert profile.mismatches(other, "e" * 64, "TensorRT", "engine set 1", 1) == (
        "it was measured with another bundle",
        "it was measured with onnxruntime, not TensorRT",
        "it was measured with 2 threads, not 1",
        "cpus: 2 there, 4 here",
        "memory: 8.0 GB there, 4.0 GB here",
    )
    measured = make_profile(engine=EngineFacts(name="TensorRT", graphs="engine set 1", version="10", threads=1))
    assert measured.mismatches(DEVICE, "f" * 64, "TensorRT", "engine set 1", 1) == ()
    assert measured.mismatches(DEVICE, "f" * 64, "TensorRT", "engine set 2", 1) == (
        "it was measured with other graphs (engine set 1, not engine set 2)",
    )


def test_a_device_is_read_from_its_files(tmp_path: Path) -> None:
    for name, text in {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\n",
        "proc/meminfo": "MemTotal:        1000 kB\nMemFree: 5 kB\n",
        "proc/device-tree/model": "A Board\0",
        "var/lib/nvpmodel/status": "pmode:0002\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    device = this_device(tmp_path)
    assert (device.board, device.cpu, device.memory_bytes, device.power_mode) == (
        "A Board",
        "Some CPU @ 2 GHz",
        1_024_000,
        "pmode:0002",
    )
    (tmp_path / "etc").mkdir()
    for modes, name in ((("15W", "7W", "10W"), "10W"), (("15W", "25W", "MAXN_SUPER", "7W"), "MAXN_SUPER")):
        lines = [f"< POWER_MODEL ID={number} NAME={mode} >\nCPU_ONLINE CORE_0 1\n" for number, mode in enumerate(modes)]
        (tmp_path / "etc/nvpmodel.conf").write_text("".join(lines))
        assert this_device(tmp_path).power_mode == name, "the number alone would be the same"
    empty = this_device(tmp_path / "none")
    assert empty.board is None and empty.memory_bytes is None and empty.cpus >= 1 and empty.cpu


def test_plan_says_which_exits_meet_a_target_and_how_surely() -> None:
    profile = make_profile(quality=(QualityFigure(exit_layer=4, metric="agreement", on="a", value=0.5),))
    plan = make_plan(profile, Budget(tpot_ms=20.0), prompt_tokens=64)
    shallow, full = plan.exits
    price = COSTS.steady_ms(4, 128)
    assert shallow.tpot_ms == price and full.tpot_ms == COSTS.steady_ms(8, 128)
    assert shallow.ttft_ms == COSTS.prefill_ms(4, 64)
    (check,) = shallow.checks
    assert check.met and check.probability == pytest.approx(NormalDist().cdf(math.log(20 / price) / 0.05), rel=1e-9)
    assert full.met is False and full.checks[0].probability == pytest.approx(0.0, abs=1e-6)
    assert plan.feasible and plan.nearest == {} and plan.shares == {4: 1.0}
    assert plan.tokens_per_s == pytest.approx(1000 / price, rel=0.05)
    assert plan.agreement == 0.5 and plan.joules_per_token is None


def test_a_mix_of_exits_is_weighed_by_its_shares() -> None:
    """A quarter of the tokens at exit 4: agreement and joules of a plan."""
    shares = {4: 0.25, 8: 0.75}
    assert _mixed(shares, {4: 0.6, 8: 1.0}) == pytest.approx(0.9)
    assert _mixed(shares, {4: None, 8: 1.0}) is None and _mixed({8: 1.0}, {4: None, 8: 0.7}) == 0.7


def test_the_odds_of_a_first_token_have_the_error_of_its_price() -> None:
    errors = {"decode steps": 0.0, "prefill steps": 0.2}
    residuals = tuple(Residual(part=part, points=2, median=error, p95=error) for part, error in errors.items())
    plan = make_plan(make_profile(residuals=residuals), Budget(ttft_ms=60.0), prompt_tokens=64)
    (check,) = plan.exits[0].checks
    distance = math.log(60 / COSTS.prefill_ms(4, 64)) / math.hypot(0.05, 0.2 / 0.674)
    assert check.probability == pytest.approx(NormalDist().cdf(distance), rel=1e-9)


def test_plan_names_the_nearest_target_that_can_be_held() -> None:
    profile = make_profile()
    plan = make_plan(profile, Budget(tpot_ms=5.0, probability=0.9), prompt_tokens=64)
    nearest = plan.nearest["tpot_ms"]
    assert not plan.feasible and "infeasible" in plan.reason
    assert nearest == pytest.approx(COSTS.steady_ms(4, 128) * math.exp(NormalDist().inv_cdf(0.9) * 0.05), rel=1e-9)
    assert make_plan(profile, Budget(tpot_ms=nearest * 1.001)).feasible
    assert not make_plan(profile, Budget(tpot_ms=nearest * 0.999)).feasible
    # each target can be held by one of the exits, but not both by the same
    both = make_plan(
        make_profile(quality=(QualityFigure(exit_layer=4, metric="agreement", on="a", value=0.5),)),
        Budget(tpot_ms=20.0, min_agreement=0.9),
    )
    assert not both.feasible and set(both.nearest) <= {"tpot_ms", "min_agreement"} and both.nearest


@pytest.mark.parametrize(
    "keys", [{"power_w": 10, "power_window_s": 10}, {"energy_j_per_token": 0.5, "power_rail": "gpu"}]
)
def test_plan_leaves_out_power_with_its_window_and_rail(keys: dict[str, Any]) -> None:
    plan = make_plan(make_profile(), Budget(tpot_ms=20.0, **keys), prompt_tokens=64)
    assert plan.feasible and [note.partition(":")[0] for note in plan.notes] == [next(iter(keys))]


def test_plan_never_makes_up_what_was_not_measured() -> None:
    plan = make_plan(make_profile(), Budget(energy_j_per_token=0.5, temperature_c=70.0), prompt_tokens=64)
    assert {check.met for exit_ in plan.exits for check in exit_.checks} == {None}
    assert plan.feasible and len(plan.notes) == 2 and all("does not say" in note for note in plan.notes)
    power = tuple(
        Power(exit_layer=layer, rail="board", source="r", busy_w=10, idle_w=2, joules_per_token=joules)
        for layer, joules in ((4, 0.17), (8, 0.26))
    )
    plan = make_plan(make_profile(power=power), Budget(energy_j_per_token=0.2), prompt_tokens=64)
    assert [exit_.met for exit_ in plan.exits] == [True, False]
    # between two tokens the device takes what it takes idle: 2 W over the rest of a gap of 100 ms
    paced = make_plan(make_profile(power=power), Budget(max_pace_tps=10, energy_j_per_token=0.35), prompt_tokens=64)
    shallow_ms = COSTS.steady_ms(4, 128)
    assert paced.exits[0].joules_per_token == pytest.approx(0.17 + 2 * (0.1 - shallow_ms / 1000))
    assert [exit_.met for exit_ in paced.exits] == [True, False]
    with pytest.raises(BudgetError, match="has exits 4, 8"):
        make_plan(make_profile(), Budget(exit_layer=5))


def test_joules_of_a_paced_reply_are_those_of_its_exits() -> None:
    """The shallow exit draws 6 W and the full depth 10, for 17 and 26 ms of a gap of 100 ms; 2 W in the rest."""
    power = tuple(
        Power(exit_layer=layer, rail="board", source="r", busy_w=watts, idle_w=2, joules_per_token=joules)
        for layer, watts, joules in ((4, 6, 0.105), (8, 10, 0.26))
    )
    plan = make_plan(make_profile(power=power), Budget(max_pace_tps=10, energy_j_per_token=0.3), prompt_tokens=64)
    parts = [plan.shares.get(exit_.exit_layer, 0.0) * (exit_.joules_per_token or 0.0) for exit_ in plan.exits]
    assert plan.shares[4] > 0.9 and plan.joules_per_token == pytest.approx(sum(parts), rel=0.02)


def test_joules_of_a_long_block_are_those_of_its_middle() -> None:
    """A block of 400 tokens after 128 others: the measured mean is that of a token after 328, not of the first one."""
    power = (Power(exit_layer=4, rail="board", source="r", busy_w=10, idle_w=2, joules_per_token=0.2, context=328),)
    plan = make_plan(make_profile(power=power), Budget(energy_j_per_token=1), prompt_tokens=264)
    assert plan.exits[0].joules_per_token == pytest.approx(0.2)


@pytest.mark.parametrize("keys", [{"min_pace_tps": 50}, {"tpot_ms": 20, "priority": "latency"}, {"power_w": 2.01}])
def test_waits_bring_power_no_lower_than_the_slowest_pace_leaves_it(keys: dict[str, Any]) -> None:
    """50 tokens a second keep the shallow exit busy for 85 % of the time, and one a second for 1.7 %."""
    power = tuple(
        Power(exit_layer=layer, rail="board", source="r", busy_w=10, idle_w=2, joules_per_token=0.2) for layer in (4, 8)
    )
    budget = Budget(**{"power_w": 3.0, **keys})
    plan = make_plan(make_profile(power=power), budget)
    assert not plan.feasible and plan.nearest["power_w"] > budget.power_w
    nearest = budget.model_copy(update={"power_w": plan.nearest["power_w"] * 1.001})
    assert make_plan(make_profile(power=power), nearest).feasible


def test_a_plan_expects_the_waits_of_a_pace() -> None:
    """100 tokens at 10 a second take 9.9 s, however fast the steps are; a deadline before that cuts the waits."""
    budget = Budget(max_pace_tps=10, tpot_ms=150, deadline_s=12, expected_tokens=100)
    plan = make_plan(make_profile(), budget)
    expected = {check.target: check.expected for check in plan.exits[0].checks}
    assert expected == pytest.approx({"tpot_ms": 100, "deadline_s": 9.9 + plan.exits[0].ttft_ms / 1000})
    assert plan.exits[0].met
    assert expected["tpot_ms"] == pytest.approx(plan.tpot_ms, rel=0.02)


def test_no_wait_brings_power_below_that_of_the_idle_device() -> None:
    power = tuple(
        Power(exit_layer=layer, rail="board", source="r", busy_w=10, idle_w=4, joules_per_token=0.2) for layer in (4, 8)
    )
    reachable = make_plan(make_profile(power=power), Budget(power_w=6))
    assert reachable.feasible and [exit_.met for exit_ in reachable.exits] == [None, None]
    below = make_plan(make_profile(power=power), Budget(power_w=3), prompt_tokens=64)
    assert not below.feasible and [exit_.met for exit_ in below.exits] == [False, False]
    least_w = 4 + 6 * COSTS.steady_ms(4, 128) / 1000  # at one token a second
    assert below.nearest == {"power_w": pytest.approx(least_w)} and below.notes == ()
    assert make_plan(make_profile(power=power), Budget(power_w=least_w), prompt_tokens=64).feasible


def test_compare_tells_chance_from_difference() -> None:
    first = make_profile()
    second = make_profile(
        entries=(
            entry("decode", 4, 16.9, context=128),
            entry("decode", 8, 13.0, context=128),
            entry("prefill", 8, 80.0, rows=63),
        )
    )
    same, faster = compare_profiles(first, second)
    assert (same.entry.exit_layer, same.significant) == (4, False)
    assert faster.ratio == 0.5 and faster.significant and faster.p_value < 1e-6
    assert faster.ratio_uncertainty == pytest.approx(0.5 * math.hypot(0.1 / 26, 0.1 / 13))
    # the 5 % level is where the difference is as large as the interval of the ratio
    just = make_profile(
        entries=(entry("decode", 4, 16.8 * math.exp(math.hypot(0.1 / 16.8, 0.1 / 17.0) * 1.01), context=128),)
    )
    assert compare_profiles(first, just)[0].p_value == pytest.approx(0.05, abs=0.01)
    wide = [make_profile(entries=(entry("decode", 4, p50, u, context=128),)) for p50, u in ((10.0, 1.5), (12.5, 2.0))]
    there, back = compare_profiles(*wide)[0], compare_profiles(*reversed(wide))[0]
    assert there.p_value == pytest.approx(back.p_value) and there.ratio == pytest.approx(1 / back.ratio)
    with pytest.raises(ProfileError, match="no quantity in common"):
        compare_profiles(first, make_profile(entries=(entry("decode", 4, 1.0, context=1),)))


def test_stages_of_other_layers_are_not_compared() -> None:
    """To exit 8 a stage runs four layers in one bundle and all eight in the other: that is no slower device."""
    first = make_profile(entries=(entry("decode", 8, 26.0), entry("catch_up", 8, 10.0)))
    second = make_profile(
        bundle=first.bundle.model_copy(update={"exit_layers": (8,)}),
        costs=CostModel((8,), (STAGE,), (UnitCost(1.0),), UnitCost(4.0)),
        entries=(entry("decode", 8, 26.0), entry("catch_up", 8, 20.0)),
    )
    assert [one.entry.kind for one in compare_profiles(first, second)] == ["decode"]
    assert [one.entry.kind for one in compare_profiles(first, first)] == ["decode", "catch_up"]


def test_tables_hold_the_same_numbers() -> None:
    profile = make_profile()
    lines = [json.loads(line) for line in render(profile, "jsonl").splitlines()]
    rows = list(csv.DictReader(io.StringIO(render(profile, "csv"))))
    assert [line["p50_ms"] for line in lines] == [16.8, 26.0, 80.0] == [float(row["p50_ms"]) for row in rows]
    assert lines[0]["tokens_per_s"] == pytest.approx(1000 / 16.8) and lines[2]["tokens_per_s"] == pytest.approx(800.0)
    markdown = render(profile, "md").splitlines()
    assert len(markdown) == 5 and markdown[2].startswith("| decode | 4 |  | 1 | 128 | 16.8 |")
    assert DeviceProfile.model_validate_json(render(profile, "json")) == profile


def test_what_is_printed_in_another_encoding_is_loaded(tmp_path: Path) -> None:
    """The output of a terminal of Windows, or of Latin-1, that was redirected to a file."""
    profile = make_profile(command="balcony-edge profile J\u00fcrgen/bundle -o json")
    (tmp_path / "p.json").write_text(render(profile, "json"), encoding="latin-1")
    assert DeviceProfile.load(tmp_path / "p.json") == profile


def test_costs_with_another_price_are_another_profile() -> None:
    assert make_profile(costs=replace(COSTS, overhead_ms=0.6)) != make_profile()


def test_a_driver_that_hangs_does_not_hang_whoever_asks_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr("balcony_edge.device.machine._ask_nvml", forever.wait)
    monkeypatch.setattr("balcony_edge.device.machine.NVML_S", 0.05)
    begin = time.perf_counter()
    assert this_device().gpus == ()
    assert time.perf_counter() - begin < 5
    forever.set()


def test_a_deadline_is_judged_by_the_spread_of_all_its_tokens() -> None:
    """Noise averages out over 128 tokens, except within bursts of 16: 0.17 becomes 0.06."""
    profile = make_profile(spread=0.17)
    expected_s = (COSTS.prefill_ms(4, 64) + 127 * COSTS.steady_ms(4, 128)) / 1000

    def odds(**asked: float) -> float | None:
        plan = make_plan(profile, Budget(probability=0.9, **asked), prompt_tokens=64)
        return plan.exits[0].checks[0].probability

    assert odds(deadline_s=1.1 * expected_s, expected_tokens=128) == pytest.approx(0.9437, abs=1e-3)
    assert odds(tpot_ms=1.1 * COSTS.steady_ms(4, 128)) == pytest.approx(0.7125, abs=1e-2)


def test_the_error_of_the_prices_is_part_of_the_odds() -> None:
    """Half of the prices are off by 6.74 % or more: a standard deviation of 10 %, next to 5 % of noise."""
    profile = make_profile(residuals=(Residual(part="decode steps", points=2, median=0.0674, p95=0.1),))
    (check,) = make_plan(profile, Budget(tpot_ms=20.0), prompt_tokens=64).exits[0].checks
    spread = math.hypot(0.05, 0.1)
    odds = NormalDist().cdf(math.log(20 / COSTS.steady_ms(4, 128)) / spread)
    assert check.probability == pytest.approx(odds, rel=1e-6)


def test_plan_counts_the_memory_of_a_reply() -> None:
    """1 GB once loaded, and 10 MB for 1,000 tokens, of which there are 64 + 128."""
    plans = [make_plan(make_profile(), Budget(memory_mb=mb), prompt_tokens=64) for mb in (1001, 1003)]
    checks = [plan.exits[0].checks[0] for plan in plans]
    assert [check.expected for check in checks] == [pytest.approx(1001.92)] * 2
    assert [check.met for check in checks] == [False, True]


def test_states_of_recurrent_layers_do_not_grow_with_the_reply() -> None:
    """1 GB once loaded, and 100 MB of states: as much after 192 tokens as after 500."""
    memory = MemoryUse(loaded_bytes=10**9, peak_bytes=None, sequence_bytes=10**8, per_1k_tokens_bytes=0)
    for prompt_tokens in (64, 372):
        plan = make_plan(make_profile(memory=memory), Budget(memory_mb=1200), prompt_tokens=prompt_tokens)
        assert plan.exits[0].checks[0].expected == pytest.approx(1100)
    assert memory.simulated(2) == {"base_memory_bytes": 1_100_000_000, "row_bytes": 0}


def test_a_plan_takes_depth_for_memory_as_the_controller_does() -> None:
    """1 GB of 1,015 MB leaves less than a third of the last 5 %: the reply fits, at the shallower of two exits."""
    plan = make_plan(make_profile(), Budget(memory_mb=1015), prompt_tokens=64)
    assert plan.feasible and plan.shares == {4: 1.0}
    unknown = make_profile(memory=MemoryUse(loaded_bytes=None, peak_bytes=None, per_1k_tokens_bytes=0))
    assert make_plan(unknown, Budget(memory_mb=100), prompt_tokens=64).shares == {8: 1.0}


def test_joules_of_a_plan_grow_with_the_context() -> None:
    """They were measured after 128 tokens; a step after 384 takes as many watts, and 4 % longer."""
    power = (Power(exit_layer=8, rail="board", source="r", busy_w=10, idle_w=2, joules_per_token=0.26),)
    plan = make_plan(make_profile(power=power), Budget(energy_j_per_token=0.265), prompt_tokens=320)
    longer = COSTS.steady_ms(8, 384) / COSTS.steady_ms(8, 128)
    assert plan.exits[1].joules_per_token == pytest.approx(0.26 * longer) and plan.exits[1].met is False
