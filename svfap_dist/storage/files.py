"""Operations on files by URL: clients, request counts and errors; read, write and delete.

In: a URL of a local file, of S3, or of another store that fsspec knows. Each request is counted
with its outcome, and whatever exception a client raises becomes a `StorageError`. A write is
atomic: local files are written beside their target, flushed and renamed; an S3 put becomes visible
as a whole.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from typing import Any

from svfap_dist.errors import ConfigError, StorageError
from svfap_dist.storage.credentials import refuse_credentials

READ, WRITE, LOOK_UP, LIST, DELETE = OPERATIONS = ("read", "write", "look up", "list", "delete")
OUTCOMES = ("ok", "missing", "unreachable", "refused")  # refused: any other failure

# A wrong endpoint must fail within seconds, while a store that is busy (SlowDown, 503) or drops a
# connection gets a retry. The client retries requests; s3fs, above it, bodies that break off.
_S3_CLIENT_CONFIG = {
    "connect_timeout": 3,
    "read_timeout": 60,
    "retries": {"total_max_attempts": 3, "mode": "standard"},
    # The threads that read bound the requests at a time (data.decode_threads, and those that read
    # ahead). With botocore's 10 connections, all others would wait for these.
    "max_pool_connections": 256,
}
_S3FS_ATTEMPTS = 2
_REMOTE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://")
_UNFINISHED = re.compile(r".+\.[0-9a-f]{8}\.tmp")
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
        url: URL or local path, with or without a slash at its end; empty: the first part is one.
        parts: Relative paths below it.
    """
    if not url:
        return "/".join(parts)
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
    refuse_credentials(url, "a URL that was given")
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
    fs.s3.meta.events.register("request-created.s3", _counter.retry, unique_id="svfap-retries")
    return fs, url.removeprefix("s3://")


def _endpoint() -> str | None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if endpoint := os.environ.get(name):
            refuse_credentials(endpoint, name)
            return endpoint
    return None


@dataclasses.dataclass(frozen=True)
class RequestCounts:
    """Storage requests of this process so far."""

    # By (operation, outcome). A call of this package is one request, whatever it sends and retries.
    requests: dict[tuple[str, str], int]
    bytes: dict[str, int]  # bytes of files read and written, by operation
    # Requests that the S3 client sent again because a store was busy or a connection broke, by
    # operation; without the bodies that s3fs reads again after they broke off.
    retries: dict[str, int]

    def since(self, before: RequestCounts) -> RequestCounts | None:
        """Return what was added since an earlier count, None if nothing was.

        Args:
            before: The earlier count.
        """
        pairs = [(getattr(self, name), getattr(before, name)) for name in vars(self)]
        new = [dict(collections.Counter(now) - collections.Counter(old)) for now, old in pairs]
        return RequestCounts(*new) if any(new) else None


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

    def read_again(self) -> None:
        """Count a ranged read that another client repeats."""
        with self._lock:
            self._retries[READ] += 1

    def counts(self) -> RequestCounts:
        with self._lock:
            return RequestCounts(dict(self._requests), dict(self._bytes), dict(self._retries))

    def add(self, counts: RequestCounts) -> None:
        with self._lock:
            self._requests.update(counts.requests)
            self._bytes.update(counts.bytes)
            self._retries.update(counts.retries)


_counter = _Counter()


def request_counts() -> RequestCounts:
    """Return the storage requests of this process so far."""
    return _counter.counts()


def add_request_counts(counts: RequestCounts) -> None:
    """Count requests that another process made for this one.

    Args:
        counts: Its requests.
    """
    _counter.add(counts)


@contextlib.contextmanager
def counted_request(operation: str, url: str) -> Iterator[None]:
    """Count a request, and turn exceptions of the client into `StorageError`.

    Args:
        operation: One of `OPERATIONS`.
        url: What it is about.
    """
    outcome = "ok"
    try:
        yield
    except ConfigError:  # nothing was requested
        outcome = ""
        raise
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
        if outcome:
            _counter.request(operation, outcome)


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
        do = f"check the bucket and prefix ({place})" if is_remote(url) else "check the path"
        return _missing(action, url, _code_of(error), do)
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


def _missing(action: str, url: str, code: str, do: str) -> StorageError:
    """Return the error for a file or a bucket that is missing."""
    if action == READ:
        if code == "NoSuchBucket":  # no missing file, which callers explain in their own words
            return StorageError(f"Cannot {action}", url, "no such bucket", do)
        return StorageMissingError(f"Cannot {action}", url, "nothing there", do)
    found = "no such bucket" if is_remote(url) else "nothing there"
    return StorageMissingError(f"Cannot {action}", url, found, do)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return _code_of(error) in _NO_SPACE_CODES


def _code_of(error: Exception) -> str:
    """Return the store's own code of an error; empty: it has none."""
    # s3fs raises an OSError from the client's error, which carries the code.
    answer = getattr(error.__cause__ or error, "response", None)
    return answer.get("Error", {}).get("Code", "") if isinstance(answer, dict) else ""


def read_bytes(url: str) -> bytes:
    """Return the content of a file.

    Args:
        url: The file.

    Raises:
        StorageMissingError: There is no such file.
        StorageError: The store refuses or does not answer.
    """
    with counted_request(READ, url):
        fs, path = filesystem(url)
        data = fs.cat_file(path)
        _counter.bytes(READ, len(data))
        return data


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of a file, fewer if it ends before `stop`: one ranged read.

    Args:
        url: The file.
        start: First byte.
        stop: Byte after the last one.
    """
    return bytes(read_buffer(url, start, stop))


def read_buffer(url: str, start: int, stop: int) -> bytes | memoryview:
    """Return what `read_range` does, without copying the bytes that a client has received.

    Args:
        url: The file.
        start: First byte.
        stop: Byte after the last one.
    """
    if stop <= start:
        return b""  # S3 has no empty ranges and would send the whole file
    with counted_request(READ, url):
        fs, path = filesystem(url)
        if url.startswith("s3://"):
            found = fs.read_directly(path, start, stop, on_failure=_counter.read_again)
            if found is not None:
                _counter.bytes(READ, len(found))
                return found
        try:
            data = fs.cat_file(path, start=start, end=stop)
        except OSError as error:
            if error.errno == errno.EINVAL and is_remote(url):
                return b""  # S3 refuses (416) a range that starts at or after the end
            raise
        _counter.bytes(READ, len(data))
        return data


def write_bytes(url: str, data: bytes) -> None:
    """Write a file atomically.

    Args:
        url: The file; folders above it are made.
        data: Its content.
    """
    with counted_request(WRITE, url):
        fs, path = filesystem(url)
        if is_remote(url):
            fs.pipe_file(path, data)
        else:
            with _renamed_into_place(path) as temporary, open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _counter.bytes(WRITE, len(data))


def check_writable(url: str) -> None:
    """Check that a file can be written, by writing an empty one beside it; leave nothing behind.

    Args:
        url: The file; folders above it need not exist.

    Raises:
        StorageError: It cannot.
    """
    beside = url
    if not is_remote(url):
        folder, name = os.path.split(local_path(url))
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        beside = os.path.join(folder, name)
    beside += f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        write_bytes(beside, b"")
    except StorageError as error:
        raise type(error)(error.what, url, error.found, error.do) from error
    with contextlib.suppress(StorageError):  # a store may allow writing only
        delete(beside)


def upload_file(local: str, url: str) -> None:
    """Copy a local file to a URL atomically.

    Args:
        local: Path of the file.
        url: The copy.
    """
    with counted_request(WRITE, url):
        fs, path = filesystem(url)
        if is_remote(url):
            fs.put_file(local, path)
        else:
            with _renamed_into_place(path) as temporary:
                shutil.copyfile(local, temporary)
                with open(temporary, "rb+") as copy:  # on the disk before a commit marker is
                    os.fsync(copy.fileno())
        _counter.bytes(WRITE, os.path.getsize(local))


def download_file(url: str, local: str) -> None:
    """Copy a file to a local path atomically.

    Args:
        url: The file.
        local: Path of the copy.
    """
    with counted_request(READ, url):
        fs, path = filesystem(url)
        with _renamed_into_place(local) as temporary:
            fs.get_file(path, temporary)
        _counter.bytes(READ, os.path.getsize(local))


def exists(url: str) -> bool:
    """Return whether there is a file (not a folder or prefix) at a URL.

    Args:
        url: The file.

    Raises:
        StorageError: The store refuses or does not answer; fsspec's `isfile` would return False.
    """
    return file_size(url) is not None


def file_size(url: str) -> int | None:
    """Return the bytes of a file, None where there is none (or a folder or prefix).

    Args:
        url: The file.

    Raises:
        StorageError: The store refuses or does not answer.
    """
    with counted_request(LOOK_UP, url):
        fs, path = filesystem(url)
        try:
            found = fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found["size"] if found["type"] == "file" else None


def delete(url: str) -> None:
    """Delete a file, or everything below a folder or prefix; idempotent.

    Args:
        url: What to delete; no error if there is nothing.
    """
    with counted_request(DELETE, url), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        fs, path = filesystem(url)
        if url.startswith("s3://"):
            fs.rm(path, recursive=True)
        elif is_remote(url):  # `rm` would expand patterns in the name
            for name in fs.find(path):
                fs.rm_file(name)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def delete_unfinished(folder: str) -> None:
    """Delete the temporary files of killed writers below a local folder.

    Args:
        folder: Path or `file://` URL in which no process is writing now.
    """
    with counted_request(DELETE, folder):
        for place, _, names in os.walk(local_path(folder)):
            for name in filter(_UNFINISHED.fullmatch, names):
                os.unlink(os.path.join(place, name))


@contextlib.contextmanager
def _renamed_into_place(path: str) -> Iterator[str]:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
