"""The engine: the weights of one bundle, which all of its sequences share.

Owns how long they can be used: from the load to the close, and not in a process that is forked meanwhile. Which rows go through
them is :mod:`.token_sequence`.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import Self, TypedDict, Unpack

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import Manifest
from balcony_edge.closing import Closing
from balcony_edge.errors import ContextLengthError, InputError
from balcony_runtime.backends.base import Backend, closed, forked
from balcony_runtime.backends.choose import DeviceName, open_backend
from balcony_runtime.token_sequence import TokenSequence
from balcony_runtime.tokens import whole

#: Engines of this process, which a fork of it must not use.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
#: Longest wait for passes of other threads, in seconds: they may wait for what the handler of a signal has interrupted here.
LONGEST_PASS_S = 30.0


class EngineOptions(TypedDict, total=False):
    """Options of the engine, as for :func:`balcony_edge.load`."""

    threads: int | None
    spin: bool | None
    packed: str | os.PathLike[str] | None
    device: DeviceName
    engines: str | None


class Engine(Closing):
    """The weights of one bundle, shared by all sequences. A context manager that frees them.

    Example:
        with Engine.open("bundle/") as engine:
            sequence = engine.new_sequence(max_length=64)
            logits = sequence.advance(engine.exit_layers[0], [1, 2, 3])  # (1, 1, V)
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.manifest: Manifest = backend.manifest
        self._refusal: Callable[[], InputError] | None = None  # why it cannot be used any more
        #: Its sequences, for whose passes :meth:`close` waits.
        self.sequences: weakref.WeakSet[TokenSequence] = weakref.WeakSet()
        _engines.add(self)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, verify_hashes: bool = True, **options: Unpack[EngineOptions]
    ) -> Self:
        """Load a bundle; arguments as for :func:`balcony_edge.load`.

        Raises:
            BundleError: the bundle is missing, damaged, or differs from its manifest.
            InputError: there are too many threads, or packed weights cannot be used.
            DeviceError: the device is missing, or has too little memory.
            MissingDependencyError: the engine is not installed.
        """
        return cls.of(Bundle.open(path, verify_hashes=verify_hashes), verify_hashes=verify_hashes, **options)

    @classmethod
    def of(cls, bundle: Bundle, *, verify_hashes: bool = True, **options: Unpack[EngineOptions]) -> Self:
        """The same for a bundle that is already open; ``verify_hashes`` then concerns engine sets and packed weights."""
        return cls(open_backend(bundle, verify_hashes=verify_hashes, **options))

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Exits in ascending order; the last is the full depth."""
        return self.manifest.exit_layers

    @property
    def max_length(self) -> int:
        """Most rows of a sequence: the bundle's context, or less if the engines were built for less."""
        return min(self.manifest.model.context_length, self.backend.max_length)

    def new_sequence(self, *, batch_size: int = 1, max_length: int | None = None) -> TokenSequence:
        """Make an empty sequence.

        Args:
            batch_size: number of sequences of equal length that advance together.
            max_length: most tokens that it may hold; by default :attr:`max_length`.

        Raises:
            ContextLengthError: ``max_length`` is above the bundle's.
            InputError: an argument is out of range, or there is not enough memory.
            DeviceError: the accelerator does not have enough memory.
        """
        self.refuse_closed()
        context = self.max_length
        length = context if max_length is None else whole("max_length", max_length)
        if not 1 <= length <= context:
            raise ContextLengthError(f"max_length = {length}: this bundle takes 1 to {context}: give one of those")
        batch_size = whole("batch_size", batch_size, 1)
        try:
            return TokenSequence(self, batch_size, length)
        except MemoryError as error:
            raise InputError(
                f"max_length = {length}, batch_size = {batch_size}: there is not enough memory: ask for less of either"
            ) from error

    def close(self) -> None:
        """Free the weights, and wait for the passes of other threads; sequences of a closed engine refuse to work."""
        if not self.is_forked:  # the threads that would have to end are in the other process
            self._refusal = closed
            self.backend.close()
            # Before Python 3.14 a daemon thread that comes back from C++ once Python ends aborts the process.
            end_s = time.monotonic() + LONGEST_PASS_S
            for sequence in list(self.sequences):
                if sequence.lock.acquire(timeout=max(end_s - time.monotonic(), 0.0)):
                    sequence.lock.release()

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that loaded the bundle. Locks of its threads stay held."""
        return self._refusal is forked

    def refuse_closed(self) -> None:
        """Raise InputError after :meth:`close`, and in a process that was forked from the one that loaded the bundle."""
        if self._refusal is not None:
            raise self._refusal()


def _refuse_forked() -> None:
    for engine in _engines:
        engine._refusal = forked


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_refuse_forked)
