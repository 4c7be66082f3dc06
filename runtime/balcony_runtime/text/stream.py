"""The text of tokens as they come, without broken characters.

Owns which tokens are held back until their characters are complete, and what the tokens before the first one decide about its
text. It knows neither bundles nor replies: those are :mod:`.codec` and :mod:`balcony_runtime.telling`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

#: Tokens before another one that decide how it is spelled.
CONTEXT_TOKENS = 8
#: Most texts of tokens that are kept, as many as rows of the token table. With cold caches the tokenizer takes 16 µs.
RECENT_TEXTS = 1024
#: Most tokens that wait for a text, and those of them that may still become one: a character has at most four bytes.
MOST_OPEN, CHARACTER_TOKENS = 32, 4


class TextStream:
    """Incremental detokenization, which returns text only when its characters are complete.

    Args:
        tokenizer: the tokenizer.
        before: tokens that the first one follows. Many tokenizers drop the space in front of a text's first word.
        texts: texts of recent tokens, if they depend on no other token; None if they do.
        silent: control tokens, which have no text. The library would decode all of them in a row again at each further one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        before: Sequence[int] = (),
        texts: dict[int, str] | None = None,
        silent: Container[int] = (),
    ) -> None:
        self._tokenizer, self._texts, self._silent = tokenizer, texts, silent
        self._stream = DecodeStream(skip_special_tokens=True)
        self._open: list[int] = []  # tokens since the last text
        self._before = ""  # what ``before`` ends with, if it may be half of a character
        before = before[-CONTEXT_TOKENS:]
        # Byte fallback decodes neighbouring bytes together, and those after the end of a cut character would be unknown.
        while before and re.match("<0x[89AB]", tokenizer.id_to_token(before[0]) or ""):
            before = before[1:]
        for token in before:
            self.push(token)
        self._before, self._open = self.flush(), []

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is unfinished."""
        texts = None if self._open or self._before else self._texts
        if texts is not None and (text := texts.get(token)):
            return text
        if token in self._silent:
            return ""
        self._open.append(token)
        try:
            text = self._stream.step(self._tokenizer, token) or ""
        except Exception as error:  # the library raises a plain one
            if "Invalid prefix" not in str(error):
                raise
            # With byte fallback, bytes that were already returned as a character become unknown characters when an unfinished
            # one follows.
            text = self.flush()
            self._stream = DecodeStream(skip_special_tokens=True)
            self._stream.step(self._tokenizer, token)
        if text:
            if texts is not None:
                if len(texts) >= RECENT_TEXTS:
                    texts.clear()
                texts[token] = text
            self._open = []
        elif len(self._open) > MOST_OPEN:
            text = self._hopeless()
        if text:
            text, self._before = text.removeprefix(self._before), ""
        return text

    def _hopeless(self) -> str:
        """Text of bytes that no token to come makes a character. The library would decode all of them again at each."""
        done, kept = self._open[:-CHARACTER_TOKENS], self._open[-CHARACTER_TOKENS:]
        text, rest = (str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in (done, kept))
        if text + rest != self.flush():  # a character lies across the cut: there is another one at the next token
            return ""
        self._open, self._stream = kept, DecodeStream(skip_special_tokens=True)
        for token in kept:
            self._stream.step(self._tokenizer, token)
        return text

    def flush(self) -> str:
        """Remaining text at the end, if the last character was never completed."""
        return str(self._tokenizer.decode(self._open, skip_special_tokens=True)) if self._open else ""
