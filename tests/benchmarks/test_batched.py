"""llama.cpp's rate in benchmarks/serving/batched.py from answers made by hand; its server runs only in the benchmark."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
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


def test_the_share_of_others_has_the_same_place_in_every_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["batched", "bundle"])
    monkeypatch.setattr(batched.server, "refuse_missing", lambda *_: None)
    monkeypatch.setattr(batched.balcony_edge, "load", lambda _: nullcontext())
    monkeypatch.setattr(batched, "measure", lambda *_: {"of_llama_cpp": {1: 1.1}})
    assert batched.main() == 0
    assert {"others_cpu_share", "load_1m"} <= set(json.loads(capsys.readouterr().out))


def test_the_page_names_the_benchmarks_that_report_the_share_of_others() -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    told = (folder / "README.md").read_text(encoding="utf-8").partition("CPU time of other programs. Only")[2]
    for path in folder.rglob("*.py"):
        if path.name != "rounds.py" and "Neighbours()" in path.read_text(encoding="utf-8"):
            assert f"`{path.stem}`" in told, path
