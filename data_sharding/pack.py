"""Samples -> one tar shard and its index, under a URL.

webdataset's writer makes the tar, with every field that could differ between two runs fixed, so
equal samples give equal bytes. It is written to local disk, read back once for its digests,
uploaded, and then its index after it. That the shard counts is said by another file (`markers`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from data_sharding.examine import Sample
from svfap_dist import storage
from svfap_dist.shard_format import ShardEntry, ShardIndex, VideoInfo, digest, dump


def pack(samples: Iterable[Sample], url: str, name: str) -> ShardEntry | None:
    """Write samples, in their order, to `NAME.tar` and `NAME.index.json` under `url`; nothing, and
    None, if there are none.

    Raises: StorageError if the store or the local temporary folder cannot be written.
    """
    rest = iter(samples)
    first = next(rest, None)
    if first is None:
        return None
    with tempfile.TemporaryDirectory(prefix="svfap-shard-") as folder:
        path = os.path.join(folder, f"{name}.tar")
        with open(path, "wb") as file:
            places = _fill(file, itertools.chain([first], rest))
        return _store(path, places, url)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a sample lies in its tar."""

    key: str
    offset: int
    size: int
    num_frames: int


def _fill(file: BinaryIO, samples: Iterable[Sample]) -> list[_Place]:
    """Write a tar; returns its samples' places."""
    from webdataset.writer import TarWriter  # takes two seconds where torch is installed

    writer = TarWriter(file, encoder=False, user="", group="", mode=0o444, mtime=0)
    places: list[_Place] = []
    try:
        for sample in samples:
            # The file's own position lags behind: the writer keeps a block back.
            offset = writer.tarstream.offset
            with _local_disk():
                # Two calls, because one call writes members in order of name: JSON comes first, so
                # that a reader can know a sample by its first kilobyte.
                writer.write({"__key__": sample.key, "json": _json(sample.info)})
                writer.write({"__key__": sample.key, sample.suffix: sample.data})
            size = writer.tarstream.offset - offset
            places.append(_Place(sample.key, offset, size, sample.info.num_frames))
        with _local_disk():
            writer.close()
            file.flush()
    except BaseException:
        # Else the stream would write its rest when it is collected, to a file closed by then.
        with contextlib.suppress(OSError):
            writer.close()
        raise
    return places


def _json(info: VideoInfo) -> bytes:
    return json.dumps(dataclasses.asdict(info), sort_keys=True).encode()


@contextlib.contextmanager
def _local_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{tempfile.gettempdir()} (TMPDIR)"
        raise storage.explain("write temporary file", where, error) from error


def _store(path: str, places: list[_Place], url: str) -> ShardEntry:
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
    index = dump(
        ShardIndex(
            keys=tuple(place.key for place in places),
            offsets=tuple(place.offset for place in places),
            sizes=tuple(place.size for place in places),
            digests=tuple(digests),
            num_frames=tuple(place.num_frames for place in places),
        )
    )
    entry = ShardEntry(
        name=os.path.basename(path),
        num_samples=len(places),
        num_bytes=num_bytes,
        sha256=whole.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    storage.upload_file(path, storage.join(url, entry.name))
    storage.write_bytes(storage.join(url, entry.index_name), index)
    return entry
