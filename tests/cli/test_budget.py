"""``balcony-edge budget`` and ``simulate``: the schema, budget files, loads, and every bad input as one line."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import read_manifest
from balcony_edge.bundle.manifest import Quality, TextQuality
from balcony_edge.bundle.quality import record_quality
from balcony_edge.cli import app
from balcony_edge.cli.budgets.arrivals import show
from balcony_edge.cli.budgets.compare import differences
from balcony_edge.cli.budgets.plan import _words
from balcony_edge.cli.budgets.replay import _tell
from balcony_edge.cli.budgets.simulate import load, physics
from balcony_edge.cli.device.profile import _show
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.profile import DeviceProfile, Power, QualityFigure
from balcony_edge.device.tables import render
from balcony_edge.errors import BalconyError
from balcony_edge.simulation.plan import Check
from tests.core.test_profile import entry, make_profile

PROFILES = Path(__file__).parents[2] / "profiles"
UNIT = UnitCost(3.0, 0.1, 0.2)
COSTS = CostModel((2, 3, 5), (UNIT,) * 3, (UnitCost(1.0),) * 3, UnitCost(1.0))


def invoke(*arguments: str | Path) -> str:
    """Output of a verb."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None:
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(message: str, *arguments: str | Path) -> None:
    with pytest.raises(BalconyError) as caught:
        invoke(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def profile(**changes: Any) -> DeviceProfile:
    """A device profile of three exits, with the power of a meter."""
    bundle = {
        "model": "tiny",
        "fingerprint": "f" * 64,
        "precision": "float32",
        "exit_layers": (2, 3, 5),
        "context_length": 512,
        "bytes_per_token": {2: 100, 3: 150, 5: 200},
    }
    power = Power(exit_layer=5, rail="board", source="meter", busy_w=9.0, idle_w=3.0, joules_per_token=0.1)
    own: dict[str, Any] = {"bundle": bundle, "entries": (entry("decode", 5, 1.0),), "costs": COSTS, "power": (power,)}
    return make_profile(**own | {"residuals": (), "spread": 0.02} | changes)


def save(measured: DeviceProfile, name: str) -> None:
    Path(name).write_text(render(measured, "json"), encoding="utf-8")


@pytest.fixture(autouse=True)
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(profile(), "p.json")


def test_schema_is_json_with_a_description_of_every_key() -> None:
    schema = json.loads(invoke("budget", "schema"))
    assert "milliseconds" not in schema["title"] and schema["additionalProperties"] is False
    assert schema["properties"]["power_rail"]["enum"] == ["board", "cpu", "gpu"]


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_check_accepts_every_shipped_file(path: Path) -> None:
    document = json.loads(invoke("budget", "check", path, "--json"))
    assert document["exits"] is None
    for key in document["budget"]:
        assert f"{key} = " in invoke("budget", "check", path)


def test_check_refuses_with_file_key_and_cure(tmp_path: Path, tiny: Any) -> None:
    path = tmp_path / "chat.toml"
    path.write_text("min_exit = 9\nmax_exit = 4\n")
    refused(f"{path}: min_exit = 9 with max_exit = 4: min_exit must not be above max_exit", "budget", "check", path)
    path.write_text("gpu_utilization = 80\n")
    refused(f"{path}: gpu_utilization = 80: must be above 0 and at most 1; write 80 % as 0.8", "budget", "check", path)
    path.write_text("min_exit = 4\n")
    shown = invoke("budget", "check", path, "--bundle", tiny.path).splitlines()
    assert shown == ["min_exit = 4", "asks for full depth at every token; no target and no ceiling", "allows exits 5"]

    path.write_text("exit_layer = 4\n")
    refused(
        f"{path}: exit_layer = 4, but this bundle has exits 2, 3, 5", "budget", "check", path, "--bundle", tiny.path
    )
    refused("nowhere.toml: there is no such file", "budget", "check", tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("", "asks for full depth at every token; no target and no ceiling"),
        ("max_exit = 20\n", "asks for the deepest exit that its bounds allow at every token; no target and no ceiling"),
        ("exit_layer = 17\n", "asks for exit 17 at every token"),
        (
            'policy = "lossless"\n',
            "asks for the full model's own tokens, drafted at a shallow exit when that is faster",
        ),
        (
            'policy = "confident"\n',
            "asks for full depth at every token, or a shallow exit that is confident enough; no target and no ceiling",
        ),
        ("tpot_ms = 40.0\nprobability = 0.9\n", "asks for the deepest exit that meets every target and ceiling"),
    ],
)
def test_check_lists_what_the_file_sets_and_says_what_it_means(tmp_path: Path, text: str, meaning: str) -> None:
    """It also lists keys that equal their defaults: probability is 0.9 without being set."""
    path = tmp_path / "b.toml"
    path.write_text(text)
    assert invoke("budget", "check", path).splitlines() == [*text.splitlines(), meaning]


def test_simulate_under_a_generated_load_and_under_its_own_record(tmp_path: Path) -> None:
    budget, record = tmp_path / "b.toml", tmp_path / "run.jsonl"
    budget.write_text("tpot_ms = 13\n")
    common = ["simulate", "--profile", "p.json", "--budget", budget, "-n", "300", "--json"]
    idle = json.loads(invoke(*common))
    loaded = json.loads(invoke(*common, "--load", "constant:high=1.4", "--record", record, "--explain"))
    assert (idle["tokens"], idle["tokens_per_exit"].get("5", 0) > 250) == (300, True)
    assert loaded["mean_exit"] < idle["mean_exit"] and loaded["late_tokens"] <= 15
    assert sum(interval["tokens"] for interval in loaded["intervals"]) == 300
    assert loaded["intervals"][-1]["slowdown"] == pytest.approx(1.4, rel=0.1)
    again = json.loads(invoke(*common, "--load", record))
    assert again["mean_exit"] == pytest.approx(loaded["mean_exit"], abs=0.5)
    invoke(*common, "--load", "step:high=2,at_s=1", "--record", record)
    recorded = load(str(record))
    assert recorded(0.5) == pytest.approx(1, rel=0.2) and recorded(2.5) == pytest.approx(2, rel=0.2)
    assert json.loads(invoke(*common[:3], "--tpot-ms", "13", *common[5:])) == idle
    assert "reason" in invoke(*common[:-1], "--explain")
    assert "late_tokens: " in invoke(*common[:-1])
    long = invoke("simulate", "--profile", "p.json", "--tpot-ms", "13", "-p", "400", "--load", "constant:high=100")
    assert re.search(r"ttft_ms: \d{5}", long), "no power of ten"


def test_simulate_takes_watts_from_the_profile_and_physics_from_the_line(tmp_path: Path) -> None:
    budget = tmp_path / "b.toml"
    budget.write_text("")
    common = ["simulate", "--profile", "p.json", "--budget", budget, "-n", "100", "--json"]
    assert json.loads(invoke(*common))["mean_w"] == pytest.approx(9.0)
    assert json.loads(invoke(*common, "--device", "busy_w=1"))["mean_w"] == pytest.approx(4.0)
    said = CliRunner().invoke(app, [*map(str, common), "--device", "battery_j=2"]).output
    assert "the run ends after 0.2 s, when the battery is empty" in said.replace("\n", " ")


def test_simulate_is_as_noisy_as_the_profile_and_a_plan() -> None:
    noisy = profile(spread=0.17)
    assert physics([], noisy, Budget()).noise == 0.17
    assert physics(["noise=0.05"], noisy, Budget()).noise == 0.05
    assert physics([], profile(spread=5.0), Budget()).noise == 2.0, "the most that a simulated device takes"


def test_simulate_takes_memory_from_the_profile(tmp_path: Path) -> None:
    """1 GB once loaded: a ceiling of 900 MB is out of reach from the first token on, and one of 2 GB is not."""
    for mb, infeasible in ((900, 20), (2000, 0)):
        (tmp_path / "b.toml").write_text(f"memory_mb = {mb}\n")
        found = json.loads(invoke("simulate", "--profile", "p.json", "--budget", "b.toml", "-n", "20", "--json"))
        assert found["infeasible_tokens"] == infeasible


def test_simulate_with_arrivals_tells_what_each_class_got(tmp_path: Path) -> None:
    """Two budgets, three requests at a time; the explanation has every round, and its exits are those of the classes."""
    for name, text in (("tight", "tpot_ms = 20\n"), ("shallow", "exit_layer = 2\n")):
        (tmp_path / f"{name}.toml").write_text(text)
    budgets = ["--budget", tmp_path / "tight.toml", "--budget", tmp_path / "shallow.toml"]
    common = ["simulate", "--profile", "p.json", *budgets, "--arrivals", "rate=4,burst=3", "-n", "30", "--seconds", "6"]
    (absent := tmp_path / "absent.toml").write_text("exit_layer = 4")
    refused("absent: exit_layer = 4, but this bundle has", *common, "--budget", absent)
    found = json.loads(invoke(*common, "--explain", "--json"))
    tight, shallow = (found["classes"][name] for name in ("tight", "shallow"))
    assert tight["requests"] + shallow["requests"] == found["streams"] >= 6
    assert tight["tokens"] == 30 * tight["requests"] and 0 <= tight["late_share"] <= 0.1
    assert set(shallow["tokens_per_exit"]) == {"2"} and shallow["late_share"] is None
    assert sum(row["rounds"] for row in found["intervals"]) == found["rounds"]
    assert "a round of 3 streams takes" in " ".join(row["reason"] for row in found["intervals"])
    told = invoke(*common, "--explain")
    assert "stream: exit" in told and "missed" in told
    assert json.loads(invoke(*common, "--record", "rounds.jsonl", "--json")) == {
        key: found[key] for key in ("streams", "rounds", "classes")
    }
    replayed = json.loads(invoke("replay", "rounds.jsonl", "--json"))
    assert replayed == {"rounds": found["rounds"], "streams": found["streams"], "differences": []}


def test_a_pipe_is_not_replayed_without_its_beginning() -> None:
    """As in bash: `replay <(zcat run.jsonl.gz)`."""
    reads, writes = os.pipe()
    os.write(writes, (Path(__file__).parents[1] / "core" / "control" / "golden.jsonl").read_bytes()[:4096])
    os.close(writes)
    refused("is a pipe, which cannot be read twice: write it to a file first", "replay", f"/dev/fd/{reads}")
    os.close(reads)


def test_simulate_with_arrivals_explains_waits(tmp_path: Path) -> None:
    (tmp_path / "reading.toml").write_text("max_pace_tps = 6\n")
    common = ["--arrivals", "rate=2", "--seconds", "3", "-n", "5", "--explain", "--json"]
    found = json.loads(invoke("simulate", "--profile", "p.json", "--budget", "reading.toml", *common))
    reasons = {row["reason"] for row in found["intervals"] if not row["exits"]}
    assert "waits for a pace" in reasons and "rows only" not in reasons


@pytest.mark.parametrize(("deadline_s", "missed", "shown"), [(100, 0.0, "0.0%"), (0.01, 1.0, "100.0%")])
def test_simulate_with_arrivals_tells_missed_deadlines(deadline_s: float, missed: float, shown: str) -> None:
    Path("b.toml").write_text(f"deadline_s = {deadline_s}\nexpected_tokens = 5\n")
    arriving = ["--arrivals", "rate=2", "--seconds", "3", "-n", "5"]
    common = ["simulate", "--profile", "p.json", "--budget", "b.toml", *arriving]
    found = json.loads(invoke(*common, "--json"))["classes"]["b"]
    assert found["missed_share"] == missed and found["late_share"] is None
    assert shown in invoke(*common)
    assert "deadline_s is for 5 tokens" in CliRunner().invoke(app, [*common[:-1], "4"]).output
    assert "the battery is empty before" in CliRunner().invoke(app, [*common, "--device", "battery_j=2"]).output


def test_simulate_refuses(tmp_path: Path) -> None:
    budget = tmp_path / "b.toml"
    budget.write_text("")
    common = ["simulate", "--profile", "p.json", "--budget", budget]
    refused("both of --budget and --tpot-ms: a budget is a file or a target", *common, "--tpot-ms", "13")
    refused("neither of --budget and --tpot-ms: a budget is a file or a target", *common[:3])
    refused("tpot_ms = -1", *common[:3], "--tpot-ms", "-1")
    refused("one reply has one budget: also give --arrivals", *common, "--budget", budget)
    refused("--arrivals speed=3: must be one of rate, burst, as key=value", *common, "--arrivals", "speed=3")
    refused("--device mass=3: must be one of idle_w, busy_w", *common, "--device", "mass=3")
    for word, allowed in (
        ("busy_w=x", "busy_w must be 0 to 100000"),
        ("tau_s=0", "tau_s must be 0.01 to 1e+06"),
        ("noise=2000", "noise must be 0 to 2"),
        ("throttle_factor=0", "throttle_factor must be 1 to 1000"),
        ("charge=7", "charge must be 0 to 1"),
        ("rail=1", "must be one of idle_w"),
    ):
        refused(f"--device {word}: {allowed}", *common, "--device", word)
    refused("must be one of idle", *common, "--load", "x" * 5000)
    refused("/dev/full: writing failed (No space left on device)", *common, "--record", "/dev/full")
    invoke(*common, "--record", tmp_path / "free.jsonl", "-n", "5")
    refused("has no predicted times", *common, "--load", tmp_path / "free.jsonl")
    invoke(*common, "--arrivals", "rate=2", "--seconds", "2", "--record", tmp_path / "rounds.jsonl", "-n", "5")
    refused("has rounds of several replies", *common, "--load", tmp_path / "rounds.jsonl")
    budget.write_text("min_agreement = 0.5\n")
    cure = "run `balcony-edge eval BUNDLE --text TEXT`"  # without --text it is refused, and tasks give no agreement
    unevaluated = f"this device profile has no evaluation: {cure}, then `balcony-edge profile` again"
    refused(f"{budget}: min_agreement = 0.5, but {unevaluated}", *common)
    refused(f"b: min_agreement = 0.5, but {unevaluated}", *common, "--arrivals", "rate=1")
    refused(f"{budget}: min_agreement = 0.5, but {unevaluated}", "plan", *common[1:])
    budget.write_text("tpot_ms = 0.1\non_infeasible = 'error'\n")
    refused("infeasible: tpot_ms = 0.1: a step takes ", *common)


def test_agreement_of_a_profile_is_the_least_of_its_texts() -> None:
    figures = [
        QualityFigure(exit_layer=layer, metric="agreement", on=text, value=value)
        for layer, text, value in ((2, "a", 0.6), (2, "b", 0.5), (3, "a", 0.7))
    ]
    assert profile(quality=tuple(figures)).agreement() == {2: 0.5, 3: 0.7, 5: None}


def test_simulate_holds_the_power_of_the_rail_that_was_measured(tmp_path: Path) -> None:
    gpu = Power(exit_layer=5, rail="gpu", source="nvml:0", busy_w=60.0, idle_w=20.0, joules_per_token=1.0)
    long = profile(power=(gpu,))
    save(long.model_copy(update={"bundle": long.bundle.model_copy(update={"context_length": 4096})}), "gpu.json")
    (tmp_path / "b.toml").write_text("power_w = 40\npower_rail = 'gpu'\n")
    found = json.loads(
        invoke("simulate", "--profile", "gpu.json", "--budget", "b.toml", "-n", "3000", "--seconds", "40", "--json")
    )
    assert found["mean_w"] == pytest.approx(40, rel=0.05)
    # 60 W on the default heat sink would be far above its throttling point, but measured watts disable throttling.
    (tmp_path / "b.toml").write_text("tpot_ms = 25\n")
    save(profile(power=(gpu.model_copy(update={"rail": "board"}),)), "gpu.json")
    found = json.loads(
        invoke("simulate", "--profile", "gpu.json", "--budget", "b.toml", "-n", "300", "--json", "--device", "tau_s=1")
    )
    assert found["max_c"] is None and found["tokens_per_exit"]["5"] > 290
    warm = ("--device", "tau_s=1", "--device", "kelvin_per_watt=6")
    found = json.loads(invoke("simulate", "--profile", "gpu.json", "--budget", "b.toml", "-n", "300", "--json", *warm))
    assert found["max_c"] > 200


def test_the_rail_of_a_profile_is_that_of_its_meter(tmp_path: Path) -> None:
    """A budget without watts or joules is about no rail; a plan and a simulation then show the one that was measured."""
    save(profile(power=tuple(
        Power(exit_layer=layer, rail="gpu", source="nvml:0", busy_w=60.0, idle_w=20.0, joules_per_token=1.0)
        for layer in (2, 3, 5)
    )), "gpu.json")  # fmt: skip
    command = ["simulate", "--profile", "gpu.json", "--tpot-ms", "30", "-n", "50", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.stderr == "" and json.loads(done.stdout)["mean_w"] > 20
    plan = json.loads(invoke("plan", "--profile", "gpu.json", "--tpot-ms", "30", "--json"))
    assert [exit_["joules_per_token"] for exit_ in plan["exits"]] == [pytest.approx(1.0, rel=0.01)] * 3
    (tmp_path / "hot.toml").write_text("temperature_c = 60\n")
    done = CliRunner().invoke(app, [*command[:3], "--budget", "hot.toml", "-n", "50"])
    assert "its heat sink is unknown: degrees are those of a small board" in done.stderr


@pytest.mark.parametrize(("options", "message"), [
    (("--prompt-tokens", "512"), "--prompt-tokens 512: the context holds 512, and a reply needs a token"),
    (("--arrivals", "rate=1000", "--seconds", "1000"), "1000000 requests would come, and at most 100000 may"),
])  # fmt: skip
def test_simulations_that_cannot_be(options: tuple[str, ...], message: str) -> None:
    refused(message, "simulate", "--profile", "p.json", "--tpot-ms", "30", *options)


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e7"])
def test_a_simulation_has_an_end(seconds: str) -> None:
    command = ["simulate", "--profile", "p.json", "--tpot-ms", "30", "--arrivals", "rate=1", "--seconds", seconds]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "--seconds" in done.stderr


@pytest.mark.parametrize("options", [(), ("--arrivals", "rate=1", "--seconds", "3")], ids=["one reply", "arrivals"])
@pytest.mark.parametrize(
    ("device", "said"), [((), True), (("--device", "tau_s=9"), True), (("--device", "idle_w=3"), False)]
)
def test_simulate_says_that_watts_were_not_measured(
    options: tuple[str, ...], device: tuple[str, ...], said: bool
) -> None:
    save(profile(power=()), "bare.json")
    command = ["simulate", "--profile", "bare.json", "--tpot-ms", "20", "-n", "10", *options, *device]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and ("has no power measurement" in done.stderr) == said


def test_simulate_ends_with_the_context(tmp_path: Path) -> None:
    command = ["simulate", "--profile", "p.json", "--tpot-ms", "13", "-p", "500", "--json"]
    done = CliRunner().invoke(app, command)
    assert json.loads(done.stdout)["tokens"] == 12
    assert "--tokens 256: a reply ends after 12, when the context is full" in done.stderr


def test_simulate_says_before_it_stops_that_degrees_are_invented(tmp_path: Path) -> None:
    gpu = Power(exit_layer=5, rail="gpu", source="nvml:0", busy_w=60.0, idle_w=12.0, joules_per_token=1.0)
    save(profile(power=(gpu,)), "gpu.json")
    (tmp_path / "b.toml").write_text("critical_temperature_c = 90\n")
    done = CliRunner().invoke(app, ["simulate", "--profile", "gpu.json", "--budget", "b.toml"])
    assert isinstance(done.exception, BalconyError) and "its heat sink is unknown" in done.stderr


@pytest.mark.parametrize("order", [("chat", "gpu"), ("gpu", "chat")])
def test_simulate_with_arrivals_holds_the_rail_of_any_class(tmp_path: Path, order: tuple[str, str]) -> None:
    save(profile(power=tuple(
        Power(exit_layer=5, rail=rail, source=rail, busy_w=busy_w, idle_w=5.0, joules_per_token=1.0)
        for rail, busy_w in (("cpu", 10.0), ("gpu", 60.0))
    )), "two.json")  # fmt: skip
    (tmp_path / "chat.toml").write_text("tpot_ms = 50\n")
    (tmp_path / "gpu.toml").write_text("power_w = 20\npower_rail = 'gpu'\n")
    budgets = [word for name in order for word in ("--budget", f"{name}.toml")]
    common = ["--arrivals", "rate=2", "--seconds", "10", "-n", "60", "--explain", "--json"]
    found = invoke("simulate", "--profile", "two.json", *budgets, *common)
    assert "limited by power_w" in found and "no reading for power_w" not in found


def test_plan_keeps_the_evaluation_of_the_profile(tiny: Any, tmp_path: Path) -> None:
    """That of a bundle counts if the profile has none; this bundle was not evaluated."""
    figures = [{"exit_layer": layer, "metric": "agreement", "on": "a", "value": 0.7} for layer in (2, 3)]
    save(profile(quality=figures), "evaluated.json")
    (tmp_path / "b.toml").write_text("min_agreement = 0.6\n")
    common = ["plan", "--profile", "evaluated.json", "--budget", "b.toml", "--json"]
    assert invoke(*common, "--bundle", tiny.path) == invoke(*common)
    cure = "this bundle was not evaluated: run `balcony-edge eval BUNDLE --text TEXT`"
    refused(cure, "plan", "--profile", "p.json", *common[3:], "--bundle", tiny.path)


def test_plan_takes_the_agreement_of_the_bundle_if_the_profile_has_only_tasks(bundle_copy: Path) -> None:
    """The bundle was first evaluated on tasks, then profiled, then evaluated on text."""
    figures = [{"exit_layer": layer, "metric": "average", "on": "arc_easy", "value": 40.0} for layer in (2, 3, 5)]
    save(profile(quality=figures), "tasks.json")
    part: dict[str, Any] = {"documents": 1, "tokens": 9, "window": 8, "perplexity": {"value": 1.0}}
    text = TextQuality.model_validate(part | {"kl": {"value": 0.0}, "agreement": {"value": 0.7}})
    found = dict.fromkeys((2, 3, 5), Quality(reference="full", text={"a": text}))
    record_quality(bundle_copy, found, read_manifest(bundle_copy).fingerprint)
    Path("b.toml").write_text("min_agreement = 0.6\n")
    plan = json.loads(
        invoke("plan", "--profile", "tasks.json", "--budget", "b.toml", "--bundle", bundle_copy, "--json")
    )
    assert [exit_["agreement"] for exit_ in plan["exits"][:-1]] == [0.7] * 2


def test_compare_names_the_graphs_that_differ() -> None:
    sets = ("engine set 1", "engine set 2")
    one, two = (profile(engine={"name": "TensorRT 10", "graphs": name, "version": "", "threads": 1}) for name in sets)
    assert differences(one, two) == ["graphs: engine set 1 first, engine set 2 second"]


def test_a_plan_with_waits_for_watts_promises_no_gap_and_no_joules(tmp_path: Path) -> None:
    """12 ms of 8 W are 0.1 J; on a device that idles at 4 W, 5 W mean waits, and their joules."""
    save(profile(power=tuple(
        Power(exit_layer=layer, rail="cpu", source="r", busy_w=8.0, idle_w=4.0, joules_per_token=0.1) for layer in (2, 3, 5)
    )), "cpu.json")  # fmt: skip
    (tmp_path / "b.toml").write_text("power_w = 5\npower_rail = 'cpu'\nenergy_j_per_token = 0.12\ntpot_ms = 60\n")
    plan = json.loads(invoke("plan", "--profile", "cpu.json", "--budget", "b.toml", "--json"))
    checks = {check["target"]: check["met"] for check in plan["exits"][0]["checks"]}
    assert checks["power_w"] is None and checks["energy_j_per_token"] is None and checks["tpot_ms"] is None
    (tmp_path / "b.toml").write_text("power_w = 5\npower_rail = 'cpu'\n")
    plan = json.loads(invoke("plan", "--profile", "cpu.json", "--budget", "b.toml", "--json"))
    assert plan["tpot_ms"] > 20, "with waits"
    assert plan["joules_per_token"] == pytest.approx(5.5 * plan["tpot_ms"] / 1000, rel=0.15) != pytest.approx(0.1)


def test_a_plan_shows_no_exit_that_always_agrees(tmp_path: Path) -> None:
    """An agreement of 0.996 misses 0.998, and would be shown as 100 %."""
    figures = [{"exit_layer": layer, "metric": "agreement", "on": "a", "value": 0.996} for layer in (2, 3)]
    save(profile(quality=figures), "evaluated.json")
    (tmp_path / "b.toml").write_text("tpot_ms = 6\n")
    shown = invoke("plan", "--profile", "evaluated.json", "--budget", "b.toml")
    assert "99.6%" in shown and "agreement with the full model 99.6%" in shown


def test_compare_shows_times_whose_ratio_it_shows() -> None:
    (entry,) = profile().entries
    for name, p50_ms in (("one.json", 0.0116), ("two.json", 0.0143)):
        norm = entry.model_copy(update={"kind": "norm", "timing": entry.timing.model_copy(update={"p50_ms": p50_ms})})
        save(profile(entries=(norm,)), name)
    shown = invoke("compare", "one.json", "two.json", "--all")
    assert "0.0116" in shown and "0.0143" in shown and "1.233" in shown


@pytest.mark.parametrize(
    ("probability", "met", "words"), [(0.8996, False, "missed (4.9, p=0.89)"), (0.9, True, "met (4.9, p=0.90)")]
)
def test_odds_that_miss_are_not_shown_as_those_asked_for(probability: float, met: bool, words: str) -> None:
    assert _words(Check("tpot_ms", 5.0, 4.9, probability, met)) == f"tpot_ms 5: {words}"


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (Check("energy_j_per_token", 0.1, 0.10003, None, False), "energy_j_per_token 0.1: missed (0.10003)"),
        (Check("memory_mb", 12000.0, 12345.6, None, False), "memory_mb 12000: missed (12345.6)"),
    ],
)
def test_a_value_that_misses_is_not_shown_as_the_one_asked_for(check: Check, words: str) -> None:
    assert _words(check) == words


def test_joules_of_a_profile_are_shown_where_they_were_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Watts are measured at the least context only: after 400 tokens a step takes longer, and more joules."""
    (short,) = profile().entries
    power = Power(exit_layer=5, rail="board", source="meter", busy_w=9.0, idle_w=3.0, joules_per_token=0.137)
    _show(profile(entries=(short, short.model_copy(update={"context": 400})), power=(power,)))
    assert capsys.readouterr().out.count("0.137") == 1


def test_a_plan_names_a_value_that_an_exit_meets() -> None:
    """5.1561 ms, of which four digits are 5.156: no exit meets that."""
    found = re.search(r"one meets:\s+tpot_ms\s+=\s+([\d.]+)", invoke("plan", "--profile", "p.json", "--tpot-ms", "1"))
    assert found is not None
    assert json.loads(invoke("plan", "--profile", "p.json", "--tpot-ms", found[1], "--json"))["feasible"]


def test_a_budget_from_a_pipe_is_read_once() -> None:
    """As in bash: `--budget <(echo exit_layer = 2)`. What is read from it is gone, and an empty budget asks for nothing."""
    reads, writes = os.pipe()
    os.write(writes, b"exit_layer = 2\n")
    os.close(writes)
    common = ["--arrivals", "rate=2", "--seconds", "3", "-n", "5", "--json"]
    found = json.loads(invoke("simulate", "--profile", "p.json", "--budget", f"/dev/fd/{reads}", *common))
    os.close(reads)
    assert found["classes"][str(reads)]["tokens_per_exit"].keys() == {"2"}


def test_a_plan_cuts_no_target_in_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pipe; a cut name ends in an ellipsis."""
    shown = io.StringIO()
    monkeypatch.setattr("balcony_edge.cli.budgets.plan.stdout", Console(file=shown, width=80))
    (tmp_path / "b.toml").write_text("battery_floor_percent = 20\n")
    invoke("plan", "--profile", "p.json", "--budget", "b.toml")
    assert "battery_floor" in shown.getvalue() and "…" not in shown.getvalue()


def test_reasons_are_not_cut_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    for module in ("arrivals", "replay"):
        monkeypatch.setattr(f"balcony_edge.cli.budgets.{module}.stdout", Console(file=shown, width=80))
    reason, exits = "limited by battery_floor_percent", dict.fromkeys(range(16), 2)
    row = {"begin_s": 1e6, "rounds": 1, "exits": exits, "round_ms": 9.0, "reason": reason}
    show({"classes": {}}, [row])
    one = {"exit_layer": 2, "period_ms": 12.345, "reason": reason}
    with pytest.raises(typer.Exit):
        _tell({}, "1 decision", [{"decision": 0, "recorded": one, "again": one | {"period_ms": 98.765}}], as_json=False)
    assert "floor" in shown.getvalue() and "…" not in shown.getvalue()
