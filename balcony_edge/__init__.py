"""Balcony Edge: run one frozen language model at several depths, within budgets that may change at any time.

    import balcony_edge

    llm = balcony_edge.load("bundle/", budget=balcony_edge.Budget(tpot_ms=25))
    for token in llm.stream("Why is the sky blue?", max_new_tokens=200):
        print(token.text, end="", flush=True)  # token.exit_layer, token.latency_ms, token.reason
    llm.budget = balcony_edge.Budget(tpot_ms=12)  # takes effect at the next token

Importing this package loads nothing else. A name loads its module at its first use, and :func:`load` an engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from balcony_edge.errors import (
    BalconyError,
    BudgetError,
    BundleError,
    BusyError,
    CheckpointError,
    ContextLengthError,
    DeviceError,
    EngineBuildError,
    InfeasibleError,
    InputError,
    MissingDependencyError,
    ProfileError,
    TrainingError,
    UnsupportedModelError,
    VerificationError,
)

if TYPE_CHECKING:
    import os

    from balcony_edge.budget import Budget, load_budget
    from balcony_edge.bundle.bundle import Bundle
    from balcony_edge.control.company.round_trace import RoundTraceWriter
    from balcony_edge.control.trace import TraceWriter
    from balcony_edge.control.verdict import Verdict
    from balcony_edge.device.costs import CostModel
    from balcony_edge.device.profile import DeviceProfile
    from balcony_runtime.backends.choose import DeviceName
    from balcony_runtime.chat import Chat
    from balcony_runtime.decoding.sampling import SamplingParams
    from balcony_runtime.engine import Engine
    from balcony_runtime.llm import LLM
    from balcony_runtime.reply import Reply, Token, TokenStream
    from balcony_runtime.sensors import Sensors, device_sources
    from balcony_runtime.structure.calls import CallReader
    from balcony_runtime.together import Together
    from balcony_runtime.token_sequence import TokenSequence

__all__ = [
    "LLM",
    "BalconyError",
    "Budget",
    "BudgetError",
    "Bundle",
    "BundleError",
    "BusyError",
    "CallReader",
    "Chat",
    "CheckpointError",
    "ContextLengthError",
    "CostModel",
    "DeviceError",
    "DeviceProfile",
    "Engine",
    "EngineBuildError",
    "InfeasibleError",
    "InputError",
    "MissingDependencyError",
    "ProfileError",
    "Reply",
    "RoundTraceWriter",
    "SamplingParams",
    "Sensors",
    "Together",
    "Token",
    "TokenSequence",
    "TokenStream",
    "TraceWriter",
    "TrainingError",
    "UnsupportedModelError",
    "Verdict",
    "VerificationError",
    "device_sources",
    "load",
    "load_budget",
]
#: Name → its module. Budgets are types of pydantic, which takes 0.1 s to import; the runtime imports NumPy and tokenizers.
_LAZY = {
    "Budget": "balcony_edge.budget",
    "load_budget": "balcony_edge.budget",
    "Bundle": "balcony_edge.bundle.bundle",
    "RoundTraceWriter": "balcony_edge.control.company.round_trace",
    "TraceWriter": "balcony_edge.control.trace",
    "Verdict": "balcony_edge.control.verdict",
    "CostModel": "balcony_edge.device.costs",
    "DeviceProfile": "balcony_edge.device.profile",
    "Chat": "balcony_runtime.chat",
    "SamplingParams": "balcony_runtime.decoding.sampling",
    "Engine": "balcony_runtime.engine",
    "LLM": "balcony_runtime.llm",
    "Reply": "balcony_runtime.reply",
    "Token": "balcony_runtime.reply",
    "TokenStream": "balcony_runtime.reply",
    "Sensors": "balcony_runtime.sensors",
    "device_sources": "balcony_runtime.sensors",
    "CallReader": "balcony_runtime.structure.calls",
    "Together": "balcony_runtime.together",
    "TokenSequence": "balcony_runtime.token_sequence",
}


if not TYPE_CHECKING:  # with it, type checkers would accept any name

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
    spin: bool | None = None,
    verify_hashes: bool = True,
    packed: str | os.PathLike[str] | None = None,
    device: DeviceName = "auto",
    engines: str | None = None,
    prefix_mb: float = 256.0,
    prefix_directory: str | os.PathLike[str] | None = None,
) -> LLM:
    """Load a bundle for generation.

    Example:
        llm = balcony_edge.load("bundle/", budget="profiles/interactive.toml")

    Args:
        path: directory of the bundle.
        budget: budget of replies: a :class:`Budget`, the path of a budget file, or None for full depth without a target.
            With a target, a ceiling or a policy, and no device profile, loading measures prices (about half a second).
        profile: device profile written by `balcony-edge profile`. A warning names a profile of another device or bundle.
        threads: threads of the engine's shared pool; by default one for each core of this process that is not slow
            (hyper-threads count once), and at most four for each CPU. The first engine of a process decides, unless its
            threads sleep.
        spin: whether the threads of a CPU's engine wait for the next token in circles, which saves waking them and keeps
            their cores busy for tens of milliseconds. By default they do, unless the controller may wait between tokens for
            ``budget``: for a pace, or to hold watts, degrees, utilization or charge. The first engine of a process decides.
        verify_hashes: whether to check every file against the manifest. Without it only presence and size are checked.
        packed: directory for weights in the form that the engine's kernels read, made at the first load. Processes that load
            the same bundle with it share them in memory.
        device: ``cpu``; ``cuda`` (ONNX Runtime on an NVIDIA GPU); ``tensorrt`` (engines made by `balcony-edge build`);
            ``webgpu`` (ONNX Runtime on a GPU with Vulkan, Metal or Direct3D 12); ``auto`` takes engines that this
            machine built for its GPU, then CUDA, then the faster one of WebGPU and the CPU; with ``packed`` the CPU.
        engines: name of the engine set, if the bundle has several.
        prefix_mb: megabytes of ended replies that are kept, because later prompts may begin like them; those that were not used
            for longest go first.
        prefix_directory: directory to which these are written when the LLM is closed, at most as many megabytes, and from which
            the next process takes them. Files that were saved there by name are used as well, and stay.

    Raises:
        BundleError: the bundle is missing, damaged or does not match its manifest.
        BudgetError: the budget is refused, or it allows none of the bundle's exits.
        ProfileError: the device profile cannot be read, or is for other exits.
        InputError: a directory cannot be written, there are too many threads, ``prefix_mb`` or ``spin`` is wrong, or packed
            weights are given for a device other than the CPU.
        DeviceError: the device is missing, or has too little memory.
        MissingDependencyError: the engine is not installed.
    """
    from balcony_runtime.llm import LLM  # noqa: PLC0415 - keeps `import balcony_edge` free of engines

    return LLM.open(
        path,
        budget=budget,
        profile=profile,
        verify_hashes=verify_hashes,
        threads=threads,
        spin=spin,
        packed=packed,
        device=device,
        engines=engines,
        prefix_mb=prefix_mb,
        prefix_directory=prefix_directory,
    )
