"""Text in and out of a bundle: prompts to tokens, and tokens to text that streams without a broken character.

The tokenizers library does the work; this module owns what the bundle's files mean, and stop strings. Templates are
:mod:`.template`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from balcony_edge.bundle import Bundle
from balcony_edge.errors import BundleError, InputError
from balcony_runtime.template import ChatTemplate

Message = Mapping[str, str]


class TextCodec:
    """The tokenizer and chat template of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        path = bundle.file("tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
            # what a training left in the file: transformers switches it off at every call, too
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except Exception as error:  # the library raises a plain Exception for any damage
            raise BundleError(f"{path}: not readable as a tokenizer ({error}): export the bundle again") from error
        self._template: ChatTemplate | None = None
        self._special: dict[str, str] = {}
        if bundle.has_file("chat_template.jinja"):
            template = bundle.file("chat_template.jinja")
            try:
                self._template = ChatTemplate(template.read_text(encoding="utf-8"))
                self._special = json.loads(bundle.file("special_tokens.json").read_text(encoding="utf-8"))
            except (jinja2.TemplateError, ValueError) as error:
                raise BundleError(f"{template}: not readable ({error}): export the bundle again") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle has one."""
        return self._template is not None

    def encode(self, prompt: str | Sequence[Message], *, chat: bool | None = None) -> list[int]:
        """Tokens of a prompt.

        Args:
            prompt: a text, or messages with ``role`` and ``content``.
            chat: put a text into the chat template as a user's message; by default where the bundle has a template.

        Raises:
            InputError: an empty prompt, messages without a template, or a template that refuses them.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty: give a text")
            if chat is False or (chat is None and not self.has_chat_template):
                return _some(self._tokenizer.encode(prompt).ids)
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes | bytearray):
            raise InputError(f"prompt of type {type(prompt).__name__}: give a text, messages or token ids")
        if not prompt:
            raise InputError("no messages were given: give at least one, e.g. {'role': 'user', 'content': '...'}")
        return _some(self._tokenizer.encode(self._render(prompt), add_special_tokens=False).ids)

    def _render(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise InputError("this bundle has no chat template: give the prompt as a text, with chat=False or --raw")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise InputError(f"message {message!r}: must be a mapping with 'role' and 'content'")
        variables: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": True, **self._special}
        try:
            return self._template.render(variables)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses these messages ({error})") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self._tokenizer)


def _some(ids: Sequence[int]) -> list[int]:
    """The tokens, of which there must be one."""
    if not ids:
        raise InputError("the prompt is empty: the tokenizer makes no token of it: give a text")
    return list(ids)


class TextStream:
    """Incremental detokenization: gives out text only when its characters are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._open: list[int] = []  # tokens since text was given out

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is unfinished."""
        self._open.append(token)
        try:
            text = self._stream.step(self._tokenizer, token) or ""
        except Exception as error:  # the library raises a plain one
            if "Invalid prefix" not in str(error):
                raise
            # with byte fallback bytes that were given out as a character turn into unknown ones when an unfinished one follows
            text = self.flush()
            self._stream = DecodeStream(skip_special_tokens=True)
            self._stream.step(self._tokenizer, token)
        if text:
            self._open = []
        return text

    def flush(self) -> str:
        """What is left at the end, where the last character never was completed."""
        return str(self._tokenizer.decode(self._open, skip_special_tokens=True)) if self._open else ""


class StopStrings:
    """Finds stop strings in streamed text and holds back what may become one.

    Args:
        stops: strings that end the text; none is fine.

    Raises:
        InputError: an empty stop string, which would end every text at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        listed = isinstance(stops, Iterable) and not isinstance(stops, str)
        if not listed or any(not isinstance(stop, str) or not stop for stop in stops):
            raise InputError(f"stop = {stops!r}: must be a list of strings that are not empty")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """``(text that is safe to show, whether a stop string was met)``; what follows a stop string is dropped."""
        if not self._stops:
            return text, False
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
