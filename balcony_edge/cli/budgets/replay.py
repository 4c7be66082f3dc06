"""``balcony-edge replay``: runs the controller again over a recorded trace."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from balcony_edge.cli.console import folded, stderr, stdout
from balcony_edge.errors import InputError

#: Most differences shown to people.
MOST_SHOWN = 10
#: Parts of a token's decision that are compared.
_COMPARED = ("exit_layer", "period_ms", "idle_ms", "infeasible", "catch_up")


def replay(
    trace: Annotated[
        Path,
        typer.Argument(
            help="File that `run --record`, `simulate --record`, `serve --record` or `record_rounds` wrote."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Run the controller again over a recorded trace; exit code 1 if a decision differs from the recorded one.

    A difference shows that the controller has changed since the recording. The device is not needed.
    """
    from balcony_edge.control.company.round_trace import is_round_trace

    if trace.is_fifo():  # the look at its beginning would take that away
        raise InputError(f"{trace}: is a pipe, which cannot be read twice: write it to a file first")

    if is_round_trace(trace):
        _replay_rounds(trace, as_json)
    else:
        _replay_tokens(trace, as_json)


def _replay_tokens(trace: Path, as_json: bool) -> None:
    """Decide about the tokens of one reply again; a round of drafts is one decision."""
    from balcony_edge.control.trace import read_trace
    from balcony_edge.control.trace import replay as decide_again

    recorded = read_trace(trace)
    differences: list[dict[str, Any]] = []
    exits: Counter[int] = Counter()
    for number, (token, decision) in enumerate(zip(recorded, decide_again(recorded), strict=True)):
        exits[token.line.get("made_at", token.line["exit_layer"])] += 1
        then = {key: token.line.get(key) for key in (*_COMPARED, "reason")}
        catch_up = None if decision.catch_up is None else list(decision.catch_up)
        now = {**{key: getattr(decision, key) for key in (*_COMPARED, "reason")}, "catch_up": catch_up}
        if not all(_same(then[key], now[key]) for key in _COMPARED):
            differences.append({"decision": number, "now_s": token.seen.now_s, "recorded": then, "again": now})
    shares = ", ".join(f"{count} at exit {layer}" for layer, count in sorted(exits.items(), reverse=True))
    facts = {"decisions": len(recorded), "exits": {str(e): n for e, n in sorted(exits.items())}}
    _tell(facts, f"{len(recorded)} decisions: {shares}", differences, as_json)


def _replay_rounds(trace: Path, as_json: bool) -> None:
    """Decide about the rounds of several replies again."""
    from balcony_edge.control.company.round_trace import outcome_of, read_rounds, reason_of, replay_rounds

    recorded = read_rounds(trace)
    differences: list[dict[str, Any]] = []
    for number, (one, found) in enumerate(zip(recorded.rounds, replay_rounds(recorded), strict=True)):
        outcome = outcome_of(found)
        if not all(_same(one.outcome[key], value) for key, value in outcome.items()):
            then, now = one.outcome | {"reason": one.reason}, outcome | {"reason": reason_of(found)}
            differences.append({"round": number, "now_s": one.seen.now_s, "recorded": then, "again": now})
    if recorded.parts > 1:
        note = f"{trace}: only the first of {recorded.parts} parts is replayed: record each in a file of its own"
        stderr.print(note, markup=False, soft_wrap=True)
    streams = len({stream.key for one in recorded.rounds for stream in one.seen.streams})
    facts = {"rounds": len(recorded.rounds), "streams": streams}
    _tell(facts, f"{len(recorded.rounds)} rounds of {streams} streams", differences, as_json)


def _tell(facts: dict[str, Any], sentence: str, differences: list[dict[str, Any]], as_json: bool) -> None:
    """Print what was replayed and what differs; the exit code is 1 if anything does."""
    if as_json:
        print(json.dumps({**facts, "differences": differences}))  # noqa: T201 - programs read this
    else:
        stdout.print(f"{sentence}; decisions that differ now: {len(differences)}")
        if differences:
            what = next(iter(differences[0]))
            table = Table(what, "recorded", folded("why"), "now", folded("why"))
            for one in differences[:MOST_SHOWN]:
                then, now = one["recorded"], one["again"]
                cells = (_cell(then, now), then["reason"], _cell(now, then), now["reason"])
                table.add_row(*map(escape, (str(one[what]), *cells)))
            stdout.print(table)
    if differences:
        raise typer.Exit(1)


def _cell(decision: dict[str, Any], other: dict[str, Any]) -> str:
    """The exits of a decision, which come first, and what else differs from another one."""
    (_, exits), *rest = decision.items()
    more = [f"{key} = {value}" for key, value in rest if key != "reason" and not _same(value, other[key])]
    return ", ".join([str(exits), *more])


def _same(one: Any, other: Any) -> bool:
    """Whether a part of two decisions is the same. Of times the last digits may differ.

    A trace may come from another Python: from 3.12 on ``sum`` rounds floats in another way.
    """
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
    return bool(one == other)
