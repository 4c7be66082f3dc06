"""A stream that fails is no rate of benchmarks/serving/server_overhead.py: it ends the benchmark."""

from __future__ import annotations

import socket
from multiprocessing import Pipe

import pytest

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
