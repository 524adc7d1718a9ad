"""What hostile input must lead to: a value, or an error of this project with all four parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from svfap_dist.errors import SvfapError


def value_or_our_error(call: Callable[[], Any], kind: type[SvfapError]) -> Any:
    """What the call returns, None if it raises a complete error of that kind."""
    try:
        return call()
    except kind as error:
        parts = error.what, error.where, error.found, error.do
    assert all(parts), parts
    str(parts).encode()
    return None
