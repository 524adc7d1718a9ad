"""The last step of the data's flow: from (seed, step) to a rank's `ClipBatch`, prepared ahead.

In: the configuration, a manifest, the rank's place in the world. Out: one batch per step, the same
bits whatever the number of threads and workers, the step at which a run is taken up again, or how
far ahead the work is; over all ranks, the same samples for every world size.

A slot of a step is one task of a thread pool: fetch the sample, have it decoded and cut straight
into the slot's rows of the batch (`workers`), try a neighbour if it is bad. Nothing passes from
task to task, so their order cannot matter. Threads wait for the store, for workers, or in PyAV,
NumPy and hashing, which let go of Python's lock.

The frames of all batches lie in one block of shared memory, a ring of batches: each is filled again
when the one after it has been asked for. The ring and the reader's cache bound the memory.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future

import torch

from svfap_dist.config import Config, check_world_size
from svfap_dist.data import masking
from svfap_dist.data.cache import shard_cache
from svfap_dist.data.clips import ClipBatch
from svfap_dist.data.device_cutter import DeviceCutter
from svfap_dist.data.order import EpochOrder, Slot, steps_per_epoch
from svfap_dist.data.ring import Ring
from svfap_dist.data.stream import BadSample, Sample, SampleReader, read_ahead
from svfap_dist.data.workers import Key, Outcome, Task, Workers
from svfap_dist.distributed import World
from svfap_dist.errors import HealthError
from svfap_dist.rng import Stream
from svfap_dist.shard_format import Manifest

_SUBSTITUTES_TRIED = 256  # so many bad samples in a row are no accident
_LOOKED_AT = 8  # samples, to know the size of planes


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """What became of reading a sample and cutting a clip out of it."""

    index: int
    key: str
    bad: BadSample | None  # None: there is a clip
    fetch_seconds: float
    decode_seconds: float


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the clips of a slot go: batch of the ring, first row."""

    slot: Slot
    batch: int
    row: int


@dataclasses.dataclass(frozen=True)
class _Wish:
    """A sample to be fetched and cut; the other fields are those of `Task`."""

    index: int
    window: Key | None
    crops: tuple[Key, ...]
    batch: int
    row: int


@dataclasses.dataclass(frozen=True)
class _Unfinished:
    """A batch whose rows are being filled, a task for a few slots."""

    place: int  # in the ring
    slots: list[Slot]
    visible: torch.Tensor
    masked: torch.Tensor
    tasks: list[Future[list[list[_Attempt]]]]  # for each slot its attempts, first its own sample

    @property
    def is_ready(self) -> bool:
        return all(task.done() for task in self.tasks)


class ClipLoader:
    """Batches of one rank.

    Raises: ConfigError if the lanes cannot be shared equally among the ranks, the data set has
    fewer samples than a global batch, or the cache has no room for the shards in use.
    """

    def __init__(self, config: Config, url: str, manifest: Manifest, world: World) -> None:
        check_world_size(config, world.world_size)
        self._config, self._world = config, world
        self._shard_sizes = [shard.num_samples for shard in manifest.shards]
        samples = config.samples_per_step
        self.steps_per_epoch = steps_per_epoch(manifest.num_samples, samples)
        range_bytes, cache_bytes = read_ahead(config, manifest, world)
        self._reader = SampleReader(
            url,
            manifest,
            range_bytes=range_bytes,
            cache_bytes=cache_bytes,
            shards=shard_cache(config, manifest, world),
        )
        self._planes = _planes(config, manifest, self._reader)

    def batches(self, start_step: int, stop_step: int) -> Generator[ClipBatch]:
        """The batches of steps start_step to stop_step - 1, steps counted over all epochs.

        The frames of a batch are overwritten once the next batch is asked for. Work begins with the
        first `next`. Closing the iterator, or an error, ends its threads and workers.

        Raises: ShardError and StorageError from reading; HealthError if no sample near a bad one
        is good; ConfigError if there is no memory for the batches; ClusterError if decode workers
        cannot be started.
        """
        order_of = functools.lru_cache(maxsize=2)(self._order)
        steps = iter(range(start_step, stop_step))
        ahead: collections.deque[_Unfinished] = collections.deque()
        rows = self._config.samples_per_step // self._world.world_size
        clips = rows * self._config.data.repeated_sampling
        with Ring(self._config, clips, planes=self._planes) as ring:
            free = collections.deque(range(ring.length))
            while True:
                for step in itertools.islice(steps, len(free)):
                    epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
                    order = order_of(epoch)
                    ahead.append(self._begin(ring, free.popleft(), order, epoch, step_in_epoch))
                if not ahead:
                    return
                ready = sum(1 for _ in itertools.takewhile(lambda batch: batch.is_ready, ahead))
                batch = ahead.popleft()
                yield self._finish(ring, batch, ready)
                free.append(batch.place)

    def _order(self, epoch: int) -> EpochOrder:
        data = self._config.data
        return EpochOrder(
            self._shard_sizes,
            seed=self._config.run.seed,
            epoch=epoch,
            global_batch_size=self._config.samples_per_step,
            num_lanes=data.num_lanes,
            shuffle_block=data.shuffle_block,
        )

    def _begin(
        self, ring: Ring, place: int, order: EpochOrder, epoch: int, step_in_epoch: int
    ) -> _Unfinished:
        slots = order.slots(step_in_epoch, self._world.rank, self._world.world_size)
        repeats = self._config.data.repeated_sampling
        keys = [key for slot in slots for key in self._keys("mask", epoch, slot)]
        visible, masked = _masks(self._config, [Stream(*key) for key in keys])
        places = [_Place(slot, place, row * repeats) for row, slot in enumerate(slots)]
        tasks = [
            ring.pool.submit(self._fill, ring, places[i : i + ring.slots_at_a_time], order, epoch)
            for i in range(0, len(places), ring.slots_at_a_time)
        ]
        return _Unfinished(place, slots, visible, masked, tasks)

    def _keys(self, purpose: str, epoch: int, slot: Slot) -> tuple[Key, ...]:
        """A random stream for each clip of a slot; the first is the same however many there are."""
        key = (self._config.run.seed, purpose, epoch, slot.sample)
        repeats = range(1, self._config.data.repeated_sampling)
        return (key, *((*key, repeat) for repeat in repeats))

    def _fill(
        self, ring: Ring, places: Sequence[_Place], order: EpochOrder, epoch: int
    ) -> list[list[_Attempt]]:
        """Have the clips of some slots written to their places."""
        wishes = [self._wish(place, place.slot.sample, epoch) for place in places]
        firsts = _try(self._reader, ring.workers, wishes)
        return [
            [first] if first.bad is None else self._substitute(ring, place, order, epoch, first)
            for place, first in zip(places, firsts, strict=True)
        ]

    def _wish(self, place: _Place, index: int, epoch: int) -> _Wish:
        """Sample `index` for a slot; what is random is so by the slot, whatever sample fills it."""
        window = (self._config.run.seed, "window", epoch, place.slot.sample)
        crops = self._keys("crop", epoch, place.slot)
        return _Wish(index, window, crops, place.batch, place.row)

    def _substitute(
        self, ring: Ring, place: _Place, order: EpochOrder, epoch: int, first: _Attempt
    ) -> list[_Attempt]:
        """Fill a slot, whose own sample is bad, by the nearest good one."""
        attempts, slot = [first], place.slot
        for index in itertools.islice(_candidates(order, slot), 1, 1 + _SUBSTITUTES_TRIED):
            attempts += _try(self._reader, ring.workers, [self._wish(place, index, epoch)])
            if attempts[-1].bad is None:
                return attempts
        raise HealthError(
            "No readable sample is near an unreadable one",
            where=f"lane {slot.lane}, position {slot.position}",
            found=f"{len(attempts)} bad samples in a row; the first: {attempts[0].bad}",
            do="run `svfap shards verify` on data.url",
        )

    def _finish(self, ring: Ring, batch: _Unfinished, ready: int) -> ClipBatch:
        """Wait for all rows; the first error of a task is raised here."""
        rows = [tried for task in batch.tasks for tried in task.result()]
        attempts = [attempt for tried in rows for attempt in tried]
        own = [tried[0] for tried in rows]
        return ClipBatch(
            frames=ring.frames(batch.place),
            visible=batch.visible,
            masked=batch.masked,
            keys=[attempt.key for attempt in own],
            samples=[slot.sample for slot in batch.slots],
            lanes=[slot.lane for slot in batch.slots],
            positions=[slot.position for slot in batch.slots],
            substituted=[attempt.bad is not None for attempt in own],
            bad=[attempt.bad for attempt in own if attempt.bad is not None],
            fetch_seconds=sum(attempt.fetch_seconds for attempt in attempts),
            decode_seconds=sum(attempt.decode_seconds for attempt in attempts),
            bytes_fetched=self._reader.take_bytes_fetched(),
            batches_ready=ready,
        )


def held_out_batches(
    config: Config, url: str, manifest: Manifest, world: World, max_clips: int
) -> Generator[ClipBatch]:
    """Fixed clips with fixed masks, for evaluation: the same ones every time.

    They are the first `max_clips` samples of the data set; rank r takes every W-th of them from r
    on, in batches of at most train.micro_batch_size, which may be kept. Bad samples are left out
    and listed. Ranks may get different numbers of clips and batches.
    """
    reader = SampleReader(url, manifest)
    indices = range(world.rank, min(max_clips, manifest.num_samples), world.world_size)
    size = min(config.train.micro_batch_size, len(indices))
    if size == 0:
        return
    with Ring(config, size, length=1) as ring:

        def made(row: int, index: int) -> _Attempt:
            return _try(reader, ring.workers, [_Wish(index, None, (), 0, row)])[0]

        for first in range(0, len(indices), size):
            wanted = indices[first : first + size]
            attempts = list(ring.pool.map(made, range(len(wanted)), wanted))
            if any(attempt.bad is None for attempt in attempts):
                yield _held_out_batch(config, attempts, ring.rgb[0], reader)


def _held_out_batch(
    config: Config, attempts: list[_Attempt], frames: torch.Tensor, reader: SampleReader
) -> ClipBatch:
    rows = [row for row, attempt in enumerate(attempts) if attempt.bad is None]
    good = [attempts[row] for row in rows]
    streams = [Stream(config.run.seed, "held-out", attempt.index) for attempt in good]
    visible, masked = _masks(config, streams)
    return ClipBatch(
        frames=frames[rows],  # a copy
        visible=visible,
        masked=masked,
        keys=[attempt.key for attempt in good],
        samples=[attempt.index for attempt in good],
        lanes=[0] * len(good),  # held-out clips have no lanes: one, in the order of the data set
        positions=[attempt.index for attempt in good],
        substituted=[False] * len(good),
        bad=[attempt.bad for attempt in attempts if attempt.bad is not None],
        fetch_seconds=sum(attempt.fetch_seconds for attempt in attempts),
        decode_seconds=sum(attempt.decode_seconds for attempt in attempts),
        bytes_fetched=reader.take_bytes_fetched(),
    )


def _candidates(order: EpochOrder, slot: Slot) -> Iterator[int]:
    """Samples for a slot, best first: its own, those before it in the lane, those behind it."""
    before = range(slot.position - 1, -1, -1)
    behind = range(slot.position + 1, order.lane_length)
    for position in itertools.chain([slot.position], before, behind):
        yield order.sample(slot.lane, position)


def _try(
    reader: SampleReader, workers: Workers | DeviceCutter, wishes: Sequence[_Wish]
) -> list[_Attempt]:
    """Fetch samples and have their clips cut; a sample that is no use is a value."""
    attempts: list[_Attempt] = []
    tasks: list[Task] = []
    for wish in wishes:
        began = time.perf_counter()
        packed = reader.fetch(wish.index)
        bad = packed if isinstance(packed, BadSample) else None
        attempts.append(_Attempt(wish.index, packed.key, bad, time.perf_counter() - began, 0.0))
        if not isinstance(packed, BadSample):
            tasks.append(Task(packed, wish.window, wish.crops, wish.batch, wish.row))
    outcomes = iter(workers(tasks) if tasks else [])
    return [attempt if attempt.bad else _cut(attempt, next(outcomes)) for attempt in attempts]


def _cut(fetched: _Attempt, outcome: Outcome) -> _Attempt:
    return dataclasses.replace(fetched, bad=outcome.bad, decode_seconds=outcome.seconds)


def _masks(config: Config, streams: list[Stream]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token indices for the clips with these random streams: visible [B, V], masked [B, M]."""
    splits = [masking.predicted_split(stream, config) for stream in streams]
    return (
        torch.stack([torch.from_numpy(split.visible) for split in splits]),
        torch.stack([torch.from_numpy(split.masked) for split in splits]),
    )


def _planes(config: Config, manifest: Manifest, reader: SampleReader) -> tuple[int, int] | None:
    """Height and width of the planes to hand over; None: RGB.

    Planes are for shards of the profile train, whose frames mostly are of one size: the size that a
    few samples, found all over the data set, agree on.
    """
    wish = config.data.colours
    if manifest.profile != "train" or wish == "workers" or config.decode.backend == "dali":
        return None
    if wish == "auto" and not config.cluster.use_gpu:
        return None
    step = -(-manifest.num_samples // _LOOKED_AT)
    found = [reader.read(index) for index in range(0, manifest.num_samples, step)]
    infos = [sample.info for sample in found if isinstance(sample, Sample)]
    sizes = {(info.height, info.width) if info.order else None for info in infos}
    return sizes.pop() if len(sizes) == 1 else None
