"""Clients that stall, send rubbish, go away or do not read: each is cut off in time, and nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from balcony_edge.cli.device.serve import LINES, InThread
from balcony_runtime.serve.http import server as server_module
from balcony_runtime.serve.http.connections import Connection, bounded
from balcony_runtime.serve.http.server import Server
from balcony_runtime.serve.work.service import Limits
from tests.serve.client import CHAT, HELLO, SLOW, connect, connected, is_free, until

HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
#: Time limits of the server in seconds, and the longest time until a client must be cut off.
LIMIT_S, LATE_S = 0.6, 10.0


@pytest.fixture(scope="module")
def hasty(serve: Callable[..., Server]) -> Server:
    """A server that gives up soon, with few connections."""
    limits = Limits(head_s=LIMIT_S, body_s=LIMIT_S, unread_s=LIMIT_S, connections=12, body_bytes=2_000_000)
    return serve(name="tiny", limits=limits)


@pytest.fixture(autouse=True)
def nothing_is_left(hasty: Server) -> Iterator[None]:
    """After every test: no reply, no place in the pool, no connection, no file."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    until(lambda: is_free(hasty) and not hasty._uvicorn.server_state.connections)
    until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before)


def all_of(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def test_a_silent_client_is_cut_off(hasty: Server) -> None:
    begin = time.monotonic()
    with connect(hasty) as connection:
        assert all_of(connection) == b""
    assert LIMIT_S - 0.1 < time.monotonic() - begin < LATE_S


def test_an_idle_connection_outlives_that_of_a_proxy(hasty: Server) -> None:
    """Who closes an idle connection first loses no request; AWS and nginx close theirs after 60 s."""
    assert hasty._config().timeout_keep_alive > 60


@pytest.mark.parametrize("after_a_request", [False, True], ids=["at once", "after a request"])
def test_slow_headers_are_cut_off(hasty: Server, after_a_request: bool) -> None:
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" if after_a_request else b""
    with connect(hasty, first) as connection:
        if after_a_request:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in HEAD + b"X-Slow: " + b"x" * 1000:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        assert LIMIT_S - 0.1 < time.monotonic() - begin < LATE_S


def test_a_body_that_no_route_reads_is_cut_off(hasty: Server) -> None:
    """A GET may announce a body; it is answered, and the rest of the body must not keep the connection for ever."""
    with connect(hasty, b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nxx") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"x")
        begin = time.monotonic()
        all_of(connection)
        assert time.monotonic() - begin < LATE_S


def test_half_a_body_is_an_error(hasty: Server) -> None:
    with connect(hasty, HEAD + b'Content-Length: 1000\r\n\r\n{"messages": [') as connection:
        assert b" 408 " in connection.recv(100)
    with connect(hasty, HEAD + b"Content-Length: 1000\r\n\r\n{") as connection:
        connection.shutdown(socket.SHUT_WR)
        all_of(connection)


def test_rubbish_after_an_answer_is_no_error_of_the_server(hasty: Server, caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(hasty, head) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 405")
        connection.sendall(b"zz\r\n")  # not the size of a chunk
        all_of(connection)
    assert not [line for line in caplog.records if line.levelno >= logging.ERROR]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_before_it_is_read(hasty: Server, chunked: bool) -> None:
    """The answer can be read although the client goes on sending."""
    size, piece = 100_000_000, b" " * 400_000
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    with connect(hasty, HEAD + f"{length}\r\n\r\n".encode()) as connection:
        for _ in range(6):  # the bound is 2 MB
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 413") and b'"body_too_large"' in answer
    found = httpx.post(hasty.url + CHAT, content=b" " * 4_000_000, timeout=20)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("request_", ["page", "stream", "whole"])
def test_a_client_that_does_not_read_is_cut_off(hasty: Server, request_: str) -> None:
    many = {"n": 8, "logprobs": True, "top_logprobs": 20, "budget": {}}  # megabytes, more than the kernel keeps
    if request_ == "page":
        connection = connect(hasty, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200, receive_buffer=4096)
    else:
        connection = connected(hasty, SLOW | many | {"stream": request_ == "stream"}, receive_buffer=4096)
    with connection:
        until(lambda: hasty._uvicorn.server_state.connections)
        until(lambda: not hasty._uvicorn.server_state.connections and is_free(hasty), 60)


def test_a_client_that_reads_slowly_gets_its_answer(hasty: Server) -> None:
    """Its buffer is never nearly empty, but it reads something in every period."""
    body = json.dumps(SLOW | {"n": 8, "logprobs": True, "top_logprobs": 20, "budget": {}, "stream": False}).encode()
    found, begin_s = b"", 0.0
    head = HEAD + b"Connection: close\r\n" + f"Content-Length: {len(body)}\r\n\r\n".encode()
    with connect(hasty, head + body, receive_buffer=4096) as connection:
        while piece := connection.recv(1 << 15):
            begin_s, found = begin_s or time.monotonic(), found + piece
            if time.monotonic() < begin_s + 2.5 * LIMIT_S:
                time.sleep(0.02)
    assert time.monotonic() - begin_s > 2.5 * LIMIT_S
    assert len(json.loads(found.partition(b"\r\n\r\n")[2])["choices"]) == 8


def test_what_clients_leave_unread_is_bounded(hasty: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole text's token ids are megabytes, and 16 kB a minute would keep them for hours, on each connection."""
    connections, bounded = hasty._uvicorn.server_state.connections, hasty._uvicorn.config.http
    monkeypatch.setattr(bounded, "unread_s", 60.0)
    body = json.dumps({"content": "a " * 200_000}).encode()
    head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with connect(hasty, head + body, receive_buffer=4096):
        until(lambda: len(bounded.unread) == 1)
        (first,) = connections
        monkeypatch.setattr(
            "balcony_runtime.serve.http.connections.MOST_UNREAD", first.transport.get_write_buffer_size()
        )
        with connect(hasty, head + body, receive_buffer=4096):
            until(lambda: first not in connections and len(bounded.unread) == 1)
            assert len(connections) == 1, "the second client's answer stays"


def test_a_slow_reader_of_a_stream_stays_when_others_leave_large_answers_unread() -> None:
    """Its buffer has been full for longest, but to end it would free 70 kB of 90 MB."""
    kind, clients = bounded(10.0, 60.0, 10), list[Any]()
    for size in (70_000, 40_000_000, 50_000_000):
        clients.append(one := object.__new__(kind))
        one.flow, one.loop, one.transport = Mock(), Mock(), Mock(get_write_buffer_size=Mock(return_value=size))
        one.pause_writing()
    assert [one.transport.abort.called for one in clients] == [False, True, False]


def test_one_connection_too_many_closes_the_one_that_has_waited_longest(
    hasty: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hasty._uvicorn.config.http, "head_s", 20.0)
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(connected(hasty, SLOW))
        assert busy.recv(10).startswith(b"HTTP/1.1 2")
        silent = [stack.enter_context(connect(hasty)) for _ in range(11)]
        until(lambda: len(hasty._uvicorn.server_state.connections) == 12)
        assert httpx.post(hasty.url + CHAT, json=HELLO).status_code == 200
        assert all_of(silent[0]) == b""
        assert busy.recv(1000)


@pytest.mark.parametrize(
    ("files", "raised", "most"),
    [
        ((256, 512), [(512, 512)], 512 - 256 - 64),
        ((1024, -1), [(1320, -1)], 1000),  # -1: no limit
        ((4096, 4096), [], 1000),
        ((-1, -1), [], 1000),
        ((100, 100), [(100, 100)], 1),
    ],
)
def test_connections_leave_files_for_everything_else(
    monkeypatch: pytest.MonkeyPatch, files: tuple[int, int], raised: list[tuple[int, int]], most: int
) -> None:
    """256 that the kernel holds until they are accepted, and 64 that are no connections."""
    told: list[tuple[int, int]] = []
    limits = SimpleNamespace(RLIMIT_NOFILE=7, RLIM_INFINITY=-1, getrlimit=lambda _: files)
    limits.setrlimit = lambda _, both: told.append(both)
    monkeypatch.setattr(server_module, "resource", limits)
    assert server_module._connection_class(Limits(connections=1000)).most == most and told == raised


def test_connections_that_come_at_once_are_bounded(hasty: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop accepts all of them before it hears that one has ended."""
    made, counts, all_there = Connection.connection_made, [], threading.Event()

    def counted(self: Connection, transport: Any) -> None:
        made(self, transport)
        counts.append(len(self.connections))

    monkeypatch.setattr(Connection, "connection_made", counted)
    assert hasty._loop is not None
    with contextlib.ExitStack() as stack:
        hasty._loop.call_soon_threadsafe(all_there.wait, 20)
        for _ in range(40):
            stack.enter_context(connect(hasty))
        all_there.set()
        until(lambda: len(counts) == 40)
    assert max(counts) == 12


@pytest.mark.parametrize("nested", ["[{}]", '{{"a":{}}}', '{{"tools":[{}]}}', '{{"messages":[{}]}}', '{{"budget":{}}}'])
def test_deeply_nested_json_is_an_error(hasty: Server, nested: str) -> None:
    """At every depth, also where the parser has just enough stack and what follows has not."""
    begin, _, end = nested.replace("{{", "{").replace("}}", "}").partition("{}")
    with httpx.Client(base_url=hasty.url) as client:
        # Python 3.11 has one bound for its own calls and the parser's; later versions have another for the parser's.
        for depth in (100, *range(860, 1000, 10), *(1 << power for power in range(10, 17)), 100_000):
            found = client.post(CHAT, content=f"{begin * depth}1{end * depth}")
            assert found.status_code == 400, depth


def test_a_body_that_takes_all_the_stack_is_not_logged_as_a_bug(
    hasty: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The parser takes it, and what reads the schema runs out of stack: a traceback of it has a thousand frames."""
    schema = '{"items":' * 700 + "1" + "}" * 700
    asked = f'"response_format":{{"type":"json_schema","json_schema":{{"schema":{schema}}}}}'
    with httpx.Client(base_url=hasty.url) as client:
        found = client.post(CHAT, content=f'{{"messages":[{{"role":"user","content":"x"}}],{asked}}}')
    assert found.status_code == 400
    assert not [line for line in caplog.records if line.levelno >= logging.ERROR]


def test_a_client_that_leaves_while_it_sends_is_no_error_of_the_server(hasty: Server, caplog: Any) -> None:
    def count(status: int) -> float:
        labels = {"endpoint": CHAT, "status": str(status)}
        return hasty.service.metrics._registry.get_sample_value("balcony_requests_total", labels) or 0.0

    left, failed = count(499), count(500)
    with connect(hasty, HEAD + b"Content-Length: 1000\r\n\r\n{"):
        pass
    until(lambda: count(499) == left + 1)
    assert count(500) == failed and not caplog.records


def test_a_client_that_cancels_a_stream_leaves_nothing(hasty: Server) -> None:
    body: dict[str, Any] = SLOW | {"budget": {}}
    for events in range(6):
        with connected(hasty, body) as connection, connection.makefile("rb") as lines:
            for _ in range(2 * events):
                lines.readline()


def test_a_client_that_leaves_after_bytes_of_its_next_request_is_noticed(hasty: Server) -> None:
    """Many clients by hand end a body with a line break; uvicorn stops to read there."""
    for further in (b"\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        connection = connected(hasty, SLOW | {"stream": False})
        until(lambda: hasty.service.slots)
        connection.sendall(further)
        time.sleep(0.2)
        connection.close()
        until(lambda: is_free(hasty))  # the reply alone takes forty seconds


@pytest.mark.parametrize("lines", [5, LINES + 50])
def test_a_log_that_nobody_reads_holds_nobody_up(lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a terminal that is paused (Ctrl-S). At the end its lines are waited for; those that found no room are lost."""
    monkeypatch.setattr(os, "_exit", lambda _: pytest.fail("all lines were written"))
    read, seen = threading.Event(), []

    class Stuck(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert read.wait(60)
            seen.append(record.getMessage())

    handler = InThread(Stuck())
    for number in range(lines):
        handler.handle(logging.makeLogRecord({"msg": str(number)}))
    assert not seen
    read.set()
    handler.close()
    assert seen[:5] == ["0", "1", "2", "3", "4"] and len(seen) in (lines, LINES, LINES + 1)
