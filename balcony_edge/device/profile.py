"""The device profile: the measured cost of every exit of one bundle on one device, as a JSON file.

This module owns the file's types, its version and every check that needs no engine. ``balcony-edge profile`` writes it
(:mod:`balcony_runtime.profiler` measures). The controller reads ``costs``; plan, compare, simulate and the report also read
the rest. It does not know how anything is measured. Times are milliseconds, sizes bytes, power watts, energy joules.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from balcony_edge.budget import Budget, Rail
from balcony_edge.bundle.manifest import Finite
from balcony_edge.device.costs import CostModel
from balcony_edge.device.machine import Machine
from balcony_edge.errors import ProfileError
from balcony_edge.files import require_path

SCHEMA_VERSION: Final = 1

Millis = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Watts = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Layer = Annotated[int, Field(ge=1)]
#: Kind of an entry; :class:`Entry` says what ``rows`` and ``context`` mean for each.
Kind = Literal[
    "prefill", "decode", "switch_up", "switch_down", "catch_up", "balcony", "norm", "lm_head", "python", "controller"
]
#: Figure of an evaluation: three on a text, and the mean over tasks.
Metric = Literal["kl", "agreement", "perplexity", "average"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Timing(_Frozen):
    """Samples of one quantity, milliseconds, outliers included.

    ``uncertainty_ms`` is half the width of the 95 % interval of ``p50_ms``. Another profile of the same device and bundle may
    differ by this much, by chance and because every process runs under slightly different conditions (docs/profiling.md).
    """

    samples: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1)]
    p50_ms: Millis
    p95_ms: Millis
    p99_ms: Millis
    mean_ms: Millis
    min_ms: Millis
    max_ms: Millis
    uncertainty_ms: Millis


class Entry(_Frozen):
    """One measured quantity.

    The meaning of ``exit_layer``, ``rows`` and ``context``, by ``kind``:

        prefill      time to first token at the exit: a prompt of ``rows`` tokens on an empty sequence
        decode       time between tokens at the exit after ``context`` tokens, through the public API
        switch_up    step at the exit after ``rows - 1`` tokens at ``from_exit``: pending rows and the new one
        switch_down  step at the exit after ``rows - 1`` tokens at ``from_exit``: the balcony's backlog and the new one
        catch_up     pass of ``rows`` rows through the stage that ends at the exit; ``context`` rows before the last one
        balcony      the same through the exit's balcony: keys and values of all rows, one query
        norm, lm_head  pass of one row; of the head also of more
        python       time of a decode step at a fixed exit outside the engine's own calls
        controller   the same under a target, which the controller checks at every token; every price includes it

    ``predicted_ms`` is the price by ``costs``, without the decision: all of these are measured at fixed exits. That of a
    decode block is the price of its middle step.
    """

    kind: Kind
    exit_layer: Layer
    from_exit: Layer | None = None
    rows: Count = 1
    context: Count = 0
    timing: Timing
    predicted_ms: Millis | None = None

    @property
    def key(self) -> tuple[str, int, int | None, int, int]:
        """Identity of the quantity, by which two profiles are compared."""
        return self.kind, self.exit_layer, self.from_exit, self.rows, self.context

    @property
    def title(self) -> str:
        """A few words for a table."""
        way = f"{self.from_exit} → {self.exit_layer}"
        words = {
            "prefill": f"prompt of {self.rows} at {self.exit_layer}",
            "decode": f"decode at {self.exit_layer} after {self.context}",
            "switch_up": f"{way} with {self.rows - 1} waiting",
            "switch_down": f"{way} with {self.rows - 1} waiting",
            "catch_up": f"{self.rows} rows to {self.exit_layer} after {self.context}",
            "balcony": f"{self.rows} rows of balcony {self.exit_layer} after {self.context}",
            "norm": f"norm after {self.context}",
            "lm_head": f"LM head of {self.rows} rows" if self.rows > 1 else f"LM head after {self.context}",
            "python": f"Python at {self.exit_layer} after {self.context}",
            "controller": f"Python and controller at {self.exit_layer} after {self.context}",
        }
        return words[self.kind]


class Residual(_Frozen):
    """Errors of ``costs`` on the passes that they were fitted to, or on whole steps: shares of the measured time."""

    part: str
    points: Annotated[int, Field(ge=1)]
    median: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    p95: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Power(_Frozen):
    """Average power of one rail while the device decoded at one exit, and while it was idle before that.

    ``context`` is that of the middle token; None in older profiles: :attr:`DeviceProfile.least_context`.
    """

    exit_layer: Layer
    rail: Rail
    source: str
    busy_w: Watts
    idle_w: Watts | None
    joules_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    context: Count | None = None


class Moment(_Frozen):
    """One stretch of a sustained run: its start, its median step, and the sensor readings at that time."""

    at_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    p50_ms: Millis
    celsius: Finite | None = None
    cpu_mhz: Finite | None = None
    watts: Finite | None = None


class Sustained(_Frozen):
    """Decoding at full depth without a pause: the first seconds (burst) against the end."""

    exit_layer: Layer
    seconds: Annotated[float, Field(gt=0)]
    burst: Timing
    sustained: Timing
    moments: tuple[Moment, ...]

    @property
    def slowdown(self) -> float:
        """Median at the end divided by the median at the beginning; above 1 the device throttles."""
        return self.sustained.p50_ms / self.burst.p50_ms if self.burst.p50_ms else 1.0


class MemoryUse(_Frozen):
    """Memory of the measuring process: private bytes once the bundle was loaded, and the peak of the resident ones.

    ``sequence_bytes`` is the size of a sequence's recurrent states, which does not grow with its tokens, and
    ``per_1k_tokens_bytes`` that of its caches and row buffers for 1,000 tokens.
    """

    loaded_bytes: int | None
    peak_bytes: int | None
    sequence_bytes: Count = 0
    per_1k_tokens_bytes: Count

    def simulated(self, stages: int) -> dict[str, Any]:
        """Constants of a simulated device with this memory; none if it is unknown. A row of each stage has an equal part."""
        if self.loaded_bytes is None:
            return {}
        row_bytes = round(self.per_1k_tokens_bytes / 1000 / stages)
        return {"base_memory_bytes": self.loaded_bytes + self.sequence_bytes, "row_bytes": row_bytes}


class Conditions(_Frozen):
    """Conditions of the measurement. None: the system does not tell.

    Attributes:
        seconds: duration of the measurement.
        others_cpu_share: share of all CPU time that other processes used; above a few percent, measure again.
        load_1m: load average at the end.
        governor: governor of the CPU's frequency.
        cpu_mhz: mean clock at the beginning and at the end.
        celsius: temperature of the hottest sensor at the beginning and at the end.
        throttled: whether a sensor reported that clocks were held down.
        notes: remarks for readers, one line each.
    """

    seconds: Annotated[float, Field(ge=0)]
    others_cpu_share: float | None = None
    load_1m: float | None = None
    governor: str | None = None
    cpu_mhz: tuple[float, float] | None = None
    celsius: tuple[float, float] | None = None
    throttled: bool | None = None
    notes: tuple[str, ...] = ()


class BundleFacts(_Frozen):
    """The measured bundle. ``fingerprint`` covers graphs and weights, so an evaluation does not make the profile stale."""

    model: str
    fingerprint: str
    precision: str
    exit_layers: tuple[Layer, ...] = Field(min_length=1)
    context_length: Annotated[int, Field(ge=1)]
    bytes_per_token: dict[int, int]


class EngineFacts(_Frozen):
    """The engine that ran the bundle, and the graphs that it ran: an engine set has others than the bundle."""

    name: str
    graphs: str | None = None
    version: str
    threads: Annotated[int, Field(ge=1)]


class QualityFigure(_Frozen):
    """One figure of an evaluation: ``agreement`` (share), ``kl`` (nats) or ``perplexity`` on a text, ``average`` of tasks."""

    exit_layer: Layer
    metric: Metric
    on: str
    value: Finite
    stderr: Finite | None = None


def least_agreement(exits: tuple[int, ...], quality: tuple[QualityFigure, ...]) -> dict[int, float | None]:
    """Exit layer → agreement with the full depth on the text where it is least; None if it was not measured."""
    found: dict[int, float | None] = dict.fromkeys(exits)
    for figure in quality:
        if figure.metric == "agreement" and figure.exit_layer in found:
            least = found[figure.exit_layer]
            found[figure.exit_layer] = figure.value if least is None else min(figure.value, least)
    return found


class DeviceProfile(_Frozen):
    """The measured costs of one bundle on one device, as `balcony-edge profile` writes them.

    Example:
        profile = DeviceProfile.load("device.json")
        print(profile.costs.steady_ms(profile.costs.exits[-1], context_length=512))

    Attributes:
        created: time of the measurement, ISO 8601, UTC.
        tool: version of Balcony Edge.
        command: command line that made the profile.
        complete: False if measuring was interrupted or reached its time limit before the intervals were tight.
        device, bundle, engine, conditions: what was measured, and under which conditions.
        entries: every measured quantity.
        costs: prices fitted to the entries; the controller reads them.
        residuals: errors of these prices.
        spread: standard deviation of log(step / its median), pooled over decode steps: noise that no controller can predict.
        power: power by exit and rail; empty if no sensor measures it, and then ``power_reason`` says why.
        sustained: results of ``--sustain``, otherwise None.
        memory: memory of the process and of a sequence.
        quality: figures of the bundle's evaluation; empty without one.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    tool: str
    command: str
    complete: bool
    device: Machine
    bundle: BundleFacts
    engine: EngineFacts
    conditions: Conditions
    entries: tuple[Entry, ...]
    costs: CostModel
    residuals: tuple[Residual, ...]
    spread: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
    power: tuple[Power, ...] = ()
    power_reason: str | None = None
    sustained: Sustained | None = None
    memory: MemoryUse
    quality: tuple[QualityFigure, ...] = ()

    @pydantic.model_validator(mode="after")
    def _one_set_of_exits(self) -> DeviceProfile:
        exits = self.bundle.exit_layers
        if self.costs.exits != exits:
            raise ValueError(f"costs are for exits {self.costs.exits}, but the bundle has {exits}")
        parts: tuple[Entry | Power | QualityFigure, ...] = (*self.entries, *self.power, *self.quality)
        layers = {part.exit_layer for part in parts}
        if not self.costs.steady_ms(exits[0], 0) > 0:
            raise ValueError("costs: the price of a step at the shallowest exit is 0, but must be above 0")
        if unknown := layers - set(exits):
            raise ValueError(f"exit {min(unknown)} was measured, but the bundle has {exits}")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DeviceProfile:
        """Read a profile.

        Raises:
            ProfileError: one line that names the file and the problem.
        """
        require_path(path, "profile", ProfileError, "give the path of a device profile")
        name = os.fspath(path)
        try:
            # tools on Windows begin a file with a byte order mark
            document = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ProfileError(f"{name}: there is no such file: make one with `balcony-edge profile`") from None
        except OSError as error:
            raise ProfileError(f"{name}: cannot be read ({error.strerror}): name a device profile") from error
        except (ValueError, RecursionError) as error:
            cure = "name a device profile, or measure again"  # profiles/ also has budget files
            raise ProfileError(f"{name}: not readable as JSON ({error}): {cure}") from error
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise ProfileError(
                f"{name}: schema_version = {version!r:.40}, but this version of balcony-edge reads {SCHEMA_VERSION}: "
                "measure again, or install the version that wrote it"
            )
        try:
            return cls.model_validate(document)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            where = f"{key}: " if key else ""
            raise ProfileError(f"{name}: {where}{' '.join(first['msg'].split())[:160]}: measure again") from error

    def mismatches(self, device: Machine, fingerprint: str, engine: str, graphs: str, threads: int) -> tuple[str, ...]:
        """Reasons why its numbers may not hold on ``device`` for the bundle with this fingerprint, one phrase each.

        ``engine`` is the name of the engine that runs these graphs of it, with so many threads.
        """
        found = [] if fingerprint == self.bundle.fingerprint else ["it was measured with another bundle"]
        if engine != self.engine.name:
            found.append(f"it was measured with {self.engine.name}, not {engine}")
        if self.engine.graphs not in (None, graphs):
            found.append(f"it was measured with other graphs ({self.engine.graphs}, not {graphs})")
        if threads != self.engine.threads:
            found.append(f"it was measured with {self.engine.threads} threads, not {threads}")
        return (*found, *self.device.differences(device))

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons why its numbers may be off even on its own device; every user of the profile shows them."""
        return tuple(f"while it was measured: {note}" for note in self.conditions.notes)

    def select(self, kind: Kind, exit_layer: int | None = None) -> tuple[Entry, ...]:
        """Entries of one kind, optionally of one exit only, in the order of the file."""
        return tuple(
            entry
            for entry in self.entries
            if entry.kind == kind and (exit_layer is None or entry.exit_layer == exit_layer)
        )

    def power_at(self, exit_layer: int, rail: Rail) -> Power | None:
        """Measured power of a rail while decoding at an exit; None if no sensor measures this rail."""
        return next((one for one in self.power if (one.exit_layer, one.rail) == (exit_layer, rail)), None)

    @property
    def least_context(self) -> int:
        """Least context of the decode steps, after which the blocks begin that watts are measured on; 0 without any."""
        return min((entry.context for entry in self.select("decode")), default=0)

    def joules_per_token(self, exit_layer: int, rail: Rail) -> float | None:
        """Measured energy of one token at an exit, at :attr:`Power.context`; None if no sensor measures this rail."""
        found = self.power_at(exit_layer, rail)
        return None if found is None else found.joules_per_token

    def powered(self, rail: Rail) -> tuple[float, float] | None:
        """Idle watts of a rail, and the watts that decoding at full depth adds; None if they were not measured."""
        found = self.power_at(self.costs.exits[-1], rail)
        if found is None or found.idle_w is None:
            return None
        return found.idle_w, max(found.busy_w - found.idle_w, 0.0)

    def agreement(self) -> dict[int, float | None]:
        """Exit layer → agreement with the full depth on the text where it is least; None without an evaluation."""
        return least_agreement(self.costs.exits, self.quality)

    def rail_of(self, budget: Budget) -> Rail:
        """The rail whose power a budget is about; the first that was measured if it asks for neither power nor energy."""
        asked = budget.power_w is not None or budget.energy_j_per_token is not None
        return budget.power_rail if asked else self.rail

    @property
    def rail(self) -> Rail:
        """The rail whose power is shown in tables: the first that was measured."""
        return self.power[0].rail if self.power else "board"
