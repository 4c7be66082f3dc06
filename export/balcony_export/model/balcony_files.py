"""The files of balconies: a directory with an index and the tensors of each exit.

Owns the format below, and which base model balconies belong to.

    balconies/
      balconies.json            format_version  2
                                module          "decoder": a whole decoder layer (attention and MLP), then a norm;
                                                "attention", "mlp": one half of it; "none": the norm alone;
                                                "dense": a decoder layer whose MLP is dense, in a mixture of experts
                                ("attention" stands for the half that reads earlier rows, whatever it is)
                                layer           index of the backbone's layer that they began as copies of
                                dtype           of the stored tensors, "bfloat16"
                                base            model_type, hidden_size, num_layers,
                                                config_sha256   of the fields that fix shapes and arithmetic
                                                weights_sha256  of 64 values of every weight, rounded to bfloat16
                                exits           {"14": {"file", "sha256", "training": record of its training or null}}
      balcony_<e>.safetensors   tensors "layer.*" and "norm.*", named as in the base model's decoder layer and norm

Adding exits rewrites balconies.json and writes new tensor files; the files of other exits stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedModel

from balcony_edge.errors import CheckpointError, InputError
from balcony_edge.files import exists, locked, require_writable, write_atomically, write_together
from balcony_export.model.architecture import cast_weights
from balcony_export.model.balcony import KINDS, Balcony, BalconyKind, init_balconies

FORMAT_VERSION = 2
INDEX = "balconies.json"
STORED_DTYPE = torch.bfloat16
_CURE = "free space or name another place"
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
#: The same of some architectures: they count where a configuration has them.
_FURTHER_FIELDS = (
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
    "attn_layer_indices",
    "conv_L_cache",
    "time_step_limit",
    "num_dense_layers",
    "routed_scaling_factor",
    "use_expert_bias",
    "lm_head_multiplier",
    "key_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "ssm_multipliers",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
    "mlp_multipliers",
)
_SAMPLES = 64  # values per weight in the fingerprint: every tensor counts, and a 135M model takes 0.1 s


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The ``base`` entry of balconies.json for this model. It does not depend on the precision of the loaded weights."""
    config: Any = model.config
    names = _CONFIG_FIELDS + tuple(name for name in _FURTHER_FIELDS if hasattr(config, name))
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
        InputError: The directory cannot be made or written.
        CheckpointError: It has balconies for another base model or of another kind.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}): name another directory") from error
    require_writable(path, str(path), InputError, "name another directory")
    if not (path / INDEX).is_file():
        return {}
    index = read_index(path)
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
    path: Path, balconies: dict[int, Balcony], base: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Write balconies into a directory, next to those of other exits that are already in it.

    Args:
        path: The directory, made if it does not exist.
        balconies: Exit layer → balcony.
        base: :func:`fingerprint` of the model that they belong to.
        training: Record of their training, kept with each of them; None for untrained ones.

    Raises:
        InputError, CheckpointError: As :func:`check_directory`, or a value is not finite.
    """
    (kind,), (layer,) = ({getattr(balcony, key) for balcony in balconies.values()} for key in ("kind", "copies"))
    like = next(iter(balconies.values()))
    check_directory(path, base, like)
    tensors = {exit_layer: balcony.state_dict() for exit_layer, balcony in balconies.items()}
    for exit_layer, values in tensors.items():
        check_finite(path, exit_layer, values)
    with locked(path):  # another run may write other exits
        others = check_directory(path, base, like)
        facts = {"base": base, "module": kind, "layer": layer}
        write_balconies(path, tensors, facts, dict.fromkeys(tensors, training), others)


def write_balconies(
    path: Path,
    tensors: Mapping[int, Mapping[str, torch.Tensor]],
    facts: Mapping[str, Any],
    training: Mapping[int, dict[str, Any] | None],
    others: Mapping[str, Any] | None = None,
) -> None:
    """Write the tensors of balconies and their index.

    Args:
        path: The directory.
        tensors: Exit layer → name → tensor.
        facts: ``base``, ``module`` and ``layer`` of the index.
        training: Exit layer → record of the training.
        others: Entries of balconies that are there already.
    """
    entries: dict[str, Any] = dict(others or {})
    written: dict[Path, bytes] = {}
    for exit_layer, values in tensors.items():
        file = f"balcony_{exit_layer}.safetensors"
        stored = {name: value.detach().to(STORED_DTYPE).cpu().contiguous() for name, value in values.items()}
        content = save(stored, {"format": "pt"})
        written[path / file], digest = content, hashlib.sha256(content).hexdigest()
        entries[str(exit_layer)] = {"file": file, "sha256": digest, "training": training[exit_layer]}
    document = {
        "format_version": FORMAT_VERSION,
        "module": facts["module"],
        "layer": facts["layer"],
        "dtype": "bfloat16",
        "base": facts["base"],
        "exits": dict(sorted(entries.items(), key=lambda item: int(item[0]))),
    }
    written[path / INDEX] = (json.dumps(document, indent=1) + "\n").encode()
    write_together(written, CheckpointError, _CURE)


def load_balconies(path: Path, model: PreTrainedModel, exits: tuple[int, ...] | None = None) -> dict[int, Balcony]:
    """Read balconies for ``model``: all of a directory, or those of ``exits``.

    Raises:
        CheckpointError: A file is missing or was changed, the balconies belong to another base model, an exit is missing, or
            tensors have another shape or values that are not finite.
    """
    index = read_index(path)
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
        tensors = read_tensors(path, there[exit_layer])
        _check_shapes(path / there[exit_layer]["file"], tensors, balcony)
        check_finite(path, exit_layer, tensors)
        balcony.load_state_dict(tensors)
        cast_weights(balcony.to(device), dtype)  # Falcon-H1's multipliers are buffers and stay float32
    return balconies


def layer_of(directory: Path, model: PreTrainedModel) -> int | None:
    """Index of the layer of ``model`` that the balconies of a directory began as copies of; None for the kind ``none``.

    Raises:
        CheckpointError: The index cannot be read, or is about another base model.
    """
    index = read_index(directory)
    _check_base(directory, index, fingerprint(model))
    layer: int | None = index["layer"]
    return layer


def is_whole(directory: Path, exit_layer: int) -> bool:
    """Whether a directory has a balcony for this exit whose file is the one that the index names."""
    try:
        read_tensors(directory, read_index(directory)["exits"][str(exit_layer)])
    except (CheckpointError, KeyError):
        return False
    return True


def of_other_runs(
    directory: Path, exits: tuple[int, ...], recipe: Mapping[str, Any]
) -> dict[int, dict[str, torch.Tensor]]:
    """Tensors of those balconies of a directory that are whole and that a run of another recipe has written."""
    whole = [e for e in exits if is_whole(directory, e)]
    entries = read_index(directory)["exits"] if whole else {}
    others = [e for e in whole if (entries[str(e)].get("training") or {}).get("recipe") != recipe]
    return {e: read_tensors(directory, entries[str(e)]) for e in others}


def digest_and_kind(directory: Path) -> tuple[str, BalconyKind]:
    """SHA-256 of a directory's index, which has the hash of every file in it, and the kind of its balconies."""
    kind: BalconyKind = read_index(directory)["module"]
    return hashlib.sha256((directory / INDEX).read_bytes()).hexdigest(), kind


def rows_seen(directory: Path, exits: tuple[int, ...], corpus: str) -> int | None:
    """Largest number of rows of a corpus, named by its digest, that any of these exits has learned from.

    None if all records are of other corpora.
    """
    entries = read_index(directory)["exits"]
    facts = [(entries.get(str(e)) or {}).get("training") or {} for e in exits]
    known = [int(one["rows"]) for one in facts if one.get("corpus") == corpus]
    if known:
        return max(known)
    return None if any("corpus" in one for one in facts) else 0


def trained_exits(directory: Path) -> tuple[int, ...]:
    """Exits whose balconies lie in a directory, without those that a run has only copied there before its first step.

    A mean has the record of its last run. It is no copy, even if that run kept its start.
    """
    if not (directory / INDEX).exists():
        names = (re.fullmatch(r"balcony_(\d+)\.safetensors", file.name) for file in directory.glob("balcony_*"))
        return tuple(int(name[1]) for name in names if name is not None)
    records = {int(e): facts.get("training") or {} for e, facts in read_index(directory)["exits"].items()}
    return tuple(e for e, record in records.items() if record.get("step") != 0 or "mean_of" in record)


def write_file(path: Path, content: bytes) -> None:
    """Write one file of balconies or of a training run atomically."""
    write_atomically(path, content, CheckpointError, _CURE)


def _canonical(value: Any) -> Any:
    """Values with numbers at six significant digits: GGUF stores 1e-5 in float32 and returns 9.999999747e-06.

    Whole ones as well: the rope of Qwen 3 has 1000000 in its config.json, and 1000000.0 in a GGUF file.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value if value is None or isinstance(value, bool) else str(value)


def refuse_missing(balconies: Path | None) -> None:
    """Refuse a directory without balconies now, and not after the minutes that loading a model may take."""
    if balconies is not None:
        read_index(balconies)


def read_index(path: Path) -> dict[str, Any]:
    """The index of a directory of balconies.

    Raises:
        CheckpointError: It is missing, damaged or of another format.
    """
    file = path / INDEX
    if not exists(file):
        raise CheckpointError(f"{path}: has no {INDEX}: give a directory that `balcony-edge train` wrote")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}): make it readable") from error
    try:
        index: dict[str, Any] = json.loads(content)
        version, module = index["format_version"], index.get("module")
        known = version == FORMAT_VERSION and module in KINDS
        complete = known and _is_complete(index)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: is damaged: copy it again, or train again") from error
    if not known:
        raise CheckpointError(
            f"{file}: has format {repr(version)[:20]} and module {repr(module)[:20]}: this version reads format "
            f"{FORMAT_VERSION} and modules {', '.join(KINDS)}: use the version of Balcony Edge that wrote it"
        )
    if not complete:
        raise CheckpointError(f"{file}: is damaged: copy it again, or train again")
    return index


def _is_complete(index: dict[str, Any]) -> bool:
    """Whether an index of this format has all its entries; one that is missing may also be a KeyError."""
    layer = index.get("layer")
    none = index["module"] == "none"
    known = layer is None if none else type(layer) is int and 0 <= layer < index["base"]["num_layers"]
    return (
        isinstance(index["base"], dict)
        and known
        and all(
            re.fullmatch(r"[1-9][0-9]{0,3}", key)
            and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}", entry["file"])
            and isinstance(entry["sha256"], str)
            and isinstance(entry.get("training"), dict | None)
            for key, entry in index["exits"].items()
        )
    )


def _check_base(path: Path, index: dict[str, Any], described: dict[str, Any]) -> None:
    base = index["base"]
    for key in ("model_type", "hidden_size", "num_layers", "config_sha256", "weights_sha256"):
        if base.get(key) != described[key]:
            given, wanted = str(described[key])[:12], repr(base.get(key)).strip("'")[:12]
            raise CheckpointError(
                f"{path}: these balconies belong to another base model ({key} is {given}, they need {wanted}): "
                "give the model that they were trained for, or train balconies for this one"
            )


def read_tensors(path: Path, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of one entry of an index.

    Raises:
        CheckpointError: The file is missing or was changed.
    """
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


def check_finite(path: Path, exit_layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError for tensors with a value that is not finite."""
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{path}: balcony {exit_layer}: {name} has values that are not finite: train again with a lower rate"
            )
