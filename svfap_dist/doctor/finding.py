"""The result of a check: a value, not an exception, so that one failure does not hide the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from svfap_dist.errors import SvfapError

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str
    status: str  # OK: no problem; WARN: training may start, at a risk; FAIL: it would not
    found: str  # what the check saw
    do: str = ""  # what helps; "" where nothing is wrong


def ok(name: str, found: str) -> Finding:
    """See `Finding`; its status is OK."""
    return Finding(name, OK, found)


def warn(name: str, found: str, do: str) -> Finding:
    """See `Finding`; its status is WARN."""
    return Finding(name, WARN, found, do)


def fail(name: str, found: str, do: str) -> Finding:
    """See `Finding`; its status is FAIL."""
    return Finding(name, FAIL, found, do)


def catch_errors(name: str, check: Callable[[], Finding]) -> Finding:
    """Run a check and turn an error of this package into a failure with the error's own advice.

    Args:
        name: of the check.
        check: may raise.
    """
    try:
        return check()
    except SvfapError as error:
        place = f" ({error.where})" if error.where else ""
        return fail(name, f"{error.what}{place}: {error.found}", error.do)
