"""``balcony-edge build``: TensorRT engines from a bundle, also for GPUs of other machines."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import EnginePrecision, EngineSet
from balcony_edge.cli.console import native_stderr_dropped, progress_bar
from balcony_edge.cli.show import engine_facts, show_engines
from balcony_edge.errors import BundleError, InputError
from balcony_edge.files import require_writable_file

#: Default for the rows of the caches, if the bundle's context is longer.
CONTEXT_LENGTH = 2048


def build(
    bundle: Annotated[Path, typer.Argument(help="Directory that `balcony-edge export` wrote, in fp32 or fp16.")],
    target: Annotated[
        Literal["rtx", "tensorrt"],
        typer.Option(
            help="rtx: TensorRT-RTX, which builds without a GPU; tensorrt: the enterprise edition (JetPack), on its GPU."
        ),
    ] = "rtx",
    precision: Annotated[
        Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"],
        typer.Option(help="Precision of weights; activations are in half precision, unless it is fp32."),
    ] = "fp16",
    operators: Annotated[
        Literal["fused", "plain"],
        typer.Option(help="plain: for TensorRT before 10.15, such as 10.13 of JetPack 7.0 and 7.1."),
    ] = "fused",
    context_length: Annotated[
        int | None,
        typer.Option(
            help="Rows of the KV caches; attention time grows with them (default: those of the graphs, or the context, "
            "at most 2048)."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch",
            min=1,
            max=1024,
            help="Most sequences that share a pass, 16 of them replies (default: those of the graphs, or 1).",
        ),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            help="int4: number of inputs that share a scale: 32, 64 or 128 (default: that of the graphs, or 64)."
        ),
    ] = None,
    rounded_as: Annotated[
        Path | None, typer.Option(help="int4: use the integers of this int4 bundle, for example from GPTQ.")
    ] = None,
    sm: Annotated[str, typer.Option(help="rtx: compute capabilities, such as 86,89,120 (default: 86 and newer).")] = "",
    whole: Annotated[
        bool, typer.Option("--whole", help="Also build one engine of the whole backbone with all exits as outputs.")
    ] = False,
    graphs_only: Annotated[
        bool, typer.Option("--graphs-only", help="Only write the graphs; the device builds the engines.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="tensorrt: file of kernel timings, reused between runs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Build one engine per stage, balcony and head into BUNDLE/tensorrt/. Existing graphs are reused."""
    if block not in (None, 32, 64, 128):
        raise InputError(f"--block {block}: give 32, 64 or 128")
    if rounded_as is not None and block is not None:
        raise InputError("--block with --rounded-as: the named bundle has its own block size: leave --block out")
    if (rounded_as is not None or block is not None) and precision != "int4":
        raise InputError(f"--precision {precision}: --block and --rounded-as are for int4: leave them out")
    if graphs_only and (sm or whole or timing_cache is not None):
        raise InputError("--graphs-only: --sm, --whole and --timing-cache only affect engines: leave them out")
    if sm and target == "tensorrt":
        raise InputError("--sm with --target tensorrt: it builds for the GPU of this machine only: leave --sm out")
    if timing_cache is not None and target == "rtx":
        raise InputError("--timing-cache: TensorRT-RTX does not time kernels while it builds: leave it out")
    if timing_cache is not None:
        require_writable_file(timing_cache, f"--timing-cache {timing_cache}", InputError, "name another place")
    capabilities = tuple(part.strip() for part in sm.split(",") if part.strip())
    wanted = BuildOptions(target, precision, operators, context_length, batch_size, block)
    builder_options = None if graphs_only else {"compute_capabilities": capabilities, "timing_cache": timing_cache}
    build_into(bundle, wanted, builder_options, rounded_as=rounded_as, whole=whole)
    name = wanted.name
    engines = Bundle.open(bundle, verify_hashes=False).manifest.engines[name]
    if as_json:
        facts = [engine_facts(engines, key) for key in engines.graphs]
        document = {"bundle": str(bundle), "name": name, "builder": engines.builder, "engines": facts}
        print(json.dumps(document))  # noqa: T201 - for programs
        return
    show_engines(name, engines)


@dataclass(frozen=True)
class BuildOptions:
    """An engine set: options of ``build`` of the same names. None: as in existing graphs, or the default."""

    target: Literal["rtx", "tensorrt"]
    precision: EnginePrecision
    operators: Literal["fused", "plain"]
    context_length: int | None = None
    batch_size: int | None = None
    block_size: int | None = None

    @property
    def name(self) -> str:
        """Name of the set in a bundle."""
        return f"{self.target}-{self.precision}" + ("-plain" if self.operators == "plain" else "")


def build_into(
    path: Path,
    wanted: BuildOptions,
    builder_options: dict[str, Any] | None,
    *,
    rounded_as: Path | None = None,
    whole: bool = False,
) -> None:
    """Write an engine set's graphs if they are missing, and build the engines unless ``builder_options`` is None.

    An existing set stays as it is until the new one is complete.
    """
    from balcony_edge.bundle.engine_sets import new_engine_directory, record_engines
    from balcony_runtime.backends.accelerator.tensorrt_builder import Builder, link_files, make_engines

    name, bundle = wanted.name, Bundle.open(path)
    rows, batch_size = _sizes(bundle, wanted)
    with native_stderr_dropped(), progress_bar() as progress, new_engine_directory(path, name) as directory:
        builder = None
        if builder_options is not None:
            builder = Builder(wanted.target, batch_size=batch_size, **builder_options)
        there = None if rounded_as is not None else _usable(bundle, wanted)
        if there is None:
            progress("writing graphs", 0.0)
            engines = _make_graphs(bundle, directory, wanted, rows, batch_size, rounded_as)
        elif builder is None:
            return
        else:
            source, engines = there
            link_files(source, engines, directory)
        if builder is not None:
            graphs = [key for key in engines.graphs if whole or key != "backbone"]
            engines = make_engines(
                directory, engines, builder, graphs, lambda what, done: progress(what, 0.3 + 0.7 * done)
            )
        record_engines(path, name, engines, directory)


def _sizes(bundle: Bundle, wanted: BuildOptions) -> tuple[int, int]:
    """Rows of the caches and most members of a pass: those asked for, those of existing graphs, or the defaults."""
    from balcony_runtime.backends.accelerator.tensorrt_builder import MASK_STEP

    there, context = bundle.manifest.engines.get(wanted.name), bundle.manifest.model.context_length
    rows = there.context_length if there else max(min(CONTEXT_LENGTH, context) // MASK_STEP, 1) * MASK_STEP
    batch = there.batch_size if there else 1
    return rows if wanted.context_length is None else wanted.context_length, wanted.batch_size or batch


def _usable(bundle: Bundle, wanted: BuildOptions) -> tuple[Path, EngineSet] | None:
    """Directory and entry of the set that is there; None if its graphs are damaged, or others than those wanted.

    If only an engine is damaged, the entry has no engines: they are built again.
    """
    there = bundle.manifest.engines.get(wanted.name)
    keys = ("context_length", "batch_size", "block_size")
    if there is None or any(getattr(wanted, key) not in (None, getattr(there, key)) for key in keys):
        return None
    for entry in (there, there.unbuilt):
        manifest = bundle.manifest.model_copy(update={"engines": {wanted.name: entry}})
        with contextlib.suppress(BundleError):
            return Bundle(bundle.path, manifest).engine_directory(wanted.name), entry
    return None


def _make_graphs(
    bundle: Bundle, directory: Path, wanted: BuildOptions, rows: int, batch_size: int, rounded_as: Path | None
) -> EngineSet:
    try:
        from balcony_export.tensorrt.engine_set import make_graphs, rounding_of
        from balcony_export.tensorrt.graphs import Format
    except ModuleNotFoundError as error:
        raise InputError(
            f"{bundle.path}: {_difference(bundle, wanted)}: give the options of graphs that are there, or write others with "
            f"--graphs-only on a workstation ({error.name} is not installed here)"
        ) from error
    there = bundle.manifest.engines.get(wanted.name)
    if there is not None and there.rounded and rounded_as is None and wanted.block_size is None:
        raise InputError(
            f"{bundle.path}: new graphs of {wanted.name} would lose the integers that it has from another bundle: name that "
            f"with --rounded-as, or give --block {there.block_size} to round to the nearest"
        )
    block = wanted.block_size or (there and there.block_size) or 64
    form = Format(wanted.precision, wanted.operators, rows, block)  # type: ignore[arg-type]
    rounding = None if rounded_as is None else rounding_of(Bundle.open(rounded_as), bundle)
    return make_graphs(bundle, directory, wanted.target, form, batch_size=batch_size, rounding=rounding)


def _difference(bundle: Bundle, wanted: BuildOptions) -> str:
    """What differs between the graphs that were asked for and those in the bundle."""
    there = bundle.manifest.engines
    if wanted.name not in there:
        return f"has graphs of {', '.join(there) or 'no set'}, and {wanted.name} was asked for"
    options = {"context_length": "--context-length", "batch_size": "--batch", "block_size": "--block"}
    for key, option in options.items():
        given, found = getattr(wanted, key), getattr(there[wanted.name], key)
        if None not in (given, found) and found != given:
            return f"the graphs of {wanted.name} have {option} {found}, and {given} was asked for"
    return f"the graphs of {wanted.name} are damaged, or --rounded-as asks for new ones"
