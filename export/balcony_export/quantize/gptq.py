"""GPTQ (Frantar et al., ICLR 2023): round a matrix so that its outputs on real inputs change least.

Owns the second moments of every linear layer's inputs, taken from the float model and its balconies on calibration text,
and the rounding that uses them. The form of quantized blocks is :mod:`.blocks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from balcony_edge.errors import InputError
from balcony_export.data.corpus import Corpus, build_corpus
from balcony_export.model.architecture import longest_context
from balcony_export.model.exits import ExitModel
from balcony_export.quantize.experts import ExpertMoments

#: Share of the mean second moment that is added to each, so that channels that hardly ever fire still count.
DAMPING = 0.01
#: Columns whose errors are passed on together.
BATCH = 128
#: Weight of a text's first position, in rows; 50 to 200 make no difference
#: (docs/LOG.md, "GPTQ must know about the attention sink").
SINK_ROWS = 100
#: Layer → another layer of the same module with the same inputs, which are measured once.
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj", "w3": "w1"}
#: Rows of calibration text and their tokens: some ten inputs for each of 1,536 channels.
CALIBRATION_ROWS, CALIBRATION_LENGTH, MIN_TOKENS = 32, 512, 4096


def calibration_rows(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """About ``CALIBRATION_ROWS`` rows of text files, packed and shuffled as for training.

    Raises:
        InputError: A file cannot be used, or there is too little text.
    """
    return first_rows(build_corpus(files, tokenizer, seq_len=CALIBRATION_LENGTH, held_out_rows=0))


def first_rows(corpus: Corpus) -> list[list[int]]:
    """The first ``CALIBRATION_ROWS`` training rows of a corpus, or as many tokens in shorter ones.

    Raises:
        InputError: There is too little text.
    """
    rows: list[list[int]] = []
    total = 0
    for tokens, length in zip(corpus.train.tokens, corpus.train.lengths, strict=True):
        if total >= CALIBRATION_ROWS * CALIBRATION_LENGTH:
            break
        rows.append([int(token) for token in tokens[:length]])
        total += int(length)
    if total < MIN_TOKENS:
        raise InputError(f"--calibration: the text has {total} tokens, but {MIN_TOKENS} are needed: give more")
    return rows


@torch.no_grad()
def second_moments(exits: ExitModel, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """``weight name → mean of x xᵀ`` over the inputs of each linear layer, named as in the traced graphs  # (K, K)

    The names of experts' weights end with the number of the expert, whose moments are over its own rows. What of a row is
    after the model's context is left out.

    Rows larger than the median are scaled down to it, because in some layers the activations of the first position are
    thousands of times larger than the others. But that position is the attention sink, to which nearly every token attends.
    If it is left out, or counts as one row of 512, its keys and values are rounded badly (errors of 88 % of a value), and the
    model is worse than with nearest rounding. So it counts as ``SINK_ROWS`` rows.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    handles: list[Any] = []
    leaders: dict[str, str] = {}

    def scaled(x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        sizes: torch.Tensor = x.norm(dim=1, keepdim=True)
        return x * (sizes.median() / sizes.clamp(min=1e-12)).clamp(max=1.0)

    def add(name: str, inputs: torch.Tensor) -> None:
        x = scaled(inputs.flatten(0, -2))
        x[0] *= SINK_ROWS**0.5
        if name not in sums:
            sums[name] = torch.zeros(x.shape[1], x.shape[1])
        sums[name].addmm_(x.T, x)
        counts[name] = counts.get(name, 0) + len(x)

    experts, longest = ExpertMoments(scaled, SINK_ROWS), longest_context(exits.model.config)

    def watch(root: nn.Module, prefix: str) -> None:
        handles.extend(experts.watch(root, prefix))
        linears = {name: module for name, module in root.named_modules() if isinstance(module, nn.Linear)}
        for name, module in linears.items():
            parent, _, last = name.rpartition(".")
            leader = f"{parent}.{_SAME_INPUT.get(last)}"
            if leader in linears:  # not in Phi-3, with one matrix for both, nor in Arcee, whose MLP has no gate
                leaders[f"{prefix}{name}.weight"] = f"{prefix}{leader}.weight"
            else:
                handles.append(module.register_forward_pre_hook(lambda _, x, n=f"{prefix}{name}.weight": add(n, x[0])))

    watch(exits.parts.decoder, "")
    for exit_layer, balcony in exits.balconies.items():
        watch(balcony, f"balcony_{exit_layer}.")
    try:
        for row in rows:
            states = exits.run(torch.tensor([list(row)[:longest]]), exits.exit_layers)
            for exit_layer in (exits.depth, *exits.balconies):  # sums of floats: the order is part of the result
                add("lm_head.weight", exits.normed(exit_layer, states))
    finally:
        for handle in handles:
            handle.remove()
    means = {name: total.div_(counts[name]) for name, total in sums.items()}
    means |= {name: means[leader] for name, leader in leaders.items() if leader in means}
    return means | experts.means()


class Factors(NamedTuple):
    """What GPTQ needs of the second moments of a matrix's inputs.

    Attributes:
        sizes: How much the error of each column counts  # (K,)
        order: The columns from the largest inputs to the smallest  # (K,)
        inverse: Upper Cholesky factor of the inverse of the damped moments, in this order  # (K, K)
    """

    sizes: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor


def factors_of(moment: torch.Tensor, padding: int = 0) -> Factors:
    """Factorize second moments (K, K), with columns of zeros behind them: three factorizations, each of about K³ operations."""
    moment = torch.nn.functional.pad(moment, (0, padding, 0, padding)).clone()
    sizes = moment.diagonal()
    silent = sizes == 0  # padding, and channels that never fired; they do not count for the typical size
    typical = sizes[~silent].mean() if not silent.all() else torch.tensor(1.0)
    sizes[silent] = typical
    undamped, order = sizes.clone(), sizes.argsort(descending=True)
    moment = moment[order][:, order]
    # Repetitive text leaves directions that float32 cannot invert.
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = moment.clone()
        damped.diagonal().add_(damping * typical)
        with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
            return Factors(undamped, order, inverse)
    raise InputError("--calibration: its inputs are too much alike to round by: give more varied text")


def round_with_compensation(
    weight: torch.Tensor,
    factors: Factors,
    grids: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round column by column; later columns compensate the error of each.

    Columns with the largest inputs come first, while many others are left to compensate their errors. The grids are computed
    from the original weights, so that blocks stay in place (GPTQ's "act-order" with "static groups").

    Args:
        weight: The matrix, float32  # (N, K)
        factors: Of the second moments of the inputs.
        grids: Weight of each column's error (K,) → scales and zero points of the blocks, each (N, K / block).
        levels: Number of values of a grid.

    Returns:
        Values 0 .. levels - 1 (N, K); scales and zero points (N, K / block).
    """
    sizes, order, inverse = factors
    scales, zeros = grids(sizes)
    left = weight[:, order]
    block_of = order // (weight.shape[1] // scales.shape[1])
    scale_of, zero_of = scales[:, block_of], zeros[:, block_of]  # (N, K): of each column, in order
    rounded = torch.empty_like(weight)
    columns = weight.shape[1]
    for begin in range(0, columns, BATCH):
        end = min(begin + BATCH, columns)
        errors = torch.empty(len(weight), end - begin)
        for column in range(begin, end):
            this = slice(column, column + 1)
            w, scale, zero = left[:, this], scale_of[:, this], zero_of[:, this]
            q = (torch.round(w / scale) + zero).clamp_(0, levels - 1)
            rounded[:, this] = q
            error = (w - (q - zero) * scale) / inverse[column, column]
            left[:, column:end] -= error * inverse[column, column:end]
            errors[:, column - begin : column - begin + 1] = error
        left[:, end:] -= errors @ inverse[begin:end, end:]
    return rounded[:, order.argsort()], scales, zeros
