"""How long work tells how far it is: the caller passes a function, and draws what it likes."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with what is done (videos, or shards), of how many if known, and how many were bad."""

    def __call__(self, done: int, total: int | None, rejected: int, /) -> None: ...


def silent(done: int, total: int | None, rejected: int, /) -> None:
    """Tells nobody."""
