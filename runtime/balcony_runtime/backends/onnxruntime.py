"""ONNX Runtime as a backend: sessions on one shared thread pool, everything bound, KV caches written in place.

Owns: sessions, thread pool, bindings and the arrays behind them. Measured facts that shaped it (docs/LOG.md): sessions
with a pool each spin against one another (32 tokens a second where one pool gives 174), so all share one; a decode step
through prebound arrays costs 15 µs a session in Python where ``run(numpy)`` costs 100; and standard ``Attention`` pays
for the whole key length that it is given, so caches are bound as prefixes of bucketed length.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle import Bundle, GraphSpec, Manifest
from balcony_edge.errors import BundleError, MissingDependencyError
from balcony_runtime.backends.base import FloatArray, IntArray

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingDependencyError(
        "ONNX Runtime is not installed: pip install 'balcony-edge[cpu]' (or '[gpu]', never both: they overwrite each other)"
    ) from error

if _both := [d for d in ("onnxruntime", "onnxruntime-gpu") if any(importlib.metadata.distributions(name=d))][1:]:
    raise MissingDependencyError(
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
        "pip uninstall onnxruntime onnxruntime-gpu, then install 'balcony-edge[cpu]' or 'balcony-edge[gpu]'"
    )

#: KV capacity is bound in steps of so many rows: what attention pays for is at most this much more than what is live.
BUCKET = 128

_pool_lock = threading.Lock()
_pool_asked = False


def default_threads() -> int:
    """Number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(path: Path, *, threads: int | None = None, profile_prefix: Path | None = None) -> ort.InferenceSession:
    """A session on the process's shared thread pool, which the first call makes.

    ONNX Runtime then wants every later session of the process on that pool (``use_per_session_threads = False``), those
    of the host application included: docs/embedding.md. Where the host made a pool before, that one is used; where a
    pool cannot be made any more, the session gets one of its own that does not spin.

    Raises:
        BundleError: the file is no graph that ONNX Runtime can run.
    """
    global _pool_asked  # noqa: PLW0603 - the pool is the process's, not an object's: it is asked for once
    count = threads or default_threads()
    with _pool_lock:
        if not _pool_asked:
            _pool_asked = True
            with contextlib.suppress(RuntimeError):  # the host made one
                ort.set_global_thread_pool_sizes(count, 1)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    options.use_per_session_threads = False
    try:
        try:
            return _quiet_session(path, options)
        except RuntimeError as error:
            if "EnvCreatedWithGlobalThreadPools" not in str(error):
                raise
        options.use_per_session_threads = True
        options.intra_op_num_threads = count
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # pools that spin cost each other 5 ×
        return _quiet_session(path, options)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes for an unreadable graph
        raise BundleError(f"{path}: ONNX Runtime cannot load it ({_first_line(error)}): export it again") from error


def _quiet_session(path: Path, options: Any) -> ort.InferenceSession:
    # with its fallback on, a session that fails prints and tries again with the same provider
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _check_io(path: Path, spec: GraphSpec, session: ort.InferenceSession) -> None:
    """Refuse a graph whose inputs or outputs are not those of the manifest's table."""
    kinds = {"float32": "tensor(float)", "float16": "tensor(float16)", "int64": "tensor(int64)"}
    for role, table, found in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        actual = {value.name: (value.type, tuple(value.shape)) for value in found}
        wanted = {tensor.name: (kinds[tensor.dtype], tensor.shape) for tensor in table}
        for name in wanted.keys() ^ actual.keys():
            side = "has no" if name in wanted else "has an unlisted"
            raise BundleError(f"{path}: the graph {side} {role} {name}: export the bundle again")
        for name, value in wanted.items():
            if actual[name] != value:
                raise BundleError(
                    f"{path}: {role} {name} is {actual[name]}, the manifest says {value}: export it again"
                )


class OnnxRuntimeBackend:
    """Sessions of one bundle on the CPU, one per stage, balcony, norm and head."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, profile_prefix: Path | None = None) -> None:
        """Open the sessions.

        Args:
            bundle: what to load.
            threads: size of the shared pool; by default the CPUs of this process. The first engine of a process decides.
            profile_prefix: where ONNX Runtime writes one profile per graph when the backend is closed.

        Raises:
            BundleError: a graph cannot be loaded or differs from the manifest.
        """
        self.manifest: Manifest = bundle.manifest
        self._profile_prefix = profile_prefix
        layers = bundle.manifest.exit_layers
        names = dict.fromkeys(name for exit_layer in layers for name in bundle.manifest.path_graphs(exit_layer))
        self.sessions: dict[str, ort.InferenceSession] = {}
        for name in names:
            spec = bundle.manifest.graphs[name]
            path = bundle.file(spec.file)
            prefix = None if profile_prefix is None else profile_prefix / name
            session = open_session(path, threads=threads, profile_prefix=prefix)
            _check_io(path, spec, session)
            self.sessions[name] = session
        embedding = bundle.manifest.embedding
        dtype = np.dtype(embedding.dtype)
        # as a plain array: indexing a memmap object costs 10 µs more
        self.table: npt.NDArray[Any] = np.asarray(
            np.memmap(bundle.file(embedding.file), dtype, mode="r", offset=embedding.offset, shape=embedding.shape)
        )
        self.dtype = dtype
        self.scale = dtype.type(embedding.scale)

    def embedded(self, tokens: IntArray) -> npt.NDArray[Any]:
        """Rows of the token table, scaled as the model does: any shape of tokens, one axis of D more."""
        rows = self.table[tokens]
        return rows if self.scale == 1 else rows * self.scale

    def new_state(self, batch_size: int, max_length: int) -> OnnxRuntimeState:
        """Memory for one sequence; see :class:`balcony_runtime.backends.base.Backend`."""
        return OnnxRuntimeState(self, batch_size, max_length)

    def close(self) -> None:
        """Free the sessions."""
        for session in self.sessions.values():
            if self._profile_prefix is not None:
                session.end_profiling()
        self.sessions.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Cache:
    """KV tensors of one graph, bound as prefixes of a capacity that grows in buckets.

    Each tensor is one flat array of batch × max_length rows (zeros that the system hands out as they are touched), so for
    one sequence growing binds a longer prefix and moves nothing; for a batch the rows of each member move apart.
    """

    def __init__(self, graph: GraphSpec, dtype: np.dtype[Any], batch_size: int, max_length: int, width: int) -> None:
        self.names = [tensor.name for tensor in graph.inputs if tensor.name.startswith("past_")]
        self.batch_size, self.width = batch_size, width
        self.max_capacity = -(-max_length // BUCKET) * BUCKET
        self.capacity = 0
        self._flat = [np.zeros(batch_size * self.max_capacity * width, dtype) for _ in self.names]
        self.values: list[Any] = []

    def reserve(self, rows: int) -> bool:
        """Bind room for ``rows`` rows; True when the bindings changed."""
        if rows <= self.capacity:
            return False
        capacity = min(-(-rows // BUCKET) * BUCKET, self.max_capacity)
        self.values = []
        for flat in self._flat:
            new = self._view(flat, capacity)
            old = self._view(flat, self.capacity)
            for member in range(self.batch_size - 1, 0, -1):
                new[member, : self.capacity] = old[member].copy()
                new[member, self.capacity :] = 0
            self.values.append(ort.OrtValue.ortvalue_from_numpy(new))
        self.capacity = capacity
        return True

    def _view(self, flat: npt.NDArray[Any], capacity: int) -> npt.NDArray[Any]:
        return flat[: self.batch_size * capacity * self.width].reshape(self.batch_size, capacity, self.width)

    def bind(self, binding: Any) -> None:
        for name, value in zip(self.names, self.values, strict=True):
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_", "present_", 1), value)

    @property
    def nbytes(self) -> int:
        item = self._flat[0].itemsize if self._flat else 0
        return len(self._flat) * self.batch_size * self.capacity * self.width * item


class OnnxRuntimeState:
    """One sequence's rows and caches in main memory; implements :class:`balcony_runtime.backends.base.State`.

    Passes of one row run over bindings made once: the output array of stage i is the input array of stage i + 1 and of the
    balcony between them. A decode step is a list of such bindings, run one after the other: Python's caches are cold after
    every pass that swept the weights, so what it does in between is kept to a few calls. Passes of more rows bind arrays of
    their own.
    """

    def __init__(self, backend: OnnxRuntimeBackend, batch_size: int, max_length: int) -> None:
        manifest = backend.manifest
        self._backend, self._batch, self._manifest = backend, batch_size, manifest
        self.busy_ns = 0
        dim, dtype, width = manifest.model.hidden_size, backend.dtype, manifest.model.kv_width
        layers = manifest.exit_layers
        self._layers = (0, *layers)  # of each boundary
        boundaries = len(self._layers)
        self._rows = np.zeros((boundaries, batch_size, max_length, dim), dtype)
        self._row = np.zeros((boundaries, batch_size, 1, dim), dtype)  # the one row of a bound pass, at each boundary
        self._row_values = [_value(row) for row in self._row]
        self._hidden = _value(np.zeros((batch_size, 1, dim), dtype))
        self._logits = np.zeros((batch_size, 1, manifest.model.vocab_size), np.float32)
        self._start = np.zeros(batch_size, np.int64)
        self._start_value = _value(self._start)
        cached = [f"stage_{i}" for i in range(len(layers))] + [manifest.exit_graph(e) for e in layers[:-1]]
        self._caches = {name: _Cache(manifest.graphs[name], dtype, batch_size, max_length, width) for name in cached}
        self._bound: dict[str, Any] = {}  # graph → binding of its one-row pass
        self._programs: dict[int, tuple[int, list[tuple[Any, Any]]]] = {}  # exit → rows it is good for, what to run
        self._queries: Any = None

    @property
    def memory_bytes(self) -> int:
        """Bytes of row buffers and of KV caches at their bound capacity."""
        return self._rows.nbytes + sum(cache.nbytes for cache in self._caches.values())

    def decode(self, exit_index: int, ids: IntArray, row: int) -> FloatArray:
        """One row through all graphs on the way to an exit."""
        good_for, program = self._programs.get(exit_index, (0, []))
        if row >= good_for:
            good_for, program = self._programs[exit_index] = self._program(exit_index, row)
        self._row[0, :, 0] = self._backend.embedded(ids)
        self._start.fill(row)
        for run, binding in program:
            begin = time.perf_counter_ns()
            run(binding)
            self.busy_ns += time.perf_counter_ns() - begin
        used = exit_index + 2
        self._rows[:used, :, row] = self._row[:used, :, 0]
        return self._logits[:, 0]

    def embed(self, tokens: IntArray, start: int) -> None:
        """Write token embeddings to boundary 0."""
        self._rows[0, :, start : start + tokens.shape[1]] = self._backend.embedded(tokens)  # (B, n, D)

    def run_stage(self, stage: int, start: int, stop: int) -> None:
        """Take rows of boundary ``stage`` to boundary ``stage + 1``."""
        name = f"stage_{stage}"
        self._reserve(name, stop)
        self._start.fill(start)
        if stop - start == 1:
            self._row[stage, :, 0] = self._rows[stage, :, start]
            self._run(name, self._one_row(name))
            self._rows[stage + 1, :, start] = self._row[stage + 1, :, 0]
            return
        rows = np.ascontiguousarray(self._rows[stage, :, start:stop])
        out = np.empty_like(rows)
        source, target = f"hidden_{self._layers[stage]}", f"hidden_{self._layers[stage + 1]}"
        self._run(name, self._bind(name, {source: _value(rows)}, {target: _value(out)}))
        self._rows[stage + 1, :, start:stop] = out

    def run_exit(self, exit_index: int, start: int, stop: int, num_queries: int) -> None:
        """Run the balcony or the norm of an exit over rows of its boundary."""
        name, boundary = self._manifest.exit_graph(self._layers[exit_index + 1]), exit_index + 1
        full = name not in self._caches
        start = stop - num_queries if full else start
        self._reserve(name, stop)
        self._start.fill(start)
        if stop - start == 1:
            self._row[boundary, :, 0] = self._rows[boundary, :, start]
            self._run(name, self._one_row(name))
            self._queries = None
            return
        rows = np.ascontiguousarray(self._rows[boundary, :, start:stop])
        asked = np.ascontiguousarray(rows[:, rows.shape[1] - num_queries :])
        out = _value(np.empty_like(asked))
        values = {"hidden": _value(asked)} if full else {"rows": _value(rows), "queries": _value(asked)}
        self._run(name, self._bind(name, values, {"normed" if full else "hidden": out}))
        self._queries = out

    def logits(self, num_queries: int) -> FloatArray:
        """Run the head over what :meth:`run_exit` left."""
        if self._queries is None:
            self._run("lm_head", self._one_row("lm_head"))
            return self._logits.copy()
        logits = np.empty((self._batch, num_queries, self._logits.shape[2]), np.float32)
        self._run("lm_head", self._bind("lm_head", {"hidden": self._queries}, {"logits": _value(logits)}))
        return logits

    def _program(self, exit_index: int, row: int) -> tuple[int, list[tuple[Any, Any]]]:
        """``(rows that it is good for, (run, binding) of each graph)`` of the decode step at an exit."""
        names = self._manifest.path_graphs(self._layers[exit_index + 1])
        for name in names:
            self._reserve(name, row + 1)
        good_for = min(self._caches[name].capacity for name in names if name in self._caches)
        return good_for, [(self._backend.sessions[name].run_with_iobinding, self._one_row(name)) for name in names]

    def _reserve(self, name: str, rows: int) -> None:
        """Make room in a graph's cache; where that moves its bindings, those that were made are dropped."""
        if name in self._caches and self._caches[name].reserve(rows):
            self._bound.pop(name, None)
            self._programs.clear()

    def _one_row(self, name: str) -> Any:
        """The binding of a graph's one-row pass."""
        if name not in self._bound:
            if name.startswith("stage_"):
                stage = int(name.removeprefix("stage_"))
                inputs = {f"hidden_{self._layers[stage]}": self._row_values[stage]}
                outputs = {f"hidden_{self._layers[stage + 1]}": self._row_values[stage + 1]}
            elif name == "lm_head":
                inputs, outputs = {"hidden": self._hidden}, {"logits": _value(self._logits)}
            elif name == "norm":
                inputs, outputs = {"hidden": self._row_values[-1]}, {"normed": self._hidden}
            else:
                row = self._row_values[self._layers.index(int(name.removeprefix("balcony_")))]
                inputs, outputs = {"rows": row, "queries": row}, {"hidden": self._hidden}
            self._bound[name] = self._bind(name, inputs, outputs)
        return self._bound[name]

    def _bind(self, name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
        binding = self._backend.sessions[name].io_binding()
        for key, value in inputs.items():
            binding.bind_ortvalue_input(key, value)
        for key, value in outputs.items():
            binding.bind_ortvalue_output(key, value)
        if name in self._caches:
            binding.bind_ortvalue_input("start", self._start_value)
            self._caches[name].bind(binding)
        return binding

    def _run(self, name: str, binding: Any) -> None:
        begin = time.perf_counter_ns()
        try:
            self._backend.sessions[name].run_with_iobinding(binding)
        except RuntimeError as error:  # the tables fit, so it is inside the graph, or memory ran out
            raise BundleError(
                f"{name}.onnx: ONNX Runtime failed while running it ({_first_line(error)}): free memory, or export again"
            ) from error
        self.busy_ns += time.perf_counter_ns() - begin


def _value(array: npt.NDArray[Any]) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array)  # wraps the array on the CPU, no copy
