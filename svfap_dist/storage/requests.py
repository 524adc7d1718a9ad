"""One request to a store: counted, and what goes wrong explained to whoever has to mend it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from svfap_dist.errors import StorageError
from svfap_dist.storage.counting import counter
from svfap_dist.storage.urls import endpoint, is_remote

# What stores answer, as "403 Forbidden" or so, when a user's or bucket's space is used up.
_NO_SPACE_CODES = {"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity"}


class StorageMissing(StorageError):
    """Nothing is stored under the URL."""


class StorageUnreachable(StorageError):
    """The store does not answer."""

    retryable = True


@contextlib.contextmanager
def request(operation: str, url: str) -> Iterator[None]:
    """Count a request, and turn what a store raises into a `StorageError` that says what to do."""
    outcome = "ok"
    try:
        yield
    except Exception as error:
        told = error if isinstance(error, StorageError) else explain(operation, url, error)
        outcome = (
            "missing"
            if isinstance(told, StorageMissing)
            else "unreachable"
            if isinstance(told, StorageUnreachable)
            else "refused"
        )
        if told is error:
            raise
        raise told from error
    finally:
        counter.request(operation, outcome)


def explain(action: str, url: str, error: Exception) -> StorageError:
    """The `StorageError` for an exception of the operating system or of a store's client."""
    what, kind = f"Cannot {action}", type(error).__name__
    if _is_full(error):
        advice = "free space or use another URL"
        return StorageError(what, where=url, found="no space left", do=advice)
    # A link that leads to itself leads to nothing.
    if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.ELOOP:
        found = "no such bucket" if is_remote(url) and action != "read" else "nothing there"
        return StorageMissing(what, where=url, found=found, do=_missing_advice(url))
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        advice = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the rights on the folder"
        return StorageError(what, where=url, found=f"access denied ({error})", do=advice)
    if kind in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageError(what, where=url, found="no credentials", do=advice)
    if isinstance(error, (ConnectionError, TimeoutError)) or kind.endswith(
        ("ConnectionError", "TimeoutError")
    ):
        found = f"no answer from endpoint {endpoint() or 'of AWS'}"
        advice = "check AWS_ENDPOINT_URL and that the store is up, then run the same command again"
        return StorageUnreachable(what, where=url, found=found, do=advice)
    found, advice = f"{kind}: {error}".strip().rstrip(":"), "see the message of the store"
    if isinstance(error, IsADirectoryError):
        found, advice = "a folder", "name a file in it"
    return StorageError(what, where=url, found=found, do=advice)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # s3fs raises an OSError from the client's error, which carries the store's own code.
    answer = getattr(error.__cause__ or error, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") in _NO_SPACE_CODES


def _missing_advice(url: str) -> str:
    if not is_remote(url):
        return "check the path"
    return f"check the bucket and prefix (endpoint {endpoint() or 'of AWS'})"
