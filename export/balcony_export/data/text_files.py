"""Text files that training and evaluation read: whole UTF-8 files, and JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from balcony_edge.errors import InputError


def read_text(path: Path, forms: str) -> str:
    """The text of a file.

    Args:
        path: the file.
        forms: what may be given, for the message.

    Raises:
        InputError: it is missing, empty or not UTF-8.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}): convert it first") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give {forms}") from error
    if not content.strip():
        raise InputError(f"{path}: is empty: give {forms}")
    return content


def json_lines(path: Path, content: str, forms: str) -> Iterator[tuple[str, Any]]:
    """``(where it stands, value)`` of each line that is not blank.

    Raises:
        InputError: a line is not JSON, or holds what no text does.
    """
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines() would cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is JSON and no text
        except ValueError as error:
            raise InputError(f"{path}:{number}: is not JSON ({error}): give {forms}") from error
        yield f"{path}:{number}", value
