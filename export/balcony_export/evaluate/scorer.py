"""Logits of all exits of a model or a bundle, for requested rows of requested texts.

Owns the protocol and its two sources. All deeper exits share a hidden state, so the backbone runs once and every exit
starts from its states. Logits come in blocks of ``CHUNK`` rows, so that (rows × vocabulary) values never exist at once.
Perplexity and log-likelihoods are computed from them in :mod:`.text` and :mod:`.lm_eval`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, InputError, VerificationError
from balcony_export.model.architecture import eos_ids, longest_context
from balcony_export.model.exits import ExitModel
from balcony_runtime.backends.choose import DeviceName
from balcony_runtime.engine import Engine
from balcony_runtime.text.codec import special_tokens
from balcony_runtime.token_sequence import TokenSequence

#: Rows of logits per block: 25 MB an exit for a vocabulary of 49,152.
CHUNK = 128
#: Padded tokens of one PyTorch pass: enough for 2 cores or a GPU, with bounded hidden states.
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class ScoringRequest:
    """Input tokens, and the number of rows at their end whose logits are needed: row r predicts token r + 1."""

    tokens: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Block:
    """Logits of some rows of one request; ``start`` counts from the first requested row."""

    request: int
    start: int
    logits: dict[int, torch.Tensor]  # exit layer → (n, V), float32


def not_finite(name: str, exit_layer: int) -> VerificationError:
    """The error for NaN or infinite logits of a scorer's exit."""
    return VerificationError(
        f"{name}: exit {exit_layer} gives logits that are not finite: if they come from fp16, export with fp32, otherwise "
        "train its balcony again"
    )


class Scorer(Protocol):
    """All exits of one model, the full depth last."""

    name: str
    exit_layers: tuple[int, ...]
    context_length: int
    tokenizer: PreTrainedTokenizerBase
    #: Number of logits, which may be more than the tokenizer's tokens.
    vocab_size: int
    #: Tokens that end a text; instruction models have several.
    eos_ids: frozenset[int]
    #: Exit layer → parameters of what runs, all experts included, without LM head and token table (the paper's Table 1).
    parameters: dict[int, int]
    #: Exit layer → layers that one token reads: those of the backbone and of the balcony.
    layers: dict[int, int]

    def plan(self, requests: Sequence[ScoringRequest]) -> list[int]:
        """Indices of the requests in the order that is cheapest to run."""
        ...

    def logits(self, requests: Sequence[ScoringRequest]) -> Iterator[Block]:
        """Blocks in the order of the requests and, within each, of its rows."""
        ...

    def greedy(self, exit_layer: int, prompt: Sequence[int], limit: int) -> Iterator[int]:
        """The most probable tokens after a prompt, one by one, at most ``limit``, all at one exit."""
        ...


class BundleScorer:
    """A bundle in the engine that runs on the device. Consecutive requests share their common prefix by rollback.

    Args:
        bundle: The bundle.
        exits: Exit layers to score, with or without the full depth; by default all.
        threads: Size of ONNX Runtime's thread pool.
        device, engines: As for :meth:`.Engine.of`. The manifest keeps what the bundle's own graphs on the CPU give.
    """

    def __init__(
        self,
        bundle: Bundle,
        exits: Sequence[int] | None = None,
        threads: int | None = None,
        device: DeviceName = "cpu",
        engines: str | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.exit_layers = manifest.exit_layers if exits is None else tuple(sorted(exits))
        for exit_layer in self.exit_layers:
            if exit_layer not in manifest.exit_layers:
                there = ", ".join(map(str, manifest.exit_layers))
                raise InputError(
                    f"{bundle.path}: has no exit {exit_layer}: it has {there}: pick one of them or export again with --exits"
                )
        self.name = f"{manifest.model.name} (bundle)"
        self.vocab_size = manifest.model.vocab_size
        self.eos_ids = frozenset(manifest.model.eos_token_ids)
        self.tokenizer = bundle_tokenizer(bundle)
        head = manifest.runnable["lm_head"].parameters
        self.parameters = {
            e: sum(manifest.runnable[name].parameters for name in manifest.path_graphs(e)) - head
            for e in self.exit_layers
        }
        own = {exit_.exit_layer: exit_.kind == "balcony" and exit_.module != "none" for exit_ in manifest.exits}
        self.layers = {e: e + own[e] for e in self.exit_layers}
        self._engine = Engine.of(bundle, device=device, engines=engines, threads=threads)
        self.context_length = self._engine.max_length  # of a GPU's engines it may be less than the bundle's
        self._sequence: TokenSequence | None = None
        self._longest = 0

    def plan(self, requests: Sequence[ScoringRequest]) -> list[int]:
        """Lexicographic order: requests with a common prefix follow one another."""
        return sorted(range(len(requests)), key=lambda index: requests[index].tokens)

    def logits(self, requests: Sequence[ScoringRequest]) -> Iterator[Block]:
        """See :class:`Scorer`. A context that several requests share is run once."""
        room = max((len(request.tokens) for request in requests), default=0)
        for index, request in enumerate(requests):
            tokens, first = request.tokens, len(request.tokens) - request.rows
            sequence = self._resume(tokens, min(len(tokens), first + CHUNK), room)
            for start in range(0, request.rows, CHUNK):
                stop = min(start + CHUNK, request.rows)
                new = tokens[sequence.length : first + stop]
                found = {}
                for exit_layer in self.exit_layers:
                    rows = sequence.advance(exit_layer, new, num_logits=stop - start)
                    found[exit_layer] = torch.from_numpy(rows[0])  # (n, V)
                    new = ()
                yield Block(index, start, found)

    def greedy(self, exit_layer: int, prompt: Sequence[int], limit: int) -> Iterator[int]:
        """See :class:`Scorer`."""
        sequence = self._engine.new_sequence(max_length=len(prompt) + limit)
        new: Sequence[int] = prompt
        for _ in range(limit):
            token = int(sequence.advance(exit_layer, new)[0, -1].argmax())
            yield token
            new = (token,)

    def close(self) -> None:
        """Free the engine."""
        self._sequence = None
        self._engine.close()

    def _resume(self, tokens: tuple[int, ...], first_stop: int, room: int) -> TokenSequence:
        """The sequence, rolled back to its common prefix with ``tokens``, or a new one if the prefix is short."""
        sequence = self._sequence
        if sequence is not None:
            shared = sequence.shared_prefix(np.array(tokens, np.int64))
            # attention pays for the capacity of the longest request so far, which would slow down short ones
            worn = self._longest > 2 * len(tokens) + CHUNK and shared < len(tokens) // 2
            if len(tokens) <= sequence.max_length and not worn:
                # advance gives the logits of the last rows, so the sequence may not be longer than the first block
                sequence.rollback(min(shared, first_stop))
                self._longest = max(self._longest, len(tokens))
                return sequence
        self._sequence = sequence = self._engine.new_sequence(max_length=max(room, len(tokens)))
        self._longest = len(tokens)
        return sequence


class TorchScorer:
    """A model with its balconies in PyTorch: transformers' own modules, batches padded on the right.

    Scores need no cache; greedy continuations have caches.

    Args:
        exits: The model, in eval mode, and its balconies, on one device.
        tokenizer: The model's tokenizer.
        name: Name in reports.
        full: Whether to score the full depth as well as the balconies.
    """

    def __init__(
        self, exits: ExitModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "model", full: bool = True
    ) -> None:
        self._exits = exits
        self.exit_layers = exits.exit_layers if full else tuple(exits.balconies)
        self.name = name
        self.tokenizer = tokenizer
        self.context_length = longest_context(exits.model.config)
        self.vocab_size = exits.parts.embed.num_embeddings
        self.eos_ids = frozenset(eos_ids(exits.model))
        self.parameters = {e: exits.parameters_read(e) for e in self.exit_layers}
        self.layers = {e: e + (e < exits.depth and exits.balconies[e].kind != "none") for e in self.exit_layers}
        self._device = exits.parts.embed.weight.device
        self._batch_tokens = BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cpu"])

    def plan(self, requests: Sequence[ScoringRequest]) -> list[int]:
        """Order by length: little padding, and a request that does not fit into memory fails first."""
        return sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))

    @torch.no_grad()
    def logits(self, requests: Sequence[ScoringRequest]) -> Iterator[Block]:
        """See :class:`Scorer`."""
        for indices in self._batches(requests):
            longest = max(len(requests[index].tokens) for index in indices)
            tokens = torch.zeros(len(indices), longest, dtype=torch.long)
            for row, index in enumerate(indices):
                tokens[row, : len(requests[index].tokens)] = torch.tensor(requests[index].tokens)
            # causal attention: no row sees the padding after it, so no mask is needed
            states = self._exits.run(tokens.to(self._device), self.exit_layers)
            normed = {e: self._exits.normed(e, states) for e in self.exit_layers}
            for row, index in enumerate(indices):
                length, rows = len(requests[index].tokens), requests[index].rows
                for start in range(0, rows, CHUNK):
                    begin = length - rows + start
                    end = min(begin + CHUNK, length)
                    yield Block(
                        index, start, {e: self._exits.head(n[row, begin:end]).float() for e, n in normed.items()}
                    )

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""

    @torch.no_grad()
    def greedy(self, exit_layer: int, prompt: Sequence[int], limit: int) -> Iterator[int]:
        """See :class:`Scorer`; backbone and balcony have a KV cache each."""
        caches = self._exits.new_cache(), self._exits.new_cache()
        new = torch.tensor([list(prompt)], device=self._device)
        for _ in range(limit):
            normed = self._exits.normed(exit_layer, self._exits.run(new, (exit_layer,), caches[0]), caches[1])
            token = int(self._exits.head(normed[0, -1:]).argmax())
            yield token
            new = torch.tensor([[token]], device=self._device)

    def _batches(self, requests: Sequence[ScoringRequest]) -> Iterator[list[int]]:
        batch: list[int] = []
        longest = 0
        for index, request in enumerate(requests):
            longest = max(longest, len(request.tokens))
            if batch and longest * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch, longest = [], len(request.tokens)
            batch.append(index)
        if batch:
            yield batch


def bundle_tokenizer(bundle: Bundle) -> PreTrainedTokenizerBase:
    """The bundle's tokenizer as one of transformers, with its special tokens and chat template."""
    path = bundle.file("tokenizer.json")
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises a plain Exception for any damage
        raise BundleError(f"{path}: cannot be read as a tokenizer ({error}): export the bundle again") from error
    # it names all that there are; bundles without a chat template did not have it before
    named = "special_tokens.json" in bundle.manifest.files
    special: dict[str, Any] = special_tokens(bundle) if named else {}
    model = bundle.manifest.model
    if model.eos_token_ids:
        special.setdefault("eos_token", backend.id_to_token(model.eos_token_ids[0]))
    if model.bos_token_id is not None and not named:
        special.setdefault("bos_token", backend.id_to_token(model.bos_token_id))
    template = None
    if "chat_template.jinja" in bundle.manifest.files:
        template = bundle.file("chat_template.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
