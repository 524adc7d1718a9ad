"""The order of samples (the sampler): a pure function of (shard sizes, seed, epoch, step).

In: the number of samples of each shard. Out: the sample at each position of each lane, of which
`run_order` makes the `Slot`s of a rank's part of a step. There is no state and no sequence to
replay: the slots of any step of any epoch follow from the numbers alone, so a resume is arithmetic.

In each epoch the shards are concatenated in a random order, the list is rotated by a random amount,
and its first `steps * global_batch_size` samples are cut into equal, contiguous lanes. The
remainder is another part of the data in each epoch, however few shards there are. Inside a lane,
samples are shuffled within blocks, so that those of a block are neighbors in the tars and can be
fetched together. A step takes the next few samples of every lane, and a rank owns whole lanes: the
samples of a step are the same set for every number of ranks that divides the lanes.

There are two versions (data.order_version), and a run keeps the one it began with. In version 1 the
blocks of all lanes begin at the same steps, so all reads of a block come at once, and each window
starts anywhere. In version 2 they are staggered: a lane's first block is shorter than the others by
a part of a block, spread evenly over the lanes of a rank. And the windows of a block's samples
start in the same phase of the stride, so that in shards of the profile `train`, which store videos
phase by phase, only that phase of them is needed.

Where a run trains on a subset of the samples, as a fold of a labeled set does, the others are
removed first, and all of this applies to the selected ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from svfap_dist.errors import ConfigError
from svfap_dist.rng import Stream


@dataclasses.dataclass(frozen=True)
class Slot:
    """One place in a step's batch."""

    lane: int
    position: int  # number of samples before it in its lane, in this epoch
    sample: int  # global index, over the shards in manifest order
    epoch: int = 0  # of its data set, which that of a mixture has passed or not reached
    source: int = 0  # number of its data set in a mixture
    group: int = 0  # number of the group that has its epochs: its data set, or its class there


@dataclasses.dataclass(frozen=True)
class Block:
    """Samples of a lane that are neighbors in the shards and shuffled together."""

    start: int  # position of the first one in the lane
    samples: np.ndarray  # their global indices, in the order of use
    draw: int  # random, in [0, 2**64): the phase of their windows


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Return the number of full global batches in an epoch.

    Args:
        num_samples: Samples to train on.
        global_batch_size: Samples per step.

    Raises:
        ConfigError: There is not even one.
    """
    if num_samples < global_batch_size:
        what, key = "Data set is smaller than one global batch", "train.global_batch_size"
        found = f"{global_batch_size} samples per step, {num_samples} to train on"
        do = f"lower {key} to at most {num_samples}, or train on more videos"
        raise ConfigError(what, key, found, do)
    return num_samples // global_batch_size


class EpochOrder:
    """The order of samples in one epoch.

    Args:
        shard_sizes: Samples of each shard, in manifest order.
        seed: Of the run.
        epoch: Counted from 0.
        global_batch_size: Samples per step.
        num_lanes: Must divide `global_batch_size`.
        shuffle_block: Samples shuffled together inside a lane.
        selected: Global indices of the samples to use, ascending; None: all.
        version: Of the order; see the head of this module.

    Raises:
        ConfigError: There are fewer samples than a global batch has.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        epoch: int,
        global_batch_size: int,
        num_lanes: int,
        shuffle_block: int,
        selected: np.ndarray | None = None,
        version: int = 1,
    ) -> None:
        assert global_batch_size % num_lanes == 0, "config checks this"
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._selected = selected
        if selected is not None:  # from here on, each shard consists of its selected samples
            sizes = np.diff(np.searchsorted(selected, np.cumsum(sizes)), prepend=0)
        self._num_samples = int(sizes.sum())
        self.steps = steps_per_epoch(self._num_samples, global_batch_size)
        self.per_lane = global_batch_size // num_lanes  # samples of a lane in one step
        self.lane_length = self.steps * self.per_lane
        self._num_lanes, self._block, self._version = num_lanes, shuffle_block, version
        self._seed, self._epoch = seed, epoch
        self._turn = Stream(seed, "turn", epoch).integer(self._num_samples)
        shards = Stream(seed, "shards", epoch).permutation(len(sizes))
        self._ends = np.cumsum(sizes[shards])  # positions in the epoch's list
        # Offset from a position inside the k-th shard of the list to the sample's global index.
        self._shifts = (np.cumsum(sizes) - sizes)[shards] - (self._ends - sizes[shards])
        # Of each lane, the block in use and the next one, whose reads are planned ahead.
        self._block_of = functools.lru_cache(2 * num_lanes + 2)(self._make_block)

    def sample(self, lane: int, position: int) -> int:
        """Return the global index of a sample.

        Args:
            lane: Its lane.
            position: Number of samples before it in the lane.
        """
        assert 0 <= lane < self._num_lanes
        assert 0 <= position < self.lane_length
        block = self.block(lane, self.block_number(lane, position))
        return int(block.samples[position - block.start])

    def block_number(self, lane: int, position: int) -> int:
        """Return the number, within its lane, of the block that a position is in.

        Args:
            lane: The lane.
            position: Number of samples before it in the lane.
        """
        return (position + self._shift(lane)) // self._block

    def block(self, lane: int, number: int) -> Block:
        """Return a block of a lane.

        Args:
            lane: The lane.
            number: From 0 to that of the lane's last position.
        """
        return self._block_of(lane, number)

    def window_phase(self, lane: int, position: int, stride: int) -> int | None:
        """Return the phase, the remainder by the stride, of where the window of a sample starts.

        Args:
            lane: Its lane.
            position: Number of samples before it in the lane.
            stride: Video frames from one frame of a clip to the next.

        Returns:
            A number below `stride`, or None if the window may start anywhere.
        """
        if self._version == 1:
            return None
        return self.block(lane, self.block_number(lane, position)).draw * stride >> 64

    def _shift(self, lane: int) -> int:
        """Return how many samples shorter than the others the first block of a lane is."""
        if self._version == 1:
            return 0
        # The binary digits of the lane in reverse, as a fraction (van der Corput's sequence): any
        # consecutive lanes, such as a rank's, are spread evenly over a block.
        return int(f"{lane:b}"[::-1], 2) * self._block >> lane.bit_length()

    def _make_block(self, lane: int, number: int) -> Block:
        first = number * self._block - self._shift(lane)
        start, stop = max(first, 0), min(first + self._block, self.lane_length)
        stream = Stream(self._seed, "block", self._epoch, lane, number)
        shuffled = stream.permutation(stop - start)
        places = (lane * self.lane_length + start + shuffled + self._turn) % self._num_samples
        samples = places + self._shifts[np.searchsorted(self._ends, places, side="right")]
        if self._selected is not None:
            samples = self._selected[samples]
        return Block(start, samples, stream.integer(1 << 64))
