"""Which checkpoints to delete: a pure function of the steps there are and the policy."""

from __future__ import annotations

from collections.abc import Iterable


def to_delete(steps: Iterable[int], keep_last: int, keep_every: int) -> list[int]:
    """Steps whose checkpoints may go, oldest first.

    Kept are the newest `keep_last` and every multiple of `keep_every` (0: none).
    """
    ordered = sorted(steps)
    newest = set(ordered[-keep_last:])
    return [
        step
        for step in ordered
        if step not in newest and not (keep_every and step % keep_every == 0)
    ]
