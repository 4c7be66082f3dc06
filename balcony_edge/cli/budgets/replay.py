"""``balcony-edge replay``: runs the controller again over a recorded trace."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

#: Most differences shown to people.
MOST_SHOWN = 10
#: Parts of a token's decision that are compared.
_COMPARED = ("exit_layer", "period_ms", "infeasible", "catch_up")


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

    A difference shows a change of the controller since the recording. It also shows a run without the device.
    """
    from rich.table import Table

    from balcony_edge.cli.console import stdout
    from balcony_edge.control.company.round_trace import is_round_trace
    from balcony_edge.control.trace import read_trace
    from balcony_edge.control.trace import replay as decide_again

    if is_round_trace(trace):
        _replay_rounds(trace, as_json)
        return
    recorded = read_trace(trace)
    differences: list[dict[str, Any]] = []
    exits: Counter[int] = Counter()
    for number, (token, decision) in enumerate(zip(recorded.tokens, decide_again(recorded), strict=True)):
        exits[token.line["exit_layer"]] += 1
        then = {key: token.line.get(key) for key in (*_COMPARED, "reason")}
        catch_up = None if decision.catch_up is None else list(decision.catch_up)
        now = {**{key: getattr(decision, key) for key in (*_COMPARED, "reason")}, "catch_up": catch_up}
        if any(then[key] != now[key] for key in _COMPARED):
            differences.append({"token": number, "now_s": token.seen.now_s, "recorded": then, "again": now})
    if as_json:
        facts = {"tokens": len(recorded.tokens), "exits": {str(e): n for e, n in sorted(exits.items())}}
        print(json.dumps({**facts, "differences": differences}))  # noqa: T201 - programs read this
    else:
        shares = ", ".join(f"{count} at exit {layer}" for layer, count in sorted(exits.items(), reverse=True))
        stdout.print(f"{len(recorded.tokens)} tokens: {shares}; decisions that differ now: {len(differences)}")
        if differences:
            table = Table("token", "recorded", "why", "now", "why")
            for found in differences[:MOST_SHOWN]:
                then, now = found["recorded"], found["again"]
                cells = (_cell(then, now), then["reason"], _cell(now, then), now["reason"])
                table.add_row(str(found["token"]), *cells)
            stdout.print(table)
    if differences:
        raise typer.Exit(1)


def _cell(decision: dict[str, Any], other: dict[str, Any]) -> str:
    """The exit of a decision, and what else differs from another one."""
    more = [f"{key} = {decision[key]}" for key in _COMPARED[1:] if decision[key] != other[key]]
    return ", ".join([str(decision["exit_layer"]), *more])


def _replay_rounds(trace: Path, as_json: bool) -> None:
    """The same for a trace of rounds, whose decisions are about several streams."""
    from rich.table import Table

    from balcony_edge.cli.console import stderr, stdout
    from balcony_edge.control.company.round_trace import read_rounds, replay_rounds

    recorded = read_rounds(trace)
    differences: list[dict[str, Any]] = []
    for number, (then, found) in enumerate(zip(recorded.rounds, replay_rounds(recorded), strict=True)):
        now = {move.key: move.decision.exit_layer for move in found.moves}
        if (now, found.chunk) != (then.exits, then.chunk):
            reason = "; ".join(dict.fromkeys(move.decision.reason for move in found.moves))
            differences.append(
                {
                    "round": number,
                    "now_s": then.seen.now_s,
                    "recorded": {
                        "exits": then.exits,
                        "chunk": then.chunk and then.chunk._asdict(),
                        "reason": then.reason,
                    },
                    "again": {"exits": now, "chunk": found.chunk and found.chunk._asdict(), "reason": reason},
                }
            )
    if recorded.parts > 1:
        note = f"{trace}: only the first of {recorded.parts} parts is replayed: record each in a file of its own"
        stderr.print(note, markup=False, soft_wrap=True)
    streams = len({stream.key for one in recorded.rounds for stream in one.seen.streams})
    if as_json:
        print(json.dumps({"rounds": len(recorded.rounds), "streams": streams, "differences": differences}))  # noqa: T201 - for programs
    else:
        stdout.print(
            f"{len(recorded.rounds)} rounds of {streams} streams; decisions that differ now: {len(differences)}"
        )
        if differences:
            table = Table("round", "recorded", "why", "now", "why")
            for one in differences[:MOST_SHOWN]:
                then, again = one["recorded"], one["again"]
                chunks = then["chunk"] != again["chunk"]
                before, after = (
                    f"{it['exits']}, chunk {it['chunk']}" if chunks else str(it["exits"]) for it in (then, again)
                )
                table.add_row(str(one["round"]), before, then["reason"], after, again["reason"])
            stdout.print(table)
    if differences:
        raise typer.Exit(1)
