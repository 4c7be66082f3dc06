"""Equation 2 of the paper, without (positions × vocabulary) values in memory.

Owns the loss of every exit, KL(full ‖ exit) per position in float32, and its gradient with respect to the exit's hidden state.
Both come from one pass over chunks of positions, in which the full model's logits are computed once for all exits. The gradient
of the KL with respect to an exit's logits is softmax(exit) - softmax(full), so no logits are kept for the backward pass.

A training step may compare the two distributions on a part of the vocabulary (:class:`VocabularyPart`, drawn by
:class:`VocabularySample`), which saves the rest of the head. Evaluation always uses the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from balcony_export.train.attention import can_compile

#: Positions per chunk on a CPU. Measured on 2 cores with 49,152 tokens of vocabulary: 150 µs a position at 64, 135 at 128,
#: 130 at 256; 128 rows of float32 logits are 25 MB.
CHUNK = 128
#: Logits per chunk on a GPU, 67 MB in float32. There a chunk of three exits costs about 20 launches of some 5 µs, whatever its
#: size. 128 positions of 8,192 tokens are 8 GFLOP, for which an H100 needs 20 µs.
_GPU_LOGITS = 1 << 24
#: Positions per chunk on a GPU, if there are as many, whatever the vocabulary: each chunk reads the weights of the head seven
#: times with three exits, and an H100 makes 295 FLOP (bfloat16, 989 TFLOP/s) while it reads a byte (3.35 TB/s). With n
#: positions a byte serves n FLOP. 512 positions of 128,256 tokens are 131 MB of logits in bfloat16.
_GPU_POSITIONS = 512

#: Target of the training: the full model's distribution (equation 2), the text itself, or both.
LossKind = Literal["kl", "kl+ce", "ce"]
#: Loss → weights of KL and of the cross-entropy. The mix is the paper's (section 4.3: "we set the KL loss weight to 0.001").
LOSS_WEIGHTS: dict[LossKind, tuple[float, float]] = {"kl": (1.0, 0.0), "kl+ce": (0.001, 1.0), "ce": (0.0, 1.0)}

_Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def chunk_size(device: str, positions: int, tokens: int) -> int:
    """Positions per chunk. On a GPU a power of two times ``CHUNK``, because the compiler runs again for every size.

    Args:
        device: Type of the device.
        positions: Number of positions.
        tokens: Number of tokens that are compared, S.
    """
    size = CHUNK
    while device != "cpu" and 2 * size <= min(positions, max(_GPU_POSITIONS, _GPU_LOGITS // tokens)):
        size *= 2
    return size


class VocabularyPart(NamedTuple):
    """The S tokens of the vocabulary that the loss compares."""

    weight: torch.Tensor  # (S, D), their rows of the LM head
    offset: torch.Tensor  # (S,) float32, added to the logits: log of the number of tokens that each represents
    full: torch.Tensor  # (S, D), their rows of the full model's LM head: ``weight`` unless there is a teacher


class VocabularySample:
    """Draws the part of the vocabulary that a step compares.

    Half of the part are the tokens of the step's own text, as far as there is room, and then the tokens that are most probable
    on average in the full model. The other half is drawn uniformly from the rest, anew for every step. Each drawn token
    represents rest / drawn tokens, so the log of that ratio is added to its logit in the full model and in the exit.
    Measured (docs/LOG.md, "Distillation"): 8,192 of 49,152 tokens cost 1 % in KL at equal tokens and save 80 % of the heads'
    arithmetic.

    Args:
        size: Number of tokens of a part, S.
        ranking: All tokens of the vocabulary, the most probable first  # (V,)
    """

    def __init__(self, size: int, ranking: torch.Tensor) -> None:
        self.size = size
        self.ranking = ranking

    def draw(self, whole: VocabularyPart, text: torch.Tensor, seed: Sequence[int]) -> VocabularyPart:
        """Draw the part of a step.

        Args:
            whole: The whole vocabulary.
            text: Tokens of the step, which may repeat  # (n,)
            seed: Seed of the drawn half.
        """
        chosen = self._chosen(text.to(self.ranking.device))
        rest = torch.ones(len(self.ranking), dtype=torch.bool, device=self.ranking.device)
        rest[chosen] = False
        others = rest.nonzero()[:, 0]
        count = self.size - len(chosen)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(others))[:count])
        ids = torch.cat([chosen, others[order.to(others.device)]]).to(whole.weight.device)
        offset = torch.zeros(len(ids), device=whole.weight.device)
        offset[len(chosen) :] = math.log(len(others) / count)
        weight = whole.weight[ids]
        return VocabularyPart(weight, offset, weight if whole.full is whole.weight else whole.full[ids])

    def _chosen(self, text: torch.Tensor) -> torch.Tensor:
        """Tokens of the text, then the others, each the most probable first, cut to half a part  # (S / 2,)"""
        in_text = torch.zeros(len(self.ranking), dtype=torch.bool, device=self.ranking.device)
        in_text[text] = True
        mask = in_text[self.ranking]
        return torch.cat([self.ranking[mask], self.ranking[~mask]])[: self.size // 2]


def _kl_kernel(full: torch.Tensor, student: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(KL per row, its gradient with respect to the student's logits)`` of two blocks of logits  # (n, V), offset (V,)"""
    full_log = torch.log_softmax(full.float() + offset, dim=-1)
    student_log = torch.log_softmax(student.float() + offset, dim=-1)
    p = full_log.exp()
    kl = (p * (full_log - student_log)).sum(dim=-1)  # (n,)
    return kl, (student_log.exp() - p).to(student.dtype)


class Head(NamedTuple):
    """How a model makes logits of normed hidden states."""

    weight: torch.Tensor  # (V, D), divided by the model's divisor of logits
    softcap: float | None = None  # its ``final_logit_softcapping``

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Logits for some rows of the head  # (n, D), (S, D) -> (n, S)"""
        logits = hidden.to(weight.dtype) @ weight.T
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class HeadLoss:
    """KL through frozen LM heads.

    Args:
        head: The LM head of the exits.
        full: The LM head of the full model; by default the same.
        dtype: Type of the products that give logits; softmax and sums are float32 in any case.
        compiled: Whether ``torch.compile`` fuses the softmax passes (8 times as fast on a CPU, 46 instead of 392 µs a
            position); None for yes if the machine can compile.
        kind: The loss that :meth:`backward` propagates.
    """

    def __init__(
        self,
        head: Head,
        full: Head | None = None,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool | None = None,
        kind: LossKind = "kl",
    ) -> None:
        self.weights_of = LOSS_WEIGHTS[kind]
        self.head, self.full = head, full or head
        if compiled is None:
            compiled = can_compile()
        self.kernel: _Kernel = torch.compile(_kl_kernel, dynamic=False) if compiled else _kl_kernel
        weight = head.weight.detach().to(dtype)
        offset = torch.zeros(len(weight), device=weight.device)
        self.whole = VocabularyPart(weight, offset, weight if full is None else full.weight.detach().to(dtype))

    def kl(
        self, full: torch.Tensor, students: Sequence[torch.Tensor], part: VocabularyPart | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each exit, ``(KL per position, gradient of their sum)``  # (n,), (n, D)

        Args:
            full: Normed hidden states of the full model  # (n, D)
            students: Normed hidden states of each exit  # (n, D)
            part: Tokens that are compared; by default all.
        """
        part = part or self.whole

        def gradient(_targets: torch.Tensor, logits: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
            if self.head.softcap is not None:
                slope = slope * (1 - (logits / self.head.softcap) ** 2)
            return slope @ part.weight

        return self._divided(full, students, part, gradient)

    def compare(self, full: torch.Tensor, students: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each exit, ``(KL per position, whether both have the same most probable token)``  # (n,), (n,)"""
        return self._divided(
            full, students, self.whole, lambda targets, logits, _slope: targets.argmax(-1) == logits.argmax(-1)
        )

    def _divided(
        self,
        full: torch.Tensor,
        students: Sequence[torch.Tensor],
        part: VocabularyPart,
        also: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """KL chunk by chunk, and the result of ``also`` on both logits and the gradient of the KL in the student's logits."""
        kls: list[list[torch.Tensor]] = [[] for _ in students]
        others: list[list[torch.Tensor]] = [[] for _ in students]
        total = full.shape[0]
        size = chunk_size(full.device.type, total, len(part.weight))
        for start in range(0, total, size):
            count = min(size, total - start)
            # the same shape for every chunk, or the compiler would run for every length of the last one or of a short pass
            alike = total > size or self.kernel is not _kl_kernel
            padding = (0, 0, 0, size - count if alike else 0)
            targets = self.full.logits(nn.functional.pad(full[start : start + count], padding), part.full)
            for student, kl_parts, other_parts in zip(students, kls, others, strict=True):
                logits = self.head.logits(nn.functional.pad(student[start : start + count], padding), part.weight)
                kl, slope = self.kernel(targets, logits, part.offset)
                kl_parts.append(kl[:count])
                other_parts.append(also(targets, logits, slope)[:count])
        empty = full.new_zeros(0)
        return [
            (torch.cat(parts) if parts else empty, torch.cat(other) if other else empty)
            for parts, other in zip(kls, others, strict=True)
        ]

    def cross_entropy(self, student: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(cross-entropy per position, gradient of their sum)`` against the text's next tokens  # (n, D), (n,)"""
        losses, grads = [student.new_zeros(0).float()], [student.new_zeros(0)]
        for start in range(0, student.shape[0], CHUNK):
            logits = self.head.logits(student[start : start + CHUNK], self.whole.weight)
            wanted = labels[start : start + CHUNK]
            logs = torch.log_softmax(logits.float(), dim=-1)
            losses.append(-logs.gather(1, wanted[:, None])[:, 0])
            grad = logs.exp().scatter_add_(1, wanted[:, None], logs.new_full((len(wanted), 1), -1.0)).to(logits.dtype)
            if self.head.softcap is not None:
                grad = grad * (1 - (logits / self.head.softcap) ** 2)
            grads.append(grad @ self.whole.weight)
        return torch.cat(losses), torch.cat(grads[1:] or grads)

    def ranking(self, full: torch.Tensor) -> torch.Tensor:
        """All tokens, the most probable in the full model on average first  # (n, D) -> (V,)"""
        return self.summed_probabilities(full).argsort(descending=True)

    @torch.no_grad()
    def summed_probabilities(self, full: torch.Tensor) -> torch.Tensor:
        """Probability of every token in the full model, summed over the states  # (n, D) -> (V,)"""
        total = torch.zeros_like(self.whole.offset)
        for start in range(0, len(full), CHUNK):
            total += self.full.logits(full[start : start + CHUNK], self.whole.full).float().softmax(dim=-1).sum(dim=0)
        return total

    def backward(
        self,
        full: torch.Tensor,
        students: Sequence[torch.Tensor],
        labels: torch.Tensor | None = None,
        part: VocabularyPart | None = None,
        state_weight: float = 0.0,
    ) -> list[float]:
        """Backpropagate each exit's sum of the loss over positions from its states on; returns the sums.

        Args:
            full: Normed hidden states of the full model  # (n, D)
            students: Normed hidden states of each exit  # (n, D)
            labels: Next token at each position, if the loss includes the text  # (n,)
            part: Tokens that the KL compares; by default all.
            state_weight: How large the gradient that draws an exit's states to those of the full model is, next to that of the
                KL, which it is added to. The sums are without it.
        """
        kl_weight, ce_weight = self.weights_of
        detached = [student.detach() for student in students]
        totals = [0.0] * len(students)
        grads: list[torch.Tensor | float] = [0.0] * len(students)
        if kl_weight:
            for index, (kl, grad) in enumerate(self.kl(full, detached, part)):
                totals[index] += kl_weight * float(kl.sum())
                grads[index] = kl_weight * (grad + _pull(grad, detached[index] - full, state_weight))
        if ce_weight:
            assert labels is not None
            for index, student in enumerate(detached):
                losses, grad = self.cross_entropy(student, labels)
                totals[index] += ce_weight * float(losses.sum())
                grads[index] = grads[index] + ce_weight * grad
        for student, gradient in zip(students, grads, strict=True):
            if len(student):
                assert isinstance(gradient, torch.Tensor)
                student.backward(gradient.to(student.dtype))
        return totals


def _pull(gradient: torch.Tensor, apart: torch.Tensor, weight: float) -> torch.Tensor | float:
    """Gradient of a distance of states: at each position along it, as large as a share of the gradient there  # (n, D)"""
    if not weight or not len(apart):  # the gradient at no position has one axis only
        return 0.0
    size, distance = (torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (gradient, apart))
    pull: torch.Tensor = weight * size / distance.clamp(min=1e-9) * apart
    return pull
