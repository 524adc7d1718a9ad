"""What a check found: a value, not an exception, so that one trouble does not hide the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from svfap_dist.errors import SvfapError

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclasses.dataclass(frozen=True)
class Finding:
    """status: ok, warn (training may go on) or fail. do: what helps; "" where nothing is amiss."""

    name: str
    status: str
    found: str
    do: str = ""


def ok(name: str, found: str) -> Finding:
    """Nothing is amiss."""
    return Finding(name, OK, found)


def warn(name: str, found: str, do: str) -> Finding:
    """Training may go on, worse than it could or with a risk."""
    return Finding(name, WARN, found, do)


def fail(name: str, found: str, do: str) -> Finding:
    """Training would not start, or end soon."""
    return Finding(name, FAIL, found, do)


def failing(name: str, action: Callable[[], Finding]) -> Finding:
    """What `action` finds; an error of ours becomes a failure with its own remedy."""
    try:
        return action()
    except SvfapError as error:
        place = f" ({error.where})" if error.where else ""
        return fail(name, f"{error.what}{place}: {error.found}", error.do)
