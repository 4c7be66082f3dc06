"""Budgets: defaults, ranges, contradictions, files, and the one line in which each is refused."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcony_edge.budget import Budget, load_budget, parse_budget
from balcony_edge.errors import BudgetError

EXITS = (14, 17, 20, 30)
PROFILES = Path(__file__).parents[2] / "profiles"


def test_default_asks_for_nothing() -> None:
    budget = Budget()
    assert (budget.tpot_ms, budget.exit_layer, budget.on_infeasible) == (None, None, "shallowest")
    assert budget.allowed_exits(EXITS) == EXITS


def test_frozen_and_hashable() -> None:
    budget = Budget(tpot_ms=12)
    with pytest.raises(BudgetError, match=r"tpot_ms = 13.0: a budget does not change: set a new one"):
        budget.tpot_ms = 13.0
    assert hash(budget) == hash(Budget(tpot_ms=12.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tpot": 6}, r"tpot = 6: no such key; did you mean tpot_ms\?"),
        ({"tpot_ms": -6}, "tpot_ms = -6: must be a finite number above 0"),
        ({"exit_layer": 14}, "exit_layer = 14 with tpot_ms = 12.0: a fixed exit leaves no choice"),
    ],
)
def test_a_copy_with_other_values_is_checked_as_a_new_budget(changes: dict[str, Any], message: str) -> None:
    """Also by ``copy.replace`` of Python 3.13, which calls this."""
    budget = Budget(tpot_ms=12, weight=2)
    assert budget.model_copy(update={"tpot_ms": np.int64(6)}) == Budget(tpot_ms=6, weight=2)
    assert budget.model_copy() == budget
    with pytest.raises(BudgetError, match=f"^{message}"):
        budget.model_copy(update=changes)


@pytest.mark.parametrize(
    "bad", [0, -3, -0.0, math.nan, math.inf, -math.inf, "12", True, False, [12], {}, 10**400, b"12"]
)
def test_tpot_refused(bad: Any) -> None:
    with pytest.raises(BudgetError, match=r"^tpot_ms = .*: must be a finite number above 0; give the milliseconds"):
        Budget(tpot_ms=bad)


@pytest.mark.parametrize("key", ["exit_layer", "min_exit", "max_exit"])
@pytest.mark.parametrize("bad", [0, -1, 14.0, "14", True, math.nan])
def test_exit_refused(key: str, bad: Any) -> None:
    with pytest.raises(BudgetError, match=rf"^{key} = .*: must be a whole number from 1 to 1000"):
        Budget(**{key: bad})


def test_integers_may_be_numpys() -> None:
    budget = Budget(exit_layer=np.int64(14), dwell_tokens=np.uint8(3))
    assert budget == Budget(exit_layer=14, dwell_tokens=3)
    assert type(budget.exit_layer) is type(budget.dwell_tokens) is int, "a trace writes them as JSON"


@pytest.mark.parametrize(
    ("key", "bad", "allowed"),
    [
        ("probability", 1, "at least 0.5 and below 1"),
        ("probability", 0.49, "at least 0.5 and below 1"),
        ("probability", "0.9", "at least 0.5 and below 1"),
        ("dwell_tokens", -1, "0 or more"),
        ("dwell_tokens", 2.5, "0 or more"),
        ("hysteresis", 0.6, "at most 0.5"),
        ("hysteresis", math.nan, "at most 0.5"),
        ("on_infeasible", "best", "'shallowest', 'best_effort' or 'error'"),
        ("on_infeasible", None, "'shallowest', 'best_effort' or 'error'"),
        ("policy", "fast", "'plain', 'speculative', 'confident' or 'lossless'"),
        ("policy", True, "'plain', 'speculative', 'confident' or 'lossless'"),
        ("ttft_ms", 0, "a finite number above 0"),
        ("deadline_s", math.inf, "a finite number above 0"),
        ("expected_tokens", 2.5, "a whole number from 1 to 10000000"),
        ("probability", 0, "at least 0.5 and below 1"),  # percentiles of 0 and 100
        ("min_agreement", 60, "at most 1"),
        ("pacing", "no", "true or false"),
        ("pacing", 1, "true or false"),
        ("min_pace_tps", 0, "a finite number above 0"),
        ("max_pace_tps", -1, "a finite number above 0"),
        ("power_w", 0, "a finite number above 0"),
        ("power_rail", "VDD", "'board', 'cpu' or 'gpu'"),
        ("power_window_s", 0, "at least 1 and at most 600"),
        ("energy_j_per_token", math.nan, "a finite number above 0"),
        ("temperature_c", 348.15, "at least 30 and at most 125"),  # kelvins
        ("temperature_c", 0.75, "at least 30 and at most 125"),
        ("gpu_utilization", 80, "at most 1"),
        ("cpu_utilization", 0, "above 0"),
        ("battery_floor_percent", 100, "below 100"),
        ("memory_mb", 0, "above 0"),
        ("priority", "quality", "'limits' or 'latency'"),
    ],
)
def test_other_keys_refused(key: str, bad: Any, allowed: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(**{key: bad})
    assert str(caught.value).startswith(f"{key} = {bad!r}: must be ")
    assert allowed in str(caught.value)


def test_unknown_key_names_the_keys_and_the_likely_one() -> None:
    with pytest.raises(BudgetError, match=r"^tpot = 12: no such key; did you mean tpot_ms\?$"):
        Budget(tpot=12)
    with pytest.raises(BudgetError, match=r": no such key; remove it; `balcony-edge budget schema` lists the keys$"):
        Budget(zzz=1)


def test_something_else_than_keys() -> None:
    with pytest.raises(BudgetError, match=r"^budget = \[1\]: must be a table of keys such as tpot_ms; "):
        Budget.model_validate([1])


@pytest.mark.parametrize(
    "keys",
    [
        {"a\nb": 1},
        {"tpot_ms": "x\ny" * 1000},
        {"tpot_ms": np.zeros((2, 2))},
        {"x" * 5000: 1},
        {"expected_tokens": 10**5000},
        {"zzz": [10**5000]},
    ],
    ids=["newline", "long", "array", "long key", "number", "list"],
)
def test_every_message_is_one_line_of_bounded_length(keys: dict[str, Any]) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(**keys)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_key_as_long_as_a_body_takes_no_memory() -> None:
    """The server reads budgets in its event loop, and bodies have up to 8 MB."""
    key = "x" * 1_000_000
    tracemalloc.start()
    with pytest.raises(BudgetError, match="no such key"):
        Budget(**{key: 1})
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 10 * len(key)


@pytest.mark.parametrize("other", [{"tpot_ms": 12}, {"min_exit": 14}, {"max_exit": 20}])
def test_fixed_exit_excludes_target_and_bounds(other: dict[str, Any]) -> None:
    with pytest.raises(
        BudgetError, match=r"^exit_layer = 14 with .*: a fixed exit leaves no choice; give one of the two"
    ):
        Budget(exit_layer=14, **other)


def test_floor_above_ceiling() -> None:
    with pytest.raises(BudgetError, match=r"^min_exit = 20 with max_exit = 17: min_exit must not be above max_exit"):
        Budget(min_exit=20, max_exit=17)
    assert Budget(min_exit=17, max_exit=17).allowed_exits(EXITS) == (17,)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"deadline_s": 2}, "deadline_s = 2.0 without expected_tokens: a deadline needs both; add expected_tokens"),
        ({"expected_tokens": 9}, "expected_tokens = 9 without deadline_s: a deadline needs both; add deadline_s"),
        (
            {"deadline_s": 2, "expected_tokens": 9, "ttft_ms": 2001},
            "ttft_ms = 2001.0 with deadline_s = 2.0: the first token comes after the whole reply is due; ",
        ),
        ({"min_pace_tps": 5, "max_pace_tps": 4}, "min_pace_tps = 5.0 with max_pace_tps = 4.0: min_pace_tps must not "),
        (
            {"max_pace_tps": 5, "tpot_ms": 199},
            "max_pace_tps = 5.0 with tpot_ms = 199.0: a token every 200 ms is later ",
        ),
        (
            {"max_pace_tps": 5, "deadline_s": 1, "expected_tokens": 6},
            "max_pace_tps = 5.0 with deadline_s = 1.0: 6 tokens take more than 1 s at that pace; ",
        ),
        (
            {"pacing": False, "min_pace_tps": 5},
            "pacing = False with min_pace_tps = 5.0: a bound on what is forbidden; ",
        ),
        ({"power_rail": "cpu"}, "power_rail = 'cpu' without power_w: it has no effect; also give power_w"),
        ({"power_window_s": 9, "energy_j_per_token": 1}, "power_window_s = 9.0 without power_w: it has no effect; "),
    ],
)
def test_other_contradictions(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(**keys)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("tokens", "deadline_s"), [(1, 0.1), (10, 1.9)])
def test_the_first_of_the_expected_tokens_waits_for_no_pace(tokens: int, deadline_s: float) -> None:
    """The controller paces from token to token, so ten tokens have nine waits of 0.2 s."""
    assert Budget(max_pace_tps=5, deadline_s=deadline_s, expected_tokens=tokens).expected_tokens == tokens


def test_what_a_fixed_exit_leaves_to_pace() -> None:
    kept = Budget(exit_layer=14, power_w=7, power_rail="gpu", temperature_c=70, cpu_utilization=0.5, max_pace_tps=5)
    assert kept.allowed_exits(EXITS) == (14,)
    assert Budget(energy_j_per_token=1, power_rail="cpu").power_rail == "cpu"


def test_agreement_becomes_a_bound_of_depth() -> None:
    measured = {14: 0.5, 17: 0.53, 20: 0.6, 30: None}
    assert Budget(min_agreement=0.53).for_bundle(measured) == Budget(min_exit=17)
    assert Budget(min_agreement=0.53, min_exit=20).for_bundle(measured) == Budget(min_exit=20)
    assert Budget(min_agreement=0.99).for_bundle(measured) == Budget(min_exit=30)
    assert Budget(min_agreement=0.55).for_bundle({14: 0.9, 17: 0.5, 20: 0.6, 30: None}) == Budget(min_exit=20)
    assert Budget(tpot_ms=9).for_bundle(dict.fromkeys(EXITS)) == Budget(tpot_ms=9)
    with pytest.raises(
        BudgetError, match=r"^min_agreement = 0\.5, but this bundle was not evaluated: run `balcony-edge"
    ):
        Budget(min_agreement=0.5).for_bundle({**measured, 17: None})
    with pytest.raises(BudgetError, match=r"^min_agreement = 0\.6 with max_exit = 17: this bundle's exits agree so "):
        Budget(min_agreement=0.6, max_exit=17).for_bundle(measured)


def test_schema_describes_every_key() -> None:
    schema = Budget.model_json_schema()
    assert schema["additionalProperties"] is False
    assert all(entry["description"].endswith(".") for entry in schema["properties"].values())
    assert set(schema["properties"]) == set(Budget.model_fields)


def test_bounds_need_not_be_exits() -> None:
    assert Budget(min_exit=15, max_exit=29).allowed_exits(EXITS) == (17, 20)
    assert Budget(max_exit=99).allowed_exits(EXITS) == EXITS


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"exit_layer": 40},
            "exit_layer = 40, but this bundle has exits 14, 17, 20, 30: pick one of them or re-export with --exits",
        ),
        (
            {"min_exit": 21, "max_exit": 29},
            "min_exit = 21, max_exit = 29, but this bundle has exits 14, 17, 20, 30: "
            "leave at least one of them in the range or re-export with --exits",
        ),
    ],
)
def test_check_exits_against_a_bundle(keys: dict[str, Any], message: str) -> None:
    Budget(exit_layer=17).allowed_exits(EXITS)
    with pytest.raises(BudgetError) as caught:
        Budget(**keys).allowed_exits(EXITS)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpot_ms = -3", "tpot_ms = -3: must be a finite number above 0; "),
        ("tpot_ms = nan", "tpot_ms = nan: must be a finite number above 0; "),
        ("tpot_ms = '12'", "tpot_ms = '12': must be a finite number above 0; "),
        ("[tpot_ms]\np90 = 3", "tpot_ms = {'p90': 3}: must be a finite number above 0; "),
        ("exit_layer = 3\ntpot_ms = 1", "exit_layer = 3 with tpot_ms = 1.0: "),
        ("speed = 3", "speed = 3: no such key; "),
        ("tpot_ms = ", "not readable as TOML ("),
        ("tpot_ms = 3\ntpot_ms = 4", "not readable as TOML ("),
        ("a = " + "[" * 5000, "not readable as TOML ("),
    ],
)
def test_file_errors_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "chat.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BudgetError) as caught:
        load_budget(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BudgetError, match="not readable as TOML"):
        load_budget(path)
    with pytest.raises(BudgetError, match=r"nowhere\.toml: there is no such file; name a budget file"):
        load_budget(tmp_path / "nowhere.toml")
    with pytest.raises(BudgetError, match="not readable"):
        load_budget(tmp_path)


def test_parse_takes_a_budget_a_path_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text("tpot_ms = 12\nprobability = 0.99\n", encoding="utf-8")
    expected = Budget(tpot_ms=12, probability=0.99)
    assert parse_budget(None) == Budget()
    assert parse_budget(expected) is expected
    assert parse_budget(path) == parse_budget(str(path)) == expected
    with pytest.raises(BudgetError, match=r"^budget = 12: must be a Budget, the path of a budget file or None; "):
        parse_budget(12)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_file_loads_and_says_for_whom_it_is(path: Path) -> None:
    load_budget(path).allowed_exits(EXITS)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert " for " in first


def test_shipped_targets() -> None:
    assert load_budget(PROFILES / "interactive.toml").tpot_ms == 40
    assert load_budget(PROFILES / "lossless.toml") == Budget(policy="lossless")


def test_a_program_that_was_packed_without_sources_has_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyInstaller's, for one: Python raises OSError where there is no source, and keys have no descriptions there."""
    whole = Budget.model_json_schema()["properties"]

    def none(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", none)
    found = Budget.model_json_schema()["properties"]
    assert found.keys() == whole.keys() and not any("description" in key for key in found.values())
