"""Traces: what is written is read, and replaying it gives the same decisions."""

from __future__ import annotations

import json
import math
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import Decision, Measurement, Observation
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.control.trace import TraceWriter, read_trace, replay
from balcony_edge.device.readings import Reading
from balcony_edge.errors import InputError
from balcony_edge.simulation.loads import parse_load
from balcony_edge.simulation.plant import Physics, Plant
from balcony_edge.simulation.simulate import simulate
from tests.support.prices import DEMO


def record(path: Path, budget: Budget, load: str, tokens: int = 300) -> list[Decision]:
    plant = Plant(DEMO, Physics(noise=0.1), parse_load(load), seed=3)
    with TraceWriter(path) as writer:
        return [token.decision for token in simulate(DEMO, plant, budget, tokens=tokens, trace=writer)]


@pytest.mark.parametrize(
    ("budget", "load"),
    [
        (Budget(tpot_ms=24), "square:high=1.6,period_s=2"),
        (Budget(power_w=5, temperature_c=60, min_pace_tps=25), "bursts"),
        (Budget(deadline_s=5, expected_tokens=300, ttft_ms=900), "ramp"),
        (Budget(max_pace_tps=30, energy_j_per_token=0.2, cpu_utilization=0.7), "constant:high=2"),
        (Budget(), "idle"),
    ],
)
def test_replay_gives_the_same_decisions(tmp_path: Path, budget: Budget, load: str) -> None:
    decisions = record(tmp_path / "run.jsonl", budget, load)
    trace = read_trace(tmp_path / "run.jsonl")
    again = list(replay(trace))
    bare = [[decision._replace(words=()) for decision in run] for run in (again, decisions)]  # all but the words' parts
    assert bare[0] == bare[1]
    assert [decision.reason for decision in again] == [token.line["reason"] for token in trace]
    assert len(again) == 300
    if budget.has_target and budget.expected_tokens is None:
        assert len({decision.exit_layer for decision in again}) > 1 or any(d.period_ms for d in again)


def test_the_golden_trace_is_decided_as_it_was_recorded() -> None:
    """A change of the controller that changes its decisions shows here. Where it is meant, record the file again:
    ``record(FILE, Budget(tpot_ms=24, probability=0.95), "square:high=1.6,period_s=1", 120)``.
    """
    golden = read_trace(Path(__file__).with_name("golden.jsonl"))
    again = list(replay(golden))
    assert [decision.exit_layer for decision in again] == [token.line["exit_layer"] for token in golden]
    assert [decision.reason for decision in again] == [token.line["reason"] for token in golden]
    assert len(again) == 120 and len({decision.exit_layer for decision in again}) >= 3


def test_another_budget_decides_otherwise_on_the_same_trace(tmp_path: Path) -> None:
    record(tmp_path / "run.jsonl", Budget(tpot_ms=24), "square:high=1.6,period_s=2")
    trace = read_trace(tmp_path / "run.jsonl")
    tight = Budget(tpot_ms=15)
    changed = [token._replace(seen=token.seen._replace(budget=tight), start=None) for token in trace]
    assert sum(d.exit_layer for d in replay(changed)) < sum(d.exit_layer for d in replay(trace))


def test_what_was_recorded_before_the_disk_was_full_can_be_read(tmp_path: Path) -> None:
    """The file system takes a part of a line, and nothing follows it. Python 3.14 writes 128 kB at a time."""
    path, limits = tmp_path / "run.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    decided: list[Decision] = []

    def reply(writer: TraceWriter) -> None:
        plant = Plant(DEMO, Physics(noise=0.1), parse_load("square:high=1.6,period_s=0.3"), seed=3)
        decided.extend(one.decision for one in simulate(DEMO, plant, Budget(tpot_ms=24), tokens=20, trace=writer))

    def fill(writer: TraceWriter) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, limits[1]))
        with pytest.raises(InputError, match=r"run.jsonl: writing failed \(File too large\): free space"):
            for _ in range(40):
                reply(writer)
        with pytest.raises(InputError, match="writing failed"):
            reply(writer)
        with pytest.raises(InputError, match="writing failed"):
            writer.close()

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = TraceWriter(path)
    try:
        fill(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    trace = read_trace(path)
    assert 20 < len(trace) < 60 and path.stat().st_size >= 16_000
    again = [one.exit_layer for one in replay(trace)]
    assert again == [token.line["exit_layer"] for token in trace] and len(set(again)) > 1
    assert again[:20] == [one.exit_layer for one in decided[:20]]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_an_interrupt_between_two_lines_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """Header, budget, state and readings are written again."""
    state, written, lines = ControllerState.initial(), json.dumps, iter(range(1, 4))
    readings = (Reading("own", "board", 1.0, watts=9.0),)
    seen = Observation(Budget(power_w=5), 64, (1,) * 4, (1,) * 4, now_s=1.0, readings=readings)
    after, decision = Controller(DEMO).decide(state, seen)

    def interrupted(*arguments: Any, **options: Any) -> str:
        if next(lines) == last:
            raise KeyboardInterrupt
        return written(*arguments, **options)

    with TraceWriter(tmp_path / "run.jsonl") as trace:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("balcony_edge.control.trace.json.dumps", interrupted)
            trace.write(DEMO, (state, after), seen, decision, 20.0, 0)
        trace.write(DEMO, (state, after), seen, decision, 20.0, 0)
    (token,) = read_trace(tmp_path / "run.jsonl")
    assert token.seen == seen and token.start is not None


def test_what_ended_a_block_says_more_than_its_record() -> None:
    state = ControllerState.initial()
    seen = Observation(Budget(tpot_ms=24), 64, (1,) * 4, (1,) * 4, now_s=1.0)
    after, decision = Controller(DEMO).decide(state, seen)
    with pytest.raises(KeyboardInterrupt), TraceWriter("/dev/full") as trace:
        trace.write(DEMO, (state, after), seen, decision, 20.0, 0)
        raise KeyboardInterrupt


def test_new_prices_begin_without_the_readings_before(tmp_path: Path) -> None:
    state, other = ControllerState.initial(), replace(DEMO)
    readings = (Reading("own", "board", 1.0, watts=9.0),)
    with TraceWriter(tmp_path / "run.jsonl") as trace:
        for costs, read in ((DEMO, readings), (other, ())):
            seen = Observation(Budget(power_w=5), 64, (1,) * 4, (1,) * 4, now_s=1.0, readings=read)
            after, decision = Controller(costs).decide(state, seen)
            trace.write(costs, (state, after), seen, decision, 20.0, 0)
    assert [token.seen.readings for token in read_trace(tmp_path / "run.jsonl")] == [readings, ()]


def test_replies_that_alternate_are_each_replayed_from_their_own_state(tmp_path: Path) -> None:
    """As those of two threads do. A line that goes on from the one before has no state."""
    controller, decided = Controller(DEMO), []
    budgets = (Budget(tpot_ms=24), Budget(exit_layer=DEMO.exits[0]))
    states = [ControllerState.initial(), ControllerState.initial()]
    with TraceWriter(tmp_path / "run.jsonl") as trace:
        for made in range(20):
            for reply in (0, 1, 1):
                last = Measurement(DEMO.exits[-1], 20.0, 20.0 + made) if made else None
                seen = Observation(budgets[reply], 64 + made, (1,) * 4, (1,) * 4, last, made, now_s=made / 10)
                before, (states[reply], decision) = states[reply], controller.decide(states[reply], seen)
                trace.write(DEMO, (before, states[reply]), seen, decision, 20.0, 0)
                decided.append(decision.exit_layer)
    read = read_trace(tmp_path / "run.jsonl")
    assert [one.exit_layer for one in replay(read)] == decided and len(set(decided)) > 1
    assert [token.start is not None for token in read] == [True, True, False] * 20
    assert [token.seen.budget.exit_layer is None for token in read] == [True, False, False] * 20


def test_a_line_a_token_with_readings_where_they_changed(tmp_path: Path) -> None:
    record(tmp_path / "run.jsonl", Budget(power_w=5), "idle", tokens=50)

    def never(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "run.jsonl").read_text()
    lines = [json.loads(line, parse_constant=never) for line in text.splitlines()]
    assert lines[0]["trace"] == 1 and lines[1] == {"budget": {"power_w": 5.0}}
    tokens = lines[2:]
    assert len(tokens) == 50
    wanted = {"now_s", "exit_layer", "latency_ms", "predicted_ms", "pending_rows", "reason", "period_ms"}
    assert all(wanted <= token.keys() for token in tokens)
    with_readings = [token for token in tokens if "readings" in token]
    assert 2 <= len(with_readings) < 50
    assert {reading["source"] for reading in with_readings[0]["readings"]} >= {"plant:board", "plant:cpu"}


def test_readings_that_are_no_number_are_left_out(tmp_path: Path) -> None:
    """A function of the user may give NaN. The controller does not use it, and JSON has no such number."""
    readings = (Reading("own", "board", 1.0, watts=math.nan, celsius=50.0),)
    seen = Observation(Budget(power_w=5), 64, (1,) * 4, (1,) * 4, now_s=1.0, readings=readings)
    state = ControllerState.initial()
    decision = Controller(DEMO).decide(state, seen)[1]
    with TraceWriter(tmp_path / "run.jsonl") as trace:
        trace.write(DEMO, (state, state), seen, decision, 20.0, 0)
    found = read_trace(tmp_path / "run.jsonl")
    assert found[0].seen.readings == (Reading("own", "board", 1.0, celsius=50.0),)
    assert [again.reason for again in replay(found)] == [decision.reason]


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, Budget(tpot_ms=24), "idle", tokens=20)
    whole = path.read_text()
    path.write_text(whole[:-40])  # killed while it wrote
    assert len(read_trace(path)) == 19
    lines = whole.splitlines()
    start = json.loads(lines[2])["state"]
    at = ControllerState._fields.index("slowdown")

    def changed(field: str, value: object) -> list[object]:
        """The state with another value in its filter."""
        slowdown = list(start[at])
        slowdown[Slowdown._fields.index(field)] = value
        return [*start[:at], slowdown, *start[at + 1 :]]

    cases = {
        "\n".join([*lines[:5], "{", *lines[5:]]): "line 6 is not a line of a trace",
        "\n".join(lines[2:]): "has no header",
        "\n".join(lines[:2]): "contains no tokens",
        "\n".join(['{"trace": 2}', *lines]): "trace version 2, must be 1: record it again",
        "\n".join([lines[0], '{"budget": {"tpot": 3}}', *lines[2:]]): "run.jsonl: line 2: tpot = 3: no such key",
    }
    for key, value, message in (
        ("last", [30, float("inf"), 5], "last.1: Input should be a finite number"),
        ("last", "abc", "last: Input should be a valid tuple"),
        ("now_s", None, "now_s: Input should be a valid number"),
        ("stage_rows", [1], "rows of 1 stages for 4 exits"),
        ("context_length", -1, "context_length: Input should be greater than or equal to 0"),
        ("context_length", 10**400, "context_length: "),
        ("exit_layer", None, "exit_layer: Input should be a valid integer"),
        ("period_ms", 1e300, "period_ms: "),
        ("state", changed("variance", -1), "a variance below 0 or out of reach, or no noise"),
        ("state", changed("noise_variance", 0), "a variance below 0 or out of reach, or no noise"),
        ("state", changed("ratio_variance", -1), "a variance below 0 or out of reach, or no noise"),
        *(("state", changed("mean", mean), "a mean out of reach") for mean in ("NaN", 1000, -1000)),
        ("state", changed("ratio_mean", 0), "a mean out of reach"),
        ("state", changed("offsets", [0, 0]), "offsets and offset_variances differ"),
    ):
        broken = json.dumps(json.loads(lines[4]) | {key: value})
        cases["\n".join([*lines[:4], broken, *lines[5:]])] = rf"line 5 is not a line of a trace \(.*{message}"
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_trace(path)
    with pytest.raises(InputError, match=r"/dev/full: writing failed \(No space left on device\): free space"):
        record(Path("/dev/full"), Budget(tpot_ms=24), "idle", tokens=5)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not readable as a trace"):
        read_trace(path)
    with pytest.raises(InputError, match="not readable as a trace"):
        read_trace(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"run.jsonl: cannot be written \(.* is not a directory\): name another place"):
        TraceWriter(path / "run.jsonl")
