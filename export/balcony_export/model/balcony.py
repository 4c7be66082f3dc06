"""Balconies: one decoder layer (or a part of one) and one norm per exit, how they start, and how they lie on disk.

Owns the module, its initialisation (paper, section 3: the last decoder layer and the final norm of the base model) and
the directory format below. Training is :mod:`balcony_export.train.trainer`; tracing is :mod:`balcony_export.graph.trace`.

    balconies/
      balconies.json            format_version  1
                                module          "decoder": a whole decoder layer (attention and MLP), then a norm;
                                                "attention", "mlp": one half of it; "none": the norm alone
                                dtype           of the stored tensors, "bfloat16"
                                base            model_type, hidden_size, num_layers,
                                                config_sha256   of the fields that fix shapes and arithmetic
                                                weights_sha256  of 64 values of every weight, rounded to bfloat16
                                exits           {"14": {"file", "sha256", "training": facts of its training or null}}
      balcony_<e>.safetensors   tensors "layer.*" and "norm.*", named as in the base model's decoder layer and norm

An exit layer ``e`` is the hidden state after exactly ``e`` backbone layers. Adding exits rewrites balconies.json and
writes new tensor files; the files of other exits are not touched.
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

FORMAT_VERSION = 1
INDEX = "balconies.json"
STORED_DTYPE = torch.bfloat16
#: Config fields that change shapes or arithmetic; names and lengths of context do not make another base model.
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
_SAMPLES = 64  # values per weight in the fingerprint: every tensor counts and a 135M model takes 0.1 s


#: What stands before an exit's norm: a decoder layer (the paper's balcony), one half of one, or nothing (early exit).
BalconyKind = Literal["decoder", "attention", "mlp", "none"]
KINDS: tuple[BalconyKind, ...] = get_args(BalconyKind)


class Silent(nn.Module):
    """Takes the place of a half of a decoder layer and adds nothing to the residual stream."""

    def __init__(self, replaced: nn.Module, *, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.layer_idx = getattr(replaced, "layer_idx", None)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        """Zeros; where an attention stood, beside the weights that nobody asks for."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.attention else nothing


class Balcony(nn.Module):
    """What stands at an exit: ``norm(layer(hidden))``, to be followed by the base model's own LM head.

    Args:
        exit_layer: backbone layers before it.
        layer: a decoder layer; of kind ``attention`` and ``mlp`` its other half is silenced; None for kind ``none``.
        norm: an RMSNorm.
        kind: see :data:`Kind`.
    """

    def __init__(self, exit_layer: int, layer: Any, norm: nn.Module, kind: BalconyKind = "decoder") -> None:
        super().__init__()
        self.exit_layer, self.kind = exit_layer, kind
        if kind == "mlp":
            layer.self_attn = Silent(layer.self_attn, attention=True)
        elif kind == "attention":
            layer.mlp = Silent(layer.mlp, attention=False)
        self.layer = None if kind == "none" else layer
        self.norm = norm

    @property
    def keeps_rows(self) -> bool:
        """Whether it attends to rows before, and so has a KV cache."""
        return self.kind in ("decoder", "attention")

    def forward(self, hidden: torch.Tensor, **layer_arguments: Any) -> torch.Tensor:
        """Normed hidden state for the LM head.

        Args:
            hidden: backbone state after ``exit_layer`` layers  # (B, T, D)
            layer_arguments: what the base model hands to its last layer (mask, positions, rotary tables).
        """
        out = hidden if self.layer is None else self.layer(hidden, **layer_arguments)
        out = out[0] if isinstance(out, tuple) else out  # some architectures return attention weights too
        normed: torch.Tensor = self.norm(out)  # (B, T, D)
        return normed

    def rows(self, hidden: torch.Tensor, where: torch.Tensor, **layer_arguments: Any) -> torch.Tensor:
        """What :meth:`forward` gives at some positions, without the MLP of the others: it looks at one position at a time.

        Args:
            hidden: backbone state after ``exit_layer`` layers  # (B, T, D)
            where: flat indices of the positions  # (n,)
            layer_arguments: what the base model hands to its last layer (mask, positions, rotary tables).

        Returns:
            Normed hidden states  # (n, D)
        """
        rows, width = hidden.shape[0] * hidden.shape[1], hidden.shape[2]

        def gather(_mlp: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
            return args[0].flatten(0, 1)[where]

        def scatter(_mlp: nn.Module, _args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            return out.new_zeros(rows, width).index_copy(0, where, out).view(hidden.shape)

        out, handles = hidden, []
        try:
            if self.layer is not None:
                handles = [
                    self.layer.mlp.register_forward_pre_hook(gather),
                    self.layer.mlp.register_forward_hook(scatter),
                ]
                out = self.layer(hidden, **layer_arguments)
        finally:
            for handle in handles:
                handle.remove()
        out = out[0] if isinstance(out, tuple) else out
        normed: torch.Tensor = self.norm(out.flatten(0, 1)[where])  # (n, D)
        return normed


def parse_exits(text: str, num_layers: int, option: str = "--exits") -> tuple[int, ...]:
    """Exit layers from ``"14,17,20"`` or the paper's ``"0.5x,0.6x,0.7x"``.

    A factor f means the exit whose backbone and balcony together hold f of the layers: (e + 1) / N = f, rounded.

    Raises:
        InputError: not a number, out of 1 .. N - 1, doubled or not ascending.
    """
    allowed = f"a model of {num_layers} layers takes exits 1 to {num_layers - 1}, or factors such as 0.5x"
    exits: list[int] = []
    for part in (piece.strip() for piece in text.split(",")):
        if re.fullmatch(r"\d+", part):
            exit_layer = int(part)
        elif re.fullmatch(r"(\d+\.?\d*|\.\d+)x", part):
            exit_layer = round(float(part[:-1]) * num_layers) - 1
        else:
            raise InputError(f"{option} {text}: '{part}' is no exit: {allowed}, separated by commas")
        if not 1 <= exit_layer <= num_layers - 1:
            raise InputError(f"{option} {text}: '{part}' is exit layer {exit_layer}: {allowed}")
        if exit_layer in exits:
            raise InputError(f"{option} {text}: exit layer {exit_layer} is named twice: name each exit once")
        if exits and exit_layer < exits[-1]:
            raise InputError(f"{option} {text}: {exit_layer} comes after {exits[-1]}: write exits in ascending order")
        exits.append(exit_layer)
    return tuple(exits)


def init_balconies(
    model: PreTrainedModel, exit_layers: tuple[int, ...], kind: BalconyKind = "decoder", *, random: int | None = None
) -> dict[int, Balcony]:
    """Untrained balconies: deep copies of the last decoder layer and the final norm (paper, section 3).

    The copy keeps its ``layer_idx``, so that attention type, window and rotary table are those of the last layer. With
    ``random`` its weights are drawn as the base model's were before its training, each exit's from this seed and its layer.
    """
    last, norm = _last_layer_and_norm(model)
    made = {e: Balcony(e, copy.deepcopy(last), copy.deepcopy(norm), kind).eval() for e in exit_layers}
    if random is not None:
        for exit_layer, balcony in made.items():
            with torch.random.fork_rng():
                torch.manual_seed(int(np.random.SeedSequence([random, exit_layer]).generate_state(1)[0]))
                balcony.apply(model._init_weights)
    return made


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The ``base`` entry of balconies.json for this model; independent of the precision it was loaded in."""
    config: Any = model.config
    fields = {key: _canonical(getattr(config, key, None)) for key in _CONFIG_FIELDS}
    digest = hashlib.sha256()
    # a tied head is one parameter; state_dict would list it twice, and not for every way of loading
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


def check_directory(path: Path, described: dict[str, Any], kind: BalconyKind) -> dict[str, Any]:
    """Make the directory of balconies for a base model (its :func:`fingerprint`); returns the entries of those that lie there.

    Raises:
        InputError: it cannot be made.
        CheckpointError: it holds balconies for another base model or of another kind.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}): name another directory") from error
    if not (path / INDEX).is_file():
        return {}
    index = _read_index(path)
    _check_base(path, index, described)
    if index["module"] != kind:
        raise CheckpointError(
            f"{path}: holds balconies of kind '{index['module']}', not '{kind}': name another directory"
        )
    exits: dict[str, Any] = index["exits"]
    return exits


def save_balconies(
    directory: str | Path, balconies: dict[int, Balcony], base: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Write balconies into ``directory``, beside those of other exits that lie there already.

    Args:
        directory: made when it is not there.
        balconies: exit layer → balcony.
        base: :func:`fingerprint` of the model that they belong to.
        training: facts of the training of these exits, kept with each of them; None for untrained ones.

    Raises:
        InputError, CheckpointError: as :func:`check_directory`, or a value is not finite.
    """
    path = Path(directory)
    (kind,) = {balcony.kind for balcony in balconies.values()}
    exits = check_directory(path, base, kind)
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
    """Read balconies for ``model``: all that the directory holds, or ``exits`` of them.

    Raises:
        CheckpointError: a missing or changed file, another base model, an exit that is not there, values that are not
            finite, or tensors of another shape.
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
            f"{path}: has no balcony for exit layer {absent[0]}: it holds {have}: pick those or train it"
        )
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    balconies = init_balconies(model, wanted, index["module"])
    for exit_layer, balcony in balconies.items():
        tensors = _read_tensors(path, there[exit_layer])
        _check_shapes(path / there[exit_layer]["file"], tensors, balcony)
        _check_finite(path, exit_layer, tensors)
        balcony.load_state_dict(tensors)
        balcony.to(device=device, dtype=dtype)
    return balconies


def identity(directory: Path) -> tuple[str, BalconyKind]:
    """SHA-256 of the index of a directory of balconies, which holds the hash of each file and so names them; their kind."""
    kind: BalconyKind = _read_index(directory)["module"]
    return hashlib.sha256((directory / INDEX).read_bytes()).hexdigest(), kind


def rows_seen(directory: Path, exits: tuple[int, ...], corpus: str) -> int:
    """Rows of a corpus, named by its digest, that balconies have learned from: the most of any of these exits."""
    entries = _read_index(directory)["exits"]
    facts = [(entries.get(str(e)) or {}).get("training") or {} for e in exits]
    return max((int(one["rows"]) for one in facts if one.get("corpus") == corpus), default=0)


def write_file(path: Path, content: bytes) -> None:
    """Write one file of balconies or of a training run, whole or not at all."""
    write_atomically(path, content, CheckpointError, "free space or name another place")


def _last_layer_and_norm(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    parts = parts_of(model)
    return parts.layers[-1], parts.norm


def _canonical(value: Any) -> Any:
    """Six significant digits: GGUF stores 1e-5 in float32 and gives back 9.999999747e-06."""
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
        raise CheckpointError(f"{path}: holds no {INDEX}: give a directory that `balcony-edge train` wrote")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        version, module = index["format_version"], index["module"]
        complete = isinstance(index["base"], dict) and all(
            re.fullmatch(r"[1-9][0-9]{0,3}", key)
            and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}", entry["file"])
            and isinstance(entry["sha256"], str)
            for key, entry in index["exits"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: is damaged: train again or copy it again") from error
    if version != FORMAT_VERSION or module not in KINDS:
        raise CheckpointError(
            f"{file}: format {repr(version)[:20]}, module {repr(module)[:20]}: this version reads format {FORMAT_VERSION} "
            f"and {', '.join(KINDS)}: use the version of Balcony Edge that wrote it"
        )
    if not complete:
        raise CheckpointError(f"{file}: is damaged: train again or copy it again")
    assert isinstance(index, dict)
    return index


def _check_base(path: Path, index: dict[str, Any], described: dict[str, Any]) -> None:
    base = index["base"]
    for key in ("model_type", "hidden_size", "num_layers", "config_sha256", "weights_sha256"):
        if base.get(key) != described[key]:
            given, wanted = str(described[key])[:12], repr(base.get(key)).strip("'")[:12]
            raise CheckpointError(
                f"{path}: these balconies belong to another base model ({key} is {given}, they want {wanted}): "
                "give the model that they were trained for, or train balconies for this one"
            )


def _read_tensors(path: Path, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    file = path / entry["file"]
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing, {INDEX} names it: copy the whole directory again")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{file}: has another sha256 than {INDEX} says: copy the whole directory again")
    try:
        return dict(load(content))
    except SafetensorError as error:
        raise CheckpointError(f"{file}: is no safetensors file: copy the whole directory again") from error


def _check_shapes(file: Path, tensors: dict[str, torch.Tensor], balcony: Balcony) -> None:
    expected = {name: tuple(value.shape) for name, value in balcony.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            have, want = given.get(name, "absent"), expected.get(name, "absent")
            raise CheckpointError(
                f"{file}: {name} is {have}, the base model wants {want}: train balconies for this model"
            )


def _check_finite(path: Path, exit_layer: int, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{path}: balcony {exit_layer}: {name} holds values that are not finite: train again with a lower rate"
            )
