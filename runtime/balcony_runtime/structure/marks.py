"""Marks in the text of a reply as it comes: what may become a mark is held back.

Owns the marks around a thought, and the search for many marks at once. Those around calls are :mod:`.formats`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

#: Marks around a thought, as Qwen, DeepSeek and most other families write them.
THOUGHT = ("<think>", "</think>")
#: Names of a thought in a message. Most templates read the first, LFM2.5's the second; clients send any of them.
_NAMES = ("reasoning_content", "thinking", "reasoning")


def overlap(text: str, mark: str) -> int:
    """Length of the longest suffix of ``text`` that is a prefix of ``mark``, and not all of it."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)


@cache
def one_of(marks: tuple[str, ...]) -> re.Pattern[str]:
    """An expression that finds marks in a text; where several begin at one place, the longest.

    It looks at each letter once, however many marks begin alike. Llama 3 has 248 ``<|reserved_special_token_N|>``: as a list of
    choices they took 9 s, all under Python's lock, for a text of 8 MB that only begins them.
    """
    return re.compile(_expression(marks))


def _expression(marks: Sequence[str]) -> str:
    begin = os.path.commonprefix(marks)  # noqa: RUF071 - letters are meant
    later: dict[str, list[str]] = {}
    for mark in marks:
        if rest := mark[len(begin) :]:
            later.setdefault(rest[0], []).append(rest)
    choice = "|".join(map(_expression, later.values()))
    return re.escape(begin) + (f"(?:{choice}){'?' if begin in marks else ''}" if choice else "")


def with_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its thought, if it has one, under the names that templates read, as in transformers."""
    thought = next((message[name] for name in _NAMES if message.get(name) is not None), None)
    return {**message} if thought is None else {**message, "reasoning_content": thought, "thinking": thought}


class ThoughtReader:
    """Splits a reply into its thought, which comes first if there is one, and its answer.

    White space around the thought and before the answer belongs to neither.

    Args:
        inside: whether the prompt has opened the thought.
    """

    def __init__(self, inside: bool) -> None:
        self._state: Literal["before", "thought", "answer"] = "thought" if inside else "before"
        self._held = ""
        self._bare = True  # whether the present part has no text yet

    def push(self, text: str) -> tuple[str, str]:
        """What this text adds to thought and answer."""
        self._held += text
        opening, closing = THOUGHT
        if self._state == "before":
            begin = self._held.lstrip()
            if len(begin) < len(opening) and opening.startswith(begin):
                return "", ""
            if begin.startswith(opening):
                self._state, self._held = "thought", begin.removeprefix(opening)
            else:  # a reply without a thought stays as it is
                self._state, self._bare = "answer", False
        thought = ""
        if self._state == "thought":
            before, found, after = self._held.partition(closing)
            kept = 0 if found else overlap(before, closing)
            thought = before[: len(before) - kept].rstrip()
            self._held = after if found else before[len(thought) :]
            thought = self._begun(thought)
            if found:
                self._state, self._bare = "answer", True
        answer = ""
        if self._state == "answer":
            answer, self._held = self._begun(self._held), ""
        return thought, answer

    def finish(self) -> tuple[str, str]:
        """What the end of the reply adds to them: text that might have become a mark."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._state == "thought" else ("", held)

    def _begun(self, text: str) -> str:
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        return text
