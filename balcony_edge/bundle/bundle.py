"""The bundle: the directory that export writes and the runtime loads, described by its :mod:`.manifest`.

This module owns the fingerprint, the writing of manifests and every check that needs no engine: presence, sizes and hashes of
files, and tables that follow from the model's sizes and exits. It does not know how graphs are made or run: the backend that
opens a graph checks that its real inputs equal the table. Engine sets are :mod:`.engine_sets`, measurements :mod:`.quality`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import pydantic

from balcony_edge.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    STATES,
    WEIGHTS,
    FileSpec,
    GraphSpec,
    Manifest,
    TensorSpec,
    one_line,
)
from balcony_edge.errors import BundleError
from balcony_edge.files import exists, locked, require_path, write_atomically

#: Directory of the engine sets inside a bundle.
ENGINES = "tensorrt"


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over the hashes of graphs and weights and over the keys that the runtime needs to run them."""
    files: dict[str, dict[str, Any]] = manifest["files"]
    core = {
        "schema_version": manifest["schema_version"],
        "precision": manifest["precision"],
        "embedding": manifest["embedding"],
        "quantization": manifest["quantization"],
        "graphs": manifest["graphs"],
        "cpu": manifest["cpu"],
        "files": {name: spec["sha256"] for name, spec in files.items() if name.endswith((".onnx", ".bin"))},
    }
    return hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Bundle:
    """A bundle on disk whose manifest was read and whose files were checked.

    Example:
        exits = Bundle.open("bundle/").manifest.exits

    Attributes:
        path: directory of the bundle.
        manifest: typed content of ``bundle.json``.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify_hashes: bool = True) -> Bundle:
        """Read the manifest and check the files against it.

        Args:
            path: directory of the bundle.
            verify_hashes: whether every file is hashed; otherwise only presence and size are checked.

        Raises:
            BundleError: one line that names the file and the problem.
        """
        with cls.opening(path, verify_hashes=verify_hashes) as bundle:
            return bundle

    @classmethod
    @contextlib.contextmanager
    def opening(cls, path: str | os.PathLike[str], *, verify_hashes: bool = True) -> Iterator[Self]:
        """:meth:`open` for a caller that has other work to do meanwhile: the weights are hashed while the block runs.

        Everything else was checked before, so that the block reads no damaged graph. A damaged file of weights is an error at
        the block's end, also in place of another error.
        """
        require_path(path, "bundle", BundleError, "give the path of a bundle's directory")
        directory = Path(path)
        manifest = read_manifest(directory)
        _check_structure(directory, manifest)
        for name, spec in manifest.files.items():
            _check_file(directory / name, spec, verify_hashes and name != WEIGHTS)
        weights = directory / WEIGHTS, manifest.files[WEIGHTS]
        errors: list[Exception] = []

        def hash_weights() -> None:
            try:
                _check_file(*weights, verify_hashes)
            except Exception as error:
                errors.append(error)

        hashing = threading.Thread(target=hash_weights, name="hash of the weights", daemon=True)
        hashing.start()
        try:
            yield cls(directory, manifest)
        except Exception as error:
            hashing.join()
            if errors:
                raise errors[0] from error
            raise
        hashing.join()
        if errors:
            raise errors[0]

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists."""
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path}: the manifest does not list {name}: it lists {_names(self.manifest.files)}: "
                "export the bundle again"
            )
        return self.path / name

    def portable(self) -> Bundle:
        """The same bundle with only its graphs in standard ONNX, for engines other than ONNX Runtime's CPU kernels.

        Raises:
            BundleError: the bundle has no graphs in standard ONNX.
        """
        if not self.manifest.graphs:
            raise BundleError(
                f"{self.path}: precision {self.manifest.precision} has no graphs in standard ONNX: "
                "export with fp32 or fp16 for other engines"
            )
        return Bundle(self.path, self.manifest.model_copy(update={"cpu": {}}))

    def engine_directory(self, name: str, *, verify_hashes: bool = True) -> Path:
        """Check the files of an engine set, as :meth:`open` checks those of the bundle, and return its directory.

        Raises:
            BundleError: ``manifest.engines`` has no such set, or a file is missing or damaged.
        """
        if name not in self.manifest.engines:
            known = _names(self.manifest.engines) or "none yet"
            raise BundleError(
                f"{self.path}: has no engine set {name} (it has: {known}): make one with `balcony-edge build`"
            )
        directory = self.path / ENGINES / (self.manifest.engines[name].directory or name)
        for file, spec in self.manifest.engines[name].files.items():
            _check_file(directory / file, spec, verify_hashes)
        return directory


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def read_manifest(directory: Path) -> Manifest:
    """Read ``bundle.json`` without checking the files that it lists.

    Raises:
        BundleError: the directory is not a bundle, or its manifest is damaged or of another version.
    """
    path = directory / MANIFEST
    try:
        if not exists(directory):
            raise BundleError(
                f"{one_line(str(directory))}: there is no such directory: name a bundle that `balcony-edge export` wrote"
            )
        if directory.name == MANIFEST and directory.is_file():
            raise BundleError(f"{directory}: is a file of a bundle: give the bundle's directory, {directory.parent}")
        if not exists(path) or not path.is_file():
            raise BundleError(
                f"{directory}: is not a bundle (it has no {MANIFEST}): make one with `balcony-edge export`"
            )
    except OSError as error:  # a name that is too long, or a directory that may not be entered
        raise BundleError(
            f"{one_line(str(directory))}: cannot be read ({error.strerror}): make it readable, or name another bundle"
        ) from error
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}): make it readable") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not readable as JSON ({error}): export the bundle again") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise BundleError(
            f"{path}: schema_version = {one_line(repr(version))}, but this version of balcony-edge reads {SCHEMA_VERSION}: "
            "export the bundle again, or install the version that wrote it"
        )
    try:
        return Manifest.model_validate(document)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {one_line(key)}: {one_line(first['msg'])}: export the bundle again") from error


def _check_structure(directory: Path, manifest: Manifest) -> None:
    """Check what the types cannot express: exits ascend to the full depth, and every graph and file that they need exists."""
    path, layers, depth = directory / MANIFEST, manifest.exit_layers, manifest.model.num_layers

    def refuse(what: str) -> BundleError:
        return BundleError(f"{path}: {what}: export the bundle again")

    if len(manifest.model.layers) not in (0, depth) or any((exit_.layer or 0) >= depth for exit_ in manifest.exits):
        raise refuse(f"model.layers or the layer of an exit does not fit a model of {depth} layers")
    if list(layers) != sorted(set(layers)) or layers[-1] != depth:
        raise refuse(f"exits {one_line(str(layers))} must ascend and end at the full depth {depth}")
    if not manifest.runnable:
        raise refuse("the manifest lists no graphs")
    if manifest.precision in ("int8", "int4") and manifest.graphs:
        raise refuse(f"a bundle of precision {manifest.precision} must not have these graphs")
    _check_quantization(manifest, refuse)
    needed = {"lm_head", *(f"stage_{i}" for i in range(len(layers))), *(manifest.exit_graph(e) for e in layers)}
    files = {manifest.embedding.file, WEIGHTS, "tokenizer.json"}
    for graphs, lowered in ((manifest.graphs, False), (manifest.cpu, True)):
        wanted = needed | ({f"balcony_{e}_keys" for e in manifest.cached_exits} if lowered else set())
        if graphs and (missing := wanted - graphs.keys()):
            raise refuse(f"the manifest does not list the graphs {_names(missing)}")
        for name in sorted(wanted) if graphs else ():
            _check_tables(manifest, graphs[name], name, lowered, refuse)
            files.add(graphs[name].file)
    if missing := files - manifest.files.keys():
        raise refuse(f"the manifest does not list the files {_names(missing)}")
    embedding = manifest.embedding
    if embedding.shape != (manifest.model.vocab_size, manifest.model.hidden_size):
        raise refuse(f"embedding.shape {embedding.shape} differs from the model's vocabulary and hidden size")
    if embedding.dtype != manifest.float_dtype:
        raise refuse(f"embedding.dtype {embedding.dtype} differs from the precision {manifest.precision}")
    end = max(offset + size for offset, size in embedding.regions)
    if end > manifest.files[embedding.file].bytes:
        raise refuse(f"the embedding ends at byte {end}, past the end of {embedding.file}")
    if fingerprint(manifest.model_dump(mode="json")) != manifest.fingerprint:
        raise refuse("the fingerprint differs from that of the listed graphs and weights")


def _check_quantization(manifest: Manifest, refuse: Callable[[str], BundleError]) -> None:
    quantized, blocks = manifest.quantization, manifest.embedding.blocks
    if (manifest.precision in ("int8", "int4")) != (quantized is not None) or (quantized is None) != (blocks is None):
        raise refuse("quantization and embedding.blocks must be present if, and only if, precision is int8 or int4")
    if quantized is not None and f"int{quantized.bits}" != manifest.precision:
        raise refuse(f"quantization.bits = {quantized.bits} differs from the precision {manifest.precision}")


def _check_tables(
    manifest: Manifest, graph: GraphSpec, name: str, lowered: bool, refuse: Callable[[str], BundleError]
) -> None:
    """Refuse a graph whose listed inputs and outputs do not follow from the model's sizes and the exits."""
    for role, listed, wanted in zip(
        ("input", "output"), (graph.inputs, graph.outputs), _tables(manifest, name, lowered), strict=True
    ):
        found = {tensor.name: (tensor.dtype, len(tensor.shape), _sizes(tensor)) for tensor in listed}
        if found != wanted or len(found) != len(listed):
            wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            if not wrong:
                raise refuse(f"an {role} of {name} is listed twice")
            raise refuse(f"{role} {wrong[0]} of {name} does not match the model's sizes and exits")


def _sizes(tensor: TensorSpec) -> tuple[int, ...]:
    return tuple(dim for dim in tensor.shape if isinstance(dim, int))


#: (dtype, number of dimensions, the dimensions that are numbers)
_Kind = tuple[str, int, tuple[int, ...]]


def _tables(manifest: Manifest, name: str, lowered: bool) -> tuple[dict[str, _Kind], dict[str, _Kind]]:
    """``(inputs, outputs)`` of a graph, by the I/O tables of :mod:`.manifest`."""
    model, dtype = manifest.model, manifest.float_dtype
    hidden: _Kind = (dtype, 3, (model.hidden_size,))

    def kept(part: str, layer: int) -> _Kind:
        if lowered and part in ("key", "value"):
            return (manifest.kv_dtype, 4, (model.num_kv_heads, model.head_dim))
        sizes = model.sizes(part, layer)
        return ("float32" if part == "state" else dtype, len(sizes) + (1 if part in STATES else 2), sizes)

    start: dict[str, _Kind] = {"start": ("int64", 1, ())}
    where: dict[str, _Kind] = {"last": ("int32", 1, ()), "total": ("int32", 0, ())} if lowered else start
    if name == "lm_head":
        return {"hidden": hidden}, {"logits": ("float32", 3, (model.vocab_size,))}
    if name == "norm" or name in {f"balcony_{e}" for e in set(manifest.exit_layers) - set(manifest.cached_exits)}:
        return {"hidden": hidden}, {"normed": hidden}
    if name.startswith("balcony_"):
        keys_only = name.endswith("_keys")
        inputs = dict.fromkeys(("rows",) if lowered else ("rows", "queries"), hidden)
        where = start if keys_only else where
        outputs = {} if keys_only else {"hidden": hidden}
        exit_layer = int(name.removeprefix("balcony_").removesuffix("_keys"))
        layers = {"": manifest.balcony_layer(exit_layer)}
    else:
        first, last = manifest.stage_bounds[int(name.removeprefix("stage_"))]
        inputs, outputs = {f"hidden_{first}": hidden}, {f"hidden_{last}": hidden}
        if lowered and last == model.num_layers:
            outputs["normed"] = hidden
        layers = {f"_{layer}": layer for layer in range(first, last)}
    memory = {
        f"{part}{suffix}": kept(part, layer) for suffix, layer in layers.items() for part in model.memory(layer).parts
    }
    return (
        {**inputs, **where, **{f"past_{key}": kind for key, kind in memory.items()}},
        {**outputs, **{f"present_{key}": kind for key, kind in memory.items()}},
    )


def _check_file(path: Path, spec: FileSpec, verify_hashes: bool) -> None:
    if path.is_symlink() or not path.is_file():
        what, how = ("is a link", "with what its links name (cp -RL)") if path.is_symlink() else ("is missing", "whole")
        raise BundleError(f"{path}: {what}, but a bundle holds every file itself: copy it {how} or export it again")
    size = path.stat().st_size
    if size != spec.bytes:
        raise BundleError(f"{path}: {size} bytes, but the manifest says {spec.bytes}: copy the bundle again")
    if not verify_hashes:
        return
    try:
        found = sha256_file(path)
    except OSError as error:
        raise BundleError(
            f"{path}: not readable ({error.strerror}): check its permissions, or copy the bundle again"
        ) from error
    if found != spec.sha256:
        raise BundleError(
            f"{path}: SHA-256 {found[:12]}… differs from the manifest's {spec.sha256[:12]}…: copy the bundle again"
        )


def write_manifest(directory: Path, document: dict[str, Any]) -> Manifest:
    """Hash the files of ``directory``, complete ``document`` with files and fingerprint, and write ``bundle.json``.

    Args:
        directory: the bundle under construction; every file in it becomes part of the bundle.
        document: all keys of :class:`Manifest` except ``schema_version``, ``files`` and ``fingerprint``.
    """
    files = {path.name: file_spec(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    draft = Manifest.model_validate({"schema_version": SCHEMA_VERSION, **document, "files": files, "fingerprint": ""})
    manifest = draft.model_copy(update={"fingerprint": fingerprint(draft.model_dump(mode="json"))})
    replace_manifest(directory, manifest)
    return manifest


def file_spec(path: Path) -> FileSpec:
    """Size and hash of a file."""
    return FileSpec(bytes=path.stat().st_size, sha256=sha256_file(path))


def manifest_lock(directory: Path) -> AbstractContextManager[None]:
    """The lock of who reads, changes and replaces ``bundle.json``.

    It is that of the weights, which nobody replaces; an export holds the directory's own lock while it is written.
    """
    return locked(directory / WEIGHTS)


def replace_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``bundle.json`` in one step.

    Raises:
        BundleError: the directory cannot be written.
    """
    content = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    write_atomically(directory / MANIFEST, content.encode(), BundleError, "free space or make it writable")
