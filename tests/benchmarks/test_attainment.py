"""The judgement of benchmarks/serving/attainment.py on hand-made records; the servers themselves run only in the benchmark."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.errors import InputError
from benchmarks.serving.attainment import (
    COMPARED,
    GIVE_UP_S,
    Answer,
    _answer,
    bars,
    compared,
    judged,
    picked,
    requests,
)

WORDS = [f"word{number}" for number in range(2000)]


def packet(at_ms: int, document: Any) -> dict[str, Any]:
    value = document if isinstance(document, str) else json.dumps(document)
    return {"perf_ns": 1_000_000_000 + at_ms * 1_000_000, "packets": [{"name": "data", "value": value}]}


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def test_requests_are_drawn_by_share_and_repeat_by_seed() -> None:
    asked = requests(WORDS, 400, 3, "NAME")
    assert asked == requests(WORDS, 400, 3, "NAME") != requests(WORDS, 400, 4, "NAME")
    assert 0.6 < sum(kind == "voice" for kind, _ in asked) / 400 < 0.8
    kind, body = asked[0]
    assert body["max_tokens"] == {"voice": 48, "background": 150}[kind]
    assert body["budget"] == {"voice": {"ttft_ms": 500, "tpot_ms": 40}, "background": {"deadline_s": 30}}[kind]
    with pytest.raises(InputError, match="2 words: must be at least 1000: give a longer file"):
        requests(["too", "short"], 1, 1, "NAME")


def test_a_record_becomes_the_answer_that_the_client_saw() -> None:
    asked = [("voice", {"max_tokens": 48}), ("background", {"max_tokens": 150})]
    record: dict[str, Any] = {
        "metadata": {"conversation_id": "session_000002"},  # the first request again
        "start_perf_ns": 1_000_000_000,
        "status": 200,
        "responses": [
            packet(100, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
            packet(400, piece("a")),
            packet(1340, piece("b")),
            packet(1400, {"choices": [], "balcony": {"tokens_per_exit": {"14": 40, "30": 8}}}),
            packet(1400, "[DONE]"),
        ],
    }
    answer = _answer(asked, record)
    assert answer == Answer("voice", "ab", 0.4, pytest.approx(0.02), 1.34, {14: 40, 30: 8}, 0, 1.0)
    assert answer.attained
    *whole, end = record["responses"]
    failed = packet(1400, {"error": {"code": "internal"}})  # as our server says it
    for responses in (whole, [*whole, failed, end]):  # the first is cut off
        record["responses"] = responses
        assert _answer(asked, record) == Answer("voice", None, began_s=1.0)
        assert not _answer(asked, record).attained


def test_targets_count_by_class() -> None:
    assert Answer("voice", "", 0.5, 0.04, 99.0).attained
    assert not Answer("voice", "", 0.501, 0.01, 1.0).attained
    assert not Answer("voice", "", 0.1, 0.041, 1.0).attained
    assert Answer("background", "", 9.0, 9.0, 30.0).attained
    assert not Answer("background", "", 0.1, 0.1, 30.1).attained


def test_the_document_names_the_time_after_which_a_request_is_given_up() -> None:
    text = " ".join((Path(__file__).parents[2] / "benchmarks" / "README.md").read_text(encoding="utf-8").split())
    assert f"no whole answer within {GIVE_UP_S:.0f} seconds" in text


def test_the_readme_marks_the_bar_that_its_figures_miss() -> None:
    """The page's own table, judged by the bar that was set before: at the load where llama.cpp falls below 50 %."""
    root, load = Path(__file__).parents[2], 0.0
    points: list[dict[str, Any]] = []
    page = (root / "benchmarks" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| ([\d.]*) ?\| (ours|llama\.cpp, \d slots?) \| \**(\d+) %", page, re.MULTILINE)
    for given, who, percent in lines:
        load, name = float(given or load), "balcony-edge" if who == "ours" else who
        point = {"server": name, "load": load, "attained": int(percent) / 100, "mean_depth": 30.0, "same_alone": None}
        points.append(point)
    missed = [name for name, held in bars(points, 30).items() if not held["holds"]]
    (told,) = re.findall(
        r"^\|.*`benchmarks\.serving\.attainment`", (root / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(points) == 15 and ("**missed**" in told) is bool(missed)


def test_figures_of_a_server() -> None:
    answers = [
        Answer("voice", "x", 0.1, 0.01, 1.0, {14: 48}),
        Answer("voice", "x", 0.9, 0.01, 1.0, {30: 48}),
        Answer("background", "x", 0.9, 0.01, 9.0, {14: 50, 30: 100}),
        Answer("voice", None),
    ]
    found = judged(answers, 10.0, {14: 0.5, 30: 1.0})
    assert (found["attained"], found["voice"], found["background"], found["errors"]) == (0.5, 0.333333, 1.0, 1)
    assert found["goodput"] == 0.2
    assert found["quality_goodput"] == pytest.approx((48 * 0.5 + 50 * 0.5 + 100) / 10)
    assert found["mean_depth"] == pytest.approx((98 * 14 + 148 * 30) / 246, abs=0.05)
    assert (found["ttft_p95_ms"], found["tpot_p95_ms"]) == (900, 10.0)


def test_bars_are_read_where_the_peer_fails() -> None:
    points = [
        {"server": server, "load": load, "attained": attained, "mean_depth": 15.0 / load, "same_alone": same}
        for server, values in (
            ("balcony-edge", (1.0, 0.97, 0.9)),
            ("one slot", (1.0, 0.4, 0.1)),
            ("four", (0.9, 0.6, 0.2)),
        )
        for load, attained, same in zip((0.5, 1.0, 2.0), values, (0.9, 0.5, None), strict=True)
    ]
    held = bars(points, 30)
    assert held.pop("mean depth at the lowest load / full depth")["value"] == 1.0
    text = held.pop("same text as without load, replies alone at the lowest load")
    assert text["value"] == 0.9 and not text["holds"]
    ((name, found),) = held.items()
    assert name.startswith("attained at 2 times") and found["value"] == 0.9 and not found["holds"]
    first = [point for point in points if point["load"] == 0.5]
    assert len(bars(first, 30)) == 2, "where no peer fails there is nothing to compare"
    assert len(bars([point | {"same_alone": None} for point in first], 30)) == 1, "no reply was alone"


def test_a_depth_below_the_bar_is_not_rounded_up_to_it() -> None:
    """29.36 of 30 layers are 0.9787; 29.4 would be 0.98."""
    point = judged([Answer("voice", "x", 0.1, 0.01, 1.0, {14: 4, 30: 96})], 1.0, {14: 0.5, 30: 1.0})
    peer = {"server": "one slot", "load": 0.25, "attained": 1.0}
    held = bars([{"server": "balcony-edge", "load": 0.25, **point}, peer], 30)
    assert not held["mean depth at the lowest load / full depth"]["holds"]


def test_a_share_below_the_bar_is_not_rounded_up_to_it() -> None:
    """113 of 119 are 0.9496."""
    answers = [Answer("voice", "x", 0.1, 0.01, 1.0, {30: 48})] * 113 + [Answer("voice", None)] * 6
    ours = {"server": "balcony-edge", "load": 2.0, **judged(answers, 1.0, {30: 1.0})}
    held = bars([ours, {"server": "one slot", "load": 2.0, "attained": 0.1}], 30)
    assert not held["attained at 2 times the capacity, where llama.cpp falls below 0.5"]["holds"]


def test_texts_are_compared_with_those_without_load() -> None:
    """Six replies: 0 was alone; 1 and 2 met; 3 met the end of one that failed; 4 and 5 were alone, and 5 has another text."""
    answers = [
        Answer("voice", "a", took_s=2.0, number=0, began_s=0.0),
        Answer("voice", "b", took_s=2.0, number=1, began_s=3.0),
        Answer("voice", "b", took_s=2.0, number=2, began_s=4.0),
        Answer("voice", None, number=6, began_s=10.0),
        Answer("voice", "a", took_s=2.0, number=3, began_s=69.0),
        Answer("voice", "a", took_s=2.0, number=4, began_s=71.5),
        Answer("voice", "c", took_s=2.0, number=5, began_s=80.0),
    ]
    texts = dict.fromkeys(range(6), "a")
    assert compared(answers, texts) == {"same_text": 0.5, "alone": 3, "same_alone": 0.667}
    assert compared([answers[3]], {}) == {"same_text": None, "alone": 0, "same_alone": None}
    many = [Answer("voice", "a", number=number) for number in reversed(range(40))]
    assert [one.number for one in picked(many)] == list(range(COMPARED))
