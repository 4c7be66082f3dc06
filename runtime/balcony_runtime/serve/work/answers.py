"""Answers: the replies of one request from its first token to its end, whole or as server-sent events.

Owns the life of an answer: the wait for its first item, slow readers, readers that go away, the time limit, and what is counted
and logged at its end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from balcony_runtime.reply import Token
from balcony_runtime.serve.bodies.asked import Asked
from balcony_runtime.serve.bodies.refusal import RefusedError, refusal_of, stopped, too_long
from balcony_runtime.serve.work.jobs import FEW_BUFFERED, Channel, Cost, Item, Job, Scores
from balcony_runtime.serve.work.shapes import Shapes, prompt_tokens
from balcony_runtime.serve.work.worker import Worker

_log = logging.getLogger("balcony_runtime.serve.requests")
#: Longest wait for the first item before a stream's headers are sent; an error that comes later is an event of the stream.
OPENING_S = 5.0
#: Seconds between comments in a stream that has nothing to say, so that proxies keep it open: most wait 60 s. The first one
#: comes this long after the headers. Earlier ones ended runs of SGLang's benchmark and llmperf, which know no comments.
KEEPALIVE_S = 45.0
#: Such a comment. No empty line follows it: many clients in Go take one for an event, which has no data, and end the stream.
#: Clients that split at empty lines (`vllm bench serve`) take the next piece for a part of it, so that piece says nothing.
_WAITING = b": waiting\n"
_DONE = b"data: [DONE]\n\n"
#: Keys of the object ``balcony`` in the log.
_LOGGED = ("ttft_ms", "mean_tpot_ms", "tokens_per_exit", "forced_tokens", "late_tokens")


class GoneError(Exception):
    """The client has disconnected."""


async def gone(receive: Receive) -> None:
    """Return when the client of a request, whose body has been read, disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer:
    """The replies of one request.

    Args:
        asked: the request.
        shapes: its objects.
        jobs: its replies, which share a channel.
        worker: the decode thread.
        limit_s: seconds after which the answer ends with an error.
        retry_s: gives the seconds after which a client that is turned away may try again.
        on_close: called once at the end.
    """

    def __init__(
        self,
        asked: Asked,
        shapes: Shapes,
        jobs: Sequence[Job],
        worker: Worker,
        limit_s: float,
        retry_s: Callable[[], int],
        on_close: Callable[[Answer], None],
    ) -> None:
        self.asked, self.shapes, self.jobs = asked, shapes, jobs
        self._worker, self._retry_s, self._on_close = worker, retry_s, on_close
        self._channel: Channel = jobs[0].channel
        self.asked_s = jobs[0].cost.asked_s
        self._until_s, self._limit_s = self.asked_s + limit_s, limit_s
        self.scores: dict[Job, Scores] = {}
        self._left = len(jobs)  # jobs that have not ended
        self._first: tuple[Job, Item] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._gone = self._closed = self._stopped = False
        self._done = _DONE if asked.response is None else b""
        self.status, self.reason = 200, ""
        #: Whether the head of a stream has been sent, which says 200 whatever follows.
        self.streaming = False

    def begin(self, watch: asyncio.Task[None]) -> None:
        """Submit the replies.

        Args:
            watch: ends when the client goes away (:func:`gone`).
        """
        self._watch = watch
        watch.add_done_callback(self._leave)
        for job in self.jobs:
            self._worker.submit(job)

    async def whole(self) -> dict[str, Any]:
        """The whole answer.

        Raises:
            RefusedError: a reply failed.
            GoneError: the client has disconnected.
        """
        while self._left:
            if (found := await self._next(KEEPALIVE_S)) is not None:
                self._take(*found)
        scores = [self.scores.get(job) for job in self.jobs]
        if self.asked.logprobs is None and self.asked.response is None:
            return self.shapes.whole(self.jobs, scores)
        # 75 ms for 1,000 tokens with 20 alternatives; a response reads each token
        return await asyncio.to_thread(self.shapes.whole, self.jobs, scores)

    async def opening(self) -> None:
        """Wait a while for the first item, so that an answer that fails at once has an HTTP status of its own.

        Raises:
            RefusedError: the first reply failed.
            GoneError: the client has disconnected.
        """
        found = await self._next(OPENING_S)
        if found is not None and isinstance(found[1], BaseException):
            raise self._failed(found[1])
        self._first = found

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer as server-sent events; close it however that ends. ASGI; ``receive`` is already watched."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx
        ]
        try:
            # a client that does not read blocks the sending: it is given up a little after the time limit
            async with asyncio.timeout(self._until_s - time.monotonic() + 1.0):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                self.streaming = True
                async for event in self._events():
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (GoneError, TimeoutError) as error:
            self.close(error)
        except BaseException as error:
            self.close(error)
            raise
        self.close()

    async def _events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events.

        Raises:
            GoneError: the client has disconnected.
        """
        opened: set[Job] = set()
        told_s, waited = time.monotonic(), False
        try:
            while self._left:
                found, self._first = self._first or await self._next(KEEPALIVE_S), None
                pieces = [] if found is None else await self._pieces(found, opened, waited)
                # Tokens without a text come and show nothing: control tokens after ``ignore_eos``, text after a call.
                if not pieces and time.monotonic() - told_s < KEEPALIVE_S:
                    continue
                events = [_event(piece) for piece in pieces] or [_WAITING]
                # After a comment in one write: the same clients strip each read, and would not see where the empty piece ends.
                for event in [b"".join(events)] if waited else events:
                    yield event
                told_s, waited = time.monotonic(), not pieces
        except RefusedError as refusal:
            yield b"".join(map(_event, self.shapes.failure(refusal))) + self._done
            return
        if self.asked.usage:
            yield _event(self.shapes.closing(self.jobs))
        if self._done:
            yield self._done

    async def _pieces(self, found: tuple[Job, Item], opened: set[Job], waited: bool) -> list[dict[str, Any]]:
        """Pieces of the stream for an item. A choice opens with its first token: clients take the first piece for it.

        ``waited``: whether a comment is the last that was sent.
        """
        job, item = found
        self._take(job, item)
        pieces, role = [], self.asked.chat and job not in opened
        if not isinstance(item, Scores):
            if job not in opened:
                scores = self.scores.get(job)
                if scores is None:
                    pieces = self.shapes.opening(job, None)
                else:  # as long as a whole answer with alternatives
                    pieces = await asyncio.to_thread(self.shapes.opening, job, scores)
            opened.add(job)
            made = self.shapes.token(job, item) if isinstance(item, Token) else [self.shapes.end(job)]
            pieces += made
        if pieces and waited and (empty := self.shapes.empty(job)) is not None:
            pieces.insert(int(role), empty)  # the role comes first, and may be dropped as well
        if pieces and not self._left:
            self.shapes.settle(pieces[-1], self.jobs)
        return pieces

    def _take(self, job: Job, item: Item) -> None:
        if isinstance(item, BaseException):
            raise self._failed(item)
        if isinstance(item, Scores):
            self.scores[job] = item
        elif isinstance(item, Token):
            if self.asked.each_token:
                job.shown.count(item)
            job.ended = item.finish_reason is not None
        else:
            job.ended = True
        self._left -= job.ended

    async def _next(self, seconds: float) -> tuple[Job, Item] | None:
        """The next item, or None after some seconds without one.

        Raises:
            RefusedError: the time limit has passed, or the server stops.
            GoneError: the client has disconnected.
        """
        patience_s = time.monotonic() + seconds
        while True:
            if self._gone:
                raise GoneError
            if self._stopped:
                raise self._failed(stopped())
            if (found := self._channel.take()) is not None:
                self._taken(found[0])
                return found
            now_s = time.monotonic()
            if now_s >= self._until_s:
                raise self._failed(too_long(self._limit_s))
            if now_s >= patience_s:
                return None
            await self._channel.wait(min(self._until_s, patience_s))

    def stop(self) -> None:
        """End the answer with an error, because the server does not wait for it any longer."""
        self._stopped = True
        self._channel.wake()

    def _taken(self, job: Job) -> None:
        job.buffered -= 1
        if job.paused and job.buffered <= FEW_BUFFERED:
            job.paused = False
            self._worker.resume(job)

    def _failed(self, error: BaseException) -> RefusedError:
        refusal = refusal_of(error, self._retry_s())
        self.status, self.reason = refusal.status, refusal.reason
        return refusal

    def _leave(self, watch: asyncio.Task[None]) -> None:
        if not watch.cancelled():
            self._gone = True
            self._channel.wake()

    def close(self, error: BaseException | None = None) -> None:
        """End what has not ended, because of an error or because all has been sent; later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self._channel.silence()
        if self._watch is not None:
            self._watch.cancel()
        for job in self.jobs:
            if not job.ended:
                self._worker.cancel(job)
        if self._gone and self._left:
            self.status, self.reason = 499, "disconnected"  # nginx's number for a client that went away
        elif isinstance(error, asyncio.CancelledError):
            self.status, self.reason = 503, "stopped"
        elif isinstance(error, TimeoutError):  # the client did not read until the time limit
            self._failed(too_long(self._limit_s))
        elif not (error is None or isinstance(error, GoneError) or self.reason):
            self._failed(error)
        self._on_close(self)

    def log(self, client: str, model: str) -> None:
        """Write the line of this request."""
        cost = Cost.of([job.cost for job in self.jobs])
        facts = cost.facts()
        line = {
            "id": self.shapes.id,
            "client": client,
            "model": model,
            "status": self.status,
            "reason": self.reason or None,
            "stream": self.asked.stream,
            "choices": len(self.jobs),
            "prompt_tokens": prompt_tokens(self.jobs),
            "tokens": cost.tokens,
            "seconds": round(time.monotonic() - self.asked_s, 4),
            **{key: facts[key] for key in _LOGGED},
        }
        _log.info("%s", json.dumps(line))


#: Characters at which some clients split lines (httpx, as ``str.splitlines``) though JSON allows them in texts.
_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def _event(piece: Mapping[str, Any]) -> bytes:
    text = to_json(piece)
    if not text.isascii():
        text = text.decode().translate(_BREAKS).encode()
    named = f"event: {piece['type']}\n".encode() if "type" in piece else b""
    return named + b"data: " + text + b"\n\n"
