"""List the video files below a folder or an S3 prefix, and make samples of them.

There may be millions of files: they are listed once and sorted in a temporary file, and so are
their keys, which have to be unique.

A key is made from the path below the folder. webdataset ends a key at the first dot of the file
name and prints keys in logs, so dots and unprintable characters become `_`. Where that makes two
keys equal (`a.b.mp4` and `a_b.mp4`, `x.mp4` and `x.mov`), every one but the first in order of path
gets `-` and eight digits of the digest of its path. In a store `a//x.mp4` and `a/x.mp4` are two
files; a key has no empty folder names, which no file system could unpack.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from data_sharding import temporary
from data_sharding.sources import SourceVideo
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.video.info import VIDEO_SUFFIXES
from svfap_dist.video.names import (
    count_other_videos,
    is_video,
    suffix_of,
    warn_of_other_videos,
)


class Listing:
    """The videos of a listing, on disk: iterate, repeatedly, over (path, size) in order of path.

    Args:
        files: Paths of all files, with their sizes in bytes.
        is_wanted: Whether a path is that of a file to list.

    Attributes:
        num_others: Files that are not videos, or not of a format that is read.
        other_videos: Videos among them of formats that are not read, by suffix.
    """

    def __init__(
        self, files: Iterable[tuple[str, int]], is_wanted: Callable[[str], bool] = is_video
    ) -> None:
        self._is_wanted = is_wanted
        self._db = temporary.database("create table videos (path blob, size int)")
        self.num_others = 0
        self.other_videos: collections.Counter[str] = collections.Counter()
        with temporary.as_storage_error():
            self._num_videos = self._db.executemany(
                "insert into videos values (?,?)", self._rows(files)
            ).rowcount

    def _rows(self, files: Iterable[tuple[str, int]]) -> Iterator[tuple[bytes, int]]:
        for path, size in files:
            if self._is_wanted(path):
                yield os.fsencode(path), size  # a name need not be text
            else:
                self.num_others += 1
                self.other_videos += count_other_videos([path])

    def __len__(self) -> int:
        return max(self._num_videos, 0)  # SQLite says -1 where there was nothing to do

    def __iter__(self) -> Iterator[tuple[str, int]]:
        with temporary.as_storage_error():
            for path, size in self._db.execute("select path, size from videos order by path"):
                yield os.fsdecode(path), size

    def first(self) -> str:
        """Return the first path, for messages."""
        (path,) = self._db.execute("select min(path) from videos").fetchone()
        return os.fsdecode(path)


def list_videos(folder: str) -> Listing:
    """List the video files below a folder or prefix.

    Hidden files are skipped: macOS leaves `._name.mp4` files, which are not videos.

    Args:
        folder: Path or URL.

    Raises:
        ConfigError: There is no such local folder.
        ShardError: It contains no videos.
    """
    check_folder(folder)
    videos = Listing(storage.walk_files(folder))
    warn_of_other_videos(folder, videos.other_videos)
    if not len(videos):
        others = videos.num_others
        found = f"{others} files, none of them a video" if others else "no files"
        advice = f"check the path; video files end in {', '.join(VIDEO_SUFFIXES)}"
        raise ShardError("No videos found", where=folder, found=found, do=advice)
    return videos


def check_folder(folder: str) -> None:
    """Check that a folder exists, if it is local.

    Args:
        folder: Path or URL.

    Raises:
        ConfigError: It does not, or is a file.
    """
    if not storage.is_remote(folder) and not os.path.isdir(storage.local_path(folder)):
        found = "a file" if os.path.exists(storage.local_path(folder)) else "nothing there"
        raise ConfigError("No such folder", where=folder, found=found, do="check the path")


def printable_key(name: str) -> str:
    """Return the key of a name, which others may have too.

    Args:
        name: Path without its suffix.
    """
    key = "/".join(filter(None, name.split("/")))
    return "".join("_" if c == "." or not c.isprintable() else c for c in key)


class Keys:
    """Makes unique keys; those in use are kept on disk."""

    def __init__(self) -> None:
        self._db = temporary.database("create table keys (key text primary key) without rowid")

    def assign(self, name: str, path: str) -> str:
        """Return a key unlike those returned before.

        Args:
            name: Name from which the key is made.
            path: Unique path, which distinguishes keys of the same name.
        """
        key = printable_key(name)
        with temporary.as_storage_error():
            if not self._is_new(key):
                key += "-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
                self._is_new(key)
        return key

    def _is_new(self, key: str) -> bool:
        return self._db.execute("insert or ignore into keys values (?)", [key]).rowcount == 1


def video_file(
    folder: str,
    path: str,
    size: int,
    key: str = "",
    labels: dict[str, Any] | None = None,
    misfit: str = "",
) -> SourceVideo:
    """Return a video file as a video of a source.

    Args:
        folder: Folder or prefix.
        path: Path of the file below it.
        size: Bytes of the file.
        key: Unique key; "": assigned later.
        labels: What the source knows about the video.
        misfit: Why it is rejected; "": it is not.
    """
    url = storage.join(folder, path)
    read = functools.partial(storage.read_bytes, url)
    return SourceVideo(key, read, labels or {}, url, suffix_of(path), str(size), misfit, size)


class Found(NamedTuple):
    """A video file of a source; see `SourceVideo` for the fields that are not explained here."""

    path: str  # below the folder
    size: int  # bytes
    name: str  # to make the key from
    labels: dict[str, Any]
    misfit: str = ""


def as_videos(folder: str, videos: Iterable[Found]) -> Iterator[SourceVideo]:
    """Yield samples for video files.

    Args:
        folder: Folder or prefix.
        videos: Files below it, in order of path.
    """
    keys = Keys()
    for path, size, name, labels, misfit in videos:
        yield video_file(folder, path, size, keys.assign(name, path), labels, misfit)
