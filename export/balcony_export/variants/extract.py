"""The sub-model of one exit as an ordinary Hugging Face checkpoint: its backbone layers, then the balcony as the last layer.

Owns the configuration of the smaller model and the names of its weights. With a decoder layer as the balcony the result is a
plain model of e + 1 layers, which suits a server of one fixed depth. Every engine that runs the base model can run it, unless
the engine derives the kind of a layer from its number: see :func:`layout_warning`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from balcony_edge.errors import InputError
from balcony_export.model.architecture import parts_of
from balcony_export.model.checkpoint import save_checkpoint
from balcony_export.model.exits import ExitModel
from balcony_export.model.experts import experts_in
from balcony_export.model.layer import memory_of
from balcony_export.output import fresh_directory, refuse_existing
from balcony_export.verify import reference_logits, require_close

#: Fields of a configuration with an entry per layer.
_PER_LAYER = ("layer_types", "no_rope_layers")


def submodel(exits: ExitModel, exit_layer: int) -> PreTrainedModel:
    """Make a model of the same class that computes what an exit computes.

    Args:
        exits: The model with its balconies; it is not changed.
        exit_layer: Number of backbone layers to keep. Without a balcony there, the result is the early exit: the final norm
            follows the last of them.

    Raises:
        InputError: The balcony is not a decoder layer, so no plain model computes this exit.
    """
    model, parts, balcony = exits.model, exits.parts, exits.balconies.get(exit_layer)
    if balcony is not None and balcony.kind not in ("decoder", "none"):
        raise InputError(
            f"exit {exit_layer}: its module is '{balcony.kind}': only 'decoder' and 'none' give a plain model"
        )
    layers: list[Any] = list(parts.layers[:exit_layer])
    if balcony is not None and balcony.layer is not None:
        layers.append(balcony.layer)
    config = copy.deepcopy(model.config)
    stored = config.to_dict()
    for field in _PER_LAYER:
        # some models derive the field from others
        if (entries := getattr(config, field, None)) and field in stored:
            # a balcony attends as the layer does that it began as a copy of
            setattr(config, field, [*entries[:exit_layer], *[entries[exits.copied]] * (len(layers) - exit_layer)])
    for field in ("attn_layer_indices", "full_attn_idxs"):  # Bamba; the first LFM2, of which MLX reads only this
        if stored.get(field) is not None:
            setattr(config, field, [index for index, layer in enumerate(layers) if memory_of(layer).attention])
    config.num_hidden_layers = len(layers)
    config.tie_word_embeddings = parts.head.weight is parts.embed.weight  # transformers unties a head that differs
    if hasattr(config, "mlp_only_layers"):  # Qwen's mixtures say by number which layers are dense
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [index for index, layer in enumerate(layers) if not any(experts_in(layer))]
    if hasattr(config, "num_dense_layers"):  # LFM2-MoE begins with dense layers
        config.num_dense_layers = sum(not any(experts_in(layer)) for layer in layers)
    small: PreTrainedModel = type(model)(config).eval()
    target = parts_of(small)
    for new, old in (
        *zip(target.layers, layers, strict=True),
        (target.embed, parts.embed),
        (target.norm, parts.norm if balcony is None else balcony.norm),
        *(() if parts.head.weight is parts.embed.weight else ((target.head, parts.head),)),
    ):
        for made, kept in zip(new.parameters(), old.parameters(), strict=True):
            made.data = made.data.to(kept.dtype)
        new.load_state_dict(old.state_dict())
        # Falcon-H1's multipliers are in no state, and in the type of its weights.
        for made, module in zip(new.modules(), old.modules(), strict=True):
            made._buffers.update(module._buffers)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def layout_warning(config: Any, small: Any) -> str | None:
    """A line for models whose layers follow a rule by number, from which the balcony's layer differs; None for others.

    Some engines do not read the entries per layer. llama.cpp has the rules of SmolLM3, Gemma 2 and 3 and EXAONE 4 in its
    code, and for Qwen3-Next and Qwen 3.5 one interval in its files.

    Args:
        config: Configuration of the base model.
        small: Configuration of the sub-model.
    """
    for field in _PER_LAYER:
        entries = getattr(config, field, None)
        if not entries or len(set(entries)) == 1:  # layers of one kind: the class of EXAONE 4 has no rule for them
            continue
        if entries == _by_rule(config, field) and getattr(small, field) != _by_rule(small, field):
            return (
                f"{field}: the last layer is not what its number says in {config.model_type}: run this model in an engine "
                "that reads config.json, such as transformers; llama.cpp would compute another one"
            )
    return None


def _by_rule(config: Any, field: str) -> Any:
    """Entries of the layers that a configuration's class derives from their number, or from other fields."""
    derived = {name for name, value in vars(type(config)).items() if isinstance(value, property)}
    given = {name: value for name, value in config.to_dict().items() if name not in {field, *derived}}
    if isinstance(pattern := given.get("sliding_window_pattern"), str):  # EXAONE 4's file has "LLLG", its class counts
        given["sliding_window_pattern"] = len(pattern)
    return getattr(type(config)(**given), field)


def extract(exits: ExitModel, tokenizer: PreTrainedTokenizerBase, exit_layer: int, output: Path) -> PreTrainedModel:
    """Write the sub-model of an exit into a directory, after comparing it with the exit.

    Args:
        exits: The model with its balconies.
        tokenizer: The model's tokenizer, which is also written.
        exit_layer: Exit layer of a balcony.
        output: Directory to make.

    Raises:
        InputError: There is no such exit, the directory exists, or the exit is not a plain model.
        VerificationError: The logits of the sub-model differ from the exit's.
    """
    refuse_existing(output)
    if exit_layer not in exits.balconies:
        have = ", ".join(map(str, exits.balconies))
        raise InputError(f"--exit {exit_layer}: there are balconies at {have}: name one of them")
    small = submodel(exits, exit_layer)
    ids = list(range(3, min(67, exits.model.config.vocab_size)))
    want = reference_logits(exits, ids)[exit_layer]
    with torch.no_grad():
        got = small(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
    require_close(got, want, f"exit {exit_layer}: the extracted model's logits differ from the exit's")
    with fresh_directory(output) as directory:
        save_checkpoint(small, tokenizer, directory)
    return small
