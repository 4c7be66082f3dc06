"""Balconies: one decoder layer (or a part of one) and one norm per exit, their initialization, and their files.

Owns the module, its initialization (paper, section 3: the last decoder layer, or the last that attends, and the final norm
of the base model) and
the directory format below. Training is :mod:`balcony_export.train.trainer`; tracing is :mod:`balcony_export.graph.trace`.

    balconies/
      balconies.json            format_version  2
                                module          "decoder": a whole decoder layer (attention and MLP), then a norm;
                                                "attention", "mlp": one half of it; "none": the norm alone;
                                                "dense": a decoder layer whose MLP is dense, in a mixture of experts
                                ("attention" stands for the half that reads earlier rows, whatever it is)
      layer                     index of the backbone's layer that they began as copies of
                                dtype           of the stored tensors, "bfloat16"
                                base            model_type, hidden_size, num_layers,
                                                config_sha256   of the fields that fix shapes and arithmetic
                                                weights_sha256  of 64 values of every weight, rounded to bfloat16
                                exits           {"14": {"file", "sha256", "training": record of its training or null}}
      balcony_<e>.safetensors   tensors "layer.*" and "norm.*", named as in the base model's decoder layer and norm

An exit layer ``e`` is the hidden state after exactly ``e`` backbone layers. Adding exits rewrites balconies.json and
writes new tensor files; the files of other exits stay as they are.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from transformers import PreTrainedModel

from balcony_edge.errors import CheckpointError, InputError
from balcony_edge.files import write_atomically
from balcony_export.model.architecture import parts_of
from balcony_export.model.experts import Use, dense_from, experts_in, mixture
from balcony_export.model.layer import ATTENTION, layer_index, memory_of, mixer_names, mlp_names

FORMAT_VERSION = 2
INDEX = "balconies.json"
STORED_DTYPE = torch.bfloat16
#: Config fields that change shapes or arithmetic. A different name or context length is still the same base model.
_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "tie_word_embeddings",
)
#: The same for mixtures of experts.
_MIXTURE_FIELDS = (
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "decoder_sparse_step",
    "mlp_only_layers",
    "clip_qkv",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
#: Tokens on which the use of experts is measured, evenly over the vocabulary.
_WATCHED_TOKENS = 128
_SAMPLES = 64  # values per weight in the fingerprint: every tensor counts, and a 135M model takes 0.1 s


#: What an exit holds before its norm: a decoder layer (the paper's balcony), one half of one, nothing (early exit), or, in a
#: mixture of experts, a decoder layer with a dense MLP in the place of the experts.
BalconyKind = Literal["decoder", "attention", "mlp", "none", "dense"]
KINDS: tuple[BalconyKind, ...] = get_args(BalconyKind)


class Silent(nn.Module):
    """Replaces one half of a decoder layer and adds nothing to the residual stream."""

    def __init__(self, replaced: nn.Module, *, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.layer_idx = getattr(replaced, "layer_idx", None)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        """Zeros, and None for the attention weights if it replaces an attention."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.attention else nothing


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
            layer_arguments: Arguments of the base model's last layer (mask, positions, rotary tables).
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
            layer_arguments: Arguments of the base model's last layer (mask, positions, rotary tables).

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
        if re.fullmatch(r"\d+", part):
            exit_layer = int(part)
        elif re.fullmatch(r"(\d+\.?\d*|\.\d+)x", part):
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
    """Make untrained balconies: deep copies of a decoder layer and the final norm (paper, section 3).

    The layer is the last one, or the last that attends to all rows if the model has layers of several kinds. A copy keeps its
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
        InputError: The kind is ``dense`` and the copied layer is not a mixture of experts.
    """
    parts = parts_of(model)
    copied, norm = parts.layers[copied_layer(model) if layer is None else layer], parts.norm
    if kind == "dense":
        copied = _with_dense_mlp(model, copied)
    made = {e: Balcony(e, copy.deepcopy(copied), copy.deepcopy(norm), kind).eval() for e in exit_layers}
    if random is not None:
        for exit_layer, balcony in made.items():
            with torch.random.fork_rng():
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


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The ``base`` entry of balconies.json for this model. It does not depend on the precision of the loaded weights."""
    config: Any = model.config
    names = _CONFIG_FIELDS + (_MIXTURE_FIELDS if mixture(config) else ())
    fields = {key: _canonical(getattr(config, key, None)) for key in names}
    digest = hashlib.sha256()
    # a tied head is one parameter; state_dict would list it twice for some ways of loading
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
        digest.update(name.encode())
        digest.update(sample.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "config_sha256": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest(),
        "weights_sha256": digest.hexdigest(),
    }


def check_directory(path: Path, described: dict[str, Any], like: Balcony) -> dict[str, Any]:
    """Make a directory for the balconies of a base model and return the entries of the balconies that are already in it.

    Args:
        path: The directory.
        described: :func:`fingerprint` of the base model.
        like: One of the balconies that will be written.

    Raises:
        InputError: The directory cannot be made.
        CheckpointError: It has balconies for another base model or of another kind.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}): name another directory") from error
    if not (path / INDEX).is_file():
        return {}
    index = _read_index(path)
    _check_base(path, index, described)
    if index["module"] != like.kind:
        raise CheckpointError(
            f"{path}: has balconies of kind '{index['module']}', not '{like.kind}': name another directory"
        )
    if index["layer"] != like.copies:
        raise CheckpointError(
            f"{path}: has balconies that are copies of layer {index['layer']}, not of layer {like.copies}: name another "
            "directory"
        )
    exits: dict[str, Any] = index["exits"]
    return exits


def save_balconies(
    directory: str | Path, balconies: dict[int, Balcony], base: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Write balconies into a directory, next to those of other exits that are already in it.

    Args:
        directory: Made if it does not exist.
        balconies: Exit layer → balcony.
        base: :func:`fingerprint` of the model that they belong to.
        training: Record of their training, kept with each of them; None for untrained ones.

    Raises:
        InputError, CheckpointError: As :func:`check_directory`, or a value is not finite.
    """
    path = Path(directory)
    (kind,), (layer,) = ({getattr(balcony, key) for balcony in balconies.values()} for key in ("kind", "copies"))
    exits = check_directory(path, base, next(iter(balconies.values())))
    written: dict[str, bytes] = {}
    for exit_layer, balcony in balconies.items():
        tensors = {name: value.detach().to(STORED_DTYPE).cpu() for name, value in balcony.state_dict().items()}
        _check_finite(path, exit_layer, tensors)
        file = f"balcony_{exit_layer}.safetensors"
        written[file] = save({name: value.contiguous() for name, value in tensors.items()}, {"format": "pt"})
        digest = hashlib.sha256(written[file]).hexdigest()
        exits[str(exit_layer)] = {"file": file, "sha256": digest, "training": training}
    document = {
        "format_version": FORMAT_VERSION,
        "module": kind,
        "layer": layer,
        "dtype": "bfloat16",
        "base": base,
        "exits": dict(sorted(exits.items(), key=lambda item: int(item[0]))),
    }
    for file, content in written.items():
        write_file(path / file, content)
    write_file(path / INDEX, (json.dumps(document, indent=1) + "\n").encode())


def load_balconies(
    directory: str | Path, model: PreTrainedModel, exits: tuple[int, ...] | None = None
) -> dict[int, Balcony]:
    """Read balconies for ``model``: all of a directory, or those of ``exits``.

    Raises:
        CheckpointError: A file is missing or was changed, the balconies belong to another base model, an exit is missing, or
            tensors have another shape or values that are not finite.
    """
    path = Path(directory)
    index = _read_index(path)
    _check_base(path, index, fingerprint(model))
    there = {int(key): entry for key, entry in index["exits"].items()}
    wanted = tuple(sorted(there)) if exits is None else exits
    absent = [e for e in wanted if e not in there]
    if absent:
        have = ", ".join(map(str, sorted(there)))
        raise CheckpointError(
            f"{path}: has no balcony for exit layer {absent[0]}: it has {have}: pick one of them or train it"
        )
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    balconies = init_balconies(model, wanted, index["module"], layer=index["layer"])
    for exit_layer, balcony in balconies.items():
        tensors = _read_tensors(path, there[exit_layer])
        _check_shapes(path / there[exit_layer]["file"], tensors, balcony)
        _check_finite(path, exit_layer, tensors)
        balcony.load_state_dict(tensors)
        balcony.to(device=device, dtype=dtype)
    return balconies


def digest_and_kind(directory: Path) -> tuple[str, BalconyKind]:
    """SHA-256 of a directory's index, which has the hash of every file in it, and the kind of its balconies."""
    kind: BalconyKind = _read_index(directory)["module"]
    return hashlib.sha256((directory / INDEX).read_bytes()).hexdigest(), kind


def rows_seen(directory: Path, exits: tuple[int, ...], corpus: str) -> int:
    """Largest number of rows of a corpus, named by its digest, that any of these exits has learned from."""
    entries = _read_index(directory)["exits"]
    facts = [(entries.get(str(e)) or {}).get("training") or {} for e in exits]
    return max((int(one["rows"]) for one in facts if one.get("corpus") == corpus), default=0)


def write_file(path: Path, content: bytes) -> None:
    """Write one file of balconies or of a training run atomically."""
    write_atomically(path, content, CheckpointError, "free space or name another place")


def _canonical(value: Any) -> Any:
    """Values with floats at six significant digits: GGUF stores 1e-5 in float32 and returns 9.999999747e-06."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value if value is None or isinstance(value, bool) else str(value)


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    if not file.is_file():
        raise CheckpointError(f"{path}: has no {INDEX}: give a directory that `balcony-edge train` wrote")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        version, module, layer = index["format_version"], index["module"], index.get("layer")
        # the number of the layer is checked against the model when a balcony is made
        known = layer is None if module == "none" else isinstance(layer, int) and layer >= 0
        complete = (
            isinstance(index["base"], dict)
            and known
            and all(
                re.fullmatch(r"[1-9][0-9]{0,3}", key)
                and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}", entry["file"])
                and isinstance(entry["sha256"], str)
                for key, entry in index["exits"].items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: is damaged: copy it again, or train again") from error
    if version != FORMAT_VERSION or module not in KINDS:
        raise CheckpointError(
            f"{file}: has format {repr(version)[:20]} and module {repr(module)[:20]}: this version reads format "
            f"{FORMAT_VERSION} and modules {', '.join(KINDS)}: use the version of Balcony Edge that wrote it"
        )
    if not complete:
        raise CheckpointError(f"{file}: is damaged: copy it again, or train again")
    assert isinstance(index, dict)
    return index


def _check_base(path: Path, index: dict[str, Any], described: dict[str, Any]) -> None:
    base = index["base"]
    for key in ("model_type", "hidden_size", "num_layers", "config_sha256", "weights_sha256"):
        if base.get(key) != described[key]:
            given, wanted = str(described[key])[:12], repr(base.get(key)).strip("'")[:12]
            raise CheckpointError(
                f"{path}: these balconies belong to another base model ({key} is {given}, they need {wanted}): "
                "give the model that they were trained for, or train balconies for this one"
            )


def _read_tensors(path: Path, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    file = path / entry["file"]
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing, but {INDEX} names it: copy the whole directory again")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{file}: its sha256 differs from {INDEX}: copy the whole directory again")
    try:
        return dict(load(content))
    except SafetensorError as error:
        raise CheckpointError(f"{file}: is not a safetensors file: copy the whole directory again") from error


def _check_shapes(file: Path, tensors: dict[str, torch.Tensor], balcony: Balcony) -> None:
    expected = {name: tuple(value.shape) for name, value in balcony.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            have, want = given.get(name, "absent"), expected.get(name, "absent")
            raise CheckpointError(
                f"{file}: {name} is {have}, the base model needs {want}: train balconies for this model"
            )


def _check_finite(path: Path, exit_layer: int, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{path}: balcony {exit_layer}: {name} has values that are not finite: train again with a lower rate"
            )
