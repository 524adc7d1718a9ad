"""Files by URL: plain paths, `file://` and `s3://` through fsspec, with errors a user can act on.

All reads and writes of shards, manifests, checkpoints and run files go through here. Two promises:
a write is whole or absent (local files are written beside their target and renamed; an S3 put is atomic by
itself), and whatever the store answers comes out as `StorageError`, never as a client library's exception.

S3 settings come from the usual AWS variables and `AWS_ENDPOINT_URL`. The file system object is made lazily in
the process that uses it: an s3fs object that crosses a fork hangs (s3fs#369).
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from typing import Any

from svfap_dist.errors import StorageError

# Few, short attempts: a wrong endpoint must be told in seconds, while SlowDown answers still get a second chance.
_S3_CLIENT_CONFIG = {
    "connect_timeout": 5,
    "read_timeout": 60,
    "retries": {"max_attempts": 4, "mode": "standard"},
}
_ATTEMPTS = 3


def is_remote(url: str) -> bool:
    """Whether `url` names an object store and not a local path."""
    return "://" in url and not url.startswith("file://")


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or path."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def local_path(url: str) -> str:
    """The path of a `file://` URL or of a plain path."""
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    if not is_remote(url):
        return fsspec.filesystem("file"), local_path(url)
    options: dict[str, Any] = {}
    if url.startswith("s3://"):
        # Stores other than AWS often lack the newer checksum headers (Ceph RGW answers 411 or 400).
        if os.environ.get("AWS_ENDPOINT_URL"):
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
            os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        options = {"config_kwargs": _S3_CLIENT_CONFIG, "use_listings_cache": False}
    fs, path = fsspec.core.url_to_fs(url, **options)
    if hasattr(fs, "retries"):
        fs.retries = _ATTEMPTS
    return fs, path


@contextlib.contextmanager
def _explained(action: str, url: str) -> Iterator[None]:
    """Turn what a store raises into a `StorageError` that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise StorageMissing(
            f"Cannot {action}", where=url, found="nothing there", do=_missing_advice(url)
        ) from error
    except PermissionError as error:
        raise StorageError(
            f"Cannot {action}",
            where=url,
            found=f"access denied ({error})",
            do="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the rights on the folder",
        ) from error
    except Exception as error:
        raise _from_client(action, url, error) from error


def _missing_advice(url: str) -> str:
    return (
        f"check the bucket and prefix (endpoint {_endpoint()})"
        if is_remote(url)
        else "check the path"
    )


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL", "of AWS")


def _from_client(action: str, url: str, error: Exception) -> StorageError:
    """The `StorageError` for an exception of the operating system or of an object store's client."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"Cannot {action}", where=url, found="no space left", do="free space or use another URL"
        )
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageError(f"Cannot {action}", where=url, found="no credentials", do=advice)
    if isinstance(error, (ConnectionError, TimeoutError)) or kind.endswith(
        ("ConnectionError", "TimeoutError")
    ):
        advice = "check AWS_ENDPOINT_URL and that the store is up, then run the same command again"
        return StorageUnreachable(
            f"Cannot {action}", where=url, found=f"no answer from endpoint {_endpoint()}", do=advice
        )
    found = f"{kind}: {error}".strip().rstrip(":")
    return StorageError(
        f"Cannot {action}", where=url, found=found, do="see the message of the store"
    )


class StorageMissing(StorageError):
    """Nothing is stored under the URL."""


class StorageUnreachable(StorageError):
    """The store does not answer."""

    retryable = True


def read_bytes(url: str) -> bytes:
    """Whole content of a file."""
    with _explained("read", url):
        fs, path = _filesystem(url)
        return fs.cat_file(path)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file: one ranged read. Shorter than asked if the file ends before `stop`."""
    with _explained("read", url):
        fs, path = _filesystem(url)
        return fs.cat_file(path, start=start, end=stop)


def write_bytes(url: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    with _explained("write", url):
        fs, path = _filesystem(url)
        if is_remote(url):
            fs.pipe_file(path, data)
            return
        with _renamed_into_place(path) as temporary, open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def upload_file(local: str, url: str) -> None:
    """Copy a local file to `url`, whole or not at all."""
    import shutil

    with _explained("write", url):
        fs, path = _filesystem(url)
        if is_remote(url):
            fs.put_file(local, path)
            return
        with _renamed_into_place(path) as temporary:
            shutil.copyfile(local, temporary)


def download_file(url: str, local: str) -> None:
    """Copy the file at `url` to a local path, whole or not at all."""
    with _explained("read", url):
        fs, path = _filesystem(url)
        with _renamed_into_place(local) as temporary:
            fs.get_file(path, temporary)


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


def exists(url: str) -> bool:
    """Whether a file (not a prefix) is stored under `url`."""
    with _explained("look up", url):
        fs, path = _filesystem(url)
        return fs.isfile(path)


def list_files(url: str) -> dict[str, int]:
    """Sizes in bytes of all files below `url`, by path relative to it; empty if there is none."""
    with _explained("list", url):
        fs, path = _filesystem(url)
        try:
            found = fs.find(path, detail=True)
        except FileNotFoundError:
            return {}
        prefix = path.rstrip("/") + "/"
        names = {name: info["size"] for name, info in found.items() if name.startswith(prefix)}
        return {
            name.removeprefix(prefix): size
            for name, size in sorted(names.items())
            if not name.endswith(".tmp")
        }


def delete(url: str) -> None:
    """Remove a file, or everything below a prefix; no error if there is nothing."""
    with _explained("delete", url):
        fs, path = _filesystem(url)
        if fs.exists(path):
            fs.rm(path, recursive=True)
