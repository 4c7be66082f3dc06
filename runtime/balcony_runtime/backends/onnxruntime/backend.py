"""ONNX Runtime as a backend: sessions on one shared thread pool, bound arrays, KV caches written in place.

Owns sessions and the thread pool; :mod:`.state` owns arrays and bindings. Two measurements explain its form.
Sessions with a pool each spin against one another (32 tokens a second, compared with 174 on one pool), so all share one
(docs/LOG.md, "One shared pool has a price for the host"), unless threads are to sleep between passes (:data:`SLEEPY`). A decode
step through prebound arrays costs 15 µs of Python a session, compared with 100 µs for ``run(numpy)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import GraphSpec, Manifest
from balcony_edge.closing import Closing
from balcony_edge.device.machine import best_threads, checked_threads
from balcony_edge.errors import BundleError, InputError, is_out_of_memory
from balcony_runtime.backends.base import at_once
from balcony_runtime.backends.installed import checked_onnxruntime, first_line, refuse_too_old

if checked_onnxruntime():  # refuses an unusable installation before the modules below import it
    import onnxruntime as ort

from balcony_runtime.backends.graph_files.check import check_graph
from balcony_runtime.backends.graph_files.packed import packed_graphs
from balcony_runtime.backends.onnxruntime.host_memory import mapped, use_large_pages
from balcony_runtime.backends.onnxruntime.memory import Memory
from balcony_runtime.backends.onnxruntime.pool import OnnxRuntimePool
from balcony_runtime.backends.onnxruntime.state import OnnxRuntimeState
from balcony_runtime.backends.token_table import TokenTable

_log = logging.getLogger(__name__)
#: Graphs that are loaded at once. Packing a graph's weights keeps one CPU busy, and takes their bytes again until it ends.
LOADERS = 2
#: Configuration of sessions whose threads sleep between passes: those of the shared pool wait in circles for tens of
#: milliseconds. In a pass they wait so for at most 20 µs; versions before 1.26 know only the first entry.
SLEEPY = {"session.force_spinning_stop": "1", "session.intra_op.spin_duration_us": "20"}
_pool_lock = threading.Lock()
_pool_asked = False
#: Size of the shared pool; None if the application made it.
_pool_threads: int | None = None
_pool_lost = _own_pools = False
#: Sessions with pools of their own.
_pooled: weakref.WeakSet[ort.InferenceSession] = weakref.WeakSet()


def _lose_pool() -> None:
    """In a forked process: the pool cannot be made again, and its threads are in the other process.

    A session with a pool of its own waits for its threads when it is freed. Here they would never end, so it is never freed.
    """
    global _pool_threads, _pool_lost
    if _pool_asked and not _own_pools:
        _pool_threads, _pool_lost = 1, True
    for session in list(_pooled):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_lose_pool)


def open_session(
    graph: Path | bytes,
    *,
    threads: int | None = None,
    spin: bool = True,
    pack_to: Path | None = None,
    optimize: bool = True,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    devices: Sequence[Any] = (),
    entries: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Open a session on the process's shared thread pool and memory arena, which the first call makes.

    ONNX Runtime then requires every later session of the process to use that pool (``use_per_session_threads = False``),
    including sessions of the host application: docs/embedding.md. A pool that the host made earlier is used. If there is none,
    because none can be made any more or its threads must not ``spin``, the session gets one of its own, whose threads sleep
    between passes.

    Args:
        graph: file of the graph, or the graph itself.
        threads: size of the pool; by default :func:`.best_threads`.
        spin: whether the shared pool's threads wait for the next pass in circles. The first session of a process decides.
        pack_to: file to which the graph is also written, with its packed weights in a file next to it.
        optimize: whether ONNX Runtime may change the graph; otherwise its nodes run as they are.
        providers: execution providers of ONNX Runtime, in order of preference.
        devices: device of a provider from a registered library; it takes the place of ``providers``.
        entries: session configuration of ONNX Runtime.

    Raises:
        BundleError: ONNX Runtime cannot run the file.
        InputError: it cannot read the name of the file's directory.
    """
    if isinstance(graph, Path):
        _require_utf8(graph.parent)
    global _pool_asked, _pool_threads, _own_pools  # noqa: PLW0603 - the pool belongs to the process and is requested once
    count = threads or best_threads()
    with _pool_lock:
        if not _pool_asked:
            _pool_asked = True
            if spin:
                # It fails if the host has made a pool; the class of this error differs by version.
                with contextlib.suppress(Exception):
                    ort.set_global_thread_pool_sizes(count, 1)
                    _pool_threads = count
            ort.create_and_register_allocator(
                ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT),
                ort.OrtArenaCfg(0, -1, -1, -1),  # the defaults of a session's own arena, without a limit
            )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if pack_to is not None:
        options.optimized_model_filepath = str(pack_to)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{pack_to.stem}.weights"
        )
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    if devices:
        options.add_provider_for_devices(list(devices), {})
        providers = ()
    options.use_per_session_threads = False
    # Graphs run one after another, so one arena can hold the activations of all; otherwise each session would keep its own.
    options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        try:
            return _quiet_session(graph, options, providers)
        except RuntimeError as error:
            if "EnvCreatedWithGlobalThreadPools" not in str(error):
                raise
        _own_pools = options.use_per_session_threads = True
        options.intra_op_num_threads = count
        for key, value in SLEEPY.items():  # several pools that spin make each other about 5 times slower
            options.add_session_config_entry(key, value)
        session = _quiet_session(graph, options, providers)
        _pooled.add(session)
        return session
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes for an unreadable graph
        name = "a graph in memory" if isinstance(graph, bytes) else graph
        cure = "free memory" if is_out_of_memory(error) else "export it again"
        if "requires procfs" in str(error):  # to see that weights are no links, from 1.32 on
            cure = "mount /proc here"
        raise BundleError(f"{name}: ONNX Runtime cannot load it ({first_line(error)}): {cure}") from error


def _quiet_session(graph: Path | bytes, options: Any, providers: Sequence[Any]) -> ort.InferenceSession:
    model = graph if isinstance(graph, bytes) else str(graph)
    # With the fallback enabled, a session that fails prints a message and tries again with the same provider.
    return ort.InferenceSession(model, options, providers=list(providers), enable_fallback=0)


def check_io(path: Path, spec: GraphSpec, session: ort.InferenceSession) -> None:
    """Refuse a graph whose inputs or outputs differ from the manifest's table."""
    for role, table, found in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        actual = {value.name: (value.type, tuple(value.shape)) for value in found}
        wanted = {one.name: (f"tensor({one.dtype})".replace("float32", "float"), one.shape) for one in table}
        for name in sorted(wanted.keys() ^ actual.keys()):
            side = "has no" if name in wanted else "has an unlisted"
            raise BundleError(f"{path}: the graph {side} {role} {name}: export the bundle again")
        for name, value in wanted.items():
            if actual[name] != value:
                raise BundleError(
                    f"{path}: {role} {name} is {actual[name]}, but the manifest says {value}: export the bundle again"
                )


class OnnxRuntimeBackend(Closing):
    """Sessions of one bundle on the CPU, one per stage, balcony, norm and head."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        spin: bool = True,
        packed: Path | None = None,
        verify_hashes: bool = True,
    ) -> None:
        """Open the sessions.

        Args:
            bundle: bundle to load.
            threads: size of the shared pool; by default :func:`.best_threads`. The first engine of a process decides.
            spin: whether threads wait for the next pass in circles; likewise.
            packed: directory of packed weights, to share them with other processes; see ``graph_files/packed.py``.
            verify_hashes: whether the packed weights are hashed (opening the bundle hashes its own files).

        Raises:
            BundleError: a graph cannot be loaded or differs from the manifest.
            InputError: there are too many threads for the CPUs, or the packed weights cannot be written.
            MissingDependencyError: ONNX Runtime is too old for the bundle.
        """
        self.manifest: Manifest = bundle.manifest
        quantized = self.manifest.quantization
        refuse_too_old(self.manifest.model, None if quantized is None else quantized.kv_bits)
        threads = checked_threads(threads)
        pool: dict[str, Any] = {"threads": threads, "spin": spin}
        self.max_length = self.manifest.model.context_length
        self.picks_inside = False  # logits are in main memory anyway
        self.graphs = "lowered" if self.manifest.cpu else "portable"
        #: Exit → session of its decode step as one graph; only with packed weights, which all sessions share.
        self.paths: dict[int, ort.InferenceSession] = {}
        shared: Mapping[str, Path] = {}
        if packed is not None:
            for place in (bundle.path, packed):  # before anything is written
                _require_utf8(place)

            def pack(source: Path, target: Path) -> None:
                check_graph(source, bundle.manifest.files)  # before ONNX Runtime reads it
                _pack(source, target, **pool)

            shared = packed_graphs(bundle, packed, pack, verify_hashes=verify_hashes)

        def opened(name: str, spec: GraphSpec) -> ort.InferenceSession:
            check_graph(bundle.file(spec.file), bundle.manifest.files)
            path = shared.get(name) or bundle.file(spec.file)
            session = _open(path, path.parent if shared else None, **pool)
            check_io(path, spec, session)
            return session

        before = mapped()
        graphs = dict(bundle.manifest.runnable)
        graphs.pop("backbone", None)  # the stages contain its layers
        # The largest first: what packing them takes for a while is then free again for the others.
        largest = sorted(graphs, key=lambda name: -graphs[name].weight_bytes)
        loaded = dict(zip(largest, at_once(lambda name: opened(name, graphs[name]), largest, LOADERS), strict=True))
        self.sessions = {name: loaded[name] for name in graphs}
        for layer in bundle.manifest.exit_layers if shared else ():
            path = shared[f"path_{layer}"]
            self.paths[layer] = _open(path, path.parent, optimize=False, **pool)
        self.threads = _pool_threads or threads
        if _pool_lost and threads > 1:
            why = "the process from which this one was forked had loaded a bundle before: load none there, or spawn"
            _log.warning("%s: runs on one thread instead of %d: %s", bundle.path, threads, why)
        _trim_heap()
        use_large_pages(before)
        self.table = TokenTable(bundle)
        self.dtype = self.table.dtype
        self.name = "onnxruntime"
        self.most_members: int | None = None
        #: States and pools, whose bindings hold sessions.
        self.users: weakref.WeakSet[OnnxRuntimeState | OnnxRuntimePool] = weakref.WeakSet()

    def new_state(self, batch_size: int, max_length: int) -> OnnxRuntimeState:
        """Memory for one sequence; see :class:`balcony_runtime.backends.base.Backend`."""
        return OnnxRuntimeState(self, Memory.allocate(self.manifest, self.dtype, batch_size, max_length))

    def new_pool(self, members: int, max_length: int) -> OnnxRuntimePool | None:
        """Memory for sequences that share passes.

        Only the lowered graphs can take members at lengths of their own. Recurrent states take turns between two places, and
        members of a pass would have to be at the same one; so sequences with such states run alone.
        """
        if not self.manifest.cpu or self.manifest.model.recurrent:
            return None
        return OnnxRuntimePool(self, members, max_length)

    def close(self) -> None:
        """Free the sessions, and let go of the bundle's files."""
        self.sessions.clear()
        self.paths.clear()
        self.table.close()
        for user in list(self.users):
            user.forget_programs()


def _require_utf8(path: Path) -> None:
    """Refuse a name that ONNX Runtime would look for under other bytes: it is given text, and makes UTF-8 of it."""
    if os.fsencode(path) != str(path).encode(errors="replace"):
        raise InputError(
            f"{path}: ONNX Runtime reads names of UTF-8 only, in a locale of UTF-8 (now {sys.getfilesystemencoding()}): "
            "rename it, or set LC_ALL=C.UTF-8"
        )


def _open(path: Path, packed: Path | None, **options: Any) -> ort.InferenceSession:
    """Open a session on a graph of the bundle, or of a directory of packed weights."""
    try:
        return open_session(path, **options)
    except BundleError as error:
        if packed is None or is_out_of_memory(error.__cause__):
            raise
        raise BundleError(
            f"{packed}: the packed weights are damaged: remove it; the next load makes them again"
        ) from error


def _trim_heap() -> None:
    """Return the temporary memory of packing, as large as the weights, to the system; the C library would keep it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # only glibc has this function
            ctypes.CDLL(None).malloc_trim(0)


def _pack(source: Path, target: Path, **pool: Any) -> None:
    """Write the packed form of a graph.

    Raises:
        BundleError: the graph cannot be loaded, or there is too little memory to pack it.
        OSError: the graph can be loaded, but its packed form cannot be written. ONNX Runtime does not tell the two apart.
    """
    try:
        open_session(source, pack_to=target, **pool)
    except BundleError as error:
        if is_out_of_memory(error.__cause__):  # packing takes more of it than loading
            raise
        open_session(source, **pool)
        free_mb = shutil.disk_usage(target.parent).free // 10**6
        raise OSError(errno.EIO, f"ONNX Runtime failed with {free_mb} MB free on the disk") from error
