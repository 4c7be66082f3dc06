"""Files as documents: the one reader that training, calibration and evaluation share, and its messages.

Owns the forms that a file may have. A document knows where it comes from, so that every later message can name it; what it
becomes as tokens is the callers' business.

    .txt     one document
    .raw     WikiText: one document per article
    others   JSON Lines, one document per line: {"text": ...}, and where chats are taken also {"messages": [...]} or
             {"instruction": ..., "response" or "output": ..., "context" or "input": ...}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balcony_edge.errors import InputError
from balcony_edge.files import visible

TEXT_FORMS = 'JSON Lines with "text", or a .txt or .raw file'
CHAT_FORMS = 'JSON Lines with "text", "messages" or "instruction" and "response"/"output", or a .txt or .raw file'
#: An article of WikiText begins with its title between single equal signs; sections have two and more.
_ARTICLE = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)

#: Messages with "role" and "content", as chat templates take them.
Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Document:
    """One document of a file.

    Attributes:
        where: File, with line or article, for messages.
        text: Plain text; empty for a chat.
        chat: Messages of a chat; None for plain text.
    """

    where: str
    text: str
    chat: Chat | None = None


def files_in(paths: Sequence[Path]) -> Iterator[Path]:
    """The files themselves, and in place of a directory the .jsonl and .txt files in it that are not hidden.

    Raises:
        InputError: A directory has none.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = visible(path, ".jsonl", ".txt")
        if not inside:
            raise InputError(f"{path}: has no .jsonl or .txt files: give {CHAT_FORMS}")
        yield from inside


def read_documents(path: Path, *, chats: bool = False) -> Iterator[Document]:
    """Read the documents of a file.

    Args:
        path: The file.
        chats: Whether chats are taken as well as plain text.

    Raises:
        InputError: The file is missing, empty, not UTF-8 or of another form.
    """
    forms = CHAT_FORMS if chats else TEXT_FORMS
    if path.suffix == ".txt":
        yield Document(str(path), _content(path, forms))
    elif path.suffix == ".raw":
        content = _content(path, forms)
        starts = [match.start() for match in _ARTICLE.finditer(content)]
        if not starts or content[: starts[0]].strip():  # text before the first title is a document as well
            starts.insert(0, 0)
        for number, (begin, end) in enumerate(zip(starts, [*starts[1:], len(content)], strict=True), 1):
            yield Document(f"{path}: article {number}", content[begin:end])
    else:
        for where, record in read_records(path, forms):
            fields = record if isinstance(record, dict) else {}
            chat = _chat(fields) if chats else None
            if chat is not None:  # a text next to it repeats it in some other template, as in Alpaca's rows
                yield Document(where, "", chat)
            elif isinstance(fields.get("text"), str):
                yield Document(where, fields["text"])
            else:
                raise InputError(f'{where}: has no "text"{" and no chat" if chats else ""}: give {forms}')


def refuse_unreadable(files: Iterable[Path], *, chats: bool = True) -> None:
    """Refuse files without a document now, and not after the minutes that loading a model may take.

    A pipe, such as ``<(zcat FILE)``, is left alone: what is read from it is gone. ``chats``: whether chats are documents.
    """
    for path in files:
        if not path.is_fifo():
            next(read_documents(path, chats=chats))


def read_records(path: Path, forms: str) -> Iterator[tuple[str, Any]]:
    """Read JSON Lines: ``(file and line, value)`` of each line that is not blank.

    Args:
        path: The file.
        forms: What may be given, for messages.

    Raises:
        InputError: The file is missing, empty or not UTF-8, or a line is not JSON or cannot be written as UTF-8.
    """
    empty = True
    for number, given in enumerate(_lines(path, forms), start=1):
        try:
            # editors on Windows begin a file with a mark
            line = given.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}:{number}: is not UTF-8 (byte {error.start} of the line): convert it first"
            ) from error
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # JSON allows half of a surrogate pair, UTF-8 does not
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: is not JSON ({error}): give {forms}") from error
        empty = False
        yield f"{path}:{number}", value
    if empty:
        raise InputError(f"{path}: is empty: give {forms}")


def require_two_tokens(where: str, tokens: Sequence[int]) -> None:
    """Refuse a document in which no token predicts another.

    Raises:
        InputError: It has fewer than two tokens.
    """
    if len(tokens) < 2:
        count = f"{len(tokens)} token{'' if len(tokens) == 1 else 's'}"
        raise InputError(f"{where}: has {count}, and a document needs at least 2: remove it or give more text")


def _lines(path: Path, forms: str) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give {forms}") from error


def _content(path: Path, forms: str) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}): convert it first") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give {forms}") from error
    if not content.strip():
        raise InputError(f"{path}: is empty: give {forms}")
    return content


def _chat(fields: dict[str, Any]) -> Chat | None:
    if isinstance(given := fields.get("messages"), list):
        well_formed = all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in given
        )
        return given if well_formed and given else None
    instruction, reply = fields.get("instruction"), fields.get("response", fields.get("output"))
    if not isinstance(instruction, str) or not isinstance(reply, str):
        return None
    context = fields.get("context", fields.get("input"))
    question = f"{instruction}\n\n{context}" if isinstance(context, str) and context.strip() else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
