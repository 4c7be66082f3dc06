"""A replayed trace: at its own pace, on the reader's clock; a file that is not a trace is refused by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from balcony_edge.device.readings import Reading
from balcony_edge.errors import InputError
from balcony_runtime.sensors import Recorded, load_readings

TRACE = [
    Reading("ina3221:VDD_IN", "board", 50.0, watts=6.0),
    Reading("battery:BAT0", "battery", 50.0, charge=0.5, charging=False),
    Reading("ina3221:VDD_IN", "board", 50.2, watts=7.0),
    Reading("ina3221:VDD_IN", "board", 50.4, watts=8.0),
]


def test_each_reading_has_its_moment() -> None:
    trace = Recorded(TRACE)
    first = trace.read(1000.0)
    assert [(r.source, r.time_s, r.watts, r.charge) for r in first.readings] == [
        ("ina3221:VDD_IN", 1000.0, 6.0, None), ("battery:BAT0", 1000.0, None, 0.5)
    ]  # fmt: skip
    assert first.absences == () and trace.read(1000.1).readings == first.readings
    late = trace.read(1000.5)  # two readings are due: the newer one counts, and the battery's ages
    assert [(r.watts, r.time_s) for r in late.readings] == [(8.0, pytest.approx(1000.4)), (None, 1000.0)]
    assert [absence.reason for absence in late.absences] == ["the trace has ended"]


def test_an_endless_trace_is_drawn_as_it_comes_due() -> None:
    drawn = []

    def endless() -> object:
        for step in range(10**9):
            drawn.append(step)
            yield Reading("x", "gpu", float(step), watts=float(step))

    trace = Recorded(endless())  # type: ignore[arg-type]  # an iterator is iterable
    assert trace.read(0.0).readings[0].watts == 0.0
    assert trace.read(3.5).readings[0].watts == 3.0
    assert drawn == [0, 1, 2, 3, 4]


def test_files_of_readings_and_of_tokens(tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(reading.to_dict()) + "\n" for reading in TRACE))
    assert list(load_readings(plain)) == TRACE
    tokens = tmp_path / "tokens.jsonl"
    lines = [{"token": 1, "readings": [r.to_dict() for r in TRACE[:2]]}, {"token": 2}, {"readings": []}]
    tokens.write_text("\n".join(map(json.dumps, lines)) + f"\n\n{json.dumps(TRACE[2].to_dict())}\n")
    assert list(load_readings(tokens)) == TRACE[:3]
    assert [reading.watts for reading in Recorded(load_readings(tokens)).read(9.0).readings] == [6.0, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ('{"source": "x", "scope": "moon", "time_s": 1}', "line 2: scope = 'moon'"),
        ('{"source": "x", "scope": "cpu", "time_s": 1, "watts": NaN}', "line 2: watts = nan: .*finite"),
        (
            '{"source": "x", "scope": "cpu", "time_s": 1, "watt": 3}',
            "line 2: watt = 3: .*a reading has the fields source",
        ),
        ('{"source": "x", "scope": "cpu"}', "line 2: time_s = .*required"),
        ('{"readings": [7]}', "line 2: reading = 7"),
        ("7", "line 2: reading = 7"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(f"{json.dumps(TRACE[0].to_dict())}\n{line}\n")
    with pytest.raises(InputError, match=rf"trace\.jsonl: {message}") as caught:
        list(load_readings(file))
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"{path.name}: {reason}.*: give a JSON Lines file"):
            list(load_readings(path))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        list(load_readings(tmp_path / "bytes"))
