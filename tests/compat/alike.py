"""Compare JSON values computed by two versions, possibly on different CPUs."""

from __future__ import annotations

import math
from typing import Any


def differences(now: Any, then: Any, where: str = "") -> list[str]:
    """List where `now` differs from `then`.

    Floats may differ in their last digits, and objects of `now` may have additional fields.
    """
    if isinstance(then, dict) and isinstance(now, dict):
        gone = [f"{where}.{name} is gone" for name in then if name not in now]
        kept = [name for name in then if name in now]
        return gone + [d for n in kept for d in differences(now[n], then[n], f"{where}.{n}")]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = enumerate(zip(now, then, strict=True))
        return [d for number, (n, t) in pairs for d in differences(n, t, f"{where}[{number}]")]
    if isinstance(then, float) and isinstance(now, float):
        same = math.isclose(now, then, rel_tol=1e-5, abs_tol=1e-6)
        return [] if same else [f"{where} is {now}, was {then}"]
    return [] if now == then else [f"{where} is {now!r}, was {then!r}"]
