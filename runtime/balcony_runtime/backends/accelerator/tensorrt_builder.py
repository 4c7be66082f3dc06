"""TensorRT's builder: from a graph file to a serialized engine, with either TensorRT, and without a GPU if it supports that.

Owns the import of TensorRT, the optimization profiles, and the messages of a failed parse or build. It does not need the ONNX
library: a device builds from the graphs that a workstation wrote.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from balcony_edge.bundle.bundle import file_spec
from balcony_edge.bundle.manifest import EngineSet, EngineSpec, GraphSpec, TensorSpec
from balcony_edge.device.machine import machine_id
from balcony_edge.errors import BalconyError, EngineBuildError, MissingDependencyError
from balcony_edge.files import write_atomically

Target = Literal["rtx", "tensorrt"]
MODULES: dict[Target, str] = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
#: GPUs that run engines of TensorRT-RTX 1.7 for which none were named; those of fp8 need the second or later. 75 (Turing) and
#: 80 must be named (NVIDIA, "CPU-Only AOT and TensorRT-RTX Engines").
RTX_GPUS = ("86", "89", "120", "121")
#: Divides the rows of caches: a mask has one column for each row, and kernels for attention read it in such steps (those of
#: ONNX Runtime for CUDA fail at addresses that are not aligned).
MASK_STEP = 8
#: Sizes of passes as (least, usual, most) new rows, one optimization profile each: decode, catch-up, a chunk of a prefill.
#: All begin at one row: for a profile of only one row TensorRT-RTX 1.7 keeps a second, transposed copy of every weight.
PASSES = ((1, 1, 8), (1, 8, 64), (1, 256, 512))
_NO_KERNEL = "not supported by a dedicated kernel"
#: Words of a parser's warning that it ignores an input of a node (``nonpad_kv_seqlen``); the engine would then attend to
#: garbage. Some parsers give no warning, so unread inputs are also checked.
_DROPPED = re.compile(r"ignor|not supported|unsupported", re.IGNORECASE)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine and facts about it; fields as in :class:`balcony_edge.bundle.manifest.EngineSpec`."""

    data: Any
    layers: int
    attention: Literal["fused", "decomposed"] | None


def import_tensorrt(target: Target) -> Any:
    """Import the module of a TensorRT.

    Raises:
        MissingDependencyError: the module is not installed, or cannot be used: JetPack's is built for one version of Python,
            and other versions find it, too, because Debian's have one directory of packages. On Windows it raises
            FileNotFoundError where its libraries are not on PATH.
    """
    name = MODULES[target]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        cure = (
            "pip install 'balcony-edge[tensorrt]'"
            if target == "rtx"
            else "it is part of JetPack (apt install tensorrt), for the system's Python; elsewhere: pip install tensorrt; or "
            "write graphs with --graphs-only and build on the device"
        )
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        why = "is not installed" if absent else f"cannot be used ({' '.join(str(error).split())[:200]})"
        raise MissingDependencyError(f"{name} {why}: {cure}") from error


def started(make: Callable[[Any], Any], log: Any, name: str, error: type[BalconyError]) -> Any:
    """A builder or a runtime. The binding raises TypeError where the library makes none, as without a GPU or its driver.

    Args:
        make: class of the object.
        log: log of :func:`make_log`, which the object writes to.
        name: name of the TensorRT.
        error: class of the error.

    Raises:
        BalconyError: it cannot start; one line with the reason in the log, which is a warning in some versions.
    """
    log.forget()
    try:
        return make(log)
    except TypeError as nothing:
        why = one_line(log.last_error or " ".join(log.warnings))
        raise error(
            f"{name} cannot start ({why}): install or update NVIDIA's driver; in a container: start it with --gpus all"
        ) from nothing


def gpus_of(engines: EngineSet) -> tuple[str, ...]:
    """Compute capabilities that a set's engines run on; empty: that of the machine that built them."""
    if engines.compute_capabilities or engines.target != "rtx":
        return engines.compute_capabilities
    return RTX_GPUS[1:] if engines.precision == "fp8" else RTX_GPUS


class Builder:
    """One TensorRT builder, which builds one engine after another."""

    def __init__(
        self,
        target: Target,
        *,
        batch_size: int = 1,
        compute_capabilities: Sequence[str] = (),
        timing_cache: Path | None = None,
    ) -> None:
        """Open the builder.

        Args:
            target: the TensorRT to use.
            batch_size: most members of a pass.
            compute_capabilities: GPUs to build for, such as ``89``; only ``rtx`` builds for GPUs of other machines. By default
                ``rtx`` builds for :data:`RTX_GPUS`, ``tensorrt`` for the GPU of this machine.
            timing_cache: file in which ``tensorrt`` keeps kernel timings.

        Raises:
            MissingDependencyError: this TensorRT is not installed.
            EngineBuildError: this TensorRT does not know a compute capability, or cannot start.
        """
        self._trt, self._batch = import_tensorrt(target), batch_size
        self.name = f"{MODULES[target]} {self._trt.__version__}"
        #: Compute capabilities that the engines are built for; empty: the library's default.
        self.compute_capabilities = tuple(compute_capabilities)
        if target == "tensorrt" and not self.compute_capabilities:
            with contextlib.suppress(BalconyError):  # its engines run on the GPU that built them
                from balcony_runtime.backends.accelerator.cuda import compute_capability  # noqa: PLC0415 - an extra

                self.compute_capabilities = (compute_capability(),)
        self._capabilities = [self._capability(text) for text in compute_capabilities]
        self._timing_cache = timing_cache if target == "tensorrt" else None
        self._log = make_log(self._trt)
        self._builder = started(self._trt.Builder, self._log, self.name, EngineBuildError)

    def build(self, path: Path, spec: GraphSpec, progress: Callable[[float], None] = lambda done: None) -> BuiltEngine:
        """Build one graph.

        Args:
            path: file of the graph, with its external data in the same directory.
            spec: I/O table of the graph, which TensorRT's network must match.
            progress: function that gets the finished share of the current phase of the build.

        Raises:
            EngineBuildError: one line with the node that failed and a cure.
            KeyboardInterrupt: the user pressed Ctrl-C; TensorRT stops at its next step.
        """
        network = self._parsed(path, spec)
        attentions = self._attentions(network)
        attention: Literal["fused", "decomposed"] | None = "fused" if attentions else None
        config = self._config(spec, progress)
        data = self._serialized(network, config)
        if data is None and attentions and _NO_KERNEL in self._log.last_error:
            _logger.info("%s: no fused attention kernel for it: decomposed", path.name)
            attention = "decomposed"
            for layer in attentions:
                layer.attention.decomposable = True
            data = self._serialized(network, config)
        if data is None:
            raise EngineBuildError(
                f"{path}: {self.name} cannot build it ({one_line(self._log.last_error)}): "
                "try another --precision, or --operators plain"
            )
        return BuiltEngine(data, network.num_layers, attention)

    @property
    def known_capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that it builds for without such a GPU; empty: it builds for the GPU of this machine only."""
        names = [name for name in dir(getattr(self._trt, "ComputeCapability", None)) if name.startswith("SM")]
        return tuple(sorted((name.removeprefix("SM") for name in names), key=int))

    def _capability(self, text: str) -> Any:
        if text not in self.known_capabilities:
            have = ", ".join(self.known_capabilities) or "only the GPU of this machine"
            raise EngineBuildError(
                f"--sm {text}: {self.name} builds for {have}; Orin (87) and Hopper (90) need --target tensorrt on a machine "
                "that has it"
            )
        return getattr(self._trt.ComputeCapability, f"SM{text}")

    def _parsed(self, path: Path, spec: GraphSpec) -> Any:
        trt, flags = self._trt, 0
        if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # later versions only have this mode
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._builder.create_network(flags)
        self._log.forget()
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(path)):
            first = parser.get_error(0)
            where = f"node {first.node_name() or first.node()} ({first.node_operator()})"
            raise EngineBuildError(
                f"{path}: {self.name} cannot read {where}: {one_line(first.desc())}: "
                "try --operators plain, which needs no operator newer than opset 21"
            )
        dropped = [text for text in self._log.warnings if _DROPPED.search(text)]
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        read = {tensor.name for layer in layers for i in range(layer.num_inputs) if (tensor := layer.get_input(i))}
        names = [network.get_input(index).name for index in range(network.num_inputs)]
        if dropped := dropped + [f"input {name} is not read" for name in names if name not in read]:
            raise EngineBuildError(
                f"{path}: {self.name} would ignore a part of it ({one_line(dropped[0])}): export it again"
            )
        for role, table, count, get in (
            ("input", spec.inputs, network.num_inputs, network.get_input),
            ("output", spec.outputs, network.num_outputs, network.get_output),
        ):
            found = {get(i).name: self._described(get(i)) for i in range(count)}
            wanted = {tensor.name: _table_entry(tensor) for tensor in table}
            if found != wanted:
                name = min(found.keys() ^ wanted.keys() or {n for n in found if found[n] != wanted[n]})
                raise EngineBuildError(
                    f"{path}: {self.name} reads {role} {name} as {found.get(name)}, but the manifest says {wanted.get(name)}: "
                    "write the graphs again"
                )
        self._parser = parser  # the network refers to its memory
        return network

    def _described(self, tensor: Any) -> tuple[str, tuple[int, ...]]:
        types = self._trt.DataType
        names = {
            types.FLOAT: "float32",
            types.HALF: "float16",
            types.BF16: "bfloat16",
            types.INT32: "int32",
            types.INT64: "int64",
        }
        return names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)

    def _attentions(self, network: Any) -> list[Any]:
        kind = getattr(self._trt.LayerType, "ATTENTION_INPUT", None)
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        found = [layer for layer in layers if kind is not None and layer.type == kind]
        for layer in found:
            layer.__class__ = self._trt.IAttentionInputLayer  # the binding returns the base class
        return found

    def _config(self, spec: GraphSpec, progress: Callable[[float], None]) -> Any:
        config = self._builder.create_builder_config()
        if self._capabilities:
            config.num_compute_capabilities = len(self._capabilities)
            for index, capability in enumerate(self._capabilities):
                config.set_compute_capability(capability, index)
        if hasattr(self._trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # TensorRT-RTX: otherwise an engine may allocate memory while it runs, and then no CUDA graph can capture it.
            config.set_flag(self._trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        # On by default: products in float32 would round their inputs to 10 bits, as float16 does.
        config.clear_flag(self._trt.BuilderFlag.TF32)
        config.progress_monitor = _make_monitor(self._trt, progress)
        if self._timing_cache is not None:
            held = self._timing_cache.read_bytes() if self._timing_cache.is_file() else b""
            cache = config.create_timing_cache(held)
            if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
                _logger.warning("%s: is of another GPU or TensorRT: it is written anew", self._timing_cache)
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        for shapes in profiles(spec, self._batch):
            profile = self._builder.create_optimization_profile()
            for name, (least, usual, most) in shapes.items():
                profile.set_shape(name, least, usual, most)
            config.add_optimization_profile(profile)
        return config

    def _serialized(self, network: Any, config: Any) -> Any:
        self._log.forget()
        data = self._builder.build_serialized_network(network, config)
        if config.progress_monitor.cancelled:
            raise KeyboardInterrupt
        if data is not None and self._timing_cache is not None and (cache := config.get_timing_cache()) is not None:
            timings = bytes(cache.serialize())
            write_atomically(self._timing_cache, timings, EngineBuildError, "name another --timing-cache")
        return data


def link_files(source: Path, engines: EngineSet, directory: Path) -> None:
    """Put the files of a set into another directory, as hard links if the file system supports them."""
    for file in engines.files:
        try:
            (directory / file).hardlink_to(source / file)
        except OSError:
            shutil.copyfile(source / file, directory / file)


def make_engines(
    directory: Path,
    engines: EngineSet,
    builder: Builder,
    graphs: Sequence[str],
    progress: Callable[[str, float], None],
) -> EngineSet:
    """Build engines next to their graphs; returns the set with them.

    Args:
        directory: directory of the set's files, not yet recorded in a bundle.
        engines: the set before the build.
        builder: builder for the set's target.
        graphs: names of the graphs to build.
        progress: function that gets the name of the current step and the finished share of the whole.

    Raises:
        EngineBuildError: a graph cannot be built.
        OSError: the directory cannot be written.
    """
    machine = machine_id()
    same = (engines.builder, engines.compute_capabilities) == (builder.name, builder.compute_capabilities)
    same = same and engines.built_on == engines.mark(machine)
    # A set has engines of one builder and one machine, for the same GPUs.
    stale = () if same else {spec.file for spec in engines.engines.values()}
    built, furthest = dict(engines.engines) if same else {}, 0.0
    for file_name in stale:
        (directory / file_name).unlink()
    for index, graph in enumerate(graphs):
        spec = engines.graphs[graph]

        def share(done: float, graph: str = graph, index: int = index) -> None:
            nonlocal furthest  # each phase of a build counts from 0 again
            furthest = max(furthest, (index + done) / len(graphs))
            progress(f"building {graph}", furthest)

        share(0.0)
        engine = builder.build(directory / spec.file, spec, share)
        file = directory / f"{graph}.engine"
        file.unlink(missing_ok=True)  # the old file may be a hard link to a set in use
        file.write_bytes(engine.data)
        built[graph] = EngineSpec(file=file.name, layers=engine.layers, attention=engine.attention)
    files = {spec.file: file_spec(directory / spec.file) for spec in built.values()}
    changes = {
        "engines": built,
        "builder": builder.name,
        "compute_capabilities": builder.compute_capabilities,
        "files": {name: file for name, file in engines.files.items() if name not in stale} | files,
    }
    complete = engines.model_copy(update=changes)
    return complete.model_copy(update={"built_on": complete.mark(machine)})


def profiles(spec: GraphSpec, batch_size: int) -> Iterator[dict[str, tuple[tuple[int, ...], ...]]]:
    """Input → (least, usual, most) shape, once for each of :data:`PASSES` that differs for this graph."""
    symbols = {dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, str)}
    capacities = [tensor.shape[2] for tensor in spec.inputs if tensor.name.startswith("past_")]
    room = min((dim for dim in capacities if isinstance(dim, int)), default=PASSES[-1][2])
    for number, (least, usual, most) in enumerate(PASSES if symbols & {"rows", "queries"} else PASSES[:1]):
        if number and PASSES[number - 1][2] >= room:
            return  # the previous profile already covers the whole cache
        rows = (least, min(usual, room), min(most, room))
        # Any number of the last rows of a balcony may be queries.
        queries = rows if "rows" not in symbols else (1, 1, rows[2])
        # Tuned for decode steps of all members and for prompts of one, as in a pool; a batch of one length runs all prompts.
        sizes = {"batch": (1, 1 if number else batch_size, batch_size), "rows": rows, "queries": queries}
        yield {
            tensor.name: tuple(
                tuple(dim if isinstance(dim, int) else sizes[dim][which] for dim in tensor.shape) for which in range(3)
            )
            for tensor in spec.inputs
        }


def _table_entry(tensor: TensorSpec) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tuple(dim if isinstance(dim, int) else -1 for dim in tensor.shape)


def one_line(text: str) -> str:
    """A message of TensorRT on one line, at most 300 characters."""
    return " ".join(text.split())[:300] or "without a message"


def make_log(trt: Any) -> Any:
    """A logger for TensorRT's objects that prints nothing: ``last_error``, ``warnings``, and ``forget()`` for both."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and the last error; defined here because its base class needs TensorRT's import."""

        def __init__(self) -> None:
            super().__init__()
            self.forget()

        def forget(self) -> None:
            self.warnings: list[str] = []
            self.last_error = ""

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last_error = f"{self.last_error} {text}".strip()
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(text)
            _logger.debug("%s", text)

    return Log()


def _make_monitor(trt: Any, progress: Callable[[float], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the progress of a phase, and ends the build at the next step after Ctrl-C."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: Mapping[str, int] = {}
            self.cancelled = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps = {**self.steps, phase_name: num_steps}

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                progress((step + 1) / max(self.steps.get(phase_name, 1), 1))
            except KeyboardInterrupt:  # the library would swallow it
                self.cancelled = True
            return not self.cancelled

    return Monitor()
