"""Single files: read, written whole or not at all, looked up, deleted."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator

from svfap_dist.storage.counting import DELETE, LOOK_UP, READ, WRITE, counter
from svfap_dist.storage.requests import request
from svfap_dist.storage.urls import filesystem, is_remote, local_path

_UNFINISHED = re.compile(r".+\.[0-9a-f]{8}\.tmp")


def read_bytes(url: str) -> bytes:
    """Whole content of a file."""
    with request(READ, url):
        fs, path = filesystem(url)
        data = fs.cat_file(path)
        counter.bytes(READ, len(data))
        return data


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file: one ranged read. Shorter than asked if the file ends before
    `stop`."""
    if stop <= start:
        return b""  # S3 knows no empty range and would send the whole file
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
    """Write a file whole or not at all."""
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
    """Copy a local file to `url`, whole or not at all."""
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
    """Copy the file at `url` to a local path, whole or not at all."""
    with request(READ, url):
        fs, path = filesystem(url)
        with _renamed_into_place(local) as temporary:
            fs.get_file(path, temporary)
        counter.bytes(READ, os.path.getsize(local))


def exists(url: str) -> bool:
    """Whether a file (not a prefix) is stored under `url`.

    Raises: StorageError if the store does not say; fsspec's own `isfile` would answer "no".
    """
    with request(LOOK_UP, url):
        fs, path = filesystem(url)
        try:
            return fs.info(path)["type"] == "file"
        except (FileNotFoundError, NotADirectoryError):
            return False


def delete(url: str) -> None:
    """Remove a file, or everything below a prefix; no error if there is nothing."""
    with request(DELETE, url), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _delete_remote(url) if is_remote(url) else _delete_local(local_path(url))


def _delete_remote(url: str) -> None:
    fs, path = filesystem(url)
    if url.startswith("s3://"):
        fs.rm(path, recursive=True)
    else:  # `rm` would take a name for a pattern
        for name in fs.find(path):
            fs.rm_file(name)


def _delete_local(path: str) -> None:
    import shutil

    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def delete_unfinished(folder: str) -> None:
    """Remove the files below a local folder whose writing was killed; nobody may be writing any."""
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
    """A file must be on the disk before another that vouches for it is written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
