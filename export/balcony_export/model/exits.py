"""A frozen language model with its exits: the one place that runs a Hugging Face model from the inside.

Owns how the states between layers are taken (hooks, so that no architecture is known by name), what a decoder layer is
called with (masks, rotary tables, caches), and how a state becomes logits. An exit at layer ``e`` is

    state after e layers  →  balcony (decoder layer, then norm)  →  LM head  →  soft cap, if the model has one

and the full depth is the exit at the last layer, where the model's own final norm takes the place of the balcony. What is
done with logits and states is the callers' business: training, evaluation, quantization, verification. What a balcony
computes between its input and its output is :class:`.balcony.Balcony`'s.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from balcony_export.model.architecture import cast_weights, layer_type, parts_of
from balcony_export.model.balcony import Balcony, BalconyKind, copied_layer, init_balconies
from balcony_export.model.balcony_files import load_balconies
from balcony_export.model.layer import layer_index


@dataclass(frozen=True)
class States:
    """Result of one pass of the backbone: states at some exits, and the arguments of a balcony.

    Attributes:
        at: Exit layer → hidden state after that many layers, before any norm  # (B, T, D)
        layer_arguments: Keyword arguments of the layer that the balconies are copies of, without its cache.
    """

    at: Mapping[int, torch.Tensor]
    layer_arguments: Mapping[str, Any]


class ExitModel:
    """A causal language model and its balconies.

    Neither gradients nor devices are decided here: callers that only read use ``torch.no_grad()``, and tokens must be on
    the model's device.

    Attributes:
        model: The base model.
        balconies: Exit layer → balcony, for the exits below the full depth.
        parts: The base model's modules by role.
        depth: Number of decoder layers, which is also the exit layer of the full depth.
        copied: Index of the layer that the balconies are copies of.
    """

    def __init__(self, model: PreTrainedModel, balconies: Mapping[int, Balcony] | None = None) -> None:
        """Attach balconies to a model.

        Raises:
            UnsupportedModelError: The model does something that export cannot represent.
        """
        self.model = model
        self.parts = parts_of(model)
        self.balconies = dict(sorted((balconies or {}).items()))
        self.depth = len(self.parts.layers)
        copied = {balcony.copies for balcony in self.balconies.values()} - {None}
        assert len(copied) <= 1, "the balconies of a model are copies of one layer"
        self.copied: int = copied.pop() if copied else copied_layer(model)  # type: ignore[assignment]

    @classmethod
    def open(
        cls,
        model: PreTrainedModel,
        exit_layers: tuple[int, ...] | None,
        directory: Path | None = None,
        kind: BalconyKind = "decoder",
    ) -> ExitModel:
        """Attach the balconies of a directory, or untrained ones.

        Args:
            model: The base model.
            exit_layers: Exits below the full depth; None for all that the directory has.
            directory: Balconies that ``balcony-edge train`` wrote; without it untrained ones (:func:`.init_balconies`).
            kind: Kind of the untrained balconies.

        Raises:
            CheckpointError: The directory does not fit the model or the exits.
        """
        if directory is None:
            return cls(model, init_balconies(model, exit_layers or (), kind))
        return cls(model, load_balconies(directory, model, exit_layers))

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """All exits, the full depth last."""
        return (*self.balconies, self.depth)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The base model and the balconies."""
        return (self.model, *self.balconies.values())

    @property
    def soft_cap(self) -> float | None:
        """Bound ``c`` of the logits, which are ``c * tanh(logits / c)``; None in models without one."""
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    @property
    def logits_divisor(self) -> float:
        """What logits are divided by: 1 except in Granite and Falcon-H1, whose configuration has the inverse."""
        config = self.model.config
        return float(getattr(config, "logits_scaling", None) or 1.0) / float(getattr(config, "lm_head_multiplier", 1.0))

    def parameters_read(self, exit_layer: int) -> int:
        """Parameters of the layers and the norm that run at an exit, without token table and LM head (the paper's Table 1).

        In a mixture of experts they include all experts, of which one token reads a part.
        """
        last = self.parts.norm if exit_layer == self.depth else self.balconies[exit_layer]
        return sum(p.numel() for module in (*self.parts.layers[:exit_layer], last) for p in module.parameters())

    def cast(self, dtype: torch.dtype) -> None:
        """Convert all weights in place, and no buffers: see :func:`.architecture.cast_weights`."""
        for module in self.modules:
            cast_weights(module, dtype)

    def copy(self) -> ExitModel:
        """A deep copy, which shares no weight with this one."""
        return ExitModel(*copy.deepcopy((self.model, self.balconies)))

    def run(self, tokens: torch.Tensor, exit_layers: Iterable[int], cache: Cache | None = None) -> States:
        """Run all layers of the backbone and take the states at some exits.

        Args:
            tokens: Token ids  # (B, T)
            exit_layers: Exits whose states are taken, the full depth among them or not.
            cache: KV cache of the backbone, which the pass extends; without one, tokens are whole sequences.
        """
        at: dict[int, torch.Tensor] = {}
        arguments: dict[str, Any] = {}

        def taking(exit_layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
                at[exit_layer] = given[0] if given else options["hidden_states"]

            return hook

        def keep_arguments(_: nn.Module, _given: tuple[Any, ...], options: dict[str, Any]) -> None:
            own = ("hidden_states", "cache", "use_cache")  # a balcony has its own
            arguments.update({name: value for name, value in options.items() if name not in own})

        # the state after e layers is what the next module takes: layer e + 1, or the final norm
        takers = [*self.parts.layers, self.parts.norm]
        handles = [takers[e].register_forward_pre_hook(taking(e), with_kwargs=True) for e in {*exit_layers}]
        handles.append(self.parts.layers[self.copied].register_forward_pre_hook(keep_arguments, with_kwargs=True))
        keyword: dict[str, Any] = {}
        if cache is not None:
            keyword["cache"] = cache
            if self.parts.rotary is not None:  # Bamba's own positions begin at 0 in every pass
                first = cache.get_seq_length()
                keyword["position_ids"] = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        try:
            self.parts.decoder(input_ids=tokens, use_cache=cache is not None, **keyword)
        finally:
            for handle in handles:
                handle.remove()
        return States(at, arguments)

    def new_cache(self) -> Cache:
        """An empty cache for the backbone, or for a balcony."""
        return DynamicCache(config=self.model.config)

    def layer_arguments(self, rows: int) -> Mapping[str, Any]:
        """Arguments of the layer that balconies copy, for whole sequences of ``rows`` tokens, whatever the tokens are.

        They follow from the shape and the type of the states, so no layer is computed: 4,096 rows through 8 billion parameters
        are 66 TFLOP, and ``accelerate launch`` leaves each process one thread for them.
        """
        tokens = torch.zeros(1, rows, dtype=torch.long, device=self.parts.embed.weight.device)
        with _layers_pass_on(self.parts.layers, self._outputs_of_layers(tokens[:, :8])):
            return self.run(tokens, ()).layer_arguments

    def _outputs_of_layers(self, tokens: torch.Tensor) -> list[int | None]:
        """Length of the tuple that each layer returns, or None if it returns a tensor, from a short pass."""
        lengths: list[int | None] = []

        def look(_: nn.Module, _given: tuple[Any, ...], out: Any) -> None:
            lengths.append(len(out) if isinstance(out, tuple) else None)

        handles = [layer.register_forward_hook(look) for layer in self.parts.layers]
        try:
            self.run(tokens, ())
        finally:
            for handle in handles:
                handle.remove()
        return lengths

    def normed(self, exit_layer: int, states: States, cache: Cache | None = None) -> torch.Tensor:
        """Input of the LM head at an exit: the output of its balcony, or of the final norm  # (B, T, D)

        Args:
            exit_layer: An exit whose state was taken.
            states: Result of :meth:`run`.
            cache: KV cache of the balcony, if the pass had one for the backbone.
        """
        state = states.at[exit_layer]
        if exit_layer == self.depth:
            normed: torch.Tensor = self.parts.norm(state)
            return normed
        balcony = self.balconies[exit_layer]
        keyword = {} if cache is None or balcony.layer is None else {"cache": cache}
        return balcony(state, **states.layer_arguments, **keyword)  # type: ignore[no-any-return]

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits of normed states, soft cap included, in the type of the weights  # (..., D) -> (..., V)"""
        logits: torch.Tensor = self.parts.head(normed.to(self.parts.head.weight.dtype))  # Mamba's residual may be wider
        # In the order and the operations of transformers, which matter in half precision.
        if (factor := getattr(self.model.config, "lm_head_multiplier", 1.0)) != 1.0:
            logits = logits * factor
        if (divisor := getattr(self.model.config, "logits_scaling", None) or 1.0) != 1.0:
            logits = logits / divisor
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def logits(self, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
        """Exit layer → logits at every position of whole sequences, all exits from one pass  # (B, T) -> (B, T, V)"""
        states = self.run(tokens, self.exit_layers)
        return {exit_layer: self.head(self.normed(exit_layer, states)) for exit_layer in self.exit_layers}

    def layer_type(self, layer: Any) -> str:
        """Type of a layer of the backbone or a balcony, which keeps the index of the layer that it copies."""
        return layer_type(self.model.config, layer_index(layer))

    @property
    def rotated(self) -> int:
        """Number of values of each head that the rotary embedding turns; 0 without one."""
        return max((2 * cos.shape[1] for cos, _ in self.rotary_tables(1).values()), default=0)

    def rotary_tables(self, rows: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Attention type → ``(cos, sin)`` of the first positions, from the model's own rotary module  # (rows, head_dim / 2)"""
        types = sorted({layer_type(self.model.config, index) for index in range(self.depth)})
        if self.parts.rotary is None:
            return {}
        takes_type = "layer_type" in inspect.signature(self.parts.rotary.forward).parameters
        probe = torch.zeros(1, 1, 1, dtype=self.parts.embed.weight.dtype)
        tables = {}
        for kind in types if takes_type else types[:1]:
            with torch.no_grad():
                cos, sin = self.parts.rotary(probe, torch.arange(rows)[None], *((kind,) if takes_type else ()))
            # OLMo 2 keeps its tables in float32; the operator takes those of the states' type
            cos, sin = cos.to(probe.dtype), sin.to(probe.dtype)
            half = cos.shape[-1] // 2
            tables[kind] = (cos[0, :, :half].clone(), sin[0, :, :half].clone())
        return {kind: tables.get(kind, tables[types[0]]) for kind in types}


@contextmanager
def _layers_pass_on(layers: Iterable[nn.Module], lengths: Iterable[int | None]) -> Iterator[None]:
    """Let layers return their input, in a tuple of the length given or by itself."""

    def passing_on(length: int | None) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *_given: Any, **_options: Any) -> Any:
            return hidden_states if length is None else (hidden_states, *[None] * (length - 1))

        return forward

    changed = [(layer, passing_on(length)) for layer, length in zip(layers, lengths, strict=True)]
    try:
        for layer, forward in changed:
            layer.forward = forward
        yield
    finally:
        for layer, _ in changed:
            vars(layer).pop("forward", None)


def call_layer(layer: Any, hidden: torch.Tensor, mask: Any, rotary: tuple[Any, Any] | None, cache: Any) -> torch.Tensor:
    """Call a decoder layer as its model does  # (B, T, D) -> (B, T, D)

    Args:
        layer: The layer.
        hidden: State before it  # (B, T, D)
        mask: Attention mask, of the form that the current attention function takes.
        rotary: Cosines and sines of the positions, of the form that the current rotary function takes; None in a model without.
        cache: KV cache, or None.
    """
    out = layer(hidden, attention_mask=mask, position_embeddings=rotary, cache=cache)
    return out if isinstance(out, torch.Tensor) else out[0]
