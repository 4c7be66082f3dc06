"""llama.cpp's rate in benchmarks/serving/batched.py from answers made by hand; its server runs only in the benchmark."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from benchmarks.serving import batched


@pytest.mark.parametrize("count", [1, 8])
def test_the_peers_replies_begin_together(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Prompts that come while others decode would be timed as their steps; ours are not."""
    asked: list[Any] = []

    class Answer:
        def raise_for_status(self) -> Answer:
            return self

        def json(self) -> Any:
            replies = [{"timings": {"predicted_ms": 470.0}}] * count
            return replies if count > 1 else replies[0]

    def post(url: str, json: Any, timeout: float) -> Answer:
        asked.append(json["prompt"])
        return Answer()

    made = [[7, number] for number in range(count)]
    monkeypatch.setattr(batched, "prompts", lambda *_: made)
    monkeypatch.setattr(httpx, "post", post)
    llm: Any = None
    assert batched.peer_rate("http://127.0.0.1:1", llm, count, 0) == pytest.approx(count * 47 / 0.47)
    assert asked == [made]
