"""Traces: a run recorded as JSON lines, from which the same decisions can be made again.

Owns the file format: a header (``{"trace": 1, "costs": ...}``), a line before the first token of every budget
(``{"budget": ...}``), and a line per decision with its input: one for each token that was not forced, or for all tokens of a
round of drafts. Where a line does not go on from the one before, as at the start of a reply, it also has the controller's
``state``. Readings are written only when they changed. A trace holds neither text nor tokens.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

import pydantic

from balcony_edge.budget import Budget
from balcony_edge.closing import Closing
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import Decision, Measurement, Observation
from balcony_edge.control.governor import Governor
from balcony_edge.control.response import GAUGES
from balcony_edge.control.slowdown import LOG_SLOWDOWN_LIMIT, Slowdown
from balcony_edge.device.costs import MAX_ROWS, CostModel
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BalconyError, InputError
from balcony_edge.files import exists, require_path, require_writable

VERSION = 1
_COSTS = pydantic.TypeAdapter(CostModel)
#: A state has infinities and NaN for "never" and "not yet". JSON lacks these numbers, so they are written as strings.
_STATE = pydantic.TypeAdapter(ControllerState, config=pydantic.ConfigDict(ser_json_inf_nan="strings"))
_Count = Annotated[int, pydantic.Field(ge=0, le=MAX_ROWS)]
_Millis = Annotated[float, pydantic.Field(ge=0, le=1e12)]


class TraceToken(NamedTuple):
    """One token of a trace.

    Attributes:
        seen: observation of the controller.
        line: line of the token in the file; docs/controller.md documents its keys.
        costs: prices of the decision.
        start: state before the decision, if it is not the one that the decision before has left; else None.
    """

    seen: Observation
    line: dict[str, Any]
    costs: CostModel
    start: ControllerState | None


class LinesWriter(Closing):
    """A file of JSON lines, made or replaced by the first line. A context manager that closes it.

    No line is taken after a failure, so a full disk cuts off the last line only. The end of the block raises it, unless
    another error ended the block.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        require_path(path, "trace", InputError, "give the path of a file")
        self._name = os.fspath(path)
        self._file: IO[str] | None = None
        self._costs: CostModel | None = None  # prices of the last header
        self._closed = False
        #: Why nothing is written any more: a write has failed.
        self.failure: str | None = None
        try:
            if not exists(Path(path)):
                require_writable(Path(path).parent, self._name, InputError, "name another place")
            elif Path(path).is_dir() or not os.access(path, os.W_OK):
                raise InputError(f"{self._name}: not writable: name another place")
        except OSError as error:
            raise InputError(self._not_written(error)) from error

    def _line(self, document: dict[str, Any]) -> None:
        if self._closed:
            raise InputError(f"{self._name}: was closed: record to a new file")
        if self.failure is None:
            try:
                if self._file is None:
                    Path(self._name).parent.mkdir(parents=True, exist_ok=True)
                    self._file = Path(self._name).open("w", encoding="utf-8")  # noqa: SIM115 - closed by close()
                self._file.write(json.dumps(document, allow_nan=False) + "\n")
            except OSError as error:
                self.failure = self._not_written(error)
        if self.failure is not None:
            raise InputError(self.failure)

    def __exit__(self, *raised: object) -> None:
        try:
            self.close()
        except InputError:
            if raised[0] is None:  # what ended the block says more than its record
                raise

    def close(self) -> None:
        """Close the file.

        Raises:
            InputError: not all lines could be written.
        """
        self._closed = True
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self.failure = self._not_written(error)
        if self.failure is not None:
            raise InputError(self.failure)

    def _not_written(self, error: OSError) -> str:
        return f"{self._name}: writing failed ({error.strerror}): free space or name another place"


class TraceWriter(LinesWriter):
    """Writes the controller's input and decisions, a line each: for every token that was not forced, or round of drafts.

    Replies in several threads may write to one. A context manager: an error of writing ends the record, but no reply, and
    the end of the block raises it.

    Example:
        with TraceWriter("run.jsonl") as trace:
            reply = list(llm.stream("Hello", trace=trace))

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._lock = threading.RLock()  # Python's text files take no writes of several threads
        self._state: ControllerState | None = None  # after the last line
        self._budget: Budget | None = None
        self._readings: tuple[Reading, ...] = ()

    def write(
        self,
        costs: CostModel,
        states: tuple[ControllerState, ControllerState],
        seen: Observation,
        decision: Decision,
        latency_ms: float,
        pending: int,
        made_at: int | None = None,
    ) -> None:
        """Add one decision.

        Args:
            costs: prices of the decision.
            states: states of the controller before the decision and after it.
            seen: what the controller saw.
            decision: what it decided.
            latency_ms: gap to the token before.
            pending: number of pending rows afterwards.
            made_at: exit layer that made the token; None for that of the decision.

        Raises:
            InputError: the line cannot be written, or the file was closed.
        """
        line: dict[str, Any] = {
            "now_s": seen.now_s,
            "exit_layer": decision.exit_layer,
            "latency_ms": latency_ms,
            "predicted_ms": decision.predicted_ms,
            "price_ms": decision.price_ms,
            "period_ms": decision.period_ms,
            "idle_ms": decision.idle_ms,
            "catch_up": decision.catch_up,
            "pending_rows": pending,
            "infeasible": decision.infeasible,
            "reason": decision.reason,
            "made_tokens": seen.made_tokens,
            "forced_tokens": seen.forced_tokens,
            "started_s": seen.started_s,
            "busy_s": seen.busy_s,
            "context_length": seen.context_length,
            "stage_rows": list(seen.stage_rows),
            "balcony_rows": list(seen.balcony_rows),
            "last": seen.last,
        }
        if made_at not in (None, decision.exit_layer):
            line["made_at"] = made_at
        before, after = states
        with self._lock:  # each is remembered after its line: an interrupt in between writes it again
            if costs is not self._costs:
                self._line({"trace": VERSION, "costs": asdict(costs)})
                self._costs, self._budget, self._readings = costs, None, ()
            if seen.budget is not self._budget:
                self._line({"budget": seen.budget.model_dump(exclude_defaults=True)})
                self._budget = seen.budget
            if before is not self._state:
                line["state"] = json.loads(_STATE.dump_json(before))
            if seen.readings != self._readings:
                line["readings"] = [reading.to_dict() for reading in seen.readings]
            self._line(line)
            self._state, self._readings = after, seen.readings

    def close(self) -> None:
        """Close the file; see :meth:`LinesWriter.close`."""
        with self._lock:
            super().close()


def read_trace(path: str | os.PathLike[str]) -> tuple[TraceToken, ...]:
    """Read a trace's tokens. A last line that was cut off when its run was killed is left out.

    Raises:
        InputError: the file cannot be read, is not a trace, or is of another version.
    """
    name = os.fspath(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{name}: not readable as a trace ({error}): record one with `balcony-edge run --record`"
        ) from error
    tokens: list[TraceToken] = []
    costs: CostModel | None = None
    budget = Budget()
    readings: tuple[Reading, ...] = ()
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            if "trace" in line:
                if line["trace"] != VERSION:
                    raise InputError(f"{name}: trace version {line['trace']!r:.40}, must be {VERSION}: record it again")
                costs, readings = _COSTS.validate_python(line["costs"]), ()
            elif "budget" in line:
                budget = Budget.model_validate(line["budget"])
            elif costs is None:
                found = "rounds of several replies" if "rounds" in line else "no header"
                raise InputError(f"{name}: has {found}: record one with `balcony-edge run --record`")
            else:
                if "readings" in line:
                    readings = tuple(Reading.from_dict(reading) for reading in line["readings"])
                start = _state(line["state"]) if "state" in line else None
                tokens.append(TraceToken(_observation(line, costs, budget, readings), line, costs, start))
        except BalconyError as error:
            where = "" if str(error).startswith(name) else f"{name}: line {number}: "
            raise InputError(f"{where}{error}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines) and tokens:
                break
            raise InputError(
                f"{name}: line {number} is not a line of a trace ({_first(error)}): record it again"
            ) from error
    if not tokens:
        raise InputError(f"{name}: contains no tokens: record a trace with `balcony-edge run --record`")
    return tuple(tokens)


class _Line(pydantic.BaseModel):
    """Keys of a token's line: those of the observation, and those of the decision that are shown."""

    model_config = pydantic.ConfigDict(allow_inf_nan=False)

    exit_layer: _Count
    made_at: _Count | None = None
    latency_ms: _Millis
    period_ms: _Millis
    infeasible: bool
    reason: str

    now_s: float
    started_s: float
    busy_s: float
    context_length: _Count
    made_tokens: _Count
    forced_tokens: _Count = 0
    stage_rows: tuple[_Count, ...]
    balcony_rows: tuple[_Count, ...]
    last: tuple[int, float, float] | None


def _observation(line: dict[str, Any], costs: CostModel, budget: Budget, readings: tuple[Reading, ...]) -> Observation:
    seen = _Line.model_validate(line)
    if not len(seen.stage_rows) == len(seen.balcony_rows) == len(costs.exits):
        raise ValueError(f"rows of {len(seen.stage_rows)} stages for {len(costs.exits)} exits")
    return Observation(
        budget,
        seen.context_length,
        seen.stage_rows,
        seen.balcony_rows,
        None if seen.last is None else Measurement(*seen.last),
        seen.made_tokens,
        seen.started_s,
        seen.now_s,
        seen.busy_s,
        readings,
        seen.forced_tokens,
    )


def _state(document: Any) -> ControllerState:
    """Read a reply's first state; ValueError if the controller cannot have produced it."""
    state = _STATE.validate_python(document)
    require_learned(state.slowdown, state.governor)
    if not (abs(state.recovery.credit) <= 1 and state.recovery.wait >= 0 and state.recovery.sprints >= 0):
        raise ValueError("state.recovery: a credit beyond one token, or a negative wait or number of sprints")
    return state


def require_learned(slowdown: Slowdown, governor: Governor) -> None:
    """ValueError if no controller can have learned them."""
    most = 2 * LOG_SLOWDOWN_LIMIT
    variances = (slowdown.variance, slowdown.process_variance, slowdown.noise_variance, *slowdown.offset_variances)
    known = all(0 <= variance <= most**2 for variance in variances) and 0 <= slowdown.ratio_variance < math.inf
    if not known or slowdown.noise_variance == 0:
        raise ValueError("state.slowdown: a variance below 0 or out of reach, or no noise")
    means = (slowdown.mean, *slowdown.offsets, math.log(slowdown.ratio_mean) if slowdown.ratio_mean > 0 else math.nan)
    if not all(abs(mean) <= most for mean in means):
        raise ValueError("state.slowdown: a mean out of reach")
    if len(slowdown.offsets) != len(slowdown.offset_variances):
        raise ValueError("state.slowdown: offsets and offset_variances differ in length")
    for load in (governor.power, governor.cpu, governor.gpu):
        if load is not None and not (len(load.fits) == len(GAUGES) and 0 <= load.best < len(GAUGES)):
            raise ValueError("state.governor: a load with a wrong number of gauges")


def _first(error: Exception) -> str:
    """First problem of an error, on one line."""
    if isinstance(error, pydantic.ValidationError):
        problem = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"[:100]
    return " ".join(repr(error).split())[:80]


def replay(trace: Sequence[TraceToken]) -> Iterator[Decision]:
    """Yield the controller's decisions for the observations of a trace."""
    state = ControllerState.initial()
    controller: Controller | None = None
    before: CostModel | None = None
    for seen, _, costs, start in trace:
        if controller is None or costs is not before:
            controller, before = Controller(costs), costs
        if start is not None:
            state = start
        state, decision = controller.decide(state, seen)
        yield decision
