"""Sequences over recurrent layers: exact switching and rollback, speculation, conversations, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError
from balcony_runtime.backends.onnxruntime import recurrent
from balcony_runtime.chat import Chat
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.profiler.cells import Bench
from balcony_runtime.profiler.grid import Grid
from balcony_runtime.token_sequence import TokenSequence
from tests.runtime.decoding.test_speculate import PROMPTS, costs
from tests.support.hybrids import EXPORTED, RECURRENT
from tests.support.schedules import check_schedules


@pytest.mark.hypothesis  # its examples are drawn inside
@pytest.mark.parametrize("portable", [False, True], ids=["lowered", "portable"])
@pytest.mark.parametrize("architecture", EXPORTED)
def test_any_schedule_equals_a_pass_from_scratch(
    export_tiny: Callable[[str], Any], architecture: str, portable: bool
) -> None:
    bundle = Bundle.open(export_tiny(architecture).path)
    with Engine.of(bundle.portable() if portable else bundle) as engine:
        check_schedules(engine, engine, 8, prefill=90, length=200, batches=(1, 1, 2))


@pytest.mark.parametrize("architecture", RECURRENT)
def test_a_replay_after_a_rollback_has_the_bits_of_the_first_run(
    export_tiny: Callable[[str], Any], architecture: str
) -> None:
    with Engine.open(export_tiny(architecture).path) as engine:
        check_replay(engine)


def check_replay(engine: Engine) -> None:
    """Logits and recurrent states after a rollback and a replay are those of before, bit for bit."""
    tokens = np.random.default_rng(3).integers(0, 320, 150)
    depth, sequence = engine.exit_layers[-1], engine.new_sequence()
    sequence.advance(depth, tokens[:100])
    sequence.checkpoint()
    want = [sequence.step(depth, tokens[row : row + 1]).copy() for row in range(100, 150)]
    *_, parts = sequence.parts(150)
    states = {name: part.copy() for name, part in parts.items() if "past_state" in name or "past_window" in name}
    assert states
    sequence.rollback(120)
    assert sequence.stage_rows[0] == 20  # back to the checkpoint
    sequence.rollback(100)
    assert not any(sequence.stage_rows)
    for row, logits in zip(range(100, 150), want, strict=True):
        np.testing.assert_array_equal(sequence.step(depth, tokens[row : row + 1]), logits)
    for name, part in sequence.parts(150)[2].items():
        if name in states:
            np.testing.assert_array_equal(part, states[name])


def test_an_interrupted_step_changes_nothing(export_tiny: Callable[[str], Any]) -> None:
    """The engine wrote its new states, and the interrupt came before anybody noted them."""
    tokens = np.random.default_rng(4).integers(0, 320, 40)
    with Engine.open(export_tiny("granite-hybrid").path) as engine:
        sequence, clean = engine.new_sequence(), engine.new_sequence()
        sequence.advance(5, tokens[:30])
        clean.advance(5, tokens[:30])
        for graph in sequence.state._stages:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(graph, "end", lambda rows: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    sequence.step(5, tokens[30:31])
        for row in range(30, 40):
            want = clean.step(5, tokens[row : row + 1]).copy()
            np.testing.assert_array_equal(sequence.step(5, tokens[row : row + 1]), want)


def test_devices_without_the_operators_are_refused_by_name(export_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    from balcony_export.tensorrt.engine_set import make_graphs
    from balcony_export.tensorrt.graphs import Format

    bundle = Bundle.open(export_tiny("granite-hybrid").path)
    with pytest.raises(
        InputError, match="GraniteMoeHybridForCausalLM has recurrent layers, for which there are no graphs"
    ):
        make_graphs(bundle, tmp_path, "rtx", Format("fp16", "fused", 64, 32))
    assert not list(tmp_path.iterdir())


def test_sequences_with_states_share_no_passes_and_say_what_they_hold(export_tiny: Callable[[str], Any]) -> None:
    with Engine.open(export_tiny("mamba2").path) as engine:
        assert engine.backend.new_pool(4, 64) is None
        sequence = engine.new_sequence(max_length=128)
        sequence.advance(5, list(range(10)))
        before = sequence.state.memory_bytes
        sequence.checkpoint()
        graphs = engine.manifest.cpu
        one = sum(
            4 * int(np.prod(tensor.shape[1:]))
            for name in ("stage_0", "stage_1", "stage_2")
            for tensor in graphs[name].inputs
            if tensor.name.startswith(("past_state", "past_window"))
        )
        assert sequence.state.memory_bytes - before == one


@pytest.fixture
def hybrid(export_tiny: Callable[[str], Any]) -> Iterator[LLM]:
    with balcony_edge.load(export_tiny("granite-hybrid").path) as llm:
        llm.costs = costs()  # rounds of speculation always pay
        yield llm


def test_speculation_on_recurrent_layers_is_lossless_and_runs_kept_rows_again(hybrid: LLM) -> None:
    for prompt in PROMPTS[:4]:
        hybrid.budget = Budget()
        want = [token.id for token in hybrid.stream(prompt, max_new_tokens=24, ignore_eos=True)]
        hybrid.budget = Budget(policy="lossless")
        tokens = list(hybrid.stream(prompt, max_new_tokens=24, ignore_eos=True))
        assert [token.id for token in tokens] == want
        rounds = [token.decision.drafted for token in tokens[1:]]
        assert sum(map(bool, rounds)) >= 0.8 * len(rounds)  # a rollback does not keep the next round from running


def test_a_rollback_to_the_end_of_the_prompt_is_free(hybrid: LLM) -> None:
    sequence = hybrid.engine.new_sequence()
    for _ in range(2):  # the second time, only the last token of the prompt runs again
        list(hybrid.stream(PROMPTS[8], max_new_tokens=30, ignore_eos=True, sequence=sequence))
        sequence.rollback(len(PROMPTS[8]))
        assert sequence.stage_rows == (0, 0, 0)


def spoken(chat: Chat, text: str) -> str:
    return "".join(token.text for token in chat.send(text, max_new_tokens=8, ignore_eos=True))


def test_a_conversation_goes_on_and_is_saved_with_its_states(hybrid: LLM, tmp_path: Path) -> None:
    chat = hybrid.chat()
    said = [spoken(chat, text) for text in ("the fox", "the dog")]
    other = hybrid.chat()
    assert spoken(other, "the fox") == said[0]
    other.save(tmp_path / "one.session")
    loaded = Chat.load(hybrid, tmp_path / "one.session")
    assert loaded.sequence.stage_rows == other.sequence.stage_rows
    assert spoken(loaded, "the dog") == said[1]


def test_several_streams_keep_states_of_their_own(hybrid: LLM) -> None:
    hybrid.budget = Budget()
    alone = [
        [token.id for token in hybrid.stream(prompt, max_new_tokens=10, ignore_eos=True)] for prompt in PROMPTS[:3]
    ]
    streams = [hybrid.stream(prompt, max_new_tokens=10, ignore_eos=True) for prompt in PROMPTS[:3]]
    together = [[token.id for token in tokens] for tokens in zip(*streams, strict=True)]
    assert [list(ids) for ids in zip(*together, strict=True)] == alone


@pytest.mark.parametrize("architecture", ["granite-hybrid", "mamba2", "falcon-mamba"])
def test_prices_are_measured_at_load(export_tiny: Callable[[str], Any], architecture: str) -> None:
    with Engine.open(export_tiny(architecture).path) as engine:
        costs = measure_prices(engine)
        assert costs.exits == engine.exit_layers and all(unit.first_row_ms > 0 for unit in costs.stages)


@pytest.mark.parametrize("architecture", ["granite-hybrid", "mamba2"])
def test_a_profile_measures_each_pass(export_tiny: Callable[[str], Any], architecture: str) -> None:
    """Also passes of several rows that end where the sequence does, one after another in any order."""
    with balcony_edge.load(export_tiny(architecture).path) as llm:
        grid = Grid.make(64, quick=True, prompts=(16,), tokens=3, depths=(16,), pending=(3,))
        cells = Bench(llm, grid).cells()
        assert cells
        for cell in reversed(cells):
            found = cell.run()
            assert found and all(blocks and min(blocks) > 0 for blocks in found.values())


def test_a_profile_knows_what_does_not_grow_with_the_tokens(export_tiny: Callable[[str], Any]) -> None:
    with balcony_edge.load(export_tiny("mamba2").path) as llm:
        bench = Bench(llm, Grid.make(64, quick=True, prompts=(16,), tokens=3, depths=(16,), pending=(3,)))
        state: Any = bench._sequence("pass", 40, room=0).state
        states = sum(kept.nbytes for kept in state._memory.states.values())
        assert 0 < bench.recurrent_bytes() == states < bench.state_bytes()[1]


def test_the_end_of_a_prompt_is_a_checkpoint_in_company_too(hybrid: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, lengths = TokenSequence.checkpoint, []

    def counted(sequence: TokenSequence) -> None:
        lengths.append(sequence.length)
        checkpoint(sequence)

    monkeypatch.setattr(TokenSequence, "checkpoint", counted)
    hybrid.budget = Budget()
    hybrid.generate_batch([[1] * 20, [2] * 30], max_new_tokens=4)
    assert sorted(lengths) == [20, 30]


@pytest.mark.parametrize("copies", [1, 8])
def test_a_checkpoint_after_a_rollback_keeps_what_the_next_step_needs(
    export_tiny: Callable[[str], Any], copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States of rows that were rolled back are newer, and they must not push out the one at the cursor."""
    monkeypatch.setattr(recurrent, "MOST_COPIES", copies)
    tokens = np.random.default_rng(6).integers(0, 320, 240)
    with Engine.open(export_tiny("granite-hybrid").path) as engine:
        sequence, clean = engine.new_sequence(), engine.new_sequence()
        for start in range(0, 192, 64):
            sequence.advance(5, tokens[start : start + 64])
        for token in tokens[192:200]:
            sequence.step(5, np.array([token]))
        for back in (193, 130, 65):
            sequence.rollback(back)
            sequence.checkpoint()
            got = sequence.advance(5, tokens[back : back + 3], num_logits=1)
            clean.rollback(0)
            want = clean.advance(5, tokens[: back + 3], num_logits=1)
            np.testing.assert_allclose(got, want, atol=2e-5 * float(np.abs(want).max()))


def test_a_balcony_goes_on_after_an_interrupted_pass(
    export_tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backlog has run through the graph for keys, and its queries have not."""
    tokens = np.random.default_rng(7).integers(0, 320, 60)
    with Engine.open(export_tiny("mamba2").path) as engine:
        exit_layer = engine.exit_layers[0]
        sequence, clean = engine.new_sequence(), engine.new_sequence()
        sequence.advance(exit_layer, tokens[:20])
        sequence.advance(5, tokens[20:40])  # leaves a backlog at the balcony
        graph = sequence.state._exits[0].graph
        with monkeypatch.context() as patch:
            patch.setattr(graph, "end", lambda rows: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                sequence.advance(exit_layer, tokens[40:41])
        sequence.run_balcony(exit_layer, 1000)
        got = sequence.advance(exit_layer, tokens[41:44], num_logits=1)
        want = clean.advance(exit_layer, tokens[:44], num_logits=1)
        np.testing.assert_allclose(got, want, atol=2e-5 * float(np.abs(want).max()))
