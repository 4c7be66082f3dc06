"""A server among broken and hostile clients: what it keeps, and what its other clients notice.

    python -m benchmarks.serving.server_abuse BUNDLE [--clients 1000] [--requests 10000] [--rounds 4]

The server runs in this process, its clients in two others. Quiet and abused times alternate. In all of them four ordinary
clients send small requests, one after the other; every second one is a stream. While they are abused, each of the 1,000 other
clients does one of the things below again and again. Those that the server answers at once share a rate: without one, this
benchmark would measure how fast its own clients are.

| client | what it does |
|---|---|
| silent | connects and sends nothing |
| rubbish | sends random bytes |
| half-closed | sends a part of a request, or a whole one, and closes its sending side |
| slow headers | sends a byte of its headers every half second |
| half a body | sends half of the body that it has announced |
| cancels | ends the connection in the middle of a stream |
| reads nothing | asks for a long stream and never reads |
| 100 MB | announces a body of 100 MB, or sends one in chunks |
| nested JSON | sends lists or objects in one another, 100,000 deep |

The server's time limits are 10 seconds here, so that every limit is reached often. Bars: at the end no reply is in progress,
no place in the pool is taken and no file is left open; resident memory does not grow from the first abused time to the last;
and the 99th percentile of the ordinary clients is at most 1.2 times that of the quiet time before it (median of the
rounds). The output ends with one JSON line; exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import logging
import multiprocessing
import random
import socket
import statistics
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import balcony_edge
from balcony_edge.control.verdict import nearest_rank
from balcony_runtime.serve.http.server import Server, Settings
from balcony_runtime.serve.work.service import Limits
from benchmarks.engine.soak import resident_mb

CHAT = "/v1/chat/completions"
#: Beginning of the event that ends a stream which failed; its status is 200, and ``[DONE]`` follows.
FAILED = b'data: {"error"'
MESSAGES = [{"role": "user", "content": "hello"}]
#: Ordinary clients, and tokens of their replies.
ORDINARY, TOKENS = 4, 4
#: Limits of the server during the benchmark, in seconds.
LIMITS = Limits(head_s=10.0, body_s=10.0, unread_s=10.0)
BARS = {"growth": 1.05, "p99": 1.2}


def server_of(bundle: Path) -> tuple[Server, threading.Thread]:
    """A server over the bundle, ready."""
    server = Server(lambda: balcony_edge.load(bundle), Settings(port=0, name="bundle", limits=LIMITS))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.ready:
        if not thread.is_alive():
            raise SystemExit(f"{bundle}: the server did not start")
        time.sleep(0.05)
    return server, thread


def left_over(server: Server) -> dict[str, int]:
    """What a server that has nothing to do should not have: replies, and places in the pool that are taken."""
    scheduler = server.service.llm._requests.scheduler
    pool = scheduler.sequences._pool
    return {
        "replies": len(server.service.slots),
        "streams": len(scheduler._streams),
        "places": 0 if pool is None else pool.in_use,
    }


def open_files() -> int:
    """File descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Timed(NamedTuple):
    """Times of ordinary requests in seconds, and the answers that were none."""

    seconds: list[float]
    failures: Counter[str]


def ordinary(port: int, pipe: Connection) -> None:
    """Process of the ordinary clients: for every number that the pipe gives, sends so many requests and returns a Timed."""
    while (count := pipe.recv()) is not None:
        found = Timed([], Counter())
        threads = [threading.Thread(target=_ask, args=(port, count // ORDINARY, found)) for _ in range(ORDINARY)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send(found)


def _ask(port: int, count: int, found: Timed) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for number in range(count):
        body = {"messages": MESSAGES, "max_tokens": TOKENS, "stream": number % 2 == 0}
        begin = time.perf_counter()
        try:
            connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            broken = FAILED in answer.read()
            if broken or answer.status != 200:
                found.failures["a stream" if broken else str(answer.status)] += 1
        except (OSError, http.client.HTTPException) as error:
            found.failures[type(error).__name__] += 1
            connection.close()
        found.seconds.append(time.perf_counter() - begin)
    connection.close()


class Abuse:
    """The abusive clients of one process.

    Args:
        port: port of the server on this machine.
        rate: requests a second of the clients that the server answers at once, all of them together.
    """

    def __init__(self, port: int, rate: float) -> None:
        self._port, self._gap_s, self._next_s = port, 1 / rate, 0.0
        self._random = random.Random(0)
        self.seen: Counter[str] = Counter()

    async def run(self, clients: int, stop: Callable[[], bool]) -> None:
        """Abuse the server until ``stop()``."""
        kinds = [
            self.silent,
            self.rubbish,
            self.half_closed,
            self.slow_headers,
            self.half_a_body,
            self.cancels,
            self.reads_nothing,
            self.large,
            self.nested,
        ]
        tasks = [asyncio.create_task(self._again(kinds[number % len(kinds)])) for number in range(clients)]
        while not stop():
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _again(self, kind: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        await asyncio.sleep(2 * self._random.random())  # not all at once: the machine has few cores
        while True:
            if kind not in {self.silent, self.slow_headers, self.half_a_body}:
                self._next_s = max(self._next_s, time.monotonic()) + self._gap_s
                await asyncio.sleep(self._next_s - time.monotonic())
            kept = socket.socket()
            kept.setblocking(False)
            if kind == self.reads_nothing:
                kept.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer = None
            try:
                await asyncio.get_running_loop().sock_connect(kept, ("127.0.0.1", self._port))
                reader, writer = await asyncio.open_connection(sock=kept, limit=4096)
                await kind(reader, writer)
                self.seen[kind.__name__] += 1
            except OSError:  # the server has closed it
                self.seen[kind.__name__] += 1
            finally:
                if writer is not None:
                    writer.transport.abort()
                kept.close()

    async def silent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect and send nothing."""
        await reader.read()

    async def rubbish(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send random bytes."""
        writer.write(self._random.randbytes(self._random.randint(1, 4096)))
        await reader.read()

    async def half_closed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Close the sending side within a request, or after it."""
        whole = _request({"messages": MESSAGES, "max_tokens": 100, "stream": True})
        writer.write(whole[: self._random.choice((1, 40, len(whole) - 5))])
        writer.write_eof()
        await reader.read()

    async def slow_headers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send headers byte by byte."""
        for byte in _request({"messages": MESSAGES}):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.5)

    async def half_a_body(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send half of a body."""
        whole = _request({"messages": [{"role": "user", "content": "hello " * 200}]})
        writer.write(whole[: len(whole) // 2])
        await reader.read()

    async def cancels(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Go away in the middle of a stream, with a reset or without."""
        writer.write(_request({"messages": MESSAGES, "max_tokens": 100, "stream": True, "ignore_eos": True}))
        for _ in range(self._random.randint(1, 12)):
            await reader.readline()
        if self._random.random() < 0.5:
            kept = writer.get_extra_info("socket")
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def reads_nothing(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Ask for a long stream, or for many large pages, and never read."""
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        if self._random.random() < 0.5:
            body = {"messages": MESSAGES, "max_tokens": 200, "n": 2, "stream": True, "ignore_eos": True}
            writer.write(_request(body | {"logprobs": True, "top_logprobs": 20, "timings_per_token": True}))
        else:
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
        await asyncio.sleep(2 * LIMITS.unread_s)

    async def large(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send 100 MB, with the length before it or in chunks."""
        size, piece = 100_000_000, b" " * 1_000_000
        chunked = self._random.random() < 0.5
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())
        for _ in range(size // len(piece)):
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
            if reader._buffer:  # type: ignore[attr-defined]
                break  # an answer: what a client would read now
        self.seen[(await reader.readline()).decode().strip() or "no answer to 100 MB"] += 1

    async def nested(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send JSON that is nested 100,000 deep."""
        begin, end = self._random.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"tools":[', b"]}")))
        body = begin * 100_000 + b"1" + end * 100_000
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        self.seen["nested: " + (await reader.readline()).decode().strip()] += 1


def _request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def abusive(port: int, clients: int, rate: float, pipe: Connection) -> None:
    """Process of the abusive clients: begins and ends when the pipe says so, and returns what it has counted."""
    abuse = Abuse(port, rate)
    while pipe.recv() is not None:
        asyncio.run(abuse.run(clients, pipe.poll))
        pipe.recv()
        pipe.send(abuse.seen)


def measured(server: Server, clients: int, rate: float, requests: int, rounds: int) -> dict[str, Any]:
    """Run quiet and abused times by turns; returns the figures."""
    port = int(server.url.rpartition(":")[2])
    context = multiprocessing.get_context("spawn")
    (asker, asks), (abuser, abuses) = context.Pipe(), context.Pipe()
    processes = [
        context.Process(target=ordinary, args=(port, asks)),
        context.Process(target=abusive, args=(port, clients, rate, abuses)),
    ]
    for process in processes:
        process.start()
    times: dict[bool, list[float]] = {False: [], True: []}
    failures: Counter[str] = Counter()
    memory_mb, ratios, seen = [], [], Counter[str]()

    def ask(count: int, abused: bool) -> float:
        asker.send(count)
        found = asker.recv()
        times[abused] += found.seconds
        failures.update(found.failures)
        return _p99_ms(found.seconds)

    before = open_files()  # before a first request: connections close a little after their last answer
    ask(requests // 20, False)  # code, caches and arenas reach their size
    times[False].clear()
    part = requests // (2 * rounds)
    for number in range(rounds):
        quiet_ms = ask(part, False)
        abuser.send("begin")
        time.sleep(5)  # all clients are there
        ratios.append(ask(part, True) / quiet_ms)
        connections = open_files() - before
        abuser.send("end")
        seen = abuser.recv()
        time.sleep(1)
        memory_mb.append(resident_mb())
        print(
            f"round {number + 1}: {connections} connections, {memory_mb[-1]:.1f} MB, "
            f"p99 {_p99_ms(times[False]):.1f} ms, abused {_p99_ms(times[True]):.1f} ms",
            file=sys.stderr,
        )
    asker.send(None)
    abuser.send(None)
    for process in processes:
        process.join()
    until = time.monotonic() + 2 * LIMITS.unread_s + 10  # uvicorn keeps a connection for 5 s after its last answer
    while time.monotonic() < until and (any(left_over(server).values()) or open_files() > before):
        time.sleep(0.2)
    return {
        "requests": len(times[False]) + len(times[True]),
        "failures": dict(failures),
        "abuse": dict(sorted(seen.items())),
        "median_ms": {"quiet": _median_ms(times[False]), "abused": _median_ms(times[True])},
        "p99_ms": {"quiet": round(_p99_ms(times[False]), 2), "abused": round(_p99_ms(times[True]), 2)},
        "p99_ratio": round(statistics.median(ratios), 3),
        "p99_ratios": [round(one, 3) for one in ratios],
        "memory_mb": [round(one, 1) for one in memory_mb],
        "growth": round(memory_mb[-1] / memory_mb[0], 4),
        "left": left_over(server) | {"files": max(open_files() - before, 0)},
    }


def _median_ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


def _p99_ms(seconds: list[float]) -> float:
    return 1000 * nearest_rank(sorted(seconds), 0.99)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="A server among broken and hostile clients.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--rate", type=float, default=5.0, help="abusive requests a second that the server answers at once (default: 5)"
    )
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # a line for each request
    server, thread = server_of(options.bundle)
    try:
        found = measured(server, options.clients, options.rate, options.requests, options.rounds)
    finally:
        server.stop()
        thread.join()
    passed = {
        "nothing left": not any(found["left"].values()),
        "no ordinary request failed": not found["failures"],
        "growth": found["growth"] <= BARS["growth"],
        "p99": found["p99_ratio"] <= BARS["p99"],
    }
    for name, value in found.items():
        print(f"{name:12} {value}", file=sys.stderr)
    document = {
        "benchmark": "server_abuse",
        "bundle": options.bundle.name,
        "clients": options.clients,
        "rate": options.rate,
    }
    print(json.dumps(document | found | {"bars": BARS, "passed": passed}))
    sys.exit(0 if all(passed.values()) else 1)


if __name__ == "__main__":
    main()
