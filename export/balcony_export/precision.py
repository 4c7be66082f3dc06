"""The fastest precision whose bundle is close enough to the float model.

Owns the order in which schemes are tried and the criterion: the mean KL from the float model to the bundle's full depth, on
text. :mod:`balcony_export.evaluate.text` measures it, :mod:`.export` writes the bundles. The results go into the manifest
of the bundle that is kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import Manifest, TextQuality, one_line
from balcony_edge.bundle.quality import record_quality
from balcony_edge.errors import InputError
from balcony_export.evaluate.report import build_report
from balcony_export.evaluate.scorer import BundleScorer, TorchScorer
from balcony_export.evaluate.text import evaluate_text, tokenized_documents
from balcony_export.export import ExportOptions, ProgressCallback, Traced, export_bundle, trace
from balcony_export.model.exits import ExitModel
from balcony_export.quantize.blocks import Scheme
from balcony_export.quantize.experts import can_round_experts

#: Fastest first: fewer bytes and longer blocks make products faster (docs/quantization.md has the figures).
CANDIDATES: tuple[Scheme | Literal["float32"], ...] = (
    Scheme(bits=4, block_size=128, down_block_size=256, head_bits=4),
    Scheme(bits=4, block_size=64, head_bits=4),
    Scheme(bits=4, block_size=32, head_bits=4),
    Scheme(bits=4, block_size=32, head_bits=8),
    Scheme(bits=8, block_size=64, head_bits=8),
    "float32",
)
#: Tokens of each text that are judged: the standard error of a mean KL is then some percent, after a minute on two cores.
JUDGED_TOKENS = 8192


def parse_budget(text: str) -> float:
    """Parse ``kl=0.02``, the largest KL from the float model to the full depth, in nats.

    Raises:
        InputError: The text has another form.
    """
    key, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if key != "kl" or not 0 < value < 100:
        raise InputError(f"--quality-budget {text}: must be kl= and nats above 0 and below 100: give e.g. kl=0.02")
    return value


def read_judged_texts(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[tuple[int, ...]]]:
    """The beginning of each text, ``JUDGED_TOKENS`` long, by the file's name.

    Raises:
        InputError: A file cannot be used.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    for path in files:
        name = one_line(path.name)
        if name in found:
            raise InputError(
                f"--evaluate {path}: another text has the same name, and results are kept by name: rename one"
            )
        left, kept = JUDGED_TOKENS, []
        for document in tokenized_documents(path, tokenizer):
            kept.append(document[:left])
            left -= len(kept[-1])
            if left < 2:
                break  # the rest of a large file is neither tokenized nor checked
        found[name] = kept
    return found


class Judge:
    """Measures bundles against one float model.

    Args:
        exits: The model, of which a copy is kept: an export to half precision converts the model itself.
        tokenizer: The model's tokenizer.
        texts: Name → documents, of :func:`read_judged_texts`.
        name: Name of the model in reports.
    """

    def __init__(
        self,
        exits: ExitModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: dict[str, list[tuple[int, ...]]],
        *,
        name: str,
    ) -> None:
        full = ExitModel(copy.deepcopy(exits.model).float())
        self._reference = TorchScorer(full, tokenizer, name=name)
        self._texts = texts

    def measure(self, directory: Path) -> dict[str, dict[int, TextQuality]]:
        """Text → exit layer → quality of a bundle, which is also written into its manifest."""
        bundle = Bundle.open(directory, verify_hashes=False)
        with closing(BundleScorer(bundle)) as scorer:
            found = {
                name: evaluate_text(scorer, documents, reference=self._reference)
                for name, documents in self._texts.items()
            }
            report = build_report(scorer, self._reference.name, found, {})
        record_quality(directory, report.qualities, bundle.manifest.fingerprint)
        return found


@dataclass(frozen=True)
class QualityBudget:
    """How far the full depth may be from the float model.

    Attributes:
        kl: Largest mean KL on any of the texts, nats a token.
        judge: Measures it.
        report: Called with one line for each precision that was tried.
    """

    kl: float
    judge: Judge
    report: Callable[[str], None]


def export_within(
    budget: QualityBudget,
    exits: ExitModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    options: ExportOptions,
    *,
    traced: Traced | None = None,
    check: Callable[[Path], object] | None = None,
    progress: ProgressCallback,
) -> Manifest:
    """Export with the fastest precision that stays within a quality budget.

    Args:
        budget: The budget.
        exits, tokenizer, output, traced, check, progress: See :func:`.export_bundle`.
        options: See there; its precision is not used.

    Raises:
        InputError: No precision stays within the budget.
    """
    options = replace(options, precision="float32")
    exits.cast(torch.float32)
    traced = traced or trace(exits, options, progress)

    def accept(directory: Path) -> None:
        found = budget.judge.measure(directory)
        worst = max(quality[exits.depth].kl.value for quality in found.values())
        if worst > budget.kl:
            raise _TooFarError(worst)
        budget.report(f"{precision}: KL {worst:.4f}, within {budget.kl:g}")
        if check is not None:
            check(directory)

    left = math.inf
    rounds = traced.lowered and can_round_experts(exits.model)
    for precision in CANDIDATES if rounds else CANDIDATES[-1:]:
        rows = () if precision == "float32" else options.calibration
        wanted = replace(options, precision=precision, calibration=rows)
        try:
            return export_bundle(exits, tokenizer, output, wanted, traced=traced, check=accept, progress=progress)
        except _TooFarError as error:
            left = error.kl
            budget.report(f"{precision}: KL {left:.4f}, above {budget.kl:g}")
    raise InputError(
        f"--quality-budget kl={budget.kl:g}: float32 itself is {left:.1e} away because of rounding: allow more"
    )


class _TooFarError(Exception):
    """Undoes an export that is not good enough."""

    def __init__(self, kl: float) -> None:
        super().__init__(kl)
        self.kl = kl
