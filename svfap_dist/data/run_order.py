"""The order of samples of a whole run: one data set, or a mixture of several.

In: the recipe and the manifest. Out: the `Slot`s of a rank's part of any step, as a pure function
of (shards, weights, seed, step).

Each source has its own order, that of `sample_order`, over its own epochs, and each lane of a
source is used from its first sample to its last, epoch after epoch. The mixture decides only which
source each place of a step is of. `Shares` repeats a pattern in which every source has a whole
number of places, spread evenly. The places of a step, lane after lane, are consecutive places of
the pattern, so every step has the share of each source but for less than two samples, and any whole
number of periods has it exactly. How many samples of a source a lane has used at a step is a count
of places in the pattern: a resume is arithmetic here, too, and the number of ranks does not matter.

An epoch of a mixture has as many samples as all sources have together, in their shares, and its
incomplete last step is left out. The epochs of its sources are not those of the mixture: a source
of share w and N samples is at its epoch (samples so far) * w / N. At the end of an epoch of its own
a source of a mixture leaves out less than one sample per lane, others the next time. With one
source there is no pattern, and the two kinds of epochs are one.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from svfap_dist.config import Config
from svfap_dist.data.sample_order import EpochOrder, Slot, steps_per_epoch
from svfap_dist.errors import ConfigError
from svfap_dist.shards.format import Manifest

_LONGEST_PERIOD = 10_000  # places: a share is off by less than a ten-thousandth
_EPOCHS_KEPT = 3  # of each source: lanes may be in two, and read ahead from the next


class Shares:
    """The source of each place of an endless pattern, by the weights of the sources.

    Args:
        weights: Positive, one per source. The smallest is at least `config.SMALLEST_SHARE` of all.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        shares = [weight / sum(exact) for weight in exact]
        self.period = min(math.lcm(*(share.denominator for share in shares)), _LONGEST_PERIOD)
        self._quotas = _whole_numbers([share * self.period for share in shares])
        self._sources = _spread(self._quotas)
        self._places = [
            [place for place, source in enumerate(self._sources) if source == number]
            for number in range(len(weights))
        ]

    @property
    def shares(self) -> list[float]:
        """Share of each source, as the pattern has it."""
        return [quota / self.period for quota in self._quotas]

    def source(self, place: int) -> int:
        """Return the source of a place.

        Args:
            place: From 0.
        """
        return self._sources[place % self.period]

    def count(self, source: int, place: int) -> int:
        """Return the number of a source's places before a place.

        Args:
            source: Its number.
            place: From 0.
        """
        periods, rest = divmod(place, self.period)
        places = self._places[source]
        return periods * len(places) + bisect.bisect_left(places, rest)

    def place(self, source: int, number: int) -> int:
        """Return a place of a source.

        Args:
            source: Its number.
            number: Of its places before this one.
        """
        periods, rest = divmod(number, self._quotas[source])
        return periods * self.period + self._places[source][rest]


def _whole_numbers(quotas: Sequence[Fraction]) -> list[int]:
    """Return quotas as whole numbers of the same sum, by largest remainder."""
    whole = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda number: whole[number] - quotas[number])
    for number in by_remainder[: int(sum(quotas)) - sum(whole)]:
        whole[number] += 1
    return whole


def _spread(quotas: Sequence[int]) -> list[int]:
    """Return the source of each place of a period, so that no source is ahead or behind by one.

    Of a source of q places in a period of Q, place j is in [floor(j Q / q), ceil((j + 1) Q / q)).
    The earliest deadline first keeps all of them.
    """
    period = sum(quotas)
    coming = [(0, number, 0) for number in range(len(quotas))]  # heap of (begin, source, j)
    due: list[tuple[int, int, int]] = []  # heap of (end, source, j)
    pattern = []
    for place in range(period):
        while coming and coming[0][0] <= place:
            _, number, j = heapq.heappop(coming)
            heapq.heappush(due, (-(-(j + 1) * period // quotas[number]), number, j))
        end, number, j = heapq.heappop(due)
        assert place < end, "the quotas fill the period"
        pattern.append(number)
        if j + 1 < quotas[number]:
            heapq.heappush(coming, ((j + 1) * period // quotas[number], number, j + 1))
    return pattern


class RunOrder:
    """The order of samples of all steps of a run; steps count from 0, over all epochs.

    Args:
        config: Recipe.
        manifest: The data set, or that of the mixture.
        selected: Global indices of the samples to use, ascending; None: all.

    Raises:
        ConfigError: There are fewer samples than a global batch has, or fewer of a source than
            there are lanes.
    """

    def __init__(
        self, config: Config, manifest: Manifest, selected: np.ndarray | None = None
    ) -> None:
        self._config, data = config, config.data
        sizes = [shard.num_samples for shard in manifest.shards]
        shard_ends = np.cumsum(manifest.shards_of_sources).tolist()
        ends = np.cumsum(manifest.samples_of_sources).tolist()
        self._firsts = [0, *ends[:-1]]  # global index of the first sample of each source
        self._sizes = [
            sizes[end - count : end]
            for count, end in zip(manifest.shards_of_sources, shard_ends, strict=True)
        ]
        self._selected: list[np.ndarray | None] = [None] * len(ends)
        counts = list(manifest.samples_of_sources)
        if selected is not None:
            for number, (first, end) in enumerate(zip(self._firsts, ends, strict=True)):
                left, right = np.searchsorted(selected, (first, end))
                self._selected[number] = selected[left:right] - first
                counts[number] = int(right - left)
        self.steps_per_epoch = steps_per_epoch(sum(counts), config.samples_per_step)
        self.per_lane = config.samples_per_step // data.num_lanes  # samples of a lane in one step
        # At its end, an epoch of a data set leaves out an incomplete part of this many samples.
        self._unit = config.samples_per_step
        weights = [1.0]
        if len(counts) > 1:
            self._unit, weights = data.num_lanes, [source.weight for source in data.sources]
            _check_sizes(config, counts)
        self.shares = Shares(weights)
        self._lengths = [count // self._unit * self._unit // data.num_lanes for count in counts]
        self.samples_of_sources = tuple(counts)  # to train on
        self.of_epoch = functools.lru_cache(_EPOCHS_KEPT * len(counts))(self._of_epoch)

    @property
    def num_sources(self) -> int:
        """Number of data sets."""
        return len(self._lengths)

    def _of_epoch(self, source: int, epoch: int) -> EpochOrder:
        """Return a source's own order in one of its epochs, whose samples count from its first."""
        return EpochOrder(
            self._sizes[source],
            seed=self._config.run.seed,
            epoch=epoch,
            global_batch_size=self._unit,
            num_lanes=self._config.data.num_lanes,
            shuffle_block=self._config.data.shuffle_block,
            selected=self._selected[source],
            version=self._config.data.order_version,
        )

    def first_sample(self, source: int) -> int:
        """Return the global index of a source's first sample.

        Args:
            source: Its number.
        """
        return self._firsts[source]

    def slots(self, step: int, rank: int, world_size: int) -> list[Slot]:
        """Return a rank's part of a step, by lane and place in the step.

        Args:
            step: The step.
            rank: This rank.
            world_size: Number of ranks.
        """
        num_lanes = self._config.data.num_lanes
        assert num_lanes % world_size == 0, "config checks this"
        per_rank = num_lanes // world_size
        lanes = range(rank * per_rank, (rank + 1) * per_rank)
        return [slot for lane in lanes for slot in self._of(lane, step)]

    def _of(self, lane: int, step: int) -> list[Slot]:
        """Return the slots of a lane in a step."""
        first, found = (step + lane) * self.per_lane, []
        for place in range(first, first + self.per_lane):
            source = self.shares.source(place)
            epoch, position = self._position(source, lane, place)
            sample = self.of_epoch(source, epoch).sample(lane, position)
            found.append(Slot(lane, position, self._firsts[source] + sample, epoch, source))
        return found

    def _position(self, source: int, lane: int, place: int) -> tuple[int, int]:
        """Return epoch and position in a source's lane of its first sample at a place or later.

        The places of a lane begin `per_lane` after those of the lane before it, so that those of
        all lanes in a step follow each other.
        """
        skipped = self.shares.count(source, lane * self.per_lane)
        return divmod(self.shares.count(source, place) - skipped, self._lengths[source])

    def next_position(self, source: int, lane: int, step: int) -> tuple[int, int]:
        """Return epoch and position of the first sample of a source's lane that a step may use.

        Args:
            source: Its number.
            lane: The lane.
            step: The step; if it uses none of the source, a later one does.
        """
        return self._position(source, lane, (step + lane) * self.per_lane)

    def step_of(self, source: int, lane: int, epoch: int, position: int) -> int:
        """Return the step that uses a sample.

        Args:
            source: Number of its data set.
            lane: Its lane.
            epoch: Of the data set.
            position: Number of samples before it in the lane.
        """
        used = epoch * self._lengths[source] + position
        skipped = self.shares.count(source, lane * self.per_lane)
        return self.shares.place(source, skipped + used) // self.per_lane - lane


def _check_sizes(config: Config, counts: Sequence[int]) -> None:
    for source, count in zip(config.data.sources, counts, strict=True):
        if count < config.data.num_lanes:
            found = f"{count} samples to train on, data.num_lanes = {config.data.num_lanes}"
            what = "Source has fewer samples than there are lanes"
            do = "shard more videos, leave this source out, or lower data.num_lanes"
            raise ConfigError(what, source.url, found, do)
