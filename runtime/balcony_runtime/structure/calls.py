"""Calls in a reply: splits its tokens into text, names of functions and pieces of their arguments, as they arrive.

Owns the reading of the formats that :mod:`.tools` writes into grammars. A reply follows its grammar, so there is nothing to
repair; one that was cut ends anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from balcony_runtime.structure.marks import overlap
from balcony_runtime.structure.tools import Toolbox

#: A marker that is a token, in the text that is read: other tokens may spell it, and no call follows them. A noncharacter of
#: Unicode, so that no text has it by chance: private-use characters are glyphs of many fonts, such as Powerline.
_MARK = "\ufdd0"


class ToolCall(NamedTuple):
    """A call of a function.

    Attributes:
        id: name of this call, nine letters and digits as Mistral's templates want it.
        name: name of the function.
        arguments: its arguments as JSON; incomplete if the reply was cut.
    """

    id: str
    name: str
    arguments: str

    @property
    def whole(self) -> bool:
        """Whether its arguments are a JSON object; those of a reply that was cut may not be."""
        try:
            return isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            return False

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Piece(NamedTuple):
    """A piece of a reply.

    Attributes:
        text: text of the content, or of a call's arguments.
        call: number of the call; None for the content.
        begun: the call, if this piece begins it.
    """

    text: str
    call: int | None = None
    begun: ToolCall | None = None


class CallReader:
    """Reads one reply.

    Example:
        reader = stream.call_reader()
        pieces = [piece for token in stream for piece in reader.push(token.id, token.text)] + reader.finish()

    Args:
        box: its tools.
    """

    def __init__(self, box: Toolbox) -> None:
        form = box.form
        self._marker_id, self._key, self._document = box.marker_id, box.key, box.document
        self._marker = form.marker if self._marker_id is None else _MARK
        #: Marks of calls that are tokens; texts do not show those that are control tokens.
        self._marks = {token: name for name, token in box.tags.items() if token in box.marks}
        self._heads = {form.head + tool.name + form.middle: tool.name for tool in box.tools}
        self._first_heads = {form.first + head: name for head, name in self._heads.items()}
        self._again = form.tail + form.between + (self._marker if form.each else "")
        self._state: Literal["text", "call", "arguments", "after", "content"] = "text"
        self._held = ""
        self._scan = _Scan()
        self._calls: list[ToolCall] = []
        self.content = ""

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls so far."""
        return tuple(self._calls)

    def push(self, token: int, text: str) -> list[Piece]:
        """The pieces that a token completes."""
        text = text.replace(_MARK, "")
        if (mark := self._marks.get(token)) is not None:
            text = text.removesuffix(mark) + (_MARK if token == self._marker_id else mark)
        self._held += text
        found: list[Piece] = []
        while (piece := self._next()) is not None:
            if piece.text or piece.begun is not None:
                self._count(piece)
                found.append(piece)
        return found

    def finish(self) -> list[Piece]:
        """The pieces at the end of the reply: text that might have become a call."""
        piece = Piece(self._held.replace(_MARK, ""))
        self._held = ""
        if self._state not in ("text", "content") or not piece.text:
            return []
        self._count(piece)
        return [piece]

    def _count(self, piece: Piece) -> None:
        if piece.call is None:
            self.content += piece.text
        elif piece.begun is not None:
            self._calls.append(piece.begun)
        else:
            call = self._calls[piece.call]
            self._calls[piece.call] = call._replace(arguments=call.arguments + piece.text)

    def _next(self) -> Piece | None:
        """The next piece of the text that is held, which may be empty; None if it needs more text."""
        if not self._held:
            return None
        if self._state == "text":
            return self._in_text() if self._marker else self._in_call()
        if self._state == "call":
            return self._in_call()
        if self._state == "arguments":
            return self._in_arguments()
        return self._after() if self._state == "after" else self._shown(len(self._held))

    def _in_text(self) -> Piece | None:
        place = self._held.find(self._marker)
        if self._document and place and not self._marker.startswith(self._held):
            self._state = "content"
            return Piece("")
        if place >= 0:
            piece = self._shown(place)
            self._held, self._state = self._held[len(self._marker) :], "call"
            return piece
        kept = overlap(self._held, self._marker)
        return self._shown(len(self._held) - kept) if len(self._held) > kept else None

    def _in_call(self) -> Piece | None:
        heads = self._heads if self._calls else self._first_heads
        for head, name in heads.items():
            if self._held.startswith(head):
                self._held, self._state, self._scan = self._held[len(head) :], "arguments", _Scan()
                index = len(self._calls)
                return Piece("", index, ToolCall(f"{self._key}{index:02d}", name, ""))
        if any(head.startswith(self._held) for head in heads):
            return None
        self._state = "content"  # of a format without a marker
        return Piece("")

    def _in_arguments(self) -> Piece | None:
        size = self._scan.size(self._held)
        text, self._held = self._held[:size], self._held[size:]
        if self._scan.done:
            self._state = "after"
        return Piece(text, len(self._calls) - 1)

    def _after(self) -> Piece | None:
        if self._held.startswith(self._again):
            self._held, self._state = self._held[len(self._again) :], "call"
            return Piece("")
        return None

    def _shown(self, size: int) -> Piece:
        text, self._held = self._held[:size], self._held[size:]
        return Piece(text)


class _Scan:
    """Finds the end of a JSON object in pieces of text."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False
        self.done = False

    def size(self, text: str) -> int:
        """Number of characters of ``text`` that belong to the object."""
        for place, letter in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._quoted = False
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    return place + 1
        return len(text)


def read(box: Toolbox, tokens: Sequence[tuple[int, str]]) -> CallReader:
    """The reader after a whole reply of tokens with their texts."""
    reader = CallReader(box)
    for token, text in tokens:
        reader.push(token, text)
    reader.finish()
    return reader
