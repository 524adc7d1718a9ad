"""The order of samples (the sampler): a pure function of (shard sizes, seed, epoch, step).

In: the number of samples of each shard. Out: the `Slot`s of a rank's part of a step. There is no
state and no sequence to replay: the slots of any step of any epoch follow from the numbers alone,
so a resume is arithmetic.

In each epoch the shards are concatenated in a random order, the list is rotated by a random amount,
and its first `steps * global_batch_size` samples are cut into equal, contiguous lanes. The
remainder is another part of the data in each epoch, however few shards there are. Inside a lane,
samples are shuffled within blocks, so that those of a block are neighbors in the tars and can be
fetched together. A step takes the next few samples of every lane, and a rank owns whole lanes: the
samples of a step are the same set for every number of ranks that divides the lanes.

Where a run trains on a subset of the samples, as a fold of a labeled set does, the others are
removed first, and all of this applies to the selected ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from svfap_dist.config import Config
from svfap_dist.errors import ConfigError
from svfap_dist.rng import Stream


@dataclasses.dataclass(frozen=True)
class Slot:
    """One place in a step's batch."""

    lane: int
    position: int  # number of samples before it in its lane, in this epoch
    sample: int  # global index, over the shards in manifest order


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
        self._num_lanes, self._block = num_lanes, shuffle_block
        self._key = (seed, "block", epoch)
        self._turn = Stream(seed, "turn", epoch).integer(self._num_samples)
        shards = Stream(seed, "shards", epoch).permutation(len(sizes))
        self._ends = np.cumsum(sizes[shards])  # positions in the epoch's list
        # Offset from a position inside the k-th shard of the list to the sample's global index.
        self._shifts = (np.cumsum(sizes) - sizes)[shards] - (self._ends - sizes[shards])
        self._blocks: dict[int, tuple[int, np.ndarray]] = {}  # the latest block of each lane

    @classmethod
    def of_run(
        cls, config: Config, shard_sizes: Sequence[int], epoch: int, selected: np.ndarray | None
    ) -> EpochOrder:
        """Return the order of a run, for its training and its audit.

        Args:
            config: Recipe.
            shard_sizes: Samples of each shard, in manifest order.
            epoch: Counted from 0.
            selected: Global indices of the samples to use, ascending; None: all.
        """
        return cls(
            shard_sizes,
            seed=config.run.seed,
            epoch=epoch,
            global_batch_size=config.samples_per_step,
            num_lanes=config.data.num_lanes,
            shuffle_block=config.data.shuffle_block,
            selected=selected,
        )

    def sample(self, lane: int, position: int) -> int:
        """Return the global index of a sample.

        Args:
            lane: Its lane.
            position: Number of samples before it in the lane.
        """
        assert 0 <= lane < self._num_lanes
        assert 0 <= position < self.lane_length
        block, offset = divmod(position, self._block)
        number, samples = self._blocks.get(lane, (-1, None))
        if samples is None or number != block:
            samples = self._shuffled(lane, block)
            self._blocks[lane] = (block, samples)
        return int(samples[offset])

    def slots(self, step_in_epoch: int, rank: int, world_size: int) -> list[Slot]:
        """Return a rank's part of a step, by lane and position, both ascending.

        Args:
            step_in_epoch: Step, counted from the start of the epoch.
            rank: This rank.
            world_size: Number of ranks.
        """
        assert self._num_lanes % world_size == 0, "config checks this"
        lanes_per_rank = self._num_lanes // world_size
        first = step_in_epoch * self.per_lane
        return [
            Slot(lane, position, self.sample(lane, position))
            for lane in range(rank * lanes_per_rank, (rank + 1) * lanes_per_rank)
            for position in range(first, first + self.per_lane)
        ]

    def _shuffled(self, lane: int, block: int) -> np.ndarray:
        """Return the global indices of the samples of one block, in the order of their use."""
        start = block * self._block
        length = min(self._block, self.lane_length - start)
        shuffled = Stream(*self._key, lane, block).permutation(length)
        places = (lane * self.lane_length + start + shuffled + self._turn) % self._num_samples
        samples = places + self._shifts[np.searchsorted(self._ends, places, side="right")]
        return samples if self._selected is None else self._selected[samples]
