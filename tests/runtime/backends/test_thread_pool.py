"""The threads of ONNX Runtime: one pool that spins, pools that sleep between passes, and pools of the host application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import balcony_edge
from balcony_edge.errors import InputError
from tests.support.command import printed

#: Loads a bundle as the arguments after its path say; prints its tokens, and whether its sessions have pools of their own.
LOAD = """
import sys, balcony_edge
from balcony_edge import Budget
from balcony_runtime.backends.onnxruntime import backend
with balcony_edge.load(sys.argv[1], threads=2, **eval(sys.argv[2])) as llm:
    reply = llm.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True)
    print(*[token.id for token in reply.tokens], bool(backend._pooled), llm.engine.backend.threads)
"""
#: Prints the milliseconds of CPU time in 200 ms after a pass of two threads.
IDLE = """
import sys, time
from pathlib import Path
import numpy as np
from balcony_runtime.backends.onnxruntime.backend import open_session
session = open_session(Path(sys.argv[1]), threads=2, spin=sys.argv[2] == "True")
session.run(None, {"x": np.ones((512, 512), np.float32)})
begin = time.process_time()
time.sleep(0.2)
print(1000 * (time.process_time() - begin))
"""


def test_threads_sleep_where_the_controller_may_wait(tiny: Any, tmp_path: Path) -> None:
    ids = set()
    cases = (
        ("dict(budget=Budget(tpot_ms=500))", False),
        ("dict(budget=Budget(max_pace_tps=1000))", True),
        ("dict(budget=Budget(memory_mb=1e6))", False),
        ("dict(budget=Budget(cpu_utilization=1.0))", True),
        ("dict(budget=Budget(max_pace_tps=1000), spin=True)", False),
        ("dict(spin=False, packed=sys.argv[3])", True),
    )
    for options, own in cases:
        *made, pools, threads = printed(LOAD, tiny.path, options, tmp_path / "packed").split()
        assert (pools, threads) == (str(own), "2"), options
        ids.add(tuple(made))
    assert len(ids) == 1


def test_whether_threads_sleep_is_true_false_or_left_out(tiny: Any) -> None:
    spin: Any
    for spin in (0, "no", np.bool_(False)):
        with pytest.raises(InputError, match="must be True, False or None: leave it out for the default"):
            balcony_edge.load(tiny.path, spin=spin)


def test_threads_that_sleep_take_no_time_of_a_cpu(tmp_path: Path) -> None:
    x, y = (ir.val(name, dtype=ir.DataType.FLOAT) for name in "xy")
    node = ir.Node("", "MatMul", [x, x], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 21}, name="square")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "square.onnx")
    spinning, sleeping = (float(printed(IDLE, tmp_path / "square.onnx", str(spin))) for spin in (True, False))
    assert sleeping < 3 < spinning


def test_a_pool_that_the_host_made_is_used(tiny: Any) -> None:
    """The application made ONNX Runtime's global pool and a session on it before it loads a bundle."""
    program = (
        "import sys, onnxruntime as ort\n"
        "ort.set_global_thread_pool_sizes(1, 1)\n"
        "options = ort.SessionOptions()\n"
        "options.use_per_session_threads = False\n"
        "own = ort.InferenceSession(sys.argv[1] + '/norm.onnx', options)\n"
    )
    *ids, pools, _ = printed(program + LOAD, tiny.path, "{}").split()
    assert len(ids) == 4 and pools == "False"


def test_a_host_that_has_sessions_of_its_own_keeps_them(tiny: Any) -> None:
    """Whether the shared pool can still be made depends on ONNX Runtime's version."""
    before = "import sys, onnxruntime as ort\nown = ort.InferenceSession(sys.argv[1] + '/norm.onnx')\n"
    after = "import numpy as np\nprint({len(own.run(None, {'hidden': np.ones((1, 1, 32), np.float32)}))})\n"
    *ids, _, threads, outputs = printed(before + LOAD + after, tiny.path, "{}").split()
    assert (len(ids), threads, outputs) == (4, "2", "{1}")
