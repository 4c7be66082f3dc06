"""Mixtures of experts: one symbolic node while a model is traced, then standard operators or ONNX Runtime's ``MoE``.

Owns the node ``balcony_edge::Experts`` and what becomes of it:

    Experts(x (N, D), logits (N, E), gate_up (E, 2I, D), down (E, D, I); k, normalize) → (N, D)

A row's ``k`` experts are those with the largest probabilities softmax(logits). Their outputs are weighted by these
probabilities, which ``normalize`` divides by their sum. :func:`spell_out` writes it in standard operators, :func:`fuse` as
``com.microsoft.MoE``; :mod:`balcony_export.quantize.experts` turns that into ``QMoE``.

LFM2's routers choose by sigmoids plus biases, and weigh by the shares of the chosen sigmoids, times a factor. Their logits are
changed before they reach the node, so that it makes the same choice with the same weights; the factor multiplies its output.

Routers are recognised by their results on sample numbers, not by name, as norms are in :mod:`.operators`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn
from torch.onnx import ops
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from balcony_edge.errors import UnsupportedModelError
from balcony_export.graph.ir_tools import MICROSOFT, Chain, initializer, replace_node
from balcony_export.graph.stand_ins import replaced_attributes, replaced_children
from balcony_export.graph.widen import Widened
from balcony_export.model.experts import experts_in, is_experts

_IMPLEMENTATION = "balcony_edge_trace"
_DOMAIN, _OPERATOR = "balcony_edge", "Experts"
#: End of the name of a weight whose rows (gate, then up) are stored alternately: gate 0, up 0, gate 1, up 1, …
GATE_UP = ".gate_up_proj"
#: Logit of an expert that a router did not choose: its exponential is 0, and float16 can hold it.
_NOT_CHOSEN = -1e4
#: Rows of a router's trial: enough for most experts to be chosen.
_TRIAL_ROWS = 32


class Interleaved(Widened):
    """Experts' gate and up rows in alternation, the only order that ONNX Runtime's CPU kernels take  # (E, 2I, D)"""

    def rows(self, first: int, last: int) -> npt.NDArray[np.generic]:
        """Some experts, converted."""
        return interleaved(super().rows(first, last))


def interleaved(weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Gate rows above up rows → gate and up rows in alternation  # (E, 2I, D)"""
    experts, rows, width = weight.shape
    return weight.reshape(experts, 2, rows // 2, width).swapaxes(1, 2).reshape(weight.shape)


def separated(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The inverse of :func:`interleaved`  # (E, 2I, D)"""
    experts, rows, width = weight.shape
    return weight.reshape(experts, rows // 2, 2, width).swapaxes(1, 2).reshape(weight.shape)


def interleave(models: Iterable[ir.Model]) -> None:
    """Store the gate and up rows of all experts in alternation; both sets of graphs then share each weight.

    Precondition: the graphs read them so, which is true after :func:`spell_out` and :func:`fuse`.
    """
    for model in models:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not str(value.name).endswith(GATE_UP):
                continue
            if isinstance(tensor, Widened):
                value.const_value = Interleaved(tensor.original, tensor.wide, value.name)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # a view that nobody writes to
                    weight = torch.from_numpy(tensor.numpy())
                value.const_value = Interleaved(weight, weight.dtype, value.name)


class _Router(nn.Module):
    """Hands a router's logits to the experts, and how they become weights instead of the weights themselves."""

    factor = 1.0

    def __init__(self, weight: torch.Tensor, top_k: int, normalizes: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.top_k, self.normalizes = top_k, normalizes

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, _Router]:
        """Logits twice and this router, in the places of logits, weights and indices  # (N, D)"""
        logits = torch.nn.functional.linear(hidden, self.weight)  # (N, E)
        return logits, logits, self


class _BiasedRouter(_Router):
    """Chooses by sigmoid(logits) + bias, weighs by the shares of the chosen sigmoids, and multiplies the result by ``factor``.

    The softmax of logarithms is shares. So the experts get the logarithms of the chosen sigmoids, and for the others a number
    whose exponential is 0. transformers adds 1e-6 to the sum of the sigmoids, which is left out here.
    """

    def __init__(self, weight: torch.Tensor, top_k: int, factor: float) -> None:
        super().__init__(weight, top_k, normalizes=True)
        self.factor = factor

    def forward(self, hidden: torch.Tensor, expert_bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, _Router]:  # type: ignore[override]
        """Like the other router, with the changed logits  # (N, D), (E)"""
        chances = torch.nn.functional.linear(hidden, self.weight).float().sigmoid()  # (N, E)
        scores = chances + expert_bias
        chosen = scores >= scores.topk(self.top_k, dim=-1).values.amin(dim=-1, keepdim=True)
        logits = torch.where(chosen, chances.log(), _NOT_CHOSEN).to(hidden.dtype)
        return logits, logits, self


def router_operator(router: Any) -> _Router:
    """What a router computes, found by a trial.

    Raises:
        UnsupportedModelError: It routes neither by the largest probabilities nor by the largest sigmoids plus biases.
    """
    kept = router.weight.detach()
    # the router's own weight may be reserved memory without values (balcony_export.graph.widen), so the trial brings one
    trial = copy.deepcopy(router)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(kept.shape, generator=random).to(kept.dtype)
    trial.weight = nn.Parameter(weight, requires_grad=False)
    # logits of spread 2: of experts that are all equally likely, many rules choose and weigh alike
    spread = 2.0 * weight.shape[1] ** -0.5
    probe = (spread * torch.randn(_TRIAL_ROWS, weight.shape[1], generator=random)).to(weight.dtype)
    logits = torch.nn.functional.linear(probe, weight).float()
    rule = _biased if "expert_bias" in inspect.signature(router.forward).parameters else _plain
    made = rule(trial, probe, logits)
    if made is None:
        raise UnsupportedModelError(
            f"{type(router).__name__}: routes neither by the largest probabilities or their shares, nor by the shares of the "
            "largest sigmoids plus biases: export cannot represent it"
        )
    made.weight.data = kept
    return made


@torch.no_grad()
def _plain(trial: Any, probe: torch.Tensor, logits: torch.Tensor) -> _Router | None:
    """The router whose weights are the largest probabilities, or their shares; None if ``trial`` is another one."""
    _, found, index = trial(probe)
    chances = torch.softmax(logits, dim=-1)
    if not _chooses_largest(index, chances, trial.top_k):
        return None
    best = chances.gather(1, index)
    for normalizes in (False, True):
        if _close(found, best / best.sum(dim=-1, keepdim=True) if normalizes else best):
            return _Router(trial.weight, int(trial.top_k), normalizes)
    return None


@torch.no_grad()
def _biased(trial: Any, probe: torch.Tensor, logits: torch.Tensor) -> _Router | None:
    """The router that chooses by sigmoids plus biases; None if ``trial`` is another one."""
    bias = torch.linspace(-0.3, 0.3, logits.shape[1])  # as large as the differences between the sigmoids
    _, found, index = trial(probe, bias)
    chances = torch.sigmoid(logits)
    if not _chooses_largest(index, chances + bias, trial.top_k):
        return None
    best, factor = chances.gather(1, index), float(trial.routed_scaling_factor)
    if not _close(found, factor * best / best.sum(dim=-1, keepdim=True)):
        return None
    return _BiasedRouter(trial.weight, int(trial.top_k), factor)


def _chooses_largest(index: torch.Tensor, scores: torch.Tensor, top_k: int) -> bool:
    """Whether the experts ``index`` (N, k) have the largest scores (N, E)."""
    largest = scores.topk(top_k, dim=-1).values
    return index.shape == largest.shape and _close(scores.gather(1, index).sort().values, largest.sort().values)


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found.float(), wanted, rtol=1e-2, atol=1e-3)


def _check_experts(experts: Any) -> None:
    """Refuse experts other than down(silu(gate(x)) · up(x)) without biases."""
    probe = torch.linspace(-3, 3, 16)
    plain = experts.has_gate and experts.is_concatenated and not experts.has_bias
    if not plain or experts.is_transposed or experts.has_post_expert_norm:
        raise UnsupportedModelError(
            f"{type(experts).__name__}: its experts have another form than SwiGLU without biases"
        )
    gated = experts._apply_gate(torch.cat((probe, probe + 1)))
    if not torch.allclose(gated, torch.nn.functional.silu(probe) * (probe + 1), atol=1e-5):
        raise UnsupportedModelError(
            f"{type(experts).__name__}: its activation is not SwiGLU: export cannot represent it"
        )


def _experts(experts: Any, hidden: torch.Tensor, router: _Router, logits: torch.Tensor) -> torch.Tensor:
    attributes: dict[str, Any] = {"k": router.top_k, "normalize": int(router.normalizes)}
    inputs = (hidden, logits, experts.gate_up_proj, experts.down_proj)
    operator = f"{_DOMAIN}::{_OPERATOR}"
    out = ops.symbolic(operator, inputs, attributes, dtype=hidden.dtype, shape=hidden.shape, version=1)
    return out if router.factor == 1.0 else out * router.factor


@contextlib.contextmanager
def symbolic_experts(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the mixtures of experts in ``modules`` emit one node each until the end of the context."""
    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _experts)
    found: list[Any] = [experts for root in modules for experts in experts_in(root)]
    for experts in found:
        _check_experts(experts)
    routers = set()  # of each block, the one child that chooses
    for block in (child for root in modules for child in root.modules()):
        if any(is_experts(child) for child in block.children()):
            routers.add(next(child for child in block.children() if hasattr(child, "top_k")))
    with (
        replaced_children(modules, lambda child: router_operator(child) if child in routers else None),
        replaced_attributes([experts.config for experts in found], {"_experts_implementation": _IMPLEMENTATION}),
    ):
        yield


def fuse(model: ir.Model) -> None:
    """Replace every ``Experts`` by ONNX Runtime's ``MoE``, which chooses and weights the experts in the same way."""
    for node in _nodes(model):
        source, logits, gate_up, down = node.inputs
        attributes: dict[str, Any] = {
            "k": node.attributes["k"].as_int(),
            "normalize_routing_weights": node.attributes["normalize"].as_int(),
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
        operands = [source, logits, gate_up, None, down]
        fused = ir.Node(MICROSOFT, "MoE", operands, ir.convenience.convert_attributes(attributes))
        replace_node(model, node, [fused])
        model.graph.opset_imports[MICROSOFT] = 1
    model.graph.opset_imports.pop(_DOMAIN, None)


def spell_out(model: ir.Model) -> None:
    """Write every ``Experts`` in standard operators: all experts run on all rows, weighted by the routing.

    This is right for any number of rows in every engine, and its memory is bounded. To gather the weights of each row's experts
    would copy k of E experts for every row: gigabytes for a prompt. Nor does any weight need to be transposed, because the
    experts' matrices are the left operands.
    """
    for node in _nodes(model):
        source, logits, gate_up, down = node.inputs
        assert source is not None and gate_up is not None and gate_up.shape is not None
        experts, rows, _ = gate_up.shape.numpy()
        chain = Chain(model)
        routing = _routing(chain, node, logits, experts)  # (N, E)
        by_expert = chain("Unsqueeze", chain("Transpose", routing, perm=[1, 0]), chain.integers(1))  # (E, 1, N)
        both = chain("MatMul", gate_up, chain("Transpose", source, perm=[1, 0]))  # (E, 2I, N)
        pairs = chain("Reshape", both, chain.integers(experts, rows // 2, 2, -1))  # (E, I, 2, N)
        gate, up = (chain("Gather", pairs, chain.integer(part), axis=2) for part in (0, 1))  # (E, I, N)
        active = chain("Mul", chain("Mul", gate, chain("Sigmoid", gate)), up)
        out = chain("MatMul", down, chain("Mul", active, by_expert))  # (E, D, N)
        summed = chain("ReduceSum", out, chain.integers(0), keepdims=0)  # (D, N)
        chain("Transpose", summed, perm=[1, 0])  # (N, D)
        replace_node(model, node, chain.nodes)
    model.graph.opset_imports.pop(_DOMAIN, None)


def _routing(chain: Chain, node: ir.Node, logits: ir.Value | None, experts: int) -> ir.Value:
    """Weight of every expert for every row, 0 for those that are not chosen  # (N, E)"""
    assert logits is not None and logits.dtype is not None
    half = logits.dtype != ir.DataType.FLOAT
    wide = chain("Cast", logits, to=ir.DataType.FLOAT.value) if half else logits
    k = chain.integers(node.attributes["k"].as_int())
    chances, chosen = chain.several("TopK", 2, chain("Softmax", wide, axis=-1), k, axis=-1)  # (N, k)
    if node.attributes["normalize"].as_int():
        chances = chain("Div", chances, chain("ReduceSum", chances, chain.integers(-1), keepdims=1))
    if half:
        chances = chain("Cast", chances, to=logits.dtype.value)
    last = chain.integers(2)
    is_expert = chain("Equal", chain("Unsqueeze", chosen, last), chain.integers(*range(experts)))  # (N, k, E)
    nothing = initializer(chain.model, "no_weight", np.zeros((), logits.dtype.numpy()))
    weights = chain("Where", is_expert, chain("Unsqueeze", chances, last), nothing)
    return chain("ReduceSum", weights, chain.integers(1), keepdims=0)


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == _OPERATOR]
