"""Fill batches: order, masks, fetching and decoding of the clips of a rank, or of a part of it.

In: a `DataSource`, the arrays of a ring, a range of steps. Out: frames, indices and targets in the
rows of the arrays, and a `FilledBatch` with the rest. What a batch holds follows from its step
alone, so a step can be filled again, in any process. This module does not import torch: a feeder
process needs none.

A slot of a step is part of one task of a thread pool: fetch the sample, have its clips decoded into
the slot's rows of the batch (`clips`), and try a neighbor if it is bad. Tasks share no state, so
their order cannot matter. Threads wait for the store or for workers, or run PyAV, NumPy and
hashing, which release the GIL.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from svfap_dist.config import Config
from svfap_dist.data import masking
from svfap_dist.data.clips import (
    ClipRequest,
    ClipWorker,
    DecodeJob,
    Key,
    SharedArrays,
    window_frames,
)
from svfap_dist.data.decode_pool import ClipDecoder, DecodePool
from svfap_dist.data.read_ahead import ReadAhead
from svfap_dist.data.run_order import RunOrder
from svfap_dist.data.sample_order import Slot
from svfap_dist.data.selection import Selection
from svfap_dist.distributed import World
from svfap_dist.errors import HealthError
from svfap_dist.rng import Stream, digest
from svfap_dist.shards.blocks import Block
from svfap_dist.shards.cache import ShardCache
from svfap_dist.shards.format import BadSample, Manifest, PackedSample
from svfap_dist.shards.reader import SampleReader
from svfap_dist.video.backends import capabilities
from svfap_dist.video.info import TooShortError

_MAX_SLOTS_PER_TASK = 16
_THREADS_PER_REQUEST = 4  # fetching threads for each request that is made ahead of its use
_MAX_SUBSTITUTES = 256  # bad samples in a row that cannot be an accident
_NICENESS = 5  # of the decode workers of a GPU
Part = tuple[int, int]  # number of a part of a rank, and how many there are


@dataclasses.dataclass(frozen=True)
class DataSource:
    """The data of one rank; picklable.

    Args:
        config: Recipe.
        url: Folder or prefix of the shards; empty: a mixture.
        manifest: The data set.
        world: The rank and the number of ranks.
        selection: Samples to train on, and their targets; None: all, without targets.
    """

    config: Config
    url: str
    manifest: Manifest
    world: World
    selection: Selection | None = None

    def order(self) -> RunOrder:
        """Return the order of samples of the run."""
        return RunOrder(self.config, self.manifest, self.selection)

    @property
    def num_slots(self) -> int:
        """Return the number of slots of the rank's batch of a step."""
        return self.config.samples_per_step // self.world.world_size


@dataclasses.dataclass(frozen=True)
class BatchSlots:
    """The slots of a batch, each of one sample; lists with an entry per slot."""

    keys: list[str]  # of the samples that the order chose
    samples: list[int]  # their global indices
    lanes: list[int]
    positions: list[int]  # in the lane
    substituted: list[bool]  # the frames are those of a neighbor, because the sample is bad

    def pack(self) -> PackedSlots:
        """Return them as bytes, so that receiving them costs nothing per slot."""
        return PackedSlots(len(self.keys), pickle.dumps(self))


@dataclasses.dataclass(frozen=True)
class PackedSlots:
    """`BatchSlots` as bytes."""

    count: int
    data: bytes

    def unpack(self) -> BatchSlots:
        """Return the lists."""
        return pickle.loads(self.data)  # noqa: S301 - our own bytes


@dataclasses.dataclass(frozen=True)
class FilledBatch:
    """Metadata of a batch, or of a part of it; picklable."""

    slots: PackedSlots
    ledger: bytes  # lines of the run's ledger, if it has one
    bad: list[BadSample]
    fetch_seconds: float  # summed over the clips, as spent by threads
    decode_seconds: float  # summed over the clips, as spent by threads or workers
    bytes_fetched: int  # from the store, since the batch before


@dataclasses.dataclass(frozen=True)
class _SampleResult:
    """Outcome of reading a sample and cutting clips from it; bad data is a value."""

    index: int
    key: str
    bad: BadSample | None  # None: the clips are in their rows
    fetch_seconds: float
    decode_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class PendingBatch:
    """A batch whose rows are being filled, by one task for a few slots."""

    step: int
    place: int  # index in the ring
    slots: list[Slot]
    tasks: list[Future[list[list[_SampleResult]]]]  # per slot its own sample's, then substitutes'

    @property
    def is_ready(self) -> bool:
        """Whether all rows are filled, or a task has failed."""
        return all(task.done() for task in self.tasks)


class BatchFiller:
    """Fills the rows of a rank, or of one of several equal parts of its lanes.

    A part of a rank is itself like a rank among more ranks: it has fewer lanes, whose samples are
    read by no other part, so parts share no range of a shard.

    Args:
        source: The rank's data.
        arrays: The ring's arrays (`batch.ring_shapes`), of the whole rank.
        decode: Writes the clips of samples to the arrays.
        part: Number of the part and how many there are.

    Raises:
        ConfigError: The shard cache is too small.
    """

    def __init__(
        self,
        source: DataSource,
        arrays: Mapping[str, np.ndarray],
        decode: ClipDecoder,
        part: Part = (0, 1),
    ) -> None:
        config, world = source.config, source.world
        self._source, self._config, self._arrays, self._decode = source, config, arrays, decode
        number, parts = part
        self._rank, self._ranks = world.rank * parts + number, world.world_size * parts
        self._num_slots = source.num_slots // parts
        self._first_slot = number * self._num_slots
        self._order = source.order()
        threads = _share_of(config.data.decode_threads, part)
        self._reader = SampleReader(
            source.url,
            source.manifest,
            range_bytes=1,
            cache_bytes=1,  # what blocks do not read is needed once
            shards=ShardCache.of_node(config.data, source.manifest, world),
        )
        parts_of_node = World(
            self._rank, world.local_rank, self._ranks, world.local_world_size * parts
        )
        data, limit = config.data, config.data.read_ahead_bytes
        if limit:  # else it follows from the number of parts on the node
            data = data.model_copy(update={"read_ahead_bytes": _share_of(limit, part)})
        self._reads = ReadAhead.of_rank(
            config.model_copy(update={"data": data}),
            source.manifest,
            self._reader,
            parts_of_node,
            self._order,
            num_threads=-(-threads // _THREADS_PER_REQUEST),
        )
        self._slots_per_task = 1
        if capabilities(config.decode.backend).batched:
            # Few threads wait with many samples each: one batch is fetched as another is decoded.
            self._slots_per_task = min(self._num_slots, -(-2 * self._num_slots // threads))
        elif config.data.decode_workers:  # each is woken for a few, but gets its share of a batch
            share = self._num_slots // (2 * _share_of(config.data.decode_workers, part))
            self._slots_per_task = max(1, min(_MAX_SLOTS_PER_TASK, share))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="clips")

    def start(self, step: int, place: int) -> PendingBatch:
        """Begin to fill the batch of a step, without waiting for it.

        Args:
            step: Counted over all epochs.
            place: Index of its buffer in the ring, which is free.
        """
        self._reads.advance(step)
        slots = self._order.slots(step, self._rank, self._ranks)
        repeats = self._config.data.repeated_sampling
        first = self._first_slot * repeats
        self._write_masks(slots, place, first)
        self._write_digests(slots, place, first)
        if "sources" in self._arrays:
            of_clips = np.repeat([slot.source for slot in slots], repeats)
            self._arrays["sources"][place, first : first + len(of_clips)] = of_clips
        requests = [
            self._request(slot, place, first + number * repeats)
            for number, slot in enumerate(slots)
        ]
        blocks = [self._reads.block_of(slot) for slot in slots]
        fills = list(zip(slots, requests, blocks, strict=True))
        tasks = [
            self._threads.submit(self._fill, fills[i : i + self._slots_per_task])
            for i in range(0, len(fills), self._slots_per_task)
        ]
        return PendingBatch(step, place, slots, tasks)

    def _write_masks(self, slots: Sequence[Slot], place: int, row: int) -> None:
        config = self._config
        if config.task is not None:  # nothing is masked
            return
        visible, masked = self._arrays["visible"][place], self._arrays["masked"][place]
        keys = (key for slot in slots for key in self._keys("mask", slot))
        for number, key in enumerate(keys, start=row):
            split = masking.split_tokens(
                Stream(*key), config.mask, config.num_tubelets, config.num_patches
            )
            visible[number], masked[number] = split.visible, split.masked

    def _write_digests(self, slots: Sequence[Slot], place: int, row: int) -> None:
        """Write what the device makes the streams of the clips' augmentation from, if it does."""
        if "digests" not in self._arrays:
            return
        keys = (key for slot in slots for key in self._keys("augment", slot))
        for number, key in enumerate(keys, start=row):
            self._arrays["digests"][place, number] = digest(*key).view(np.int64)

    def _keys(self, purpose: str, slot: Slot) -> tuple[Key, ...]:
        """Return a random stream's key per clip of a slot; the first does not depend on repeats."""
        key = (self._config.run.seed, purpose, slot.epoch, slot.sample)
        repeats = range(1, self._config.data.repeated_sampling)
        return (key, *((*key, repeat) for repeat in repeats))

    def _request(self, slot: Slot, place: int, row: int) -> ClipRequest:
        """Return the clips of a slot; their streams are the slot's, whichever sample fills it."""
        config, window = self._config, (self._config.run.seed, "window", slot.epoch, slot.sample)
        crops = self._keys("crop", slot)
        region = config.data.sources[slot.source].region if config.data.is_mixture else None
        if config.task:  # videos may be shorter than a window, which then has frames of all phases
            augments = self._keys("augment", slot)
            return ClipRequest(window, crops, place, row, augments, region=region)
        order = self._order.of_epoch(slot.group, slot.epoch)
        phase = order.window_phase(slot.lane, slot.position, config.data.sampling_rate)
        return ClipRequest(window, crops, place, row, phase=phase, region=region)

    def _fill(self, fills: Sequence[tuple[Slot, ClipRequest, Block]]) -> list[list[_SampleResult]]:
        """Have the clips of some slots written to their rows."""
        firsts = self._read([(slot.sample, request, block) for slot, request, block in fills])
        return [
            [first] if first.bad is None else self._substitute(slot, request, first)
            for (slot, request, _), first in zip(fills, firsts, strict=True)
        ]

    def _fetch(
        self, index: int, request: ClipRequest, block: Block | None
    ) -> PackedSample | BadSample:
        """Fetch the parts of a sample that have the frames of its clips."""
        if self._reader.num_parts == 1:
            return self._reader.fetch(index, None, block)
        num_frames, is_task = self._reader.num_frames(index), self._config.task is not None
        try:
            frames = window_frames(
                num_frames, self._config.data, request.window, request.phase, allow_short=is_task
            )
        except TooShortError:  # raised again, and reported, where the clips are cut
            frames = [0]
        return self._reader.fetch(index, frames, block)

    def _read(self, wanted: Sequence[tuple[int, ClipRequest, Block | None]]) -> list[_SampleResult]:
        """Fetch samples, by global index, and have their clips written to the arrays."""
        results: list[_SampleResult] = []
        jobs: list[DecodeJob] = []
        for index, request, block in wanted:
            began = time.perf_counter()
            packed = self._fetch(index, request, block)
            bad = packed if isinstance(packed, BadSample) else None
            results.append(_SampleResult(index, packed.key, bad, time.perf_counter() - began))
            if not isinstance(packed, BadSample):
                jobs.append(DecodeJob(packed, request))
        decoded = iter(self._decode(jobs) if jobs else [])
        for number, fetched in enumerate(results):
            if fetched.bad is None:
                done = next(decoded)
                results[number] = dataclasses.replace(
                    fetched, bad=done.bad, decode_seconds=done.seconds
                )
        return results

    def _substitute(
        self, slot: Slot, request: ClipRequest, first: _SampleResult
    ) -> list[_SampleResult]:
        """Fill a slot, whose own sample is bad, from the nearest good one."""
        results = [first]
        for index in itertools.islice(_neighbors(self._order, slot), _MAX_SUBSTITUTES):
            results += self._read([(index, request, None)])
            if results[-1].bad is None:
                return results
        where = f"lane {slot.lane}, position {slot.position}"
        found = f"{len(results)} bad samples; the first: {first.bad}"
        do = "run `svfap shards verify` on data.url"
        raise HealthError("Too many unreadable samples in a row", where, found, do)

    def finish(self, batch: PendingBatch) -> FilledBatch:
        """Wait until all rows are filled, and return what is known of them.

        Args:
            batch: From `start`.

        Raises:
            ShardError, StorageError: A shard cannot be read.
            HealthError: A bad sample has no good neighbor.
            ClusterError: Decode workers cannot be started.
        """
        rows = [results for task in batch.tasks for results in task.result()]
        results = [result for of_slot in rows for result in of_slot]
        own = [of_slot[0] for of_slot in rows]
        self._write_targets(batch.place, [of_slot[-1].index for of_slot in rows])
        slots = BatchSlots(
            keys=[result.key for result in own],
            samples=[slot.sample for slot in batch.slots],
            lanes=[slot.lane for slot in batch.slots],
            positions=[slot.position for slot in batch.slots],
            substituted=[result.bad is not None for result in own],
        )
        return FilledBatch(
            slots=slots.pack(),
            ledger=self._ledger(batch.step, batch.slots, slots),
            bad=[result.bad for result in own if result.bad is not None],
            fetch_seconds=sum(result.fetch_seconds for result in results),
            decode_seconds=sum(result.decode_seconds for result in results),
            bytes_fetched=self._reader.take_bytes_fetched(),
        )

    def _write_targets(self, place: int, shown: Sequence[int]) -> None:
        """Write the targets of clips, by the samples that their frames are from."""
        if self._source.selection is None:
            return
        repeats = self._config.data.repeated_sampling
        targets = np.repeat(self._source.selection.targets_of(shown), repeats, axis=0)
        first = self._first_slot * repeats
        self._arrays["targets"][place, first : first + len(targets)] = targets

    def _ledger(self, step: int, places: Sequence[Slot], slots: BatchSlots) -> bytes:
        """Return a line per slot, if the run has a ledger (`telemetry.journal`)."""
        if not self._config.run.ledger:
            return b""
        lines: list[dict[str, int | str | bool]] = [
            {
                "epoch": place.epoch,
                "step": step + 1,
                "lane": place.lane,
                "key": key,
                "substituted": replaced,
            }
            for place, key, replaced in zip(places, slots.keys, slots.substituted, strict=True)
        ]
        if self._config.data.is_mixture:
            for line, place in zip(lines, places, strict=True):
                line["source"] = place.source
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def close(self) -> None:
        """End threads and decode workers."""
        self._decode.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._decode.close()
        self._reads.close()


def open_filler(
    source: DataSource,
    shared: SharedArrays,
    part: Part = (0, 1),
    worker: type[ClipWorker] = ClipWorker,
) -> BatchFiller:
    """Return a filler whose clips are decoded on the host.

    Args:
        source: The rank's data.
        shared: The ring's arrays.
        part: Number of the part and how many there are.
        worker: Class that decodes.
    """
    config = source.config
    is_task = config.task is not None
    augmentation = config.augment if is_task and not config.augments_on_device else None
    does = worker(config.data, config.decode.backend, shared, augmentation, is_task)
    # Where all cores are busy, launching the GPU's next kernels comes first, then fetching. On CPUs
    # a step is as long as its slowest part, and training would starve the workers.
    niceness = _NICENESS if config.cluster.on_gpu else 0
    workers = config.data.decode_workers and _share_of(config.data.decode_workers, part)
    pool = DecodePool(does, workers, config.data.decode_seconds, niceness)
    return BatchFiller(source, shared.arrays, pool, part)


def _share_of(count: int, part: Part) -> int:
    """Return a part's share of a rank's threads, processes or bytes, at least 1."""
    number, parts = part
    return max(1, count // parts + (number < count % parts))


def _neighbors(order: RunOrder, slot: Slot) -> Iterator[int]:
    """Yield substitutes for a slot: samples of its lane before it, nearest first, then after it.

    They are of the same group of samples and epoch.
    """
    of_epoch, first = order.of_epoch(slot.group, slot.epoch), order.first_sample(slot.group)
    before = range(slot.position - 1, -1, -1)
    after = range(slot.position + 1, of_epoch.lane_length)
    for position in itertools.chain(before, after):
        yield first + of_epoch.sample(slot.lane, position)
