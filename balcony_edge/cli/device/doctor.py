"""``balcony-edge doctor``: this device, its engines, and each sensor with its value or the reason why it has none."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from balcony_edge.cli.console import stdout
from balcony_edge.errors import BalconyError, InputError

if TYPE_CHECKING:
    from balcony_runtime.backends.accelerator.tensorrt_builder import Target
    from balcony_runtime.sensors import SourceHealth

#: Seconds before the readings are taken: watts from an energy counter and CPU shares need two samples, one every 0.2 s.
LOOK_S = 0.6
#: Longest further wait, in seconds, for the second sample of every source.
PATIENCE_S = 5.0


def doctor(
    sysfs: Annotated[
        Path | None,
        typer.Option(help="Root of the sysfs tree to read, such as one copied from a device; /sys by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show this device, its engines, and every sensor with its value, or with the reason for its absence and a cure."""
    from balcony_edge.device.machine import memory_limit, this_device
    from balcony_runtime.sensors import Sensors, device_sources

    if sysfs is not None and not sysfs.is_dir():
        raise InputError(f"--sysfs {sysfs}: is not a directory: give the root of a sysfs tree, such as /sys")
    with Sensors(device_sources(sysfs or Path("/sys"))) as sensors:
        time.sleep(LOOK_S)
        late_s = time.monotonic() + PATIENCE_S  # on a busy machine the second sample may take a while
        while time.monotonic() < late_s and any(
            h.state in ("present", "starting") and h.samples < 2 for h in sensors.health()
        ):
            time.sleep(0.05)
        readings, health = sensors.latest(), sensors.health()
    device = {
        **this_device().model_dump(mode="json"),
        "memory_limit_bytes": memory_limit(),
        "python": platform.python_version(),
        "container": any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")),  # Docker, Podman
    }
    engines = engine_facts()
    values = [reading.to_dict() for reading in readings]
    if as_json:
        sensor_facts = {"readings": values, "sources": [asdict(source) for source in health]}
        print(json.dumps({"device": device, "engines": engines, "sensors": sensor_facts}))  # noqa: T201 - for programs
        return
    _show(device, engines, values, health)


def engine_facts() -> list[dict[str, Any]]:
    """Facts of each engine: packages and versions, execution providers, and whether bundles run on it."""
    return [_onnxruntime(), _webgpu(), _cuda(), _tensorrt("tensorrt"), _tensorrt("rtx")]


def _onnxruntime() -> dict[str, Any]:
    from balcony_runtime.backends.installed import OLDEST, checked_onnxruntime, installed_packages

    facts: dict[str, Any] = {"engine": "onnxruntime", "packages": installed_packages(), "providers": [], "used": None}
    try:
        module = checked_onnxruntime()
    except BalconyError as error:
        return {**facts, "note": str(error)}
    providers = module.get_available_providers()
    gpu = "; engine sets on a GPU with --device cuda" if "CUDAExecutionProvider" in providers else ""
    note = f"{module.__version__} (needs {OLDEST}): bundles run on the CPU{gpu}"
    return {**facts, "providers": providers, "used": "CPUExecutionProvider", "note": note}


def _webgpu() -> dict[str, Any]:
    """The adapters for WebGPU, and whether bundles run on one."""
    from importlib.metadata import distributions

    from balcony_runtime.backends.webgpu.adapters import adapters
    from balcony_runtime.backends.webgpu.provider import NAME, find_provider, gpu_for_webgpu

    names = ("onnxruntime-ep-webgpu", "onnxruntime-webgpu")
    packages = {name: dist.version for name in names for dist in distributions(name=name)}
    facts: dict[str, Any] = {"engine": "webgpu", "packages": packages, "providers": [], "used": None, "adapters": []}
    try:
        found = adapters()
    except BalconyError as error:
        return {**facts, "note": str(error)}
    facts["adapters"] = [asdict(adapter) for adapter in found or ()]
    seen = "; ".join(f"{a.name} ({a.kind}, {'with' if a.half else 'without'} 16-bit floats)" for a in found or ())
    seen = seen or "no list of adapters on this system"
    try:
        find_provider()
    except BalconyError as error:
        return {**facts, "note": f"{seen}: {error}"}
    takes = "takes the faster one of it and the CPU"
    try:
        gpu_for_webgpu()
    except BalconyError as error:
        takes = f"takes the CPU: {error}"
    note = f"{seen}: bundles run on it with --device webgpu; --device auto {takes}"
    return {**facts, "providers": [NAME], "used": NAME, "note": note}


def _cuda() -> dict[str, Any]:
    """The GPU as CUDA sees it, and the resulting choice of ``--device auto``."""
    from importlib.metadata import distributions

    from balcony_edge.device.machine import machine_id

    packages = {name: dist.version for name in ("cuda-python",) for dist in distributions(name=name)}
    facts: dict[str, Any] = {"engine": "cuda", "packages": packages, "providers": [], "used": None}
    try:
        from balcony_runtime.backends.accelerator.cuda import compute_capability

        note = f"compute capability {compute_capability()}: --device auto takes engines that this machine built for it"
        if machine_id() is None:
            note += "; it has no identifier (/etc/machine-id), so none of them is known: name a set with --engines"
    except BalconyError as error:
        note = f"--device auto takes no engines: {error}"
    return {**facts, "note": note}


def _tensorrt(target: Target) -> dict[str, Any]:
    from importlib.metadata import packages_distributions, version

    from balcony_runtime.backends.accelerator.tensorrt_builder import MODULES, import_tensorrt

    module, note = MODULES[target], "`balcony-edge build` makes engines with it"
    packages = {name: version(name) for name in packages_distributions().get(module, ())}
    try:
        import_tensorrt(target)
    except BalconyError as error:
        note = str(error)
    return {"engine": module, "packages": packages, "providers": [], "used": None, "note": note}


def _show(
    device: dict[str, Any],
    engines: list[dict[str, Any]],
    readings: list[dict[str, Any]],
    health: tuple[SourceHealth, ...],
) -> None:
    board = f"[bold]{escape(device['board'])}[/]: " if device["board"] else ""
    memory = f", {device['memory_bytes'] / 1e9:.1f} GB of memory" if device["memory_bytes"] else ""
    if memory and (limit := device["memory_limit_bytes"]) and limit < device["memory_bytes"]:
        memory += f", of which this process may use {limit / 1e9:.1f} GB"
    stdout.print(f"{board}{device['cpus']} × {escape(device['cpu'])}{memory}")
    for index, gpu in enumerate(device["gpus"]):
        stdout.print(f"GPU {index}: {escape(gpu['name'])}, driver {escape(gpu['driver'])}")
    mode = f", power mode {escape(device['power_mode'])}" if device["power_mode"] else ""
    inside = ", in a container" if device["container"] else ""
    stdout.print(f"{escape(device['system'])} {device['architecture']}{inside}{mode}, Python {device['python']}")
    if note := clock_note():
        stdout.print(note, style="yellow", markup=False, soft_wrap=True)
    # From here on lines, not a table: a table cuts long words, and users copy cures.
    for engine in engines:
        packages = ", ".join(f"{name} {version}" for name, version in engine["packages"].items())
        marked = (f"[green]{p}[/]" if p == engine["used"] else p for p in engine["providers"])
        providers = f": {', '.join(marked)}" if engine["providers"] else ""
        stdout.print(
            f"[bold]{engine['engine']}[/] ({escape(packages) or '[yellow]none[/]'}){providers}", soft_wrap=True
        )
        stdout.print(f"    {engine['note']}", markup=False, soft_wrap=True)
    table = Table("sensor", "about", "now")
    for values in readings:
        table.add_row(escape(values["source"]), values["scope"], describe(values))
    stdout.print(table)
    for part, why, cure in _missing(health):
        stdout.print(f"[yellow]{escape(part)}[/]: {escape(why)}", soft_wrap=True)
        if cure:
            stdout.print(f"    {cure}", markup=False, soft_wrap=True)


def _missing(health: tuple[SourceHealth, ...]) -> list[tuple[str, str, str]]:
    """``(part, reason, cure)`` of everything that gives no value."""
    found = []
    for source in health:
        if source.state in ("hung", "starting"):
            why = "it does not answer" if source.samples else "it does not answer yet"
            found.append((source.source, why, "look again; then at dmesg for errors of its driver or bus"))
        found += [(missing.part, missing.reason, missing.cure) for missing in source.absences]
        if source.dropped:
            why = f"{source.dropped} impossible values were dropped, the last: {source.last_dropped}"
            found.append((source.source, why, ""))
    return found


def clock_note() -> str:
    """Why times are coarse here, with the cure; empty if they are not. Windows has such a clock before Python 3.13."""
    if (step_ms := 1000 * time.get_clock_info("monotonic").resolution) <= 1:
        return ""
    return f"the clock moves in steps of {step_ms:.1f} ms, and so do latencies: use Python 3.13 or newer"


def describe(values: dict[str, Any]) -> str:
    """Values of a reading as text for people."""
    parts = []
    if "watts" in values:
        parts.append(f"{values['watts']:.1f} W")
    elif "joules" in values:
        parts.append(f"{values['joules']:.0f} J")
    if "celsius" in values:
        parts.append(f"{values['celsius']:.1f} °C")
    if "utilization" in values:
        own = f" ({values['own_utilization']:.0%} this process)" if "own_utilization" in values else ""
        parts.append(f"{values['utilization']:.0%} busy{own}")
    if "charge" in values:
        parts.append(f"{values['charge']:.0%} charged")
    if "charging" in values:
        parts.append("on external power" if values["charging"] else "discharging")
    if "memory_bytes" in values:
        total = f" of {values['memory_total_bytes'] / 1e9:.1f}" if "memory_total_bytes" in values else ""
        parts.append(f"{values['memory_bytes'] / 1e9:.2f}{total} GB")
    if "throttled" in values:
        parts.append("throttled" if values["throttled"] else "not throttled")
    return ", ".join(parts)
