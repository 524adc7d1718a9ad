"""Samples -> tar shards and their indexes, under a URL.

webdataset's writer makes the tars, with every field that could differ between two runs fixed, so
equal samples give equal bytes. A shard is written to local disk, read back once for its digests,
uploaded, and then its index after it. The manifest is somebody else's and comes last of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from svfap_dist import storage
from svfap_dist.shard_format import ShardEntry, ShardIndex, VideoInfo, digest, dump

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

_TAR_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video that goes into a shard."""

    key: str
    suffix: str
    data: bytes
    info: VideoInfo


def pack(
    samples: Iterable[Sample], url: str, *, max_samples: int, max_bytes: int
) -> list[ShardEntry]:
    """Write samples, in their order, to `shard-NNNNNN.tar` and `.index.json` files under `url`.

    A shard is closed before it would exceed `max_samples` samples or `max_bytes` bytes of samples
    (the tar's end takes up to 10 KiB more); a sample larger than that has a shard of its own.

    Raises: StorageError if the store or the local temporary folder cannot be written.
    """
    entries: list[ShardEntry] = []
    rest = iter(samples)
    sample = next(rest, None)
    with tempfile.TemporaryDirectory(prefix="svfap-shard-") as folder:
        while sample is not None:
            path = os.path.join(folder, f"shard-{len(entries):06d}.tar")
            with open(path, "wb") as file:
                places, sample = _fill(file, sample, rest, max_samples, max_bytes)
            entries.append(_store(path, places, url))
            os.unlink(path)
    return entries


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a sample lies in its tar."""

    key: str
    offset: int
    size: int
    num_frames: int


def _fill(
    file: BinaryIO, first: Sample, rest: Iterator[Sample], max_samples: int, max_bytes: int
) -> tuple[list[_Place], Sample | None]:
    """Write one tar; returns its samples' places and the first sample that no longer fits."""
    from webdataset.writer import TarWriter  # takes two seconds where torch is installed

    writer = TarWriter(file, encoder=False, user="", group="", mode=0o444, mtime=0)
    try:
        places, following = _write(writer, first, rest, max_samples, max_bytes)
        with _local_disk():
            writer.close()
            file.flush()
    except BaseException:
        # Else the stream would write its rest when it is collected, to a file closed by then.
        with contextlib.suppress(OSError):
            writer.close()
        raise
    return places, following


def _write(
    writer: TarWriter, first: Sample, rest: Iterator[Sample], max_samples: int, max_bytes: int
) -> tuple[list[_Place], Sample | None]:
    places: list[_Place] = []
    sample: Sample | None = first
    while sample is not None:
        # The file's own position lags behind: the writer keeps a block back.
        offset = writer.tarstream.offset
        if places and (len(places) == max_samples or offset + _tar_size(sample) > max_bytes):
            break
        with _local_disk():
            # Two calls, because one call writes members in order of name: JSON comes first, so
            # that a reader can know a sample by its first kilobyte.
            writer.write({"__key__": sample.key, "json": _json(sample.info)})
            writer.write({"__key__": sample.key, sample.suffix: sample.data})
        size = writer.tarstream.offset - offset
        places.append(_Place(sample.key, offset, size, sample.info.num_frames))
        sample = next(rest, None)
    return places, sample


def _json(info: VideoInfo) -> bytes:
    return json.dumps(dataclasses.asdict(info), sort_keys=True).encode()


def _tar_size(sample: Sample) -> int:
    """Bytes of a sample's headers and contents, long names aside."""
    members = (len(_json(sample.info)), len(sample.data))
    return sum(_TAR_BLOCK + -(-size // _TAR_BLOCK) * _TAR_BLOCK for size in members)


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
