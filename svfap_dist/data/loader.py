"""The last step of the data's flow: from (seed, step) to a rank's `ClipBatch`, prepared ahead.

In: the configuration, a manifest, the rank's place in the world; of a labelled set, which samples
are trained on and their targets. Out: one batch per step, the same bits whatever the number of
threads and workers, the step at which a run is taken up again, or how far ahead the work is; over
all ranks, the same samples for every world size.

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
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch

from svfap_dist.config import Config, check_world_size
from svfap_dist.data import masking
from svfap_dist.data.clips import ClipBatch
from svfap_dist.data.ring import Ring, check_made_by_workers
from svfap_dist.data.sample_order import EpochOrder, Slot, steps_per_epoch
from svfap_dist.data.selection import Selection
from svfap_dist.data.tries import Try, try_sample, try_samples
from svfap_dist.data.workers import Cut, Key
from svfap_dist.distributed import World
from svfap_dist.errors import HealthError
from svfap_dist.rng import Stream
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import Sample, SampleReader, ShardCache, read_ahead
from svfap_dist.video.backends import capabilities

_SUBSTITUTES_TRIED = 256  # so many bad samples in a row are no accident
_LOOKED_AT = 8  # samples, to know the size of planes


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the clips of a slot go: batch of the ring, first row."""

    slot: Slot
    batch: int
    row: int


@dataclasses.dataclass(frozen=True)
class _Unfinished:
    """A batch whose rows are being filled, a task for a few slots."""

    place: int  # in the ring
    slots: list[Slot]
    visible: torch.Tensor
    masked: torch.Tensor
    tasks: list[Future[list[list[Try]]]]  # for each slot its tries, first its own sample

    @property
    def is_ready(self) -> bool:
        return all(task.done() for task in self.tasks)


class ClipLoader:
    """Batches of one rank.

    Args:
        selection: the samples to train on, and their targets, which batches then have; None: all.

    Raises: ConfigError if the lanes cannot be shared equally among the ranks, there are fewer
    samples than a global batch has, the cache has no room for the shards in use, or clips of a task
    were to be made on the device.
    """

    def __init__(
        self,
        config: Config,
        url: str,
        manifest: Manifest,
        world: World,
        selection: Selection | None = None,
    ) -> None:
        check_world_size(config, world.world_size)
        check_made_by_workers(config)
        self._config, self._world, self._selection = config, world, selection
        self._shard_sizes = [shard.num_samples for shard in manifest.shards]
        used = manifest.num_samples if selection is None else len(selection)
        self.steps_per_epoch = steps_per_epoch(used, config.samples_per_step)
        range_bytes, cache_bytes = read_ahead(config.data, manifest, world, used)
        self._reader = SampleReader(
            url,
            manifest,
            range_bytes=range_bytes,
            cache_bytes=cache_bytes,
            shards=ShardCache.of_node(config.data, manifest, world),
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
        selected = None if self._selection is None else self._selection.indices
        return EpochOrder.of_run(self._config, self._shard_sizes, epoch, selected)

    def _begin(
        self, ring: Ring, place: int, order: EpochOrder, epoch: int, step_in_epoch: int
    ) -> _Unfinished:
        slots = order.slots(step_in_epoch, self._world.rank, self._world.world_size)
        repeats = self._config.data.repeated_sampling
        keys = [key for slot in slots for key in self._keys("mask", epoch, slot)]
        visible, masked = self._masks([Stream(*key) for key in keys])
        places = [_Place(slot, place, row * repeats) for row, slot in enumerate(slots)]
        tasks = [
            ring.pool.submit(self._fill, ring, places[i : i + ring.slots_at_a_time], order, epoch)
            for i in range(0, len(places), ring.slots_at_a_time)
        ]
        return _Unfinished(place, slots, visible, masked, tasks)

    def _masks(self, streams: Sequence[Stream]) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._config
        if config.task is not None:  # masks nothing
            none = torch.empty((len(streams), 0), dtype=torch.int64)
            return none, none
        return masking.batch_masks(streams, config.mask, config.num_tubelets, config.num_patches)

    def _keys(self, purpose: str, epoch: int, slot: Slot) -> tuple[Key, ...]:
        """A random stream for each clip of a slot; the first is the same however many there are."""
        key = (self._config.run.seed, purpose, epoch, slot.sample)
        repeats = range(1, self._config.data.repeated_sampling)
        return (key, *((*key, repeat) for repeat in repeats))

    def _fill(
        self, ring: Ring, places: Sequence[_Place], order: EpochOrder, epoch: int
    ) -> list[list[Try]]:
        """Have the clips of some slots written to their places."""
        wanted = [(place.slot.sample, self._cut(place, epoch)) for place in places]
        firsts = try_samples(self._reader, ring.workers, wanted)
        return [
            [first] if first.bad is None else self._substitute(ring, place, order, epoch, first)
            for place, first in zip(places, firsts, strict=True)
        ]

    def _cut(self, place: _Place, epoch: int) -> Cut:
        """What is random in it is so by the slot, whatever sample fills that."""
        window = (self._config.run.seed, "window", epoch, place.slot.sample)
        crops = self._keys("crop", epoch, place.slot)
        augments = self._keys("augment", epoch, place.slot) if self._config.task else ()
        return Cut(window, crops, place.batch, place.row, augments)

    def _substitute(
        self, ring: Ring, place: _Place, order: EpochOrder, epoch: int, first: Try
    ) -> list[Try]:
        """Fill a slot, whose own sample is bad, by the nearest good one."""
        tries, slot, cut = [first], place.slot, self._cut(place, epoch)
        for index in itertools.islice(_candidates(order, slot), 1, 1 + _SUBSTITUTES_TRIED):
            tries.append(try_sample(self._reader, ring.workers, index, cut))
            if tries[-1].bad is None:
                return tries
        raise HealthError(
            "No readable sample is near an unreadable one",
            where=f"lane {slot.lane}, position {slot.position}",
            found=f"{len(tries)} bad samples in a row; the first: {tries[0].bad}",
            do="run `svfap shards verify` on data.url",
        )

    def _finish(self, ring: Ring, batch: _Unfinished, ready: int) -> ClipBatch:
        """Wait for all rows; the first error of a task is raised here."""
        rows = [tried for task in batch.tasks for tried in task.result()]
        tries = [each for tried in rows for each in tried]
        own = [tried[0] for tried in rows]
        return ClipBatch(
            frames=ring.frames(batch.place),
            visible=batch.visible,
            masked=batch.masked,
            keys=[each.key for each in own],
            samples=[slot.sample for slot in batch.slots],
            lanes=[slot.lane for slot in batch.slots],
            positions=[slot.position for slot in batch.slots],
            substituted=[each.bad is not None for each in own],
            bad=[each.bad for each in own if each.bad is not None],
            fetch_seconds=sum(each.fetch_seconds for each in tries),
            decode_seconds=sum(each.decode_seconds for each in tries),
            bytes_fetched=self._reader.take_bytes_fetched(),
            batches_ready=ready,
            targets=self._targets([tried[-1].index for tried in rows]),
        )

    def _targets(self, shown: Sequence[int]) -> torch.Tensor | None:
        """Of the clips of a batch, by the samples that their frames were cut from."""
        if self._selection is None:
            return None
        repeats = self._config.data.repeated_sampling
        return torch.from_numpy(np.repeat(self._selection.targets_of(shown), repeats, axis=0))


def _candidates(order: EpochOrder, slot: Slot) -> Iterator[int]:
    """Samples for a slot, best first: its own, those before it in the lane, those behind it."""
    before = range(slot.position - 1, -1, -1)
    behind = range(slot.position + 1, order.lane_length)
    for position in itertools.chain([slot.position], before, behind):
        yield order.sample(slot.lane, position)


def _planes(config: Config, manifest: Manifest, reader: SampleReader) -> tuple[int, int] | None:
    """Height and width of the planes to hand over; None: RGB.

    Planes are for shards of the profile train, whose frames mostly are of one size: the size that a
    few samples, found all over the data set, agree on. Clips of a task are augmented as RGB.
    """
    wish = config.data.colors
    if (
        config.task is not None
        or manifest.profile != "train"
        or wish == "workers"
        or not capabilities(config.decode.backend).gives_planes
    ):
        return None
    if wish == "auto" and not config.cluster.use_gpu:
        return None
    step = -(-manifest.num_samples // _LOOKED_AT)
    found = [reader.read(index) for index in range(0, manifest.num_samples, step)]
    infos = [sample.info for sample in found if isinstance(sample, Sample)]
    sizes = {(info.height, info.width) if info.layout else None for info in infos}
    return sizes.pop() if len(sizes) == 1 else None
