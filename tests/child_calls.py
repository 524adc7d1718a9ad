"""What the tests of isolated work call in the child process."""

from __future__ import annotations

import os
import time


def behave(request: str) -> object:
    """Do what the request says."""
    if request == "hang":
        time.sleep(600)
    if request == "crash":
        os._exit(7)
    if request == "raise":
        raise ValueError("no such frame")
    if request == "eat":
        return len(bytearray(8 << 30))
    return os.getpid() if request == "pid" else request.upper()


class DiesOnArrival:
    """A function that ends the process it is unpickled in."""

    def __call__(self, request: str) -> str:
        return request

    def __setstate__(self, state: object) -> None:
        os._exit(3)

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}  # else `__setstate__` is not called
