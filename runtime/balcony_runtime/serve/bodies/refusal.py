"""Refusals of the server: an HTTP status and OpenAI's error body, with the one line of the error that caused it.

Owns which error has which status. It does not know the web framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from balcony_edge.errors import (
    BalconyError,
    BudgetError,
    BusyError,
    ContextLengthError,
    InfeasibleError,
    InputError,
    MissingDependencyError,
    is_out_of_memory,
    shown,
)
from balcony_runtime.backends.base import NotFiniteError

#: Header that says why a request was turned away; the values are those of the metric ``balcony_rejections_total``.
REASON = "x-balcony-reason"
#: Statuses from 500 on after which a repetition meets the same; OpenAI's clients would repeat.
_FINAL = (501, 504, 507)
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}


class RefusedError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: one line: what was given, what is allowed, what to do.
        reason: word for programs and metrics; ``error.code`` in the body.
        param: field of the request that the error is about.
        headers: headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        reason: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = message.encode("utf-8", "replace").decode()  # a request may hold lone surrogates
        super().__init__(message)
        self.status, self.message, self.reason, self.param = status, message, reason, param
        final = {"x-should-retry": "false"} if status in _FINAL else {}
        self.headers = {REASON: reason, **final, **(headers or {})}

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.reason}}


def bad(param: str, given: object, allowed: str) -> RefusedError:
    """The refusal of a field: ``allowed`` says what it must be and what to do."""
    return RefusedError(400, f"{param} = {shown(given)}: {allowed}", "invalid_value", param=param)


def busy(message: str, reason: str, seconds: int) -> RefusedError:
    """Too much to do at the moment; a retry after some seconds may succeed."""
    return RefusedError(429, message, reason, headers={"retry-after": str(seconds)})


def draining() -> RefusedError:
    """The server stops; a proxy may know another one."""
    return RefusedError(503, "the server is stopping: use another one", "draining", headers={"retry-after": "5"})


def stopped() -> RefusedError:
    """The server does not wait for this answer any longer."""
    return RefusedError(503, "the server has stopped: ask another one", "stopped")


def too_long(limit_s: float) -> RefusedError:
    """The request has met its time limit."""
    return RefusedError(
        504, f"the request took longer than {limit_s:g} s: ask for fewer tokens, or raise --request-timeout", "timeout"
    )


#: Error of the runtime → status, reason, and the field that it is about. The first match counts.
_KINDS: tuple[tuple[type[BalconyError], int, str, str | None], ...] = (
    (InfeasibleError, 422, "infeasible", "budget"),
    (BudgetError, 400, "invalid_budget", "budget"),
    (ContextLengthError, 400, "context_length_exceeded", None),  # a chat's is messages, a completion's prompt
    (NotFiniteError, 500, "device", None),  # before its base, InputError: the client did not choose the bundle
    (InputError, 400, "invalid_value", None),
    (MissingDependencyError, 501, "not_installed", None),
    (BalconyError, 500, "device", None),
)


def refusal_of(error: BaseException, retry_s: int = 1) -> RefusedError:
    """The refusal for an error of the runtime.

    Args:
        error: what was raised.
        retry_s: seconds after which a retry may succeed, if the device is busy.
    """
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, BusyError):
        return busy(str(error), "overloaded", retry_s)
    # The parser has a bound of its own, and what follows needs a little more stack.
    if isinstance(error, RecursionError):
        return RefusedError(400, "the body is nested too deeply: send an object of fewer levels", "invalid_json")
    for kind, status, reason, param in _KINDS:
        if isinstance(error, kind):
            return RefusedError(status, str(error), reason, param=param)
    if is_out_of_memory(error):
        return RefusedError(500, "the device is out of memory: ask for less at once, or try again later", "device")
    return RefusedError(500, "the server failed: its log has the cause; report it as a bug", "internal")
