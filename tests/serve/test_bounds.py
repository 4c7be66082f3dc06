"""Bounds of the server: keys and bodies, the queue, time limits, compilers, and a decode thread that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import balcony_edge
from balcony_runtime.serve.bodies.asked import Asked, read_asked
from balcony_runtime.serve.bodies.fields import Fields
from balcony_runtime.serve.bodies.refusal import RefusedError
from balcony_runtime.serve.http import server as server_module
from balcony_runtime.serve.http.app import SMALL_BODY
from balcony_runtime.serve.http.server import Server, Settings
from balcony_runtime.serve.work import answers
from balcony_runtime.serve.work.jobs import Channel, Ended, Job
from balcony_runtime.serve.work.metrics import Metrics
from balcony_runtime.serve.work.service import LARGE_BODY, Limits, Service
from balcony_runtime.serve.work.shapes import Shapes
from balcony_runtime.structure.asked import Structure
from balcony_runtime.structure.grammar import Grammars
from tests.serve.client import CHAT, HELLO, SLOW, is_free, until


@pytest.fixture(scope="module")
def strict(serve: Callable[..., Server]) -> Server:
    """A server with a key and narrow bounds."""
    limits = Limits(parallel=1, queue=1, body_bytes=2000, request_s=1.5, body_s=1.0)
    return serve(name="tiny", api_key="secret", limits=limits)


def test_bounds(strict: Server) -> None:
    with httpx.Client(base_url=strict.url, timeout=20) as client:
        assert client.get("/health").status_code == 200 and client.get("/").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer sécret".encode()}):
            found = client.get("/v1/models", headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        # a client chooses the Host header, and a path in it opens nothing
        assert client.get("/v1/models", headers={"host": "localhost/health?"}).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        assert client.get("/v1/models", headers={"host": "edge.example"}).status_code == 200
        large = client.post(CHAT, content=b" " * 3000)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")

        def slowly() -> Any:
            yield b"{"
            time.sleep(3.0)
            yield b"}"

        late = client.post(CHAT, content=slowly())
        assert (late.status_code, late.json()["error"]["code"]) == (408, "slow_body")


def test_a_full_queue_and_the_time_limit(strict: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict.service, "limits", replace(strict.service.limits, request_s=5.0))
    found: list[httpx.Response] = []
    slow = SLOW | {"budget": {"max_pace_tps": 20}}

    def ask(stream: bool) -> None:
        found.append(client.post(CHAT, json=slow | {"stream": stream}))

    with httpx.Client(base_url=strict.url, headers={"authorization": "Bearer secret"}, timeout=20) as client:
        threads = [threading.Thread(target=ask, args=[stream]) for stream in (True, False)]
        threads[0].start()
        until(lambda: len(strict.service.slots) == 1 and not strict.service.waiting)
        threads[1].start()
        until(lambda: strict.service.waiting == 1)
        full = client.post(CHAT, json=HELLO)
        assert (full.status_code, full.headers["x-balcony-reason"]) == (429, "queue_full")
        assert 1 <= int(full.headers["retry-after"]) <= 60
        for thread in threads:
            thread.join()
        streamed = next(answer for answer in found if answer.status_code == 200)
        assert "took longer than 5 s" in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
        whole = next(answer for answer in found if answer.status_code != 200)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        counted = client.get("/metrics").text
        assert 'balcony_rejections_total{reason="queue_full"} 1.0' in counted
        assert 'balcony_rejections_total{reason="timeout"} 2.0' in counted  # that of the stream as well
    until(lambda: is_free(strict))


def test_a_stream_that_waits_says_so_and_ends_at_the_time_limit(
    strict: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comments keep a quiet stream open; the time limit comes while it waits for its place."""
    monkeypatch.setattr(answers, "OPENING_S", 0.1)
    monkeypatch.setattr(answers, "KEEPALIVE_S", 0.2)
    headers = {"authorization": "Bearer secret"}
    paced = SLOW | {"budget": {"max_pace_tps": 4}, "stream": True}
    with httpx.Client(base_url=strict.url, headers=headers, timeout=20) as client:
        with client.stream("POST", CHAT, json=paced):
            until(lambda: len(strict.service.slots) == 1 and not strict.service.waiting)
            began_s = time.monotonic()
            found = client.post(CHAT, json=SLOW | {"stream": True})
        took_s = time.monotonic() - began_s
    comments, _, rest = found.text.rpartition(": waiting\n")
    assert 3 <= 1 + comments.count(": waiting") <= 7  # 1.4 s are 7 times 0.2 s
    assert "took longer than 1.5 s" in rest and 1.4 < took_s < 10
    assert found.text.startswith(": waiting"), "clients take the first piece for the first token"
    assert ": waiting\n\n" not in found.text, "openai-go took an empty line for an event, and found no JSON in it"
    until(lambda: is_free(strict))


def test_a_stream_of_tokens_that_show_nothing_says_so(strict: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies would close it, although tokens come: control tokens after ``ignore_eos`` have no text."""
    monkeypatch.setattr(answers, "KEEPALIVE_S", 0.3)
    monkeypatch.setattr(Shapes, "token", lambda *_: [])
    headers = {"authorization": "Bearer secret"}
    paced = SLOW | {"budget": {"max_pace_tps": 10}, "max_tokens": 10}
    with httpx.Client(base_url=strict.url, headers=headers, timeout=20) as client:
        found = client.post(CHAT, json=paced)
    assert found.text.count(": waiting\n") >= 2  # 0.9 s
    until(lambda: is_free(strict))


def test_a_body_that_ends_while_the_server_stops(strict: Server) -> None:
    """The guard has let its headers pass; no reply may begin that the end of the process would cut."""

    async def ask() -> None:
        await strict.service.answer(read_asked(b'{"prompt": "hi"}', chat=False), {}, "", 16, time.monotonic())

    strict.service.draining = True
    try:
        with pytest.raises(RefusedError, match="the server is stopping") as refused:
            asyncio.run(ask())
    finally:
        strict.service.draining = False
    assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "5")


def test_the_time_limit_and_a_client_that_leaves_end_a_preparation(
    strict: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(strict.service, "_prepare", lambda *_: gate.wait(60))
    headers = {"authorization": "Bearer secret"}
    with httpx.Client(base_url=strict.url, headers=headers, timeout=20) as client:
        late = client.post(CHAT, json=HELLO)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        monkeypatch.setattr(strict.service, "limits", replace(strict.service.limits, request_s=60.0))
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=HELLO, timeout=0.2)
        until(lambda: not strict._uvicorn.server_state.tasks)  # before its time limit
    assert strict.service.busy, "their threads go on"
    gate.set()
    until(lambda: not strict.service.busy)


def test_the_second_signal_also_ends_requests_that_are_being_read(serve: Callable[..., Server]) -> None:
    server, gate, found = serve(), threading.Event(), []
    prepare = server.service._prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.service, "_prepare", lambda *args: gate.wait(60) and prepare(*args))
        thread = threading.Thread(target=lambda: found.append(httpx.post(server.url + CHAT, json=HELLO, timeout=60)))
        thread.start()
        until(lambda: server.service.busy)
        server.service.abort()
        gate.set()
        thread.join()
    assert (found[0].status_code, found[0].json()["error"]["code"]) == (503, "stopped")


def test_large_bodies_that_come_at_once_are_turned_away(serve: Callable[..., Server]) -> None:
    """One large body may come alone, and small ones next to it; a second large one is turned away."""
    server, gate = serve(limits=Limits(bodies_bytes=300_000)), threading.Event()
    found: list[httpx.Response] = []
    sent = threading.Event()

    def large() -> Iterator[bytes]:
        yield b" " * 400_000
        sent.set()
        gate.wait(20)
        yield json.dumps(HELLO).encode()

    thread = threading.Thread(target=lambda: found.append(httpx.post(server.url + CHAT, content=large(), timeout=20)))
    thread.start()
    assert sent.wait(20)

    def full() -> bool:
        body = b" " * (2 * SMALL_BODY) + json.dumps(HELLO).encode()
        answer = httpx.post(server.url + CHAT, content=body, timeout=20)
        return answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"

    until(full)
    assert httpx.post(server.url + CHAT, json=HELLO, timeout=20).status_code == 200
    gate.set()
    thread.join()
    assert found[0].status_code == 200 and not full()


def test_a_channel_wakes_its_reader_for_items_and_times() -> None:
    """With one timer for many waits, which is left to ring early and is gone at the end."""

    async def use() -> None:
        loop, channel, job = asyncio.get_running_loop(), Channel(), Job(0, 0, [1], None)
        timers = []
        with pytest.MonkeyPatch.context() as patch:
            call_later = loop.call_later
            patch.setattr(loop, "call_later", lambda *args: timers.append(call_later(*args)) or timers[-1])
            far_s = time.monotonic() + 60
            for number in range(50):
                loop.call_soon(channel.put, job, Ended())
                await channel.wait(far_s + number)  # its timer rings at far_s, and that is early enough
                assert channel.take() == (job, Ended()) and channel.take() is None
            loop.call_soon(channel.wake)
            await channel.wait(far_s)
            assert channel.take() is None and len(timers) == 1
            begin_s = time.monotonic()
            await channel.wait(begin_s + 0.05)  # sooner than the timer
            assert time.monotonic() - begin_s >= 0.045 and timers[0].cancelled()
            await asyncio.wait_for(channel.wait(time.monotonic() + 0.05), 5)  # later than the timer that has rung
            await asyncio.wait_for(channel.wait(begin_s), 5)  # a time that has passed
            channel.wake()  # nobody waits
            channel.put(job, Ended())
            assert channel.take() is not None
            loop.call_soon(channel.wake)
            await channel.wait(far_s)
            channel.silence()
            assert all(timer.cancelled() or timer.when() <= loop.time() for timer in timers)

    asyncio.run(use())


def test_the_time_of_a_compiler_counts_and_nobody_else_waits_for_it(server: Server, http: httpx.Client) -> None:
    gate, compile_ = threading.Event(), Grammars._compile

    def slowly(grammars: Grammars, asked: Structure) -> Any:
        assert gate.wait(120)
        return compile_(grammars, asked)

    found: list[Any] = []

    def ask() -> None:
        body = HELLO | {"guided_regex": "[a-c]{3}", "seed": -1}
        found.append(http.post(CHAT, json=body, timeout=120).json())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grammars, "_compile", slowly)
        threads = [threading.Thread(target=ask) for _ in range(40)]  # more than asyncio has threads
        for thread in threads:
            thread.start()
        until(lambda: server.service._preparing == len(threads), 30)
        begin_s = time.monotonic()
        assert http.post("/tokenize", json={"content": "fox"}).status_code == 200
        time.sleep(0.3)
        waited_ms = 1000 * (time.monotonic() - begin_s)
        gate.set()
        for thread in threads:
            thread.join()
    assert min(answer["balcony"]["ttft_ms"] for answer in found) > waited_ms > 300
    until(lambda: is_free(server))


def test_requests_that_come_at_once_share_the_queue(strict: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more replies are taken than may run and wait, although all prompts are read at the same time."""
    monkeypatch.setattr(strict.service, "limits", replace(strict.service.limits, request_s=60.0))
    statuses: list[int] = []

    def ask() -> None:
        body = SLOW | {"stream": False, "budget": {"max_pace_tps": 4}}
        statuses.append(client.post(CHAT, json=body).status_code)

    with httpx.Client(base_url=strict.url, headers={"authorization": "Bearer secret"}, timeout=60) as client:
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        until(lambda: len(statuses) == 10 and len(strict.service.slots) == 2)
        for slot in client.get("/slots").json():  # without their pace they end at once
            client.post(f"/slots/{slot['id']}", json={"budget": None})
        for thread in threads:
            thread.join()
        until(lambda: is_free(strict))
        assert statuses == [429] * 10 + [200] * 2
        many = client.post(CHAT, json=HELLO | {"n": 4})
        assert many.status_code == 200 and len(many.json()["choices"]) == 4  # alone it may be larger than the queue
    until(lambda: is_free(strict))


def test_health_and_the_watchdog_see_a_decode_thread_that_hangs(serve: Callable[..., Server], monkeypatch: Any) -> None:
    server, gate = serve(), threading.Event()
    until(lambda: server.service.stuck_s == 0)  # it has nothing to do
    monkeypatch.setattr("balcony_runtime.serve.http.app.STUCK_S", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr("balcony_runtime.together.Together.step", lambda _: gate.wait() and [])
        statuses: list[int] = []
        thread = threading.Thread(
            target=lambda: statuses.append(httpx.post(server.url + CHAT, json=HELLO, timeout=60).status_code)
        )
        thread.start()
        until(lambda: len(server.service.slots) == 1)
        until(lambda: server.service.stuck_s > 0.2)
        found = httpx.get(server.url + "/health", timeout=60)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "stuck")
    gate.set()
    thread.join()
    assert statuses == [200]
    until(lambda: is_free(server) and server.service.stuck_s == 0)
    assert httpx.get(server.url + "/health", timeout=60).status_code == 200


def test_scrapes_leave_the_threads_to_prompts(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk hangs whose bytes each scrape asks for, as that of --prefix-dir may on a network drive."""
    server, gate, asked = serve(), threading.Event(), list[Metrics]()

    def hangs(metrics: Metrics) -> bytes:
        asked.append(metrics)
        gate.wait(60)
        return b""

    monkeypatch.setattr(Metrics, "text", hangs)
    # the loop has 32 threads at most; one client for all, because each takes 0.1 s of CPU to make
    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(40) as scrapers:
        pages = [scrapers.submit(client.get, "/metrics") for _ in range(40)]
        try:
            until(lambda: len(server._uvicorn.server_state.tasks) == len(pages))
            assert client.post(CHAT, json=HELLO, timeout=30).status_code == 200
        finally:
            gate.set()
        assert {page.result().status_code for page in pages} == {200} and len(asked) == 1


def test_a_process_that_may_open_no_more_files_keeps_its_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message is lost, and not the task that sends them."""

    def full(*_: Any) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setenv("NOTIFY_SOCKET", "@nobody")
    sockets = SimpleNamespace(socket=full, AF_UNIX=socket.AF_UNIX, SOCK_DGRAM=socket.SOCK_DGRAM)
    monkeypatch.setattr(server_module, "socket", sockets)
    server_module._notify("WATCHDOG=1")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_nothing_of_its_body(http: httpx.Client, server: Server, stream: bool) -> None:
    """Bodies of replies in progress and in line would be in memory together, as objects of twenty times their size."""
    message = HELLO["messages"][0] | {"kept by nobody": [[]]}
    variables = {"kept by nobody": [[]]}
    content = json.dumps(SLOW | {"messages": [message], "chat_template_kwargs": variables, "stream": stream})
    del message, variables
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(http.post, CHAT, content=content)
        until(lambda: any(slot["n_decoded"] for slot in http.get("/slots").json()))
        gc.collect()
        assert not [one for one in gc.get_objects() if type(one) is dict and "kept by nobody" in one]
        assert not answer.done()
        for slot in http.get("/slots").json():  # without its pace the reply ends at once
            http.post(f"/slots/{slot['id']}", json={"budget": None})
        assert answer.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_busy_replies_are_told_when_to_come_again(stream: bool, http: httpx.Client, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("balcony_runtime.scheduling.scheduler.MOST_WAITING", 0)
        found = http.post(CHAT, json=HELLO | {"stream": stream})
    assert (found.status_code, found.headers["x-balcony-reason"]) == (429, "overloaded")
    assert found.json()["error"]["code"] == "overloaded" and int(found.headers["retry-after"]) >= 1


def test_texts_that_are_tokenized_count_as_bodies(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, begun, gate = serve(limits=Limits(bodies_bytes=300_000)), threading.Event(), threading.Event()
    encode = server.service.llm.encode

    def slowly(*args: Any, **options: Any) -> list[int]:
        begun.set()
        gate.wait(20)
        return encode(*args, **options)

    def tokenize(characters: int) -> int:
        body = {"content": "a" * characters}
        return httpx.post(server.url + "/tokenize", json=body, timeout=60).status_code

    monkeypatch.setattr(server.service.llm, "encode", slowly)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(tokenize, 200_000)
        assert begun.wait(20)
        assert tokenize(200_000) == 429
        gate.set()
        assert first.result() == 200
    assert tokenize(200_000) == 200


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, HELLO), ("/tokenize", {"content": "fox"}), ("/detokenize", {"tokens": [7]})]
)
def test_a_large_body_is_read_while_others_are_answered(
    path: str, body: dict[str, Any], http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate, read = threading.Event(), threading.Event(), Fields.__init__

    def slowly(*args: Any, **options: Any) -> None:
        begun.set()
        assert gate.wait(60)
        read(*args, **options)

    monkeypatch.setattr(Fields, "__init__", slowly)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(http.post, path, json=body | {"chat_id": "x" * LARGE_BODY})
        try:
            assert begun.wait(20) and http.get("/health", timeout=20).status_code == 200
        finally:
            gate.set()
        assert answer.result().status_code == 200


def test_times_of_a_large_body_count_from_when_it_came(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for other large ones before it is read; so do the time limit and the time to the first token."""

    def slowly(*args: Any, **options: Any) -> Asked:
        time.sleep(0.5)
        return read_asked(*args, **options)

    monkeypatch.setattr("balcony_runtime.serve.http.app.read_asked", slowly)
    found = http.post(CHAT, json=HELLO | {"chat_id": "x" * LARGE_BODY})
    assert found.json()["balcony"]["ttft_ms"] >= 500


def test_a_server_that_is_stopped_while_it_loads_serves_nobody(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def open_llm() -> balcony_edge.LLM:
        loading.set()
        assert go_on.wait(60)
        return balcony_edge.load(tiny.path)

    server = Server(open_llm, Settings(port=0))
    with caplog.at_level(logging.INFO):
        thread = threading.Thread(target=server.run)
        thread.start()
        assert loading.wait(60)
        server.stop()
        go_on.set()
        thread.join(60)
    assert not thread.is_alive() and not server.ready
    assert not [record for record in caplog.records if record.getMessage().startswith("ready")]


def test_a_signal_ends_a_server_that_loads() -> None:
    """A load takes longer than a supervisor waits, and nothing interrupts it."""
    code = (
        "import time; from balcony_runtime.serve.http.server import Server, Settings; "
        "server = Server(lambda: time.sleep(600), Settings(port=0)); print(server.url, flush=True); server.run()"
    )

    def loads() -> bool:
        with contextlib.suppress(httpx.TransportError):  # it does not listen yet
            return httpx.get(url + "/health", timeout=20).status_code == 503
        return False

    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            until(loads)
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_large_texts_wait_for_each_other_and_not_for_ever() -> None:
    """A small one passes them, and one that nobody waits for any more is not read."""
    service, go_on, read = Service(None, None, None, Limits(request_s=0.5)), threading.Event(), list[str]()

    async def requests() -> None:
        large = [service.in_thread(call, LARGE_BODY + 1) for call in (go_on.wait, lambda: read.append("large"))]
        both = asyncio.gather(*large, return_exceptions=True)
        await service.in_thread(lambda: read.append("small"), LARGE_BODY)
        assert [error.status for error in await both if isinstance(error, RefusedError)] == [504, 504]
        go_on.set()

    asyncio.run(requests())
    service.close()
    assert read == ["small"]
