"""A quality budget where there are several texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_export import precision
from balcony_export.export import ExportOptions
from balcony_export.model.exits import ExitModel
from balcony_export.precision import CANDIDATES, QualityBudget, export_within


def test_every_text_must_stay_within_a_quality_budget(
    make_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of two texts is the worse one."""
    measured = iter([(0.1, 0.3), (0.3, 0.1), (0.2, 0.1)])

    def measure(_: Path) -> dict[str, Any]:
        pair = zip(("a", "b"), next(measured), strict=True)
        return {name: {5: SimpleNamespace(kl=SimpleNamespace(value=kl))} for name, kl in pair}

    judge: Any = SimpleNamespace(measure=measure)
    any_: Any = SimpleNamespace(lowered=True)  # nothing looks at the tokenizer and the graphs
    said: list[str] = []
    monkeypatch.setattr(precision, "export_bundle", lambda *_, check, **__: check(tmp_path))
    exits, options = ExitModel(make_tiny("llama")), ExportOptions("q", trained=True)
    budget = QualityBudget(0.25, judge, said.append)
    export_within(budget, exits, any_, tmp_path, options, traced=any_, progress=lambda *_: None)
    verdicts = ("KL 0.3000, above 0.25", "KL 0.3000, above 0.25", "KL 0.2000, within 0.25")
    assert said == [f"{tried}: {verdict}" for tried, verdict in zip(CANDIDATES, verdicts, strict=False)]
