"""Options that several verbs share, and checks of options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from balcony_edge.errors import InputError
from balcony_edge.files import require_writable_file, write_atomically

if TYPE_CHECKING:
    from balcony_edge.device.tables import Format


Packed = Annotated[
    Path | None, typer.Option(help="Directory for packed weights, which processes share; written by the first run.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads (default: one for each fast core).")]
NoSpin = Annotated[
    bool,
    typer.Option(
        "--no-spin",
        help="Let idle threads sleep, instead of keeping cores busy until the next token "
        "(default: if the budget has a pace, or a ceiling that is held by pauses).",
    ),
]
OnDevice = Annotated[
    Literal["auto", "cpu", "cuda", "tensorrt", "webgpu"],
    typer.Option(help="auto: engines built here for the GPU, then CUDA, then the faster one of WebGPU and the CPU."),
]
Engines = Annotated[str | None, typer.Option(help="Engine set to use, if the bundle has several.")]


def finite(value: float | None) -> float | None:
    """Refuse NaN and infinity, which the ranges of typer let through (a typer callback)."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def refuse_given(context: typer.Context, options: Mapping[str, str], why: str) -> None:
    """Refuse options that the user gave although they have no effect: name of the parameter → of the option."""
    for name, option in options.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{option}{why}: leave it out")


def use_threads(threads: int | None = None) -> None:
    """Give PyTorch this number of threads; by default at most one for each CPU, because it knows no container's quota."""
    import torch

    from balcony_edge.device.machine import available_cpus, checked_threads

    known = min(torch.get_num_threads(), available_cpus())
    torch.set_num_threads(known if threads is None else checked_threads(threads))


def output_target(value: str) -> tuple[Format, Path | None]:
    """``(format, file)`` of ``-o``: the suffix of a file is its format, and a format alone means stdout (None)."""
    from balcony_edge.device.tables import FORMATS

    for form in FORMATS:
        if value == form:
            return form, None
        if value.endswith(f".{form}"):
            path = Path(value)
            check_place(path)
            return form, path
    names = ", ".join(FORMATS)
    raise InputError(f"-o {value}: must be one of {names}, or a file that ends in one of them: rename the file")


def check_place(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result goes there."""
    require_writable_file(path, str(path), InputError, "name a file in a place that is writable")


def write_output(text: str, path: Path | None) -> None:
    """Write a document to a file, or to stdout if it is None."""
    if path is None:
        print(text, end="")  # noqa: T201 - for programs
    else:
        write_atomically(path, text.encode(), InputError, "free space, or name a place that is writable")
