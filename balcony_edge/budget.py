"""The budget: what the user asks of a reply, as a frozen value or as a target file (``profiles/*.toml``).

This module owns the keys, their ranges, the rules between them and the words in which a bad one is refused. It does
not know how a budget is held: that is the controller's. Nothing here reads a clock, a sensor or the environment.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from balcony_edge.errors import BudgetError

#: Strict: no bool and no float that happens to be whole.
ExitLayer = Annotated[int, Field(strict=True, ge=1)]

#: For every key: what is allowed, and what to do.
_ALLOWED = {
    "tpot_ms": (
        "must be a finite number above 0",
        "give the milliseconds between two tokens, or leave it out for no target",
    ),
    "probability": (
        "must be at least 0.5 and below 1",
        "give the share of tokens that must be in time, e.g. 0.9; certainty cannot be promised",
    ),
    "exit_layer": ("must be a whole number above 0", "give one of the bundle's exits"),
    "min_exit": ("must be a whole number above 0", "give the shallowest depth that is good enough"),
    "max_exit": ("must be a whole number above 0", "give the deepest depth that may be used"),
    "dwell_tokens": ("must be a whole number, 0 or more", "give the tokens to stay before going deeper, e.g. 8"),
    "hysteresis": ("must be at least 0 and at most 0.5", "give the share of the target to keep free, e.g. 0.05"),
    "on_infeasible": ("must be 'shallowest' or 'error'", "give one of the two"),
}


class Budget(BaseModel):
    """What a reply may cost. ``Budget()`` asks for nothing: full depth, no target.

    Attributes:
        tpot_ms: target for the gap between two tokens of a stream, where the user receives them.
        probability: asked P(gap <= ``tpot_ms``).
        exit_layer: always use this exit; excludes a target and bounds.
        min_exit: never shallower than this depth; need not be an exit itself.
        max_exit: never deeper than this depth; need not be an exit itself.
        dwell_tokens: tokens to stay at an exit before going deeper; going shallower never waits.
        hysteresis: share of the target that must stay free at a deeper exit before going there.
        on_infeasible: what to do when no allowed exit meets the target: use the shallowest, or raise.

    Raises:
        BudgetError: one line that names the key, what was given, what is allowed and what to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tpot_ms: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = None
    probability: Annotated[float, Field(strict=True, ge=0.5, lt=1, allow_inf_nan=False)] = 0.9
    exit_layer: ExitLayer | None = None
    min_exit: ExitLayer | None = None
    max_exit: ExitLayer | None = None
    dwell_tokens: Annotated[int, Field(strict=True, ge=0)] = 8
    hysteresis: Annotated[float, Field(strict=True, ge=0, le=0.5, allow_inf_nan=False)] = 0.05
    on_infeasible: Literal["shallowest", "error"] = "shallowest"

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except pydantic.ValidationError as error:
            raise BudgetError(_message(error)) from None

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        if self.exit_layer is not None:
            for key in ("tpot_ms", "min_exit", "max_exit"):
                if (value := getattr(self, key)) is not None:
                    raise BudgetError(
                        f"exit_layer = {self.exit_layer} with {key} = {value!r}: a fixed exit leaves no choice; "
                        "give one of the two"
                    )
        if self.min_exit is not None and self.max_exit is not None and self.min_exit > self.max_exit:
            raise BudgetError(
                f"min_exit = {self.min_exit} with max_exit = {self.max_exit}: "
                "min_exit must not be above max_exit; lower the one or raise the other"
            )
        return self

    def allowed_exits(self, exits: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a bundle's ``exits`` (ascending) that this budget allows: one or more, without a gap.

        Raises:
            BudgetError: there is none.
        """
        if self.exit_layer is not None:
            lowest = highest = self.exit_layer
        else:
            lowest = self.min_exit or 0
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

    def check_exits(self, exits: tuple[int, ...]) -> None:
        """Refuse a budget that leaves no exit of a bundle; see :meth:`allowed_exits`."""
        self.allowed_exits(exits)


def load_budget(path: str | os.PathLike[str]) -> Budget:
    """Read a target file.

    Raises:
        BudgetError: one line that names the file, and the key where one is wrong.
    """
    try:
        with Path(path).open("rb") as file:
            document = tomllib.load(file)
    except FileNotFoundError:
        raise BudgetError(
            f"{os.fspath(path)}: there is no such file; name a target file such as profiles/interactive.toml"
        ) from None
    except OSError as error:
        raise BudgetError(f"{os.fspath(path)}: not readable ({error.strerror}); name a target file") from error
    except (ValueError, RecursionError) as error:
        raise BudgetError(f"{os.fspath(path)}: not readable as TOML ({error}); correct the file") from error
    try:
        return Budget.model_validate(document)
    except BudgetError as error:
        raise BudgetError(f"{os.fspath(path)}: {error}") from None


def parse_budget(value: str | os.PathLike[str] | Budget | None) -> Budget:
    """A budget from what an API takes: a budget itself, the path of a target file, or None for full depth.

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
        f"budget = {_shown(value)}: must be a Budget, the path of a target file or None; "
        "e.g. balcony_edge.Budget(tpot_ms=12)"
    )


def _message(error: pydantic.ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if key in _ALLOWED:
        allowed, cure = _ALLOWED[key]
        return f"{key} = {_shown(first['input'])}: {allowed}; {cure}"
    if not key:
        return f"budget = {_shown(first['input'])}: must be a table of keys; the keys are {', '.join(_ALLOWED)}"
    close = difflib.get_close_matches(key, _ALLOWED, n=1)
    cure = f"did you mean {close[0]}?" if close else "remove it"
    return f"{_shown(key)[1:-1]} = {_shown(first['input'])}: no such key; the keys are {', '.join(_ALLOWED)}; {cure}"


def _shown(value: object) -> str:
    """``repr`` on one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
