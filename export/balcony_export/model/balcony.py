"""Balconies: one decoder layer (or a part of one) and one norm per exit, and their initialization.

Owns the module and how it begins: the layer as the last decoder layer (paper, section 3), or the last that attends, and the
norm as the base model's final norm (our choice). Their files are :mod:`.balcony_files`, training is
:mod:`balcony_export.train.trainer`, tracing is :mod:`balcony_export.graph.trace`. An exit layer ``e`` is the hidden state after
exactly ``e`` backbone layers.
"""

from __future__ import annotations

import copy
import re
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from balcony_edge.errors import InputError
from balcony_export.model.architecture import parts_of
from balcony_export.model.experts import Use, dense_from, experts_in, mixture
from balcony_export.model.layer import ATTENTION, Silent, layer_index, memory_of, mixer_names, mlp_names

#: Tokens on which the use of experts is measured, evenly over the vocabulary.
_WATCHED_TOKENS = 128


#: What an exit holds before its norm: a decoder layer (the paper's balcony), one half of one, nothing (early exit), or, in a
#: mixture of experts, a decoder layer with a dense MLP in the place of the experts.
BalconyKind = Literal["decoder", "attention", "mlp", "none", "dense"]
KINDS: tuple[BalconyKind, ...] = get_args(BalconyKind)


class Balcony(nn.Module):
    """The module of an exit, ``norm(layer(hidden))``; the base model's own LM head follows it.

    Args:
        exit_layer: Number of backbone layers before it.
        layer: A decoder layer. For the kinds ``attention`` and ``mlp`` its other half is silenced; for ``none`` it is not used.
        norm: An RMSNorm.
        kind: See :data:`BalconyKind`.
    """

    def __init__(self, exit_layer: int, layer: Any, norm: nn.Module, kind: BalconyKind = "decoder") -> None:
        super().__init__()
        self.exit_layer, self.kind = exit_layer, kind
        if kind == "mlp":
            for name in mixer_names(layer):
                setattr(layer, name, Silent(getattr(layer, name), attention=name == ATTENTION))
        elif kind == "attention":
            for name in mlp_names(layer):
                setattr(layer, name, Silent(getattr(layer, name), attention=False))
        self.layer = None if kind == "none" else layer
        self.norm = norm

    @property
    def copies(self) -> int | None:
        """Index of the backbone's layer that it began as a copy of; None without a layer."""
        return None if self.layer is None else layer_index(self.layer)

    @property
    def keeps_rows(self) -> bool:
        """Whether it reads earlier rows, and so has a cache."""
        return self.kind in ("decoder", "attention", "dense")

    def forward(self, hidden: torch.Tensor, **layer_arguments: Any) -> torch.Tensor:
        """Normed hidden state for the LM head.

        Args:
            hidden: Backbone state after ``exit_layer`` layers  # (B, T, D)
            layer_arguments: Arguments of the base model's layer that it copies (mask, positions, rotary tables).
        """
        out = hidden if self.layer is None else self.layer(hidden, **layer_arguments)
        out = out[0] if isinstance(out, tuple) else out  # some architectures also return attention weights
        normed: torch.Tensor = self.norm(out)  # (B, T, D)
        return normed

    def rows(self, hidden: torch.Tensor, where: torch.Tensor, **layer_arguments: Any) -> torch.Tensor:
        """What :meth:`forward` gives at some positions; the MLP, which works position by position, skips the others.

        Args:
            hidden: Backbone state after ``exit_layer`` layers  # (B, T, D)
            where: Flat indices of the positions  # (n,)
            layer_arguments: Arguments of the base model's layer that it copies (mask, positions, rotary tables).

        Returns:
            Normed hidden states  # (n, D)
        """
        rows, width = hidden.shape[0] * hidden.shape[1], hidden.shape[2]

        def gather(_mlp: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
            return args[0].flatten(0, 1)[where][None]  # (1, n, D): mixtures of experts take three axes

        def scatter(_mlp: nn.Module, _args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            return out.new_zeros(rows, width).index_copy(0, where, out[0]).view(hidden.shape)

        out, handles = hidden, []
        try:
            if self.layer is not None:
                for name in mlp_names(self.layer):
                    mlp: nn.Module = getattr(self.layer, name)
                    handles += [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter)]
                out = self.layer(hidden, **layer_arguments)
        finally:
            for handle in handles:
                handle.remove()
        out = out[0] if isinstance(out, tuple) else out
        normed: torch.Tensor = self.norm(out.flatten(0, 1)[where])  # (n, D)
        return normed


def parse_exits(text: str, num_layers: int, option: str = "--exits") -> tuple[int, ...]:
    """Parse exit layers: ``"14,17,20"`` or the paper's ``"0.5x,0.6x,0.7x"``.

    A factor f names the exit whose backbone and balcony together have f of the layers: (e + 1) / N = f, rounded.

    Raises:
        InputError: A part is not a number or not between 1 and N - 1, or the exits are not in ascending order.
    """
    allowed = f"a model of {num_layers} layers takes exits 1 to {num_layers - 1}, or factors such as 0.5x"
    exits: list[int] = []
    for part in (piece.strip() for piece in text.split(",")):
        if re.fullmatch(r"\d{1,9}", part):  # Python reads no number of thousands of digits
            exit_layer = int(part)
        elif re.fullmatch(r"(\d{1,9}(\.\d*)?|\.\d+)x", part):
            exit_layer = round(float(part[:-1]) * num_layers) - 1
        else:
            raise InputError(f"{option} {text}: '{part}' is not an exit: {allowed}, separated by commas")
        if not 1 <= exit_layer <= num_layers - 1:
            raise InputError(f"{option} {text}: '{part}' is exit layer {exit_layer}: {allowed}")
        if exit_layer in exits:
            raise InputError(f"{option} {text}: exit layer {exit_layer} is named twice: name each exit once")
        if exits and exit_layer < exits[-1]:
            raise InputError(f"{option} {text}: {exit_layer} comes after {exits[-1]}: write exits in ascending order")
        exits.append(exit_layer)
    return tuple(exits)


def init_balconies(
    model: PreTrainedModel,
    exit_layers: tuple[int, ...],
    kind: BalconyKind = "decoder",
    *,
    layer: int | None = None,
    random: int | None = None,
) -> dict[int, Balcony]:
    """Make untrained balconies: deep copies of a decoder layer (paper, section 3) and of the final norm.

    The layer is the last one, or the last that attends (in a window or to all rows) if others do not. A copy keeps its
    ``layer_idx``, so that attention type, window and rotary table are those of the copied layer.

    Args:
        model: The base model.
        exit_layers: Exits below the full depth.
        kind: What the balconies hold.
        layer: Index of another layer to copy.
        random: A seed, with which weights are drawn as the base model's were before its training; they depend on the seed and
            the exit layer.

    The MLP of the kind ``dense`` begins with the copied layer's most used experts: see :func:`.experts.dense_from`.

    Raises:
        InputError: The kind is ``dense`` and the copied layer is not a mixture of experts, or ``mlp`` and it has no MLP.
    """
    parts = parts_of(model)
    copied, norm = parts.layers[copied_layer(model) if layer is None else layer], parts.norm
    if kind == "mlp" and not mlp_names(copied):
        raise InputError("exit module 'mlp': the layers of this model have no MLP: take 'decoder' or 'none'")
    if kind == "dense":
        copied = _with_dense_mlp(model, copied)
    made = {e: Balcony(e, copy.deepcopy(copied), copy.deepcopy(norm), kind).eval() for e in exit_layers}
    if random is not None:
        for exit_layer, balcony in made.items():
            with torch.random.fork_rng(devices=()):  # the model is on the CPU
                torch.manual_seed(int(np.random.SeedSequence([random, exit_layer]).generate_state(1)[0]))
                balcony.apply(model._init_weights)
    return made


def copied_layer(model: PreTrainedModel) -> int:
    """Index of the layer that balconies of a model copy: the last that attends, or the last of a model without attention."""
    layers = parts_of(model).layers
    return max((index for index, layer in enumerate(layers) if memory_of(layer).attention), default=len(layers) - 1)


@torch.no_grad()
def _with_dense_mlp(model: PreTrainedModel, layer: nn.Module) -> nn.Module:
    """A copy of a layer with a dense MLP instead of its experts, which are watched on tokens of the whole vocabulary."""
    parts, sizes = parts_of(model), mixture(model.config)
    names = [name for name in mlp_names(layer) if any(experts_in(getattr(layer, name)))]
    if sizes is None or not names:
        raise InputError(
            "exit module 'dense': the layer that balconies copy is not a mixture of experts: take 'decoder'"
        )
    block = getattr(layer, names[0])
    use = Use(block)
    try:
        device = parts.embed.weight.device
        tokens = torch.linspace(0, parts.embed.num_embeddings - 1, _WATCHED_TOKENS, device=device).long()[None]
        parts.decoder(input_ids=tokens, use_cache=False)
    finally:
        use.close()
    dense = dense_from(block, use, sizes.chosen)
    copied = copy.deepcopy(layer)
    setattr(copied, names[0], dense)
    return copied
