"""What load generators and benchmarks send, as their sources have it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from balcony_runtime.serve.work import answers
from tests.serve.client import CHAT, HELLO

FIXED = {"max_tokens": 6, "min_tokens": 6, "ignore_eos": True}


def test_a_fixed_number_of_tokens(http: httpx.Client) -> None:
    """``llama-benchy --exact-tg`` and NVIDIA's ``--extra-inputs min_tokens:6 ignore_eos:true``."""
    assert http.post(CHAT, json=HELLO | FIXED).json()["usage"]["completion_tokens"] == 6
    found = http.post("/v1/completions", json={"prompt": "the quick", **FIXED}).json()
    assert found["usage"]["completion_tokens"] == 6
    assert http.post(
        "/v1/responses", json={"input": "hi", "max_output_tokens": 6} | FIXED | {"max_tokens": None}
    ).is_success


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"ignore_eos": False}, "needs ignore_eos = true"),
        ({"ignore_eos": True, "stop": ["a"]}, "and no stop"),
        ({"ignore_eos": True, "max_tokens": 5}, "must be at most max_tokens = 5"),
    ],
)
def test_a_least_number_that_the_reply_may_miss(http: httpx.Client, extra: dict[str, Any], message: str) -> None:
    found = http.post(CHAT, json=HELLO | {"max_tokens": 9, "min_tokens": 6} | extra)
    assert found.status_code == 400 and message in found.json()["error"]["message"]


def test_comments_come_only_where_a_proxy_would_give_up() -> None:
    """SGLang's benchmark, llmperf and vLLM's for conversations read every line as JSON."""
    assert 45 <= answers.OPENING_S + answers.KEEPALIVE_S < 60, "nginx waits 60 s"


def test_the_names_of_special_tokens_and_the_template(http: httpx.Client, tiny: Any) -> None:
    """In vLLM's shape."""
    found = http.get("/tokenizer_info").json()
    assert found["eos_token"] == tiny.tokenizer.eos_token and found["bos_token"] == tiny.tokenizer.bos_token
    assert found["chat_template"] == tiny.tokenizer.chat_template
