"""Connections: how long one may be silent or unread, and how many there may be.

Owns what uvicorn leaves without a bound: a connection that never sends a request or sends it slowly, bytes that no route
reads, and answers that the client does not read. It also owns the answer to bytes that are not HTTP. It knows no routes.
Uvicorn itself bounds the size of the headers (64 kB) and the time between two requests (``KEEP_ALIVE_S``).
"""

from __future__ import annotations

import asyncio
import json
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from balcony_runtime.serve.bodies.refusal import RefusedError

#: Longest time between two requests on a connection. Proxies and clients keep idle connections for 15 to 60 s; who closes first
#: loses no request. Idle connections are closed sooner where they are too many.
KEEP_ALIVE_S = 75
#: Bytes that a client must read of a full buffer each time; a byte a minute would keep the connection for ever.
LEAST_READ = 1 << 14
#: Most bytes of answers that all clients together leave unread; one may leave more, if it is alone.
MOST_UNREAD = 64_000_000
#: Bytes of the next requests that are taken while a request is answered.
MOST_AHEAD = 1 << 16


def bounded(head_s: float, unread_s: float, most: int) -> type[Connection]:
    """The class of the connections of one server.

    Args:
        head_s: longest time to the end of a request's headers, from the connection on, or from the first byte on if the
            connection has had a request (until that byte ``KEEP_ALIVE_S`` holds).
        unread_s: longest time for which a client may leave a full buffer unread.
        most: most connections. One more closes the connection that has waited longest for a request.
    """
    bounds = {"head_s": head_s, "unread_s": unread_s, "most": most, "idle": {}, "unread": {}}
    return type("Bounded", (Connection,), bounds)


class Connection(H11Protocol):
    """A connection with bounds; :func:`bounded` sets them."""

    head_s: ClassVar[float]
    unread_s: ClassVar[float]
    most: ClassVar[int]
    #: Connections without a request in progress, the longest idle one first.
    idle: ClassVar[dict[Connection, None]]
    #: Connections whose buffer is full, the one that has been so for longest first.
    unread: ClassVar[dict[Connection, None]]

    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._start_head_timer()
        if len(self.connections) > self.most:
            longest = next(iter(self.idle))  # this one, if all others have a request in progress
            longest._drop()

    def _drop(self) -> None:
        """Close the connection, which counts no more; several come before the loop tells of the end of one."""
        self.idle.pop(self, None)
        self.connections.discard(self)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_head_timer()
        self._stop_unread_timer()
        self.idle.pop(self, None)
        self.unread.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._start_head_timer()
        # Uvicorn stops reading when the next request begins before the answer, and would not notice that the client leaves.
        if self._busy and self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= MOST_AHEAD:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, or headers of more than 64 kB, with the error object of every other answer."""
        refusal = RefusedError(400, "the bytes are not HTTP/1.1, or have more than 64 kB of headers", "invalid_http")
        body = json.dumps(refusal.body).encode()
        own = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers = [(name.encode(), value.encode()) for name, value in (own | dict(refusal.headers)).items()]
        answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        try:
            parts = [self.conn.send(event) for event in (answer, h11.Data(data=body), h11.EndOfMessage())]
        except h11.LocalProtocolError:  # the request has an answer already, or was a HEAD
            if self.cycle is not None:
                self.cycle.disconnected = True  # what it would still send has no place any more
            self.transport.abort()
            return
        # In one write: unread bytes make the kernel reset the connection, which would cut a second one.
        self.transport.write(b"".join(part or b"" for part in parts))
        self.transport.close()

    def on_response_complete(self) -> None:
        """Note the end of an answer. Uvicorn's keep-alive time runs from here to the next byte."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_unread_timer()
        elif not self._busy:
            self.idle[self] = None

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; without waiting for a client that has not read the last answer."""
        super().timeout_keep_alive_handler()
        self._start_unread_timer()

    def pause_writing(self) -> None:
        """The client does not read fast enough."""
        super().pause_writing()
        self._start_unread_timer()
        self.unread[self] = None
        while len(self.unread) > 1 and sum(map(_unread, self.unread)) > MOST_UNREAD:
            share = MOST_UNREAD / len(
                self.unread
            )  # one that leaves little, as a slow reader of a stream, would free nothing
            longest = next(one for one in self.unread if _unread(one) > share)
            del self.unread[longest]
            longest.transport.abort()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self.unread.pop(self, None)
        self._stop_unread_timer()
        if self.transport.is_closing():  # what is left may be little, and still not be read
            self._start_unread_timer()

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        """Start the time for the next request's headers, unless it runs or a request is in progress."""
        if self.transport.is_closing():
            self._start_unread_timer()
        elif self._busy:
            self._stop_head_timer()
            self.idle.pop(self, None)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self.transport.abort)
            self.idle[self] = None

    def _start_unread_timer(self) -> None:
        """Start the time for reading what was sent, unless it runs."""
        if self._unread_timer is None and (unread := _unread(self)):
            self._unread_timer = self.loop.call_later(self.unread_s, self._drop_if_unread, unread)

    def _drop_if_unread(self, before: int) -> None:
        """Close the connection if its client has read next to nothing of the buffer; otherwise start the time again."""
        self._unread_timer = None
        left = _unread(self)
        if left and before - left < LEAST_READ:
            self.transport.abort()
        else:
            self._start_unread_timer()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None


def _unread(connection: Connection) -> int:
    """Bytes that wait in this process until the client reads."""
    return connection.transport.get_write_buffer_size()
