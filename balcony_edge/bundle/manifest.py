"""The manifest ``bundle.json``: types of everything that it says about a bundle, and the I/O tables of the graphs.

This module owns the types and the schema version. Files, hashes and what the types cannot say are checked by :mod:`.bundle`;
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
      tensorrt/<name>/          graphs for TensorRT and engines, where `balcony-edge build` made them

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

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

SCHEMA_VERSION = 2
MANIFEST = "bundle.json"
WEIGHTS = "weights.bin"

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8"]
Precision = Literal["float32", "float16", "int8", "int4"]
#: Of TensorRT engines: of weights; activations are float16, bfloat16 for ``bf16`` and float32 for ``fp32``.
EnginePrecision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"]
#: A plain file name: nothing that leaves the bundle's directory and no hidden file.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=120)]


#: A number that was measured.
Finite = Annotated[float, Field(allow_inf_nan=False)]
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

    value: Finite
    stderr: Finite | None = None


class TextQuality(_Frozen):
    """An exit on a text file, per predicted token; ``kl`` (nats) and ``agreement`` are against the reference.

    ``window`` is the number of tokens of a pass: perplexities of different windows do not compare.
    """

    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    window: int = Field(gt=1)
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
    """An exit: ``kind`` is ``balcony`` below the full depth and ``full`` there; ``quality`` is there once evaluated.

    ``module`` is what a balcony holds before its norm. ``mlp`` and ``none`` attend to nothing: their graph has no cache and the
    table of ``norm`` (``hidden`` → ``normed``).
    """

    exit_layer: int = Field(gt=0)
    kind: Literal["balcony", "full"]
    trained: bool
    module: Literal["decoder", "attention", "mlp", "none"] = "decoder"
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

    ``accuracy_level`` 4 rounds activations to int8 in the products too, 1 leaves them in float32. ``kv_bits`` 8 keeps keys and
    values as int8, each channel with a scale of its own from calibration text. ``down_block_size`` is that of the MLPs' down
    projections where it differs; ``positive`` says that all scales are above 0.
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
    """Of one exit: least confidence of a token that exits there; on the text that tested it, the share of tokens that did, and
    the share of all tokens that did with another token than the full depth's."""

    threshold: float = Field(ge=0, le=1)
    exit_share: float = Field(ge=0, le=1)
    disagreement: float = Field(ge=0, le=1)


class ConfidenceSpec(_Frozen):
    """What `balcony-edge calibrate` found: with probability ``confidence``, at most ``max_disagreement`` of all tokens exit
    early with another token than the full depth's, on text like ``text`` (a name), of which ``tokens`` were seen.

    ``measure`` is how confidence is measured (:func:`balcony_runtime.decoding.thresholds.measured`). An
    exit is missing if no threshold kept the promise.
    """

    measure: ConfidenceMeasure
    max_disagreement: float = Field(gt=0, lt=1)
    confidence: float = Field(gt=0, lt=1)
    text: Line
    tokens: Count
    thresholds: dict[int, ThresholdSpec] = {}


class EngineSpec(_Frozen):
    """One TensorRT engine.

    ``layers`` counts those of the parsed network. ``attention`` is how its attention runs, None where it has none of its own:
    ``fused`` in one kernel, or ``decomposed`` into products and a softmax, where TensorRT has no such kernel for this type and
    head size.
    """

    file: FileName
    layers: Count
    attention: Literal["fused", "decomposed"] | None = None


class EngineSet(_Frozen):
    """Graphs for TensorRT and the engines that were built from them, in ``tensorrt/<directory>/`` (None: the set's name).

    ``target`` is which TensorRT: ``rtx`` (``tensorrt_rtx``) or ``tensorrt`` (the enterprise one, JetPack's). Caches have
    ``context_length`` rows whatever is live; passes have ``batch_size`` members. ``builder`` and ``compute_capabilities`` say
    what the engines run on; both are empty while there are graphs alone.
    """

    directory: FileName | None = None
    target: Literal["rtx", "tensorrt"]
    precision: EnginePrecision
    operators: Literal["fused", "plain"]
    context_length: Size
    batch_size: Size
    block_size: Literal[32, 64, 128] | None = None
    graphs: dict[FileName, GraphSpec]
    engines: dict[FileName, EngineSpec] = {}
    builder: Line = ""
    compute_capabilities: tuple[Line, ...] = ()
    files: dict[FileName, FileSpec]


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
    engines: dict[FileName, EngineSet] = {}
    confidence: ConfidenceSpec | None = None

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
        """Of hidden states."""
        return "float16" if self.precision == "float16" else "float32"

    @property
    def kv_dtype(self) -> Literal["float32", "float16", "int8"]:
        """Of the KV cache."""
        return "int8" if self.quantization is not None and self.quantization.kv_bits == 8 else self.float_dtype

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

    @property
    def cached_exits(self) -> tuple[int, ...]:
        """Exits whose balcony attends to rows before, and so has a KV cache."""
        return tuple(e.exit_layer for e in self.exits if e.kind == "balcony" and e.module in ("decoder", "attention"))

    def exit_graph(self, exit_layer: int) -> str:
        """Name of the graph that turns the hidden state at ``exit_layer`` into the head's input."""
        return "norm" if exit_layer == self.model.num_layers else f"balcony_{exit_layer}"

    def bytes_per_token(self, exit_layer: int) -> int:
        """Bytes of weights that one token at ``exit_layer`` reads (the token table's one row not counted)."""
        return sum(self.runnable[name].weight_bytes for name in self.path_graphs(exit_layer))
