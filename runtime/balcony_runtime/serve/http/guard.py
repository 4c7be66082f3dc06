"""Who may use the server: keys, hosts and origins, and the count of all answers.

Owns the checks before a route runs.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from balcony_runtime.serve.bodies.refusal import RefusedError
from balcony_runtime.serve.work.service import Service

_log = logging.getLogger("balcony_runtime.serve.requests")
#: Key in the scope of a request whose answer writes its own line.
LOGGED = "balcony.logged"
#: Longest path, so that no number in it is longer than Python reads.
LONGEST_PATH = 1000
#: Paths that need no key: what a balancer asks, and the page, which has a field for the key.
_OPEN = ("/health", "/v1/health", "/")


class Guard:
    """Checks keys and hosts before a route runs, and counts answers."""

    def __init__(
        self, app: Starlette, service: Service, api_key: str | None, loopback: bool, origins: Sequence[str]
    ) -> None:
        self._app, self._service, self._api_key, self._loopback = app, service, api_key, loopback
        self._origins = origins
        self._paths = {route.path for route in app.routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        seen: list[Message] = []
        ended = False

        async def counted(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                seen.append(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            self._check(Request(scope))
            await self._app(scope, receive, counted)
        except RefusedError as refusal:
            await answer_of(refusal)(scope, receive, counted)
        except ClientDisconnect:
            return
        except Exception:  # a bug: starlette has answered 500, and the connection may go on
            if not ended:
                raise
            _log.exception("%s %s failed", scope["method"], scope["path"][:100])
        finally:
            if seen:
                self._note(scope, seen[0])

    def _check(self, request: Request) -> None:
        # Not request.url, which follows the Host header that the client chose.
        if request.scope["path"] not in _OPEN and self._api_key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            known = scheme.lower() == "bearer"
            if not hmac.compare_digest(given.strip().encode(), self._api_key.encode()) or not known:
                raise RefusedError(
                    401,
                    "the key is missing or wrong: send the header Authorization: Bearer KEY",
                    "invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        # A page of another site must not use a server on the visitor's own machine.
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        foreign = origin is not None and _split(origin).netloc != host
        if foreign and origin not in self._origins and "*" not in self._origins:
            raise RefusedError(
                403,
                f"origin {str(origin)[:100]}: pages of other sites may not use this server, and its host is {host[:100]}: "
                "start it with --allow-origin, or let a proxy pass the Host header on",
                "foreign_origin",
            )
        # A browser always names a host; a health check that speaks HTTP/1.0 need not.
        if self._loopback and self._api_key is None and host and not is_loopback(_split(f"//{host}").hostname or ""):
            raise RefusedError(
                403, f"host {host[:100]}: use localhost, or start the server with --api-key", "foreign_host"
            )
        if len(request.scope["path"]) > LONGEST_PATH:
            raise RefusedError(404, "no such path; docs/server.md lists them", "not_found")

    def _note(self, scope: Scope, message: Message) -> None:
        """Count an answer, and log it if it is an error that no reply has logged."""
        reason = dict(message.get("headers", ())).get(b"x-balcony-reason", b"").decode()
        status, path, route = message["status"], scope["path"], scope.get("route")
        if self._service.ready:
            # a request that was refused before routing has no route
            endpoint = route.path_format if route is not None else path if path in self._paths else "other"
            refused = None if status == 499 else reason or None  # a client that left was not refused
            self._service.metrics.request(endpoint, status, refused)
        if reason and LOGGED not in scope:
            method = scope["method"][:20]
            line = {
                "client": client_of(scope),
                "method": method,
                "path": path[:100],
                "status": status,
                "reason": reason,
            }
            _log.info("%s", json.dumps(line))


def _split(address: str) -> SplitResult:
    """The parts of an address; those of nothing if it is not one."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def client_of(scope: Scope) -> str:
    """Address of the client; uvicorn takes it from X-Forwarded-For if the peer is on this machine. Empty for other texts."""
    try:
        found = ipaddress.ip_address(scope["client"][0].partition("%")[0])
    except (TypeError, ValueError):  # there is none
        return ""
    # over `--host ::` IPv4 comes as ::ffff:192.0.2.7, which Python before 3.13 writes as ::ffff:c000:207
    return str(getattr(found, "ipv4_mapped", None) or found)


def answer_of(refusal: RefusedError) -> JSONResponse:
    """The response of a refusal."""
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)
