"""The data loader: from (seed, step) to a rank's `ClipBatch`, prefetched.

In: the recipe, a manifest, the rank's place in the world; of a labeled set, the samples to train on
and their targets. Out: one batch per step, deterministic: the same bits for any number of feeders,
threads and workers, any prefetch depth, and any step at which a run is resumed; over all ranks, the
same samples for every world size.

A `BatchFiller` (`filler`) fills batches ahead in the ring of buffers (`batch`), in processes of its
own (`feeder`) or in threads of this one. Each buffer is filled again when its batch has been
released, so the ring and the readers' caches bound the memory.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Generator

from svfap_dist import distributed
from svfap_dist.config import Config, check_world_size
from svfap_dist.data.batch import BatchRing, ClipBatch, RingPlace
from svfap_dist.data.clips import ClipWorker
from svfap_dist.data.device_worker import DeviceClipWorker
from svfap_dist.data.feeder import Feeder, num_feeders
from svfap_dist.data.filler import BatchFiller, DataSource, FilledBatch, PendingBatch, open_filler
from svfap_dist.data.selection import Selection
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError
from svfap_dist.shards.cache import ShardCache
from svfap_dist.shards.format import Manifest, Sample
from svfap_dist.shards.reader import SampleReader
from svfap_dist.video.backends import DEFAULT, capabilities

_PROBED_SAMPLES = 8  # to find the size of planes
_MAX_COPYING = 1  # released batches whose copies may still be under way


class ClipLoader:
    """Batches of one rank; made by all ranks together.

    Args:
        config: Recipe.
        url: Folder or prefix of the shards; empty: a mixture, whose manifest has their URLs.
        manifest: The data set, or that of a mixture.
        world: This rank and the number of ranks.
        selection: Samples to train on, and their targets, which batches then have; None: all.

    Raises:
        ConfigError: The lanes cannot be shared equally among the ranks, there are fewer samples
            than a global batch has, the shard cache is too small, or the device would make clips
            that decode workers augment.
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
        if config.task is not None and not config.augments_on_device:
            _check_made_on_host(config)
        self._source = DataSource(config, url, manifest, world, selection)
        order = self._source.order()
        self.steps_per_epoch = order.steps_per_epoch
        self.samples_of_sources = order.samples_of_sources  # to train on
        ShardCache.of_node(config.data, manifest, world)  # refuses one that is too small
        self._planes: tuple[int, int] | None = None
        if _uses_planes(config, manifest):
            # Hundreds of ranks would ask the store for the same few samples at once.
            self._planes = distributed.run_on_main(lambda: _size_of_planes(url, manifest))

    def batches(self, start_step: int, stop_step: int) -> Generator[ClipBatch]:
        """Yield the batches of a range of steps, counted over all epochs.

        The tensors of a batch are overwritten once it is released (`ClipBatch.release`), or the
        next one is requested. Work begins with the first `next`. Closing the iterator, or an error,
        ends its threads and processes.

        Args:
            start_step: First step.
            stop_step: Step after the last one.

        Raises:
            ShardError, StorageError: A shard cannot be read.
            HealthError: A bad sample has no good neighbor.
            ConfigError: There is no memory for the batches.
            ClusterError: Feeders or decode workers cannot be started.
        """
        config = self._source.config
        clips = self._source.num_slots * config.data.repeated_sampling
        copying: collections.deque[RingPlace] = collections.deque()
        with contextlib.ExitStack() as stack:
            ring = stack.enter_context(
                BatchRing(config, clips, self._planes, self._source.selection)
            )
            feeders = self._open_feeders(ring, range(start_step, stop_step), stack)
            for step in range(start_step, stop_step):
                while len(copying) > _MAX_COPYING or (copying and copying[0].is_free):
                    copying.popleft().wait()
                    for feeder in feeders:
                        feeder.release()
                ready = min(feeder.num_ready for feeder in feeders)
                number = (step - start_step) % ring.length
                batch = ring.batch(number, [feeder.receive() for feeder in feeders], ready)
                yield batch
                batch.release()
                copying.append(ring.places[number])

    def _open_feeders(
        self, ring: BatchRing, steps: range, stack: contextlib.ExitStack
    ) -> list[_LocalFeeder | Feeder]:
        """Return what fills the parts of each batch, in the order of their rows."""
        source, count = self._source, num_feeders(self._source)
        feeders: list[_LocalFeeder | Feeder] = []
        for number in range(count):
            part = number, count
            feeders.append(Feeder(source, ring.shared, ring.length, steps, part, ClipWorker))
            stack.callback(feeders[-1].close)
        if not count:
            if capabilities(source.config.decode.backend).batched:
                decode = DeviceClipWorker(source.config, ring.tensors["rgb"])
                filler = BatchFiller(source, ring.shared.arrays, decode)
            else:
                filler = open_filler(source, ring.shared, worker=ClipWorker)
            feeders.append(_LocalFeeder(filler, steps, ring.length))
            stack.callback(feeders[-1].close)
        return feeders


class _LocalFeeder:
    """Fills batches as a `Feeder` does, with threads of this process."""

    def __init__(self, filler: BatchFiller, steps: range, length: int) -> None:
        self._filler = filler
        self._steps = iter(zip(steps, itertools.cycle(range(length)), strict=False))
        self._pending: collections.deque[PendingBatch] = collections.deque()
        for _ in range(length):
            self.release()

    def release(self) -> None:
        """Begin to fill the next batch: a buffer is free."""
        for step, place in itertools.islice(self._steps, 1):
            self._pending.append(self._filler.start(step, place))

    @property
    def num_ready(self) -> int:
        """Return how many batches are filled, without a gap."""
        return sum(1 for _ in itertools.takewhile(lambda batch: batch.is_ready, self._pending))

    def receive(self) -> FilledBatch:
        """Wait until the next batch is filled; the first error of its tasks is raised here."""
        return self._filler.finish(self._pending.popleft())

    def close(self) -> None:
        """End threads and processes."""
        self._filler.close()


def _check_made_on_host(config: Config) -> None:
    """Raise ConfigError if the device would make clips that decode workers augment, as RGB."""
    backend, colors = config.decode.backend, config.data.colors
    for key, value, other, is_on_device in (
        ("decode.backend", backend, DEFAULT, capabilities(backend).batched),
        ("data.colors", colors, "workers", colors == "device"),
    ):
        if is_on_device:
            what = "Setting conflicts with augmentation in decode workers"
            found = f"{value}, with a [task] and augment.run_on = workers"
            do = f"set augment.run_on=device; or set {key}={other}, or leave it out"
            raise ConfigError(what, key, found, do)


def _uses_planes(config: Config, manifest: Manifest) -> bool:
    """Return whether the device converts colors. Decode workers augment a task's clips as RGB."""
    colors = config.data.colors
    return (
        (config.task is None or config.augments_on_device)
        and manifest.profile == "train"
        and colors != "workers"
        and capabilities(config.decode.backend).gives_planes
        and (colors != "auto" or config.cluster.on_gpu)
    )


def _size_of_planes(url: str, manifest: Manifest) -> tuple[int, int] | None:
    """Return height and width of planes; None: RGB.

    Frames of shards of the profile `train` mostly have one size: the one that a few samples from
    all over the data set agree on.
    """
    reader = SampleReader(url, manifest, range_bytes=1)
    counts = manifest.samples_of_sources
    found = [
        reader.read(first + row, [0])
        for first, count in zip(itertools.accumulate((0, *counts)), counts, strict=False)
        for row in range(0, count, -(-count // _PROBED_SAMPLES))
    ]
    infos = [sample.info for sample in found if isinstance(sample, Sample)]
    sizes = {(info.height, info.width) if info.layout else None for info in infos}
    return sizes.pop() if len(sizes) == 1 else None
