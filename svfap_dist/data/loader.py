"""The last step of the data's flow: from (seed, step) to a rank's `ClipBatch`, prepared ahead.

In: the configuration, a manifest, the rank's place in the world. Out: one batch per step, the same
bits whatever the number of threads, the step at which a run is taken up again, or how far ahead the
work is; over all ranks, the same samples for every world size.

A slot of a step is one task of a thread pool: read, decode, crop, mask, write into the slot's row
of the batch (its rows, if a sample is worth several clips). Nothing passes from task to task, so
their order cannot matter. Threads do, and no processes are needed, because PyAV, NumPy, torch and
hashing let go of Python's lock. Only a few steps are in the pool at a time; that and the reader's
cache bound the memory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from svfap_dist.config import Config, check_world_size
from svfap_dist.data import masking
from svfap_dist.data.clips import ClipBatch, fixed_clip, random_clips
from svfap_dist.data.decode_cpu import TooShortError, WrongSizeError
from svfap_dist.data.order import EpochOrder, Slot, steps_per_epoch
from svfap_dist.data.stream import BadSample, Sample, SampleReader
from svfap_dist.distributed import World
from svfap_dist.errors import DecodeError, HealthError
from svfap_dist.rng import Stream
from svfap_dist.shard_format import Manifest

_REASONS = {TooShortError: "too_short", WrongSizeError: "wrong_size"}
_SUBSTITUTES_TRIED = 256  # so many bad samples in a row are no accident
_RANGE_BYTES = 8 << 20
_CACHE_LIMIT = 1 << 30  # bytes per rank


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """What became of reading a sample and cutting a clip out of it."""

    index: int
    key: str
    bad: BadSample | None  # None: there is a clip
    fetch_seconds: float
    decode_seconds: float


@dataclasses.dataclass(frozen=True)
class _Unfinished:
    """A batch whose rows are being filled, a task per slot."""

    slots: list[Slot]
    frames: torch.Tensor
    visible: torch.Tensor
    masked: torch.Tensor
    tasks: list[Future[list[_Attempt]]]  # attempts for the slot, the first for its own sample


class ClipLoader:
    """Batches of one rank.

    Raises: ConfigError if the lanes cannot be shared equally among the ranks, or the data set has
    fewer samples than a global batch.
    """

    def __init__(self, config: Config, url: str, manifest: Manifest, world: World) -> None:
        check_world_size(config, world.world_size)
        self._config, self._world = config, world
        self._shard_sizes = [shard.num_samples for shard in manifest.shards]
        samples = config.samples_per_step
        self.steps_per_epoch = steps_per_epoch(manifest.num_samples, samples)
        range_bytes, cache_bytes = read_ahead(config, manifest, world)
        self._reader = SampleReader(url, manifest, range_bytes=range_bytes, cache_bytes=cache_bytes)

    def batches(self, start_step: int, stop_step: int) -> Generator[ClipBatch]:
        """The batches of steps start_step to stop_step - 1, steps counted over all epochs.

        Work begins with the first `next`. Closing the iterator, or an error, ends its threads.

        Raises: ShardError and StorageError from reading; HealthError if no sample near a bad one
        is good.
        """
        order_of = functools.lru_cache(maxsize=2)(self._order)
        steps = iter(range(start_step, stop_step))
        ahead: collections.deque[_Unfinished] = collections.deque()
        with _thread_pool(self._config) as pool:
            while True:
                room = 1 + self._config.data.prefetch_batches - len(ahead)
                for step in itertools.islice(steps, room):
                    epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
                    ahead.append(self._begin(pool, order_of(epoch), epoch, step_in_epoch))
                if not ahead:
                    return
                yield _finish(ahead.popleft())

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
        self, pool: ThreadPoolExecutor, order: EpochOrder, epoch: int, step_in_epoch: int
    ) -> _Unfinished:
        slots = order.slots(step_in_epoch, self._world.rank, self._world.world_size)
        data = self._config.data
        repeats = data.repeated_sampling
        streams = [s for slot in slots for s in self._streams("mask", epoch, slot)]
        visible, masked = _masks(self._config, streams)
        shape = (len(slots), repeats, data.num_frames, data.frame_size, data.frame_size, 3)
        # Pinned memory lets the copy to a GPU run beside the computation.
        frames = torch.empty(shape, dtype=torch.uint8, pin_memory=self._config.cluster.use_gpu)
        tasks = [
            pool.submit(self._fill, frames[row], slot, order, epoch)
            for row, slot in enumerate(slots)
        ]
        return _Unfinished(slots, frames.flatten(0, 1), visible, masked, tasks)

    def _streams(self, purpose: str, epoch: int, slot: Slot) -> list[Stream]:
        """A stream for each clip of a slot; the first is the same however many there are."""
        key = (self._config.run.seed, purpose, epoch, slot.sample)
        repeats = range(1, self._config.data.repeated_sampling)
        return [Stream(*key), *(Stream(*key, repeat) for repeat in repeats)]

    def _fill(
        self, rows: torch.Tensor, slot: Slot, order: EpochOrder, epoch: int
    ) -> list[_Attempt]:
        """Write a slot's clips into its rows: of its own sample, or of the nearest good one."""

        def cut(
            sample: Sample,
        ) -> list[torch.Tensor]:  # random by the slot, whatever sample fills it
            window = Stream(self._config.run.seed, "window", epoch, slot.sample)
            crops = self._streams("crop", epoch, slot)
            return random_clips(sample.video, sample.info, self._config, window, crops)

        attempts: list[_Attempt] = []
        for index in itertools.islice(_candidates(order, slot), 1 + _SUBSTITUTES_TRIED):
            attempt, clips = _try(self._reader, index, cut)
            attempts.append(attempt)
            if clips is not None:
                for row, clip in zip(rows, clips, strict=True):
                    row.copy_(clip)
                return attempts
        raise HealthError(
            "No readable sample is near an unreadable one",
            where=f"lane {slot.lane}, position {slot.position}",
            found=f"{len(attempts)} bad samples in a row; the first: {attempts[0].bad}",
            do="run `svfap shards verify` on data.url",
        )


def held_out_batches(
    config: Config, url: str, manifest: Manifest, world: World, max_clips: int
) -> Generator[ClipBatch]:
    """Fixed clips with fixed masks, for evaluation: the same ones every time.

    They are the first `max_clips` samples of the data set; rank r takes every W-th of them from r
    on, in batches of at most train.micro_batch_size. Bad samples are left out and listed. Ranks may
    get different numbers of clips and batches.
    """
    reader = SampleReader(url, manifest)
    indices = range(world.rank, min(max_clips, manifest.num_samples), world.world_size)
    size = config.train.micro_batch_size

    def made(index: int) -> tuple[_Attempt, list[torch.Tensor] | None]:
        return _try(reader, index, lambda sample: [fixed_clip(sample.video, sample.info, config)])

    with _thread_pool(config) as pool:
        for first in range(0, len(indices), size):
            results = list(pool.map(made, indices[first : first + size]))
            if any(clips is not None for _, clips in results):
                yield _held_out_batch(config, results)


def _held_out_batch(
    config: Config, results: list[tuple[_Attempt, list[torch.Tensor] | None]]
) -> ClipBatch:
    good = [attempt for attempt, clips in results if clips is not None]
    streams = [Stream(config.run.seed, "held-out", attempt.index) for attempt in good]
    visible, masked = _masks(config, streams)
    return ClipBatch(
        frames=torch.stack([clip for _, clips in results for clip in clips or ()]),
        visible=visible,
        masked=masked,
        keys=[attempt.key for attempt in good],
        samples=[attempt.index for attempt in good],
        lanes=[0] * len(good),  # held-out clips have no lanes: one, in the order of the data set
        positions=[attempt.index for attempt in good],
        substituted=[False] * len(good),
        bad=[attempt.bad for attempt, _ in results if attempt.bad is not None],
        fetch_seconds=sum(attempt.fetch_seconds for attempt, _ in results),
        decode_seconds=sum(attempt.decode_seconds for attempt, _ in results),
    )


def _finish(batch: _Unfinished) -> ClipBatch:
    """Wait for all rows; the first error of a task is raised here."""
    rows = [task.result() for task in batch.tasks]
    own = [attempts[0] for attempts in rows]
    return ClipBatch(
        frames=batch.frames,
        visible=batch.visible,
        masked=batch.masked,
        keys=[attempt.key for attempt in own],
        samples=[slot.sample for slot in batch.slots],
        lanes=[slot.lane for slot in batch.slots],
        positions=[slot.position for slot in batch.slots],
        substituted=[attempt.bad is not None for attempt in own],
        bad=[attempt.bad for attempt in own if attempt.bad is not None],
        fetch_seconds=sum(attempt.fetch_seconds for attempts in rows for attempt in attempts),
        decode_seconds=sum(attempt.decode_seconds for attempts in rows for attempt in attempts),
    )


def _candidates(order: EpochOrder, slot: Slot) -> Iterator[int]:
    """Samples for a slot, best first: its own, those before it in the lane, those behind it."""
    before = range(slot.position - 1, -1, -1)
    behind = range(slot.position + 1, order.lane_length)
    for position in itertools.chain([slot.position], before, behind):
        yield order.sample(slot.lane, position)


def _try(
    reader: SampleReader, index: int, cut: Callable[[Sample], list[torch.Tensor]]
) -> tuple[_Attempt, list[torch.Tensor] | None]:
    """Read a sample and cut its clips, uint8 [F, H, W, 3]; a sample that is no use is a value."""
    began = time.perf_counter()
    found = reader.read(index)
    fetched = time.perf_counter()
    clips, bad = None, None
    if isinstance(found, BadSample):
        bad = found
    else:
        try:
            clips = cut(found)
        except DecodeError as error:
            bad = BadSample(index, found.key, _REASONS.get(type(error), "undecodable"), str(error))
    decoded = time.perf_counter()
    return _Attempt(index, found.key, bad, fetched - began, decoded - fetched), clips


def _masks(config: Config, streams: list[Stream]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token indices for the clips with these random streams: visible [B, V], masked [B, M]."""
    splits = [masking.predicted_split(stream, config) for stream in streams]
    return (
        torch.stack([torch.from_numpy(split.visible) for split in splits]),
        torch.stack([torch.from_numpy(split.masked) for split in splits]),
    )


@contextlib.contextmanager
def _thread_pool(config: Config) -> Iterator[ThreadPoolExecutor]:
    """Threads that are gone when the block is left, however it is left."""
    pool = ThreadPoolExecutor(config.data.decode_threads, thread_name_prefix="clips")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_ahead(config: Config, manifest: Manifest, world: World) -> tuple[int, int]:
    """Bytes to fetch at a time and bytes to keep, for the lanes of a rank.

    Inside a block samples are used in random order, so fetching neighbours pays only if the blocks
    of all lanes can be kept until they are used up. Where they cannot, samples are fetched alone.
    """
    total = sum(shard.num_bytes for shard in manifest.shards)
    block = config.data.shuffle_block * total / manifest.num_samples
    lanes = config.data.num_lanes // world.world_size
    # A quarter more for large samples; the ranges at both ends of a block reach beyond it.
    wanted = min(total, int(lanes * (1.25 * block + 2 * _RANGE_BYTES)))
    return (_RANGE_BYTES, wanted) if wanted <= _CACHE_LIMIT else (1, 1)
