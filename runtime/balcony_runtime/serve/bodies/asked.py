"""Bodies of requests: from OpenAI's fields, and those that vLLM and llama.cpp add, to what the runtime is asked for.

Owns the rules between fields. Their names and ranges are in ``fields``. Values that the runtime checks by itself (temperature,
top_p, …) are not checked twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.serve.bodies.fields import CHAT, COMPLETION, FOREIGN, MOST_CHOICES, Fields, is_tokens
from balcony_runtime.serve.bodies.refusal import bad
from balcony_runtime.serve.bodies.structured import structure_of

#: Tokens of a completion without ``max_tokens``, as OpenAI and vLLM have it.
COMPLETION_TOKENS = 16
#: Most stop strings, and their greatest length: each token of a reply is compared with all of them.
MOST_STOPS, LONGEST_STOP = 64, 256
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request asks for.

    Attributes:
        chat: whether the prompt is a conversation.
        model: name of the model; None for the default.
        prompts: conversations, texts or lists of token ids.
        n: number of replies to each prompt.
        max_tokens: most tokens of each reply; None for as many as the context holds.
        stop: strings that end a reply.
        logprobs: number of likeliest tokens to report at each place; None without log-probabilities.
        echo: whether a completion begins with its prompt.
        ignore_eos: whether to go on after the end-of-sequence token.
        as_ids: whether reported tokens are named ``token_id:17`` instead of by their text.
        sampling: keywords of :class:`SamplingParams`, without the seed.
        document: whether the replies follow a schema, a pattern or a grammar.
        seed: seed of the first reply to a prompt; the others count up from it.
        budget: object ``budget``, unchecked.
        stream: whether the answer is sent token by token.
        usage: whether the stream ends with the usage.
        each_token: whether every piece of the stream carries the cost of its tokens.
        tooling: options ``tools``, ``tool_choice`` and ``parallel_tool_calls`` of a reply; empty without tools.
        template: options ``documents`` and ``chat_template_kwargs`` of a prompt.
        parse_special: whether names of control tokens in the prompt are those tokens; None for the default.
        add_special_tokens: whether a text gets the tokens that the tokenizer puts around texts.
        response: what an answer in the shape of OpenAI's responses repeats of its request; None for the other shapes.
    """

    chat: bool
    model: str | None
    prompts: Sequence[Any]
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    echo: bool
    ignore_eos: bool
    as_ids: bool
    sampling: Mapping[str, Any]
    document: bool
    seed: int | None
    budget: Any
    stream: bool
    usage: bool
    each_token: bool
    tooling: Mapping[str, Any]
    template: Mapping[str, Any]
    parse_special: bool | None
    add_special_tokens: bool
    response: Mapping[str, Any] | None = None

    @property
    def structured(self) -> bool:
        """Whether the replies have a structure, or may call tools."""
        return bool(self.tooling) or self.document

    def params(self, choice: int) -> SamplingParams:
        """Sampling parameters of one reply to a prompt.

        Raises:
            InputError: a value is out of range.
        """
        return SamplingParams(**self.sampling, seed=None if self.seed is None else self.seed + choice)


def read_asked(body: bytes, *, chat: bool) -> Asked:
    """Read the body of a chat completion, or of a completion.

    Raises:
        RefusedError: the body cannot be used.
    """
    return asked_by(Fields(body, CHAT if chat else COMPLETION), chat=chat)


def asked_by(fields: Fields, *, chat: bool) -> Asked:
    """What the fields of a chat completion, or of a completion, ask for.

    Raises:
        RefusedError: they cannot be used.
    """
    refuse_unsupported(fields)
    prompts = [messages_of(fields.get("messages"))] if chat else _prompts(fields.get("prompt"))
    n = fields.whole("n") or 1
    if len(prompts) * n > MOST_CHOICES:
        raise bad("n", n, f"{len(prompts)} prompts make {len(prompts) * n} replies; at most {MOST_CHOICES}: send less")
    best_of = fields.whole("best_of")
    if best_of not in {None, n}:
        raise bad("best_of", best_of, "is not supported; leave it out, and ask for n replies")
    echo, structure = not chat and fields.truth("echo"), structure_of(fields)
    max_tokens = _max_tokens(fields, chat, echo)
    _refuse_least(fields, max_tokens)
    stream = fields.truth("stream")
    return Asked(
        chat=chat,
        model=fields.text("model"),
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        stop=_stop(fields.get("stop")),
        logprobs=_chat_logprobs(fields) if chat else fields.whole("logprobs"),
        echo=echo,
        ignore_eos=fields.truth("ignore_eos"),
        as_ids=fields.truth("return_tokens_as_token_ids"),
        sampling=_sampling(fields) | structure,
        document=bool(structure),
        seed=_seed(fields.whole("seed")),
        budget=fields.get("budget"),
        stream=stream,
        usage=stream and _usage(fields),
        each_token=fields.truth("timings_per_token"),
        tooling=_tooling(fields) if chat else {},
        template=template_of(fields) if chat else {},
        parse_special=fields.truth_or_none("parse_special"),
        add_special_tokens=chat or fields.truth_or_none("add_special_tokens") is not False,
    )


def _tooling(fields: Fields) -> dict[str, Any]:
    """The tools of a request, which the runtime checks; nothing if it has none."""
    found = _given(fields, ("tools", "tool_choice"))
    if (parallel := fields.truth_or_none("parallel_tool_calls")) is not None:
        found["parallel_tool_calls"] = parallel
    return found if found.get("tools") or found.get("tool_choice") not in (None, "none", "auto") else {}


def template_of(fields: Fields) -> dict[str, Any]:
    """What a request gives to the chat template next to messages and tools."""
    found = _given(fields, ("documents", "chat_template_kwargs"))
    effort, variables = fields.text("reasoning_effort"), found.get("chat_template_kwargs", {})
    if effort is not None and isinstance(variables, Mapping):  # as in vLLM; a variable that was given goes before it
        thinks = {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
        found["chat_template_kwargs"] = {**thinks, **variables}
    return found


def _seed(given: int | None) -> int | None:
    """llama.cpp's -1 is no seed; other negative numbers, which OpenAI allows, are seeds of their own."""
    return None if given is None or given == -1 else given % 2**63


def _given(fields: Fields, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := fields.get(name)) is not None}


def refuse_unsupported(fields: Fields, names: Iterable[str] = FOREIGN) -> None:
    """Refuse fields of ``FOREIGN``, unless their values ask for nothing.

    Raises:
        RefusedError: one asks for something.
    """
    for name in names:
        value = fields.get(name)
        if value is not None and value not in FOREIGN[name]:
            raise bad(name, value, "is not supported here; leave it out")


def messages_of(value: Any) -> list[Any]:
    """A conversation; :class:`.TextCodec` checks the contents.

    Raises:
        RefusedError: it is not a list of objects with a role, or one has a call in OpenAI's old form.
    """
    if not isinstance(value, list) or not value:
        raise bad("messages", value, "must be a list of messages, e.g. [{'role': 'user', 'content': 'Hello'}]")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad("messages", message, "each must be an object with a text 'role' and a 'content'")
        if message.get("function_call") is not None:  # templates know tool_calls only: the call would be lost
            raise bad("messages", message, "function_call is not supported here; give the call as tool_calls")
    return value


def _prompts(value: Any) -> list[Any]:
    if isinstance(value, str) or (value and is_tokens(value)):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) or is_tokens(one) for one in value):
        raise bad("prompt", value, "must be a text, a list of texts, a list of token ids, or a list of such lists")
    if not all(value):
        raise bad("prompt", value, "one of the prompts is empty; leave it out")
    return value


def _max_tokens(fields: Fields, chat: bool, echo: bool) -> int | None:
    for name in ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",):
        value = fields.whole(name)
        if value is not None:
            if value == 0 and not echo:
                raise bad(name, value, "must be a whole number above 0; 0 needs echo in a completion")
            return None if value < 0 else value  # llama.cpp's and Ollama's ways to ask for no bound
    # Of llama.cpp's n_predict only -1 comes so far, and it is no bound there.
    return None if chat or fields.get("n_predict") is not None else COMPLETION_TOKENS


def _refuse_least(fields: Fields, max_tokens: int | None) -> None:
    """Refuse ``min_tokens`` where a reply could end before it. Load generators send it with ``ignore_eos``."""
    least = fields.whole("min_tokens")
    if least and (not fields.truth("ignore_eos") or fields.get("stop")):
        raise bad("min_tokens", least, "needs ignore_eos = true and no stop; add ignore_eos, or leave min_tokens out")
    if least and max_tokens is not None and least > max_tokens:
        raise bad("min_tokens", least, f"must be at most max_tokens = {max_tokens}; give a larger max_tokens")


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad("stop", value, "must be a text or a list of texts that are not empty")
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise bad("stop", value, f"at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters are looked for")
    return tuple(stops)


def _chat_logprobs(fields: Fields) -> int | None:
    top = fields.whole("top_logprobs")
    if not fields.truth("logprobs"):
        if top:
            raise bad("top_logprobs", top, "needs logprobs = true; add it")
        return None
    return top or 0


def _sampling(fields: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {"temperature": 1.0}  # OpenAI's default; the Python API's is greedy
    if (repeat := fields.number("repeat_penalty")) is not None:
        found["repetition_penalty"] = repeat
    found |= {name: value for name in _NUMBERS if (value := fields.number(name)) is not None}
    if found.get("top_p") == 0:
        found["top_p"] = 1e-9  # OpenAI's 0 keeps the likeliest token only
    top_k = fields.whole("top_k")
    if top_k is not None:
        found["top_k"] = max(top_k, 0)  # vLLM's -1 keeps all
    bias = fields.get("logit_bias")
    if bias is not None:
        allowed = "must map token ids to numbers; e.g. {'17': -100} bans token 17"
        if not isinstance(bias, dict):
            raise bad("logit_bias", bias, allowed)
        try:
            found["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError:
            raise bad("logit_bias", bias, allowed) from None
    return found


def _usage(fields: Fields) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not isinstance(options.get("include_usage") or False, bool):
        raise bad("stream_options", options, "must be an object; e.g. {'include_usage': true}")
    return bool(options.get("include_usage"))
