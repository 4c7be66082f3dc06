"""What benchmarks/serving/server_abuse.py calls left over, with clients and a server that are made up."""

from __future__ import annotations

import multiprocessing
import threading
from collections import Counter
from itertools import count
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.serving import server_abuse


@pytest.mark.parametrize("leaked", [0, 1])
def test_a_file_that_is_left_is_counted(monkeypatch: pytest.MonkeyPatch, leaked: int) -> None:
    """A connection of the warm-up that still closed when files were counted hid one that a hostile client left."""
    files, answered = 19, 0

    def ordinary(_: int, pipe: Connection) -> None:
        nonlocal files, answered
        while pipe.recv() is not None:
            answered += 1
            files = 20 if answered == 1 else 19 + leaked
            pipe.send(server_abuse.Timed([0.001], Counter()))

    def abusive(_: int, __: int, ___: float, pipe: Connection) -> None:
        while pipe.recv() is not None:
            pipe.recv()
            pipe.send(Counter())

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=threading.Thread)
    monkeypatch.setattr(server_abuse, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
    monkeypatch.setattr(server_abuse, "time", SimpleNamespace(sleep=lambda _: None, monotonic=count(step=10).__next__))
    monkeypatch.setattr(server_abuse, "ordinary", ordinary)
    monkeypatch.setattr(server_abuse, "abusive", abusive)
    monkeypatch.setattr(server_abuse, "open_files", lambda: files)
    monkeypatch.setattr(server_abuse, "left_over", lambda _: {"replies": 0})
    server: Any = SimpleNamespace(url="http://127.0.0.1:1")
    assert server_abuse.measured(server, 1, 1.0, 40, 1)["left"] == {"replies": 0, "files": leaked}
