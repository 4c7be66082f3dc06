"""Text in and out of a bundle: prompts to tokens, and tokens to text.

The tokenizers library does the work; this module owns the meaning of the bundle's files. Chat templates are :mod:`.template`,
text of tokens as they come is :mod:`.stream`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, reduce
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.decoders import ByteLevel

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, InputError, shown
from balcony_runtime.structure.formats import (
    DEFAULT,
    CallFormat,
    format_of,
    formats,
    one_system,
    plain_messages,
    without_system,
)
from balcony_runtime.structure.marks import THOUGHT, ThoughtReader, one_of, overlap, with_thought
from balcony_runtime.text.stream import CONTEXT_TOKENS, TextStream
from balcony_runtime.text.template import ChatTemplate

Message = Mapping[str, Any]
#: Letter → byte of byte-level tokenizers (GPT-2): a byte that can be printed is its own letter, others follow from U+0100 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(0x100 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PRINTED)))
}
#: Marks around a placeholder for a control token that a user wrote, and the first mark of one that the template wrote. Texts do
#: not contain them by chance: two letters of Linear A and a noncharacter of Unicode. Python prints these letters as they are
#: where a template writes a list or a mapping; it escapes noncharacters. Private-use characters are glyphs of many fonts.
_OPEN, _CLOSE, _ALIAS = "\U00010600", "\U00010601", "\ufdd0"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}{_ALIAS}]")
#: Roles that may be a part of a control token's name. Templates write a role between marks of their own, such as
#: ``<|role|>``, where other words could become a control token.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
#: Most other roles of a conversation. Each is compared with every control token's name, which takes up to two milliseconds.
MOST_ROLES = 64
#: Marks of turns. Some are not special tokens (DeepSeek's for users and the assistant, ChatML's where Axolotl adds them):
#: replies show them, as in transformers, and stop strings find them, but no message writes them.
_TURN = re.compile(r"\W.*(user|assistant|system|im_start|im_end|_of_turn|eot_id|header_id).*\W", re.IGNORECASE)
#: A call by which a template cuts a literal out of texts.
_CUT = re.compile(r"""\breplace\(\s*(['"])((?:\\.|(?!\1)[^\\])+)\1\s*,\s*(?:''|"")\s*[,)]""")
#: Kind of a content part → its key with the text; clients send answers back as they got them, also those of other services.
_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
#: Variables of a template that have parameters of their own.
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class TextCodec:
    """The tokenizer and chat template of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        path = bundle.file("tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
            # A training may have left truncation and padding in the file; transformers also switches them off at every call.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except Exception as error:  # the library raises a plain Exception for any damage
            raise BundleError(f"{path}: not readable as a tokenizer ({error}): export the bundle again") from error
        self._names: dict[int, str] = {}
        # Byte-level decoders join bytes: a token that begins with a character has one text. Others look at those before it.
        self._texts: dict[int, str] | None = {} if isinstance(self._tokenizer.decoder, ByteLevel) else None
        self._template: ChatTemplate | None = None
        self._special = special_tokens(bundle) if "special_tokens.json" in bundle.manifest.files else {}
        self._source: str | None = None
        self._turns: set[str] = set()
        self._cut: list[str] = []  # as SmolLM3's does with ``/no_think`` in a system message
        self._call_format: CallFormat | None = None
        self._knows_developer = self._thinks = False
        if "chat_template.jinja" in bundle.manifest.files:
            template = bundle.file("chat_template.jinja")
            try:
                source = self._source = template.read_text(encoding="utf-8")
                self._template = ChatTemplate(source)
                self._knows_developer, self._thinks = "developer" in source, THOUGHT[1] in source
                written = (word.encode("ascii", "backslashreplace") for _, word in _CUT.findall(source))
                self._cut = [word.decode("unicode-escape", "replace") for word in written]  # as jinja2 reads it
                self._turns = {name for name in self.added if _TURN.fullmatch(name) and name in source}
                if "tools" in self._template.variables:
                    self._call_format = format_of(source)
            except (jinja2.TemplateError, ValueError) as error:
                raise BundleError(f"{template}: not readable ({error}): export the bundle again") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle has a chat template."""
        return self._template is not None

    @property
    def facts(self) -> dict[str, str | None]:
        """Names of special tokens, and the text of the chat template; None for what the bundle does not have."""
        return {"bos_token": None, "eos_token": None, **self._special, "chat_template": self._source}

    @property
    def call_format(self) -> CallFormat:
        """How the model writes calls of tools; the default format if its template knows no tools, or an unknown format."""
        return self._call_format or formats()[DEFAULT]

    def thought_reader(self, prompt: Sequence[int]) -> ThoughtReader | None:
        """A reader of a reply that may begin with a thought; None if the chat template knows no thoughts.

        Args:
            prompt: tokens of the prompt; many templates open the thought in it.
        """
        if not self._thinks or self.control_token(THOUGHT[1]) is not None:  # texts have no control tokens
            return None
        return ThoughtReader(self.decode(prompt[-CONTEXT_TOKENS:], control_tokens=True).rstrip().endswith(THOUGHT[0]))

    @cached_property
    def added(self) -> dict[str, tuple[int, AddedToken]]:
        """Added tokens by their names, with their ids. Texts do not show those that are special: control tokens."""
        return {token.content: (id_, token) for id_, token in self._tokenizer.get_added_tokens_decoder().items()}

    def control_token(self, text: str) -> int | None:
        """The control token of this name, or None."""
        found = self.added.get(text)
        return found[0] if found is not None and found[1].special else None

    def encode(
        self,
        prompt: str | Sequence[Message],
        *,
        chat: bool | None = None,
        control_tokens: bool | None = None,
        add_special_tokens: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of a prompt.

        Args:
            prompt: a text, or messages with ``role`` and ``content``. A content is a text, or a list of parts
                ``{"type": "text", "text": ...}``, which are joined with newlines.
            chat: whether a text is put into the chat template as a user's message; by default if the bundle has a template.
            control_tokens: whether a control token that the prompt spells out (such as ``<|im_end|>``) becomes that token. By
                default a plain text's do, as in transformers, and those in messages, tools and documents do not, so that no
                message can end its own turn. The template's own control tokens are not affected.
            add_special_tokens: whether a plain text gets what the tokenizer puts around texts, such as one for its beginning. A
                chat template writes its own.
            tools: functions that the template shows to the model, in OpenAI's shape.
            documents: documents that the template shows to the model.
            template_kwargs: further variables of the template, such as ``enable_thinking``.

        Raises:
            InputError: the prompt is empty or not valid Unicode, the bundle has no template for messages, or the template
                refuses them or has no use for documents.
        """
        variables = self._variables(tools, documents, template_kwargs)
        if isinstance(prompt, str):
            plain = not self.has_chat_template if chat is None else not chat  # also of False as NumPy has it
            if not (prompt if plain else prompt.strip()):
                raise InputError("the prompt is empty: give a text")
            if plain:
                if variables:
                    raise InputError(
                        f"{next(iter(variables))} with a plain text: only a chat template shows it: give messages"
                    )
                tokenizer = self._tokenizer if control_tokens is None or control_tokens else self._literal
                return _some(self._ids(tokenizer, _unicode(prompt), special=add_special_tokens))
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes | bytearray):
            raise InputError(f"prompt of type {type(prompt).__name__}: give a text, messages or token ids")
        if not prompt:
            raise InputError("no messages were given: give at least one, e.g. {'role': 'user', 'content': '...'}")
        messages = [_message(message) for message in prompt]
        if not self._knows_developer:  # OpenAI's newer name of the system: many templates drop what they do not know
            messages = [one | {"role": "system"} if one["role"] == "developer" else one for one in messages]
        try:
            if control_tokens:
                return _some(self._ids(self._tokenizer, self._render(messages, variables)))
            return _some(self._encode_literally(messages, variables))
        except RecursionError:
            raise InputError("the prompt is nested too deeply: give messages and variables of fewer levels") from None

    def _variables(
        self,
        tools: Sequence[Mapping[str, Any]],
        documents: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Variables of the template that a request gives, next to its messages."""
        if not isinstance(template_kwargs or {}, Mapping) or _RESERVED & set(template_kwargs or ()):
            raise InputError(
                f"chat_template_kwargs = {shown(template_kwargs)}: must be an object without {', '.join(sorted(_RESERVED))}: "
                "give e.g. {'enable_thinking': False}"
            )
        found = {"tools": list(tools), "documents": documents}
        if documents and (self._template is None or "documents" not in self._template.variables):
            raise InputError("documents: this bundle's chat template has no use for them: put them into a message")
        if not isinstance(documents, Sequence) or not all(isinstance(one, Mapping) for one in documents):
            raise InputError(
                f"documents = {shown(documents)}: must be a list of objects: give e.g. [{{'text': '...'}}]"
            )
        return {name: value for name, value in found.items() if value} | dict(template_kwargs or {})

    def _encode_literally(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
        """Tokens of a conversation in which only the template's own control tokens have a meaning."""
        names = self._control_tokens
        if not names:
            return self._ids(self._tokenizer, self._render(messages, variables))
        roles = {_MARKS.sub("", message["role"]) for message in messages} - _ROLES
        if len(roles) > MOST_ROLES:
            raise InputError(
                f"messages of {len(roles)} unusual roles: at most {MOST_ROLES} are taken: give the usual ones"
            )
        for role in roles:
            if any(role in name or overlap(role, name) or overlap(name, role) for name in names):
                raise InputError(
                    f"role = {shown(role)}: is part of a control token: give one of {', '.join(sorted(_ROLES))}"
                )
        spelled = one_of(tuple(names))
        places = {name: place for place, name in enumerate(names)}

        def hidden(value: Any) -> Any:
            """A value whose texts have placeholders for control tokens."""
            if isinstance(value, str):
                text = spelled.sub(lambda found: f"{_OPEN}{places[found[0]]}{_CLOSE}", _MARKS.sub("", value))
                if self._cut and spelled.search(reduce(lambda left, word: left.replace(word, ""), self._cut, text)):
                    raise InputError(
                        "a message spells a control token once the template has cut words out: leave it out"
                    )
                return text
            if isinstance(value, Mapping):
                return {hidden(key): hidden(one) for key, one in value.items()}
            return [hidden(one) for one in value] if isinstance(value, list | tuple) else value

        text = self._render(hidden(messages), hidden(variables))
        if _OPEN not in text:
            return self._ids(self._tokenizer, text)
        # In one piece: many tokenizers put a space before the first word of each text that they are given.
        tokenizer, own = self._aliased
        text = spelled.sub(lambda found: f"{_ALIAS}{places[found[0]]}{_CLOSE}", text)
        text = re.sub(f"{_OPEN}([0-9]+){_CLOSE}", lambda found: names[int(found[1])], text)
        return [own.get(token, token) for token in self._ids(tokenizer, text)]

    def _ids(self, tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
        # encode() keeps Python's lock, which the thread that makes tokens needs; encode_batch_fast() does not
        try:
            (found,) = tokenizer.encode_batch_fast([text], add_special_tokens=special)
        except BaseException as error:
            # Its first call starts threads. Where a container allows no more, that call and all later ones fail.
            # The error is a BaseException, and no module exports its class.
            if type(error).__name__ != "PanicException":
                raise
            found = tokenizer.encode(text, add_special_tokens=special)
        return list(found.ids)

    @cached_property
    def _control_tokens(self) -> list[str]:
        """Names of the control tokens and of the marks of turns, the longest first."""
        found = (name for name, (_, token) in self.added.items() if token.special or name in self._turns)
        return sorted(found, key=len, reverse=True)

    @cached_property
    def _aliased(self) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer that knows control tokens by aliases only, and their own ids by those of the aliases."""
        tokenizer = self._spelling()
        aliases = {f"{_ALIAS}{place}{_CLOSE}": self.added[name] for place, name in enumerate(self._control_tokens)}
        kept = ("single_word", "lstrip", "rstrip", "normalized")
        tokenizer.add_tokens(
            [
                AddedToken(alias, special=False, **{name: getattr(token, name) for name in kept})
                for alias, (_, token) in aliases.items()
            ]
        )
        added = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
        return tokenizer, {added[alias]: id_ for alias, (id_, _) in aliases.items()}

    @cached_property
    def _literal(self) -> Tokenizer:
        """A tokenizer for plain texts whose control tokens are text."""
        return self._spelling()

    def _spelling(self) -> Tokenizer:
        """A copy of the tokenizer that treats names of control tokens as plain text."""
        text, names = self._tokenizer.to_str(), set(self._control_tokens)
        if isinstance(self._tokenizer.model, models.Unigram):
            # The names are among its pieces, with the best of all scores.
            document = json.loads(text)
            pieces = document["model"]["vocab"]
            document["model"]["vocab"] = [[piece, -1e6 if piece in names else score] for piece, score in pieces]
            text = json.dumps(document)
        literal = Tokenizer.from_str(text)
        added = literal.get_added_tokens_decoder().values()
        literal.add_special_tokens([token for token in added if token.content in self._turns])
        literal.encode_special_tokens = True
        return literal

    def _render(self, messages: Sequence[dict[str, Any]], given: Mapping[str, Any]) -> str:
        template = self._template
        if template is None:
            raise InputError(
                "this bundle has no chat template: give the prompt as a text (chat=False, --raw, or /v1/completions)"
            )
        calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        unshown = given.get("tools", ()) if self._call_format is None else ()  # the template has no place for them
        if unshown or (calls and not self.call_format.written):
            messages = plain_messages(messages, unshown, self.call_format)
            given = {**given, "tools": None} if unshown else given
        try:
            return self._rendered(template, messages, given)
        except InputError:
            first = one_system(messages)
            for other in (first, without_system(first)):
                if other != messages:
                    with suppress(InputError):
                        return self._rendered(template, other, given)
            raise

    def _rendered(self, template: ChatTemplate, messages: Sequence[Message], given: Mapping[str, Any]) -> str:
        # transformers also gives None for these: templates ask whether they are none
        always = {"tools": None, "documents": None}
        variables = {**always, **given, **self._special, "messages": list(messages), "add_generation_prompt": True}
        try:
            return _unicode(template.render(variables))
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses these messages ({error})") from error

    def decode(self, tokens: Sequence[int], *, control_tokens: bool = False) -> str:
        """Text of tokens, with or without the names of control tokens."""
        # as for _ids()
        (text,) = self._tokenizer.decode_batch([list(tokens)], skip_special_tokens=not control_tokens)
        return str(text)

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json."""
        return str(self._tokenizer.to_str())

    def name(self, token: int) -> str:
        """Text of a token inside a text, so with its leading space; the name of a control token."""
        if token not in self._names:
            before = self._word()
            whole, text = (self._tokenizer.decode(ids, skip_special_tokens=False) for ids in ([*before, token], before))
            self._names[token] = str(whole)[len(str(text)) :]
        return self._names[token]

    def raw(self, token: int) -> bytes | None:
        """Bytes of a token that is a part of a character; None if the tokenizer has no bytes."""
        name = self._tokenizer.id_to_token(token) or ""
        if found := re.fullmatch("<0x([0-9A-F]{2})>", name):  # byte fallback
            return bytes.fromhex(found[1])
        try:
            return bytes(_BYTES[letter] for letter in name)
        except KeyError:
            return None

    def stream(self, before: Sequence[int] = (), *, literal: bool = False) -> TextStream:
        """A decoder that takes one token at a time; the first one follows the tokens ``before``.

        ``literal``: whether without such tokens the first one keeps its space, which many tokenizers drop.
        """
        before = before or (self._word() if literal else ())
        return TextStream(self._tokenizer, before, self._texts, self._silent)

    @cached_property
    def _silent(self) -> frozenset[int]:
        """The control tokens."""
        return frozenset(id_ for id_, token in self.added.values() if token.special)

    def _word(self) -> list[int]:
        return list(self._tokenizer.encode("a", add_special_tokens=False).ids)


def special_tokens(bundle: Bundle) -> dict[str, str]:
    """Names of special tokens that a chat template may use, such as ``bos_token``.

    Raises:
        BundleError: the file is not a JSON object of texts.
    """
    path = bundle.file("special_tokens.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not readable as JSON ({error}): export the bundle again") from error
    if not isinstance(found, dict) or not all(
        name.endswith("_token") and isinstance(token, str) for name, token in found.items()
    ):
        raise BundleError(f"{path}: must map names such as bos_token to texts: export the bundle again")
    return found


def no_message(given: object) -> InputError:
    """The refusal of what is no message."""
    return InputError(f"message {shown(given)}: must be a mapping with 'role' and 'content': give both")


def _message(message: Any) -> dict[str, Any]:
    """A copy of a message whose content is one text; a template would print anything else as Python prints it."""
    given = message if isinstance(message, Mapping) else {}
    # A reply that stopped before its first word comes back as null, or without the key.
    may_be_empty = (calls := given.get("tool_calls")) or given.get("role") == "assistant"
    if "role" not in given or ("content" not in given and not may_be_empty):
        raise no_message(message)
    if not isinstance(message["role"], str):
        raise InputError(f"message role = {shown(message['role'])}: must be a text: give e.g. 'user'")
    content = message.get("content")
    if content is None and may_be_empty:
        content = ""
    if isinstance(content, list | tuple):
        parts = [
            part.get(_PARTS.get(str(part.get("type")), "")) if isinstance(part, Mapping) else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(
                "message content: a list may hold only texts, such as {'type': 'text', 'text': '...'}: give those"
            )
        content = "\n".join(parts)  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise InputError(f"message content = {shown(content)}: must be a text or a list of text parts: give a text")
    found = with_thought({**message, "role": _unicode(message["role"]), "content": _unicode(content)})
    found.pop("tool_calls", None)  # some templates refuse an empty list
    if calls:
        found["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list | tuple) else [_call(calls)]
    return found


def _call(call: Any) -> dict[str, Any]:
    """A copy of a call whose arguments are a mapping, as templates expect them; OpenAI's API has them as JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(arguments, str):
        # Arguments that were cut stay the text that they are, so that their conversation can go on.
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    if arguments is None:  # some clients write null for a call without arguments
        arguments = {}
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not isinstance(arguments, Mapping | str)
    ):
        raise InputError(
            f"message tool_calls: {str(call)[:60]}: must have a function with a name and arguments as a JSON object: give "
            "{'id': ..., 'type': 'function', 'function': {'name': ..., 'arguments': '{}'}}"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _unicode(text: str) -> str:
    """The text, if it can be encoded as UTF-8; invalid bytes of arguments arrive as lone surrogates.

    A subclass (Markup, an enumeration of texts) becomes a plain text: templates would write it in another way.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not valid UTF-8 at character {error.start + 1}: give it as UTF-8, e.g. through iconv"
        ) from None
    return str.__str__(text)


def _some(ids: list[int]) -> list[int]:
    """The tokens, at least one."""
    if not ids:
        raise InputError("the prompt is empty (the tokenizer makes no token of it): give a text")
    return ids
