"""The live view: what is on the display after some tokens."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.cli.console import depth_styles
from balcony_edge.cli.live import LiveView, show_live
from balcony_edge.telemetry import Reading
from balcony_runtime.confident import Telemetry


def test_it_shows_text_times_sensors_and_decisions(tiny: Any) -> None:
    readings = (Reading("b", "board", 0.0, watts=6.5, celsius=51.0), Reading("c", "cpu", 0.0, celsius=60.0))
    with balcony_edge.load(tiny.path, budget=Budget(tpot_ms=500, max_pace_tps=100)) as llm:
        quality = {2: Telemetry(40, 3), 3: Telemetry(0, 0)}
        view, tokens = LiveView(depth_styles(llm.exit_layers), lambda: readings, lambda: quality), []
        for token in llm.stream("the fox", max_new_tokens=12, ignore_eos=True):
            view.add(token)
            tokens.append(token)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(view)
    shown = console.export_text()
    for part in (
        "12 tokens",
        f"exit {tokens[-1].exit_layer}",
        "of 500 a token",
        "slowdown ",
        "paced to 100.0 a second",
    ):
        assert part in shown
    for part in (
        "6.5 W board",
        "60 °C",
        "0 rows pending",
        "3 of 40 checked at 2 differ",
        "last decisions",
        tokens[-1].reason[:40],
    ):
        assert part in shown


def test_a_long_reply_leaves_room_for_facts_and_decisions(tiny: Any) -> None:
    with balcony_edge.load(tiny.path) as llm:
        view = LiveView(depth_styles(llm.exit_layers), tuple)
        for token in llm.stream("the fox", max_new_tokens=30, ignore_eos=True):
            view.add(token._replace(text=f"word{token.id:04d} " * 12))
    console = Console(width=80, height=24, record=True, file=io.StringIO())
    console.print(view)
    lines = console.export_text().splitlines()
    assert "30 tokens" in lines[0] and any("last decisions" in line for line in lines[:24]) and len(lines) <= 24
    assert f"word{token.id:04d}" in "".join(lines)  # the end of the reply, not its beginning


def test_a_live_run_ends_with_its_stream(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with balcony_edge.load(tiny.path) as llm:
        stream = llm.stream("the fox", max_new_tokens=5, ignore_eos=True)
        assert show_live(stream, depth_styles(llm.exit_layers), tuple) is False
        assert len(stream.reply.tokens) == 5
