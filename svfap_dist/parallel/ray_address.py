"""Whether a Ray cluster can be at an address, asked before Ray is: Ray tries for minutes."""

from __future__ import annotations

import re
import socket
import time

from svfap_dist.errors import ClusterError

_PLACE = re.compile(r"(ray://)?\[?(?P<host>[^\[\]/]+)\]?:(?P<port>\d+)")
_SECONDS_TO_ANSWER = 15.0  # a head that has just been started may not listen yet
_SECONDS_BETWEEN_TRIES = 0.5


def check_answers(address: str, do: str, seconds: float = _SECONDS_TO_ANSWER) -> None:
    """Check that something listens at a "host:port" or "ray://host:port"; other addresses, such as
    "auto", are left to Ray.

    Raises: ClusterError that advises to `do` something.
    """
    place = _PLACE.fullmatch(address)
    if place is None:
        return
    until = time.monotonic() + seconds
    while True:
        try:
            left = max(until - time.monotonic(), 0.1)
            socket.create_connection((place["host"], int(place["port"])), timeout=left).close()
            return
        except (OSError, UnicodeError) as error:  # the latter of a host that is no name
            if time.monotonic() >= until or isinstance(error, UnicodeError):
                raise ClusterError(
                    "Cannot connect to Ray",
                    where=address,
                    found=f"nothing answers there ({error})",
                    do=do,
                ) from error
        time.sleep(_SECONDS_BETWEEN_TRIES)
