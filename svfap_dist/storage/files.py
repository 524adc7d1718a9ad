"""Operations on files by URL: read, write, look up, list and delete.

A write is atomic: local files are written beside their target, flushed and renamed; an S3 put
becomes visible as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator
from typing import Any

from svfap_dist.storage.client import (
    DELETE,
    LIST,
    LOOK_UP,
    READ,
    WRITE,
    counter,
    filesystem,
    is_remote,
    local_path,
    request,
)

_UNFINISHED = re.compile(r".+\.[0-9a-f]{8}\.tmp")


def read_bytes(url: str) -> bytes:
    """Return the content of a file.

    Args:
        url: The file.

    Raises:
        StorageMissingError: There is no such file.
        StorageError: The store refuses or does not answer.
    """
    with request(READ, url):
        fs, path = filesystem(url)
        data = fs.cat_file(path)
        counter.bytes(READ, len(data))
        return data


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of a file, fewer if it ends before `stop`: one ranged read.

    Args:
        url: The file.
        start: First byte.
        stop: Byte after the last one.
    """
    if stop <= start:
        return b""  # S3 has no empty ranges and would send the whole file
    with request(READ, url):
        fs, path = filesystem(url)
        try:
            data = fs.cat_file(path, start=start, end=stop)
        except OSError as error:
            if error.errno == errno.EINVAL and is_remote(url):
                return b""  # S3 refuses (416) a range that starts at or after the end
            raise
        counter.bytes(READ, len(data))
        return data


def write_bytes(url: str, data: bytes) -> None:
    """Write a file atomically.

    Args:
        url: The file; folders above it are made.
        data: Its content.
    """
    with request(WRITE, url):
        fs, path = filesystem(url)
        if is_remote(url):
            fs.pipe_file(path, data)
        else:
            with _renamed_into_place(path) as temporary, open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        counter.bytes(WRITE, len(data))


def upload_file(local: str, url: str) -> None:
    """Copy a local file to a URL atomically.

    Args:
        local: Path of the file.
        url: The copy.
    """
    import shutil

    with request(WRITE, url):
        fs, path = filesystem(url)
        if is_remote(url):
            fs.put_file(local, path)
        else:
            with _renamed_into_place(path) as temporary:
                shutil.copyfile(local, temporary)
                _flush_to_disk(temporary)
        counter.bytes(WRITE, os.path.getsize(local))


def download_file(url: str, local: str) -> None:
    """Copy a file to a local path atomically.

    Args:
        url: The file.
        local: Path of the copy.
    """
    with request(READ, url):
        fs, path = filesystem(url)
        with _renamed_into_place(local) as temporary:
            fs.get_file(path, temporary)
        counter.bytes(READ, os.path.getsize(local))


def exists(url: str) -> bool:
    """Return whether there is a file (not a folder or prefix) at a URL.

    Args:
        url: The file.

    Raises:
        StorageError: The store refuses or does not answer; fsspec's `isfile` would return False.
    """
    with request(LOOK_UP, url):
        fs, path = filesystem(url)
        try:
            return fs.info(path)["type"] == "file"
        except (FileNotFoundError, NotADirectoryError):
            return False


def delete(url: str) -> None:
    """Delete a file, or everything below a folder or prefix; idempotent.

    Args:
        url: What to delete; no error if there is nothing.
    """
    with request(DELETE, url), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _delete_remote(url) if is_remote(url) else _delete_local(local_path(url))


def _delete_remote(url: str) -> None:
    fs, path = filesystem(url)
    if url.startswith("s3://"):
        fs.rm(path, recursive=True)
    else:  # `rm` would expand patterns in the name
        for name in fs.find(path):
            fs.rm_file(name)


def _delete_local(path: str) -> None:
    import shutil

    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def delete_unfinished(folder: str) -> None:
    """Delete the temporary files of killed writers below a local folder.

    Args:
        folder: Path or `file://` URL in which no process is writing now.
    """
    with request(DELETE, folder):
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


def _flush_to_disk(path: str) -> None:
    """Flush a file, which must be on the disk before a commit marker that vouches for it is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(url: str) -> dict[str, int]:
    """Return the sizes in bytes of all files below a URL, by path relative to it.

    Args:
        url: Folder or prefix; without any file, the result is empty.

    Raises:
        StorageMissingError: There is no such bucket.
        StorageError: A folder cannot be read.
    """
    return dict(sorted(walk_files(url)))


def walk_files(url: str) -> Iterator[tuple[str, int]]:
    """Yield (path relative to `url`, size in bytes) of all files below a URL, folder by folder.

    Memory stays constant, for trees of millions of files. Errors are those of `list_files`, raised
    while iterating.

    Args:
        url: Folder or prefix.
    """
    with request(LIST, url):
        found = _walk_remote(url) if is_remote(url) else _walk_local(local_path(url))
        yield from ((name, size) for name, size in found if not name.endswith(".tmp"))


def _walk_remote(url: str) -> Iterator[tuple[str, int]]:
    fs, path = filesystem(url)
    start = path.removesuffix("/") + "/"
    if url.startswith("s3://"):
        files = _walk_s3(fs, start)
    else:
        files = ((name, about["size"]) for name, about in fs.find(path, detail=True).items())
    for name, size in files:
        if name.startswith(start):
            yield name.removeprefix(start), size


def _walk_s3(fs: Any, start: str) -> Iterator[tuple[str, int]]:
    # Page by page: s3fs makes a dict of a dozen fields per file and returns all of them at the end.
    bucket, _, prefix = start.partition("/")
    more: dict[str, str] | None = {}
    while more is not None:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        for file in page.get("Contents", []):
            if not file["Key"].endswith("/"):  # a folder marker of consoles and other clients
                yield f"{bucket}/{file['Key']}", file["Size"]
        token = page.get("NextContinuationToken")
        more = {"ContinuationToken": token} if token else None


def _walk_local(path: str) -> Iterator[tuple[str, int]]:
    # Not fsspec's walk, which skips folders that it may not read; not `os.walk`, which holds the
    # names of all files of a folder.
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
                size = 0  # a broken link is listed; reading it raises
                with contextlib.suppress(OSError):
                    if entry.is_dir():  # or a link to one
                        folders.append(entry.path)
                        continue
                    size = entry.stat().st_size
                yield entry.path.removeprefix(start), size
