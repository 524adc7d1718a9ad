"""Clients of stores: URLs, file systems, counted requests, and their errors.

In: a URL. Out: the fsspec file system that serves it and the path in it; around each request, its
count and outcome, and a `StorageError` for whatever exception the client raises.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

from svfap_dist.errors import StorageError

READ, WRITE, LOOK_UP, LIST, DELETE = OPERATIONS = ("read", "write", "look up", "list", "delete")
OUTCOMES = ("ok", "missing", "unreachable", "refused")  # refused: any other failure

# A wrong endpoint must fail within seconds, while a store that is busy (SlowDown, 503) or drops a
# connection gets a retry. The client retries requests; s3fs, above it, bodies that break off.
_S3_CLIENT_CONFIG = {
    "connect_timeout": 3,
    "read_timeout": 60,
    "retries": {"total_max_attempts": 3, "mode": "standard"},
}
_S3FS_ATTEMPTS = 2
_REMOTE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://")
# S3's own operations by ours; the many others that s3fs uses are parts of writes.
_OPERATION_OF = {
    "GetObject": READ,
    "HeadObject": LOOK_UP,
    "HeadBucket": LOOK_UP,
    "ListBuckets": LOOK_UP,
    "ListObjectsV2": LIST,
    "DeleteObject": DELETE,
    "DeleteObjects": DELETE,
}
# Codes of stores' answers (often "403 Forbidden") when a user's or bucket's quota is used up.
_NO_SPACE_CODES = {"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity"}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")


class StorageMissingError(StorageError):
    """No object, bucket or folder at the URL."""


class StorageUnreachableError(StorageError):
    """The store does not answer."""

    retryable = True


def is_remote(url: str) -> bool:
    """Return whether a URL names an object store rather than a local path.

    Args:
        url: URL or local path.
    """
    return _REMOTE.match(url) is not None


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL, with a slash before each.

    The parts stay as they are: to a store, `a//b` and `a/b` are two keys.

    Args:
        url: URL or local path, with or without a slash at its end.
        parts: Relative paths below it.
    """
    return "/".join([url.removesuffix("/"), *parts])


def local_path(url: str) -> str:
    """Return the absolute path of a `file://` URL or of a plain path.

    Args:
        url: URL or local path.
    """
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it.

    Args:
        url: URL or local path.
    """
    import fsspec

    if not is_remote(url):
        return fsspec.filesystem("file"), local_path(url)
    protocol = url.partition("://")[0]
    # Not `fsspec.core.url_to_fs`: to it, `::` within a name separates chained file systems.
    if protocol != "s3":
        kind = fsspec.get_filesystem_class(protocol)
        return kind(**kind._get_kwargs_from_urls(url)), kind._strip_protocol(url)
    from svfap_dist.storage.s3 import LiteralS3

    # Stores other than AWS often lack the newer checksum headers (Ceph RGW answers 411 or 400).
    if _endpoint():
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    # fsspec caches one file system object per set of arguments, so the endpoint is one of them:
    # from the environment alone, a change of endpoint would not take effect.
    fs: Any = LiteralS3(
        endpoint_url=_endpoint(), config_kwargs=_S3_CLIENT_CONFIG, use_listings_cache=False
    )
    fs.retries = _S3FS_ATTEMPTS
    # At each call, which is cheap: s3fs may have replaced its client since the last one.
    fs.s3.meta.events.register("request-created.s3", counter.retry, unique_id="svfap-retries")
    return fs, url.removeprefix("s3://")


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@dataclasses.dataclass(frozen=True)
class RequestCounts:
    """Storage requests of this process so far.

    Attributes:
        requests: Number by (operation, outcome). One call of this package is one request, whatever
            it sends and retries.
        bytes: Bytes of files read and written, by operation.
        retries: Requests that the S3 client sent again because a store was busy or a connection
            broke, by operation. Bodies that s3fs reads again after they broke off are not counted.
    """

    requests: dict[tuple[str, str], int]
    bytes: dict[str, int]
    retries: dict[str, int]


class _Counter:
    """Thread-safe counts; one update takes about a microsecond."""

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

    def retry(self, request: Any, operation_name: str, **_: Any) -> None:
        """Count an HTTP request that is a retry; botocore calls this before it sends each."""
        if request.context.get("retries", {}).get("attempt", 1) > 1:
            with self._lock:
                self._retries[_OPERATION_OF.get(operation_name, WRITE)] += 1

    def counts(self) -> RequestCounts:
        with self._lock:
            return RequestCounts(dict(self._requests), dict(self._bytes), dict(self._retries))


counter = _Counter()


def request_counts() -> RequestCounts:
    """Return the storage requests of this process so far."""
    return counter.counts()


@contextlib.contextmanager
def request(operation: str, url: str) -> Iterator[None]:
    """Count a request, and turn exceptions of the client into `StorageError`.

    Args:
        operation: One of `OPERATIONS`.
        url: What is read, written, listed or deleted.
    """
    outcome = "ok"
    try:
        yield
    except Exception as error:
        explained = error if isinstance(error, StorageError) else explain(operation, url, error)
        outcome = "refused"
        if isinstance(explained, StorageMissingError):
            outcome = "missing"
        elif isinstance(explained, StorageUnreachableError):
            outcome = "unreachable"
        if explained is error:
            raise
        raise explained from error
    finally:
        counter.request(operation, outcome)


def explain(action: str, url: str, error: Exception) -> StorageError:
    """Return the `StorageError` for an exception of the operating system or a store's client.

    Args:
        action: Verb phrase of what failed, such as "read".
        url: URL or path concerned.
        error: The exception.
    """
    what, kind, number = f"Cannot {action}", type(error).__name__, getattr(error, "errno", None)
    is_s3 = url.startswith("s3://")
    place = f"endpoint {_endpoint() or 'of AWS'}" if is_s3 else url.partition("://")[0]
    credentials = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if is_s3 else f"those for {place}"
    if _is_full(error):
        return StorageError(what, url, "no space left", "free space or use another URL")
    # ELOOP: a link that points to itself has no target.
    if isinstance(error, FileNotFoundError) or number == errno.ELOOP:
        found = "no such bucket" if is_remote(url) and action != "read" else "nothing there"
        do = f"check the bucket and prefix ({place})" if is_remote(url) else "check the path"
        return StorageMissingError(what, url, found, do)
    if isinstance(error, PermissionError) or number == errno.EROFS:
        do = f"check the credentials: {credentials}" if is_remote(url) else "check the permissions"
        return StorageError(what, url, f"access denied ({error})", do)
    if kind in _NO_CREDENTIALS:
        return StorageError(what, url, "no credentials", f"set {credentials}")
    if isinstance(error, (ConnectionError, TimeoutError)) or kind.endswith(
        ("ConnectionError", "TimeoutError")
    ):
        check = "AWS_ENDPOINT_URL" if is_s3 else "the URL"
        do = f"check {check} and that the store is up, then run the same command again"
        return StorageUnreachableError(what, url, f"no answer from {place}", do)
    found, do = f"{kind}: {error}".strip().rstrip(":"), "see the message of the store"
    if isinstance(error, IsADirectoryError):
        found, do = "a folder", "name a file in it"
    return StorageError(what, url, found, do)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # s3fs raises an OSError from the client's error, which carries the store's own code.
    answer = getattr(error.__cause__ or error, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") in _NO_SPACE_CODES
