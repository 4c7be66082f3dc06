"""Quantized experts: ``MoE`` becomes ONNX Runtime's ``QMoE``, and GPTQ's moments of each expert's own inputs.

Owns the packed layout of ``QMoE`` (all experts of a layer in one tensor, in the blocks of :mod:`.blocks`). ``QMoE`` has one
block size for all matrices of a layer; if the wanted one does not divide their inputs, half of it is tried, and so on.

ONNX Runtime 1.32 rounds the inputs of 8-bit experts to int8 at every accuracy level, because it has no other kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from balcony_export.graph.experts import GATE_UP, separated
from balcony_export.graph.ir_tools import MICROSOFT, initializer, replace_node
from balcony_export.model.experts import experts_in, is_experts

if TYPE_CHECKING:
    from balcony_export.quantize.blocks import Quantizer

#: Smallest block that ``QMoE`` takes.
SMALLEST_BLOCK = 16
#: Rows that an expert must have seen for GPTQ. With fewer, the moments describe these rows and not the expert's inputs, and
#: its weights are rounded to the nearest values.
EXPERT_ROWS = 128
#: Places of the inputs of ``MoE``.
_GATE_UP, _DOWN = 2, 4


def quantize_experts(model: ir.Model, quantizer: Quantizer) -> None:
    """Replace every ``MoE`` of a lowered graph by a ``QMoE`` with the quantizer's grids."""
    for node in [node for node in model.graph if node.op_type == "MoE"]:
        scheme = quantizer.scheme
        weights = [node.inputs[place] for place in (_GATE_UP, _DOWN)]
        tensors = [weight.const_value for weight in weights if weight is not None and weight.const_value is not None]
        names = [str(weight.name) for weight in weights if weight is not None]
        size = _block_size(scheme.block_size, [int(tensor.shape[2]) for tensor in tensors])  # type: ignore[arg-type]
        operands: list[ir.Value | None] = [*node.inputs[:2], *[None] * 13]
        for name, tensor, place, zeros in zip(names, tensors, (2, 5), (11, 12), strict=True):
            blocks = quantizer.experts(name, tensor, size)
            experts = int(tensor.shape[0])  # type: ignore[arg-type]
            operands[place] = initializer(model, f"{name}.blocks", _by_expert(blocks.packed, experts))
            operands[place + 1] = initializer(model, f"{name}.scales", _by_expert(blocks.scales, experts))
            if blocks.zeros is not None:
                operands[zeros] = initializer(model, f"{name}.zeros", _by_expert(blocks.zeros, experts))
        attributes: dict[str, Any] = {
            **node.attributes,
            "expert_weight_bits": scheme.bits,
            "block_size": size,
            "accuracy_level": scheme.accuracy_level,
        }
        chain = []
        if not node.attributes["normalize_routing_weights"].as_int():
            # QMoE takes the softmax over the chosen experts only, so weights that are not shares are an input of their own
            chain.append(ir.Node("", "Softmax", [node.inputs[1]], [ir.AttrInt64("axis", -1)]))
            operands[14] = chain[0].outputs[0]
        while operands[-1] is None:
            operands.pop()
        chain.append(ir.Node(MICROSOFT, "QMoE", operands, ir.convenience.convert_attributes(attributes)))
        replace_node(model, node, chain)


def _by_expert(array: npt.NDArray[Any], experts: int) -> npt.NDArray[Any]:
    """Rows of all experts → (E, N, values of a row)."""
    return array.reshape(experts, len(array) // experts, -1)


def can_round_experts(model: nn.Module) -> bool:
    """Whether ONNX Runtime's quantized experts take the widths of every mixture in a model."""
    mixtures: Iterator[Any] = experts_in(model)
    return not any(width % SMALLEST_BLOCK for experts in mixtures for width in experts.down_proj.shape[1:])


def _block_size(wanted: int, inputs: list[int]) -> int:
    """The wanted size, halved until it divides all inputs, which are multiples of :data:`SMALLEST_BLOCK`."""
    while any(width % wanted for width in inputs):
        wanted //= 2
    return wanted


def stored_experts(model: ir.Model, dequantized: Callable[..., npt.NDArray[np.float32]]) -> Iterator[tuple[str, Any]]:
    """``(name, weight)`` of every quantized expert weight of a graph, in the order of the model's own rows  # (E, N, K)

    Args:
        model: A quantized graph.
        dequantized: Function from packed rows, scales, zero points, bits and inputs to a matrix.
    """
    for node in model.graph:
        if node.op_type != "QMoE":
            continue
        bits = node.attributes["expert_weight_bits"].as_int()
        block = node.attributes["block_size"].as_int()
        for place, zeros_place in ((2, 11), (5, 12)):
            arrays = []
            for at in (place, place + 1, zeros_place):
                value = node.inputs[at] if at < len(node.inputs) else None
                arrays.append(None if value is None or value.const_value is None else value.const_value.numpy())
            packed, scales, zeros = arrays
            assert packed is not None and scales is not None
            experts, rows, width = packed.shape
            matrix = dequantized(
                packed.reshape(experts * rows, scales.shape[2], -1),
                scales.reshape(experts * rows, -1),
                None if zeros is None else zeros.reshape(experts * rows, -1),
                bits,
                block,
                width * 8 // bits,
            ).reshape(experts, rows, -1)
            name = str(node.inputs[place].name).removesuffix(".blocks")  # type: ignore[union-attr]
            yield name, separated(matrix) if name.endswith(GATE_UP) else matrix


class ExpertMoments:
    """Second moments of the inputs of each expert's matrices, over the rows that the router sends to it.

    Attributes:
        sums: Weight name and expert → sum of x xᵀ  # (K, K)
        rows: Weight name and expert → number of rows.
    """

    def __init__(self, scaled: Callable[[torch.Tensor], torch.Tensor], sink_rows: float) -> None:
        """``scaled`` limits the size of large rows; the first row of a text counts as ``sink_rows`` rows."""
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self._scaled, self._sink = scaled, sink_rows**0.5

    def watch(self, root: nn.Module, prefix: str) -> Iterator[Any]:
        """Hooks on all mixtures below ``root``; the caller removes them."""
        for name, module in root.named_modules():
            if is_experts(module):
                yield module.register_forward_pre_hook(
                    lambda experts, x, n=f"{prefix}{name}": self._take(n, experts, *x)
                )

    def _take(self, name: str, experts: Any, hidden: torch.Tensor, index: torch.Tensor, _: torch.Tensor) -> None:
        inputs = self._scaled(hidden)
        for expert in index.unique().tolist():
            rows = (index == expert).any(dim=1).nonzero()[:, 0]
            both = torch.nn.functional.linear(hidden[rows], experts.gate_up_proj[expert])
            active = self._scaled(experts._apply_gate(both))
            weights = torch.ones(len(rows), 1)
            weights[rows == 0] = self._sink
            for weight, x in (("gate_up_proj", inputs[rows] * weights), ("down_proj", active * weights)):
                key = f"{name}.{weight}.{expert}"
                if key not in self.sums:
                    self.sums[key] = torch.zeros(x.shape[1], x.shape[1])
                self.sums[key].addmm_(x.T, x)
                self.rows[key] = self.rows.get(key, 0) + len(x)

    def means(self) -> dict[str, torch.Tensor]:
        """Weight name and expert → mean of x xᵀ, for experts that saw at least :data:`EXPERT_ROWS` rows."""
        return {key: total / self.rows[key] for key, total in self.sums.items() if self.rows[key] >= EXPERT_ROWS}
