"""Budgets of requests, slots, queues, slow and lost clients, metrics, and the life of the process."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.control.company.round_trace import outcome_of, read_rounds, replay_rounds
from balcony_edge.device.machine import cpu_name
from balcony_edge.device.readings import Reading
from balcony_runtime.reply import Token
from balcony_runtime.scheduling.admission import row_bytes
from balcony_runtime.serve.http.server import Server
from balcony_runtime.serve.work.energy import EnergyMeter
from balcony_runtime.serve.work.jobs import MOST_BUFFERED, Cost, Job
from balcony_runtime.serve.work.metrics import Metrics
from balcony_runtime.serve.work.service import Limits, Service
from tests.serve.client import CHAT, HELLO, SLOW, connected, is_free, metric, until
from tests.support.command import COMMAND, refused


@pytest.mark.parametrize(
    ("model", "headers", "budget", "expected"),
    [
        (None, {}, None, None),
        ("tiny", {}, None, None),
        ("tiny:voice", {}, None, {"tpot_ms": 30.0, "probability": 0.9}),
        ("tiny:exit-3", {}, None, {"exit_layer": 3}),
        ("tiny:lossless", {}, None, {"policy": "lossless"}),
        ("tiny", {"x-slo-tpot-ms": "20"}, None, {"tpot_ms": 20.0}),
        ("tiny", {"x-slo-tpot-ms": "20", "x-llm-d-slo-tpot-ms": "25"}, None, {"tpot_ms": 25.0}),
        (
            "tiny:voice",
            {"X-LLM-D-SLO-TTFT-MS": "400"},
            {"tpot_ms": 9},
            {"tpot_ms": 9, "probability": 0.9, "ttft_ms": 400},
        ),
        ("tiny:voice", {"x-slo-tpot-ms": "20"}, {"tpot_ms": None}, {"tpot_ms": None, "probability": 0.9}),
        ("tiny", {}, {"deadline_s": 9}, {"deadline_s": 9, "expected_tokens": 70}),  # max_tokens of the request
        ("tiny", {}, {"deadline_s": 9, "expected_tokens": 5}, {"deadline_s": 9, "expected_tokens": 5}),
    ],
)
def test_a_budget_comes_by_name_by_header_and_in_the_body(
    model: str | None, headers: dict[str, str], budget: Any, expected: Any, server: Server
) -> None:
    found = server.service.names.budget(model, httpx.Headers(headers), budget, 70)
    assert (None if found is None else found.model_dump(exclude_unset=True)) == expected


def test_the_answer_says_how_the_budget_was_held(http: httpx.Client) -> None:
    named = http.post(CHAT, json=HELLO | {"model": "tiny:exit-2"}).json()["balcony"]
    assert named["tokens_per_exit"] == {"2": 6} and named["reason"] == "fixed exit"
    timed = http.post(CHAT, json=HELLO, headers={"x-slo-tpot-ms": "5000", "x-slo-ttft-ms": "5000"}).json()["balcony"]
    assert timed["late_tokens"] == 0 and timed["target_ms"] == 5000
    assert {verdict["key"]: verdict["held"] for verdict in timed["verdicts"]} == {"tpot_ms": True, "ttft_ms": True}
    late = http.post(CHAT, json=HELLO | {"budget": {"tpot_ms": 0.001}}).json()["balcony"]
    assert late["tokens_per_exit"] == {"2": 6} and late["late_tokens"] == 5


def test_budget_files_are_read_again(server: Server, budgets: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = budgets / "new.toml"
    try:
        new.write_text("exit_layer = 3\n", encoding="utf-8")
        server.reload()
        assert server.service.names.budget("tiny:new", {}, None).exit_layer == 3
        new.write_text("exit_layer = 4\n", encoding="utf-8")  # not an exit of this bundle
        with caplog.at_level(logging.WARNING):
            server.reload()
        assert "is not offered" in caplog.text and "tiny:new" not in server.service.names.budgets
        new.write_text("tpot = 4\n", encoding="utf-8")
        (budgets / "voice.toml").touch()
        server.reload()
        assert "budget files are as before" in caplog.text and "tiny:voice" in server.service.names.budgets
    finally:
        new.unlink()
        server.reload()


def test_the_servers_own_budget_is_read_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("exit_layer = 3\n", encoding="utf-8")
    server = serve(budget=own)
    server.reload()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post(CHAT, json=HELLO).json()["balcony"]["tokens_per_exit"] == {"3": 6}
        own.write_text("exit_layer = 4\n", encoding="utf-8")  # not an exit of this bundle
        server.reload()
        assert client.post(CHAT, json=HELLO).json()["balcony"]["tokens_per_exit"] == {"3": 6}
        own.write_text("exit_layer = 2\n", encoding="utf-8")
        server.reload()
        assert client.post(CHAT, json=HELLO).json()["balcony"]["tokens_per_exit"] == {"2": 6}
        assert client.get("/v1/models").json()["data"][0]["budget"] == {"exit_layer": 2}


def test_a_running_reply_takes_another_budget(http: httpx.Client, server: Server) -> None:
    exits = []
    with http.stream("POST", CHAT, json=SLOW | {"timings_per_token": True}) as answer:
        for line in answer.iter_lines():
            if '"balcony"' in line:
                facts = json.loads(line.removeprefix("data: "))["balcony"]
                exits.append(facts["exit"])
                if len(exits) == 3:
                    (slot,) = http.get("/slots").json()
                    assert slot["id"] == facts["slots"][0] and slot["budget"] == SLOW["budget"]
                    assert slot["is_processing"] and slot["model"] == "tiny"
                    timed = {"deadline_s": 60, "max_pace_tps": 50}
                    changed = http.post(f"/slots/{slot['id']}", json={"budget": timed})
                    assert changed.json()["budget"] == timed | {"expected_tokens": 200}
                    changed = http.post(f"/slots/{slot['id']}", json={"budget": {"exit_layer": 2}})
                    assert changed.json()["budget"] == {"exit_layer": 2}
    assert exits[:3] == [5] * 3 and exits[-1] == 2 and len(exits) == 200
    assert 'balcony_requests_total{endpoint="/slots/{key}",status="200"}' in http.get("/metrics").text
    until(lambda: is_free(server))


def test_a_client_that_goes_away_ends_its_reply(server: Server) -> None:
    for stream, count in ((True, 1), (False, 1), (True, 3)):
        with connected(server, SLOW | {"stream": stream, "n": count}) as connection:
            if stream:
                assert connection.recv(10).startswith(b"HTTP/1.1 2")
            until(lambda: server.service.slots and not server.service.waiting)
            assert len(server.service.slots) == count
        until(lambda: is_free(server))


def test_a_half_closed_client_ends_its_reply(server: Server) -> None:
    with connected(server, SLOW) as connection:
        connection.recv(10)
        connection.shutdown(socket.SHUT_WR)
        until(lambda: is_free(server))


def test_a_stalled_client_is_paused_and_holds_nobody_up(server: Server, http: httpx.Client) -> None:
    body = SLOW | {
        "budget": {},
        "n": 8,
        "logprobs": True,
        "top_logprobs": 20,
        "temperature": 1,
        "timings_per_token": True,
    }
    with connected(server, body, receive_buffer=4096) as connection:
        until(lambda: sum(job.paused for job in server.service.slots) == 8, 60)
        assert http.post(CHAT, json=HELLO).status_code == 200  # by now the tokens that were on the way have come
        made = [job.cost.tokens for job in server.service.slots]
        time.sleep(0.3)
        assert [job.cost.tokens for job in server.service.slots] == made and max(made) < 200
        assert all(job.buffered <= MOST_BUFFERED + 4 for job in server.service.slots)
        received = b""
        while b"data: [DONE]" not in received[-100:]:
            received += connection.recv(1 << 20)
    assert received.count(b'"finish_reason":"length"') == 8
    until(lambda: is_free(server))


def test_metrics(http: httpx.Client, server: Server) -> None:
    lines = (
        'balcony_tokens_total{exit="2"}',
        "balcony_late_tokens_total",
        "balcony_token_gap_seconds_count",
        'balcony_requests_total{endpoint="/v1/chat/completions",status="200"}',
        'balcony_rejections_total{reason="invalid_budget"}',
        'gen_ai_server_time_to_first_token_seconds_count{gen_ai_operation_name="chat",'
        'gen_ai_provider_name="balcony-edge",gen_ai_request_model="tiny"}',
    )
    before = [metric(server.url, line) for line in lines]
    http.post(CHAT, json=HELLO | {"budget": {"tpot_ms": 0.001}})
    http.post(CHAT, json=HELLO | {"budget": {"tpo": 1}})
    until(lambda: is_free(server))
    assert [metric(server.url, line) - old for line, old in zip(lines, before, strict=True)] == [6, 5, 5, 1, 1, 1]
    page = http.get("/metrics").text
    assert all(f"\nbalcony_{name} 0.0\n" in page for name in ("replies_running", "replies_waiting", "pending_rows"))
    assert metric(server.url, "balcony_slowdown") > 0
    assert "late_tokens_total Tokens after the first that missed tpot_ms." in page


def test_a_model_is_counted_under_one_name(serve: Callable[..., Server]) -> None:
    """Whichever form of Unicode a client writes it in."""
    server = serve(name="t\u00efny")
    line = (
        'gen_ai_server_time_to_first_token_seconds_count{gen_ai_operation_name="chat",'
        'gen_ai_provider_name="balcony-edge",gen_ai_request_model="t\u00efny"}'
    )
    for name in ("t\u00efny", "ti\u0308ny"):
        answer = httpx.post(f"{server.url}{CHAT}", json=HELLO | {"model": name}, timeout=60)
        assert answer.json()["model"] == "t\u00efny"
    until(lambda: is_free(server))
    assert metric(server.url, line) == 2


def test_what_sensors_measure(serve: Callable[..., Server], tiny: Any) -> None:
    """Power and energy in ``/props``, answers and metrics, from readings whose counter grows by 2.5 J whenever it is read."""
    joules, manifest = itertools.count(100.0, 2.5), Bundle.open(tiny.path).manifest

    def readings() -> tuple[Reading, ...]:
        now_s = time.monotonic()
        return (
            Reading("ina3221:VDD_IN", "board", now_s, watts=12.5, joules=next(joules)),
            Reading("thermal:cpu-thermal", "cpu", now_s, celsius=61.5),
            Reading("battery:BAT0", "battery", now_s, charge=0.75),
        )

    server = serve(readings=readings)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        props = client.get("/props").json()
        device = props["device"]
        assert device["engine"] and (device["cpu"], device["power_w"]) == (cpu_name(), {"board": 12.5})
        assert props["bundle"] == {
            "model": manifest.model.name,
            "precision": "float32",
            "fingerprint": manifest.fingerprint,
        }
        assert client.post(CHAT, json=HELLO).json()["balcony"]["joules"] == {"board": 2.5}
        text = client.get("/metrics").text
        for line in (
            'balcony_power_watts{scope="board",source="ina3221:VDD_IN"} 12.5',
            'balcony_temperature_celsius{scope="cpu",source="thermal:cpu-thermal"} 61.5',
            'balcony_battery_charge_ratio{scope="battery",source="battery:BAT0"} 0.75',
        ):
            assert f"\n{line}\n" in text
        counted = metric(server.url, 'balcony_energy_joules_total{scope="board",source="ina3221:VDD_IN"}')
        assert 0 < counted < 100, "a process begins at 0, and not at the sensor's counter"


def test_an_answer_without_a_sensor_has_no_joules(serve: Callable[..., Server]) -> None:
    with httpx.Client(base_url=serve(readings=lambda: ()).url, timeout=60) as client:
        assert client.get("/props").json()["device"]["power_w"] == {}
        assert client.post(CHAT, json=HELLO).json()["balcony"]["joules"] is None
        client.post(CHAT, json=HELLO | {"ignore_eos": True, "budget": {"temperature_c": 70}})
        assert "\nbalcony_unseen_tokens_total 6.0\n" in client.get("/metrics").text


def test_a_line_for_each_request(http: httpx.Client, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="balcony_runtime.serve.requests"):
        http.post(CHAT, json=HELLO | {"model": "tiny:exit-2"})
        until(lambda: caplog.records)
        line = json.loads(caplog.records[-1].getMessage())
        assert line["status"] == 200 and line["tokens_per_exit"] == {"2": 6} and line["model"] == "tiny:exit-2"
        caplog.clear()
        http.post(CHAT, json={})
        http.post(CHAT, json=HELLO | {"model": "tiny:strict"})
        until(lambda: len(caplog.records) == 2)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["status"], line["reason"]) for line in lines] == [(400, "invalid_value"), (422, "infeasible")]


@pytest.mark.parametrize("method", ["of", "decoder"], ids=["while it is prepared", "in the decode thread"])
def test_a_bug_is_an_answer_and_is_logged(
    http: httpx.Client, server: Server, monkeypatch: Any, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server.service.llm._requests, method, lambda *_, **__: 1 / 0)
        found = http.post(CHAT, json=HELLO)
    assert (found.status_code, found.json()["error"]["code"]) == (500, "internal")
    assert http.post(CHAT, json=HELLO).status_code == 200, "on the same connection"
    assert any(record.exc_info for record in caplog.records)


def test_ended_replies_of_an_unfinished_answer_take_no_place() -> None:
    service = Service(None, None, None, Limits())
    for key in range(4):
        service._jobs[key] = Job(key, 0, [1], None)
    service._jobs[0].ended = True
    service._jobs[1].begin()
    assert [job.key for job in service.slots] == [1, 2, 3] and service.waiting == 2


def test_times_of_replies_that_follow_one_another() -> None:
    """Each reads its prompt in 0.25 s and makes 100 tokens in 4 s, one after the other: 198 gaps in 8 s."""
    costs = []
    for begun_s, last_s in ((1.0, 5.0), (5.0, 9.0)):
        costs.append(cost := Cost(asked_s=0.0))
        cost.begun_s, cost.earliest_first_s, cost.latest_first_s = begun_s - 0.25, begun_s, begun_s
        cost.last_s, cost.tokens, cost.gaps, cost.gaps_ms = last_s, 100, 99, 99 * 40.0
        cost.per_exit.update({2: 25, 5: 75})
    total = Cost.of(costs)
    timings, facts = total.timings(prompt_tokens=10, cached=0), total.facts()
    assert (timings["prompt_ms"], timings["predicted_ms"]) == (250.0, 8000.0)  # without the wait
    assert timings["predicted_per_second"] == pytest.approx(24.75)
    assert (timings["prompt_per_second"], timings["prompt_per_token_ms"]) == (40.0, 25.0)
    assert timings["predicted_per_token_ms"] == pytest.approx(8000 / 198)
    assert (facts["mean_tpot_ms"], facts["mean_depth"]) == (pytest.approx(40.0), 4.25)
    assert total.ttft_ms == 5000.0


def test_white_space_is_a_text(http: httpx.Client) -> None:
    assert http.post("/tokenize", json={"content": "\n"}).json()["count"] > 0
    assert http.post("/tokenize", json={"content": ""}).json()["tokens"] == []
    assert http.post("/v1/completions", json={"prompt": "\n\n", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("most", [{"echo": True, "max_tokens": 0}, {"max_tokens": 2**31 - 1}], ids=str)
def test_a_deadline_is_for_the_tokens_that_can_come(http: httpx.Client, most: dict[str, Any]) -> None:
    body = {"prompt": [7] * 200, "budget": {"deadline_s": 9}, **most}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_prompts_that_never_ran_are_not_counted(http: httpx.Client, server: Server) -> None:
    before = metric(server.url, "balcony_prompt_tokens_total")
    assert http.post(CHAT, json=HELLO | {"model": "tiny:strict"}).status_code == 422
    assert metric(server.url, "balcony_prompt_tokens_total") == before
    made = http.post("/v1/completions", json={"prompt": [7] * 9, "echo": True, "logprobs": 1, "max_tokens": 0})
    assert made.status_code == 200 and metric(server.url, "balcony_prompt_tokens_total") == before + 9


def test_a_client_that_does_not_read_holds_up_no_end(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balcony_runtime.serve.http.server.LAST_S", 1)
    server = serve(drain_s=0.5)
    large = SLOW | {"n": 8, "logprobs": True, "top_logprobs": 20, "budget": {}}
    with connected(server, large, receive_buffer=4096):
        until(lambda: any(job.paused for job in server.service.slots))
        server.stop()
        until(lambda: server._sockets[0].fileno() == -1, 30)


def test_a_server_that_stops_ends_what_takes_too_long(serve: Callable[..., Server]) -> None:
    """Until then balancers hear that it stops, and its metrics can be read."""
    server = serve(drain_s=4.0)
    slow = SLOW | {"budget": {"max_pace_tps": 10}}
    # one client, made before: each takes 0.1 s of CPU, and a machine may be at a tenth of its speed
    with httpx.Client(base_url=server.url, timeout=20) as client, client.stream("POST", CHAT, json=slow) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.stop()
        health, metrics = (client.get(path) for path in ("/health", "/metrics"))
        assert (health.status_code, health.json()["error"]["code"]) == (503, "draining")
        assert metrics.status_code == 200 and "balcony_replies_running 1.0" in metrics.text
        (slot,) = client.get("/slots").json()
        faster = client.post(f"/slots/{slot['id']}", json={"budget": {"max_pace_tps": 12}})
        assert faster.status_code == 200, "it may end in time"
        assert client.post(CHAT, json=HELLO).status_code == 503
        rest = [line for line in lines if line]
    assert '"code":"stopped"' in rest[-2] and rest[-1] == "data: [DONE]" and len(rest) < 100


def test_props(http: httpx.Client) -> None:
    found = http.get("/props").json()
    assert [one["exit"] for one in found["exits"]] == [2, 3, 5] and found["total_slots"] == 16
    assert found["budgets"]["tiny:voice"] == {"tpot_ms": 30.0, "probability": 0.9}


def test_the_version_is_that_of_the_code_that_runs(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade removes the package's files before it writes the new ones, while the server goes on."""
    installed = version("balcony-edge")
    monkeypatch.setattr("importlib.metadata.distribution", Mock(side_effect=PackageNotFoundError("balcony-edge")))
    assert http.get("/props").json()["build_info"] == f"balcony-edge {installed}"
    assert http.get("/openapi.json").json()["info"]["version"] == installed


def test_the_page_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    found = http.get("/")
    assert (
        found.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in found.headers["content-security-policy"]
    )
    assert not re.findall(r"""(?:src|href)=["']?(?!["'#]|data:)""", found.text) and "https://" not in found.text


@pytest.mark.slow
def test_the_life_of_a_process(tiny: Any, tmp_path: Path) -> None:
    """Readiness, 503 while loading, SIGHUP, and a SIGTERM that waits for the reply in progress."""
    (tmp_path / "calm.toml").write_text("max_pace_tps = 40\n", encoding="utf-8")
    with socket.socket() as free, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server has it; nobody else gets the port
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        address = f"\0balcony-{os.getpid()}"  # a name without a path: those of sockets are short
        told.bind(address)
        told.settimeout(60)
        watchdog = {"WATCHDOG_USEC": "2000000"}
        environment = {
            **os.environ,
            **watchdog,
            "NOTIFY_SOCKET": address.replace("\0", "@"),
            "BALCONY_EDGE_API_KEY": "key\n",  # as a secret from a file often is
        }
        beats = []

        def heard() -> bytes:
            """The next message other than the watchdog's."""
            while (message := told.recv(1000)) == b"WATCHDOG=1":
                beats.append(message)
            return message

        command = [*COMMAND, "serve", str(tiny.path), "--port", str(port), "--budgets", str(tmp_path)]
        command += ["--record", str(tmp_path / "rounds.jsonl")]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            key = {"authorization": "Bearer key"}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=key, timeout=60) as client:
                assert heard().startswith(b"READY=1")
                assert client.get("/health").status_code == 200
                (tmp_path / "fresh.toml").write_text("exit_layer = 2\n", encoding="utf-8")
                process.send_signal(signal.SIGHUP)
                assert heard().startswith(b"RELOADING=1") and heard() == b"READY=1"
                assert client.get("/v1/models/tiny-llama:fresh").status_code == 200
                both = {"prompt": [[5, 6], [7, 8]], "max_tokens": 6, "ignore_eos": True, "budget": {"tpot_ms": 500}}
                assert client.post("/v1/completions", json=both).status_code == 200
                body = SLOW | {"model": "tiny-llama:calm", "budget": None, "max_tokens": 60}
                with client.stream("POST", CHAT, json=body) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    process.terminate()
                    assert heard() == b"STOPPING=1" and beats
                    assert [line for line in lines if line][-1] == "data: [DONE]"
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert '"tokens": 60' in errors and "Traceback" not in errors
    recorded = read_rounds(tmp_path / "rounds.jsonl")
    assert {len(one.exits) for one in recorded.rounds} >= {2}, "both replies in one round"
    assert [outcome_of(found) for found in replay_rounds(recorded)] == [one.outcome for one in recorded.rounds]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is not a bundle"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: is not an address of this machine"),
        (["--ssl-certfile", "cert.pem"], "--ssl-certfile and --ssl-keyfile: TLS needs both; give the other one, too"),
        (
            ["--ssl-certfile", "a.pem", "--ssl-keyfile", "b.pem"],
            "--ssl-certfile a.pem: cannot be read (No such file or directory)",
        ),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused(message, "serve", tmp_path, "--port", "0", *arguments)


def test_seconds_are_seconds() -> None:
    none: dict[str, Any] = dict.fromkeys(("running", "waiting", "pending", "slowdown"), lambda: 0.0)
    metrics = Metrics((2, 5), kept={}, readings=tuple, **none)
    given: dict[str, Any] = dict.fromkeys(Token._fields) | {"decision": Mock(unseen=False)}
    made = Token(**given | {"exit_layer": 5, "latency_ms": 20.0, "target_ms": 10.0, "forced": False})
    metrics.token(made, first=True)
    metrics.token(made, first=False)
    cost = Cost(asked_s=1.0)
    cost.earliest_first_s = cost.latest_first_s = 1.25
    cost.gaps, cost.gaps_ms = 2, 60.0
    metrics.reply("chat", "tiny", cost, 0.5, "")
    sums = dict(re.findall(r"^(\w+_sum)(?:{.*})? (\S+)$", metrics.text().decode(), re.MULTILINE))
    assert {name.removesuffix("_sum"): float(value) for name, value in sums.items()} == {
        "balcony_token_gap_seconds": 0.02,
        "gen_ai_server_time_to_first_token_seconds": 0.25,
        "gen_ai_server_time_per_output_token_seconds": 0.03,
        "gen_ai_server_request_duration_seconds": 0.5,
    }


def test_a_counter_that_comes_while_an_answer_runs_is_not_its_energy() -> None:
    now_s = time.monotonic()
    one = Reading("rapl:package-0", "cpu", now_s, watts=9.0, joules=100.0)
    two = Reading("rapl:package-1", "cpu", now_s, watts=9.0, joules=5000.0)
    seen = iter([(one,), (one, two), (one,), (dataclasses.replace(one, joules=103.0),)])
    assert EnergyMeter(lambda: next(seen)).joules() == {}
    assert EnergyMeter(lambda: next(seen)).joules() == {"cpu": 3.0}


def test_a_reply_that_is_not_admitted_waits(serve: Callable[..., Server]) -> None:
    """Memory for one reply: the other is in line, and its prompt's time begins when it is admitted."""
    server = serve(name="tiny")
    llm = server.service.llm
    llm.budget = Budget(kv_memory_mb=250 * row_bytes(llm.engine.manifest) / 1e6)

    first = connected(server, SLOW)
    until(lambda: metric(server.url, "balcony_replies_running") == 1)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(httpx.post, server.url + CHAT, json=HELLO | {"max_tokens": 200}, timeout=60)
        until(lambda: metric(server.url, "balcony_replies_waiting") == 1)
        assert metric(server.url, "balcony_replies_running") == 1
        slots = httpx.get(server.url + "/slots", timeout=20).json()
        assert [one["is_processing"] for one in slots] == [True, False]
        time.sleep(0.3)
        first.close()
        answer = waits.result(60).json()
    assert answer["balcony"]["ttft_ms"] - answer["timings"]["prompt_ms"] >= 300
    until(lambda: is_free(server))
