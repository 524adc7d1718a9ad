"""A video that nobody has looked at before: read it, see what it is, or say why it is of no use.

In: a path, a URL or the bytes themselves; a folder, a prefix or a set of shards stands for all of
its videos. Out: bytes and what `svfap_dist.video.probe` finds, or, of shards, what these say.
A video that is of no use is a value: of a thousand some always are. A store that refuses is an
error.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from data_sharding import sources
from svfap_dist import storage
from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import MANIFEST_NAME
from svfap_dist.shards.reader import BadSample, SampleReader
from svfap_dist.video.info import VIDEO_SUFFIXES, VideoInfo
from svfap_dist.video.probe import Rejected, probe

Opened = tuple[bytes, VideoInfo]


@dataclasses.dataclass(frozen=True)
class BadVideo:
    """A video that cannot be used, and why. reason: one word of a short list, for counting."""

    key: str
    reason: str
    detail: str

    def error(self) -> DecodeError:
        """For those who have no other video to go on with."""
        return DecodeError(
            "Video cannot be used",
            where=self.key,
            found=f"{self.reason}: {self.detail}",
            do="give a whole video of a usual kind",
        )


@dataclasses.dataclass(frozen=True)
class Video:
    """A video by name; `open` reads it."""

    key: str
    open: Callable[[], Opened | BadVideo]


def read(video: str | bytes, min_frames: int = 1) -> Opened | BadVideo:
    """The bytes of a video (path, URL or bytes) and what it is.

    Raises: StorageError, but not for a file that is missing.
    """
    key = video if isinstance(video, str) else f"{len(video)} bytes"
    try:
        data = storage.read_bytes(video) if isinstance(video, str) else video
    except storage.StorageMissingError as error:
        return BadVideo(key, "missing", error.found)
    info = probe(data, min_frames)
    return BadVideo(key, info.reason, info.detail) if isinstance(info, Rejected) else (data, info)


def of_inputs(inputs: Iterable[str]) -> list[Video]:
    """The videos that inputs stand for: a file each, or all those of a folder or set of shards.

    Raises: ConfigError if one is given twice; ShardError if a folder has none; StorageError.
    """
    videos = [video for text in inputs for video in _of_input(text)]
    seen: set[str] = set()
    for video in videos:
        if video.key in seen:
            raise ConfigError(
                "Two videos of the same name",
                where=video.key,
                found="it was given twice, or is in two sets of shards",
                do="give each video once, and one set of shards at a time",
            )
        seen.add(video.key)
    return videos


def _of_input(text: str) -> Iterator[Video]:
    is_file = text.rpartition(".")[2].lower() in VIDEO_SUFFIXES
    if not is_file and storage.exists(storage.join(text, MANIFEST_NAME)):
        yield from _of_shards(text)
    elif not is_file and (storage.is_remote(text) or os.path.isdir(storage.local_path(text))):
        for found in sources.load("folder").samples(text):
            yield Video(found.where, partial(read, found.where))
    else:
        yield Video(text, partial(read, text))


def _of_shards(url: str) -> Iterator[Video]:
    manifest = shard_format.load_manifest(url)
    shard_format.check_shards(url, manifest)
    reader = SampleReader(url, manifest)
    index = 0
    for entry in manifest.shards:
        for key in shard_format.load_index(url, entry).keys:
            yield Video(key, partial(_read_sample, reader, index))
            index += 1


def _read_sample(reader: SampleReader, index: int) -> Opened | BadVideo:
    found = reader.read(index)
    if isinstance(found, BadSample):
        return BadVideo(found.key, found.reason, found.detail)
    return found.video, found.info
