"""Reading a data set back: is every byte what the manifest says?

Each shard is fetched whole to local disk and checked three times over: its digest against the
manifest, each sample's digest, members and packet index against the index and the video, and
webdataset, as an outsider, must find the same keys in the same order. The manifest itself must be
that of the shards' markers: one of another day may fit some of them. All damage is collected before
anything is said.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import multiprocessing
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import av
from av.error import FFmpegError

from data_sharding import markers
from data_sharding.progress import Progress, silent
from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest, ShardEntry, ShardIndex
from svfap_dist.video.info import VIDEO_SUFFIXES, VideoInfo, load_info

_SHOWN = 5  # damages told in the message


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was read and found right."""

    url: str
    num_shards: int
    num_samples: int
    num_bytes: int
    fingerprint: str

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.url}: every byte is what the manifest says",
            f"{self.num_samples} samples in {self.num_shards} shards, {self.num_bytes} bytes, "
            f"fingerprint {self.fingerprint}",
        ]


def verify(url: str, progress: Progress = silent, *, workers: int | None = None) -> Verified:
    """Read every shard of a data set and check it; progress counts shards, and damaged ones.

    workers: shards checked at a time; None: by the CPUs.

    Raises: ShardError naming what is damaged; StorageError from the store.
    """
    manifest = shard_format.load_manifest(url)
    damages: list[str] = list(_stale(url, manifest))
    damaged_shards, total = 0, len(manifest.shards)
    progress(0, total, 0)
    with _Keys() as keys:
        for done, (entry, (names, seen)) in enumerate(
            zip(manifest.shards, _check_all(url, manifest.shards, workers), strict=True), start=1
        ):
            found = [*seen, *keys.repeated(names)]
            damages += [f"{entry.name}: {damage}" for damage in found]
            damaged_shards += bool(found)
            progress(done, total, damaged_shards)
    if damages:
        more = f"; and {len(damages) - _SHOWN} more" if len(damages) > _SHOWN else ""
        raise ShardError(
            f"{damaged_shards} of {total} shards are damaged"
            if damaged_shards
            else "Manifest is not that of the shards",
            where=url,
            found="; ".join(damages[:_SHOWN]) + more,
            do="copy them again from where the data set was made, or shard the videos again",
        )
    num_bytes = sum(entry.num_bytes for entry in manifest.shards)
    return Verified(
        url, len(manifest.shards), manifest.num_samples, num_bytes, manifest.fingerprint
    )


def _stale(url: str, manifest: Manifest) -> Iterator[str]:
    """In what the manifest differs from the markers of finished shards."""
    named = {entry.name: entry for entry in manifest.shards}
    numbers = {
        number for name in storage.list_files(url) if (number := markers.number(name)) is not None
    }
    for number in sorted(numbers):
        try:
            entry = markers.load(url, number).entry
        except ShardError as error:
            yield f"{markers.name(number)}: {error.what}"
            continue
        if number >= manifest.num_groups:
            yield f"{markers.name(number)}: not in the manifest: finish the sharding that made it"
        elif entry is not None and named.get(entry.name) != entry:
            yield f"{entry.name}: stale manifest: the shard was made anew since"
    if missing := manifest.num_groups - len([n for n in numbers if n < manifest.num_groups]):
        yield f"{missing} shards have no marker"


class _Keys:
    """All keys of a data set, on disk: memory does not grow with them."""

    def __enter__(self) -> _Keys:
        self._db = sqlite3.connect("")
        self._db.execute("create table keys (key text primary key) without rowid")
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def repeated(self, keys: Sequence[str]) -> list[str]:
        """What is wrong with the keys of one more shard."""
        twice = []
        for key in keys:
            if not self._db.execute("insert or ignore into keys values (?)", [key]).rowcount:
                twice.append(key)
        return [f"key {min(twice)!r} is in another shard too"] if twice else []


def _check_all(
    url: str, entries: Sequence[ShardEntry], workers: int | None
) -> Iterator[tuple[Sequence[str], list[str]]]:
    """Keys of each shard, in order, and what is wrong with it."""
    at_a_time = min(len(os.sched_getaffinity(0)) if workers is None else workers, len(entries) // 2)
    if at_a_time <= 1:
        yield from (_check(url, entry) for entry in entries)
        return
    # Spawned: a forked copy of an S3 client hangs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_a_time, context) as pool:
        waiting = [pool.submit(_check, url, entry) for entry in entries]
        try:
            while waiting:
                yield waiting.pop(0).result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _check(url: str, entry: ShardEntry) -> tuple[Sequence[str], list[str]]:
    try:
        index = shard_format.load_index(url, entry)
    except ShardError as error:
        return (), [f"{error.what} ({error.found})"]
    return index.keys, list(_damages(url, entry, index))


def _damages(url: str, entry: ShardEntry, index: ShardIndex) -> Iterator[str]:
    """What is wrong with one shard."""
    if len(index.keys) != entry.num_samples:
        yield f"{len(index.keys)} samples in the index, {entry.num_samples} in the manifest"
    with tempfile.TemporaryDirectory(prefix="svfap-verify-") as folder:
        path = os.path.join(folder, entry.name)
        try:
            storage.download_file(storage.join(url, entry.name), path)
        except storage.StorageMissingError:
            yield "missing"
            return
        with open(path, "rb") as tar:
            sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
        broken = [key for key, ok in _samples_in(path, index) if not ok]
        if broken:
            yield f"{len(broken)} samples damaged, the first {broken[0]!r}"
        if sha256 != entry.sha256:
            size = os.path.getsize(path)
            yield f"other content than when it was made ({size} of {entry.num_bytes} bytes)"
        elif _keys_for_webdataset(path) != index.keys:
            yield "webdataset finds other samples than the index names"


def _samples_in(path: str, index: ShardIndex) -> Iterator[tuple[str, bool]]:
    """Each key of the index, and whether its bytes are what the index says."""
    labels = index.labels or [None] * len(index.keys)
    columns = (index.keys, index.offsets, index.sizes, index.digests, index.num_frames, labels)
    with open(path, "rb") as tar:
        for key, offset, size, digest, num_frames, said in zip(*columns, strict=True):
            tar.seek(offset)
            content = tar.read(size)
            same = shard_format.digest(content) == digest
            yield key, same and _holds_video(content, key, num_frames, said)


def _holds_video(
    content: bytes, key: str, num_frames: int, labels: Mapping[str, Any] | None
) -> bool:
    members = read_members(content)
    names = {f"{key}.json", *(f"{key}.{suffix}" for suffix in VIDEO_SUFFIXES)}
    if len(members) != 2 or not members.keys() <= names:
        return False
    info = load_info(members.pop(f"{key}.json"))
    (video,) = members.values()
    if info.num_frames != num_frames or labels not in (None, info.labels):
        return False
    return info.layout is None or _packets_fit(video, info)


def _packets_fit(video: bytes, info: VideoInfo) -> bool:
    """Whether the packets of an mp4 lie where the index in its sample's JSON says."""
    assert info.layout is not None
    try:
        with av.open(io.BytesIO(video), "r") as container:
            found = [
                (packet.pos, packet.size) for packet in container.demux(video=0) if packet.size
            ]
    except FFmpegError:
        return False
    start, said = info.layout.first_byte, []
    for size in info.layout.packet_sizes:
        said.append((start, size))
        start += size
    return found == said and len(said) == info.num_frames


def read_members(content: bytes) -> dict[str, bytes]:
    """The members of a sample by name, from its bytes alone; of a cut sample, those still whole."""
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            data = file.read() if file else b""
            if len(data) == member.size:
                members[member.name] = data
    return members


def _keys_for_webdataset(path: str) -> tuple[str, ...]:
    from webdataset.compat import WebDataset  # imports torch where it is installed

    return tuple(sample["__key__"] for sample in WebDataset([path], shardshuffle=False))
