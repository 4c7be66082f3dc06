"""Children and attributes that give their place to others while a model is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import nn


@contextlib.contextmanager
def replaced_children(modules: Sequence[nn.Module], make: Callable[[nn.Module], nn.Module | None]) -> Iterator[None]:
    """Replace children of ``modules``, at any depth, until the end of the context; also if ``make`` raises.

    Args:
        modules: roots.
        make: gives what takes the place of a child; None leaves it where it is.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in [child for module in modules for child in module.modules()]:
            for name, child in parent.named_children():
                if (other := make(child)) is not None:
                    replaced.append((parent, name, child))
                    setattr(parent, name, other)
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


@contextlib.contextmanager
def replaced_attributes(owners: Iterable[object], values: Mapping[str, object]) -> Iterator[None]:
    """Give all ``owners`` these values of attributes until the end of the context; one may be there several times."""
    before = [(owner, name, getattr(owner, name)) for owner in owners for name in values]
    try:
        for owner, name, _ in before:
            setattr(owner, name, values[name])
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
