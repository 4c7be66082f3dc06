"""The live view: the content of the display after some tokens."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import IO, Any

import pytest
from rich.console import Console

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.cli.console import depth_styles
from balcony_edge.cli.device.live import LiveView, show_live
from balcony_edge.device.readings import Reading
from balcony_runtime.decoding.confident import Telemetry

PROGRAM = "from balcony_edge.cli import main; main()"


def invoked(bundle: Path, *options: str) -> str:
    """Output of ``run`` to a pipe."""
    command = [sys.executable, "-c", PROGRAM, "run", str(bundle), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, errors="replace").stdout


def on_terminal(bundle: Path, *options: str, reply: IO[bytes] | None = None) -> str:
    """Output of ``run`` to a terminal of 60 × 20, without colours and cursor movements; ``reply`` takes its stdout."""
    master, worker = pty.openpty()
    fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    command = [sys.executable, "-c", PROGRAM, "run", str(bundle), *options]
    with subprocess.Popen(command, stdin=worker, stdout=reply or worker, stderr=worker) as process:
        os.close(worker)
        output = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while part := os.read(master, 65536):
                output += part
    os.close(master)
    assert process.returncode == 0, output
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode(errors="replace"))


def test_it_shows_text_times_sensors_and_decisions(tiny: Any) -> None:
    readings = (Reading("b", "board", 0.0, watts=6.5, celsius=51.0), Reading("c", "cpu", 0.0, celsius=60.0))
    with balcony_edge.load(tiny.path, budget=Budget(tpot_ms=500, max_pace_tps=100)) as llm:
        quality = {2: Telemetry(40, 3), 3: Telemetry(0, 0)}
        view, tokens = LiveView(depth_styles(llm.exit_layers), lambda: readings, lambda: quality, Budget), []
        for token in llm.stream("the fox", max_new_tokens=12, ignore_eos=True):
            view.add(token, 160)
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
        "6.5 W board",
        "60 °C",
        "0 rows pending",
        "3 of 40 checked at 2 differ",
        "last decisions",
        tokens[-1].reason[:40],
    ):
        assert part in shown, part


#: Keys of a budget, readings of the sensors, and the facts that are shown.
SENSED: list[tuple[dict[str, Any], tuple[Reading, ...], tuple[str, ...]]] = [
    (
        {"power_w": 7.0},
        (Reading("b", "board", 0.0, watts=6.5), Reading("g", "gpu", 0.0, watts=2.0)),
        ("6.5 of 7 W board",),
    ),
    (
        {"power_w": 7.0, "power_rail": "gpu"},
        (
            Reading("b", "board", 0.0, watts=6.5),
            Reading("n:0", "gpu", 0.0, watts=2.0),
            Reading("n:1", "gpu", 0.0, watts=3.0),
        ),
        ("5.0 of 7 W gpu",),
    ),
    ({"temperature_c": 75.0}, (Reading("t", "cpu", 0.0, celsius=61.0),), ("61 of 75 °C",)),
    ({"critical_temperature_c": 95.0}, (Reading("t", "cpu", 0.0, celsius=61.0),), ("61 of 95 °C",)),
    ({"critical_temperature_c": 95.0}, (), ("no reading of temperature",)),
    ({}, (Reading("c", "cpu", 0.0, watts=2.0), Reading("b", "board", 0.0, watts=6.5)), ("6.5 W board",)),
    (
        {"cpu_utilization": 0.8, "gpu_utilization": 0.5},
        (Reading("c", "cpu", 0.0, utilization=0.42), Reading("g", "gpu", 0.0, utilization=0.3)),
        ("CPU 42 of 80 %", "GPU 30 of 50 %"),
    ),
    ({"battery_floor_percent": 20.0}, (Reading("a", "battery", 0.0, charge=0.55),), ("battery 55 %, floor 20 %",)),
    ({"memory_mb": 400.0}, (Reading("p", "process", 0.0, memory_bytes=312_000_000),), ("memory 312 of 400 MB",)),
    ({"energy_j_per_token": 0.5}, (Reading("b", "board", 0.0, watts=5.0),), ("5.0 W board", "of 0.5 J a token")),
    (
        {"power_w": 7.0, "temperature_c": 75.0, "memory_mb": 400.0},
        (),
        ("no reading of board power", "no reading of temperature", "no reading of memory"),
    ),
]


@pytest.mark.parametrize(
    ("asked", "readings", "wanted"), SENSED, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
)
def test_every_sensor_that_the_budget_is_about_is_shown(
    tiny: Any, asked: dict[str, Any], readings: tuple[Reading, ...], wanted: tuple[str, ...]
) -> None:
    with balcony_edge.load(tiny.path) as llm:
        budget = Budget(**asked)
        view = LiveView(depth_styles(llm.exit_layers), lambda: readings, dict, lambda: budget)
        for token in llm.stream("the fox", max_new_tokens=3, ignore_eos=True):
            view.add(token, 120)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(view)
    shown = console.export_text()
    assert all(part in shown for part in wanted), shown


def test_millijoules_of_a_token_are_not_zero(tiny: Any) -> None:
    """3 W over 1.5 ms are above a ceiling of 0.004 J."""
    budget, readings = Budget(energy_j_per_token=0.004), (Reading("b", "board", 0.0, watts=3.0),)
    with balcony_edge.load(tiny.path) as llm:
        view = LiveView(depth_styles(llm.exit_layers), lambda: readings, dict, lambda: budget)
        for token in llm.stream("the fox", max_new_tokens=3, ignore_eos=True):
            view.add(token._replace(latency_ms=1.5), 120)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(view)
    assert "0.0045 of 0.004 J a token" in console.export_text()


@pytest.mark.parametrize(("columns", "rows"), [(200, 50), (80, 24), (60, 20), (40, 8), (20, 4)])
def test_the_status_area_fits_and_the_whole_reply_is_printed(tiny: Any, columns: int, rows: int) -> None:
    """On a terminal of any size, every line of the reply is above the area, the newest decision in it, and nothing wraps."""
    reason = "deepest exit within 12 ms (p=0.93); 30 has a backlog for which there is no time"
    readings = (Reading("b", "board", 0.0, watts=6.5, celsius=51.0),)
    printed: list[str] = []
    with balcony_edge.load(tiny.path) as llm:
        view = LiveView(depth_styles(llm.exit_layers), lambda: readings, dict, Budget)
        for number, token in enumerate(llm.stream("the fox", max_new_tokens=30, ignore_eos=True)):
            decision = token.decision._replace(words=(f"{number} {reason}",))
            text = f"word{number:02d} and " + ("\n" if number % 7 == 0 else "")
            printed += [line.plain for line in view.add(token._replace(text=text, decision=decision), columns)]
    console = Console(width=columns, height=rows, record=True, file=io.StringIO())
    console.print(view)
    shown = console.export_text().splitlines()
    assert len(shown) <= rows - 1 and all(len(line) <= columns for line in shown), shown
    assert "30 tokens" in "".join(shown)
    assert rows < 8 or f"exit {token.exit_layer} 29 deepest"[: columns - 8] in shown[-1], shown
    printed.append(view.finish().plain)
    assert " ".join("\n".join(printed).split()) == " ".join(f"word{number:02d} and" for number in range(30))
    assert all(len(line.rstrip()) <= columns for line in printed)


def test_a_reply_that_is_longer_than_the_terminal_stays_readable(tiny: Any) -> None:
    """On a real terminal of 20 lines, all lines of the reply go to its normal screen, in order."""
    done = on_terminal(tiny.path, "the fox", "-n", "150", "--live", "--temperature", "3", "--seed", "1")
    text = invoked(tiny.path, "the fox", "-n", "150", "--temperature", "3", "--seed", "1")
    words = re.findall("[A-Za-z]{3,}", text)
    assert len(words) > 5
    place = 0
    for word in words:
        place = done.find(word, place) + 1
        assert place, word


def test_a_file_gets_the_reply_while_the_terminal_shows_the_view(tiny: Any, tmp_path: Path) -> None:
    options = ("the fox", "-n", "60", "--temperature", "3", "--seed", "1")
    with (tmp_path / "reply.txt").open("wb") as file:
        shown = on_terminal(tiny.path, *options, "--live", reply=file)
    assert "last decisions" in shown
    written = (tmp_path / "reply.txt").read_text(encoding="utf-8", errors="replace")
    assert written.strip() and written == invoked(tiny.path, *options)


def test_a_live_run_ends_with_its_stream(
    tiny: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with balcony_edge.load(tiny.path) as llm:
        monkeypatch.setattr(llm, "readings", tuple)
        stream = llm.stream("the fox", max_new_tokens=5, ignore_eos=True)
        assert show_live(stream, depth_styles(llm.exit_layers), llm) is False
        assert len(stream.reply.tokens) == 5
