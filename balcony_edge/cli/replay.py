"""``balcony-edge replay``: runs the controller again over a recorded trace."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

#: Most differences shown to people.
MOST_SHOWN = 10


def replay(
    trace: Annotated[
        Path, typer.Argument(help="File that `run --trace`, `simulate --record` or `LLM.record_rounds` wrote.")
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
        then, now = (
            (token.line["exit_layer"], token.line["period_ms"], token.line["infeasible"]),
            (decision.exit_layer, decision.period_ms, decision.infeasible),
        )
        if then != now:
            differences.append(
                {
                    "token": number,
                    "now_s": token.seen.now_s,
                    "recorded": {"exit_layer": then[0], "period_ms": then[1], "reason": token.line["reason"]},
                    "again": {"exit_layer": now[0], "period_ms": now[1], "reason": decision.reason},
                }
            )
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
                table.add_row(
                    str(found["token"]), str(then["exit_layer"]), then["reason"], str(now["exit_layer"]), now["reason"]
                )
            stdout.print(table)
    if differences:
        raise typer.Exit(1)


def _replay_rounds(trace: Path, as_json: bool) -> None:
    """The same for a trace of rounds, whose decisions are about several streams."""
    from rich.table import Table

    from balcony_edge.cli.console import stdout
    from balcony_edge.control.company.round_trace import read_rounds, replay_rounds

    recorded = read_rounds(trace)
    differences: list[dict[str, Any]] = []
    for number, (then, found) in enumerate(zip(recorded.rounds, replay_rounds(recorded), strict=True)):
        now = {move.key: move.decision.exit_layer for move in found.moves}
        if now != then.exits:
            reason = "; ".join(dict.fromkeys(move.decision.reason for move in found.moves))
            differences.append(
                {
                    "round": number,
                    "now_s": then.seen.now_s,
                    "recorded": {"exits": then.exits, "reason": then.reason},
                    "again": {"exits": now, "reason": reason},
                }
            )
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
                table.add_row(
                    str(one["round"]), str(then["exits"]), then["reason"], str(again["exits"]), again["reason"]
                )
            stdout.print(table)
    if differences:
        raise typer.Exit(1)
