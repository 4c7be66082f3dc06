"""Weight-only quantization of lowered graphs: ``MatMul`` becomes ONNX Runtime's ``MatMulNBits``.

Owns the grids (blocks along the inputs, 4 or 8 bits, symmetric or with integer zero points), the packing, and the merging
of products that share their input: q, k and v into the fused attention's packed input, gate and up into one product. A
weight is quantized once, however many graphs use it. The token table shares the LM head's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError
from balcony_export.graph.ir_tools import MICROSOFT, SMALLEST_SCALE, decides, initializer, load_graph
from balcony_export.graph.widen import row_pieces
from balcony_export.quantize.experts import quantize_experts, stored_experts
from balcony_export.quantize.gptq import Factors, factors_of, round_with_compensation
from balcony_runtime.backends.token_table import unpacked

#: Candidates for a block's scale, relative to the scale that covers the full range; the one with the least squared error is
#: taken. Below 0.8 for long blocks with weighted errors, above 1 where the largest value may be cut
#: (docs/LOG.md, "GPTQ in the order of the inputs' sizes").
SHRINKS = (1.0, 1.1, 1.05, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7, 0.66, 0.62)


@dataclass(frozen=True)
class Scheme:
    """How weights become integers.

    Attributes:
        bits: Bits of the layers' weights.
        block_size: Number of inputs that share a scale.
        down_block_size: The same for the MLPs' down projections, which have the most inputs; None for ``block_size``.
        symmetric: Whether the zero point is the middle of the range; otherwise each block has an integer zero point.
        head_bits: Bits of the LM head and the token table.
        accuracy_level: 4 rounds activations to int8, which is faster; 1 keeps them in float32.
        kv_bits: Bits of the KV cache; 32 is float32.
        positive: Whether all scales are above 0, as TensorRT needs; otherwise the sign of a scale selects the end of the range
            that has one more step.
    """

    bits: Literal[4, 8] = 4
    block_size: Literal[32, 64, 128] = 32
    down_block_size: Literal[32, 64, 128, 256] | None = None
    symmetric: bool = True
    head_bits: Literal[4, 8] = 8
    accuracy_level: Literal[1, 4] = 4
    kv_bits: Literal[8, 32] = 32
    positive: bool = False

    @property
    def unpacks(self) -> bool:
        """Whether ONNX Runtime converts 8-bit weights to float32 at every token, because it has no kernel that avoids this."""
        return self.accuracy_level == 1 and 8 in (self.bits, self.head_bits)

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        kv = "" if self.kv_bits == 32 else f",kv={self.kv_bits}"
        block = f"block={self.block_size}" + ("" if self.down_block_size is None else f",down={self.down_block_size}")
        return f"int{self.bits},{block},{kind},head={self.head_bits},level={self.accuracy_level}{kv}" + (
            ",positive" if self.positive else ""
        )

    def block_size_of(self, name: str) -> int:
        """Number of inputs that share a scale in a weight of this name."""
        down = any(part in name for part in ("down_proj", ".w2.", "shared_mlp.output_linear"))
        return (self.down_block_size or self.block_size) if down else self.block_size


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix: ``packed`` (N, blocks, bytes), ``scales`` (N, blocks), ``zeros`` (N, bytes) or None."""

    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None
    bits: int
    block_size: int

    def dequantized(self, inputs: int) -> npt.NDArray[np.float32]:
        """The matrix that the blocks represent  # (N, inputs)"""
        rows, count = self.scales.shape
        values = unpacked(self.packed, self.bits).reshape(rows, count, -1)
        middle = np.float32(1 << (self.bits - 1))
        zeros = middle if self.zeros is None else unpacked(self.zeros, self.bits)[:, :count, None]
        dense: npt.NDArray[np.float32] = ((values - zeros) * self.scales[..., None]).reshape(rows, -1)[:, :inputs]
        return dense

    @classmethod
    def gathered(cls, count: int, parts: Iterable[Blocks]) -> Blocks:
        """Stack ``parts`` into a matrix of ``count`` rows. They may be a generator; only one part is in memory at a time."""
        whole: Blocks | None = None
        done = 0
        for part in parts:
            if whole is None:
                packed, scales = (
                    np.empty((count, *array.shape[1:]), array.dtype) for array in (part.packed, part.scales)
                )
                zeros = None if part.zeros is None else np.empty((count, *part.zeros.shape[1:]), np.uint8)
                whole = cls(packed, scales, zeros, part.bits, part.block_size)
            rows = slice(done, done + len(part.packed))
            whole.packed[rows], whole.scales[rows] = part.packed, part.scales
            if whole.zeros is not None and part.zeros is not None:
                whole.zeros[rows] = part.zeros
            done = rows.stop
        assert whole is not None and done == count
        return whole


@dataclass
class Quantizer:
    """Quantizes weights by name, each once.

    Attributes:
        scheme: The scheme.
        moments: Weight name → second moments of its inputs, for GPTQ; other weights are rounded to the nearest values  # (K, K)
        done: Weight name → its blocks so far.
    """

    scheme: Scheme
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    done: dict[str, Blocks] = field(default_factory=dict)
    _last: tuple[torch.Tensor, int, Factors] | None = field(default=None, init=False, repr=False)

    def layer(self, name: str, weight: npt.NDArray[np.float32]) -> Blocks:
        """Quantize a layer's weight  # (K, N)"""
        return self._quantized(name, ir.tensor(weight.T), self.scheme.bits)

    def experts(self, name: str, weight: ir.TensorProtocol, block_size: int) -> Blocks:
        """Quantize a weight of all experts of a layer, expert by expert; their rows follow one another  # (E, N, K)"""
        if name not in self.done:
            each = (torch.tensor(one) for piece in row_pieces(weight) for one in piece)  # (N, K)
            parts = (
                self._rounded(one, self.scheme.bits, block_size, f"{name}.{expert}") for expert, one in enumerate(each)
            )
            experts, rows, _ = weight.shape
            self.done[name] = Blocks.gathered(int(experts) * int(rows), parts)  # type: ignore[arg-type]
        return self.done[name]

    def table(self, name: str, weight: ir.TensorProtocol) -> Blocks:
        """Quantize the LM head's weight or the token table  # (V, D)"""
        return self._quantized(name, weight, self.scheme.head_bits)

    def _quantized(self, name: str, weight: ir.TensorProtocol, bits: int) -> Blocks:
        if name not in self.done:
            size = self.scheme.block_size_of(name)
            parts = (self._rounded(torch.tensor(rows), bits, size, name) for rows in row_pieces(weight))  # (N, K)
            self.done[name] = Blocks.gathered(int(weight.shape[0]), parts)  # type: ignore[arg-type]
        return self.done[name]

    def _rounded(self, rows: torch.Tensor, bits: int, size: int, name: str) -> Blocks:
        scheme, moment = self.scheme, self.moments.get(name)
        factors = None if moment is None else partial(self._factors, moment)
        return quantize(rows, bits, size, symmetric=scheme.symmetric, positive=scheme.positive, factors=factors)

    def _factors(self, moment: torch.Tensor, padding: int) -> Factors:
        """The last ones are kept: a large matrix comes in pieces, and several matrices have the same inputs."""
        if self._last is None or self._last[0] is not moment or self._last[1] != padding:
            self._last = moment, padding, factors_of(moment, padding)
        return self._last[2]


def quantize(
    weight: torch.Tensor,
    bits: int,
    size: int,
    *,
    symmetric: bool,
    factors: Callable[[int], Factors] | None = None,
    positive: bool = False,
) -> Blocks:
    """Quantize a matrix (N, K) in blocks of ``size`` along K.

    With the ``factors`` of its inputs' second moments, which take a padding, by GPTQ; otherwise to the nearest values. A
    matrix that was rounded before to 4 bits in the same blocks, as :mod:`balcony_export.variants.cut` does, keeps its values.
    """
    levels = 1 << bits
    padding = -weight.shape[1] % size
    padded = torch.nn.functional.pad(weight, (0, padding))
    blocks = padded.reshape(len(weight), -1, size)
    found = _earlier_scales(blocks) if symmetric and bits == 4 and not positive else None

    def grids(importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales, zeros = _grid(blocks, levels, symmetric, importance.reshape(-1, size), positive)
        return scales[..., 0], zeros[..., 0]

    if found is not None:
        scales, zeros = found, torch.full_like(found, levels // 2)
        values = (torch.round(blocks / scales) + zeros).reshape(padded.shape)
    elif factors is not None:
        values, scales, zeros = round_with_compensation(padded, factors(padding), grids, levels)
    else:
        scales, zeros = _grid(blocks, levels, symmetric, positive=positive)  # (N, blocks, 1)
        values = (torch.round(blocks / scales) + zeros).clamp_(0, levels - 1).reshape(padded.shape)
    packed = _packed(values.to(torch.uint8).numpy(), bits).reshape(len(weight), padded.shape[1] // size, -1)
    return Blocks(
        packed,
        scales.reshape(len(weight), -1).numpy().astype(np.float32),
        None if symmetric else _packed(zeros.reshape(len(weight), -1).to(torch.uint8).numpy(), bits),
        bits,
        size,
    )


def _earlier_scales(blocks: torch.Tensor) -> torch.Tensor | None:
    """Scales with which blocks (N, blocks, size) of an earlier rounding to 4 bits are exact, or None if there are none.

    The largest value of a block may be at any of the levels 1 to 8. The first row tells an ordinary matrix at once.
    """
    for part in (blocks[:1], blocks):
        largest = part.gather(-1, part.abs().argmax(-1, keepdim=True))  # (N, blocks, 1)
        scales = torch.zeros_like(largest)
        for level in (8, 7, 6, 5, 4, 3, 2, 1):
            scale = torch.where(largest == 0, torch.ones_like(largest), largest / -level)
            steps = torch.round(part / scale)
            exact = ((steps * scale - part).abs() <= 1e-6 * largest.abs()).all(-1, keepdim=True)
            exact &= (steps >= -8).all(-1, keepdim=True) & (steps <= 7).all(-1, keepdim=True)
            scales = torch.where(exact & (scales == 0), scale, scales)
        if (scales == 0).any():
            return None
    return scales


def _grid(
    block: torch.Tensor,
    levels: int,
    symmetric: bool,
    importance: torch.Tensor | None = None,
    positive: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row of values: the ``SHRINKS`` candidate of least squared error, weighted by ``importance``.

    (..., size) -> (..., 1), (..., 1)
    """
    middle = levels // 2
    low, high = block.amin(-1, keepdim=True), block.amax(-1, keepdim=True)
    if symmetric:
        # the largest value lies at the end of the range that has one more step; its sign selects the end
        largest = torch.where(high.abs() > low.abs(), high, low)
        full, zero = largest / -middle, torch.full_like(largest, middle)
        if positive:
            # a block of tiny values becomes zeros, because its scale must be a normal float16 number
            full = (largest.abs() / (middle - 1)).clamp(min=SMALLEST_SCALE)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        full = (high - low) / (levels - 1)
    full = torch.where(full == 0, torch.ones_like(full), full)
    if not symmetric:
        zero = torch.round(-low / full).clamp_(0, levels - 1)
    best, scale_best = torch.full_like(full, torch.inf), full
    for shrink in SHRINKS:
        scale = full * shrink
        rounded = (torch.round(block / scale) + zero).clamp_(0, levels - 1)
        errors = ((rounded - zero) * scale - block).square()
        error = (errors if importance is None else errors * importance).sum(-1, keepdim=True)
        better = error < best
        best, scale_best = torch.where(better, error, best), torch.where(better, scale, scale_best)
    return scale_best, zero


def _packed(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Rows of integers as bytes, low bits first; 4-bit rows are padded to whole bytes."""
    if bits == 8:
        return values
    low, high = values[:, 0::2], values[:, 1::2]
    packed: npt.NDArray[np.uint8] = low.copy()
    packed[:, : high.shape[1]] |= high << 4
    return packed


def stored_weights(bundle: Bundle) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Names in the traced graphs and dequantized weights of a quantized bundle, one by one  # (N, K)

    The names of merged products are joined by ``+``, and their rows follow one another.
    """
    seen: set[str] = set()
    for spec in bundle.manifest.cpu.values():
        model = load_graph(bundle, spec.file)
        for node in model.graph:
            weight = node.inputs[1] if node.op_type == "MatMulNBits" else None
            if weight is None or weight.name in seen:
                continue
            seen.add(str(weight.name))
            arrays = [None if v is None else v.const_value.numpy() for v in node.inputs[1:4]]  # type: ignore[union-attr]
            packed, scales, zeros = (*arrays, None)[:3]
            attributes = {key: node.attributes[key].as_int() for key in ("K", "bits", "block_size")}
            blocks = Blocks(packed, scales, zeros, attributes["bits"], attributes["block_size"])  # type: ignore[arg-type]
            yield str(weight.name).removesuffix(".blocks"), blocks.dequantized(attributes["K"])
        yield from stored_experts(model, lambda *parts: Blocks(*parts[:5]).dequantized(parts[5]))


def quantize_graph(model: ir.Model, quantizer: Quantizer) -> None:
    """Quantize every product with a weight in a lowered graph.

    Precondition: :func:`balcony_export.graph.passes.name_weights` named the weights. Postcondition: no ``MatMul`` or ``Gemm``
    with a weight is left except those of routers and gates, and weights on the left (Mamba's ``dt_proj``). Products of one
    input are merged into one ``MatMulNBits`` where the nodes after them allow it.
    """
    quantize_experts(model, quantizer)
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and (weight := node.inputs[1]) is not None and weight.const_value is not None:
            if decides(node):
                continue
            source = node.inputs[0]
            assert source is not None
            by_input.setdefault(source, []).append(node)
        elif node.op_type == "Gemm":
            _quantize_head(model, node, quantizer)
    for nodes in by_input.values():
        biases = [_bias_of(node) for node in nodes]
        # of products that are merged, some may be added to something else (a time step of a recurrence)
        if not all(biases):
            biases = [None] * len(nodes)
        attention = _attention_of([add or node for node, add in zip(nodes, biases, strict=True)])
        merged = _product(model, nodes, biases, quantizer)
        outputs = [(add or node).outputs[0] for node, add in zip(nodes, biases, strict=True)]
        if len(nodes) == 1:
            ir.convenience.replace_all_uses_with(outputs[0], merged, replace_graph_outputs=True)
        elif attention is not None:
            attention.replace_input_with(0, merged)
            attention.replace_input_with(1, None)
            attention.replace_input_with(2, None)
        else:
            _split(model, merged, outputs, [_width(node) for node in nodes])
        model.graph.remove([node for pair in zip(nodes, biases, strict=True) for node in pair[::-1] if node], safe=True)
    _silu(model)
    common.RemoveUnusedNodesPass()(model)


def _product(
    model: ir.Model, nodes: Sequence[ir.Node], biases: Sequence[ir.Node | None], quantizer: Quantizer
) -> ir.Value:
    weights = [node.inputs[1] for node in nodes]
    names = [str(weight.name) for weight in weights if weight is not None]
    arrays = [weight.const_value.numpy() for weight in weights if weight is not None and weight.const_value is not None]
    parts = (quantizer.layer(name, array) for name, array in zip(names, arrays, strict=True))
    blocks = Blocks.gathered(sum(array.shape[1] for array in arrays), parts)
    name = "+".join(names)
    bias = None
    if any(biases):
        found = [_constant_input(add) for add in biases if add is not None]
        bias = initializer(model, f"{name}.bias", np.concatenate([value.const_value.numpy() for value in found]))  # type: ignore[union-attr]
    source = nodes[0].inputs[0]
    assert source is not None and source.shape is not None
    node = _matmul_nbits(model, source, name, blocks, arrays[0].shape[0], quantizer.scheme.accuracy_level, bias)
    model.graph.insert_before(nodes[0], node)
    node.outputs[0].type = source.type
    node.outputs[0].shape = ir.Shape([*source.shape[:-1], len(blocks.packed)])
    return node.outputs[0]


def _matmul_nbits(
    model: ir.Model, source: ir.Value, name: str, blocks: Blocks, inputs: int, level: int, bias: ir.Value | None
) -> ir.Node:
    operands: list[ir.Value | None] = [
        source,
        initializer(model, f"{name}.blocks", blocks.packed),
        initializer(model, f"{name}.scales", blocks.scales),
        None if blocks.zeros is None else initializer(model, f"{name}.zeros", blocks.zeros),
    ]
    operands += [None, bias] if bias is not None else []
    attributes = {
        "K": inputs,
        "N": len(blocks.packed),
        "bits": blocks.bits,
        "block_size": blocks.block_size,
        "accuracy_level": level,
    }
    return ir.Node(MICROSOFT, "MatMulNBits", operands, ir.convenience.convert_attributes(attributes))


def _quantize_head(model: ir.Model, node: ir.Node, quantizer: Quantizer) -> None:
    flat, table = node.inputs[0], node.inputs[1]
    assert flat is not None and table is not None and table.const_value is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    blocks = quantizer.table("lm_head.weight", table.const_value)
    level = quantizer.scheme.accuracy_level
    # Gemm needs two axes; without the reshapes around it no logits are copied
    before, (after,) = flat.producer(), node.outputs[0].consumers()
    assert before is not None and before.op_type == after.op_type == "Reshape" and before.inputs[0] is not None
    inputs = int(table.const_value.shape[1])  # type: ignore[arg-type]
    new = _matmul_nbits(model, before.inputs[0], "lm_head.weight", blocks, inputs, level, bias)
    ir.convenience.replace_nodes_and_values(model.graph, node, [after, node], [new], after.outputs, new.outputs)
    model.graph.opset_imports[MICROSOFT] = 1


def _attention_of(nodes: Sequence[ir.Node]) -> ir.Node | None:
    """The fused attention whose query, key and value are exactly these products, if there is one."""
    if len(nodes) != 3:
        return None
    (attention, *others) = {use.node for node in nodes for use in node.outputs[0].uses()}
    if others or attention.op_type != "GroupQueryAttention":
        return None
    return attention if list(attention.inputs[:3]) == [node.outputs[0] for node in nodes] else None


def _bias_of(node: ir.Node) -> ir.Node | None:
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or _constant_input(uses[0].node) is None:
        return None
    return uses[0].node


def _constant_input(node: ir.Node) -> ir.Value | None:
    return next((value for value in node.inputs if value is not None and value.const_value is not None), None)


def _width(node: ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    return int(weight.const_value.shape[1])  # type: ignore[arg-type]


def _split(model: ir.Model, merged: ir.Value, outputs: Sequence[ir.Value], widths: Sequence[int]) -> None:
    producer = merged.producer()
    assert producer is not None
    sizes = initializer(model, f"{merged.name}_widths", np.array(widths, np.int64))
    split = ir.Node("", "Split", [merged, sizes], [ir.AttrInt64("axis", -1)], num_outputs=len(outputs))
    ir.convenience.replace_nodes_and_values(model.graph, producer, [], [split], outputs, split.outputs)


def _silu(model: ir.Model) -> None:
    """``x · sigmoid(x)`` as one operator."""
    for node in list(model.graph):
        if node.op_type != "Sigmoid":
            continue
        source = node.inputs[0]
        uses = list(node.outputs[0].uses())
        if source is None or len(uses) != 1 or uses[0].node.op_type != "Mul" or source not in uses[0].node.inputs:
            continue
        product = uses[0].node
        fused, old = ir.Node(MICROSOFT, "QuickGelu", [source], [ir.AttrFloat32("alpha", 1.0)]), [product, node]
        ir.convenience.replace_nodes_and_values(model.graph, product, old, [fused], product.outputs, fused.outputs)


def parse_precision(text: str) -> Literal["float32", "float16"] | Scheme:
    """Parse ``fp32``, ``fp16``, or a scheme: ``int4`` or ``int8`` and the differences from the default, separated by commas.

    Raises:
        InputError: The text is something else.
    """
    if text in ("fp32", "fp16"):
        return "float32" if text == "fp32" else "float16"
    first, *rest = text.split(",")
    allowed = (
        "fp32, fp16, or int4 or int8 and any of block=32|64|128, down=32|64|128|256, sym, asym, positive, head=4|8, "
        "level=1|4, kv=8|32, separated by commas"
    )
    if first not in ("int4", "int8"):
        raise InputError(f"--precision {text}: '{first}' is not known: give {allowed}")
    for others in ("sym", "positive"):
        if {"asym", others} <= set(rest):
            raise InputError(f"--precision {text}: {others} and asym exclude each other: give one of the two")
    flags: dict[str, dict[str, Any]] = {
        "sym": {"symmetric": True},
        "asym": {"symmetric": False},
        "positive": {"positive": True},
        **{f"block={size}": {"block_size": size} for size in (32, 64, 128)},
        **{f"down={size}": {"down_block_size": size} for size in (32, 64, 128, 256)},
        **{f"head={bits}": {"head_bits": bits} for bits in (4, 8)},
        **{f"level={level}": {"accuracy_level": level} for level in (1, 4)},
        **{f"kv={bits}": {"kv_bits": bits} for bits in (8, 32)},
    }
    chosen: dict[str, Any] = {"bits": int(first.removeprefix("int"))}
    for part in rest:
        if part not in flags:
            raise InputError(f"--precision {text}: '{part}' is not known: give {allowed}")
        if flags[part].keys() & (chosen.keys() - {"bits"}):
            raise InputError(f"--precision {text}: '{part}' contradicts an earlier word: give one of the two")
        chosen |= flags[part]
    return Scheme(**chosen)
