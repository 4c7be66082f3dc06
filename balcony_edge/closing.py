"""Objects that a ``with`` block closes."""

from __future__ import annotations

from typing import Self


class Closing:
    """A context manager whose end calls ``close``."""

    def close(self) -> None:
        """Free what the object holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
