"""Fixtures of the tests of distillation and evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_export.data.corpus import Corpus, build_corpus
from balcony_export.evaluate.scorer import BundleScorer, TorchScorer
from balcony_export.model.balcony import init_balconies
from balcony_export.model.exits import ExitModel
from tests.conftest import Exported, exported, tiny_model
from tests.export.graph.experts import MIXTURES, mixture_exits
from tests.export.train.distilling import SEQ_LEN
from tests.support.hybrids import HYBRIDS, TWO_LAYERS


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


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a tiny mixture in float32, once."""
    return functools.cache(lambda name: exported(mixture_exits(name), name, tmp_path_factory.mktemp("mixtures") / name))


@pytest.fixture(scope="session")
def family(
    mixture: Callable[[str], Exported],
    export_tiny: Callable[[str], Exported],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Exported]:
    """Exports a tiny model of a family, once: as other tests do where they export it, else with two layers and a norm."""

    @functools.cache
    def export(name: str) -> Exported:
        if name in MIXTURES:
            return mixture(name)
        if name in (*HYBRIDS, "lfm2"):
            return export_tiny(name)
        model = tiny_model(name, num_hidden_layers=2, **TWO_LAYERS[name])
        exits = ExitModel(model, init_balconies(model, (1,), "none"))
        return exported(exits, name, tmp_path_factory.mktemp("families") / name)

    return export
