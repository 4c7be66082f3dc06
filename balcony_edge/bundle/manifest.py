"""The manifest ``bundle.json``: its types, and the I/O tables of the graphs.

This module owns the types and the schema version. :mod:`.bundle` checks files, hashes and what the types cannot express. The
backend that opens a graph checks that its real inputs equal the tables below.

    bundle/
      bundle.json               this manifest
      tokenizer.json  special_tokens.json  generation_config.json
      chat_template.jinja       if the model has a chat template
      backbone.onnx             the whole shared backbone, one hidden-state output per exit; not loaded by the runtime
      stage_<i>.onnx            its layers between two exits, with their KV cache
      balcony_<e>.onnx          decoder layer and norm of the exit below the full depth
      norm.onnx  lm_head.onnx   the full depth's final norm; the head that all exits share
      cpu_*.onnx                the same stages, balconies and head, lowered for ONNX Runtime on CPUs
      weights.bin               external data: every tensor stored once; the token table is also read from here
      tensorrt/<name>/          graphs for TensorRT and engines, if `balcony-edge build` made them

Up to two sets of graphs describe the same arithmetic: ``graphs`` in standard ONNX, which every engine can read, and ``cpu``
in ONNX Runtime's own operators, which it runs faster. A float32 or float16 bundle has both, over the same weights, or only
the first if the size of a head or of its rotated part is no multiple of 16; int8 and int4 have the second.

I/O table (B batch, T rows of a pass, Q query rows, S rows of KV capacity, D hidden size, H kv heads, d head size,
F = H × d, V vocabulary; ``float`` is float16 if ``precision`` is, otherwise float32):

    graph        inputs                                                           outputs
    stage_<i>    hidden_<from> float (B, T, D), start int64 (B,),                 hidden_<to> float (B, T, D),
                 past_{key,value}_<layer> float (B, S, F)                         present_{key,value}_<layer> (B, S, F)
    balcony_<e>  rows float (B, T, D), queries float (B, Q, D), start int64 (B,), hidden float (B, Q, D),
                 past_{key,value} float (B, S, F)                                 present_{key,value} float (B, S, F)

A layer that keeps something else than keys and values (:class:`LayerMemory`) has other tensors, and the same of ``present_``:
``past_inputs_<layer>`` float (B, S, C), the inputs of a short convolution; ``past_window_<layer>`` float (B, C, taps - 1), the
last inputs of a convolution, and ``past_state_<layer>`` float32 (B, heads, key size, value size), of a recurrent layer.

    norm         hidden float (B, Q, D)                                           normed float (B, Q, D)
    lm_head      hidden float (B, Q, D)                                           logits float32 (B, Q, V)

``start`` is the row index of the first of the T rows: positions are row indices. ``queries`` are the last Q of ``rows``.

In the set ``cpu`` caches are (B, H, S, d). Instead of ``start``, graphs take ``last`` int32 (B,), the index of the last of the
T rows, and ``total`` int32 (), the number of rows after the pass. The set also differs in three graphs:

    graph             inputs                                         outputs
    stage_<last>      as above                                       also normed float (B, T, D): it contains the final norm
    balcony_<e>       rows float (B, T, D), last, total, past_*      hidden float (B, T, D), present_*
    balcony_<e>_keys  rows float (B, T, D), start int64 (B,), past_* present_* only: takes in a backlog without queries
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

SCHEMA_VERSION = 2
#: Parts of a layer's memory that have no rows: each pass reads the old and writes the new.
STATES = ("window", "state")
_STATE_INPUTS = tuple(f"past_{part}" for part in STATES)
MANIFEST = "bundle.json"
WEIGHTS = "weights.bin"


def is_state(name: str) -> bool:
    """Whether an input of a graph is a part of :data:`STATES`."""
    return name.startswith(_STATE_INPUTS)


DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8"]
Precision = Literal["float32", "float16", "int8", "int4"]
#: Type of the weights of TensorRT engines; activations are float16, bfloat16 for ``bf16`` and float32 for ``fp32``.
EnginePrecision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"]
#: A plain file name, which cannot leave the bundle's directory and is not hidden.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=120)]
#: A measured number.
Finite = Annotated[float, Field(allow_inf_nan=False)]
#: A dimension. The bound is far above every model's and keeps a forged manifest from claiming all memory.
Size = Annotated[int, Field(gt=0, le=2**22)]


#: A count of values or bytes; bounded so that sums and ratios of a forged manifest stay numbers.
Count = Annotated[int, Field(gt=0, le=2**60)]
#: Text that is safe to show on a terminal: one line without control characters.
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=200)]


def one_line(text: str) -> str:
    """Text from outside, such as a file's name, made fit for a manifest and a message: one printable line of bounded length."""
    shown = "".join(letter if letter.isprintable() else "�" for letter in text)
    return shown if len(shown) <= 120 else f"{shown[:119]}…"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class TensorSpec(_Frozen):
    """One graph input or output. A dimension is a number or the name of a symbolic one."""

    name: Line
    dtype: DType
    shape: tuple[int | Line, ...]


class GraphSpec(_Frozen):
    """One executable graph.

    ``weight_bytes`` are the bytes of weights that a pass of one row reads; ``parameters`` is the number of elements of all
    weights. They differ in a mixture of experts: one row reads the chosen experts (in the set ``graphs``, all), and further
    rows read others. A tensor that two graphs share counts in both.
    """

    file: FileName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: Count
    weight_bytes: Count


class BlockSpec(_Frozen):
    """Storage of a quantized table: unsigned integers of ``bits`` bits in blocks along a row, low bits first.

    A value is ``(q - zero_point) × scale``, with one float32 scale per block at ``scales_offset``. The zero points lie at
    ``zero_points_offset`` (packed like the values, each row padded to whole bytes); None: all are ``2 ** (bits - 1)``.
    """

    bits: Literal[4, 8]
    block_size: Literal[16, 32, 64, 128, 256]
    scales_offset: int = Field(ge=0)
    zero_points_offset: int | None = Field(default=None, ge=0)


class EmbeddingSpec(_Frozen):
    """Place of the token table: rows of ``shape[1]`` values that begin ``offset`` bytes into the file, times ``scale``.

    ``dtype`` is the type of the values that a reader gets; with ``blocks`` they are stored quantized.
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
    """A measured mean and its standard error; None if only one document or example was measured."""

    value: Finite
    stderr: Finite | None = None


class TextQuality(_Frozen):
    """Quality of an exit on a text file, per predicted token; ``kl`` (nats) and ``agreement`` are against the reference.

    ``window`` is the number of tokens of a pass: perplexities of different windows are not comparable.
    """

    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    window: int = Field(gt=1)
    perplexity: Estimate
    kl: Estimate
    agreement: Estimate


class TaskQuality(_Frozen):
    """Quality of an exit on a task: ``metric`` names the figure that tables show, ``metrics`` holds all figures."""

    metric: str
    examples: int = Field(gt=0)
    metrics: dict[str, Estimate]


class TaskSummary(_Frozen):
    """Mean over ``tasks`` (percent), this minus the full depth's (points, a loss is below 0), and share of that (percent)."""

    tasks: tuple[str, ...]
    average: Estimate
    drop: Estimate
    retention: Estimate | None


class Quality(_Frozen):
    """Results of `balcony-edge eval` at an exit. ``reference`` names the model that results on texts are against."""

    reference: str
    text: dict[str, TextQuality] = {}
    tasks: dict[str, TaskQuality] = {}
    summary: TaskSummary | None = None


class ExitSpec(_Frozen):
    """An exit: ``kind`` is ``full`` at the full depth and ``balcony`` below it; ``quality`` is None before an evaluation.

    ``module`` is the part of a balcony before its norm. Balconies of ``mlp`` and ``none`` have no attention: their graphs have
    no cache and the same I/O table as ``norm`` (``hidden`` → ``normed``). ``layer`` is the index of the backbone's layer of
    which the balcony is a copy; None: the last.
    """

    exit_layer: int = Field(gt=0)
    kind: Literal["balcony", "full"]
    trained: bool
    module: Literal["decoder", "attention", "mlp", "none", "dense"] = "decoder"
    layer: int | None = Field(default=None, ge=0)
    quality: Quality | None = None


class LayerMemory(_Frozen):
    """What one layer keeps of the rows that it has taken in.

    ``attention``: keys and values of every row. ``inputs``: width of the inputs of a short convolution (LFM2), of every row,
    too: so a rollback only moves a cursor. ``window`` (channels, taps - 1) and ``state`` (heads, key size, value size) of a
    recurrent layer stand for all rows so far.
    """

    attention: bool = True
    inputs: Size | None = None
    window: tuple[Size, Size] | None = None
    state: tuple[Size, Size, Size] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that it keeps, in the order of the graphs' inputs."""
        others = tuple(part for part in ("inputs", *STATES) if getattr(self, part))
        return (*(("key", "value") if self.attention else ()), *others)


class MixtureSpec(_Frozen):
    """Mixture of experts: of the ``experts`` of a layer each row uses ``chosen``. Some layers may be dense."""

    experts: int = Field(gt=0, le=2**16)
    chosen: int = Field(gt=0, le=2**16)

    @property
    def share(self) -> float:
        """Share of the experts that one row uses."""
        return min(self.chosen / self.experts, 1.0)


class ModelSpec(_Frozen):
    """Architecture and sizes of the base model.

    ``layers`` is empty if all layers attend and keep nothing else; without any attention there are 0 heads of size 0.
    """

    name: Line
    architecture: Line
    num_layers: int = Field(gt=0, le=10_000)
    hidden_size: Size
    num_attention_heads: int = Field(ge=0, le=2**22)
    num_kv_heads: int = Field(ge=0, le=2**22)
    head_dim: int = Field(ge=0, le=2**22)
    vocab_size: Size
    context_length: Size
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    layers: tuple[LayerMemory, ...] = ()
    mixture: MixtureSpec | None = None

    def memory(self, layer: int) -> LayerMemory:
        """What a layer keeps."""
        return self.layers[layer] if self.layers else LayerMemory()

    def sizes(self, part: str, layer: int) -> tuple[int, ...]:
        """Sizes of a part of a layer's memory: of one row, or of the whole state."""
        if part in ("key", "value"):
            return (self.kv_width,)
        found: int | tuple[int, ...] = getattr(self.memory(layer), part)
        return (found,) if isinstance(found, int) else found

    @property
    def recurrent(self) -> bool:
        """Whether a layer has a recurrent state, so that a rollback has rows to run again."""
        return any(layer.state for layer in self.layers)

    @property
    def kv_width(self) -> int:
        """Number of values in one row of keys (or values): kv heads × head size."""
        return self.num_kv_heads * self.head_dim


class FileSpec(_Frozen):
    """Size and hash of one file of the bundle."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Quantization(_Frozen):
    """Quantization of the weights: in blocks along the inputs, to the nearest values or by GPTQ on calibration text.

    ``accuracy_level`` 4 also rounds activations to int8 in the products; 1 leaves them in float32. ``kv_bits`` 8 keeps keys and
    values as int8 with scales from calibration text: one for each channel, and the same for two channels of a key that are
    rotated together. ``down_block_size`` is the block size of the
    MLPs' down projections if it differs; ``positive`` means that all scales are above 0.
    """

    bits: Literal[4, 8]
    block_size: Literal[32, 64, 128]
    down_block_size: Literal[32, 64, 128, 256] | None = None
    symmetric: bool
    head_bits: Literal[4, 8]
    accuracy_level: Literal[1, 4]
    kv_bits: Literal[8, 32]
    positive: bool = False
    method: Literal["nearest", "gptq"]
    calibration_tokens: int = Field(ge=0)


ConfidenceMeasure = Literal["top1", "margin", "entropy"]


class ThresholdSpec(_Frozen):
    """Least confidence with which a token exits here, and two shares of all tokens, measured on the text that tested it.

    ``exit_share`` exited here; ``disagreement`` exited here with another token than the full depth's.
    """

    threshold: float = Field(ge=0, le=1)
    exit_share: float = Field(ge=0, le=1)
    disagreement: float = Field(ge=0, le=1)


class ConfidenceSpec(_Frozen):
    """Result of `balcony-edge calibrate`: thresholds and the promise that they keep.

    The promise: with probability ``confidence``, at most ``max_disagreement`` of all tokens exit early with another token than
    the full depth's. It holds on text like the one named ``text``, of which ``tokens`` tokens were used. ``measure`` is the
    measure of confidence (:func:`balcony_runtime.decoding.thresholds.measured`). An exit is missing from ``thresholds`` if no
    threshold kept the promise.
    """

    measure: ConfidenceMeasure
    max_disagreement: float = Field(gt=0, lt=1)
    confidence: float = Field(gt=0, lt=1)
    text: Line
    tokens: Count
    thresholds: dict[int, ThresholdSpec] = {}


class EngineSpec(_Frozen):
    """One TensorRT engine.

    ``layers`` is the number of layers of the parsed network. ``attention`` is the form of its attention: ``fused`` in one
    kernel, or ``decomposed`` into products and a softmax if TensorRT has no such kernel for this type and head size; None: the
    graph has no attention.
    """

    file: FileName
    layers: Count
    attention: Literal["fused", "decomposed"] | None = None


class EngineSet(_Frozen):
    """Graphs for TensorRT and the engines that were built from them, in ``tensorrt/<directory>/`` (None: the set's name).

    ``target`` names the TensorRT: ``rtx`` (``tensorrt_rtx``) or ``tensorrt`` (the enterprise one, JetPack's). Caches always
    have ``context_length`` rows; passes have at most ``batch_size`` members. ``rounded``: int4 weights have the integers of
    another bundle. ``builder`` and ``compute_capabilities`` say what the engines run on, ``built_on`` which machine built them
    (:meth:`mark`); all are empty while the set has graphs only.
    """

    directory: FileName | None = None
    target: Literal["rtx", "tensorrt"]
    precision: EnginePrecision
    operators: Literal["fused", "plain"]
    context_length: Size
    batch_size: Size
    block_size: Literal[32, 64, 128] | None = None
    rounded: bool = False
    graphs: dict[FileName, GraphSpec]
    engines: dict[FileName, EngineSpec] = {}
    builder: Line = ""
    compute_capabilities: tuple[Line, ...] = ()
    built_on: Line = ""
    files: dict[FileName, FileSpec]

    @property
    def unbuilt(self) -> EngineSet:
        """The set without its engines."""
        built = {engine.file for engine in self.engines.values()}
        files = {name: spec for name, spec in self.files.items() if name not in built}
        none = {"engines": {}, "builder": "", "compute_capabilities": (), "built_on": "", "files": files}
        return self.model_copy(update=none)

    def mark(self, machine: str | None) -> str:
        """What ``built_on`` says of these engines if the machine with this identifier built them; empty without one.

        Only who knows the identifier can make it, and no mark tells it, or that two marks are of one machine.
        """
        hashes = sorted(self.files[engine.file].sha256 for engine in self.engines.values())
        return "" if machine is None else hmac.new(machine.encode(), "\n".join(hashes).encode(), "sha256").hexdigest()

    @property
    def identity(self) -> str:
        """Hash of graphs and weights, which stays when engines for other GPUs are built from them."""
        lines = [f"{name} {spec.sha256}" for name, spec in sorted(self.unbuilt.files.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Manifest(_Frozen):
    """Content of ``bundle.json``.

    ``fingerprint`` covers graphs and weights only, so a device profile stays valid when evaluations or engines are added.
    """

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
    engines: dict[FileName, EngineSet] = {}
    confidence: ConfidenceSpec | None = None

    @property
    def agreement(self) -> dict[int, float | None]:
        """Exit layer → share of tokens on which it agrees with the full depth, on the text where that share is least."""
        return {
            exit_.exit_layer: min((text.agreement.value for text in exit_.quality.text.values()), default=None)
            if exit_.quality is not None
            else None
            for exit_ in self.exits
        }

    @property
    def float_dtype(self) -> Literal["float32", "float16"]:
        """Type of hidden states."""
        return "float16" if self.precision == "float16" else "float32"

    @property
    def kv_dtype(self) -> Literal["float32", "float16", "int8"]:
        """Type of keys and values in the KV cache."""
        return "int8" if self.quantization is not None and self.quantization.kv_bits == 8 else self.float_dtype

    @property
    def runnable(self) -> dict[str, GraphSpec]:
        """The set of graphs that ONNX Runtime runs: the lowered one if the bundle has it."""
        return self.cpu or self.graphs

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Exit layers in ascending order; the last is the full depth."""
        return tuple(exit_.exit_layer for exit_ in self.exits)

    @property
    def stage_bounds(self) -> tuple[tuple[int, int], ...]:
        """``(first, last)`` of each stage, which runs the layers with ``first <= index < last``."""
        layers = self.exit_layers
        return tuple(zip((0, *layers[:-1]), layers, strict=True))

    def path_graphs(self, exit_layer: int) -> tuple[str, ...]:
        """Names of the graphs of :attr:`runnable` that one token at ``exit_layer`` runs, in order."""
        index = self.exit_layers.index(exit_layer)
        stages = tuple(f"stage_{i}" for i in range(index + 1))
        norm_inside = self.cpu and exit_layer == self.model.num_layers
        return (*stages, *(() if norm_inside else (self.exit_graph(exit_layer),)), "lm_head")

    @property
    def cached_exits(self) -> tuple[int, ...]:
        """Exits whose balcony attends to earlier rows and therefore has a KV cache."""
        return tuple(e.exit_layer for e in self.exits if e.kind == "balcony" and e.module not in ("mlp", "none"))

    def balcony_layer(self, exit_layer: int) -> int:
        """Index of the backbone's layer whose memory the balcony at an exit has."""
        layer = next(exit_.layer for exit_ in self.exits if exit_.exit_layer == exit_layer)
        return self.model.num_layers - 1 if layer is None else layer

    def exit_graph(self, exit_layer: int) -> str:
        """Name of the graph that turns the hidden state at ``exit_layer`` into the head's input."""
        return "norm" if exit_layer == self.model.num_layers else f"balcony_{exit_layer}"

    def bytes_per_token(self, exit_layer: int) -> int:
        """Bytes of weights that one token at ``exit_layer`` reads, without the one row of the token table."""
        return sum(self.runnable[name].weight_bytes for name in self.path_graphs(exit_layer))
