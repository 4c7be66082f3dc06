"""The bundle: the directory that export writes and the runtime loads, described by its :mod:`.manifest`.

This module owns the fingerprint and every check that needs no engine: files present, sizes and hashes right, names that stay
inside the directory, tables that are what sizes and exits ask for. It does not know how graphs are made or run; that the
graphs' real inputs equal the tables is checked by the backend that opens them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic

from balcony_edge.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    WEIGHTS,
    ConfidenceSpec,
    EngineSet,
    FileSpec,
    GraphSpec,
    Manifest,
    Quality,
    TensorSpec,
    TextQuality,
)
from balcony_edge.errors import BundleError
from balcony_edge.files import locked, partial_directory, write_atomically

#: Directory of the engine sets in a bundle.
ENGINES = "tensorrt"


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over the hashes of graphs and weights and over what the runtime needs to run them."""
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

    Attributes:
        path: the directory.
        manifest: its typed manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify_hashes: bool = True) -> Bundle:
        """Read the manifest and check the files against it.

        Args:
            path: the bundle's directory.
            verify_hashes: hash every file; without it only presence and size are checked.

        Raises:
            BundleError: one line that names the file and what is wrong with it.
        """
        directory = Path(path)
        manifest = _read_manifest(directory)
        _check_structure(directory, manifest)
        for name, spec in manifest.files.items():
            _check_file(directory / name, spec, verify_hashes)
        return cls(directory, manifest)

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no file {name}: it has {_names(self.manifest.files)}")
        return self.path / name

    def portable(self) -> Bundle:
        """The same bundle with its graphs in standard ONNX alone: what other engines are given.

        Raises:
            BundleError: it has none.
        """
        if not self.manifest.graphs:
            raise BundleError(
                f"{self.path}: precision {self.manifest.precision} has no graphs in standard ONNX: "
                "export with fp32 or fp16 for other engines"
            )
        return Bundle(self.path, self.manifest.model_copy(update={"cpu": {}}))

    def engine_directory(self, name: str, *, verify_hashes: bool = True) -> Path:
        """Directory of an entry of ``manifest.engines`` whose files were checked as those of the bundle are.

        Raises:
            BundleError: there is no such entry, or a file is missing or damaged.
        """
        if name not in self.manifest.engines:
            known = _names(self.manifest.engines) or "none yet"
            raise BundleError(f"{self.path}: has no engines {name}, but {known}: make them with `balcony-edge build`")
        directory = self.path / ENGINES / (self.manifest.engines[name].directory or name)
        for file, spec in self.manifest.engines[name].files.items():
            _check_file(directory / file, spec, verify_hashes)
        return directory

    def has_file(self, name: str) -> bool:
        """Whether the manifest lists this file."""
        return name in self.manifest.files


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _line(text: str) -> str:
    """What a stranger wrote, fit for a message: one line of bounded length."""
    shown = "".join(letter if letter.isprintable() else "�" for letter in text)
    return shown if len(shown) <= 120 else f"{shown[:119]}…"


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not os.path.exists(directory):  # noqa: PTH110 - a name that is too long for a file is no file, either
        raise BundleError(
            f"{_line(str(directory))}: there is no such directory: name a bundle that `balcony-edge export` wrote"
        )
    if directory.name == MANIFEST and directory.is_file():
        raise BundleError(f"{directory}: is a file of a bundle: give the bundle's directory, {directory.parent}")
    if not path.is_file():
        raise BundleError(
            f"{directory}: no {MANIFEST} in it, so this is no bundle: make one with `balcony-edge export`"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not readable as JSON ({error}): export the bundle again") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise BundleError(
            f"{path}: schema_version = {_line(repr(version))}, but this version of balcony-edge reads {SCHEMA_VERSION}: "
            "export the bundle again, or install the version that wrote it"
        )
    try:
        return Manifest.model_validate(document)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {_line(key)}: {_line(first['msg'])}: export the bundle again") from error


def _check_structure(directory: Path, manifest: Manifest) -> None:
    """Check what the types cannot say: exits ascend to the full depth, and every graph and file that they need is there."""
    layers = manifest.exit_layers
    path = directory / MANIFEST

    def refuse(what: str) -> BundleError:
        return BundleError(f"{path}: {what}: export the bundle again")

    if list(layers) != sorted(set(layers)) or layers[-1] != manifest.model.num_layers:
        raise refuse(f"exits {_line(str(layers))} must ascend and end at the full depth {manifest.model.num_layers}")
    if not manifest.runnable:
        raise refuse("it lists no graphs")
    if (manifest.precision == "float16" and manifest.cpu) or (
        manifest.precision in ("int8", "int4") and manifest.graphs
    ):
        raise refuse(f"a bundle of precision {manifest.precision} does not have these graphs")
    _check_quantization(manifest, refuse)
    needed = {"lm_head", *(f"stage_{i}" for i in range(len(layers))), *(manifest.exit_graph(e) for e in layers)}
    files = {manifest.embedding.file, WEIGHTS, "tokenizer.json"}
    for graphs, lowered in ((manifest.graphs, False), (manifest.cpu, True)):
        wanted = needed | ({f"balcony_{e}_keys" for e in manifest.cached_exits} if lowered else set())
        if graphs and (missing := wanted - graphs.keys()):
            raise refuse(f"no graph {_names(missing)} is listed")
        for name in sorted(wanted) if graphs else ():
            _check_tables(manifest, graphs[name], name, lowered, refuse)
            files.add(graphs[name].file)
    if missing := files - manifest.files.keys():
        raise refuse(f"no file {_names(missing)} is listed")
    embedding = manifest.embedding
    if embedding.shape != (manifest.model.vocab_size, manifest.model.hidden_size):
        raise refuse(f"embedding.shape {embedding.shape} differs from the model's vocabulary and hidden size")
    if embedding.dtype != manifest.float_dtype:
        raise refuse(f"embedding.dtype {embedding.dtype} differs from the precision {manifest.precision}")
    end = max(offset + size for offset, size in embedding.regions)
    if end > manifest.files[embedding.file].bytes:
        raise refuse(f"the embedding ends at byte {end}, past the end of {embedding.file}")
    if fingerprint(manifest.model_dump(mode="json")) != manifest.fingerprint:
        raise refuse("the fingerprint differs from the graphs and weights that are listed")


def _check_quantization(manifest: Manifest, refuse: Callable[[str], BundleError]) -> None:
    quantized, blocks = manifest.quantization, manifest.embedding.blocks
    if (manifest.precision in ("int8", "int4")) != (quantized is not None) or (quantized is None) != (blocks is None):
        raise refuse("quantization and embedding.blocks must be there where precision is int8 or int4, and only there")
    if quantized is not None and f"int{quantized.bits}" != manifest.precision:
        raise refuse(f"quantization.bits = {quantized.bits} differs from the precision {manifest.precision}")


def _check_tables(
    manifest: Manifest, graph: GraphSpec, name: str, lowered: bool, refuse: Callable[[str], BundleError]
) -> None:
    """Refuse a graph whose listed inputs and outputs are not those that the model's sizes and the exits ask for."""
    for role, listed, wanted in zip(
        ("input", "output"), (graph.inputs, graph.outputs), _tables(manifest, name, lowered), strict=True
    ):
        found = {tensor.name: (tensor.dtype, len(tensor.shape), _sizes(tensor)) for tensor in listed}
        if found != wanted or len(found) != len(listed):
            wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            what = f"{role} {wrong[0]} of {name} is" if wrong else f"an {role} of {name} is listed twice and"
            raise refuse(f"{what} not what the model's sizes and exits ask for")


def _sizes(tensor: TensorSpec) -> tuple[int, ...]:
    return tuple(dim for dim in tensor.shape if isinstance(dim, int))


#: (dtype, number of dimensions, those that are numbers)
_Kind = tuple[str, int, tuple[int, ...]]


def _tables(manifest: Manifest, name: str, lowered: bool) -> tuple[dict[str, _Kind], dict[str, _Kind]]:
    """``(inputs, outputs)`` of a graph by the tables above."""
    model, dtype = manifest.model, manifest.float_dtype
    hidden: _Kind = (dtype, 3, (model.hidden_size,))
    cache: _Kind = (dtype, 3, (model.kv_width,))
    if lowered:
        cache = (manifest.kv_dtype, 4, (model.num_kv_heads, model.head_dim))
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
        suffixes, outputs = [""], {} if keys_only else {"hidden": hidden}
    else:
        first, last = manifest.stage_bounds[int(name.removeprefix("stage_"))]
        inputs, outputs = {f"hidden_{first}": hidden}, {f"hidden_{last}": hidden}
        if lowered and last == model.num_layers:
            outputs["normed"] = hidden
        suffixes = [f"_{layer}" for layer in range(first, last)]
    rows = [f"{part}{suffix}" for suffix in suffixes for part in ("key", "value")]
    return (
        {**inputs, **where, **{f"past_{row}": cache for row in rows}},
        {**outputs, **{f"present_{row}": cache for row in rows}},
    )


def _check_file(path: Path, spec: FileSpec, verify_hashes: bool) -> None:
    if path.is_symlink() or not path.is_file():
        what = "is a link" if path.is_symlink() else "is missing"
        raise BundleError(f"{path}: {what}: a bundle holds every file itself; copy it whole or export it again")
    size = path.stat().st_size
    if size != spec.bytes:
        raise BundleError(f"{path}: {size} bytes, but the manifest says {spec.bytes}: copy the bundle again")
    if not verify_hashes:
        return
    try:
        found = sha256_file(path)
    except OSError as error:
        raise BundleError(
            f"{path}: not readable ({error.strerror}): look at its rights, or copy the bundle again"
        ) from error
    if found != spec.sha256:
        raise BundleError(
            f"{path}: SHA-256 {found[:12]}… differs from the manifest's {spec.sha256[:12]}…: copy the bundle again"
        )


def write_manifest(directory: Path, document: dict[str, Any]) -> Manifest:
    """Hash the files of ``directory``, complete ``document`` with files and fingerprint, and write ``bundle.json``.

    Args:
        directory: the bundle under construction; every file in it becomes part of the bundle.
        document: all keys of :class:`Manifest` but ``schema_version``, ``files`` and ``fingerprint``.
    """
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name != MANIFEST:
            files[path.name] = file_spec(path).model_dump()
    draft = {"schema_version": SCHEMA_VERSION, **document, "files": files, "fingerprint": ""}
    dumped = Manifest.model_validate(draft).model_dump(mode="json")
    dumped["fingerprint"] = fingerprint(dumped)
    manifest = Manifest.model_validate(dumped)
    _write(directory, dumped)
    return manifest


@contextmanager
def new_engine_directory(bundle: Path, name: str) -> Iterator[Path]:
    """A directory in which a set is made, to be recorded under ``name`` by :func:`record_engines`; otherwise it is removed.

    Raises:
        BundleError: it cannot be made or written.
    """
    home = bundle / ENGINES
    try:
        home.mkdir(exist_ok=True)
        with partial_directory(home / name) as part:
            yield part
    except OSError as error:
        raise BundleError(f"{home}: cannot be written ({error.strerror}): free space or make it writable") from error


def record_engines(bundle: Path, name: str, engines: EngineSet, made: Path) -> Manifest:
    """Take a set that is whole into ``bundle.json``, in place of the one of that name; the fingerprint stays as it is.

    The new set gets a directory of its own and ``bundle.json`` changes in one step, so a process that is killed leaves the
    old set or the new one. What neither of them needs is removed.

    Args:
        bundle: the directory.
        name: of the set.
        engines: what is in ``made``.
        made: of :func:`new_engine_directory`.

    Raises:
        BundleError: no bundle, or a directory that cannot be written.
    """
    home = bundle / ENGINES
    with locked(home):
        manifest = _read_manifest(bundle)
        place = home / name
        while place.exists():
            place = home / f"{name}.{secrets.token_hex(4)}"
        made.rename(place)
        entry = engines.model_copy(update={"directory": None if place.name == name else place.name})
        updated = manifest.model_copy(update={"engines": {**manifest.engines, name: entry}})
        _write(bundle, updated.model_dump(mode="json"))
        for other in home.iterdir():
            if other != place and (other.name == name or other.name.startswith(f"{name}.")):
                shutil.rmtree(other, ignore_errors=True)
    return updated


def record_confidence(directory: Path, found: ConfidenceSpec) -> Manifest:
    """Put the thresholds of confidence exits into ``bundle.json``; the fingerprint stays as it is.

    Raises:
        BundleError: no bundle, or a directory that cannot be written.
    """
    updated = _read_manifest(directory).model_copy(update={"confidence": found})
    _write(directory, updated.model_dump(mode="json"))
    return updated


def file_spec(path: Path) -> FileSpec:
    """Size and hash of a file."""
    return FileSpec(bytes=path.stat().st_size, sha256=sha256_file(path))


def record_quality(directory: Path, measured: Mapping[int, Quality]) -> Manifest:
    """Add evaluation results to ``bundle.json``; what was measured before on other texts and tasks stays.

    Exits are compared with each other, so those that were not measured now lose what they have on other rows of the same
    texts and tasks. The fingerprint stays as it is: it covers graphs and weights, and those are not touched.

    Args:
        directory: the bundle.
        measured: exit layer → results on the same texts and tasks. Where the reference is another than
            before, earlier texts are dropped: numbers against two references must not stand side by side.

    Raises:
        BundleError: no bundle, an exit that it lacks, or a directory that cannot be written.
    """
    manifest = _read_manifest(directory)
    if unknown := measured.keys() - set(manifest.exit_layers):
        raise BundleError(
            f"{directory}: has no exit {min(unknown)}: it has {', '.join(map(str, manifest.exit_layers))}: "
            "evaluate those"
        )
    found = {exit_.exit_layer: exit_.quality for exit_ in manifest.exits}
    if measured:
        latest = next(iter(measured.values()))
        found = {layer: quality and _comparable(quality, latest) for layer, quality in found.items()}
    found |= {layer: _merged(found[layer], quality) for layer, quality in measured.items()}
    averaged = {_averaged(found[layer]) for layer in measured}  # averages over different tasks do not compare, either
    exits = []
    for exit_ in manifest.exits:
        quality = found[exit_.exit_layer]
        if quality is not None and averaged and _averaged(quality) not in averaged:
            quality = quality.model_copy(update={"summary": None})
        exits.append(exit_.model_copy(update={"quality": quality}))
    updated = manifest.model_copy(update={"exits": tuple(exits)})
    _write(directory, updated.model_dump(mode="json"))
    return updated


def _averaged(quality: Quality | None) -> tuple[str, ...]:
    """Tasks of its average."""
    return () if quality is None or quality.summary is None else quality.summary.tasks


def _comparable(old: Quality, new: Quality) -> Quality:
    """What of an exit's earlier results may stand beside new ones of another exit, or of its own."""
    text = old.text if old.reference == new.reference or not new.text else {}
    text = {
        name: one for name, one in text.items() if name not in new.text or _text_rows(one) == _text_rows(new.text[name])
    }
    tasks = {
        name: one
        for name, one in old.tasks.items()
        if name not in new.tasks or one.examples == new.tasks[name].examples
    }
    summary = old.summary if old.summary is not None and tasks.keys() >= set(old.summary.tasks) else None
    return Quality(reference=old.reference, text=text, tasks=tasks, summary=summary)


def _text_rows(text: TextQuality) -> tuple[int, int, int]:
    return text.documents, text.tokens, text.window


def _merged(old: Quality | None, new: Quality) -> Quality:
    if old is None:
        return new
    # an average over more tasks stays, unless one of them was measured again
    known = _averaged(old)
    stays = len(known) > len(_averaged(new)) and not new.tasks.keys() & set(known)
    return Quality(
        reference=new.reference if new.text else old.reference,
        text={**old.text, **new.text},
        tasks={**old.tasks, **new.tasks},
        summary=old.summary if stays else new.summary,
    )


def _write(directory: Path, document: dict[str, Any]) -> None:
    content = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(directory / MANIFEST, content.encode(), BundleError, "free space or make it writable")
