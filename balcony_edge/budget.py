"""The budget: what the user asks of a reply, as a frozen value or as a budget file (``profiles/*.toml``).

This module owns the keys, their ranges, the rules between them and the messages that refuse a bad one. It does not know how
a budget is held; the controller does. Nothing here reads a clock, a sensor or the environment.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import os
import tomllib
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from balcony_edge.errors import BudgetError, shown
from balcony_edge.files import require_path

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

#: Strict: no bool, no text and no float that happens to be whole.
Layer = Annotated[int, Field(strict=True, ge=1, le=10_000)]
Tokens = Annotated[int, Field(strict=True, ge=1, le=10_000_000)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
#: Part of a device whose power a budget can limit (``power_rail``); a profile measures each.
Rail = Literal["board", "cpu", "gpu"]

#: Keys that contradict a fixed exit, because only depth can hold them. Pace alone can hold power, degrees and utilization.
_HELD_BY_DEPTH_ALONE = (
    *("tpot_ms", "ttft_ms", "deadline_s", "min_exit", "max_exit", "min_agreement"),
    *("energy_j_per_token", "memory_mb"),
)
#: Targets for which the controller must know what a step costs, and those for which it must see the device.
_TIMES = ("tpot_ms", "ttft_ms", "deadline_s", "max_pace_tps")
_CEILINGS = (
    *("power_w", "energy_j_per_token", "temperature_c", "critical_temperature_c", "gpu_utilization", "cpu_utilization"),
    *("battery_floor_percent", "memory_mb"),
)
#: Ceilings for which the controller waits between tokens.
_PACED = ("power_w", "temperature_c", "gpu_utilization", "cpu_utilization", "battery_floor_percent")
#: What has no evaluation, and how to get one, in the refusal of ``min_agreement``. A profile has the evaluation that its
#: bundle had when it was measured.
UNEVALUATED_BUNDLE = "this bundle was not evaluated: run `balcony-edge eval BUNDLE --text TEXT`"
UNEVALUATED_PROFILE = (
    "this device profile has no evaluation: run `balcony-edge eval BUNDLE --text TEXT`, "
    "then `balcony-edge profile` again"
)
_POSITIVE = "must be a finite number above 0"
_SHARE = "must be above 0 and at most 1"
_LAYER = "must be a whole number from 1 to 10000"
#: For every key: what is allowed, and what to do.
_ALLOWED = {
    "tpot_ms": (_POSITIVE, "give the milliseconds between two tokens, or leave it out for no target"),
    "ttft_ms": (_POSITIVE, "give the milliseconds to the first token, or leave it out for no target"),
    "deadline_s": (_POSITIVE, "give the seconds for a whole reply, and expected_tokens with it"),
    "expected_tokens": (
        "must be a whole number from 1 to 10000000",
        "give the tokens that the deadline is for, e.g. 100",
    ),
    "probability": (
        "must be at least 0.5 and below 1",
        "give the share of tokens that must be in time, e.g. 0.9 for the 90th percentile; certainty cannot be promised",
    ),
    "exit_layer": (_LAYER, "give one of the bundle's exits"),
    "min_exit": (_LAYER, "give the shallowest depth that is good enough"),
    "max_exit": (_LAYER, "give the deepest depth that may be used"),
    "min_agreement": (_SHARE, "give the least share of tokens as the full model would write them, e.g. 0.6"),
    "pacing": ("must be true or false", "give false to forbid waits between tokens"),
    "min_pace_tps": (_POSITIVE, "give the fewest tokens a second that pacing may leave"),
    "max_pace_tps": (_POSITIVE, "give the most tokens a second, e.g. 6 for a reader"),
    "power_w": (_POSITIVE, "give watts, averaged over power_window_s"),
    "power_rail": ("must be 'board', 'cpu' or 'gpu'", "give what power_w and energy_j_per_token are about"),
    "power_window_s": ("must be at least 1 and at most 600", "give the seconds that power_w is averaged over, e.g. 5"),
    "energy_j_per_token": (_POSITIVE, "give joules, e.g. 0.5"),
    "temperature_c": ("must be at least 30 and at most 125", "give degrees Celsius, e.g. 75"),
    "critical_temperature_c": (
        "must be at least 30 and at most 125",
        "give degrees Celsius above temperature_c, e.g. 90",
    ),
    "gpu_utilization": (_SHARE, "write 80 % as 0.8"),
    "cpu_utilization": (_SHARE, "write 80 % as 0.8"),
    "battery_floor_percent": ("must be above 0 and below 100", "give percent, e.g. 20"),
    "memory_mb": (_POSITIVE, "give megabytes of this process's own memory"),
    "policy": (
        "must be 'plain', 'speculative', 'confident' or 'lossless'",
        "give how a full-depth token is made, e.g. 'speculative' to let a shallow exit draft it",
    ),
    "kv_memory_mb": (_POSITIVE, "give megabytes for the keys, values and rows of all replies together, e.g. 200"),
    "weight": (_POSITIVE, "give 1 for a reply like the others, and more for one whose depth matters more"),
    "priority": ("must be 'limits' or 'latency'", "give what wins where ceilings and latency cannot both be kept"),
    "dwell_tokens": ("must be a whole number, 0 or more", "give the tokens to stay before going deeper, e.g. 8"),
    "hysteresis": ("must be at least 0 and at most 0.5", "give the share of the target to keep free, e.g. 0.05"),
    "on_infeasible": ("must be 'shallowest', 'best_effort' or 'error'", "give one of the three"),
}
_LIST = "`balcony-edge budget schema` lists the keys"


class Budget(BaseModel):
    """What a reply may cost. ``Budget()`` asks for nothing: full depth, no target.

    Example:
        budget = Budget(tpot_ms=25, temperature_c=75)

    Raises:
        BudgetError: one line that names the key, what was given, what is allowed and what to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", title="Balcony Edge budget file")

    def __setattr__(self, name: str, value: object) -> None:
        raise BudgetError(
            f"{name} = {shown(value)}: a budget does not change: set a new one, e.g. llm.budget = Budget(tpot_ms=12)"
        )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, which are checked as in a new budget. Pydantic's own takes any, under any name."""
        return type(self)(**{**{key: getattr(self, key) for key in self.model_fields_set}, **(update or {})})

    tpot_ms: Positive | None = None
    """Target for the gap between two tokens of a stream (time per output token), where the user receives them."""
    ttft_ms: Positive | None = None
    """Target for the time from the request to the first token. The depth of the prefill holds it."""
    deadline_s: Positive | None = None
    """Target for the time from the request to the last of ``expected_tokens`` tokens."""
    expected_tokens: Tokens | None = None
    """Length of the reply, in tokens, that ``deadline_s`` is for. A shorter reply ends earlier."""
    probability: Annotated[float, Field(strict=True, ge=0.5, lt=1, allow_inf_nan=False)] = 0.9
    """Probability with which each latency target must be met: 0.9 holds the 90th percentile of the gaps."""

    exit_layer: Layer | None = None
    """Exit of every token. Excludes targets and bounds that depth holds."""
    min_exit: Layer | None = None
    """Shallowest depth allowed; it need not be an exit."""
    max_exit: Layer | None = None
    """Deepest depth allowed; it need not be an exit."""
    min_agreement: Share | None = None
    """Least share of next tokens on which an exit must agree with the full model, on the worst text that was evaluated."""

    policy: Literal["plain", "speculative", "confident", "lossless"] = "plain"
    """How a full-depth token is made. ``plain``: by one step. ``speculative``: a shallow exit may draft several tokens that
    the full depth checks in one pass, if measurement says that this is faster; the tokens stay the same (sampled ones keep
    their distribution) and come in bursts. ``confident``: a shallow exit may give the token if its balcony is sure enough by
    the thresholds of `balcony-edge calibrate`; it differs from the full depth's as rarely as was promised there.
    ``lossless``: as ``speculative``, and no token of a shallower exit."""

    pacing: Annotated[bool, Field(strict=True)] = True
    """Whether the controller may delay tokens. Without delays only depth can hold ceilings."""
    min_pace_tps: Positive | None = None
    """Tokens a second that pacing always leaves; 1 by default."""
    max_pace_tps: Positive | None = None
    """Most tokens a second, e.g. the speed of a reader. The time left over goes to deeper exits and to pending rows."""

    power_w: Positive | None = None
    """Ceiling of the average power of ``power_rail`` in watts. It includes everything that runs on the device."""
    power_rail: Rail = "board"
    """Part of the device that ``power_w`` and ``energy_j_per_token`` are about."""
    power_window_s: Annotated[float, Field(strict=True, ge=1, le=600, allow_inf_nan=False)] = 5.0
    """Seconds over which the power is averaged."""
    energy_j_per_token: Positive | None = None
    """Ceiling of the energy of ``power_rail`` from one token to the next, in joules. Depth holds it."""
    temperature_c: Annotated[float, Field(strict=True, ge=30, le=125, allow_inf_nan=False)] | None = None
    """Ceiling of the hottest sensor, in degrees Celsius."""
    critical_temperature_c: Annotated[float, Field(strict=True, ge=30, le=125, allow_inf_nan=False)] | None = None
    """Temperature of the hottest sensor, in degrees Celsius, at which a reply stops with an error in any case."""
    gpu_utilization: Share | None = None
    """Ceiling of the GPU's busy share, 0 to 1, including other processes."""
    cpu_utilization: Share | None = None
    """Ceiling of the busy share of all CPUs, 0 to 1, including other processes."""
    battery_floor_percent: Annotated[float, Field(strict=True, gt=0, lt=100, allow_inf_nan=False)] | None = None
    """Charge to keep, in percent. Depth falls over the 10 percent above it; at the floor
    the pace falls to ``min_pace_tps`` (1 by default), and the budget is infeasible."""
    memory_mb: Positive | None = None
    """Ceiling of this process's memory, in MB. Depth falls over the last 5 %; at the ceiling the budget is infeasible."""

    kv_memory_mb: Positive | None = None
    """Bound of the keys, values and rows of all replies in progress, in MB. A reply waits until there is room for all the
    tokens that it may make. It is a limit of the whole device: only that of the LLM's own budget counts."""
    weight: Positive = 1.0
    """How much the depth of this reply counts where several replies share the device and one of them must give. Of replies
    that wait, the heaviest begins first."""
    priority: Literal["limits", "latency"] = "limits"
    """Which of the two is kept if ceilings (power, degrees, utilization, charge) and latency targets contradict each other."""
    dwell_tokens: Annotated[int, Field(strict=True, ge=0)] = 8
    """Tokens to stay at an exit before a deeper one. A switch to a shallower exit does not wait for them."""
    hysteresis: Annotated[float, Field(strict=True, ge=0, le=0.5, allow_inf_nan=False)] = 0.05
    """Share of a target that a deeper exit must leave free before a switch to it."""
    on_infeasible: Literal["shallowest", "best_effort", "error"] = "shallowest"
    """Choice if no allowed exit meets the targets: the shallowest exit, the exit whose gap comes closest to ``tpot_ms``
    (with pending rows this can be a deeper one), or an error."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe each key by the text below it. Pydantic can do this, but would read the source at every import."""
        schema = handler(core_schema)
        for key, text in _texts(cls).items():
            schema["properties"][key]["description"] = text
        return schema

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict):  # strict fields take no integer of NumPy, and would say that it is not whole
            data = {key: int(one) if _foreign(one) else one for key, one in data.items()}
        try:
            return handler(data)
        except pydantic.ValidationError as error:
            raise BudgetError(_message(error)) from None

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        if self.exit_layer is not None:
            for key in _HELD_BY_DEPTH_ALONE:
                if getattr(self, key) is not None:
                    raise _contradiction(self, "exit_layer", key, "a fixed exit leaves no choice; give one of the two")
        if self.min_exit is not None and self.max_exit is not None and self.min_exit > self.max_exit:
            cure = "min_exit must not be above max_exit; lower the one or raise the other"
            raise _contradiction(self, "min_exit", "max_exit", cure)
        if self.policy != "plain" and self.exit_layer is not None:
            raise _contradiction(self, "policy", "exit_layer", "a fixed exit makes every token; give one of the two")
        if self.policy == "lossless" and self.max_exit is not None:
            raise _contradiction(self, "policy", "max_exit", "only the full depth is lossless; give one of the two")
        ceiling_c, critical_c = self.temperature_c, self.critical_temperature_c
        if ceiling_c is not None and critical_c is not None and ceiling_c >= critical_c:
            cure = "the critical temperature must be above the ceiling; lower the one or raise the other"
            raise _contradiction(self, "temperature_c", "critical_temperature_c", cure)
        self._check_times()
        self._check_pace()
        if self.power_w is None:
            keys = ("power_window_s", "power_rail") if self.energy_j_per_token is None else ("power_window_s",)
            for key in keys:
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise BudgetError(
                        f"{key} = {getattr(self, key)!r} without power_w: it has no effect; also give power_w"
                    )
        return self

    def _check_times(self) -> None:
        if (self.deadline_s is None) != (self.expected_tokens is None):
            given, missing = ("deadline_s", "expected_tokens")[:: 1 if self.expected_tokens is None else -1]
            raise BudgetError(
                f"{given} = {getattr(self, given)!r} without {missing}: a deadline needs both; add {missing}"
            )
        if self.deadline_s is not None and self.ttft_ms is not None and self.ttft_ms > self.deadline_s * 1000:
            cure = "the first token comes after the whole reply is due; lower the one or raise the other"
            raise _contradiction(self, "ttft_ms", "deadline_s", cure)

    def _check_pace(self) -> None:
        slowest, fastest = self.min_pace_tps, self.max_pace_tps
        for key in ("min_pace_tps", "max_pace_tps"):
            if not self.pacing and getattr(self, key) is not None:
                raise _contradiction(self, "pacing", key, "a bound on what is forbidden; give one of the two")
        if fastest is None:
            return
        if slowest is not None and slowest > fastest:
            cure = "min_pace_tps must not be above max_pace_tps; lower the one or raise the other"
            raise _contradiction(self, "min_pace_tps", "max_pace_tps", cure)
        if self.tpot_ms is not None and 1000 / fastest > self.tpot_ms:
            cure = f"a token every {1000 / fastest:g} ms is later than that; raise one of the two"
            raise _contradiction(self, "max_pace_tps", "tpot_ms", cure)
        waits_s = ((self.expected_tokens or 1) - 1) / fastest  # the first token waits for no pace, but takes time
        if self.deadline_s is not None and waits_s >= self.deadline_s:
            cure = f"{self.expected_tokens} tokens take more than {waits_s:g} s at that pace; raise one of the two"
            raise _contradiction(self, "max_pace_tps", "deadline_s", cure)

    @property
    def has_target(self) -> bool:
        """Whether the budget asks for more than bounds of depth, so that prices are needed."""
        return self.needs_sensors or any(getattr(self, key) is not None for key in _TIMES)

    @property
    def speculates(self) -> bool:
        """Whether tokens may be drafted."""
        return self.policy in {"speculative", "lossless"}

    @property
    def needs_costs(self) -> bool:
        """Whether decisions depend on what exits cost."""
        return self.has_target or self.policy != "plain"

    @property
    def may_end(self) -> bool:
        """Whether it may end a reply with an error: where a target is out of reach, or the device too hot."""
        return self.on_infeasible == "error" or self.critical_temperature_c is not None

    @property
    def may_wait(self) -> bool:
        """Whether the controller may wait between two tokens: for a pace, or to hold one of the ceilings that it paces for."""
        return self.pacing and any(getattr(self, key) is not None for key in ("max_pace_tps", *_PACED))

    @property
    def needs_sensors(self) -> bool:
        """Whether there is a ceiling that only sensors can see."""
        return bool(self.ceilings)

    @property
    def ceilings(self) -> dict[str, float]:
        """Key → value of each ceiling that only sensors can see."""
        return {key: value for key in _CEILINGS if (value := getattr(self, key)) is not None}

    def for_bundle(
        self, agreement: Mapping[int, float | None], *, calibrated: bool = True, unevaluated: str = UNEVALUATED_BUNDLE
    ) -> Budget:
        """The same budget with ``min_agreement`` as a bound of depth for one bundle.

        Args:
            agreement: exit layer → share of tokens on which it agrees with the full depth; None where not evaluated.
            calibrated: whether the bundle has thresholds for confidence exits.
            unevaluated: what has no evaluation, and how to get one.

        Raises:
            BudgetError: an exit below the full depth was not evaluated, the budget leaves no exit, or it needs thresholds.
        """
        exits = tuple(sorted(agreement))
        if self.policy == "confident" and not calibrated:
            raise BudgetError(
                "policy = 'confident': this bundle has no thresholds: measure them with "
                "`balcony-edge calibrate BUNDLE --text TEXT`"
            )
        if self.min_agreement is None:
            self.allowed_exits(exits)
            return self
        if any(agreement[exit_layer] is None for exit_layer in exits[:-1]):
            raise BudgetError(f"min_agreement = {self.min_agreement}, but {unevaluated}, or give min_exit")
        least = exits[-1]  # the full depth agrees with itself
        for exit_layer in reversed(exits[:-1]):
            if (agreement[exit_layer] or 0.0) < self.min_agreement:
                break
            least = exit_layer
        if self.max_exit is not None and self.max_exit < least:
            raise BudgetError(
                f"min_agreement = {self.min_agreement} with max_exit = {self.max_exit}: this bundle's exits agree so often "
                f"from {least} on; lower the one or raise the other"
            )
        resolved = self.model_copy(update={"min_agreement": None, "min_exit": max(least, self.min_exit or 0)})
        resolved.allowed_exits(exits)
        return resolved

    def allowed_exits(self, exits: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a bundle's ``exits`` (ascending) that this budget allows: one or more, without a gap.

        Raises:
            BudgetError: there is none.
        """
        if self.exit_layer is not None:
            lowest = highest = self.exit_layer
        else:
            lowest = exits[-1] if self.policy == "lossless" else self.min_exit or 0
            highest = self.max_exit or exits[-1]
        allowed = tuple(exit_layer for exit_layer in exits if lowest <= exit_layer <= highest)
        if not allowed:
            keys = ("exit_layer", "min_exit", "max_exit")
            given = ", ".join(f"{key} = {value}" for key in keys if (value := getattr(self, key)) is not None)
            cure = "pick one of them" if self.exit_layer is not None else "leave at least one of them in the range"
            raise BudgetError(
                f"{given}, but this bundle has exits {', '.join(map(str, exits))}: {cure} or re-export with --exits"
            )
        return allowed


def load_budget(path: str | os.PathLike[str]) -> Budget:
    """Read a budget file.

    Example:
        budget = load_budget("profiles/interactive.toml")

    Raises:
        BudgetError: one line that names the file, and the key where one is wrong.
    """
    require_path(path, "budget file", BudgetError, "give a path, e.g. profiles/interactive.toml")
    try:
        # editors on Windows begin a file with a byte order mark
        document = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise BudgetError(
            f"{os.fspath(path)}: there is no such file; name a budget file such as profiles/interactive.toml"
        ) from None
    except OSError as error:
        raise BudgetError(f"{os.fspath(path)}: not readable ({error.strerror}); name a budget file") from error
    except (ValueError, RecursionError) as error:
        cure = "name a budget file, or correct it"
        raise BudgetError(f"{os.fspath(path)}: not readable as TOML ({error}); {cure}") from error
    try:
        return Budget.model_validate(document)
    except BudgetError as error:
        raise BudgetError(f"{os.fspath(path)}: {error}") from None


def parse_budget(value: str | os.PathLike[str] | Budget | None) -> Budget:
    """A budget from what an API takes: a budget itself, the path of a budget file, or None for full depth.

    Raises:
        BudgetError: the file is refused, or ``value`` is something else.
    """
    if value is None:
        return Budget()
    if isinstance(value, Budget):
        return value
    if isinstance(value, str | os.PathLike):
        return load_budget(value)
    raise BudgetError(
        f"budget = {shown(value)}: must be a Budget, the path of a budget file or None; "
        "e.g. balcony_edge.Budget(tpot_ms=12)"
    )


def _foreign(value: object) -> bool:
    """Whether a value is an integer that is not one of Python's."""
    return isinstance(value, Integral) and not isinstance(value, int)


def _texts(model: type[BaseModel]) -> dict[str, str]:
    """Key → the text below it in the source of the class; nothing in a program that was packed without sources."""
    try:
        source = inspect.getsource(model)
    except OSError:
        return {}
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def _message(error: pydantic.ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if key in _ALLOWED:
        allowed, cure = _ALLOWED[key]
        return f"{key} = {shown(first['input'])}: {allowed}; {cure}"
    if not key:
        return f"budget = {shown(first['input'])}: must be a table of keys such as tpot_ms; {_LIST}"
    # The memory of difflib grows with the length of the key.
    close = difflib.get_close_matches(key[:100], _ALLOWED, n=1)
    cure = f"did you mean {close[0]}?" if close else f"remove it; {_LIST}"
    return f"{shown(key)[1:-1]} = {shown(first['input'])}: no such key; {cure}"


def _contradiction(budget: Budget, first: str, second: str, cure: str) -> BudgetError:
    return BudgetError(f"{first} = {getattr(budget, first)!r} with {second} = {getattr(budget, second)!r}: {cure}")
