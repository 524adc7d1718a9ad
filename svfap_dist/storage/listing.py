"""All files below a URL, one at a time and with their sizes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from svfap_dist.storage.counting import LIST
from svfap_dist.storage.requests import request
from svfap_dist.storage.urls import filesystem, is_remote, local_path


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
