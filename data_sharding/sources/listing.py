"""Video files below a folder or an S3 prefix, as samples: what the sources of real files share.

A key is made from the path below the folder. webdataset ends a key at the first dot of the file
name and prints keys in logs, so dots and unprintable characters become `_`. Where that makes two
keys equal (`a.b.mp4` and `a_b.mp4`, `x.mp4` and `x.mov`), every one but the first in order of path
gets `-` and eight digits of the digest of its path.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from data_sharding.sources import SourceVideo
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.shard_format import VIDEO_SUFFIXES


def list_videos(folder: str) -> dict[str, int]:
    """Sizes in bytes of the video files below a folder or prefix, by relative path, in its order.

    Hidden files are passed over: macOS leaves `._name.mp4` files, which are no videos.

    Raises: ConfigError if there is no such local folder; ShardError if it holds no videos;
    StorageError from the store.
    """
    check_folder(folder)
    files = storage.list_files(folder)
    videos = {path: size for path, size in files.items() if is_video(path)}
    if not videos:
        found = f"{len(files)} files, none of them a video" if files else "no files"
        advice = f"check the path; video files end in {', '.join(VIDEO_SUFFIXES)}"
        raise ShardError("No videos found", where=folder, found=found, do=advice)
    return videos


def check_folder(folder: str) -> None:
    """Raises: ConfigError if `folder` is local and no folder."""
    if not storage.is_remote(folder) and not os.path.isdir(storage.local_path(folder)):
        found = "a file" if os.path.exists(storage.local_path(folder)) else "nothing there"
        raise ConfigError("No such folder", where=folder, found=found, do="check the path")


def is_video(path: str) -> bool:
    """Whether a file's name is that of a video, and not hidden."""
    return suffix_of(path) in VIDEO_SUFFIXES and not os.path.basename(path).startswith(".")


def suffix_of(path: str) -> str:
    """The suffix of a file's name in lower case, without its dot."""
    return os.path.splitext(path)[1].lower().removeprefix(".")


def make_key(name: str, path: str, seen: set[str]) -> str:
    """A key for `name`, unlike those `seen`, to which it is added."""
    key = "".join("_" if c == "." or not c.isprintable() else c for c in name)
    if key in seen:
        key += "-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    seen.add(key)
    return key


def as_samples(
    folder: str, sizes: dict[str, int], named: Iterable[tuple[str, str, dict[str, Any]]]
) -> Iterator[SourceVideo]:
    """Samples for rows of (path below `folder`, name to make the key from, labels)."""
    seen: set[str] = set()
    for path, name, labels in named:
        key = make_key(name, path, seen)
        url = storage.join(folder, path)
        read = functools.partial(storage.read_bytes, url)
        stamp, num_bytes = str(sizes[path]), sizes[path]
        yield SourceVideo(key, read, labels, url, suffix_of(path), stamp, num_bytes=num_bytes)
