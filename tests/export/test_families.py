"""Every family of backbones: random schedules, replays, shared passes, and what the commands do with its models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_runtime.chat import Chat
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from tests.conftest import Exported, tiny_model, tiny_tokenizer
from tests.export.graph.experts import MIXTURES, tiny_mixture
from tests.runtime.backends.test_recurrent import check_replay
from tests.support.command import invoke_here
from tests.support.hybrids import HYBRIDS, TWO_LAYERS
from tests.support.pools import check_companies
from tests.support.schedules import check_schedules

pytestmark = pytest.mark.model

#: Families whose recurrent layers differ from all of `HYBRIDS`, and variants with experts.
OTHERS = ("mamba", "falcon-mamba", "bamba", "qwen3-next")
_WITH_EXPERTS = tuple(pytest.param(name, marks=pytest.mark.deep) for name in ("granite-hybrid-moe", "qwen3-next-moe"))
FAMILIES = (*MIXTURES, "lfm2", *HYBRIDS, *OTHERS, *_WITH_EXPERTS)
#: What takes seconds for each family: one of each kind in `make test`, the others in `make test-deep`.
ONE_OF_A_KIND = ("qwen2-moe", "lfm2", "mamba", "bamba", "qwen3.5")
REST = [pytest.param(name, marks=pytest.mark.deep) for name in (*MIXTURES, *TWO_LAYERS) if name not in ONE_OF_A_KIND]
PROMPTS = ([5, 6, 7, 8], [9, 8, 7, 6, 5, 4], [1, 2, 3])


def few_and_many(names: tuple[str, ...], more: tuple[str, ...] = ()) -> list[Any]:
    """``(family, number of examples)``: a few for each of ``names``, and many for all of them as a deep test."""
    few = [pytest.param(name, 4, id=name) for name in names]
    return few + [pytest.param(name, 100, marks=pytest.mark.deep, id=f"{name}-many") for name in (*names, *more)]


# Of HYBRIDS, tests/runtime/backends/test_recurrent.py plays a few schedules.
@pytest.mark.hypothesis  # its examples are drawn inside
@pytest.mark.parametrize(
    ("name", "count"), few_and_many((*MIXTURES, "lfm2", *OTHERS), (*HYBRIDS, "granite-hybrid-moe", "qwen3-next-moe"))
)
def test_any_schedule_equals_a_pass_from_scratch(family: Callable[[str], Exported], name: str, count: int) -> None:
    """Exits, chunks, rollbacks, cancellations and batches, over the graphs for CPUs."""
    bundle = Bundle.open(family(name).path)
    with Engine.of(bundle.portable()) as reference, Engine.of(bundle) as engine:
        check_schedules(reference, engine, count, prefill=90, length=200, batches=(1, 1, 2))


@pytest.mark.parametrize("name", (*OTHERS, *_WITH_EXPERTS))
def test_a_replay_after_a_rollback_has_the_bits_of_the_first_run(family: Callable[[str], Exported], name: str) -> None:
    with Engine.open(family(name).path) as engine:
        check_replay(engine)


@pytest.mark.hypothesis  # its examples are drawn inside
@pytest.mark.parametrize(("name", "count"), few_and_many((*MIXTURES,)))
def test_any_company_gives_each_sequence_its_own_logits(
    family: Callable[[str], Exported], name: str, count: int
) -> None:
    """Several streams in shared passes, with rollbacks, ends and prompts that begin alike."""
    with Engine.open(family(name).path) as engine:
        check_companies(engine, count // 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_and_sessions(family: Callable[[str], Exported], name: str, tmp_path: Path) -> None:
    """Streams that take turns give what each gives alone, also next to one that is broken off; a saved chat goes on."""
    with balcony_edge.load(family(name).path, budget=Budget()) as llm:

        def stream(prompt: list[int]) -> Any:
            return llm.stream(prompt, max_new_tokens=8, ignore_eos=True)

        alone = [[token.id for token in stream(prompt)] for prompt in PROMPTS]
        left, *others = [stream(prompt) for prompt in (PROMPTS[0], *PROMPTS)]
        next(left)
        together = [[] for _ in PROMPTS]
        for row in range(8):
            for made, tokens in zip(together, others, strict=True):
                made.append(next(tokens).id)
            if row == 2:
                left.close()
        assert together == alone
        chat = llm.chat()
        said = spoken(chat, "the fox")
        chat.save(tmp_path / "chat.session")
        loaded = Chat.load(llm, tmp_path / "chat.session")
        assert said and loaded.sequence.stage_rows == chat.sequence.stage_rows
        assert spoken(loaded, "the dog") == spoken(chat, "the dog")
        restart(llm, chat)


def spoken(chat: Chat, text: str) -> list[int]:
    return [token.id for token in chat.send(text, max_new_tokens=6, ignore_eos=True)]


def restart(llm: LLM, chat: Chat) -> None:
    """A reply that is broken off leaves a sequence whose next reply is that of a fresh one over the same tokens."""
    reply = chat.send("over the balcony", max_new_tokens=6, ignore_eos=True)
    next(reply)
    reply.close()
    ids = chat.sequence.tokens[0].tolist()
    chat.sequence.rollback(len(ids) - 1)
    again = llm.stream(ids, max_new_tokens=6, ignore_eos=True, sequence=chat.sequence)
    fresh = llm.stream(ids, max_new_tokens=6, ignore_eos=True)
    assert [token.id for token in again] == [token.id for token in fresh]


def done(*arguments: Any) -> Any:
    """Result of a command that must succeed; its JSON document, if it prints one."""
    result = invoke_here(*arguments)
    assert result.returncode == 0, result
    return json.loads(result.stdout) if "--json" in arguments else None


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of two layers as a Hugging Face directory, and a text."""
    name, make = request.param, tiny_mixture if request.param in MIXTURES else tiny_model
    extra = {"mlp_only_layers": [0]} if name == "qwen3-moe" else {"layer_types": ["conv", "full_attention"]}
    extra = TWO_LAYERS.get(name, extra if name in ("qwen3-moe", "lfm2-moe") else {})
    make(name, num_hidden_layers=2, **extra).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 30)
    return tmp_path


@pytest.mark.parametrize("checkpoint", [*ONE_OF_A_KIND, *REST], indirect=True)
def test_the_commands_for_models(checkpoint: Path) -> None:
    """``train``, ``eval`` and ``extract``."""
    model, text, balconies = checkpoint / "model", checkpoint / "text.txt", checkpoint / "balconies"
    trained = done(
        *("train", model, "--exits", "1", "--data", text, "-o", balconies, "--steps", "2", "--seq-len", "24"),
        *("--held-out-rows", "2", "--no-compile", "--json"),
    )
    assert trained["steps"] == 2 and set(trained["exits"]) == {"1"}
    found = done("eval", model, "--balconies", balconies, "--text", text, "--window", "32", "--limit", "3", "--json")
    assert found
    assert (
        done("extract", model, "--exit", "1", "--balconies", balconies, "-o", checkpoint / "x", "--json")["layers"] == 2
    )


@pytest.mark.deep
@pytest.mark.parametrize("checkpoint", FAMILIES, indirect=True)
def test_the_commands_for_bundles(checkpoint: Path) -> None:
    """``export`` in three precisions, ``verify``, ``eval``, ``run`` and ``profile``; balconies are copies of a layer."""
    model, text, more = checkpoint / "model", checkpoint / "text.txt", checkpoint / "more.txt"
    more.write_text(text.read_text() * 16)
    for precision in ("fp32", "int8", "int4"):
        bundle = checkpoint / precision[:4]
        calibration = () if precision == "fp32" else ("--calibration", more)
        done("export", model, "--exits", "1", "-o", bundle, "--precision", precision, *calibration)
        assert done("verify", bundle, "--against", model, "--json")
        assert done("eval", bundle, "--text", text, "--window", "32", "--limit", "3", "--json")
        done("run", bundle, "the quick", "-n", "5")
    done(
        "profile",
        bundle,
        "-o",
        checkpoint / "p.json",
        *["--quick", "-p", "16", "-n", "5", "-d", "0,40", "--pending", "2,5", "-r", "3", "--threads", "1"],
    )
    assert json.loads((checkpoint / "p.json").read_text())["entries"]
