"""Where logits come from: all exits of a model or of a bundle, for the rows that somebody asks about.

Owns the two sources behind one protocol. A hidden state is shared by all deeper exits, so each sweep runs the backbone
once and every exit from it; logits leave in blocks of ``CHUNK`` rows, so that nothing of size (rows × vocabulary) is
ever whole. What is done with them (perplexity, log-likelihoods) is :mod:`.text` and :mod:`.lm_eval`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, InputError
from balcony_export.model.architecture import parts_of
from balcony_export.model.balcony import Balcony
from balcony_runtime.engine import Engine, TokenSequence
from balcony_runtime.text import special_tokens

#: Rows of logits per block: 25 MB an exit for a vocabulary of 49,152.
CHUNK = 128
#: Padded tokens of one PyTorch pass: bounds its hidden states, and fills 2 cores or a GPU.
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class Request:
    """Input tokens, and how many of the last rows' logits are wanted: row r predicts token r + 1."""

    tokens: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Block:
    """Logits of some rows of one request: ``start`` counts from the first row that was asked for."""

    request: int
    start: int
    logits: dict[int, torch.Tensor]  # exit layer → (n, V), float32


class Scorer(Protocol):
    """All exits of one model, the full depth last."""

    name: str
    exit_layers: tuple[int, ...]
    context_length: int
    tokenizer: PreTrainedTokenizerBase
    #: Parameters that one token at an exit reads, LM head and token table not counted (the paper's Table 1).
    parameters: dict[int, int]

    def plan(self, requests: Sequence[Request]) -> list[int]:
        """The order of requests that is cheapest to run."""
        ...

    def logits(self, requests: Sequence[Request]) -> Iterator[Block]:
        """Blocks in the order of the requests and, within each, of its rows."""
        ...

    def greedy(self, exit_layer: int, prompt: Sequence[int], limit: int) -> Iterator[int]:
        """At most ``limit`` most probable tokens after a prompt, one by one, all at one exit."""
        ...


class BundleScorer:
    """A bundle through the engine that runs on the device. Consecutive requests share their common prefix by rollback.

    Args:
        bundle: what to score.
        exits: exit layers to score, the full depth among them or not; by default all.
        threads: of ONNX Runtime's pool.
    """

    def __init__(self, bundle: Bundle, exits: Sequence[int] | None = None, threads: int | None = None) -> None:
        manifest = bundle.manifest
        self.exit_layers = manifest.exit_layers if exits is None else tuple(sorted(exits))
        for exit_layer in self.exit_layers:
            if exit_layer not in manifest.exit_layers:
                there = ", ".join(map(str, manifest.exit_layers))
                raise InputError(
                    f"{bundle.path}: has no exit {exit_layer}: it has {there}: pick one of them or re-export with --exits"
                )
        self.name = f"{manifest.model.name} (bundle)"
        self.bundle = bundle
        self.context_length = manifest.model.context_length
        self.tokenizer = bundle_tokenizer(bundle)
        head = manifest.runnable["lm_head"].parameters
        self.parameters = {
            e: sum(manifest.runnable[name].parameters for name in manifest.path_graphs(e)) - head
            for e in self.exit_layers
        }
        self._engine = Engine.of(bundle, threads=threads)
        self._sequence: TokenSequence | None = None
        self._longest = 0

    def plan(self, requests: Sequence[Request]) -> list[int]:
        """Lexicographic: requests with a common prefix follow one another."""
        return sorted(range(len(requests)), key=lambda index: requests[index].tokens)

    def logits(self, requests: Sequence[Request]) -> Iterator[Block]:
        """See :class:`Scorer`. The context of several continuations is run once."""
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
        """The sequence, rolled back to what it has in common with ``tokens``; a fresh one where that is little."""
        sequence = self._sequence
        if sequence is not None:
            shared = _common_prefix(sequence.tokens[0].tolist(), tokens)
            # attention pays for the capacity that the longest request bound: a short one should not
            worn = self._longest > 2 * len(tokens) + CHUNK and shared < len(tokens) // 2
            if len(tokens) <= sequence.max_length and not worn:
                # the last row before `first_stop` must be asked about, so nothing may stand behind it
                sequence.rollback(min(shared, first_stop))
                self._longest = max(self._longest, len(tokens))
                return sequence
        self._sequence = sequence = self._engine.new_sequence(max_length=max(room, len(tokens)))
        self._longest = len(tokens)
        return sequence


class TorchScorer:
    """A model and its balconies in PyTorch: transformers' own modules, batches padded on the right, no cache.

    Args:
        model: the base model, in eval mode, on its device.
        tokenizer: its tokenizer.
        balconies: exit layer → balcony, on the same device.
        name: what to call it.
        full: score the full depth, too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        balconies: dict[int, Balcony],
        *,
        name: str = "model",
        full: bool = True,
    ) -> None:
        self._model, self._parts = model, parts_of(model)
        self._balconies = dict(sorted(balconies.items()))
        self._depth = len(self._parts.layers)
        self.exit_layers = (*self._balconies, self._depth) if full else tuple(self._balconies)
        self.name = name
        self.tokenizer = tokenizer
        self.context_length = int(model.config.max_position_embeddings)
        below = [sum(p.numel() for p in layer.parameters()) for layer in self._parts.layers]
        exits = {e: sum(p.numel() for p in balcony.parameters()) for e, balcony in self._balconies.items()}
        exits[self._depth] = sum(p.numel() for p in self._parts.norm.parameters())
        self.parameters = {e: sum(below[:e]) + exits[e] for e in self.exit_layers}
        self._device = self._parts.embed.weight.device
        self._batch_tokens = BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cpu"])

    def plan(self, requests: Sequence[Request]) -> list[int]:
        """By length: little padding, and what does not fit into memory fails first."""
        return sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))

    @torch.no_grad()
    def logits(self, requests: Sequence[Request]) -> Iterator[Block]:
        """See :class:`Scorer`."""
        for indices in self._batches(requests):
            longest = max(len(requests[index].tokens) for index in indices)
            tokens = torch.zeros(len(indices), longest, dtype=torch.long)
            for row, index in enumerate(indices):
                tokens[row, : len(requests[index].tokens)] = torch.tensor(requests[index].tokens)
            # causal: what is padded behind a row is never seen by it, so no mask is needed
            normed = self._normed(tokens.to(self._device), self.exit_layers)
            for row, index in enumerate(indices):
                length, rows = len(requests[index].tokens), requests[index].rows
                for start in range(0, rows, CHUNK):
                    begin = length - rows + start
                    end = min(begin + CHUNK, length)
                    yield Block(index, start, {e: self._head(state[row, begin:end]) for e, state in normed.items()})

    def close(self) -> None:
        """Nothing to free: the model is the caller's."""

    @torch.no_grad()
    def greedy(self, exit_layer: int, prompt: Sequence[int], limit: int) -> Iterator[int]:
        """See :class:`Scorer`; backbone and balcony keep a KV cache each."""
        caches = DynamicCache(), DynamicCache()
        new = torch.tensor([list(prompt)], device=self._device)
        for _ in range(limit):
            hidden = self._normed(new, (exit_layer,), caches)[exit_layer]
            token = int(self._head(hidden[0, -1:]).argmax())
            yield token
            new = torch.tensor([[token]], device=self._device)

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
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

    def _normed(
        self, tokens: torch.Tensor, exits: Sequence[int], caches: tuple[Cache, Cache] | None = None
    ) -> dict[int, torch.Tensor]:
        """Exit layer → what the LM head takes; with caches of the backbone and of the one exit  # (B, T) → (B, T, D)"""
        states: dict[int, torch.Tensor] = {}
        keywords: dict[str, Any] = {}

        def capture(exit_layer: int) -> Any:
            def hook(_: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
                states[exit_layer] = output if isinstance(output, torch.Tensor) else output[0]
                keywords.update(options)  # those of the last layer stay: the balconies are its copies

            return hook

        wanted = {*exits, self._depth}
        handles = [
            layer.register_forward_hook(capture(index), with_kwargs=True)
            for index, layer in enumerate(self._parts.layers, 1)
            if index in wanted
        ]
        decoder: Any = self._model.get_decoder() if hasattr(self._model, "get_decoder") else self._model.base_model
        # transformers calls its cache "past_key_values", from 5.20 on "cache"
        name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
        try:
            decoder(input_ids=tokens, use_cache=caches is not None, **({name: caches[0]} if caches else {}))
        finally:
            for handle in handles:
                handle.remove()
        if caches is not None:
            keywords = {key: caches[1] if isinstance(value, Cache) else value for key, value in keywords.items()}
        return {
            e: self._parts.norm(states[e]) if e == self._depth else self._balconies[e](states[e], **keywords)
            for e in exits
        }

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._parts.head(hidden).float()
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def bundle_tokenizer(bundle: Bundle) -> PreTrainedTokenizerBase:
    """The bundle's tokenizer, with its special tokens and chat template, as transformers has it."""
    path = bundle.file("tokenizer.json")
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises a plain Exception for any damage
        raise BundleError(f"{path}: not readable as a tokenizer ({error}): export the bundle again") from error
    special: dict[str, Any] = special_tokens(bundle) if bundle.has_file("special_tokens.json") else {}
    model = bundle.manifest.model
    if model.eos_token_ids:
        special.setdefault("eos_token", backend.id_to_token(model.eos_token_ids[0]))
    if model.bos_token_id is not None:
        special.setdefault("bos_token", backend.id_to_token(model.bos_token_id))
    template = None
    if bundle.has_file("chat_template.jinja"):
        template = bundle.file("chat_template.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
