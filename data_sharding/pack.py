"""Samples -> one tar shard and its index, under a URL.

Every field of the tar that could differ between two runs is fixed, so equal samples give equal
bytes. It is written to local disk, read back once for its digests, uploaded, and then its index
after it. That the shard counts is said by another file (`markers`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import tarfile
from collections.abc import Iterable
from typing import IO, Any

from data_sharding import temporary
from data_sharding.make_sample import Sample
from svfap_dist import storage
from svfap_dist.shards.format import ShardEntry, ShardIndex, digest, dump
from svfap_dist.video.info import dump_info


def pack(samples: Iterable[Sample], url: str, name: str) -> ShardEntry | None:
    """Write samples, in their order, to `NAME.tar` and `NAME.index.json` under `url`; nothing, and
    None, if there are none.

    Raises: StorageError if the store or the local temporary folder cannot be written.
    """
    rest = iter(samples)
    first = next(rest, None)
    if first is None:
        return None
    with temporary.file() as (file, path):
        places = _fill(file, itertools.chain([first], rest))
        return _store(path, places, url, name)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a sample lies in its tar."""

    key: str
    offset: int
    size: int
    num_frames: int
    labels: dict[str, Any]


def _fill(file: IO[bytes], samples: Iterable[Sample]) -> list[_Place]:
    """Write a tar; returns its samples' places."""
    places: list[_Place] = []
    tar = tarfile.open(fileobj=file, mode="w")  # noqa: SIM115 - closed where a full disk is told
    try:
        for sample in samples:
            offset = tar.offset
            with temporary.explained():
                # JSON comes first, so that a reader can know a sample by its first kilobyte.
                _add(tar, f"{sample.key}.json", dump_info(sample.info))
                _add(tar, f"{sample.key}.{sample.suffix}", sample.data)
            info = sample.info
            size = tar.offset - offset
            places.append(_Place(sample.key, offset, size, info.num_frames, info.labels))
        with temporary.explained():
            tar.close()
            file.flush()
    except BaseException:
        with contextlib.suppress(OSError):  # what came first is told
            tar.close()
        raise
    return places


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # says nothing of when, where and by whom
    member.size, member.mode = len(content), 0o444
    tar.addfile(member, io.BytesIO(content))


def _store(path: str, places: list[_Place], url: str, name: str) -> ShardEntry:
    """Upload a finished tar and, after it, its index."""
    whole = hashlib.sha256()
    digests: list[str] = []
    with open(path, "rb") as tar:
        for place in places:  # samples follow each other without a gap, from the first byte on
            content = tar.read(place.size)
            whole.update(content)
            digests.append(digest(content))
        whole.update(tar.read())
        num_bytes = tar.tell()
    is_labelled = any("set" in place.labels for place in places)
    index = dump(
        ShardIndex(
            keys=tuple(place.key for place in places),
            offsets=tuple(place.offset for place in places),
            sizes=tuple(place.size for place in places),
            digests=tuple(digests),
            num_frames=tuple(place.num_frames for place in places),
            labels=tuple(place.labels for place in places) if is_labelled else (),
        )
    )
    entry = ShardEntry(
        name=f"{name}.tar",
        num_samples=len(places),
        num_bytes=num_bytes,
        sha256=whole.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    storage.upload_file(path, storage.join(url, entry.name))
    storage.write_bytes(storage.join(url, entry.index_name), index)
    return entry
