"""Compare a bundle with the model that it was made from: logits of every exit, prefill and decode, and backbone.onnx.

Owns the meaning of «equal» (ARCHITECTURE.md) and the prompts. The reference is PyTorch with transformers' own modules. The
bundle runs in the runtime that a device uses, so verification covers everything end to end, but for rows beyond its short
prompts: no sliding window of a real model (512 rows and more) begins to slide. The tests do that on tiny models.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import VerificationError
from balcony_edge.files import partial_directory
from balcony_export.graph.ir_tools import FAR_WEIGHTS, relative_distance
from balcony_export.model.architecture import describe, embedded_rows
from balcony_export.model.exits import ExitModel
from balcony_export.model.experts import mixture
from balcony_export.quantize.blocks import stored_weights
from balcony_runtime.backends.graph_files.check import check_graph
from balcony_runtime.backends.onnxruntime.backend import open_session
from balcony_runtime.backends.token_table import TokenTable
from balcony_runtime.engine import Engine
from balcony_runtime.text.codec import TextCodec

#: Largest allowed difference of a logit, as a share of the largest logit. float32: some hundred units in the last place.
#: float16: ten units in the last place of a hidden state; a wrong graph differs by tens of percent. Quantized bundles are
#: compared in float32, with the weights that they store and float activations (accuracy level 1).
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int8": 1e-4, "int4": 1e-4}
#: At accuracy level 4 products round their inputs to 8 bits, which amplifies earlier differences, so logits are compared as
#: distributions. Mean KL from the exact form, nats a row: 0.01 on the demo model, up to 0.3 on tiny random models, several
#: nats for a wrong graph.
ROUNDED_KL = 0.5
#: Phases in which not only weights are rounded, but also activations, or keys and values.
ROUNDED = ("level 4", "int8 cache")
#: Real text of several kinds: prose, numbers, code, another script.
PROMPTS = (
    "The balcony looked over the river, and from it one could see every bridge of the old town, from the mill to the sea.",
    "In 1969, 530 million people watched two astronauts walk on the Moon for 2 hours and 31 minutes.",
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Käse, Brötchen und 牛乳: three things to buy before the shop closes at 20:00.",
)
#: Exit layer → logits of each prompt.
_Logits = dict[int, list[npt.NDArray[np.float32]]]
#: Tokens at the end of each prompt that are fed one by one.
DECODE_TOKENS = 8


@dataclass(frozen=True)
class ParityCheck:
    """One line of the report: one comparison, its result and its bound.

    Attributes:
        max_difference: Largest difference of a logit, as a share of the largest logit; in phases of :data:`ROUNDED` the mean
            KL, nats.
        agreement: Share of rows with the same most probable token.
    """

    exit_layer: int
    phase: str
    prompts: int
    max_difference: float
    agreement: float
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether logits were compared one by one; otherwise distributions were compared."""
        return not self.phase.endswith(ROUNDED)

    @property
    def passed(self) -> bool:
        """Whether the bound holds; a difference that is not a number fails."""
        return self.max_difference <= self.tolerance


@torch.no_grad()
def reference_logits(
    exits: ExitModel, tokens: Sequence[int], states: Mapping[int, torch.Tensor] | None = None
) -> dict[int, npt.NDArray[np.float32]]:
    """Logits of every exit in PyTorch: transformers' own layers, no cache.

    Args:
        exits: The model with its balconies.
        tokens: Token ids of one sequence  # (T,)
        states: Hidden states to use instead of the model's own, by exit layer  # (1, T, D)

    Returns:
        Exit layer → logits  # (T, V)
    """
    taken = exits.run(torch.tensor([list(tokens)]), exits.exit_layers)
    if states is not None:
        taken = replace(taken, at=states)
    return {e: exits.head(exits.normed(e, taken))[0].float().numpy() for e in exits.exit_layers}


def verify(
    directory: Path, exits: ExitModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] = PROMPTS
) -> list[ParityCheck]:
    """Run prompts through the bundle and through PyTorch, and compare the logits.

    Args:
        directory: The bundle.
        exits: The model and the balconies that it was exported from, converted to the bundle's precision in place.
        tokenizer: The model's own tokenizer; the bundle's must give the same ids.
        prompts: Texts to run.

    Raises:
        BundleError: The bundle cannot be loaded.
        VerificationError: The bundle has another shape than the model, or its tokenizer gives other ids.
    """
    bundle = Bundle.open(directory)
    manifest = bundle.manifest
    if manifest.exit_layers != exits.exit_layers:
        raise VerificationError(
            f"{directory}: has exits {manifest.exit_layers}, but the balconies given are at {list(exits.balconies)}: "
            "name the model and the balconies that it was exported from"
        )
    _require_same_model(bundle, exits.model)
    exits.cast(torch.float16 if manifest.precision == "float16" else torch.float32)
    if manifest.quantization is not None:
        exits = _with_stored_weights(bundle, exits)
    limit = min(manifest.model.context_length, 256)
    codec = TextCodec(bundle)
    samples = [ids[:limit] for text in prompts if len(ids := _same_ids(bundle, codec, tokenizer, text)) > 1]
    expected = [reference_logits(exits, ids) for ids in samples]
    with partial_directory(_scratch_place(directory) / "verify") as scratch:
        scratch.chmod(0o700)
        subjects = {"": bundle}
        if manifest.cpu and manifest.graphs:
            subjects[", portable"] = bundle.portable()
        quantized = manifest.quantization
        if quantized is not None and quantized.kv_bits == 8:
            subjects = {", int8 cache": bundle}
        elif quantized is not None and quantized.accuracy_level == 4:
            subjects = {", level 4": bundle}
            if quantized.bits == 4 or mixture(exits.model.config) is None:  # 8-bit experts have no other level
                subjects = {", level 1": at_level_1(bundle, scratch), **subjects}
        phases: dict[str, _Logits] = {}
        for suffix, subject in subjects.items():
            with Engine.of(subject, device="cpu") as engine:  # not an engine set of it, whose rounding is another
                for phase, run in (("prefill", _prefill), ("decode", _decode)):
                    phases[phase + suffix] = {e: [run(engine, e, ids) for ids in samples] for e in manifest.exit_layers}
    if manifest.graphs:
        phases["backbone.onnx"] = _backbone(bundle, exits, samples)
    checks = []
    for phase, found in phases.items():
        far, bound = (_kl, ROUNDED_KL) if phase.endswith(ROUNDED) else (_difference, TOLERANCE[manifest.precision])
        for exit_layer in manifest.exit_layers:
            pairs = [
                (got, want[exit_layer][-len(got) :]) for got, want in zip(found[exit_layer], expected, strict=True)
            ]
            difference = float(np.max([far(got, want) for got, want in pairs]))  # NaN if one of them is
            agreement = float(np.mean([np.mean(got.argmax(-1) == want.argmax(-1)) for got, want in pairs]))
            checks.append(ParityCheck(exit_layer, phase, len(pairs), difference, agreement, bound))
    return checks


def _require_same_model(bundle: Bundle, model: PreTrainedModel) -> None:
    """Refuse a model of other sizes than the bundle's."""
    have, given = bundle.manifest.model, describe(model, "")
    sizes = ("architecture", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "vocab_size")
    for size in sizes:
        if getattr(have, size) != getattr(given, size):
            raise VerificationError(
                f"{bundle.path}: was made from {have.name} with {size} {getattr(have, size)}, but the given model has "
                f"{getattr(given, size)}: name {have.name} with --against"
            )


def _same_ids(bundle: Bundle, codec: TextCodec, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, which must be the same from the bundle's tokenizer and the model's."""
    ids: list[int] = list(tokenizer(text).input_ids)
    if codec.encode(text, chat=False) != ids:
        raise VerificationError(
            f"{bundle.path}: was made from {bundle.manifest.model.name}, and its tokenizer gives other tokens for "
            f"{text[:30]!r} than the given model's: name that model, or export it again"
        )
    return ids


def _scratch_place(directory: Path) -> Path:
    """Where scratch files go: the disk of the weights, so that they are linked and not copied, if it can be written."""
    beside = directory.absolute().parent
    if os.access(beside, os.W_OK):
        return beside
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # all file systems are read-only, as in some containers
        raise VerificationError(
            f"{beside}: cannot be written, and there is no directory for temporary files: name one in TMPDIR"
        ) from error


def at_level_1(bundle: Bundle, directory: Path) -> Bundle:
    """A bundle with the same weights whose products keep float32 inputs, so that logits can be compared one by one.

    Raises:
        VerificationError: the directory cannot be written.
    """
    try:
        _write_at_level_1(bundle, directory)
    except OSError as error:
        raise VerificationError(f"{directory}: cannot be written ({error.strerror}): free space") from error
    return Bundle(directory, bundle.manifest)


def _write_at_level_1(bundle: Bundle, directory: Path) -> None:
    for spec in bundle.manifest.cpu.values():
        graph = onnx.load(str(bundle.file(spec.file)), load_external_data=False)
        for node in graph.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
        onnx.save(graph, str(directory / spec.file))
    for name in bundle.manifest.files:
        if not (directory / name).exists():
            try:
                os.link(bundle.file(name), directory / name)
            except OSError:  # another disk
                shutil.copyfile(bundle.file(name), directory / name)


def _with_stored_weights(bundle: Bundle, exits: ExitModel) -> ExitModel:
    """A copy of the model that computes with the weights that a quantized bundle holds."""
    exits = exits.copy()
    parts = exits.parts
    roots: dict[str, Any] = {f"balcony_{e}": balcony for e, balcony in exits.balconies.items()}

    def weight_of(name: str) -> torch.Tensor:
        first, _, rest = name.partition(".")
        if name == "lm_head.weight":
            return parts.head.weight.data
        root, path = (roots[first], rest) if first in roots else (parts.decoder, f"{first}.{rest}")
        return root.get_parameter(path).data  # type: ignore[no-any-return]

    def take(name: str, weight: torch.Tensor, stored: npt.NDArray[np.float32]) -> None:
        far = relative_distance(stored, weight.numpy())
        if not far <= FAR_WEIGHTS:
            raise VerificationError(
                f"{bundle.path}: {name} differs from the model's by {far:.2g} of its size: name the model and the balconies "
                "that it was exported from, or export it again"
            )
        weight.copy_(torch.from_numpy(stored))

    for names, stored in stored_weights(bundle):
        first = 0
        for name in names.split("+"):
            weight = weight_of(name)
            take(name, weight, stored[first : first + len(weight)])
            first += len(weight)
    table = TokenTable(bundle)
    scale = bundle.manifest.embedding.scale
    rows = table[np.arange(len(parts.embed.weight))] / np.float32(scale)
    take("embed_tokens.weight", parts.embed.weight.data, rows.astype(np.float32, copy=False))
    return exits


def require_all_passed(checks: Sequence[ParityCheck], directory: Path, made_from: str) -> None:
    """Raise unless every check passed.

    Args:
        checks: Checks of one bundle.
        directory: The bundle.
        made_from: Name of the model in the bundle's manifest.

    Raises:
        VerificationError: A check failed; the message names the first.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        first = next((check for check in failed if math.isnan(check.max_difference)), failed[0])
        # the weights are finite, so hidden states are not
        if math.isnan(first.max_difference) and first.tolerance == TOLERANCE["float16"]:
            raise VerificationError(
                f"{directory}: exit {first.exit_layer}, {first.phase}: its logits are not finite, because hidden states of "
                f"{made_from} leave the range of float16: export with fp32"
            )
        what, unit = ("largest logit difference", " of the largest logit") if first.exact else ("mean KL", " nats")
        raise VerificationError(
            f"{directory}: exit {first.exit_layer}, {first.phase}: the {what} is {first.max_difference:.1e}{unit}, more than "
            f"the allowed {first.tolerance:.0e}: compare it with {made_from}, which it was made from, and its balconies; "
            "if you did, do not use this bundle, and report the model's architecture"
        )


def _kl(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> float:
    """Mean of KL(want ‖ got) over rows, nats; NaN if a logit is NaN."""
    logs = [torch.from_numpy(rows).double().log_softmax(-1) for rows in (want, got)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def _difference(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> float:
    if not np.isfinite(got).all():
        return float("nan")
    return float(np.abs(got - want).max() / np.abs(want).max())


def require_close(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32], what: str) -> None:
    """Refuse to write a model whose logits are not those of another one."""
    difference = _difference(got, want)
    if not difference <= TOLERANCE["float32"]:
        raise VerificationError(
            f"{what} by {difference:.1e} of the largest: nothing was written; report the model's architecture"
        )


def _prefill(engine: Engine, exit_layer: int, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    sequence = engine.new_sequence(max_length=len(ids))
    logits: npt.NDArray[np.float32] = sequence.advance(exit_layer, ids, num_logits=len(ids))[0]
    return logits


def _decode(engine: Engine, exit_layer: int, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits of the last tokens, fed one by one after a prefill of the others."""
    sequence = engine.new_sequence(max_length=len(ids))
    first = max(len(ids) - DECODE_TOKENS, 1)
    rows = [sequence.advance(exit_layer, ids[:first])[0]]
    rows += [sequence.step(exit_layer, np.array([token])).copy() for token in ids[first:]]
    decoded: npt.NDArray[np.float32] = np.concatenate(rows)
    return decoded


def _backbone(bundle: Bundle, exits: ExitModel, samples: Sequence[Sequence[int]]) -> _Logits:
    """Logits from backbone.onnx's hidden states, through PyTorch's balconies and head."""
    manifest = bundle.manifest
    check_graph(bundle.file("backbone.onnx"), manifest.files)
    session = open_session(bundle.file("backbone.onnx"))
    names = [f"hidden_{e}" for e in manifest.exit_layers]
    found: _Logits = {e: [] for e in manifest.exit_layers}
    for ids in samples:
        embedded = embedded_rows(exits.parts, torch.tensor([list(ids)])).detach()
        feeds: dict[str, Any] = {"hidden_0": embedded.numpy(), "start": np.zeros(1, np.int64)}
        for tensor in manifest.graphs["backbone"].inputs[2:]:
            shape = [dim if isinstance(dim, int) else len(ids) for dim in tensor.shape[1:]]
            feeds[tensor.name] = np.zeros((1, *shape), tensor.dtype)
        hidden = dict(zip(manifest.exit_layers, session.run(names, feeds), strict=True))
        states = {e: torch.from_numpy(np.asarray(state)) for e, state in hidden.items()}
        logits = reference_logits(exits, ids, states)
        for exit_layer, rows in logits.items():
            found[exit_layer].append(rows)
    return found
