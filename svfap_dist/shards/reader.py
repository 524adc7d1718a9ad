"""From a sample's number to its bytes: manifest row, shard index, ranged read, digest, tar members.

In: a global sample index from `order`. Out: a `Sample`, or a `BadSample` if its bytes are not those
that were packed. Bad data is a value, since a run of weeks meets some; a shard that is cut short or
gone is an error, since then everything read from it is in doubt.

Samples that are used at about the same time lie next to each other in a tar (see `order`), so a
read fetches a whole range of neighbours and keeps it for their turn, up to a limit of bytes. Ranges
and indexes are fetched by whichever thread first wants them, while others wait for that result.
Ranges come out of the node's `ShardCache`, if there is one, and else from the store.

A read has two halves: `SampleReader.fetch` brings the bytes, `unpack` opens them. The second needs
no store, so that decode workers, which import neither torch nor a client, can do it.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import io
import tarfile
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

from svfap_dist import storage
from svfap_dist.config import Config, check_window
from svfap_dist.distributed import World
from svfap_dist.errors import ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.cache import ShardCache
from svfap_dist.shards.format import Manifest, ShardEntry, ShardIndex
from svfap_dist.video.info import VIDEO_SUFFIXES, VideoInfo, load_info

_INDEXES_KEPT = 256
_RANGE_BYTES = 8 << 20
_CACHE_LIMIT = 1 << 30  # bytes per rank
_DENSE = 0.5  # share of samples in use from which their neighbours are worth fetching
_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class PackedSample:
    """A sample's part of a tar, byte for byte as it was packed."""

    index: int
    key: str
    where: str  # shard and row, for messages
    data: bytes


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video as it lies in a shard."""

    index: int
    key: str
    video: bytes
    info: VideoInfo


@dataclasses.dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, and why."""

    index: int
    key: str
    reason: str  # one word of a short list, for counting: damaged, undecodable, too_short, ...
    detail: str


def open_data(config: Config, url: str) -> Manifest:
    """The manifest of a data set, checked against its shards and, for pre-training, against the
    clip's window: those of a task take short videos, too (see `clips`).

    Raises: ShardError if it is missing or does not fit its shards; ConfigError if its shortest
    video has no room for a clip; StorageError from the store.
    """
    manifest = shard_format.load_manifest(url)
    shard_format.check_shards(url, manifest)
    if config.task is None:
        check_window(config, manifest.min_frames, where=url)
    return manifest


class SampleReader:
    """Reads samples by number; any number of threads may share one.

    Args:
        url: the data set's folder or prefix.
        manifest: the data set's shards.
        range_bytes: how much of a tar is fetched at a time; 1: each sample by itself.
        cache_bytes: how many fetched bytes are kept for other samples.
        shards: the node's copies of shards, where there are any.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        range_bytes: int = 8 << 20,
        cache_bytes: int = 256 << 20,
        shards: ShardCache | None = None,
    ) -> None:
        self._url, self._manifest, self._range_bytes = url, manifest, range_bytes
        self._ends = np.cumsum([shard.num_samples for shard in manifest.shards])
        self._indexes: _Cache[ShardIndex] = _Cache(_INDEXES_KEPT)
        self._ranges: _Cache[bytes] = _Cache(cache_bytes)
        self._shards = shards
        self._lock = threading.Lock()
        self._bytes_fetched = self._bytes_taken = 0
        self._doubted: set[str] = set()  # shards whose copy was thrown away

    def take_bytes_fetched(self) -> int:
        """Bytes of shards that came from the store since the last call."""
        with self._lock:
            total = self._bytes_fetched + (self._shards.bytes_fetched if self._shards else 0)
            taken, self._bytes_taken = total - self._bytes_taken, total
        return taken

    def locate(self, index: int) -> tuple[ShardEntry, int]:
        """The shard that holds a sample, and the sample's row in it."""
        assert 0 <= index < self._manifest.num_samples
        number = int(np.searchsorted(self._ends, index, side="right"))
        entry = self._manifest.shards[number]
        return entry, index - (int(self._ends[number]) - entry.num_samples)

    def read(self, index: int) -> Sample | BadSample:
        """Fetch and open one sample; raises what `fetch` raises."""
        found = self.fetch(index)
        return found if isinstance(found, BadSample) else unpack(found)

    def fetch(self, index: int) -> PackedSample | BadSample:
        """Fetch one sample and check its digest.

        Raises: ShardError if its shard is cut short, gone or without index; StorageError from the
        store.
        """
        entry, row = self.locate(index)
        rows = self._indexes.get(entry.name, 1, lambda: shard_format.load_index(self._url, entry))
        where = f"{entry.name} row {row}"
        data = self._bytes_of(entry, rows, row)
        found = shard_format.digest(data)
        if found != rows.digests[row] and self._throw_copy_away(entry):
            data = self._bytes_of(entry, rows, row)
            found = shard_format.digest(data)
        if found != rows.digests[row]:
            detail = f"{where}: digest {found}, the index says {rows.digests[row]}"
            return BadSample(index, rows.keys[row], "damaged", detail)
        return PackedSample(index, rows.keys[row], where, bytes(data))

    def _throw_copy_away(self, entry: ShardEntry) -> bool:
        """Whether reading again may give other bytes: once per shard, if there is a local copy."""
        with self._lock:
            if self._shards is None or entry.name in self._doubted:
                return False
            self._doubted.add(entry.name)
        self._shards.drop(entry)
        self._ranges.clear()
        return True

    def _bytes_of(self, entry: ShardEntry, rows: ShardIndex, row: int) -> memoryview:
        """A sample's bytes of the tar, out of the range of neighbours that it belongs to."""
        number = rows.offsets[row] // self._range_bytes
        first = bisect.bisect_left(rows.offsets, number * self._range_bytes)
        end = bisect.bisect_left(rows.offsets, (number + 1) * self._range_bytes)
        start, stop = rows.offsets[first], rows.offsets[end - 1] + rows.sizes[end - 1]
        data = self._ranges.get(
            (entry.name, number), stop - start, lambda: self._fetch(entry, start, stop)
        )
        offset = rows.offsets[row] - start
        return memoryview(data)[offset : offset + rows.sizes[row]]

    def _fetch(self, entry: ShardEntry, start: int, stop: int) -> bytes:
        where = storage.join(self._url, entry.name)
        try:
            kept = self._shards.read(self._url, entry, start, stop) if self._shards else None
            if kept is not None:
                return kept
            data = storage.read_range(where, start, stop)
        except storage.StorageUnreachableError:
            raise
        except storage.StorageError:
            # A store may answer with an error where the tar is gone or ends before `start`.
            alone = dataclasses.replace(self._manifest, shards=(entry,))
            shard_format.check_shards(self._url, alone)
            raise
        if len(data) < stop - start:
            raise ShardError(
                "Shard was cut short",
                where=where,
                found=f"{start + len(data)} bytes where the manifest says {entry.num_bytes}",
                do="copy the shard again from where the data set was made, or shard again",
            )
        with self._lock:
            self._bytes_fetched += len(data)
        return data


def read_ahead(
    config: Config, manifest: Manifest, world: World, num_selected: int | None = None
) -> tuple[int, int]:
    """Bytes to fetch at a time and bytes to keep, for the lanes of a rank.

    Inside a block samples are used in random order, so fetching neighbours pays only if the blocks
    of all lanes can be kept until they are used up. Where they cannot, samples are fetched alone,
    and so they are where most of their neighbours are not used at all.

    Args:
        num_selected: samples that are used; None: all of the manifest's.
    """
    total = sum(shard.num_bytes for shard in manifest.shards)
    used = manifest.num_samples if num_selected is None else num_selected
    if used < _DENSE * manifest.num_samples:
        return 1, 1
    block = config.data.shuffle_block * total / used
    lanes = config.data.num_lanes // world.world_size
    # A quarter more for large samples; the ranges at both ends of a block reach beyond it.
    wanted = min(total, int(lanes * (1.25 * block + 2 * _RANGE_BYTES)))
    return (_RANGE_BYTES, wanted) if wanted <= _CACHE_LIMIT else (1, 1)


def unpack(packed: PackedSample) -> Sample | BadSample:
    """The video of a sample and what the shard says about it."""
    try:
        members = _tar_members(packed.data)
        info = load_info(members["json"])
        (video,) = (members[suffix] for suffix in VIDEO_SUFFIXES if suffix in members)
        return Sample(packed.index, packed.key, video, info)
    except (KeyError, TypeError, ValueError, tarfile.ReadError) as error:
        detail = f"{packed.where}: no readable video and .json ({error!r})"
        return BadSample(packed.index, packed.key, "malformed", detail)


def _tar_members(data: bytes) -> dict[str, bytes]:
    """Contents of a sample's members by suffix: what follows the first dot, as webdataset has it.

    webdataset itself would bring torch into every decode worker.
    """
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                members[member.name.rpartition("/")[2].partition(".")[2].lower()] = file.read()
    return members


class _Cache(Generic[_Value]):
    """Values by key, each made once by the first thread that asks; the least used are dropped.

    limit: what the costs of all values kept may add up to; the newest is kept in any case.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._entries: collections.OrderedDict[Hashable, tuple[int, Future[_Value]]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def get(self, key: Hashable, cost: int, make: Callable[[], _Value]) -> _Value:
        """The value of `key`; an exception of `make` goes to all who wait, and is not kept."""
        with self._lock:
            known = key in self._entries
            if not known:
                self._entries[key] = cost, Future()
                self._total += cost
            self._entries.move_to_end(key)
            future = self._entries[key][1]
            while self._total > self._limit and len(self._entries) > 1:
                self._total -= self._entries.popitem(last=False)[1][0]
        if not known:
            try:
                future.set_result(make())
            except BaseException as error:
                self._forget(key, future)
                future.set_exception(error)
        return future.result()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._total = 0

    def _forget(self, key: Hashable, future: Future[_Value]) -> None:
        with self._lock:
            if key in self._entries and self._entries[key][1] is future:
                self._total -= self._entries.pop(key)[0]
