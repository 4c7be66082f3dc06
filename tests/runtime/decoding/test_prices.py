"""Prices that are measured without a device profile, on a device whose passes take known times."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from balcony_edge.budget import Budget
from balcony_runtime.backends.base import IntArray
from balcony_runtime.decoding.prices import REPEATS, measure_prices
from balcony_runtime.llm import LLM
from tests.support.replies import PRICES

#: Times of the calls of a pass: the first packs weights, and another program runs during the last. The median of the rest is 1.
FACTORS = (100.0, 0.5, 1.0, 9.0)


class Steady:
    """A sequence whose clock advances by the times below. Rows before a pass cost nothing until they are written."""

    def __init__(self) -> None:
        self.busy_ns, self.written, self.calls = 0, 0, dict[tuple[Any, ...], int]()

    def parts(self, stage_rows: list[int], balcony_rows: list[int]) -> dict[str, Any]:
        assert stage_rows == balcony_rows
        return {"hidden_2": np.ones((1, *stage_rows))}

    def fill(self, stage_rows: list[int], _: list[int], parts: dict[str, Any]) -> None:
        assert parts["hidden_2"].shape == (1, *stage_rows)
        self.written = min(stage_rows)

    def embed(self, ids: IntArray, _: int) -> None:
        assert ids.shape[0] == 1

    def wait(self) -> None:
        pass

    def run_stage(self, index: int, start: int, stop: int) -> None:
        self._take(("stage", index, start, stop), index + 1 + 0.25 * (stop - start - 1) + 0.001 * self._read(start))

    def run_exit(self, index: int, start: int, stop: int, queries: int) -> None:
        context_ms = 0.002 * self._read(start)
        self._take(("exit", index, start, stop, queries), 0.5 * index + 0.5 + 0.125 * (stop - start - 1) + context_ms)

    def logits(self, rows: int) -> None:
        self._take(("head", rows), 2.0 + 0.375 * (rows - 1))

    def _read(self, start: int) -> int:
        """Of the rows before ``start`` those whose memory is their own."""
        return min(start, self.written)

    def _take(self, key: tuple[Any, ...], ms: float) -> None:
        self.calls[key] = count = self.calls.get(key, 0) + 1
        self.busy_ns += round(1e6 * ms * FACTORS[count - 1])


# of 32 heads, the scores of 64 rows and 131,072 keys take MAX_SCORE_BYTES
@pytest.mark.parametrize(("max_length", "context", "rows"), [(500, 500, 256), (4096, 1024, 256), (131_072, 1024, 64)])
def test_prices_of_a_steady_device(max_length: int, context: int, rows: int) -> None:
    assert len(FACTORS) == REPEATS + 1
    model = SimpleNamespace(mixture=None, recurrent=False, num_attention_heads=32)
    manifest = SimpleNamespace(exit_layers=(2, 5), model=model)

    def new_state(members: int, _: int) -> Steady:
        assert members == 1
        return Steady()

    backend = SimpleNamespace(new_state=new_state)
    engine: Any = SimpleNamespace(refuse_closed=lambda: None, max_length=max_length, manifest=manifest, backend=backend)
    costs = measure_prices(engine)
    assert costs.exits == (2, 5) and costs.head.first_row_ms == pytest.approx(2)
    assert costs.head.marginal_row_ms == pytest.approx(0.375)
    assert [unit.first_row_ms for unit in (*costs.stages, *costs.balconies)] == pytest.approx([1, 2, 0.5, 1])
    assert {unit.pass_rows for unit in (*costs.stages, *costs.balconies)} == {rows}  # as in a sequence of that length
    share = 1000 * (context - 1) / context  # the deep pass has a row less before it
    for units, row_ms, place_ms in ((costs.stages, 0.25, 0.001), (costs.balconies, 0.125, 0.002)):
        assert [unit.marginal_row_ms for unit in units] == pytest.approx([row_ms] * 2)
        assert [unit.context_ms_per_1k for unit in units] == pytest.approx([place_ms * share] * 2)


def test_prices_that_are_given_during_a_measurement_stay(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = threading.Thread(target=lambda: setattr(llm, "costs", PRICES))

    def measured(_: Any) -> Any:
        setting.start()
        time.sleep(0.2)
        return dataclasses.replace(PRICES, overhead_ms=9.0)

    monkeypatch.setattr("balcony_runtime.llm.measure_prices", measured)
    llm.budget = Budget(tpot_ms=1000.0)
    setting.join(20)
    assert llm.costs is PRICES


def test_the_handler_of_a_signal_may_set_a_budget_while_prices_are_measured(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in the thread that measures, which would wait for itself for ever."""
    times = itertools.count()

    def measured(engine: Any) -> Any:
        if next(times) == 0:
            llm.budget = Budget(tpot_ms=2000.0)
        return PRICES

    monkeypatch.setattr("balcony_runtime.llm.measure_prices", measured)
    setting = threading.Thread(target=setattr, args=(llm, "budget", Budget(tpot_ms=1000.0)), daemon=True)
    setting.start()
    setting.join(10)
    assert not setting.is_alive() and llm.costs is PRICES
