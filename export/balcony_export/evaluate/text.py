"""Text evaluation: perplexity, KL to the full model and top-1 agreement of every exit, with standard errors.

Owns how documents become windows, and the statistics. Every token except a document's first is predicted exactly once, from at
least one token before it: windows overlap by one token, whose second copy is context only. Means are over tokens. Standard
errors are those of a ratio of sums over clusters, because the tokens of one document are correlated: a cluster is a document,
or a window if few documents hold nearly all tokens (``LEAST_CLUSTERS``). Tasks are :mod:`.tasks`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from balcony_edge.bundle.manifest import Estimate, TextQuality
from balcony_edge.errors import InputError
from balcony_export.data.corpus import start_tokens
from balcony_export.data.documents import read_documents, require_two_tokens
from balcony_export.evaluate.scorer import Scorer, ScoringRequest, not_finite

#: Tokens per window, unless the context is shorter: twice as many as in the texts that the shipped
#: balconies were trained on.
WINDOW = 1024
#: Windows per call of the scorer: bounds the logits' bookkeeping, and progress is reported after each.
_WINDOWS = 16


@dataclass
class _Sums:
    """Sums over the predicted tokens of one cluster at one exit."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    hits: float = 0.0


def tokenized_documents(
    path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> Iterator[tuple[int, ...]]:
    """Tokens of each document of a file, as the model is fed (with a start token if the tokenizer adds one), one by one.

    Args:
        path: Text file of a form that :mod:`balcony_export.data.documents` reads.
        tokenizer: The model's tokenizer.
        limit: Number of documents to take; None for all.

    Raises:
        InputError: The file cannot be used, or a document has fewer than two tokens.
    """
    for document in islice(read_documents(path), limit):
        tokens = tuple(int(token) for token in tokenizer(document.text, verbose=False)["input_ids"])
        require_two_tokens(document.where, tokens)
        yield tokens


def evaluate_text(
    scorer: Scorer,
    documents: Sequence[tuple[int, ...]],
    *,
    reference: Scorer | None = None,
    window: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[int, TextQuality]:
    """Quality of every exit on documents.

    Args:
        scorer: Source of the exits' logits.
        documents: Tokens of one or more documents, each of two or more.
        reference: Scorer whose full depth is compared with for KL and agreement; by default the same scorer.
        window: Tokens per pass; by default the context, at most ``WINDOW``.
        progress: Called with the share of windows that are done.

    Raises:
        InputError: The window is longer than the context, or the reference has another vocabulary.
        VerificationError: The logits of an exit are not finite.
    """
    size = window_of(scorer if reference is None else reference, scorer, window)
    lengths = [len(document) for document in documents]
    clustered = sum(lengths) ** 2 < LEAST_CLUSTERS * sum(length**2 for length in lengths)
    begin_with = tuple(start_tokens(scorer.tokenizer))
    requests: list[ScoringRequest] = []
    clusters: list[int] = []
    targets: list[tuple[int, ...]] = []
    for index, document in enumerate(documents):
        begins = begin_with if document[: len(begin_with)] == begin_with and len(begin_with) < size - 1 else ()
        start = 0
        while start < len(document) - 1:
            lead = begins if start else ()  # a model that expects its start token fails without it
            part = document[start : start + size - len(lead)]
            requests.append(ScoringRequest((*lead, *part[:-1]), len(part) - 1))
            targets.append(part[1:])
            start += len(part) - 1
            clusters.append(len(requests) if clustered else index)
    sums: dict[int, dict[int, _Sums]] = {e: defaultdict(_Sums) for e in scorer.exit_layers}
    for begin in range(0, len(requests), _WINDOWS):
        batch = requests[begin : begin + _WINDOWS]
        others = None if reference is None else reference.logits(batch)
        for block in scorer.logits(batch):
            full = block.logits[scorer.exit_layers[-1]]
            if reference is not None and others is not None:
                full = next(others).logits[reference.exit_layers[-1]]
            window_index = begin + block.request
            wanted = torch.tensor(targets[window_index][block.start : block.start + len(full)], device=full.device)
            _add(sums, clusters[window_index], block.logits, full, wanted)
        if progress is not None:
            progress(min(begin + _WINDOWS, len(requests)) / len(requests))
    for exit_layer, found in sums.items():
        if not all(math.isfinite(c.nll) and math.isfinite(c.kl) for c in found.values()):
            raise not_finite(scorer.name, exit_layer)
    return {e: _quality(list(found.values()), len(documents), size) for e, found in sums.items()}


#: Documents below which windows are the clusters of a standard error: so many of equal length, or more of unequal ones.
LEAST_CLUSTERS = 2


def ratio_of_sums(parts: Sequence[tuple[float, float]]) -> Estimate:
    """Sum of the clusters' numerators over the sum of their denominators, with the standard error of that ratio.

    Linearized (Cochran, Sampling Techniques, 3rd ed., section 6.4): a cluster's residual is its numerator minus the ratio
    times its denominator.
    """
    count, total = len(parts), sum(n for _, n in parts)
    value = sum(x for x, _ in parts) / total
    if count < 2:
        return Estimate(value=value)
    squares = sum((x - value * n) ** 2 for x, n in parts)
    return Estimate(value=value, stderr=math.sqrt(count / (count - 1) * squares) / total)


def window_of(reference: Scorer, scorer: Scorer, window: int | None) -> int:
    """Tokens per pass of :func:`evaluate_text`, which raises the same errors."""
    context = min(scorer.context_length, reference.context_length)
    if window is not None and not 2 <= window <= context:
        raise InputError(f"--window {window}: this model takes 2 to {context}: give a number in this range")
    if reference is not scorer and (
        scorer.tokenizer.get_vocab() != reference.tokenizer.get_vocab() or scorer.vocab_size != reference.vocab_size
    ):
        raise InputError(
            f"--model: its tokens ({reference.vocab_size}) are not the bundle's ({scorer.vocab_size}): name the model that the "
            "bundle was made from"
        )
    return window or min(context, WINDOW)


def _add(
    sums: dict[int, dict[int, _Sums]],
    cluster: int,
    logits: dict[int, torch.Tensor],
    full: torch.Tensor,
    wanted: torch.Tensor,
) -> None:
    """Add one block's rows to the sums of a cluster; logits are (n, V), ``wanted`` is (n,)."""
    full_log = torch.log_softmax(full, dim=-1)
    probabilities, best = full_log.exp(), full.argmax(-1)
    for exit_layer, rows in logits.items():
        log = torch.log_softmax(rows.to(full.device), dim=-1)
        into = sums[exit_layer][cluster]
        into.tokens += len(wanted)
        into.nll -= float(log.gather(1, wanted[:, None]).sum(dtype=torch.float64))
        into.hits += float((rows.argmax(-1).to(best.device) == best).sum())  # rounding makes ties of log-probabilities
        into.kl += float((probabilities * (full_log - log)).sum(dtype=torch.float64))


def _quality(clusters: Sequence[_Sums], documents: int, window: int) -> TextQuality:
    nll = ratio_of_sums([(c.nll, c.tokens) for c in clusters])
    perplexity = math.exp(min(nll.value, 700.0))  # e^709 overflows a float, and untrained exits can be that bad
    stderr = None if nll.stderr is None else perplexity * nll.stderr  # d exp(x) = exp(x) dx
    return TextQuality(
        documents=documents,
        tokens=sum(c.tokens for c in clusters),
        window=window,
        perplexity=Estimate(value=perplexity, stderr=stderr),
        kl=ratio_of_sums([(c.kl, c.tokens) for c in clusters]),
        agreement=ratio_of_sums([(c.hits, c.tokens) for c in clusters]),
    )
