"""Videos to run a network on: files, folders and sets of shards, probed when they are read.

In: paths, URLs or bytes; a folder, a prefix or a set of shards means all of its videos. Out: for
each video a name and a function that reads it. An unusable video is a value, not an error: among
thousands there are always some. A store that fails is an error.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from svfap_dist import storage
from svfap_dist.errors import ConfigError, DecodeError, HealthError, ShardError
from svfap_dist.evaluate.runner import Source, ViewedVideo, view_videos
from svfap_dist.evaluate.video_workers import Decoding, UnprobedVideo, VideoWorkers
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import MANIFEST_NAME
from svfap_dist.shards.reader import BadSample, Sample, SampleReader
from svfap_dist.text_file import SAVE_AS_UTF8, decode_text
from svfap_dist.video.info import VIDEO_SUFFIXES, ChooseViews, ClipShape
from svfap_dist.video.names import (
    count_other_videos,
    is_video,
    suffix_of,
    warn_of_other_videos,
)
from svfap_dist.video.probe import Limits

_LIST = "txt"  # ending of lists of videos


class Video(NamedTuple):
    """A video by name; `read` fetches it."""

    key: str
    read: Source


def fetch_video(video: str | bytes, min_frames: int = 1) -> UnprobedVideo | BadSample:
    """Return the bytes of a video, or why there are none.

    Args:
        video: a path, a URL, or the bytes of a file.
        min_frames: shorter videos are to be rejected.

    Raises:
        StorageError: The store fails; a missing file is no error.
    """
    if isinstance(video, bytes):
        return UnprobedVideo(f"{len(video)} bytes", video, min_frames)
    size, most = storage.file_size(video) or 0, Limits().file_bytes
    if size > most:  # known before it is downloaded into memory
        return BadSample(0, video, "too_big", f"{size} bytes, more than {most}")
    try:
        return UnprobedVideo(video, storage.read_bytes(video), min_frames)
    except storage.StorageMissingError as error:
        return BadSample(0, video, "missing", error.found)


def read_video(video: str | bytes, min_frames: int = 1) -> Sample | BadSample:
    """Return the bytes of a video and what they contain, or why it cannot be used.

    It is probed in this process, which a damaged video may hang or crash.

    Args:
        video: a path, a URL, or the bytes of a file.
        min_frames: shorter videos are rejected.

    Raises:
        StorageError: The store fails; a missing file is no error.
    """
    fetched = fetch_video(video, min_frames)
    return fetched if isinstance(fetched, BadSample) else VideoWorkers(Decoding()).probe(fetched)


def list_videos(inputs: Iterable[str]) -> list[Video]:
    """Return the videos of all inputs.

    Args:
        inputs: files, folders, prefixes, lists of files (.txt) or sets of shards.

    Raises:
        ConfigError: A name occurs twice.
        ShardError: A folder has no videos, or shards are incomplete.
        StorageError: The store fails.
    """
    videos = [video for text in inputs for video in _videos_of(text)]
    seen: set[str] = set()
    for video in videos:
        if video.key in seen:
            raise ConfigError(
                "Duplicate video name",
                where=video.key,
                found="it was given twice, or is in two sets of shards",
                do="give each video once, and one set of shards at a time",
            )
        seen.add(video.key)
    return videos


def _videos_of(text: str) -> Iterator[Video]:
    if is_shards(text):
        yield from _videos_of_shards(text)
    else:
        for path, _ in files_of(text):
            yield Video(path, functools.partial(fetch_video, path))


def is_shards(text: str) -> bool:
    """Return whether an input is a set of shards.

    Args:
        text: path or URL.

    Raises:
        StorageError: The store fails.
    """
    return suffix_of(text) not in (*VIDEO_SUFFIXES, _LIST) and storage.exists(
        storage.join(text, MANIFEST_NAME)
    )


def files_of(text: str) -> list[tuple[str, int | None]]:
    """Return the video files of an input that is no set of shards, and sizes where they are known.

    Args:
        text: a file, a folder or prefix, or a list of files (.txt).

    Raises:
        ConfigError: A list cannot be read.
        ShardError: A folder has no videos.
        StorageError: The store fails.
    """
    suffix = suffix_of(text)
    if suffix == _LIST:
        return [(name, None) for name in _files_of_list(text)]
    is_file = suffix in VIDEO_SUFFIXES
    if not is_file and (storage.is_remote(text) or os.path.isdir(storage.local_path(text))):
        return _files_of_folder(text)
    return [(text, None)]


def _files_of_list(url: str) -> list[str]:
    """Return the files that a list names, one per line; relative ones are in the list's folder."""
    try:
        lines = decode_text(storage.read_bytes(url)).splitlines()
    except ValueError as error:
        raise ConfigError("Unreadable list of videos", url, str(error), SAVE_AS_UTF8) from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise ConfigError("Empty list of videos", url, "no names", "write a path or URL per line")
    folder = url.rpartition("/")[0]
    return [
        name if storage.is_remote(name) or name.startswith("/") else storage.join(folder, name)
        for name in names
    ]


def _files_of_folder(folder: str) -> list[tuple[str, int | None]]:
    """Return the video files below a folder or prefix, without hidden ones, in order of path."""
    listed = storage.list_files(folder)
    names = sorted(filter(is_video, listed))
    warn_of_other_videos(folder, count_other_videos(listed))
    if not names:
        raise ShardError(
            "No videos found",
            where=folder,
            found="no video files",
            do=f"check the path; video files end in {', '.join(VIDEO_SUFFIXES)}",
        )
    return [(storage.join(folder, name), listed[name]) for name in names]


def _videos_of_shards(url: str) -> Iterator[Video]:
    manifest = shard_format.load_manifest(url)
    shard_format.check_shards(url, manifest)
    reader = SampleReader(url, manifest)
    index = 0
    for entry in manifest.shards:
        for key in shard_format.load_index(url, entry).keys:
            yield Video(key, functools.partial(reader.read, index))
            index += 1


def view_all(
    sources: Sequence[Source],
    shape: ClipShape,
    choose: ChooseViews,
    function: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    decoding: Decoding,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[ViewedVideo], list[BadSample]]:
    """Return what `view_videos` yields: the videos that could be used, one at least, and the rest.

    Args:
        sources: read one video each.
        shape: the network's clips.
        choose: chooses the views of a video.
        function: maps clips, uint8 [B, F, S, S, 3] on the CPU, to outputs [B, ...].
        batch_size: most clips of a call; 0: all views of a video.
        decoding: threads and processes that decode.
        progress: called with the number of videos done.

    Raises:
        DecodeError: No video can be used.
        HealthError: An output is not finite.
    """
    viewed: list[ViewedVideo] = []
    bad: list[BadSample] = []
    found = view_each(sources, shape, choose, function, batch_size=batch_size, decoding=decoding)
    for done, video in enumerate(found, start=1):
        if isinstance(video, ViewedVideo):
            viewed.append(video)
        else:
            bad.append(video)
        progress(done)
    if viewed:
        return viewed, bad
    raise unusable(bad)


def view_each(
    sources: Sequence[Source],
    shape: ClipShape,
    choose: ChooseViews,
    function: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    decoding: Decoding,
    workers: VideoWorkers | None = None,
) -> Iterator[ViewedVideo | BadSample]:
    """Yield what `view_videos` does; outputs that are not finite are an error.

    Args:
        sources: as `view_all`.
        shape: as `view_all`.
        choose: as `view_all`.
        function: as `view_all`.
        batch_size: as `view_all`.
        decoding: as `view_all`.
        workers: as `view_videos`.

    Raises:
        HealthError: An output is not finite.
    """
    found = view_videos(
        sources,
        shape,
        choose,
        function,
        batch_size=batch_size,
        decoding=decoding,
        workers=workers,
    )
    with contextlib.closing(found):
        for video in found:
            if isinstance(video, ViewedVideo) and not np.isfinite(video.outputs).all():
                raise HealthError(
                    "Outputs of the network are not finite",
                    where=video.key,
                    found="NaN or infinite values, though the weights are finite",
                    do="use an earlier checkpoint",
                )
            yield video


def unusable(bad: Sequence[BadSample]) -> DecodeError:
    """Return the error for videos of which none can be used.

    Args:
        bad: the videos, at least one.
    """
    reasons = [f"{video.reason}: {video.detail}" for video in bad]
    if len(bad) == 1:
        found, where = reasons[0], bad[0].key
    else:
        found = "; ".join(f"{v.key}: {reason}" for v, reason in zip(bad[:5], reasons, strict=False))
        where = f"{len(bad)} videos"
    return DecodeError(
        "Video cannot be used" if len(bad) == 1 else "No video can be used",
        where=where,
        found=found,
        do="give complete videos of a common format",
    )
