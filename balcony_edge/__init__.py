"""Balcony Edge: run one frozen language model at several depths, inside budgets that move.

    import balcony_edge

    llm = balcony_edge.load("bundle/", budget=balcony_edge.Budget(tpot_ms=25))
    for token in llm.stream("Why is the sky blue?", max_new_tokens=200):
        print(token.text, end="", flush=True)  # token.exit_layer, token.latency_ms, token.reason
    llm.budget = balcony_edge.Budget(tpot_ms=12)  # takes effect at the next token

Importing this package loads nothing else: a name brings its module in at its first use, and :func:`load` an engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from balcony_edge.errors import BalconyError

if TYPE_CHECKING:
    import os

    from balcony_edge.budget import Budget, load_budget
    from balcony_runtime.backends.choose import DeviceName
    from balcony_runtime.llm import LLM

__all__ = ["BalconyError", "Budget", "load", "load_budget"]
#: Name → the module that has it. Budgets are types of pydantic, which takes 0.1 s to import.
_LAZY = {"Budget": "balcony_edge.budget", "load_budget": "balcony_edge.budget"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'balcony_edge' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    path: str | os.PathLike[str],
    *,
    budget: Budget | str | os.PathLike[str] | None = None,
    profile: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    verify_hashes: bool = True,
    packed: str | os.PathLike[str] | None = None,
    device: DeviceName = "auto",
    engines: str | None = None,
) -> LLM:
    """Load a bundle for generation.

    Args:
        path: the bundle's directory.
        budget: what replies may cost: a budget, the path of a target file, or None for full depth without a target.
            With a target and no profile, loading measures what each exit costs on this device (about half a second).
        profile: device profile that `balcony-edge profile` wrote; one of another device or bundle is warned of.
        threads: of the engine's shared pool; by default the CPUs of this process, at most four times as many. The first engine
            of a process decides.
        verify_hashes: check every file against the manifest; without it only presence and size.
        packed: a directory in which weights are kept in the form that the engine's kernels read, made at the first load;
            processes that load the same bundle with it share them in memory.
        device: ``cpu``; ``cuda`` or ``nv`` (ONNX Runtime on an NVIDIA GPU); ``tensorrt`` (engines that `balcony-edge build`
            made); ``auto`` takes engines that fit the GPU, then the GPU through ONNX Runtime, then the CPU.
        engines: which of the bundle's engine sets, where it has several.

    Raises:
        BundleError: the bundle is missing, damaged or not what its manifest says.
        BudgetError: the budget is refused, or leaves none of the bundle's exits.
        ProfileError: the profile cannot be read, or is for other exits.
        InputError: the directory for packed weights cannot be written, or there are more threads than can work.
        DeviceError: the device is not there, or has not enough memory.
        MissingDependencyError: the engine is not installed.
    """
    from balcony_runtime.llm import LLM  # noqa: PLC0415 - keeps `import balcony_edge` free of engines

    return LLM.open(
        path,
        budget=budget,
        profile=profile,
        verify_hashes=verify_hashes,
        threads=threads,
        packed=packed,
        device=device,
        engines=engines,
    )
