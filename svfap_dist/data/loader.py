"""The data loader: from (seed, step) to a rank's `ClipBatch`, prefetched.

In: the recipe, a manifest, the rank's place in the world; of a labeled set, the samples to train on
and their targets. Out: one batch per step, deterministic: the same bits for any number of threads
and workers, any prefetch depth, and any step at which a run is resumed; over all ranks, the same
samples for every world size.

A slot of a step is part of one task of a thread pool: fetch the sample, have its clips decoded into
the slot's rows of the batch (`clips`), and try a neighbor if it is bad. Tasks share no state, so
their order cannot matter. Threads wait for the store or for workers, or run PyAV, NumPy and
hashing, which release the GIL.

The frames of all batches are in one block of shared memory, a ring of buffers (`batch`): each is
reused when the batch after its own has been requested. The ring and the reader's cache bound the
memory.
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
from svfap_dist.data.batch import BatchRing, ClipBatch, SampleResult
from svfap_dist.data.clips import ClipRequest, Key
from svfap_dist.data.sample_order import EpochOrder, Slot, steps_per_epoch
from svfap_dist.data.selection import Selection
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError, HealthError
from svfap_dist.parallel.processes import in_flight
from svfap_dist.rng import Stream
from svfap_dist.shards.format import Manifest, Sample
from svfap_dist.shards.reader import SampleReader, ShardCache, read_ahead
from svfap_dist.video.backends import DEFAULT, capabilities

_MAX_SUBSTITUTES = 256  # bad samples in a row that cannot be an accident
_PROBED_SAMPLES = 8  # to find the size of planes


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A batch whose rows are being filled, by one task for a few slots."""

    buffer: int  # index in the ring
    slots: list[Slot]
    visible: torch.Tensor
    masked: torch.Tensor
    tasks: list[Future[list[list[SampleResult]]]]  # per slot its own sample's, then substitutes'

    @property
    def is_ready(self) -> bool:
        return all(task.done() for task in self.tasks)


class ClipLoader:
    """Batches of one rank.

    Args:
        config: Recipe.
        url: Folder or prefix of the shards.
        manifest: The data set.
        world: This rank and the number of ranks.
        selection: Samples to train on, and their targets, which batches then have; None: all.

    Raises:
        ConfigError: The lanes cannot be shared equally among the ranks, there are fewer samples
            than a global batch has, the shard cache is too small, or a task's clips would be made
            on the device.
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
        if config.task is not None:
            _check_made_on_host(config)
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
        """Yield the batches of a range of steps, counted over all epochs.

        The frames of a batch are overwritten once the next batch is requested. Work begins with the
        first `next`. Closing the iterator, or an error, ends its threads and workers.

        Args:
            start_step: First step.
            stop_step: Step after the last one.

        Raises:
            ShardError, StorageError: A shard cannot be read.
            HealthError: A bad sample has no good neighbor.
            ConfigError: There is no memory for the batches.
            ClusterError: Decode workers cannot be started.
        """
        selected = None if self._selection is None else self._selection.indices
        order_of = functools.lru_cache(maxsize=2)(
            lambda epoch: EpochOrder.of_run(self._config, self._shard_sizes, epoch, selected)
        )
        started: collections.deque[_Pending] = collections.deque()
        rows = self._config.samples_per_step // self._world.world_size
        clips = rows * self._config.data.repeated_sampling
        with BatchRing(self._config, clips, self._planes) as ring:

            def start(step: int) -> _Pending:
                epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
                buffer = (step - start_step) % ring.length
                started.append(self._start(ring, buffer, order_of(epoch), epoch, step_in_epoch))
                return started[-1]

            for _, pending in in_flight(start, range(start_step, stop_step), ring.length):
                ready = sum(1 for _ in itertools.takewhile(lambda batch: batch.is_ready, started))
                started.popleft()
                yield self._finish(ring, pending, ready)

    def _start(
        self, ring: BatchRing, buffer: int, order: EpochOrder, epoch: int, step_in_epoch: int
    ) -> _Pending:
        slots = order.slots(step_in_epoch, self._world.rank, self._world.world_size)
        repeats = self._config.data.repeated_sampling
        keys = [key for slot in slots for key in self._keys("mask", epoch, slot)]
        visible, masked = self._masks([Stream(*key) for key in keys])
        requests = [
            self._request(slot, order, epoch, buffer, row * repeats)
            for row, slot in enumerate(slots)
        ]
        fills = list(zip(slots, requests, strict=True))
        tasks = [
            ring.threads.submit(self._fill, ring, fills[i : i + ring.slots_per_task], order)
            for i in range(0, len(fills), ring.slots_per_task)
        ]
        return _Pending(buffer, slots, visible, masked, tasks)

    def _masks(self, streams: Sequence[Stream]) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._config
        if config.task is not None:  # nothing is masked
            none = torch.empty((len(streams), 0), dtype=torch.int64)
            return none, none
        return masking.batch_masks(streams, config.mask, config.num_tubelets, config.num_patches)

    def _keys(self, purpose: str, epoch: int, slot: Slot) -> tuple[Key, ...]:
        """Return a random stream's key per clip of a slot; the first does not depend on repeats."""
        key = (self._config.run.seed, purpose, epoch, slot.sample)
        repeats = range(1, self._config.data.repeated_sampling)
        return (key, *((*key, repeat) for repeat in repeats))

    def _request(
        self, slot: Slot, order: EpochOrder, epoch: int, buffer: int, row: int
    ) -> ClipRequest:
        """Return the clips of a slot; their streams are the slot's, whichever sample fills it."""
        config, window = self._config, (self._config.run.seed, "window", epoch, slot.sample)
        crops = self._keys("crop", epoch, slot)
        if config.task:  # videos may be shorter than a window, which then has frames of all phases
            return ClipRequest(window, crops, buffer, row, self._keys("augment", epoch, slot))
        phase = order.window_phase(slot.lane, slot.position, config.data.sampling_rate)
        return ClipRequest(window, crops, buffer, row, phase=phase)

    def _fill(
        self, ring: BatchRing, fills: Sequence[tuple[Slot, ClipRequest]], order: EpochOrder
    ) -> list[list[SampleResult]]:
        """Have the clips of some slots written to their rows."""
        firsts = ring.read(self._reader, [(slot.sample, request) for slot, request in fills])
        return [
            [first] if first.bad is None else self._substitute(ring, slot, request, order, first)
            for (slot, request), first in zip(fills, firsts, strict=True)
        ]

    def _substitute(
        self,
        ring: BatchRing,
        slot: Slot,
        request: ClipRequest,
        order: EpochOrder,
        first: SampleResult,
    ) -> list[SampleResult]:
        """Fill a slot, whose own sample is bad, from the nearest good one."""
        results = [first]
        for index in itertools.islice(_neighbors(order, slot), _MAX_SUBSTITUTES):
            results += ring.read(self._reader, [(index, request)])
            if results[-1].bad is None:
                return results
        where = f"lane {slot.lane}, position {slot.position}"
        found = f"{len(results)} bad samples; the first: {first.bad}"
        do = "run `svfap shards verify` on data.url"
        raise HealthError("Too many unreadable samples in a row", where, found, do)

    def _finish(self, ring: BatchRing, batch: _Pending, ready: int) -> ClipBatch:
        """Wait for all rows; the first error of a task is raised here."""
        rows = [results for task in batch.tasks for results in task.result()]
        results = [result for of_slot in rows for result in of_slot]
        own = [of_slot[0] for of_slot in rows]
        return ClipBatch(
            frames=ring.frames(batch.buffer),
            visible=batch.visible,
            masked=batch.masked,
            keys=[result.key for result in own],
            samples=[slot.sample for slot in batch.slots],
            lanes=[slot.lane for slot in batch.slots],
            positions=[slot.position for slot in batch.slots],
            substituted=[result.bad is not None for result in own],
            bad=[result.bad for result in own if result.bad is not None],
            fetch_seconds=sum(result.fetch_seconds for result in results),
            decode_seconds=sum(result.decode_seconds for result in results),
            bytes_fetched=self._reader.take_bytes_fetched(),
            batches_ready=ready,
            targets=self._targets([of_slot[-1].index for of_slot in rows]),
        )

    def _targets(self, shown: Sequence[int]) -> torch.Tensor | None:
        """Return the targets of a batch's clips, by the samples that their frames are from."""
        if self._selection is None:
            return None
        repeats = self._config.data.repeated_sampling
        return torch.from_numpy(np.repeat(self._selection.targets_of(shown), repeats, axis=0))


def _neighbors(order: EpochOrder, slot: Slot) -> Iterator[int]:
    """Yield substitutes for a slot: samples of its lane before it, nearest first, then after it."""
    before = range(slot.position - 1, -1, -1)
    after = range(slot.position + 1, order.lane_length)
    for position in itertools.chain(before, after):
        yield order.sample(slot.lane, position)


def _check_made_on_host(config: Config) -> None:
    """Raise ConfigError if the device would make clips of a task, which are augmented as RGB."""
    backend, colors = config.decode.backend, config.data.colors
    for key, value, other, is_on_device in (
        ("decode.backend", backend, DEFAULT, capabilities(backend).batched),
        ("data.colors", colors, "workers", colors == "device"),
    ):
        if is_on_device:
            what = "Clips of a task are augmented on the host"
            do = f"set {key}={other}, or leave it out"
            raise ConfigError(what, key, f"{value}, with a [task]", do)


def _planes(config: Config, manifest: Manifest, reader: SampleReader) -> tuple[int, int] | None:
    """Return height and width of planes, where the device converts colors; None: RGB.

    Planes are for shards of the profile `train`, whose frames mostly have one size: the one that a
    few samples from all over the data set agree on. Clips of a task are augmented as RGB.
    """
    colors = config.data.colors
    if (
        config.task is not None
        or manifest.profile != "train"
        or colors == "workers"
        or not capabilities(config.decode.backend).gives_planes
        or (colors == "auto" and not config.cluster.use_gpu)
    ):
        return None
    step = -(-manifest.num_samples // _PROBED_SAMPLES)
    found = [reader.read(index) for index in range(0, manifest.num_samples, step)]
    infos = [sample.info for sample in found if isinstance(sample, Sample)]
    sizes = {(info.height, info.width) if info.layout else None for info in infos}
    return sizes.pop() if len(sizes) == 1 else None
