"""lm-eval's ``local-completions`` over HTTP gives the log-likelihoods of the adapter ``balcony``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from balcony_runtime.serve.http.server import Server

pytest.importorskip("lm_eval", reason="tasks need lm-evaluation-harness: pip install 'balcony-edge[eval]'")
pytest.importorskip("tenacity", reason="local-completions needs: pip install 'lm-eval[api]'")

from lm_eval.api.instance import Instance

from balcony_export.evaluate.lm_eval import BalconyLM

PAIRS = [
    ("the quick brown fox", " jumps over the lazy dog"),
    ("the quick brown fox", " and the balcony"),
    ("", "the lazy dog"),
    ("over " * 20, "the fox"),
]


@pytest.mark.parametrize("exit_layer", [2, 5])
def test_local_completions_gives_the_adapters_log_likelihoods(
    server: Server, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_layer: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tiny.tokenizer.save_pretrained(tmp_path)
    remote = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=f"tiny:exit-{exit_layer}",
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
        max_length=256,
        max_retries=1,
    )
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    found = remote.loglikelihood(requests, disable_tqdm=True)
    expected = BalconyLM(bundle=str(tiny.path), exit_layer=exit_layer).loglikelihood(requests)
    for (loglikelihood, greedy), (own, own_greedy) in zip(found, expected, strict=True):
        assert loglikelihood == pytest.approx(own, abs=1e-3) and greedy == own_greedy


def test_local_completions_needs_no_tokenizer_here(server: Server, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the server for the names of special tokens, and scores by text."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    remote = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="tiny", max_length=256, max_retries=1)
    requests = [Instance("loglikelihood", {}, PAIRS[0], 0)]
    ((found, _),) = remote.loglikelihood(requests, disable_tqdm=True)
    ((own, _),) = BalconyLM(bundle=str(tiny.path)).loglikelihood(requests)
    assert found == pytest.approx(own, abs=1e-3)
