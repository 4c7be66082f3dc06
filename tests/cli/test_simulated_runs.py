"""``balcony-edge simulate`` and ``replay`` of what it recorded: batteries that end a run, and traces that somebody changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from balcony_edge.cli import app
from tests.cli.test_budget import invoke, profile, refused, save

ARRIVALS = ("--arrivals", "rate=2", "--seconds", "3", "-n", "5")


@pytest.fixture
def measured(tmp_path: Path) -> str:
    save(profile(), path := str(tmp_path / "p.json"))
    return path


def test_replay_compares_the_part_of_a_wait_that_rows_may_take(measured: str, tmp_path: Path) -> None:
    """The decode loop runs pending rows for ``idle_ms`` of a wait."""
    budget, record = tmp_path / "b.toml", tmp_path / "run.jsonl"
    budget.write_text("max_pace_tps = 5\n")
    invoke("simulate", "--profile", measured, "--budget", budget, "-n", "20", "--record", record)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert lines[-1]["idle_ms"] > 0 and CliRunner().invoke(app, ["replay", str(record)]).exit_code == 0
    lines[-1]["idle_ms"] = 0.0
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = CliRunner().invoke(app, ["replay", str(record), "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout)["differences"][0]["recorded"]["idle_ms"] == 0


@pytest.mark.parametrize(("place", "value"), [(0, "Infinity"), (1, -1.0), (3, 1e15), (9, 0.0)])
def test_rounds_with_an_impossible_state_are_refused(measured: str, tmp_path: Path, place: int, value: object) -> None:
    record = tmp_path / "rounds.jsonl"
    invoke("simulate", "--profile", measured, "--tpot-ms", "20", *ARRIVALS, "--record", record)
    head, *rounds = record.read_text().splitlines()
    header = json.loads(head)
    header["state"][0][place] = value
    record.write_text("\n".join((json.dumps(header), *rounds)))
    refused("not readable as a trace of rounds", "replay", record)


def test_what_an_empty_battery_leaves_unanswered_misses_its_deadline(measured: str, tmp_path: Path) -> None:
    budget = tmp_path / "b.toml"
    budget.write_text("deadline_s = 2.0\nexpected_tokens = 30\n")
    common = ["simulate", "--profile", measured, "--budget", budget, "-n", "30", "--json", "--device"]
    alone = json.loads(invoke(*common, "battery_j=1"))
    assert alone["tokens"] < 30 and alone["missed_deadline"] is True
    several = json.loads(invoke(*common, "battery_j=20", "--arrivals", "rate=100,burst=40", "--seconds", "1"))
    found = several["classes"]["b"]
    answered = found["tokens"] // 30
    assert found["refused"] == 0 and answered < found["requests"]
    assert found["missed_share"] >= 1 - answered / found["requests"]


def test_simulate_says_that_nobody_comes(measured: str, tmp_path: Path) -> None:
    record = tmp_path / "rounds.jsonl"
    common = ["simulate", "--profile", measured, "--tpot-ms", "20", "--seconds", "5", "--record", str(record)]
    done = CliRunner().invoke(app, [*common, "--arrivals", "rate=0.001"])
    assert not record.exists() and "no request comes in 5 s" in " ".join(done.stderr.split())


def test_explained_rounds_have_as_many_tokens_as_the_classes(measured: str, tmp_path: Path) -> None:
    """Streams that are refused make no token."""
    budget = tmp_path / "b.toml"
    budget.write_text("ttft_ms = 60\non_infeasible = 'error'\n")
    arriving = ["--arrivals", "rate=4,burst=3", "-n", "30", "--seconds", "8", "--load", "square"]
    found = json.loads(invoke("simulate", "--profile", measured, "--budget", budget, *arriving, "--explain", "--json"))
    shown = sum(row["rounds"] * len(row["exits"]) for row in found["intervals"])
    assert found["classes"]["b"]["refused"] > 0 and shown == found["classes"]["b"]["tokens"]


def test_requests_that_come_too_late_for_the_battery_have_come(measured: str) -> None:
    arriving = ["--arrivals", "rate=1", "--seconds", "20", "--device", "battery_j=4"]
    done = CliRunner().invoke(app, ["simulate", "--profile", measured, "--tpot-ms", "20", *arriving])
    said = " ".join(done.stderr.split())
    assert "the battery is empty before 14 of 14 requests are answered" in said and "no request comes" not in said
