"""Files by URL: plain paths, `file://` and `s3://` through fsspec, with errors a user can act on.

All reads and writes of shards, manifests, checkpoints and run files go through here. Two promises:
a write is whole or absent (local files are written beside their target and renamed; an S3 put is
atomic by itself), and whatever the store answers comes out as `StorageError`, never as a client
library's exception.

S3 settings come from the usual AWS variables and `AWS_ENDPOINT_URL`. The file system object is made
lazily in the process that uses it: an s3fs object that crosses a fork hangs (s3fs#369).

What is asked of stores is counted, by what was asked and how it ended, in `counts`: plain numbers,
which cost a request a microsecond; whoever serves metrics reads them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import os
import re
import threading
import uuid
from collections.abc import Iterator
from typing import Any

from svfap_dist.errors import StorageError

# A wrong endpoint must be told within seconds, while a store that is busy (SlowDown, 503) or drops
# a connection gets its second chance. The client retries requests; s3fs on top, broken bodies.
_S3_CLIENT_CONFIG = {
    "connect_timeout": 3,
    "read_timeout": 60,
    "retries": {"total_max_attempts": 3, "mode": "standard"},
}
_S3FS_ATTEMPTS = 2
# What stores answer, as "403 Forbidden" or so, when a user's or bucket's space is used up.
_NO_SPACE_CODES = {"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity"}

READ, WRITE, LOOK_UP, LIST, DELETE = OPERATIONS = ("read", "write", "look up", "list", "delete")
OUTCOMES = ("ok", "missing", "unreachable", "refused")  # refused: anything else that went wrong


@dataclasses.dataclass(frozen=True)
class Counts:
    """What this process has asked of stores so far.

    requests: by operation and outcome; one per call of this module, which may send several, and
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
_counter = _Counter()


def counts() -> Counts:
    """What this process has asked of stores so far."""
    return _counter.counts()


def is_remote(url: str) -> bool:
    """Whether `url` names an object store and not a local path."""
    return "://" in url and not url.startswith("file://")


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or path."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def local_path(url: str) -> str:
    """The path of a `file://` URL or of a plain path."""
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it, for libraries that take the two."""
    import fsspec

    if not is_remote(url):
        return fsspec.filesystem("file"), local_path(url)
    options: dict[str, Any] = {}
    if url.startswith("s3://"):
        # Stores other than AWS often lack the newer checksum headers (Ceph RGW answers 411 or 400).
        if _endpoint():
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
            os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        # The endpoint is named here, and not only by the environment, because fsspec keeps one
        # file system object per set of options.
        options = {
            "endpoint_url": _endpoint(),
            "config_kwargs": _S3_CLIENT_CONFIG,
            "use_listings_cache": False,
        }
    fs, path = fsspec.core.url_to_fs(url, **options)
    if url.startswith("s3://"):
        fs.retries = _S3FS_ATTEMPTS
        # Again at each call, which is cheap, for s3fs may have made another client meanwhile.
        fs.s3.meta.events.register("request-created.s3", _counter.sent, unique_id="svfap-retries")
    return fs, path


@contextlib.contextmanager
def _request(operation: str, url: str) -> Iterator[None]:
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
        _counter.request(operation, outcome)


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
        found = f"no answer from endpoint {_endpoint() or 'of AWS'}"
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
    return f"check the bucket and prefix (endpoint {_endpoint() or 'of AWS'})"


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


class StorageMissing(StorageError):
    """Nothing is stored under the URL."""


class StorageUnreachable(StorageError):
    """The store does not answer."""

    retryable = True


def read_bytes(url: str) -> bytes:
    """Whole content of a file."""
    with _request(READ, url):
        fs, path = filesystem(url)
        data = fs.cat_file(path)
        _counter.bytes(READ, len(data))
        return data


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file: one ranged read. Shorter than asked if the file ends before
    `stop`."""
    if stop <= start:
        return b""  # S3 knows no empty range and would send the whole file
    with _request(READ, url):
        fs, path = filesystem(url)
        try:
            data = fs.cat_file(path, start=start, end=stop)
        except OSError as error:
            if error.errno == errno.EINVAL and is_remote(url):
                return b""  # S3 refuses (416) a range that starts at or after the end
            raise
        _counter.bytes(READ, len(data))
        return data


def write_bytes(url: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    with _request(WRITE, url):
        fs, path = filesystem(url)
        if is_remote(url):
            fs.pipe_file(path, data)
        else:
            with _renamed_into_place(path) as temporary, open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _counter.bytes(WRITE, len(data))


def upload_file(local: str, url: str) -> None:
    """Copy a local file to `url`, whole or not at all."""
    import shutil

    with _request(WRITE, url):
        fs, path = filesystem(url)
        if is_remote(url):
            fs.put_file(local, path)
        else:
            with _renamed_into_place(path) as temporary:
                shutil.copyfile(local, temporary)
                _flush_to_disk(temporary)
        _counter.bytes(WRITE, os.path.getsize(local))


def download_file(url: str, local: str) -> None:
    """Copy the file at `url` to a local path, whole or not at all."""
    with _request(READ, url):
        fs, path = filesystem(url)
        with _renamed_into_place(local) as temporary:
            fs.get_file(path, temporary)
        _counter.bytes(READ, os.path.getsize(local))


_UNFINISHED = re.compile(r".+\.[0-9a-f]{8}\.tmp")


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


def delete_unfinished(folder: str) -> None:
    """Remove the files below a local folder whose writing was killed; nobody may be writing any."""
    with _request(DELETE, folder):
        for place, _, names in os.walk(local_path(folder)):
            for name in filter(_UNFINISHED.fullmatch, names):
                os.unlink(os.path.join(place, name))


def _flush_to_disk(path: str) -> None:
    """A file must be on the disk before another that vouches for it is written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists(url: str) -> bool:
    """Whether a file (not a prefix) is stored under `url`.

    Raises: StorageError if the store does not say; fsspec's own `isfile` would answer "no".
    """
    with _request(LOOK_UP, url):
        fs, path = filesystem(url)
        try:
            return fs.info(path)["type"] == "file"
        except (FileNotFoundError, NotADirectoryError):
            return False


def list_files(url: str) -> dict[str, int]:
    """Sizes in bytes of all files below `url`, by path relative to it; empty if there is none.

    Raises: StorageMissing if there is no such bucket; StorageError if a folder cannot be read.
    """
    return dict(sorted(walk_files(url)))


def walk_files(url: str) -> Iterator[tuple[str, int]]:
    """(path relative to `url`, size in bytes) of all files below it, one at a time, a folder's
    files together: for trees of millions of files, whose listing nobody wants in memory.

    Raises: as `list_files`, when the first file is asked for or later.
    """
    with _request(LIST, url):
        found = _walk_remote(url) if is_remote(url) else _walk_local(local_path(url))
        yield from ((name, size) for name, size in found if not name.endswith(".tmp"))


def _walk_remote(url: str) -> Iterator[tuple[str, int]]:
    fs, path = filesystem(url)
    start = path.rstrip("/") + "/"
    if url.startswith("s3://"):
        files = _walk_s3(fs, start)
    else:
        files = ((name, about["size"]) for name, about in fs.find(path, detail=True).items())
    for name, size in files:
        if name.startswith(start):
            yield name.removeprefix(start), size


def _walk_s3(fs: Any, start: str) -> Iterator[tuple[str, int]]:
    # Page by page: s3fs makes a dict of a dozen fields for each file and gives all at the end.
    bucket, _, prefix = start.partition("/")
    more: dict[str, str] | None = {}
    while more is not None:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        for file in page.get("Contents", []):
            if not file["Key"].endswith("/"):  # a folder, as consoles and other clients make them
                yield f"{bucket}/{file['Key']}", file["Size"]
        token = page.get("NextContinuationToken")
        more = {"ContinuationToken": token} if token else None


def _walk_local(path: str) -> Iterator[tuple[str, int]]:
    # Not fsspec's walk, which passes over folders that it may not read; not `os.walk`, which holds
    # the names of all files of a folder.
    start, folders = os.path.join(path, ""), [path]
    while folders:
        folder = folders.pop()
        try:
            entries = os.scandir(folder)
        except (FileNotFoundError, NotADirectoryError):
            if folder == path:
                return
            raise
        with entries:
            for entry in entries:
                size = 0  # a link that leads nowhere is listed, and tells so when it is read
                with contextlib.suppress(OSError):
                    if entry.is_dir():  # or a link to one
                        folders.append(entry.path)
                        continue
                    size = entry.stat().st_size
                yield entry.path.removeprefix(start), size


def delete(url: str) -> None:
    """Remove a file, or everything below a prefix; no error if there is nothing."""
    with _request(DELETE, url):
        fs, path = filesystem(url)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fs.rm(path, recursive=True)
