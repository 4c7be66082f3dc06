"""Which policies benchmarks/control/controller.py calls better than the controller, and the page with its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.control.controller import ceilings, dominates


def test_a_tie_in_misses_does_not_hide_a_deeper_policy() -> None:
    """Of 4,500 tokens, 2 % late and 2.1 % are a tie: two standard errors are 0.4 points."""
    mine = {"late": 0.02, "depth": 20.0}
    assert dominates({"late": 0.021, "depth": 21.0}, mine, 4500)
    assert not dominates({"late": 0.03, "depth": 21.0}, mine, 4500), "more misses"
    assert dominates({"late": 0.01, "depth": 19.98}, mine, 4500)
    assert not dominates({"late": 0.01, "depth": 19.9}, mine, 4500), "less depth"
    assert not dominates({"late": 0.019, "depth": 20.02}, mine, 4500), "ties in both"


@pytest.mark.slow
def test_the_page_has_the_figures_of_today() -> None:
    """They depend on no machine."""
    page = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = ceilings()["power"]
    apart_s = min(row["switches_apart_s"] for row in rows if row["switches_apart_s"] is not None)
    assert f"| {min(row['least'] for row in rows)} to {max(row['most'] for row in rows)} of the budget |" in page
    assert f"| at least {apart_s:.3g} s apart |" in page
