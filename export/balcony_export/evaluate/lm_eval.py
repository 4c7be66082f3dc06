"""The model adapter ``balcony`` of lm-evaluation-harness: every exit of a model or a bundle as a model of its own.

    lm_eval.simple_evaluate(model="balcony", model_args={"bundle": "bundle/", "exit_layer": 17}, tasks=[...])
    lm_eval.simple_evaluate(model="balcony", model_args={"model": "demo", "balconies": "balconies/", "exit_layer": 17}, ...)

Importing this module registers the adapter. The harness evaluates one model at a time, here one exit. Exits share their
hidden states, so the adapters of one :class:`Sweep` share a cache: the first computes the answers of all exits from one
backbone pass, and the others look them up. Tokenization, truncation and windows are those of the harness's own ``hf``
adapter, so that scores can be compared digit by digit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jinja2 import TemplateError

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError, MissingDependencyError
from balcony_export.evaluate.scorer import BundleScorer, Scorer, ScoringRequest, TorchScorer, not_finite
from balcony_export.model.exits import ExitModel
from balcony_export.model.gpu import move_to_gpu

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingDependencyError("tasks need lm-evaluation-harness: pip install 'balcony-edge[eval]'") from error

#: Largest number of tokens of ``generate_until`` unless a task sets one; the harness's own default.
MAX_NEW_TOKENS = 256
Answer = tuple[float, bool]  # log-likelihood of a continuation, and whether greedy decoding would give it
Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation


class Sweep:
    """Log-likelihoods of continuations at all exits of a scorer, each computed once.

    Args:
        scorer: Source of the exits' logits.
        progress: Called with the number of answered requests and of all requests.
    """

    def __init__(self, scorer: Scorer, progress: Callable[[int, int], None] | None = None) -> None:
        self.scorer = scorer
        self.progress = progress
        self._known: dict[bytes, dict[int, Answer]] = {}

    def answers(self, pairs: Sequence[Pair], exit_layer: int) -> list[Answer]:
        """One answer per (context, continuation), both of at least one token."""
        keys = [_key(pair) for pair in pairs]
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._known}
        if missing:
            self._compute(missing)
        return [self._known[key][exit_layer] for key in keys]

    @torch.no_grad()
    def _compute(self, pairs: dict[bytes, Pair]) -> None:
        # continuations that differ only in their last token have the same input, so they share a pass
        groups: dict[tuple[int, ...], list[tuple[bytes, list[int]]]] = {}
        for key, (context, continuation) in pairs.items():
            if len(continuation) > self.scorer.context_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens: {self.scorer.name} takes "
                    f"{self.scorer.context_length}: leave this task out"
                )
            # longer than the context: cut at the left, as the harness's hf adapter does
            inputs = (context + continuation)[-(self.scorer.context_length + 1) :][:-1]
            groups.setdefault(tuple(inputs), []).append((key, continuation))
        requests = [ScoringRequest(tokens, max(len(c) for _, c in members)) for tokens, members in groups.items()]
        order = self.scorer.plan(requests)
        members = list(groups.values())
        sums: dict[bytes, dict[int, list[Any]]] = {}
        for block in self.scorer.logits([requests[index] for index in order]):
            index = order[block.request]
            for exit_layer, logits in block.logits.items():
                self._add(sums, exit_layer, logits, block.start, requests[index].rows, members[index])
            if self.progress is not None:
                self.progress(block.request + 1, len(requests))
        for exit_layer, (total, _) in (item for found in sums.values() for item in found.items()):
            if not math.isfinite(total):
                raise not_finite(self.scorer.name, exit_layer)
        for key, found in sums.items():
            self._known[key] = {e: (float(total), bool(greedy)) for e, (total, greedy) in found.items()}

    @staticmethod
    def _add(
        sums: dict[bytes, dict[int, list[Any]]],
        exit_layer: int,
        logits: torch.Tensor,  # (n, V)
        start: int,
        rows: int,
        members: list[tuple[bytes, list[int]]],
    ) -> None:
        """Add one block's part of the log-likelihoods; a continuation of L tokens is predicted by the last L rows."""
        normalizers, best = torch.logsumexp(logits, dim=-1), logits.argmax(-1)
        for key, continuation in members:
            offset = rows - len(continuation)  # row that predicts its first token
            begin, end = max(start, offset), start + len(logits)
            entry = sums.setdefault(key, {}).setdefault(exit_layer, [0.0, True])
            if begin >= end:
                continue
            targets = torch.tensor(continuation[begin - offset : end - offset], device=logits.device)
            here = slice(begin - start, end - start)
            picked = logits[here].gather(1, targets[:, None])[:, 0] - normalizers[here]
            entry[0] += float(picked.sum(dtype=torch.float64))
            entry[1] = entry[1] and bool((best[here] == targets).all())


@register_model("balcony")
class BalconyLM(TemplateLM):  # type: ignore[misc] # the harness has no strict types
    """One exit for lm-evaluation-harness.

    Args:
        model: Hugging Face directory, GGUF file, hub name or ``demo``; or
        bundle: Directory that ``balcony-edge export`` wrote.
        balconies: Directory of the model's trained balconies.
        exit_layer: Exit that answers; by default the full depth.
        sweep: Scorer and cache shared with the adapters of other exits, instead of model and bundle.
        threads: Threads of ONNX Runtime, for a bundle.
        device: Device of the model; by default ``cuda`` if there is one.
        max_length: Largest number of tokens of a pass; by default the context length.
    """

    def __init__(
        self,
        model: str | None = None,
        bundle: str | None = None,
        balconies: str | None = None,
        exit_layer: int | str | None = None,
        sweep: Sweep | None = None,
        threads: int | str | None = None,
        device: str | None = None,
        max_length: int | str | None = None,
        batch_size: int | str | None = None,  # the harness gives both to every model; here passes are sized by tokens
        max_batch_size: int | str | None = None,
    ) -> None:
        super().__init__()
        wanted = None if exit_layer is None else int(exit_layer)
        if sweep is None:
            sweep = Sweep(_open(model, bundle, balconies, wanted, threads, device))
        self.sweep, self.scorer = sweep, sweep.scorer
        self.exit_layer = self.scorer.exit_layers[-1] if wanted is None else wanted
        if self.exit_layer not in self.scorer.exit_layers:
            there = ", ".join(map(str, self.scorer.exit_layers))
            raise InputError(f"exit_layer = {self.exit_layer}: {self.scorer.name} has {there}: pick one of them")
        if max_length is not None:
            self.scorer.context_length = min(int(max_length), self.scorer.context_length)
        self.tokenizer: Any = self.scorer.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return cast("int", self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a pass."""
        return self.scorer.context_length

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's request cache."""
        return self.scorer.name.replace("/", "__").replace(" ", "_")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it, without a system message that it refuses (Gemma 2's)."""
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return cast("str", self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            return cast("str", self.tokenizer.apply_chat_template(others, tokenize=False, **options))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, with the tokenizer's special tokens unless the text already begins with one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return cast("list[int]", self.tokenizer.encode(string, verbose=False, **options))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        """See the harness's ``LM``; without its progress bar, because a sweep reports progress itself."""
        return cast("list[Answer]", super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Answer]:
        answers = self.sweep.answers(
            [(context, continuation) for _, context, continuation in requests], self.exit_layer
        )
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in windows that predict each token once, with as much context as fits."""
        windows: list[tuple[int, Pair]] = []
        for index, request in enumerate(requests):
            rolling: Iterator[Any] = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(index, (list(pair[0]), list(pair[1]))) for pair in map(make_disjoint_window, rolling)]
        totals = [0.0] * len(requests)
        for (index, _), answer in zip(
            windows, self.sweep.answers([pair for _, pair in windows], self.exit_layer), strict=True
        ):
            totals[index] += answer[0]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to a stop string, the end of the sequence or ``max_gen_toks``."""
        texts = []
        for number, request in enumerate(requests, 1):
            context, options = request.args
            texts.append(self._generate(context, dict(options)))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
            if self.sweep.progress is not None:
                self.sweep.progress(number, len(requests))
        return texts

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        asked = normalize_gen_kwargs(options, min(MAX_NEW_TOKENS, self.max_length // 2))
        samples = options.get("do_sample") and options.get("temperature") != 0
        if samples or (asked["do_sample"] and asked["temperature"]):
            raise InputError("this task samples (do_sample), but the adapter decodes greedily: set do_sample to false")
        stops, limit = [stop for stop in asked["until"] or [] if stop], int(asked["max_gen_toks"])
        if limit >= self.max_length:
            raise InputError(
                f"this task asks for {limit} new tokens, and the context holds {self.max_length}: export with a longer "
                "--context-length, or set max_gen_toks"
            )
        ends = {self.eot_token_id, *self.scorer.eos_ids}
        prompt = self.tok_encode(context)[-(self.max_length - limit) :] or [self.prefix_token_id]
        tokens: list[int] = []
        text = ""
        for token in self.scorer.greedy(self.exit_layer, prompt, limit):
            if token in ends:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def get_model_info(self) -> dict[str, Any]:
        """Entries that the harness writes next to its results."""
        return {"model_name": self.scorer.name, "exit_layer": self.exit_layer}


def _open(
    model: str | None,
    bundle: str | None,
    balconies: str | None,
    exit_layer: int | None,
    threads: int | str | None,
    device: str | None,
) -> Scorer:
    """The scorer that the harness's model arguments describe, with one exit."""
    from balcony_export.model.checkpoint import load_model, load_tokenizer  # noqa: PLC0415 - only where a model is opened

    if (model is None) == (bundle is None):
        raise InputError("model_args: give either model=... (with balconies=...) or bundle=...")
    if bundle is not None:
        opened = Bundle.open(Path(bundle))
        layer = opened.manifest.exit_layers[-1] if exit_layer is None else exit_layer
        return BundleScorer(opened, (layer,), None if threads is None else int(threads))
    assert model is not None
    loaded: Any = load_model(model, attn_implementation=None)
    if device is None:
        move_to_gpu(loaded)
    else:
        loaded.to(device)
    if exit_layer is None or exit_layer == int(loaded.config.num_hidden_layers):
        return TorchScorer(ExitModel(loaded), load_tokenizer(model), name=model)
    if balconies is None:
        raise InputError(f"model_args: exit_layer = {exit_layer} needs balconies=...: name their directory")
    exits = ExitModel.open(loaded, (exit_layer,), Path(balconies))
    return TorchScorer(exits, load_tokenizer(model), name=model, full=False)


def _key(pair: Pair) -> bytes:
    context, continuation = pair
    digest = hashlib.blake2b(np.asarray(context, np.int64).tobytes(), digest_size=16)
    digest.update(b"|" + np.asarray(continuation, np.int64).tobytes())
    return digest.digest()
