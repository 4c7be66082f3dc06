"""Options of benchmarks/serving/structured.py that reach its measurement."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_edge.errors import InputError
from benchmarks.serving import schemas, structured


def test_ends_count_with_random_schemas_as_well(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def valid(llm: Any, asked: Any, ends: float = 0.0) -> dict[str, int]:
        seen.append(ends)
        return {"invalid": 0, "refused": 0}

    monkeypatch.setattr(structured, "valid", valid)
    monkeypatch.setattr(
        sys, "argv", ["structured", str(tiny.path), "--only", "schemas", "--schemas", "5", "--ends", "6"]
    )
    assert structured.main() == 0
    assert seen == [6.0]


def test_a_directory_without_schemas_is_one_line(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["structured", str(tiny.path), "--only", "schemas", "--from", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    assert structured.main() == 2
    said = f"error: --from {tmp_path}: has no .json files: give a directory of schemas"
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_a_refusal_for_another_reason_does_not_name_the_keyword() -> None:
    """Each refusal says that the schema "is not supported", which is no refusal of the keyword `not`."""

    def compile_grammar(_: Any) -> None:
        raise InputError("json_schema: is not supported (Invalid type: strin): change it")

    seeds = [seed for seed in range(60) if schemas.unsupported(random.Random(seed))[0] == "not"]
    llm: Any = SimpleNamespace(compile_grammar=compile_grammar)
    assert seeds and structured.named(llm, seeds) == 0
