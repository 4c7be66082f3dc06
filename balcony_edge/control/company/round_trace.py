"""Traces of rounds: what the joint controller saw and decided, as JSON lines, from which the same rounds can be decided again.

Owns the file format: a header (``{"rounds": 5, "costs": ..., "quality": ..., "state": ...}``), and a line for each round. A
stream's budget is written when it is new, and readings when they changed. A trace holds neither text nor tokens.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from balcony_edge.budget import Budget
from balcony_edge.control.company.joint import JointController
from balcony_edge.control.company.seen import Chunk, CompanyState, LearnedAlone, Round, RoundSeen, StreamSeen
from balcony_edge.control.decision import Measurement
from balcony_edge.control.trace import LinesWriter, require_learned
from balcony_edge.device.costs import CostModel
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BalconyError, InputError

VERSION = 5
_COSTS = pydantic.TypeAdapter(CostModel)
_INFINITE = pydantic.ConfigDict(ser_json_inf_nan="strings")
_STATE = pydantic.TypeAdapter(CompanyState, config=_INFINITE)
_LEARNED = pydantic.TypeAdapter(LearnedAlone | None, config=_INFINITE)
_MEASURED = pydantic.TypeAdapter(Measurement)
_STREAM = pydantic.TypeAdapter(StreamSeen)
_CHUNK = pydantic.TypeAdapter(Chunk | None)
#: Beginning of a part.
_BEGIN = '{"rounds":'
_AGAIN = "record it again (serve --record, simulate --arrivals --record, LLM.record_rounds)"


class RecordedRound(NamedTuple):
    """A round of a trace: what was seen, and chosen (:func:`outcome_of`), with its reason, and who had ended before."""

    seen: RoundSeen
    outcome: dict[str, Any]
    reason: str
    ended: tuple[int, ...] = ()

    @property
    def exits(self) -> dict[int, int]:
        """Stream → exit layer of its token."""
        found: dict[int, int] = self.outcome["exits"]
        return found


def outcome_of(found: Round) -> dict[str, Any]:
    """What of a round is compared when it is decided again.

    Returns:
        ``exits`` (stream → exit layer), ``chunk`` (rows that run first, or None), ``wait_ms``, and the streams that are
        ``refused``, or have an ``infeasible`` target.
    """
    return {
        "exits": {move.key: move.decision.exit_layer for move in found.moves},
        "chunk": None if found.chunk is None else found.chunk._asdict(),
        "wait_ms": found.wait_ms,
        "refused": [key for key, _ in found.refused],
        "infeasible": [move.key for move in found.moves if move.decision.infeasible],
    }


def reason_of(found: Round) -> str:
    """The reasons of a round's tokens, each once."""
    return "; ".join(dict.fromkeys(move.decision.reason for move in found.moves))


class RoundTrace(NamedTuple):
    """A recorded company: the controller's prices and qualities, its first state, and the rounds.

    ``parts``: how often recording began, or prices changed; the rounds are those of the first part.
    """

    costs: CostModel
    quality: tuple[float, ...]
    state: CompanyState
    rounds: tuple[RecordedRound, ...]
    parts: int = 1


class RoundTraceWriter(LinesWriter):
    """Writes rounds. A context manager that closes the file.

    Example:
        with RoundTraceWriter("rounds.jsonl") as trace:
            llm.record_rounds(trace)
            llm.generate_batch(prompts, max_new_tokens=50)
            llm.record_rounds(None)

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._budgets: dict[int, Budget] = {}
        self._readings: tuple[Reading, ...] = ()

    def begin(self) -> None:
        """Let the next round begin a new part, with its state: rounds before it were not recorded."""
        self._costs = None

    def write(
        self,
        costs: CostModel,
        quality: Sequence[float],
        state: CompanyState,
        seen: RoundSeen,
        found: Round,
        ended: Sequence[int] = (),
    ) -> None:
        """Add a round.

        Args:
            costs: prices of the device.
            quality: agreement of each exit with the full depth.
            state: state before the round; the first one of a cost model must have no assignment yet.
            seen: what was seen.
            found: the round.
            ended: streams that were taken out of the state since the last round.
        """
        if costs is not self._costs:  # remembered after its line, as all else: an interrupt in between writes it again
            known = json.loads(_STATE.dump_json(state))
            self._line({"rounds": VERSION, "costs": asdict(costs), "quality": list(quality), "state": known})
            self._costs, self._budgets, self._readings = costs, {}, ()
        streams = []
        for stream in seen.streams:
            line = stream._asdict()
            if self._budgets.get(stream.key) is stream.budget:
                del line["budget"]
            else:
                line["budget"] = stream.budget.model_dump(exclude_defaults=True)
            streams.append(line)
        document: dict[str, Any] = {
            "now_s": seen.now_s,
            "busy_s": seen.busy_s,
            "last": seen.last,
            "ended": list(ended),
            "streams": streams,
        }
        if seen.learned is not None:
            document["learned"] = json.loads(_LEARNED.dump_json(seen.learned))
        if seen.absent_ms < math.inf:
            document["absent_ms"] = seen.absent_ms
        if seen.readings != self._readings:
            document["readings"] = [reading.to_dict() for reading in seen.readings]
        self._line(document | outcome_of(found) | {"predicted_ms": found.predicted_ms, "reason": reason_of(found)})
        self._budgets, self._readings = {stream.key: stream.budget for stream in seen.streams}, seen.readings


def is_round_trace(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a trace of rounds."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except (OSError, UnicodeDecodeError):
        return False


def read_rounds(path: str | os.PathLike[str]) -> RoundTrace:
    """Read the rounds of a trace's first cost model. A last line that was cut off is left out.

    Raises:
        InputError: the file cannot be read, is not such a trace, or is of another version.
    """
    name = os.fspath(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        header = json.loads(lines[0])
        if header["rounds"] != VERSION:
            raise InputError(f"{name}: version {header['rounds']!r:.40} of rounds, must be {VERSION}: {_AGAIN}")
        costs, state = _COSTS.validate_python(header["costs"]), _STATE.validate_python(header["state"])
        require_learned(state.slowdown, state.governor)
        quality = tuple(float(value) for value in header["quality"])
        if len(quality) != len(costs.exits):
            raise ValueError("qualities of another number of exits")
    except (OSError, OverflowError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise InputError(f"{name}: not readable as a trace of rounds ({type(error).__name__}): {_AGAIN}") from error
    budgets: dict[int, Budget] = {}
    readings: tuple[Reading, ...] = ()
    rounds: list[RecordedRound] = []
    for number, text in enumerate(lines[1:], start=2):
        try:
            line = json.loads(text)
            if "rounds" in line:
                break
            if "readings" in line:
                readings = tuple(Reading.from_dict(reading) for reading in line["readings"])
            streams = _streams(line["streams"], budgets, len(costs.exits))
            last = None if line["last"] is None else _MEASURED.validate_python(line["last"])
            learned, absent_ms = _LEARNED.validate_python(line.get("learned")), float(line.get("absent_ms", math.inf))
            seen = RoundSeen(streams, last, float(line["now_s"]), float(line["busy_s"]), readings, learned, absent_ms)
            chunk = _CHUNK.validate_python(line["chunk"])
            outcome = {
                "exits": {int(key): int(layer) for key, layer in line["exits"].items()},
                "chunk": None if chunk is None else chunk._asdict(),
                "wait_ms": float(line["wait_ms"]),
                **{name: [int(key) for key in line[name]] for name in ("refused", "infeasible")},
            }
            rounds.append(RecordedRound(seen, outcome, str(line["reason"]), tuple(map(int, line["ended"]))))
        except BalconyError as error:
            raise InputError(f"{name}: line {number}: {error}") from error
        except (OverflowError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(lines) and rounds:
                break
            raise InputError(
                f"{name}: line {number} is not a line of rounds ({type(error).__name__}): {_AGAIN}"
            ) from error
    if not rounds:
        raise InputError(f"{name}: contains no rounds: {_AGAIN}")
    parts = sum(text.startswith(_BEGIN) for text in lines)
    return RoundTrace(costs, quality, state, tuple(rounds), parts)


def _streams(lines: Sequence[dict[str, Any]], budgets: dict[int, Budget], exits: int) -> tuple[StreamSeen, ...]:
    """The streams of a round. ``budgets`` has the last budget of each, and takes new ones."""
    streams = []
    for line in lines:
        if "budget" in line:
            budgets[line["key"]] = Budget.model_validate(line["budget"])
        stream = _STREAM.validate_python({**line, "budget": budgets[line["key"]]})
        for rows in (stream.stage_rows, stream.balcony_rows):
            if len(rows) != exits or min(rows) < 0:
                raise ValueError("rows of another number of stages")
        streams.append(stream)
    return tuple(streams)


def replay_rounds(trace: RoundTrace) -> Iterator[Round]:
    """Yield the joint controller's rounds for what a trace saw."""
    controller, state = JointController(trace.costs, trace.quality), trace.state
    for recorded in trace.rounds:
        state, found = controller.decide(state.without(recorded.ended), recorded.seen)
        yield found
