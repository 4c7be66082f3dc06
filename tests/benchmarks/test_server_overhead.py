"""A stream that fails is no rate of benchmarks/serving/server_overhead.py, which ends; server_abuse.py counts it."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import Pipe

import pytest

from benchmarks.serving.server_abuse import ORDINARY, Timed, _ask
from benchmarks.serving.server_overhead import clients, http_rate, together


def test_a_stream_that_fails_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # no server listens there after this
    here, there = Pipe()
    here.send((2, 8))
    here.send(None)
    clients(port, there)
    there.send(here.recv())
    with pytest.raises(SystemExit, match="a stream over HTTP failed: ConnectionRefusedError"):
        http_rate(here, 2, 8)


def test_work_that_fails_in_a_thread_has_no_time() -> None:
    def fails() -> None:
        raise AssertionError("cut")

    with pytest.raises(AssertionError, match="cut"):
        together(2, fails)


class Breaks(BaseHTTPRequestHandler):
    """Our server's stream of a reply that failed after its first token: status 200, and [DONE] at the end."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'data: {"choices":[]}\n\ndata: {"error":{"code":"internal"}}\n\ndata: [DONE]\n\n')

    def log_message(self, *_: object) -> None: ...


def test_a_stream_that_breaks_is_a_failure() -> None:
    with HTTPServer(("127.0.0.1", 0), Breaks) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = Timed([], Counter())
        _ask(server.server_port, ORDINARY, found)
        here, there = Pipe()
        here.send((2, 8))
        here.send(None)
        clients(server.server_port, there)
        server.shutdown()
    assert found.failures.total() == ORDINARY
    assert "AssertionError" in str(here.recv())
