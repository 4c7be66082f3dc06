"""The server as OpenAI's own client sees it, and what the answers say against what the engine computes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from balcony_runtime.engine import Engine
from balcony_runtime.serve.http.server import Server

QUESTION: list[Any] = [{"role": "user", "content": "the quick brown fox"}]
LONG = "the quick brown fox jumps over the lazy dog and the balcony " * 6


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 8, "temperature": 0} | options
    return client.chat.completions.create(**options)


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    names = [model.id for model in client.models.list()]
    assert names[:5] == ["tiny", "tiny:exit-2", "tiny:exit-3", "tiny:exit-5", "tiny:lossless"]
    assert names[5:] == ["tiny:saver", "tiny:shallow", "tiny:slow", "tiny:strict", "tiny:voice"]
    assert client.models.retrieve("tiny:voice").id == "tiny:voice"
    assert {model["root"] for model in http.get("/v1/models").json()["data"]} == {"tiny"}, "vLLM's bench serve reads it"
    with pytest.raises(openai.NotFoundError, match="did you mean tiny:voice"):
        client.models.retrieve("tiny:voise")


def test_a_chat(client: openai.OpenAI, server: Server) -> None:
    found = chat(client)
    (choice,) = found.choices
    assert (found.object, choice.message.role, choice.finish_reason) == ("chat.completion", "assistant", "length")
    ids = server.service.llm.encode(QUESTION, control_tokens=False)
    assert found.usage.prompt_tokens == len(ids) and found.usage.completion_tokens == 8
    expected = server.service.llm.generate(QUESTION, max_new_tokens=8, control_tokens=False)
    assert choice.message.content == expected.text
    facts = found.balcony
    assert facts["tokens_per_exit"] == {"5": 8} and facts["mean_depth"] == 5 and facts["pending_rows"] == 0
    assert facts["ttft_ms"] > 0 and facts["mean_tpot_ms"] > 0 and facts["late_tokens"] is None
    assert found.timings["predicted_n"] == 8 and found.timings["prompt_n"] == len(ids)


def test_a_chat_in_pieces(client: openai.OpenAI) -> None:
    pieces = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == chat(client).choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-1] == "length"
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == 8
    assert pieces[-2].balcony["tokens_per_exit"] == {"5": 8} and pieces[-2].timings["predicted_n"] == 8


def test_every_piece_can_carry_its_cost(client: openai.OpenAI) -> None:
    extra = {"timings_per_token": True, "budget": {"exit_layer": 2}}
    pieces = list(chat(client, stream=True, extra_body=extra))[1:]
    assert [piece.balcony["exit"] for piece in pieces] == [2] * 8
    assert [piece.timings["predicted_n"] for piece in pieces] == list(range(1, 9))
    assert pieces[-1].balcony["pending_rows"] > 0


def test_several_replies(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 11}
    once, again = (chat(client, **options) for _ in range(2))
    texts = [choice.message.content for choice in once.choices]
    assert [choice.index for choice in once.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    found: dict[int, str] = {0: "", 1: "", 2: ""}
    for piece in chat(client, stream=True, **options):
        for choice in piece.choices:
            found[choice.index] += choice.delta.content or ""
    assert list(found.values()) == texts
    assert once.usage.completion_tokens == 24 and once.balcony["tokens_per_exit"] == {"5": 24}
    assert once.usage.prompt_tokens == chat(client).usage.prompt_tokens, "as OpenAI has it"


def test_stop_bias_and_ignored_ends(client: openai.OpenAI, server: Server) -> None:
    text = chat(client, max_tokens=20, extra_body={"ignore_eos": True}).choices[0].message.content
    cut = chat(client, max_tokens=20, stop=[text[3:5]], extra_body={"ignore_eos": True}).choices[0]
    assert cut.message.content == text[: text.index(text[3:5])] and cut.finish_reason == "stop"
    (token,) = server.service.llm.encode("z", chat=False)
    assert set(chat(client, logit_bias={str(token): 1000}).choices[0].message.content) == {"z"}
    ended = chat(client, logit_bias={"0": 1000}).choices[0]
    assert (ended.message.content, ended.finish_reason) == ("", "stop")


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    found = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(found) == 8 and all(len(entry.top_logprobs) == 3 for entry in found)
    for entry in found:  # greedy
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert "\ufffd" in entry.token or entry.bytes == list(entry.token.encode())


def test_bytes_of_parts_make_a_character(client: openai.OpenAI, server: Server) -> None:
    parts = server.service.llm.encode("ā", chat=False)
    assert len(parts) == 2
    found = chat(client, logprobs=True, max_tokens=2, logit_bias={str(token): 100 for token in parts})
    said = found.choices[0].logprobs.content
    assert [bytes(entry.bytes) for entry in said] == [
        bytes([b"\xc4\x81"[parts.index(token)]]) for token in ids_of(server, said)
    ]


def ids_of(server: Server, entries: Any) -> list[int]:
    tokens = {server.service.llm.codec.raw(token): token for token in range(320)}
    return [tokens[bytes(entry.bytes)] for entry in entries]


def test_offsets_count_the_control_tokens_that_a_prompt_spells_out(client: openai.OpenAI) -> None:
    (choice,) = client.completions.create(
        model="tiny", prompt="the<end>fox", echo=True, logprobs=0, max_tokens=0
    ).choices
    found = choice.logprobs
    assert choice.text == "the<end>fox" and "<end>" in found.tokens
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert choice.text.startswith(token, offset)
    # parts of a character have no length before the last of them
    (choice,) = client.completions.create(
        model="tiny", prompt="a\ufffdb fox", echo=True, logprobs=0, max_tokens=0
    ).choices
    last = len(choice.logprobs.tokens) - 1
    assert choice.text.startswith(choice.logprobs.tokens[last], choice.logprobs.text_offset[last])


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_begins_after_the_text_of_the_prompt(client: openai.OpenAI, server: Server, stream: bool) -> None:
    """The text of the prompt's tokens may be shorter: a replacement character at its end is held back."""
    (token,) = server.service.llm.encode("z", chat=False)
    options: dict[str, Any] = {"logit_bias": {str(token): 1000}, "echo": True, "logprobs": 0, "max_tokens": 2}
    found = client.completions.create(model="tiny", prompt="fox\ufffd", stream=stream, **options)
    choices = [piece.choices[0] for piece in found] if stream else found.choices
    assert "".join(choice.text for choice in choices) == "fox\ufffdzz"
    offsets = [offset for choice in choices if choice.logprobs for offset in choice.logprobs.text_offset]
    assert offsets[-2:] == [4, 5]


def test_lines_of_a_stream_have_no_other_breaks(http: httpx.Client) -> None:
    """httpx splits lines as ``str.splitlines``, and a prompt that is echoed may have any character."""
    text = "a\u2028b\u2029c\x85d"
    body = {"prompt": text, "echo": True, "max_tokens": 1, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == text
    assert all(line.startswith("data: ") for line in lines)


@pytest.mark.parametrize("exit_layer", [2, 5])
def test_an_echo_has_the_engines_own_log_probabilities(
    client: openai.OpenAI, server: Server, tiny: Any, exit_layer: int
) -> None:
    ids = server.service.llm.encode(LONG, chat=False)
    assert len(ids) > 64  # more than one piece
    found = client.completions.create(
        model=f"tiny:exit-{exit_layer}", prompt=[ids, ids[:9]], echo=True, logprobs=1, max_tokens=0
    )
    with Engine.open(tiny.path) as engine:
        logits = engine.new_sequence().advance(exit_layer, ids, len(ids))[0].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = logs[np.arange(len(ids) - 1), ids[1:]]
    for choice, length in zip(found.choices, (len(ids), 9), strict=True):
        assert choice.text == server.service.llm.decode(ids[:length]) and choice.finish_reason == "length"
        first, *others = choice.logprobs.token_logprobs
        assert first is None and np.allclose(others, expected[: length - 1], atol=1e-4)
        best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
        assert np.allclose(best, logs.max(-1)[: length - 1], atol=1e-4)
        assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    assert found.usage.completion_tokens == 0


def test_an_echo_with_tokens_after_it(client: openai.OpenAI, server: Server) -> None:
    """What lm-eval's ``local-completions`` asks for."""
    text = "the lazy dog" * 16
    ids = server.service.llm.encode(text, chat=False)
    options: dict[str, Any] = {"model": "tiny", "prompt": ids, "temperature": 0}
    pool = server.service.llm.pool
    assert pool is not None
    before = pool.reused.rows
    whole = client.completions.create(echo=True, logprobs=1, max_tokens=1, **options)
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
    assert pool.reused.rows - before == whole.usage.prompt_tokens - 1, (
        "the reply goes on with the rows that were scored"
    )
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    found = whole.choices[0]
    assert len(found.logprobs.token_logprobs) == len(ids) + 1
    made = client.completions.create(logprobs=1, max_tokens=1, **options).choices[0]
    assert found.text == text + made.text
    assert found.logprobs.token_logprobs[-1] == pytest.approx(made.logprobs.token_logprobs[0], abs=1e-4)
    pieces = list(client.completions.create(echo=True, logprobs=1, max_tokens=3, stream=True, **options))
    assert "".join(piece.choices[0].text for piece in pieces).startswith(found.text)
    assert sum(len(piece.choices[0].logprobs.token_logprobs) for piece in pieces) == len(ids) + 3
    named = client.completions.create(
        max_tokens=1, logprobs=0, extra_body={"return_tokens_as_token_ids": True}, **options
    )
    assert named.choices[0].logprobs.tokens[0].startswith("token_id:")
    plain = client.completions.create(echo=True, max_tokens=0, **options).choices[0]
    assert (plain.text, plain.logprobs) == (text, None)


def test_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["the quick", "over the lazy"]
    found = client.completions.create(model="tiny", prompt=prompts, n=2, temperature=0, max_tokens=3)
    alone = [client.completions.create(model="tiny", prompt=one, temperature=0, max_tokens=3) for one in prompts]
    texts = [choice.text for choice in found.choices]
    assert texts == [alone[0].choices[0].text] * 2 + [alone[1].choices[0].text] * 2


def test_the_asynchronous_client(server: Server) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model=f"tiny:exit-{(2, 3, 5)[number % 3]}", messages=QUESTION, max_tokens=12, temperature=0, stream=True
        )
        return "".join([piece.choices[0].delta.content or "" async for piece in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(9)))

    texts = asyncio.run(main())
    assert texts[:3] == texts[3:6] == texts[6:] and len(set(texts)) > 1


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tpot = 5: no such key; did you mean tpot_ms") as refused:
        chat(client, extra_body={"budget": {"tpot": 5}})
    assert refused.value.code == "invalid_budget" and refused.value.param == "budget"
    with pytest.raises(openai.NotFoundError, match="there is no such model"):
        chat(client, model="gpt-4")
    with pytest.raises(openai.UnprocessableEntityError, match="infeasible"):
        chat(client, model="tiny:strict")
    with pytest.raises(openai.UnprocessableEntityError, match="infeasible"):
        list(chat(client, model="tiny:strict", stream=True))
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, messages=[{"role": "user", "content": LONG * 4}])
    assert long.value.code == "context_length_exceeded"


def test_tokenize(http: httpx.Client, server: Server) -> None:
    ids = server.service.llm.encode("the fox", chat=False)
    assert http.post("/tokenize", json={"content": "the fox"}).json()["tokens"] == ids
    found = http.post("/tokenize", json={"messages": QUESTION}).json()
    assert found["tokens"] == server.service.llm.encode(QUESTION) and found["count"] == len(found["tokens"])
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"content": "the fox", "prompt": "the fox"}
    assert http.post("/detokenize", json={"tokens": []}).json()["content"] == ""
    assert http.post("/detokenize", json={"tokens": [0]}).json()["content"] == "<end>"
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    found = http.post("/tokenize", json={"content": "the ā", "with_pieces": True}).json()["tokens"]
    assert [one["id"] for one in found] == server.service.llm.encode("the ā", chat=False)
    pieces = [one["piece"] for one in found]
    assert [type(piece) for piece in pieces[-2:]] == [list, list], "each has one byte of a character"
    assert b"".join(bytes(one) if isinstance(one, list) else one.encode() for one in pieces).decode() == "the ā"


@pytest.mark.parametrize(
    ("body", "around"),
    [
        ({"content": "fox"}, False),  # llama.cpp's default
        ({"content": "fox", "add_special": True}, True),
        ({"prompt": "fox"}, True),  # vLLM's
        ({"prompt": "fox", "add_special_tokens": False}, False),
    ],
    ids=str,
)
def test_tokens_around_a_text(http: httpx.Client, server: Server, monkeypatch: Any, body: Any, around: bool) -> None:
    codec = server.service.llm.codec
    plain = codec.encode("fox", chat=False)
    begins = Tokenizer.from_str(codec.to_json())
    begins.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    monkeypatch.setattr(codec, "_tokenizer", begins)
    assert http.post("/tokenize", json=body).json()["tokens"] == ([0] if around else []) + plain
    if "prompt" in body:
        usage = http.post("/v1/completions", json={**body, "max_tokens": 1}).json()["usage"]
        assert usage["prompt_tokens"] == len(plain) + around
