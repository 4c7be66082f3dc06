"""Requests that many tests of the server send, and questions about it from outside and inside."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from balcony_runtime.serve.http.server import Server

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
#: A reply that takes forty seconds, which is longer than `until` waits, and whose chunks are large.
SLOW = HELLO | {"max_tokens": 200, "ignore_eos": True, "stream": True, "budget": {"max_pace_tps": 5}}


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def metric(url: str, line: str) -> float:
    """Value of a line of a server's metrics; 0 where it is not there yet."""
    page = httpx.get(f"{url}/metrics", timeout=20, verify=False).text  # a TLS context takes 0.1 s of CPU to make
    found = re.search(rf"^{re.escape(line)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def is_free(server: Server) -> bool:
    """Whether nothing is in progress, and the pool holds only sequences that have ended."""
    scheduler = server.service.llm._requests.scheduler
    pool = scheduler.sequences._pool
    return not server.service.slots and not scheduler._streams and not (pool is not None and pool.in_use)


def connect(server: Server, data: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
    """A raw connection that has sent some bytes."""
    address = urlsplit(server.url)
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((address.hostname, address.port))
    connection.settimeout(60)
    connection.sendall(data)
    return connection


def connected(server: Server, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A raw connection that has sent a request."""
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    return connect(server, head.encode() + content, receive_buffer)
