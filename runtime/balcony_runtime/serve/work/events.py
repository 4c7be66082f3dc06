"""OpenAI's response objects: items, whole and as events.

Owns the names of their fields. A message in pieces, as :mod:`.shapes` makes it for a chat, becomes items: its thought, its text
and each call.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from balcony_runtime.reply import Token
from balcony_runtime.serve.bodies.refusal import RefusedError
from balcony_runtime.serve.bodies.responses import functions, name_of
from balcony_runtime.serve.work.jobs import Job, Scores
from balcony_runtime.serve.work.shapes import Shapes, usage

Event = dict[str, Any]
#: Kind of an item → the kind of its part, the only one.
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
#: Part of a message's delta → the kind of its item.
_TEXTS = {"reasoning_content": "reasoning", "content": "message"}
_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


class ResponseShapes(Shapes):
    """The objects of one answer; it has one reply. Arguments are those of :class:`.Shapes`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.id = "resp_" + uuid.uuid4().hex
        self._made = 0  # events
        self._items: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._details: dict[str, str] | None = None
        self._logprobs: list[Any] = []  # of tokens whose text has not come
        self._before_answer = 0  # tokens
        # of functions in namespaces: the name by which the model knows one → its own and that of its namespace
        self._names = {
            name_of(one): {key: one[key] for key in ("namespace", "name")}
            for one in functions((self._asked.response or {}).get("tools") or ())
            if "namespace" in one
        }

    def opening(self, job: Job, scores: Scores | None) -> list[Event]:
        """Events before the first token."""
        return self._begin()

    def token(self, job: Job, token: Token) -> list[Event]:
        """The events of a token; none if it has nothing to say yet."""
        found: list[Event] = []
        for piece in super().token(job, token):
            (choice,) = piece["choices"]
            delta = choice["delta"]
            self._logprobs += (choice["logprobs"] or {}).get("content") or []
            # White space before the calls might have begun a thought, so it comes with the last token.
            called = self._kind == "function_call"
            for key, kind in _TEXTS.items():
                if (text := delta.get(key)) and not called:
                    found += self._said(kind, text)
            for call in delta.get("tool_calls", ()):
                found += self._called(call)
            if (reason := choice["finish_reason"]) is not None:
                found += self._ended(reason)
        if self._kind not in (None, "message"):
            self._logprobs = []  # only a message has a place for them
        self._before_answer += self._kind in (None, "reasoning")
        return found

    def empty(self, job: Job) -> None:
        """Nothing: clients of responses know comments."""

    def failure(self, refusal: RefusedError) -> list[Event]:
        """The last events of an answer that failed. Clients take none before the first ones, which come with a token."""
        found = [] if self._made else self._begin()
        code = "rate_limit_exceeded" if refusal.status == 429 else "server_error"  # OpenAI's words; it has few
        self._status, self._error = "failed", {"code": code, "message": refusal.message}
        return [*found, self._event("response.failed", response=self._response())]

    def settle(self, last: Event, jobs: Sequence[Job]) -> None:
        """Add to the last event what is known at the end: the usage and the cost."""
        last["response"] |= self._cost(jobs)

    def whole(self, jobs: Sequence[Job], scores: Sequence[Scores | None]) -> dict[str, Any]:
        """The whole answer."""
        for job in jobs:
            for token in () if job.stream is None else job.stream.reply.tokens:
                self.token(job, token)
        return self._response() | self._cost(jobs)

    def _cost(self, jobs: Sequence[Job]) -> dict[str, Any]:
        used, thinks = usage(jobs), bool(self._items) and self._items[0]["type"] == "reasoning"
        tokens = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": used["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._before_answer if thinks else 0},
            "total_tokens": used["total_tokens"],
        }
        return {"usage": tokens, **self.costs(jobs, [job.cost for job in jobs])}

    @property
    def _kind(self) -> str | None:
        """Kind of the last item, which is in progress until the end; None without one."""
        return self._items[-1]["type"] if self._items else None

    def _begin(self) -> list[Event]:
        """The first events."""
        return [self._event(f"response.{word}", response=self._response()) for word in ("created", "in_progress")]

    def _said(self, kind: str, text: str) -> list[Event]:
        """The events of a text."""
        part_kind, found = _PARTS[kind], []
        if self._kind != kind:
            part: dict[str, Any] = {"type": part_kind, "text": ""}
            found = self._close("completed")
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
                found += self._add(kind, role="assistant", content=[])
            else:
                found += self._add(kind, summary=[], content=[])
            self._items[-1]["content"].append(part)
            found.append(self._about("response.content_part.added", content_index=0, part={**part}))
        part, facts = self._items[-1]["content"][0], {}
        part["text"] += text
        if kind == "message":
            facts, self._logprobs = {"logprobs": self._logprobs}, []
            part["logprobs"] = part["logprobs"] + facts["logprobs"]
        return [*found, self._about(f"response.{part_kind}.delta", content_index=0, delta=text, **facts)]

    def _called(self, call: dict[str, Any]) -> list[Event]:
        """The events of a piece of a call."""
        found, function = [], call["function"]
        if "id" in call:
            found = self._close("completed")
            names = self._names.get(function["name"], {"name": function["name"]})
            found += self._add("function_call", call_id=call["id"], **names, arguments="")
        if arguments := function["arguments"]:
            self._items[-1]["arguments"] += arguments
            found.append(self._about("response.function_call_arguments.delta", delta=arguments))
        return found

    def _ended(self, reason: str) -> list[Event]:
        """The events at the end; a reason of chats is given. A call that a stop string cut is none that a client can run."""
        found = [] if self._items else self._said("message", "")
        cut = reason == "stop" and self._kind == "function_call"
        self._status = "incomplete" if reason == "length" or cut else "completed"
        self._details = {"reason": "max_output_tokens"} if reason == "length" else None
        found += self._close(self._status)
        return [*found, self._event(f"response.{self._status}", response=self._response())]

    def _add(self, kind: str, **facts: Any) -> list[Event]:
        """The event of a new item."""
        self._items.append({"id": _PREFIXES[kind] + uuid.uuid4().hex, "type": kind, "status": "in_progress", **facts})
        shown = {key: list(value) if isinstance(value, list) else value for key, value in self._items[-1].items()}
        return [self._about("response.output_item.added", item=shown)]

    def _close(self, status: str) -> list[Event]:
        """The events at the end of the last item; none without one."""
        if not self._items:
            return []
        item = self._items[-1]
        item["status"], found = status, []
        if item["type"] == "function_call":
            facts = {"name": item["name"], "arguments": item["arguments"]}
            found.append(self._about("response.function_call_arguments.done", **facts))
        else:
            part = item["content"][0]
            facts = {"text": part["text"]} | ({"logprobs": part["logprobs"]} if item["type"] == "message" else {})
            found.append(self._about(f"response.{part['type']}.done", content_index=0, **facts))
            found.append(self._about("response.content_part.done", content_index=0, part=part))
        return [*found, self._about("response.output_item.done", item=item)]

    def _about(self, kind: str, **facts: Any) -> Event:
        """An event about the last item."""
        named = {} if "item" in facts else {"item_id": self._items[-1]["id"]}
        return self._event(kind, output_index=len(self._items) - 1, **named, **facts)

    def _event(self, kind: str, **facts: Any) -> Event:
        self._made += 1
        return {"type": kind, "sequence_number": self._made - 1, **facts}

    def _response(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._head["created"],
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": self._error,
            "incomplete_details": self._details,
            "model": self._head["model"],
            "output": list(self._items),
            "usage": None,
            **(self._asked.response or {}),
        }
