"""Sampling: turns logits into the next token with bias, penalties, temperature, top-k, top-p, min-p and a seed.

Owns the order, which is that of transformers' processors and warpers: bias, repetition penalty, presence and frequency
penalty (which transformers does not have), the tokens that a structure allows, temperature, top-k, top-p on the tokens left,
min-p on the tokens left. Log-probabilities are the model's own, taken before all of these. This module does not know about
exits, or how a structure becomes a mask.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from balcony_edge.errors import InputError, shown
from balcony_runtime.backends.base import FloatArray, IntArray, likeliest, not_finite

if TYPE_CHECKING:
    from balcony_runtime.structure.grammar import Guide

#: Largest bias or penalty. It is far beyond every logit, and small enough for float32 that no sum or product overflows.
LARGEST = 1e6
#: Temperatures below this one leave only the likeliest token as well, and float32 cannot divide by all of them.
LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick a token.

    Example:
        reply = llm.generate("Write a haiku.", sampling=SamplingParams(temperature=0.8, top_p=0.95, seed=7))

    Attributes:
        temperature: divisor of the logits; 0 is greedy.
        top_k: number of most likely tokens to keep; 0 keeps all.
        top_p: probability that the kept most likely tokens must reach together; 1 keeps all.
        min_p: least probability of a kept token, as a share of the likeliest token's; 0 keeps all.
        repetition_penalty: divisor of positive logits and factor of negative ones, for tokens in prompt or reply (CTRL);
            1 is none.
        presence_penalty: amount subtracted from the logits of tokens in the reply so far (OpenAI); 0 is none.
        frequency_penalty: amount subtracted from a token's logit for each time that the reply has it (OpenAI); 0 is none.
        logit_bias: token id → amount added to its logit.
        seed: seed of the random numbers; None takes fresh ones.
        json_schema: JSON schema that the reply follows: a mapping, JSON text, or a pydantic model class.
        regex: regular expression that the whole reply matches.
        grammar: Lark or GBNF grammar that the reply follows. At most one of the last three is given; they need llguidance.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    json_schema: Any = field(default=None, hash=False)
    regex: str | None = None
    grammar: str | None = None

    @property
    def structured(self) -> bool:
        """Whether the reply has a structure."""
        return any(asked is not None for asked in (self.json_schema, self.regex, self.grammar))

    def __post_init__(self) -> None:
        # parameter → its type, its range, what is allowed, and what to do
        checks: dict[str, tuple[Any, Callable[[Any], bool], str, str]] = {
            "temperature": (
                Real,
                lambda value: value >= 0,
                "a finite number, 0 or more",
                "give 0 for greedy decoding, or a larger number for more varied text, e.g. 0.7",
            ),
            "top_k": (
                Integral,
                lambda value: value >= 0,
                "a whole number, 0 or more",
                "give the number of likeliest tokens to keep, e.g. 40, or 0 to keep all",
            ),
            "top_p": (
                Real,
                lambda value: 0 < value <= 1,
                "a number above 0 and at most 1",
                "give the probability to keep, e.g. 0.95, or 1 to keep all tokens",
            ),
            "min_p": (
                Real,
                lambda value: 0 <= value < 1,
                "a number, at least 0 and below 1",
                "give a share of the likeliest token's probability, e.g. 0.05, or 0 to keep all tokens",
            ),
            "repetition_penalty": (
                Real,
                lambda value: 1 / LARGEST <= value <= LARGEST,
                f"a number from {1 / LARGEST:g} to {LARGEST:g}",
                "give a number above 1 for fewer repetitions, e.g. 1.1, or 1 for no penalty",
            ),
            **dict.fromkeys(
                ("presence_penalty", "frequency_penalty"),
                (
                    Real,
                    lambda value: abs(value) <= LARGEST,
                    f"a number within ±{LARGEST:g}",
                    "give a number above 0 for fewer repetitions, e.g. 0.5, or 0 for no penalty",
                ),
            ),
            "seed": (
                Integral | None,
                lambda value: value is None or value >= 0,
                "a whole number, 0 or more, or None",
                "give an integer for the same text each time, or leave it out",
            ),
        }
        for name, (kind, in_range, allowed, cure) in checks.items():
            value: Any = getattr(self, name)
            wrong = isinstance(value, bool) or not isinstance(value, kind)  # seed=False would be the seed 0
            if wrong or not in_range(value) or (kind is Real and not _is_finite(value)):
                raise InputError(f"{name} = {shown(value)}: must be {allowed}: {cure}")
        biases = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(None, None)]
        for token, bias in biases:
            if (
                isinstance(token, bool)
                or isinstance(bias, bool)
                or not isinstance(token, Integral)
                or not isinstance(bias, Real)
                or not abs(bias) < LARGEST
            ):
                raise InputError(
                    f"logit_bias = {shown(self.logit_bias)}: must give token ids a bias between ±{LARGEST:g} each; "
                    "use -100 to ban a token"
                )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # the caller may change the one that was checked


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


class Proposal(NamedTuple):
    """A drafted token and the distribution from which it was drawn, (V,); None if the token is the likeliest one."""

    token: int
    distribution: npt.NDArray[np.float64] | None


class Sampler:
    """Draws tokens with one stream of random numbers, and remembers the tokens that penalties count.

    Args:
        params: sampling parameters.
        prompt: tokens that the repetition penalty counts from the start, (B, n).
        vocab_size: size of the vocabulary, V.
        guides: structure of each member's reply; empty without one.

    Raises:
        InputError: a bias for a token outside the vocabulary.
    """

    def __init__(self, params: SamplingParams, prompt: IntArray, vocab_size: int, guides: Sequence[Guide] = ()) -> None:
        self._params, self._guides = params, tuple(guides)
        #: Whether replies have a structure.
        self.guided = bool(guides)
        self._members = np.arange(prompt.shape[0])
        # Tokens of each member that the repetition penalty counts. One that the reply repeats is in it several times, which
        # changes nothing. These lists are short; with cold caches, to search a mask of the vocabulary takes 20 µs.
        self._seen = [np.unique(row) for row in prompt] if params.repetition_penalty != 1 else []
        self._made = None
        if params.presence_penalty or params.frequency_penalty:
            self._made = np.zeros((prompt.shape[0], vocab_size), np.int32)
        self._changes = bool(self._seen or self._made is not None or params.logit_bias)
        #: Whether the next token is always the one with the largest unchanged logit.
        self.greedy = params.temperature == 0 and not self._changes and not self._guides
        for token in params.logit_bias:
            if not 0 <= token < vocab_size:
                raise InputError(
                    f"logit_bias for token {token}: the vocabulary has 0 to {vocab_size - 1}: leave it out"
                )
        self._biased = np.array(list(params.logit_bias), np.int64)
        self._biases = np.array(list(params.logit_bias.values()), np.float32)

    @functools.cached_property
    def _random(self) -> np.random.Generator:
        """The random numbers; greedy replies need none, and NumPy loads their module at the first use."""
        return np.random.default_rng(self._params.seed)

    def pick(self, logits: FloatArray) -> IntArray:
        """Pick the next token of each sequence, (B,), from logits (B, V), which are not changed.

        Raises:
            InputError: logits are not finite, because of the model or its precision.
        """
        if self.greedy and len(logits) == 1:  # the common case, with as few calls as possible
            best: IntArray = logits.argmax(-1)
            if not math.isfinite(logits.item(best.item())):
                raise not_finite()
            return best
        adjusted = self._adjust(logits)
        if self._guides:
            pairs = zip(adjusted, self._guides, strict=True)
            return self._recorded(np.array([self._guided(row, guide) for row, guide in pairs], np.int64))
        if self._params.temperature == 0:
            ids = likeliest(adjusted)
        else:
            ids = np.array([self._drawn(*self._candidates(row)) for row in adjusted], np.int64)
        return self._recorded(ids)

    def _guided(self, logits: FloatArray, guide: Guide) -> int:
        """Pick the next token of one member, from the tokens that its structure allows."""
        if self._params.temperature > 0:
            return self._drawn(*self._candidates(logits, guide))
        best = int(logits.argmax())
        if not math.isfinite(logits.item(best)):
            raise not_finite()
        if guide.permits(best):  # the usual case
            return best
        allowed = guide.allowed()
        assert allowed is not None  # without a mask all tokens are permitted
        places = allowed.nonzero()[0]
        return int(places[logits[places].argmax()])

    def allows(self, token: int) -> bool:
        """Whether a token may come next in the reply of the only member."""
        return not self._guides or self._guides[0].permits(token)

    def forced(self, most: int) -> list[int]:
        """Go on over the tokens that are certain to come next for the only member, at most so many, and return them."""
        found = self._guides[0].forced(most) if len(self._guides) == 1 else []
        for token in found:
            self._remember(np.array([token], np.int64))
        return found

    def prepare(self) -> None:
        """Start to compute the masks of the next tokens."""
        for guide in self._guides:
            guide.prepare()

    def fork(self) -> Sampler:
        """Return a copy with its own memory of tokens from now on; both draw random numbers from the same stream."""
        self._random  # noqa: B018 - is made now, so that both have it
        other = copy.copy(self)
        other._guides = tuple(guide.fork() for guide in self._guides)
        other._made = None if self._made is None else self._made.copy()
        return other

    def propose(self, logits: FloatArray) -> Proposal:
        """Draft the next token from logits (V,), and remember it."""
        if self._params.temperature == 0:
            return Proposal(int(self.pick(logits[None])[0]), None)
        ids, probabilities = self._candidates(self._adjust(logits[None])[0], *self._guides)
        token = self._drawn(ids, probabilities)
        self._recorded(np.array([token], np.int64))
        return Proposal(token, _dense(ids, probabilities, len(logits)))

    def judge(self, logits: FloatArray, proposal: Proposal) -> int:
        """Pick the next token from logits (V,): the proposal's if possible, with the same distribution as :meth:`pick`.

        Accept the proposal with min(1, p / q); else draw from what p has more than q (Leviathan et al., 2023, appendix A.1).
        """
        if proposal.distribution is None:
            return int(self.pick(logits[None])[0])
        wanted = _dense(*self._candidates(self._adjust(logits[None])[0], *self._guides), len(logits))
        token, offered = proposal.token, proposal.distribution
        if self._random.random() * offered[token] >= wanted[token]:
            rest = np.maximum(wanted - offered, 0.0)
            if (total := rest.sum()) > 0:  # it is 0 if the two differ only by rounding
                token = int(self._random.choice(len(rest), p=rest / total))
        self._recorded(np.array([token], np.int64))
        return token

    def _recorded(self, ids: IntArray) -> IntArray:
        self._remember(ids)
        for guide, token in zip(self._guides, ids.tolist(), strict=False):
            guide.accept(token)
        return ids

    def _remember(self, ids: IntArray) -> None:
        """Count tokens for the penalties."""
        if self._seen:  # a new list: a fork has the old one
            self._seen = [np.concatenate(pair) for pair in zip(self._seen, ids[:, None], strict=True)]
        if self._made is not None:
            self._made[self._members, ids] += 1

    def _adjust(self, logits: FloatArray) -> FloatArray:
        """The logits that a token is picked from: a copy, if anything changes them."""
        if not self._changes:
            return logits
        params, adjusted = self._params, logits.astype(np.float32)
        if params.logit_bias:
            adjusted[:, self._biased] += self._biases
        for row, counted in zip(adjusted, self._seen, strict=False):
            values, penalty = row[counted], params.repetition_penalty
            # Of a positive logit the quotient, of a negative one the product.
            smaller = np.minimum if penalty > 1 else np.maximum
            row[counted] = smaller(values / penalty, values * penalty)
        for row, made in zip(adjusted, () if self._made is None else self._made, strict=False):
            counted = made.nonzero()[0]
            row[counted] -= params.presence_penalty + params.frequency_penalty * made[counted]
        return adjusted

    def _drawn(self, ids: IntArray, probabilities: npt.NDArray[np.float64]) -> int:
        """Draw one of the tokens. The only one needs no number: one that a structure forces draws none either."""
        if len(ids) == 1:
            return int(ids[0])
        reached = probabilities.cumsum()
        reached /= reached[-1]
        return int(ids[reached.searchsorted(self._random.random(), side="right")])

    def _candidates(self, logits: FloatArray, guide: Guide | None = None) -> tuple[IntArray, npt.NDArray[np.float64]]:
        """:func:`candidates` among the tokens that a structure allows."""
        allowed = None if guide is None else guide.allowed()
        if allowed is None:
            return candidates(logits, self._params, in_place=self._changes)
        places = allowed.nonzero()[0]
        ids, probabilities = candidates(logits[places], self._params, in_place=True)
        return places[ids], probabilities


def candidates(
    logits: FloatArray, params: SamplingParams, *, in_place: bool = False
) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """Tokens that pass the filters and their probabilities, in any order (temperature above 0).

    Args:
        logits: logits after penalties and bias, (V,).
        params: sampling parameters with the filters.
        in_place: whether the logits may be overwritten.

    Raises:
        InputError: logits are not finite.
    """
    # Memory is cold after a pass: each further array of the vocabulary's size takes 0.1 ms. So arrays are changed in place, and
    # there is none of all token ids.
    best = logits.max()
    if not math.isfinite(best):  # NaN, if there is one
        raise not_finite()
    ids: IntArray | None = None  # all
    top_k = int(params.top_k)  # NumPy's integers without a sign have no negative
    if 0 < top_k < len(logits):
        ids = _largest(logits, top_k)
        logits, in_place = logits[ids], True
    weights = np.subtract(logits, best, out=logits if in_place else None)
    # With a temperature close to 0 only the likeliest token is left. The application may have made NumPy raise for it.
    with np.errstate(over="ignore", under="ignore"):
        weights /= np.float32(max(params.temperature, LEAST_TEMPERATURE))
        np.exp(weights, out=weights)
    if params.top_p < 1:
        nucleus, weights = _nucleus(weights, params.top_p)
        ids = nucleus if ids is None else ids[nucleus]
    if params.min_p > 0:
        likely = (weights >= params.min_p).nonzero()[0]  # the likeliest token weighs 1
        ids, weights = likely if ids is None else ids[likely], weights[likely]
    total = weights.sum(dtype=np.float64)
    # NumPy 1 would divide in float32.
    return np.arange(len(weights)) if ids is None else ids, np.divide(weights, total, dtype=np.float64)


def _largest(values: FloatArray, count: int) -> IntArray:
    """Places of the largest values, of equal ones the first, in ascending order.

    A seed draws by this order. That of `argpartition` follows the processor, and the last bits of all values.
    """
    least = np.partition(values, -count)[-count]
    places: IntArray = (values >= least).nonzero()[0]
    if (surplus := len(places) - count) > 0:
        places = np.delete(places, (values[places] == least).nonzero()[0][-surplus:])
    return places


def _nucleus(weights: FloatArray, share: float) -> tuple[IntArray, FloatArray]:
    """The largest weights, as few as reach a share of the sum together, after their places. The largest of all is 1."""
    wanted = share * weights.sum(dtype=np.float64)
    places = (weights >= 2**-12).nonzero()[0]  # usually enough, and to sort the whole vocabulary takes 1 ms
    likely = weights[places]
    if likely.sum(dtype=np.float64) < wanted:
        places = np.arange(len(weights))
        likely = weights
    ranked = np.sort(likely)[::-1]
    reached = ranked.cumsum(dtype=np.float64)
    last = min(int(reached.searchsorted(wanted)), len(ranked) - 1)  # the one that crosses the share is kept
    above, equal = (likely > ranked[last]).nonzero()[0], (likely == ranked[last]).nonzero()[0]
    chosen = np.concatenate([above, equal[: last + 1 - len(above)]])
    return places[chosen], likely[chosen]


def _dense(ids: IntArray, probabilities: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """Probabilities of all tokens."""
    whole = np.zeros(size)
    whole[ids] = probabilities
    return whole


def log_probabilities(
    logits: FloatArray, tokens: IntArray, top: int
) -> tuple[list[float], list[tuple[tuple[int, float], ...]]]:
    """Log-probability of one token in each row, and the likeliest ones with theirs, under the model's own distribution.

    Args:
        logits: logits of the model, unchanged, (n, V).
        tokens: token of each row, (n,).
        top: number of likeliest tokens to list.

    Raises:
        InputError: a row has NaN or infinity.
    """
    best = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(best).all():
        raise not_finite()
    shifted = logits - best
    with np.errstate(under="ignore"):  # as in candidates()
        totals = np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64))
    own = (shifted[np.arange(len(tokens)), tokens] - totals).tolist()
    if not top:
        return own, [()] * len(own)
    kept = min(top, shifted.shape[-1])
    ids = np.array([_largest(row, kept) for row in shifted])
    values = np.take_along_axis(shifted, ids, axis=-1) - totals[:, None]
    likeliest = [
        tuple(sorted(zip(of_ids, of_values, strict=True), key=lambda pair: -pair[1]))
        for of_ids, of_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return own, likeliest
