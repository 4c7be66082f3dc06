"""Fixtures of the tests of distillation and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_export.data.corpus import Corpus, build_corpus
from balcony_export.evaluate.scorer import BundleScorer, TorchScorer
from tests.export.distilling import SEQ_LEN


@pytest.fixture(scope="module")
def corpus(text_file: Path, make_tokenizer: Callable[[], Any]) -> Corpus:
    return build_corpus([text_file], make_tokenizer(), seq_len=SEQ_LEN, held_out_rows=4)


@pytest.fixture(scope="module")
def bundle_scorer(tiny: Any) -> Iterator[BundleScorer]:
    scorer = BundleScorer(Bundle.open(tiny.path))
    yield scorer
    scorer.close()


@pytest.fixture(scope="module")
def torch_scorer(tiny: Any) -> TorchScorer:
    return TorchScorer(tiny.exits, tiny.tokenizer, name="tiny")
