"""What a rank reads, and when: the blocks of its lanes, opened before they are used.

In: the order of samples, a rank's lanes. Out: for each slot the `Block` that its sample is read
with. While a lane uses a block, the next one, which may be of the next epoch, is open, and its
requests are spread over the second half of the time until it is used. As lanes are staggered, the
requests of all of them are spread evenly. Each group of samples (`RunOrder`) has blocks of its own.

The samples of a block are used in random order, and each is freed at its use. So about half of the
block in use is kept, and a quarter of the next one. Where the memory does not suffice for that, a
block is read in several passes, each for the samples of one part of its steps.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from svfap_dist.config import Config, DataConfig
from svfap_dist.data.run_order import RunOrder
from svfap_dist.data.sample_order import Slot
from svfap_dist.distributed import World
from svfap_dist.shards.blocks import REQUEST_COST, Block, RangePool
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import SampleReader

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.25  # of a node's memory, for the reads of all its ranks
_LEAD = 0.5  # part of the block before, over which the requests of a block are spread
# Blocks of a lane that are kept at a time: half of one and a quarter of the next, on average. In
# the first order, where all blocks begin at once, all of one.
_BLOCKS_KEPT = {1: 1.0, 2: 0.75}
_Lane = tuple[int, int]  # number of a group of samples, and of one of its lanes


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """How a rank reads its samples.

    needed: bytes of samples that were read and not used yet, where each block is read in one pass.
    limit: bytes of them that are allowed. passes: how often the ranges of a block are read. fill:
    whether small requests are extended to neighbors, see `Block`.
    """

    needed: int
    limit: int
    passes: int
    fill: bool


def plan_reads(
    config: Config,
    manifest: Manifest,
    world: World,
    counts: Sequence[int] | None = None,
    memory: int | None = None,
) -> ReadPlan:
    """Return how a rank reads its samples.

    Args:
        config: Recipe; without data.read_ahead_bytes, the ranks of a node share a quarter of the
            memory of a node.
        manifest: The data set.
        world: Number of ranks, in all and on a node.
        counts: Samples in use of each group of the order; None: all of each data set.
        memory: Bytes of a node; None: those of this machine or container.
    """
    data, every = config.data, manifest.samples_of_sources
    used = every if counts is None else tuple(counts)
    size = bytes_of_pass(config, manifest) / manifest.num_samples
    lengths = [-(-count // data.num_lanes) for count in used]  # of the lanes of each group
    blocks = [int(min(data.shuffle_block, length) * size) for length in lengths]
    lanes = data.num_lanes // world.world_size
    needed = int(lanes * sum(blocks) * _BLOCKS_KEPT[data.order_version])
    if memory is None:
        memory = node_memory()
    limit = data.read_ahead_bytes or int(memory * MEMORY_SHARE / world.local_world_size)
    passes = max(-(-needed // limit), 1)
    is_dense = used == every and passes * size < REQUEST_COST
    return ReadPlan(needed, limit, passes, fill=is_dense and min(blocks) >= REQUEST_COST)


def uses_phases(config: Config) -> bool:
    """Return whether all windows of a block's samples are in one phase of the stride.

    Args:
        config: Recipe. Videos of a task may be shorter than a window, which then repeats the last
            frame, whatever phase it is in.
    """
    return config.task is None and config.data.order_version > 1


def parts_to_read(data: DataConfig, manifest: Manifest, phase: int | None) -> Sequence[int]:
    """Return which parts of samples have the frames of their windows.

    Args:
        data: Stride of a window.
        manifest: The data set. Frame f is in the part f modulo the number of parts.
        phase: Of the windows; None: any.
    """
    if phase is None:
        return range(manifest.num_parts)
    parts = manifest.num_parts
    return sorted({(phase + number * data.sampling_rate) % parts for number in range(parts)})


def bytes_of_pass(config: Config, manifest: Manifest) -> int:
    """Return the bytes of a data set that an epoch reads.

    Args:
        config: Recipe.
        manifest: The data set.
    """
    parts = parts_to_read(config.data, manifest, 0 if uses_phases(config) else None)
    total, left = 0, iter(manifest.shards)
    for count, kind in zip(manifest.shards_of_sources, manifest.kinds_of_sources, strict=True):
        size = sum(shard.num_bytes for shard in itertools.islice(left, count))
        # Images have one part.
        total += size if kind == "images" else size * len(parts) // manifest.num_parts
    return total


def node_memory() -> int:
    """Return the bytes of memory of this container, or else of this machine."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup versions 2 and 1
        try:
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(found)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A block that is open, or one pass of it: positions [start, stop) of a lane."""

    epoch: int
    start: int
    stop: int
    first_step: int
    block: Block


class ReadAhead:
    """Opens the blocks of lanes before they are used.

    Args:
        config: Recipe.
        manifest: The data set.
        reader: Reads its shards.
        plan: How.
        order: Of the run.
        lanes: Of the rank.
        pool: Makes the requests; this object ends it.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        reader: SampleReader,
        plan: ReadPlan,
        order: RunOrder,
        lanes: Sequence[int],
        pool: RangePool,
    ) -> None:
        self._data, self._manifest, self._reader = config.data, manifest, reader
        self._plan, self._order, self._lanes = plan, order, lanes
        self._uses_phases = uses_phases(config)
        self._pass_length = -(-config.data.shuffle_block // plan.passes)
        self.pool = pool
        self._opened: dict[_Lane, collections.deque[_Opened]] = {}
        self._begins: list[tuple[int, _Lane]] = []  # heap of (first step, lane) of the newest ones

    @classmethod
    def of_rank(
        cls,
        config: Config,
        manifest: Manifest,
        reader: SampleReader,
        world: World,
        order: RunOrder,
        num_threads: int,
    ) -> ReadAhead:
        """Return what a rank reads, with threads of its own.

        Args:
            config: Recipe.
            manifest: The data set.
            reader: Reads its shards.
            world: The rank, or the part of one, and the number of them.
            order: Of the run.
            num_threads: Requests made ahead at a time.
        """
        plan = plan_reads(config, manifest, world, order.samples_of_groups)
        if plan.passes > 1:
            log.warning(
                "Samples are read %d times: reading ahead needs %d MiB per rank, of %d. Set a "
                "smaller data.shuffle_block for new runs, or data.read_ahead_bytes.",
                plan.passes, plan.needed >> 20, plan.limit >> 20, extra={"once": True},
            )  # fmt: skip
        lanes_per_rank = config.data.num_lanes // world.world_size
        lanes = range(world.rank * lanes_per_rank, (world.rank + 1) * lanes_per_rank)
        pool = RangePool(reader.read_range, plan.limit, num_threads)
        return cls(config, manifest, reader, plan, order, lanes, pool)

    def advance(self, step: int) -> None:
        """Open what the lanes use at a step, and what they use next.

        Args:
            step: The next one, counted over all epochs; the first may be any.
        """
        if not self._begins:
            for group, lane in itertools.product(range(self._order.num_groups), self._lanes):
                self._opened[group, lane] = collections.deque()
                epoch, position = self._order.next_position(group, lane, step)
                self._open((group, lane), epoch, position, step)
        while self._begins[0][0] <= step:
            _, lane = heapq.heappop(self._begins)
            opened = self._opened[lane]
            self._open(lane, opened[-1].epoch, opened[-1].stop, opened[-1].first_step)
            while len(opened) > 2 and opened[1].first_step < step:
                opened.popleft()  # slots of this step and later ones are behind it
        self.pool.advance(step)

    def block_of(self, slot: Slot) -> Block:
        """Return what the sample of a slot is read with.

        Args:
            slot: Of the step that was advanced to.
        """
        for each in self._opened[slot.group, slot.lane]:
            if each.epoch == slot.epoch and each.start <= slot.position < each.stop:
                return each.block
        raise AssertionError("its step was advanced to")

    def close(self) -> None:
        """End the threads."""
        self.pool.close()

    def _open(self, place: _Lane, epoch: int, position: int, previous: int) -> None:
        """Open the block at a position; previous: first step of the one before."""
        group, lane = place
        order = self._order.of_epoch(group, epoch)
        if position == order.lane_length:
            epoch, position, order = epoch + 1, 0, self._order.of_epoch(group, epoch + 1)
        whole = order.block(lane, order.block_number(lane, position))
        start = position - whole.start
        stop = min((start // self._pass_length + 1) * self._pass_length, len(whole.samples))
        phase = None
        if self._uses_phases:
            phase = order.window_phase(lane, position, self._data.sampling_rate)
        first_step = self._order.step_of(group, lane, epoch, position)
        block = Block(
            self.pool,
            self._reader.locate_all,
            whole.samples[start:stop] + self._order.first_sample(group),
            parts_to_read(self._data, self._manifest, phase),
            (first_step, (first_step - previous) * _LEAD),
            fill=self._plan.fill,
        )
        opened = _Opened(epoch, position, whole.start + stop, first_step, block)
        self._opened[place].append(opened)
        heapq.heappush(self._begins, (first_step, place))
