"""The routes: paths of OpenAI, vLLM and llama.cpp's server.

Owns the paths. Every error of a route or the guard is OpenAI's object. Only a CORS preflight request gets plain text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from balcony_edge.errors import BalconyError, ContextLengthError
from balcony_runtime.requests import refuse_longer
from balcony_runtime.serve.bodies.asked import Asked, messages_of, read_asked, refuse_unsupported, template_of
from balcony_runtime.serve.bodies.fields import CHAT, COMPLETION, DETOKENIZE, RESPONSE, SLOT, TOKENIZE, Fields
from balcony_runtime.serve.bodies.refusal import REASON, RefusedError, bad, busy, refusal_of, too_long
from balcony_runtime.serve.bodies.responses import read_response
from balcony_runtime.serve.http.guard import LOGGED, Guard, answer_of, client_of
from balcony_runtime.serve.http.openapi import VERSION, document
from balcony_runtime.serve.work.answers import Answer, GoneError, gone
from balcony_runtime.serve.work.energy import powers
from balcony_runtime.serve.work.jobs import Job
from balcony_runtime.serve.work.service import LARGE_BODY, Service
from balcony_runtime.serve.work.slots import ACTIONS
from balcony_runtime.text.codec import TextCodec
from balcony_runtime.tokens import refuse_foreign

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
#: Rules of the page: nothing from elsewhere, and no frame around it.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'"
)
#: Seconds without a turn of the decode thread from which on the server calls itself unhealthy; a long prompt takes less.
STUCK_S = 120.0
#: Bytes of a body that always comes in: so much on each of 1,024 connections is about the bound of all bodies.
SMALL_BODY = 1 << 16
#: Path → values of its parameters.
_QUERIES = {"/slots/{key:int}": {"action": ACTIONS}}
#: Path → fields of its body.
_BODIES = {
    "/v1/chat/completions": CHAT,
    "/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/responses": RESPONSE,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
    "/slots/{key:int}": SLOT,
}


def make_app(service: Service, api_key: str | None, *, loopback: bool, origins: Sequence[str]) -> ASGIApp:
    """The application.

    Args:
        service: the loaded bundle, or one that is still loading.
        api_key: key that requests must bring; None for none.
        loopback: whether the server listens on a loopback address only.
        origins: origins of other pages that may use the server; ``*`` for all.
    """
    routes = _Routes(service)
    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
            Route("/v1/health", routes.health),
            Route("/models", routes.models),  # as llama.cpp has it, for clients whose address has no /v1
            Route("/chat/completions", routes.chat, methods=["POST"]),
            Route("/responses", routes.response, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completion, methods=["POST"]),
            Route("/v1/responses", routes.response, methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/tokenizer_info", routes.tokenizer_info),
            Route("/props", routes.props),
            Route("/slots", routes.slots),
            Route("/slots/{key:int}", routes.change_slot, methods=["POST"]),
        ],
        exception_handlers={
            RefusedError: _refused,
            BalconyError: _refused,
            HTTPException: _unknown,
            ClientDisconnect: _gone,
            GoneError: _gone,
            RecursionError: _refused,  # of a body; as an Exception it would be logged as a bug, with a traceback
            Exception: _refused,
        },
    )
    # A redirect would name the scheme of this server, so that a client of a proxy with TLS sent its request again without.
    app.router.redirect_slashes = False
    guard = Guard(app, service, api_key, loopback, origins)
    if not origins:
        return guard
    exposed = ["retry-after", "x-balcony-reason", "x-should-retry"]
    return CORSMiddleware(
        guard,
        origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=exposed,
        allow_private_network=True,  # what Chromium asks before a public page reaches a server at home
    )


class _Routes:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._body_bytes = 0  # of bodies that have not come whole, or are being read
        self._scrape: asyncio.Task[bytes] | None = None  # makes the page of metrics
        self._page = files("balcony_runtime.serve.http").joinpath("page.html").read_text(encoding="utf-8")

    async def page(self, request: Request) -> Response:
        """The page for people."""
        return HTMLResponse(self._page, headers={"content-security-policy": _POLICY, "cache-control": "no-cache"})

    async def health(self, request: Request) -> Response:
        """Whether the model is loaded and requests are taken."""
        self._service.refuse_unready()
        if self._service.stuck_s > STUCK_S:
            raise RefusedError(503, "replies do not go on: start the server again", "stuck")
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        # In a thread, because a pass holds the lock under which bytes of ended replies are counted. All requests share it: if
        # the disk of --prefix-dir hangs, the few threads of the loop are still there for prompts.
        if self._scrape is None or self._scrape.done():
            self._scrape = asyncio.create_task(asyncio.to_thread(self._service.metrics.text))
        text = await asyncio.shield(self._scrape)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """This document."""
        found = [route for route in request.app.routes if isinstance(route, Route)]
        return JSONResponse(document(found, _BODIES, _QUERIES))

    async def models(self, request: Request) -> Response:
        """All names of the model, each with its budget."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._service.names.budgets]})

    async def model(self, request: Request) -> Response:
        """One name of the model."""
        if not (name := request.path_params["name"]):
            return await self.models(request)
        self._service.names.budget(name, {}, None)
        return JSONResponse(self._model(self._service.names.listed(name)))

    def _model(self, name: str) -> dict[str, Any]:
        service = self._service
        return {
            "id": name,
            "object": "model",
            "created": service.started_s,
            "owned_by": "balcony-edge",
            "root": service.names.name,  # as vLLM has it: its `bench serve` takes the name from here
            "max_model_len": service.llm.engine.max_length,
            "budget": service.names.budgets[name].model_dump(exclude_unset=True),
        }

    async def chat(self, request: Request) -> ASGIApp:
        """The next message of a conversation, in the shape of OpenAI."""
        return await self._complete(request, partial(read_asked, chat=True))

    async def completion(self, request: Request) -> ASGIApp:
        """Completions of texts or token ids, in the shape of OpenAI."""
        return await self._complete(request, partial(read_asked, chat=False))

    async def response(self, request: Request) -> ASGIApp:
        """The next items of a conversation, in the shape of OpenAI; none are kept."""
        return await self._complete(request, read_response)

    async def _complete(self, request: Request, read: Callable[[bytes], Asked]) -> ASGIApp:
        self._service.refuse_unready()
        async with self._body(request) as body:
            asked_s = time.monotonic()  # a large body waits for others before it is read
            asked = await self._read(body, read)
            watch = asyncio.create_task(gone(request.receive))
            try:
                answer = await self._answer(asked, len(body), asked_s, request, watch)
            except BaseException:
                watch.cancel()
                raise
        del asked, body  # the answer lasts, and needs neither prompts nor text
        request.scope[LOGGED] = True
        try:
            answer.begin(watch)
            if answer.asked.stream:
                await answer.opening()
                return answer.stream
            whole = await answer.whole()
        except BaseException as error:
            answer.close(error)
            raise
        answer.close()
        return JSONResponse(whole)

    async def _answer(
        self, asked: Asked, size: int, asked_s: float, request: Request, watch: asyncio.Task[None]
    ) -> Answer:
        """The answer to a request that came at a time; a client that leaves, or the time limit, also ends its preparation.

        Raises:
            RefusedError: the request is refused, or takes too long.
            GoneError: the client has disconnected.
        """
        limit_s = self._service.limits.request_s
        client = client_of(request.scope)
        preparing = asyncio.create_task(self._service.answer(asked, request.headers, client, size, asked_s))
        left_s = max(asked_s + limit_s - time.monotonic(), 0.0)
        try:
            await asyncio.wait((preparing, watch), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if preparing.done():
                return preparing.result()
        except ContextLengthError as error:
            name = "prompt" if not asked.chat else "messages" if asked.response is None else "input"
            raise RefusedError(400, str(error), "context_length_exceeded", param=name) from error
        finally:
            preparing.cancel()
        raise GoneError if watch.done() else too_long(limit_s)

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or a conversation."""
        async with self._body(request) as body:
            return await self._tokenize(await self._read(body, partial(Fields, table=TOKENIZE)), len(body))

    async def _tokenize(self, fields: Fields, size: int) -> Response:
        llm = self._service.llm
        messages, prompt, special = fields.get("messages"), fields.text("prompt"), fields.truth_or_none("parse_special")
        with_pieces = fields.truth("with_pieces")
        if messages is not None:
            refuse_unsupported(fields, ("add_generation_prompt", "continue_final_message"))
            shown = template_of(fields) | {key: tools for key in ("tools", "tool_choice") if (tools := fields.get(key))}
            encode = partial(llm.encode, messages_of(messages), control_tokens=special, **shown)
            ids = await self._service.in_thread(encode, size)
        else:
            # vLLM has prompt and llama.cpp content; they differ in what they do without being asked.
            text = fields.text("content") if prompt is None else prompt
            around = fields.truth_or_none("add_special" if prompt is None else "add_special_tokens")
            if text is None:
                raise bad("content", None, "give a text as content (or prompt), or messages")
            if around is None:
                around = prompt is not None
            encode = partial(llm.encode, text, chat=False, control_tokens=special, add_special_tokens=around)
            ids = await self._service.in_thread(encode, size) if text else []
        if with_pieces:
            refuse_longer(llm.engine, "the text", len(ids))
        tokens = ids if not with_pieces else await self._service.in_thread(partial(_pieces, llm.codec, ids), size)
        return JSONResponse({"tokens": tokens, "count": len(ids), "max_model_len": llm.engine.max_length})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        llm = self._service.llm
        async with self._body(request) as body:
            tokens = await self._read(body, lambda body: Fields(body, DETOKENIZE).tokens("tokens"))
            refuse_longer(llm.engine, "the text", len(tokens))  # the answer stays until its client has read it
            if tokens:
                refuse_foreign(np.array(tokens), llm.engine.manifest.model.vocab_size)
            decode = partial(llm.codec.decode, tokens, control_tokens=True)
            text = await self._service.in_thread(decode, len(body))
        return JSONResponse({"content": text, "prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """Names of special tokens and the chat template, in the shape of vLLM."""
        return JSONResponse(self._service.llm.codec.facts)

    async def props(self, request: Request) -> Response:
        """Bundle, device, exits, budgets and bounds."""
        service, llm = self._service, self._service.llm
        costs, manifest, backend = llm.costs, llm.engine.manifest, llm.engine.backend
        measured = {
            one.exit_layer: one.quality and one.quality.model_dump(exclude_defaults=True) for one in manifest.exits
        }
        return JSONResponse(
            {
                "model_alias": service.names.name,
                "build_info": f"balcony-edge {VERSION}",
                "total_slots": service.limits.parallel,
                "default_generation_settings": {"n_ctx": llm.engine.max_length, "params": {"temperature": 1.0}},
                "bundle": {
                    "model": manifest.model.name,
                    "precision": manifest.precision,
                    "fingerprint": manifest.fingerprint,
                },
                "device": {
                    "board": service.machine.board,
                    "cpu": service.machine.cpu,
                    "gpus": [gpu.name for gpu in service.machine.gpus],
                    "engine": backend.name,
                    "threads": backend.threads,
                    "power_w": {rail: sample.value for rail, sample in powers(llm.readings()).items()},
                },
                "exits": [
                    {
                        "exit": layer,
                        "ms": round(costs.steady_ms(layer, 0), 3),
                        "agreement": manifest.agreement[layer],
                        "quality": measured[layer],
                    }
                    for layer in llm.exit_layers
                ],
                "budgets": {
                    name: budget.model_dump(exclude_unset=True) for name, budget in service.names.budgets.items()
                },
            }
        )

    async def slots(self, request: Request) -> Response:
        """Replies in progress."""
        self._service.llm  # noqa: B018 - refuses while the model is loading, not while the server stops
        return JSONResponse([_slot(job) for job in self._service.slots])

    async def change_slot(self, request: Request) -> Response:
        """Another budget for a reply in progress; or, by ``action``, save, restore or erase the rows of an ended one."""
        self._service.llm  # noqa: B018 - refuses while the model is loading
        key, action = request.path_params["key"], request.query_params.get("action")
        if action is not None and action not in ACTIONS:
            raise bad("action", action, f"must be one of {', '.join(ACTIONS)}")
        async with self._body(request) as body:
            fields = await self._read(body or b"{}", partial(Fields, table=SLOT))
        if action is None:
            if "budget" not in fields.names:
                raise RefusedError(
                    400, "give the keys of a budget as budget, or null for the server's own budget", "invalid_value"
                )
            return JSONResponse(_slot(await self._service.rebudget(key, fields.get("budget"))))
        return JSONResponse(await self._service.act_on_slot(action, key, fields.get("filename")))

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts among all bodies until the end of the block."""
        found = bytearray()
        try:
            await self._receive(request, found)
            yield bytes(found)
        finally:
            self._body_bytes -= len(found)

    async def _read(self, body: bytes, read: Callable[[bytes], _T]) -> _T:
        """What a body asks for. Of 8 MB it takes seconds, in which no stream would go on: a large one is read in a thread."""
        return await self._service.in_thread(partial(read, body), len(body)) if len(body) > LARGE_BODY else read(body)

    async def _receive(self, request: Request, found: bytearray) -> None:
        """Append the body of a request, if it is not too large and comes in time."""
        limits = self._service.limits
        said = request.headers.get("content-length", "0")  # a whole number: h11 refuses others
        try:
            async with asyncio.timeout(limits.body_s):
                if int(said) > limits.body_bytes:
                    raise _too_large(limits.body_bytes)
                async for piece in request.stream():
                    found += piece
                    self._body_bytes += len(piece)
                    if len(found) > limits.body_bytes:
                        raise _too_large(limits.body_bytes)
                    if self._body_bytes > limits.bodies_bytes and self._body_bytes > len(found) > SMALL_BODY:
                        raise busy("too many large bodies come at once: try again later", "queue_full", 1)
        except TimeoutError:
            raise RefusedError(
                408, f"the body took longer than {limits.body_s:g} s: send it at once", "slow_body"
            ) from None


def _too_large(most: int) -> RefusedError:
    # The connection stays open for a while, and what still comes is thrown away: closed at once, it would be reset, and the
    # client would not see the answer.
    return RefusedError(
        413, f"the body has more than {most} bytes: send less, or raise --max-body-mb", "body_too_large"
    )


def _pieces(codec: TextCodec, ids: Sequence[int]) -> list[dict[str, Any]]:
    """llama.cpp's objects of tokens: each with its text, or with its bytes if it is a part of a character."""
    found = []
    for token in ids:
        text = codec.name(token)
        raw = codec.raw(token) if "\ufffd" in text else None
        found.append({"id": token, "piece": text if raw is None else list(raw)})
    return found


def _slot(job: Job) -> dict[str, Any]:
    return {
        "id": job.key,
        "is_processing": job.begun_s is not None,
        "model": job.model,
        "n_prompt_tokens": len(job.ids),
        "n_decoded": job.cost.tokens,
        "budget": None if job.budget is None else job.budget.model_dump(exclude_unset=True),
        "balcony": job.cost.facts(),
    }


async def _refused(request: Request, error: Exception) -> Response:
    refusal = refusal_of(error)
    if refusal.status == 500 and isinstance(error, BalconyError):  # a bug has its traceback in the log
        _log.error("%s failed: %s", request.scope["path"][:100], error)
    return answer_of(refusal)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499, headers={REASON: "disconnected"})  # for the log: no one reads it


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # registered for no other
    what, word = ("path", "not_found") if error.status_code == 404 else ("method", "method_not_allowed")
    allowed = f"{request.method} {request.scope['path'][:100]}: no such {what}; docs/server.md lists them"
    return answer_of(RefusedError(error.status_code, allowed, word, headers=error.headers))  # Allow, of a wrong method
