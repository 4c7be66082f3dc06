"""How good an exported bundle is against the float model, and which precision is good enough.

Owns the order in which schemes are tried and what they are judged by: the mean KL of the full depth from the float model on
text. The measuring is :mod:`balcony_export.evaluate.text`, the writing :mod:`.export`. Results go into the manifest of the
bundle that is kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import Manifest, TextQuality
from balcony_edge.bundle.quality import record_quality
from balcony_edge.errors import InputError
from balcony_export.evaluate.report import build_report
from balcony_export.evaluate.scorer import BundleScorer, TorchScorer
from balcony_export.evaluate.text import Document, evaluate_text, read_documents
from balcony_export.export import Progress, export_bundle, trace
from balcony_export.graph.lower import can_lower
from balcony_export.model.balcony import Balcony
from balcony_export.quantize.blocks import Scheme

#: Fastest first: decoding is as fast as its bytes are few (docs/quantization.md has the figures).
CANDIDATES: tuple[Scheme | Literal["float32"], ...] = (
    Scheme(bits=4, block_size=64, down_block_size=256, head_bits=4),
    Scheme(bits=4, block_size=64, head_bits=4),
    Scheme(bits=4, block_size=32, head_bits=4),
    Scheme(bits=4, block_size=32, head_bits=8),
    Scheme(bits=8, block_size=64, head_bits=8),
    "float32",
)
#: Tokens of each text that are judged: a mean KL is then sure to some percent, in a minute on two cores.
JUDGED_TOKENS = 8192


def parse_budget(text: str) -> float:
    """``kl=0.02``: most nats that the full depth may be from the float model.

    Raises:
        InputError: something else.
    """
    key, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if key != "kl" or not 0 < value < 100:
        raise InputError(f"--quality-budget {text}: must be kl= and nats above 0, e.g. kl=0.02")
    return value


def judged(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Document]]:
    """The beginning of each text, ``JUDGED_TOKENS`` long, by the file's name.

    Raises:
        InputError: a file that cannot be used.
    """
    found: dict[str, list[Document]] = {}
    for path in files:
        if path.name in found:
            raise InputError(f"--evaluate {path}: another text of that name was given: rename one, results go by names")
        left, kept = JUDGED_TOKENS, []
        for document in read_documents(path, tokenizer):
            tokens = document.tokens[:left]
            if len(tokens) >= 2:
                kept.append(Document(document.where, tokens))
                left -= len(tokens)
        found[path.name] = kept
    return found


class Judge:
    """Measures bundles against one float model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: dict[str, list[Document]],
        *,
        name: str,
    ) -> None:
        """Take a copy of the model: exporting in half precision converts it."""
        self._reference = TorchScorer(copy.deepcopy(model).float(), tokenizer, {}, name=name)
        self._texts = texts

    def measure(self, directory: Path) -> dict[str, dict[int, TextQuality]]:
        """Text → exit layer → quality of a bundle; its manifest keeps it."""
        with closing(BundleScorer(Bundle.open(directory, verify_hashes=False))) as scorer:
            found = {
                name: evaluate_text(scorer, documents, reference=self._reference)
                for name, documents in self._texts.items()
            }
            report = build_report(scorer, self._reference.name, found, {})
        record_quality(directory, report.qualities)
        return found


def export_within(
    kl: float,
    judge: Judge,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    balconies: dict[int, Balcony],
    output: Path,
    *,
    report: Callable[[str], None],
    progress: Progress,
    **options: Any,
) -> Manifest:
    """Export with the fastest precision whose full depth stays within ``kl`` nats of the float model on every text.

    Args:
        kl: the budget.
        judge: knows float model and text.
        model, tokenizer, balconies, output, options: as for :func:`.export_bundle`.
        report: told what each precision came to.
        progress: as there.
    """
    check = options.pop("check", None)
    traced = options.pop("traced", None) or trace(
        model.to(torch.float32),  # type: ignore[arg-type]
        balconies,
        name=options["name"],
        context_length=options.get("context_length"),
        progress=progress,
    )

    def accept(directory: Path) -> None:
        found = judge.measure(directory)
        worst = max(quality[traced.layers[-1]].kl.value for quality in found.values())
        if worst > kl:
            raise _TooFarError(worst)
        report(f"{precision}: KL {worst:.4f}, within {kl:g}")
        if check is not None:
            check(directory)

    left = math.inf
    for precision in CANDIDATES if can_lower(traced.spec) else CANDIDATES[-1:]:
        try:
            return export_bundle(
                model,
                tokenizer,
                balconies,
                output,
                precision=precision,
                traced=traced,
                check=accept,
                progress=progress,
                **options | ({"calibration": ()} if precision == "float32" else {}),
            )
        except _TooFarError as error:
            left = error.kl
            report(f"{precision}: KL {left:.4f}, above {kl:g}")
    raise InputError(f"--quality-budget kl={kl:g}: float32 itself is {left:.1e} away by rounding: allow more")


class _TooFarError(Exception):
    """Undoes an export that is not good enough."""

    def __init__(self, kl: float) -> None:
        super().__init__(kl)
        self.kl = kl
