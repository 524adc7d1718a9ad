"""List the files and folders below a URL, also millions of them.

In: a URL of a local folder, of S3, or of another store that fsspec knows. Out: paths relative to it
with their sizes. Temporary files of writers (`*.tmp`) are left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from svfap_dist.storage.files import LIST, counted_request, filesystem, is_remote, local_path

log = logging.getLogger(__name__)


def list_files(url: str) -> dict[str, int]:
    """Return the sizes in bytes of all files below a URL, by path relative to it.

    Args:
        url: Folder or prefix; without any file, the result is empty.

    Raises:
        StorageMissingError: There is no such bucket.
        StorageError: A folder cannot be read.
    """
    return dict(sorted(walk_files(url)))


def list_folders(url: str) -> list[str]:
    """Return the names of the folders in a folder or below a prefix, without listing their files.

    Args:
        url: Folder or prefix; without any folder, the result is empty.

    Raises:
        StorageError: It cannot be read.
    """
    with counted_request(LIST, url):
        fs, path = filesystem(url)
        if url.startswith("s3://"):
            start = path.removesuffix("/") + "/"
            pages = _list_pages(fs, start, Delimiter="/")
            found = [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", [])]
        else:
            try:
                entries = fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            found = [entry["name"] for entry in entries if entry["type"] == "directory"]
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)


def walk_files(url: str) -> Iterator[tuple[str, int]]:
    """Yield (path relative to `url`, size in bytes) of all files below a URL, folder by folder.

    Memory stays constant, for trees of millions of files. Links to local folders are followed; one
    to a folder that is listed anyway, or to one above it, is not, and logged. Errors are those of
    `list_files`, raised while iterating.

    Args:
        url: Folder or prefix.
    """
    with counted_request(LIST, url):
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
    bucket = start.partition("/")[0]
    for page in _list_pages(fs, start):
        for file in page.get("Contents", []):
            if not file["Key"].endswith("/"):  # a folder marker of consoles and other clients
                yield f"{bucket}/{file['Key']}", file["Size"]


def _list_pages(fs: Any, start: str, **options: str) -> Iterator[dict[str, Any]]:
    bucket, _, prefix = start.partition("/")
    more: dict[str, str] | None = {}
    while more is not None:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options, **more)
        yield page
        token = page.get("NextContinuationToken")
        more = {"ContinuationToken": token} if token else None


def _walk_local(path: str) -> Iterator[tuple[str, int]]:
    # Not fsspec's walk, which skips folders that it may not read; not `os.walk`, which holds the
    # names of all files of a folder. Links to folders come after everything else, in order of
    # path, so what is listed under which name does not depend on the order of a folder's entries.
    start, top, links = os.path.join(path, ""), os.path.realpath(path), [path]
    walked: set[str] = set()  # real paths
    skipped: list[str] = []
    while links:
        found: list[str] = []
        for link in links:
            target = os.path.realpath(link)
            if (walked and _is_below(top, target)) or not walked.isdisjoint(_with_parents(target)):
                skipped.append(link)
                continue
            for name, size in _walk_tree(link, target, found, walked):
                yield name.removeprefix(start), size
            walked.add(target)
        links = sorted(found)
    if skipped:
        example = f"{skipped[0]} to {os.path.realpath(skipped[0])}"
        message = (
            "%s: links to folders that are listed already, or above it, are not followed: %d, "
        )
        log.warning(message + "such as %s", path, len(skipped), example)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _with_parents(path: str) -> Iterator[str]:
    """Yield a path and all folders above it."""
    yield path
    while (above := os.path.dirname(path)) != path:
        yield above
        path = above


def _walk_tree(
    path: str, real: str, links: list[str], walked: set[str]
) -> Iterator[tuple[str, int]]:
    """Yield path and size of the files below a folder; add links to folders to `links`.

    Of the folders below it, those whose real path was walked before are left out.
    """
    folders = [path]
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
                    if entry.is_dir():
                        if real + entry.path.removeprefix(path) not in walked:
                            (links if entry.is_symlink() else folders).append(entry.path)
                        continue
                    size = entry.stat().st_size
                yield entry.path, size
