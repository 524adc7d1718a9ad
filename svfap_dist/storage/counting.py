"""What is asked of stores, counted by what was asked and how it ended.

Plain numbers, which cost a request a microsecond; whoever serves metrics reads them.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from typing import Any

READ, WRITE, LOOK_UP, LIST, DELETE = OPERATIONS = ("read", "write", "look up", "list", "delete")
OUTCOMES = ("ok", "missing", "unreachable", "refused")  # refused: anything else that went wrong


@dataclasses.dataclass(frozen=True)
class Counts:
    """What this process has asked of stores so far.

    requests: by operation and outcome; one per call of this package, which may send several, and
    includes its retries. bytes: of files read and written, by operation. retries: requests that the
    S3 client sent again because a store was busy or a connection broke, by operation; a body that
    breaks off half-way is read again by s3fs, uncounted.
    """

    requests: dict[tuple[str, str], int]
    bytes: dict[str, int]
    retries: dict[str, int]


class _Counter:
    """Counts up from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self._bytes: collections.Counter[str] = collections.Counter()
        self._retries: collections.Counter[str] = collections.Counter()

    def request(self, operation: str, outcome: str) -> None:
        with self._lock:
            self._requests[operation, outcome] += 1

    def bytes(self, operation: str, amount: int) -> None:
        with self._lock:
            self._bytes[operation] += amount

    def sent(self, request: Any, operation_name: str, **_: Any) -> None:
        """Told by botocore of every HTTP request before it goes out."""
        if request.context.get("retries", {}).get("attempt", 1) > 1:
            with self._lock:
                self._retries[_OPERATION_OF.get(operation_name, WRITE)] += 1

    def counts(self) -> Counts:
        with self._lock:
            return Counts(dict(self._requests), dict(self._bytes), dict(self._retries))


# Of S3's own operations; the many others that s3fs uses are parts of writing.
_OPERATION_OF = {
    "GetObject": READ,
    "HeadObject": LOOK_UP,
    "HeadBucket": LOOK_UP,
    "ListBuckets": LOOK_UP,
    "ListObjectsV2": LIST,
    "DeleteObject": DELETE,
    "DeleteObjects": DELETE,
}
counter = _Counter()


def counts() -> Counts:
    """What this process has asked of stores so far."""
    return counter.counts()
