"""From a sample's index to its bytes: manifest row, shard index, ranged read, digest, tar members.

In: a global sample index from `data.sample_order`. Out: a `Sample`, or a `BadSample` if its bytes
are not those that were packed. Bad data is a value, since a run of weeks meets some; a shard that
is cut short or missing is an error, since it puts everything read from it in doubt.

Training reads samples in blocks (`shards.blocks`). Other readers go through the shards in order, so
a sample is fetched with a range of its neighbors, which is cached up to a limit of bytes. The first
thread that needs a range or an index fetches it, while others wait for that result. Ranges come
from the node's `ShardCache`, if there is one, or else from the store.

A read has two halves: `SampleReader.fetch` gets the bytes, `format.unpack` opens them. The second
needs no store, so decode workers, which import neither torch nor a client, can do it.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import logging
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

from svfap_dist import storage
from svfap_dist.config import Config, check_window
from svfap_dist.errors import ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.blocks import Block
from svfap_dist.shards.cache import ShardCache
from svfap_dist.shards.format import (
    BadSample,
    Manifest,
    PackedSample,
    Sample,
    ShardEntry,
    ShardIndex,
    unpack,
)

log = logging.getLogger(__name__)

_INDEXED_SAMPLES_KEPT = 256_000  # of indexes in memory, as many shards as they may be
_RANGE_BYTES = 8 << 20
_Value = TypeVar("_Value")


def open_data(config: Config, url: str, trusted: Collection[str] = ()) -> Manifest:
    """Return the manifest of a data set after checking it against its shards.

    A shard of a trusted manifest is checked when it is read.

    Args:
        config: Recipe; for pre-training, each video must have room for its clip; images repeat
            their frame. Tasks accept shorter videos and repeat their last frame.
        url: Folder or prefix of the data set.
        trusted: Fingerprints of manifests whose shards were checked before. Listing those of 100
            million samples takes hundreds of requests, one after the other.

    Raises:
        ShardError, StorageError: The manifest is missing or does not match the shards.
        ConfigError: The shortest video is shorter than a clip's window.
    """
    manifest = shard_format.load_manifest(url)
    if manifest.fingerprint not in trusted:
        shard_format.check_shards(url, manifest)
    if config.task is None and manifest.kind == "videos":
        check_window(config.data, manifest.min_frames, where=url)
    return manifest


class SampleReader:
    """Thread-safe random access to the samples of a data set.

    Args:
        url: Folder or prefix of the data set.
        manifest: Its shards.
        range_bytes: Bytes of a tar fetched at a time; 1: each sample alone.
        cache_bytes: Fetched bytes kept for other samples.
        shards: Copies of shards on this node, if any.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        range_bytes: int = _RANGE_BYTES,
        cache_bytes: int = 256 << 20,
        shards: ShardCache | None = None,
    ) -> None:
        self._url, self._manifest, self._range_bytes = url, manifest, range_bytes
        self._ends = list(itertools.accumulate(shard.num_samples for shard in manifest.shards))
        self._indexes: _LruCache[ShardIndex] = _LruCache(_INDEXED_SAMPLES_KEPT)
        self._ranges: _LruCache[bytes | memoryview] = _LruCache(cache_bytes)
        self._shards = shards
        self._lock = threading.Lock()
        self._bytes_fetched = self._bytes_taken = 0
        self._dropped: set[str] = set()  # shards whose copy was deleted for a wrong digest

    def take_bytes_fetched(self) -> int:
        """Return the bytes of shards that came from the store since the last call."""
        with self._lock:
            total = self._bytes_fetched + (self._shards.bytes_fetched if self._shards else 0)
            taken, self._bytes_taken = total - self._bytes_taken, total
        return taken

    def locate(self, index: int) -> tuple[ShardEntry, int]:
        """Return the shard that holds a sample, and the sample's row in it.

        Args:
            index: Global index, over the shards in manifest order.
        """
        number = bisect.bisect_right(self._ends, index)  # this is called for every clip
        assert index >= 0
        assert number < len(self._ends)
        entry = self._manifest.shards[number]
        return entry, index - (self._ends[number] - entry.num_samples)

    def locate_all(
        self, indices: np.ndarray
    ) -> Iterator[tuple[ShardEntry, ShardIndex, np.ndarray, np.ndarray]]:
        """Yield, for each shard that has some of the samples, the shard, its index, their rows.

        Args:
            indices: Global indices.

        Yields:
            Shard, its index, rows of the samples in it, and their places in `indices`.

        Raises:
            ShardError, StorageError: A shard is without index.
        """
        numbers = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(numbers).tolist():
            entry = self._manifest.shards[number]
            (places,) = np.nonzero(numbers == number)
            rows = indices[places] - (self._ends[number] - entry.num_samples)
            yield entry, self._index_of(entry), rows, places

    def read(self, index: int, frames: Iterable[int] | None = None) -> Sample | BadSample:
        """Fetch and open one sample, or some parts of it.

        Args:
            index: Its global index.
            frames: Numbers of the frames that are needed; None: all.

        Raises:
            ShardError, StorageError: As for `fetch`.
        """
        found = self.fetch(index, frames)
        return found if isinstance(found, BadSample) else unpack(found)

    @property
    def num_parts(self) -> int:
        """Number of parts of a sample."""
        return self._manifest.num_parts

    def num_frames(self, index: int) -> int:
        """Return the length of a sample's video, as its shard's index has it.

        Args:
            index: Its global index.

        Raises:
            ShardError, StorageError: Its shard is without index.
        """
        entry, row = self.locate(index)
        return self._index_of(entry).num_frames[row]

    def fetch(
        self, index: int, frames: Iterable[int] | None = None, block: Block | None = None
    ) -> PackedSample | BadSample:
        """Fetch one sample, or the parts of it that have certain frames, and check their digests.

        Args:
            index: Its global index.
            frames: Numbers of the frames that are needed; None: all.
            block: Block that reads this sample ahead; None: read it alone.

        Raises:
            ShardError, StorageError: Its shard is cut short, missing or without index.
        """
        entry, row = self.locate(index)
        rows, num_parts = self._index_of(entry), self.num_parts
        key, where = rows.keys[row], f"{entry.name} row {row}"
        needed = range(num_parts) if frames is None else {frame % num_parts for frame in frames}
        taken = block.take(entry, rows, row) if block else {}
        parts: list[bytes | memoryview] = []
        for part in sorted(needed):
            place = part * len(rows.keys) + row
            if not rows.sizes[place]:  # of a video of fewer frames than there are phases
                continue
            data = taken[place] if place in taken else self._bytes_of(entry, rows, place)
            found = shard_format.digest(data)
            if found != rows.digests[place] and self._is_copy_to_blame(entry, place in taken):
                data = self._bytes_of(entry, rows, place)
                found = shard_format.digest(data)
            if found != rows.digests[place]:
                detail = f"{where}, part {part}: digest {found}, the index says "
                return BadSample(index, key, "damaged", detail + rows.digests[place])
            parts.append(data)
        data = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
        return PackedSample(index, key, where, data)

    def _index_of(self, entry: ShardEntry) -> ShardIndex:
        return self._indexes.get(
            entry.name, entry.num_samples, lambda: shard_format.load_index(self._url, entry)
        )

    def _is_copy_to_blame(self, entry: ShardEntry, read_ahead: bool) -> bool:
        """Drop a local copy, once per shard; return whether reading again may give other bytes.

        What was read ahead may be of the copy that has been dropped since.
        """
        if self._shards is None:
            return False
        with self._lock:
            if entry.name in self._dropped:
                return read_ahead
            self._dropped.add(entry.name)
        self._shards.drop(entry)
        self._ranges.clear()
        return True

    def _bytes_of(self, entry: ShardEntry, rows: ShardIndex, place: int) -> memoryview:
        """Return a part's bytes of the tar, from the range of neighbors that it belongs to."""
        number, part = rows.offsets[place] // self._range_bytes, place // len(rows.keys)
        section = part * len(rows.keys), (part + 1) * len(rows.keys)
        first = bisect.bisect_left(rows.offsets, number * self._range_bytes, *section)
        end = bisect.bisect_left(rows.offsets, (number + 1) * self._range_bytes, *section)
        start, stop = rows.offsets[first], rows.offsets[end - 1] + rows.sizes[end - 1]
        data = self._ranges.get(
            (entry.name, part, number), stop - start, lambda: self.read_range(entry, start, stop)
        )
        offset = rows.offsets[place] - start
        return memoryview(data)[offset : offset + rows.sizes[place]]

    def read_range(self, entry: ShardEntry, start: int, stop: int) -> bytes | memoryview:
        """Return bytes of a shard, from the node's copy or the store.

        Args:
            entry: The shard.
            start: First byte.
            stop: Byte after the last one.

        Raises:
            ShardError, StorageError: The shard is cut short or missing.
        """
        where = storage.join(self._url, entry.name)
        try:
            kept = self._shards.read(self._url, entry, start, stop) if self._shards else None
            if kept is not None:
                return kept
            data = storage.read_buffer(where, start, stop)
        except storage.StorageUnreachableError:
            raise
        except storage.StorageError:
            # A store may answer with an error where the tar is missing or ends before `start`.
            shard_format.check_shard(self._url, entry)
            raise
        if len(data) < stop - start:
            found = f"{start + len(data)} bytes where the manifest says {entry.num_bytes}"
            do = "copy the shard again from where the data set was made, or shard again"
            raise ShardError("Shard was cut short", where, found, do)
        with self._lock:
            self._bytes_fetched += len(data)
        return data


class _LruCache(Generic[_Value]):
    """Values by key, each made once, by the first thread that needs it; the LRU one is evicted."""

    def __init__(self, limit: int) -> None:  # of the sum of costs; the newest value always stays
        self._limit, self._total = limit, 0
        self._entries: collections.OrderedDict[Hashable, tuple[int, Future[_Value]]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def get(self, key: Hashable, cost: int, make: Callable[[], _Value]) -> _Value:
        """Return the value of `key`; all waiters get an exception of `make`, which is not kept."""
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
                with self._lock:
                    if key in self._entries and self._entries[key][1] is future:
                        self._total -= self._entries.pop(key)[0]
                future.set_exception(error)
        return future.result()

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._total = 0
