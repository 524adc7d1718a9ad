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

With `finetune.sampling = "balanced"` each class of a source is what a source is in a mixture: a
group of samples with epochs of its own, and an equal share. A rare class begins its epochs more
often, and the random choices for a clip depend on that epoch, so a repeated sample is cropped and
augmented differently. The pattern is shuffled: clips are mixed with those at fixed places of the
batch (`train.mixing`), which must not be of a fixed class.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from svfap_dist.config import Config
from svfap_dist.data.sample_order import EpochOrder, Slot, steps_per_epoch
from svfap_dist.data.selection import Selection
from svfap_dist.errors import ConfigError
from svfap_dist.rng import Stream
from svfap_dist.shards.format import Manifest

_LONGEST_PERIOD = 10_000  # places: a share is off by less than a ten-thousandth
_EPOCHS_KEPT = 3  # of each group: lanes may be in two, and read ahead from the next


class Shares:
    """The source of each place of an endless pattern, by the weights of the sources.

    Args:
        weights: Positive, one per source. The smallest is at least `config.SMALLEST_SHARE` of all.
        seed: Shuffles the places within each shortest period; None: spread evenly.
    """

    def __init__(self, weights: Sequence[float | Fraction], seed: int | None = None) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        shares = [weight / sum(exact) for weight in exact]
        self.period = min(math.lcm(*(share.denominator for share in shares)), _LONGEST_PERIOD)
        self._quotas = _whole_numbers([share * self.period for share in shares])
        self._sources = _spread(self._quotas)
        if seed is not None:
            copies = max(_LONGEST_PERIOD // self.period, 1)
            orders = [Stream(seed, "shares", n).permutation(self.period) for n in range(copies)]
            self._sources = [self._sources[place] for order in orders for place in order]
            self._quotas = [quota * copies for quota in self._quotas]
            self.period *= copies
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


@dataclasses.dataclass(frozen=True)
class _Group:
    """Samples with epochs of their own: those of a data set, or of one class of it.

    first: Global index of the data set's first sample. sizes: Samples of each of its shards.
    selected: Indices in the data set, ascending; None: all. label: For errors.
    """

    source: int
    first: int
    sizes: list[int]
    selected: np.ndarray | None
    weight: float | Fraction
    label: str

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(self.sizes) if self.selected is None else len(self.selected)


class RunOrder:
    """The order of samples of all steps of a run; steps count from 0, over all epochs.

    Args:
        config: Recipe.
        manifest: The data set, or that of the mixture.
        selection: Samples to use; None: all.

    Raises:
        ConfigError: There are fewer samples than a global batch has, or fewer of a source, or of a
            class where classes are balanced, than there are lanes.
    """

    def __init__(
        self, config: Config, manifest: Manifest, selection: Selection | None = None
    ) -> None:
        self._config, data = config, config.data
        is_balanced = selection is not None and config.finetune.sampling == "balanced"
        self._groups = _groups(config, manifest, selection, is_balanced)
        counts = self.samples_of_groups = tuple(group.count for group in self._groups)
        self.steps_per_epoch = steps_per_epoch(sum(counts), config.samples_per_step)
        self.per_lane = config.samples_per_step // data.num_lanes  # samples of a lane in one step
        # At its end, an epoch of a group leaves out an incomplete part of this many samples.
        self._unit = config.samples_per_step
        if len(counts) > 1:
            self._unit = data.num_lanes
            _check_sizes(config, self._groups)
        weights = [group.weight for group in self._groups]
        self.shares = Shares(weights, config.run.seed if is_balanced else None)
        self._lengths = [count // self._unit * self._unit // data.num_lanes for count in counts]
        self.of_epoch = functools.lru_cache(_EPOCHS_KEPT * len(counts))(self._of_epoch)

    @property
    def samples_of_sources(self) -> tuple[int, ...]:
        """Number of samples to train on, of each data set."""
        counts: dict[int, int] = {}
        for group in self._groups:
            counts[group.source] = counts.get(group.source, 0) + group.count
        return tuple(counts.values())

    @property
    def num_groups(self) -> int:
        """Number of groups: data sets, or classes of each."""
        return len(self._groups)

    def _of_epoch(self, group: int, epoch: int) -> EpochOrder:
        """Return a group's own order in one of its epochs; its data set's samples count from 0."""
        return EpochOrder(
            self._groups[group].sizes,
            seed=self._config.run.seed,
            epoch=epoch,
            global_batch_size=self._unit,
            num_lanes=self._config.data.num_lanes,
            shuffle_block=self._config.data.shuffle_block,
            selected=self._groups[group].selected,
            version=self._config.data.order_version,
        )

    def first_sample(self, group: int) -> int:
        """Return the global index of the first sample of a group's data set.

        Args:
            group: Its number.
        """
        return self._groups[group].first

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
        start, found = (step + lane) * self.per_lane, []
        for place in range(start, start + self.per_lane):
            number = self.shares.source(place)
            group = self._groups[number]
            epoch, position = self._position(number, lane, place)
            sample = group.first + self.of_epoch(number, epoch).sample(lane, position)
            found.append(Slot(lane, position, sample, epoch, group.source, number))
        return found

    def _position(self, group: int, lane: int, place: int) -> tuple[int, int]:
        """Return epoch and position in a group's lane of its first sample at a place or later.

        The places of a lane begin `per_lane` after those of the lane before it, so that those of
        all lanes in a step follow each other.
        """
        skipped = self.shares.count(group, lane * self.per_lane)
        return divmod(self.shares.count(group, place) - skipped, self._lengths[group])

    def next_position(self, group: int, lane: int, step: int) -> tuple[int, int]:
        """Return epoch and position of the first sample of a group's lane that a step may use.

        Args:
            group: Its number.
            lane: The lane.
            step: The step; if it uses none of the group, a later one does.
        """
        return self._position(group, lane, (step + lane) * self.per_lane)

    def step_of(self, group: int, lane: int, epoch: int, position: int) -> int:
        """Return the step that uses a sample.

        Args:
            group: Number of its group.
            lane: Its lane.
            epoch: Of the group.
            position: Number of samples before it in the lane.
        """
        used = epoch * self._lengths[group] + position
        skipped = self.shares.count(group, lane * self.per_lane)
        return self.shares.place(group, skipped + used) // self.per_lane - lane


def _groups(
    config: Config, manifest: Manifest, selection: Selection | None, is_balanced: bool
) -> list[_Group]:
    """Return the groups of samples: each data set, or each class of it."""
    sources, groups = config.data.sources, []
    sizes, start = iter(shard.num_samples for shard in manifest.shards), 0
    for number, count in enumerate(manifest.shards_of_sources):
        own, first = list(itertools.islice(sizes, count)), start
        start += sum(own)
        weight, label = (sources[number].weight, sources[number].url) if sources else (1.0, "")
        if selection is None:
            groups.append(_Group(number, first, own, None, weight, label))
            continue
        rows = slice(*np.searchsorted(selection.indices, (first, start)))
        indices, classes = selection.indices[rows] - first, selection.targets[rows]
        if not is_balanced or not len(indices):
            groups.append(_Group(number, first, own, indices, weight, label))
            continue
        assert config.task is not None, "a selection is that of a task"
        there = np.unique(classes)
        equal = Fraction(str(weight)) / len(there)
        for index in there.tolist():
            of_class, name = indices[classes == index], config.task.names[index]
            groups.append(_Group(number, first, own, of_class, equal, name))
    return groups


def _check_sizes(config: Config, groups: Sequence[_Group]) -> None:
    lanes, is_class = config.data.num_lanes, config.finetune.sampling == "balanced"
    for group in groups:
        if group.count >= lanes:
            continue
        found = f"{group.count} samples to train on, data.num_lanes = {lanes}"
        what = "Source has fewer samples than there are lanes"
        do = "shard more videos, leave this source out, or lower data.num_lanes"
        if is_class and group.count:
            what = "Class has too few samples for finetune.sampling = balanced"
            do = f"set data.num_lanes to at most {group.count}, or balance the loss instead: "
            do += "finetune.sampling=all finetune.class_weights=balanced"
        raise ConfigError(what, group.label, found, do)
