"""The bundle: the directory that export writes and the runtime loads, described by its manifest ``bundle.json``.

This module owns the manifest's types, the schema version, the fingerprint and every check that needs no engine: files
present, sizes and hashes right, names that stay inside the directory. It does not know how graphs are made or run;
that the graphs' real inputs equal the tables below is checked by the backend that opens them.

    bundle/
      bundle.json               this manifest
      tokenizer.json  generation_config.json  chat_template.jinja (where the model has one)
      backbone.onnx             the whole shared backbone, one hidden-state output per exit; not loaded by the runtime
      stage_<i>.onnx            its layers between two exits, with their KV cache
      balcony_<e>.onnx          decoder layer and norm of the exit below the full depth
      norm.onnx  lm_head.onnx   the full depth's final norm; the head that all exits share
      cpu_*.onnx                the same stages, balconies and head, lowered for ONNX Runtime on CPUs
      weights.bin               external data: every tensor stored once; the token table is read from here, too

Up to two sets of graphs describe the same arithmetic: ``graphs`` in standard ONNX, which every engine can read, and ``cpu``
in ONNX Runtime's own operators, which it runs faster. A float32 bundle has both, over the same weights; float16 has the
first; int8 and int4 have the second.

I/O table (B batch, T rows of a pass, Q query rows, S rows of KV capacity, D hidden size, H kv heads, d head size,
F = H × d, V vocabulary; ``float`` is float16 where ``precision`` says so, else float32):

    graph        inputs                                                           outputs
    stage_<i>    hidden_<from> float (B, T, D), start int64 (B,),                 hidden_<to> float (B, T, D),
                 past_{key,value}_<layer> float (B, S, F)                         present_{key,value}_<layer> (B, S, F)
    balcony_<e>  rows float (B, T, D), queries float (B, Q, D), start int64 (B,), hidden float (B, Q, D),
                 past_{key,value} float (B, S, F)                                 present_{key,value} float (B, S, F)
    norm         hidden float (B, Q, D)                                           normed float (B, Q, D)
    lm_head      hidden float (B, Q, D)                                           logits float32 (B, Q, V)

``start`` is the row index of the first of the T rows: positions are row indices. ``queries`` are the last Q of ``rows``.

In the set ``cpu`` caches are (B, H, S, d), and ``last`` int32 (B,), the index of the last of the T rows, and ``total``
int32 (), the rows after the pass, stand in the place of ``start``. Otherwise it differs in three graphs:

    graph             inputs                                         outputs
    stage_<last>      as above                                       normed float (B, T, D) too: the final norm is inside
    balcony_<e>       rows float (B, T, D), last, total, past_*      hidden float (B, T, D), present_*
    balcony_<e>_keys  rows float (B, T, D), start int64 (B,), past_* present_*: works off a backlog, asks nothing
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from balcony_edge.errors import BundleError
from balcony_edge.files import write_atomically

SCHEMA_VERSION = 2
MANIFEST = "bundle.json"
WEIGHTS = "weights.bin"

DType = Literal["float32", "float16", "int64", "int32"]
Precision = Literal["float32", "float16", "int8", "int4"]
#: A plain file name: nothing that leaves the bundle's directory and no hidden file.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=120)]


#: A dimension. The bound is far above every model and keeps a forged manifest from asking for all memory.
Size = Annotated[int, Field(gt=0, le=2**22)]


#: A count of values or bytes; bounded so that sums and ratios of a forged manifest stay numbers.
Count = Annotated[int, Field(gt=0, le=2**60)]
#: Text that a terminal may be shown: one line, no control characters.
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=200)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class TensorSpec(_Frozen):
    """One graph input or output. A dimension is a number or the name of a symbol."""

    name: Line
    dtype: DType
    shape: tuple[int | Line, ...]


class GraphSpec(_Frozen):
    """One executable graph.

    ``weight_bytes`` are the bytes of weights that one pass reads; ``parameters`` is their number of elements. Both count
    what the graph uses, also where two graphs point to the same tensor.
    """

    file: FileName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: Count
    weight_bytes: Count


class BlockSpec(_Frozen):
    """How a quantized table is stored: unsigned integers of ``bits`` in blocks along a row, low bits first.

    A value is ``(q - zero_point) × scale``, with one float32 scale per block at ``scales_offset``; the zero point is
    ``2 ** (bits - 1)`` everywhere unless ``zero_points_offset`` says where they lie (packed like the values, each row
    padded to whole bytes).
    """

    bits: Literal[4, 8]
    block_size: Literal[16, 32, 64, 128, 256]
    scales_offset: int = Field(ge=0)
    zero_points_offset: int | None = Field(default=None, ge=0)


class EmbeddingSpec(_Frozen):
    """Where the token table lies: rows of ``shape[1]`` values from ``offset`` bytes on, multiplied by ``scale``.

    ``dtype`` is that of its values; with ``blocks`` they are stored quantized.
    """

    file: FileName
    offset: int = Field(ge=0)
    dtype: Literal["float32", "float16"]
    shape: tuple[int, int]
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    tied: bool
    blocks: BlockSpec | None = None

    @property
    def regions(self) -> tuple[tuple[int, int], ...]:
        """``(offset, bytes)`` of each part that a reader maps."""
        rows, width = self.shape
        if self.blocks is None:
            return ((self.offset, rows * width * (2 if self.dtype == "float16" else 4)),)
        bits, blocks = self.blocks.bits, -(-width // self.blocks.block_size)
        parts = [
            (self.offset, rows * blocks * self.blocks.block_size * bits // 8),
            (self.blocks.scales_offset, rows * blocks * 4),
        ]
        if self.blocks.zero_points_offset is not None:
            parts.append((self.blocks.zero_points_offset, rows * -(-blocks * bits // 8)))
        return tuple(parts)


class Estimate(_Frozen):
    """A measured mean and its standard error; None where one document or example alone was measured."""

    value: float
    stderr: float | None = None


class TextQuality(_Frozen):
    """An exit on a text file, per predicted token; ``kl`` (nats) and ``agreement`` are against the reference."""

    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    perplexity: Estimate
    kl: Estimate
    agreement: Estimate


class TaskQuality(_Frozen):
    """An exit on a task: ``metric`` is the one that tables show, ``metrics`` holds all."""

    metric: str
    examples: int = Field(gt=0)
    metrics: dict[str, Estimate]


class TaskSummary(_Frozen):
    """Mean over ``tasks`` (percent), what is lost against the full depth (points), and what is kept of it (percent)."""

    tasks: tuple[str, ...]
    average: Estimate
    drop: Estimate
    retention: Estimate | None


class Quality(_Frozen):
    """What `balcony-edge eval` measured at an exit. ``reference`` names the model that text was compared with."""

    reference: str
    text: dict[str, TextQuality] = {}
    tasks: dict[str, TaskQuality] = {}
    summary: TaskSummary | None = None


class ExitSpec(_Frozen):
    """An exit: ``kind`` is ``balcony`` below the full depth and ``full`` there; ``quality`` is there once evaluated."""

    exit_layer: int = Field(gt=0)
    kind: Literal["balcony", "full"]
    trained: bool
    quality: Quality | None = None


class ModelSpec(_Frozen):
    """Architecture and sizes of the base model."""

    name: Line
    architecture: Line
    num_layers: int = Field(gt=0, le=10_000)
    hidden_size: Size
    num_attention_heads: Size
    num_kv_heads: Size
    head_dim: Size
    vocab_size: Size
    context_length: Size
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def kv_width(self) -> int:
        """Values of one key (or value) row: kv heads × head size."""
        return self.num_kv_heads * self.head_dim


class FileSpec(_Frozen):
    """Size and hash of one file of the bundle."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Quantization(_Frozen):
    """How weights became integers: in blocks along the inputs, by nearest values or by GPTQ on calibration text.

    ``accuracy_level`` 4 rounds activations to int8 in the products too, 1 leaves them in float32.
    """

    bits: Literal[4, 8]
    block_size: Literal[32, 64, 128]
    symmetric: bool
    head_bits: Literal[4, 8]
    accuracy_level: Literal[1, 4]
    method: Literal["nearest", "gptq"]
    calibration_tokens: int = Field(ge=0)


class Manifest(_Frozen):
    """``bundle.json``. ``fingerprint`` covers graphs and weights only: what is added later makes no profile stale."""

    schema_version: Literal[2]
    model: ModelSpec
    precision: Precision
    quantization: Quantization | None = None
    exits: tuple[ExitSpec, ...] = Field(min_length=1, max_length=1000)
    embedding: EmbeddingSpec
    graphs: dict[FileName, GraphSpec] = {}
    cpu: dict[FileName, GraphSpec] = {}
    files: dict[FileName, FileSpec]
    fingerprint: str
    tools: dict[Line, Line]

    @property
    def agreement(self) -> dict[int, float | None]:
        """Exit layer → share of tokens on which it agrees with the full depth, on the text where that is least."""
        return {
            exit_.exit_layer: min((text.agreement.value for text in exit_.quality.text.values()), default=None)
            if exit_.quality is not None
            else None
            for exit_ in self.exits
        }

    @property
    def float_dtype(self) -> Literal["float32", "float16"]:
        """Of hidden states and KV cache."""
        return "float16" if self.precision == "float16" else "float32"

    @property
    def runnable(self) -> dict[str, GraphSpec]:
        """The set of graphs that ONNX Runtime runs: the lowered one where there is one."""
        return self.cpu or self.graphs

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Exit layers in ascending order; the last is the full depth."""
        return tuple(exit_.exit_layer for exit_ in self.exits)

    @property
    def stage_bounds(self) -> tuple[tuple[int, int], ...]:
        """``(first, last)`` of each stage: it runs the layers with ``first <= index < last``."""
        layers = self.exit_layers
        return tuple(zip((0, *layers[:-1]), layers, strict=True))

    def path_graphs(self, exit_layer: int) -> tuple[str, ...]:
        """Names of the graphs of :attr:`runnable` that one token at ``exit_layer`` runs, in order."""
        index = self.exit_layers.index(exit_layer)
        stages = tuple(f"stage_{i}" for i in range(index + 1))
        norm_inside = self.cpu and exit_layer == self.model.num_layers
        return (*stages, *(() if norm_inside else (self.exit_graph(exit_layer),)), "lm_head")

    def exit_graph(self, exit_layer: int) -> str:
        """Name of the graph that turns the hidden state at ``exit_layer`` into the head's input."""
        return "norm" if exit_layer == self.model.num_layers else f"balcony_{exit_layer}"

    def bytes_per_token(self, exit_layer: int) -> int:
        """Bytes of weights that one token at ``exit_layer`` reads (the token table's one row not counted)."""
        return sum(self.runnable[name].weight_bytes for name in self.path_graphs(exit_layer))


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over the hashes of graphs and weights and over what the runtime needs to run them."""
    files: dict[str, dict[str, Any]] = manifest["files"]
    core = {
        "schema_version": manifest["schema_version"],
        "precision": manifest["precision"],
        "embedding": manifest["embedding"],
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
        """The same bundle with its graphs in standard ONNX alone: what other engines are given."""
        return Bundle(self.path, self.manifest.model_copy(update={"cpu": {}}))

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
    if not directory.exists():
        raise BundleError(f"{directory}: there is no such directory: name a bundle that `balcony-edge export` wrote")
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
    needed = {"lm_head", *(f"stage_{i}" for i in range(len(layers))), *(manifest.exit_graph(e) for e in layers)}
    files = {manifest.embedding.file, WEIGHTS, "tokenizer.json"}
    for graphs, lowered in ((manifest.graphs, False), (manifest.cpu, True)):
        wanted = needed | ({f"balcony_{e}_keys" for e in layers[:-1]} if lowered else set())
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
    cache: _Kind = (dtype, 4, (model.num_kv_heads, model.head_dim)) if lowered else (dtype, 3, (model.kv_width,))
    start: dict[str, _Kind] = {"start": ("int64", 1, ())}
    where: dict[str, _Kind] = {"last": ("int32", 1, ()), "total": ("int32", 0, ())} if lowered else start
    if name == "lm_head":
        return {"hidden": hidden}, {"logits": ("float32", 3, (model.vocab_size,))}
    if name == "norm":
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
    if verify_hashes and (found := sha256_file(path)) != spec.sha256:
        raise BundleError(
            f"{path}: SHA-256 {found[:12]}… differs from the manifest's {spec.sha256[:12]}…: copy the bundle again"
        )


def write_manifest(
    directory: Path, document: dict[str, Any], *, progress: Callable[[str], None] | None = None
) -> Manifest:
    """Hash the files of ``directory``, complete ``document`` with files and fingerprint, and write ``bundle.json``.

    Args:
        directory: the bundle under construction; every file in it becomes part of the bundle.
        document: all keys of :class:`Manifest` but ``schema_version``, ``files`` and ``fingerprint``.
        progress: called with each file's name before it is hashed.
    """
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name != MANIFEST:
            if progress is not None:
                progress(path.name)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    draft = {"schema_version": SCHEMA_VERSION, **document, "files": files, "fingerprint": ""}
    dumped = Manifest.model_validate(draft).model_dump(mode="json")
    dumped["fingerprint"] = fingerprint(dumped)
    manifest = Manifest.model_validate(dumped)
    _write(directory, dumped)
    return manifest


def record_quality(directory: Path, measured: Mapping[int, Quality]) -> Manifest:
    """Add evaluation results to ``bundle.json``; what was measured before on other texts and tasks stays.

    The fingerprint stays as it is: it covers graphs and weights, and those are not touched.

    Args:
        directory: the bundle.
        measured: exit layer → results. Where the reference is another than before, earlier texts are dropped: numbers
            against two references must not stand side by side.

    Raises:
        BundleError: no bundle, an exit that it lacks, or a directory that cannot be written.
    """
    manifest = _read_manifest(directory)
    if unknown := measured.keys() - set(manifest.exit_layers):
        raise BundleError(
            f"{directory}: has no exit {min(unknown)}: it has {', '.join(map(str, manifest.exit_layers))}: "
            "evaluate those"
        )
    exits = tuple(
        exit_.model_copy(update={"quality": _merged(exit_.quality, measured[exit_.exit_layer])})
        if exit_.exit_layer in measured
        else exit_
        for exit_ in manifest.exits
    )
    updated = manifest.model_copy(update={"exits": exits})
    _write(directory, updated.model_dump(mode="json"))
    return updated


def _merged(old: Quality | None, new: Quality) -> Quality:
    if old is None:
        return new
    text = {**old.text, **new.text} if old.reference == new.reference or not new.text else new.text
    return Quality(
        reference=new.reference if new.text else old.reference,
        text=text,
        tasks={**old.tasks, **new.tasks},
        summary=new.summary or old.summary,
    )


def _write(directory: Path, document: dict[str, Any]) -> None:
    content = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(directory / MANIFEST, content.encode(), BundleError, "free space or make it writable")
