"""Children of modules that give their place to others while a model is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

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
