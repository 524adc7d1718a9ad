"""Divide the videos of a large extraction into parts: a shard each, or a fixed number of files.

In: files, folders, prefixes, lists of files and sets of shards. Out: parts, the same for the same
inputs, and on any machine the sources of a part's videos. A part is small enough to be sent to a
worker: names, no bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Sequence

from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.evaluate.runner import Source
from svfap_dist.inference.videos import fetch_video, files_of, is_shards
from svfap_dist.parallel.processes import ordered_map
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.reader import SampleReader

FILES_PER_PART = 256
_LOOKUPS = 16  # at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """Videos whose features become one file: `files`, or the samples of one shard.

    Attributes:
        number: of the part, from 0.
        num_videos: in it.
        files: paths or URLs.
        sizes: of the files in bytes; None: there is none now.
        shards: URL of the set of shards.
        shard: name of the shard in it.
        first: index of the shard's first sample in the set.
        fingerprint: of the set's manifest.
    """

    number: int
    num_videos: int
    files: tuple[str, ...] = ()
    shards: str = ""
    shard: str = ""
    first: int = 0
    fingerprint: str = ""
    sizes: tuple[int | None, ...] = ()

    @property
    def digest(self) -> str:
        """Return what identifies the videos: names of files, or a shard and its set."""
        names = self.files or (self.fingerprint, self.shard)
        return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()

    def sources(self) -> list[Source]:
        """Return the functions that read the videos.

        Raises:
            ShardError: The set of shards is missing, or has changed.
            StorageError: The store fails.
        """
        if self.files:
            return [functools.partial(fetch_video, path) for path in self.files]
        reader = _reader(self.shards, self.fingerprint)
        last = self.first + self.num_videos
        return [functools.partial(reader.read, index) for index in range(self.first, last)]


@functools.lru_cache(maxsize=2)  # a worker reads one shard of a set after the other
def _reader(url: str, fingerprint: str) -> SampleReader:
    manifest = shard_format.load_manifest(url)
    if manifest.fingerprint != fingerprint:
        found = f"fingerprint {manifest.fingerprint}, at the beginning {fingerprint}"
        advice = "wait until the set is complete, then run the same command again"
        raise ShardError("Shards have changed during the extraction", url, found, advice)
    return SampleReader(url, manifest)


def plan_parts(inputs: Sequence[str]) -> list[Part]:
    """Return the parts: those of each set of shards, then those of all files together.

    Args:
        inputs: files, folders, prefixes, lists of files (.txt) or sets of shards.

    Raises:
        ConfigError: A file or a set of shards is given twice, or a file that is named as an input
            is missing. Those that a list names may be missing.
        ShardError: A folder has no videos, or shards are incomplete.
        StorageError: The store fails.
    """
    parts: list[Part] = []
    files: list[tuple[str, int | None]] = []
    sets: list[str] = []
    for text in inputs:
        if is_shards(text):
            sets.append(text)
            parts += _parts_of_shards(text)
        else:
            files += files_of(text)
    _check_distinct([name for name, _ in files])
    _check_distinct(sets)
    sizes = _sizes_of(files)
    if absent := [text for text in inputs if sizes.get(text, 0) is None]:
        do = "check the path; a file that may be missing can be named in a list (.txt)"
        raise ConfigError("Video not found", absent[0], "no such file", do)
    names = list(sizes)
    for begin in range(0, len(names), FILES_PER_PART):
        chunk = tuple(names[begin : begin + FILES_PER_PART])
        parts.append(Part(0, len(chunk), chunk, sizes=tuple(sizes[name] for name in chunk)))
    return [dataclasses.replace(part, number=number) for number, part in enumerate(parts)]


def _sizes_of(files: Sequence[tuple[str, int | None]]) -> dict[str, int | None]:
    """Return the size of each file, None of a missing one; look up those that are not known."""
    sizes = dict(files)
    unknown = [name for name, size in files if size is None]
    found = ordered_map(storage.file_size, unknown, threads=_LOOKUPS, limit=2 * _LOOKUPS)
    with contextlib.closing(found):
        sizes.update(found)
    return sizes


def _parts_of_shards(url: str) -> list[Part]:
    manifest = shard_format.load_manifest(url)
    shard_format.check_shards(url, manifest)
    parts, first = [], 0
    for entry in manifest.shards:
        count, fingerprint = entry.num_samples, manifest.fingerprint
        parts.append(Part(0, count, (), url, entry.name, first, fingerprint))
        first += count
    return parts


def _check_distinct(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            found, do = "it was given twice", "give each video once"
            raise ConfigError("Duplicate video name", name, found, do)
        seen.add(name)
