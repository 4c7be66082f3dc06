"""The rounds of benchmarks/serving/sessions.py: no case is always the first, and the first round does not count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.serving import sessions


class Talk:
    """A chat whose first tokens are noted by its kind."""

    def __init__(self, kind: str) -> None:
        self.kind, self.messages, self.sequence = kind, list[Any](), SimpleNamespace(length=9)

    def send(self, *_: Any, **__: Any) -> tuple[()]:
        return ()

    def save(self, *_: Any, **__: Any) -> int:
        return 1


def test_every_other_round_is_in_reverse_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def first(chat: Talk) -> Any:
        order.append(chat.kind)
        return SimpleNamespace(top_logprobs=[(7, -0.5)])

    monkeypatch.setattr(sessions, "first_token", first)
    monkeypatch.setattr(sessions.Chat, "load", lambda _, path: Talk(path.name))
    llm: Any = SimpleNamespace(chat=lambda system="": Talk("saved" if system else "fresh"))
    found = sessions.measure(llm, "text", tmp_path, 2)
    forward = ["fresh", "whole.session", "small.session"]
    assert order == [*forward[::-1], *forward, *forward[::-1], "saved"]
    assert found["equal_to_the_bit"] and found["share"] > 0
