"""Commands of benchmarks that lack something are refused in one line: a run that measures nothing has no missed bar."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from benchmarks.nvidia import gpu
from benchmarks.serving import attainment, streams


@pytest.mark.parametrize(
    ("benchmark", "given", "why"),
    [
        (attainment, ["--text", "wiki.valid.raw"], "give a bundle, or --install"),
        (streams, ["--only", "throughput,exact"], "--only throughput,exact: needs a bundle"),
        (gpu, [], "no bundle: name one, or give --shape and --output to make one"),
        (gpu, ["--shape", "llama-3-8b"], "--shape: needs a directory for the bundle: give it with --output"),
    ],
)
def test_what_is_missing_is_one_line(
    benchmark: ModuleType,
    given: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "export_shape", lambda *_: pytest.fail("made a model of 16 GB first"))
    monkeypatch.setattr(sys, "argv", [benchmark.__name__, *given])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert why in capsys.readouterr().err
