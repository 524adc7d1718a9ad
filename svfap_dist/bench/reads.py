"""`svfap bench reads`: what a recipe's ranks request from the store, by arithmetic.

The order of samples and the planning of reads are those of training (`data.read_ahead`); the data
set is made up, and nothing is read. For comparison, the rule of the first release: the first order
of samples, ranges of 8 MiB on a fixed grid, requested when one of their samples is needed and kept
up to 1 GiB per rank, or single samples where the blocks of all lanes do not fit in that.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from svfap_dist.config import Config, recipe
from svfap_dist.data.read_ahead import ReadAhead, plan_reads
from svfap_dist.data.run_order import RunOrder
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError
from svfap_dist.rng import Stream
from svfap_dist.shards.blocks import RangePool
from svfap_dist.shards.format import Manifest, ShardEntry, ShardIndex
from svfap_dist.shards.reader import SampleReader
from svfap_dist.text_table import format_table

_PER_SHARD = 1000  # samples
_SPREAD = 0.3  # standard deviation of the logarithm of a sample's bytes
_START, _BLOCKS = 1000, 3  # first step; time that is replayed, in blocks, after one of warming up
_GRID_BYTES, _GRID_LIMIT = 8 << 20, 1 << 30  # of the first release
_RANKS_PER_NODE = 8
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class RankReads:
    """Reads of rank 0."""

    rule: str  # "first release", or the parts of a sample that are stored apart
    ranks: int
    smallest_range: int  # bytes
    ranges_per_block: float  # requests of a lane for one block
    busiest_tenth: float  # largest share of a block's requests in a tenth of its steps
    bytes_per_clip: float  # fetched
    bytes_kept: int  # of samples, at most


@dataclasses.dataclass(frozen=True)
class ReadsBench:
    """Reads by rule and number of ranks."""

    recipe: str
    sample_bytes: int
    rows: tuple[RankReads, ...]

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        header = ("", "ranks", "smallest", "ranges per block", "busiest tenth", "KB per clip")
        rows = [
            (
                row.rule,
                str(row.ranks),
                f"{row.smallest_range / _MIB:.2f} MiB",
                f"{row.ranges_per_block:.1f}",
                f"{row.busiest_tenth:.0%}",
                f"{row.bytes_per_clip / 1000:.0f}",
                f"{row.bytes_kept / _MIB:.0f} MiB",
            )
            for row in self.rows
        ]
        title = f"{self.recipe}, samples of {self.sample_bytes / 1000:.0f} KB: reads of rank 0"
        return [title, *format_table(rows, (*header, "kept"), right=range(1, 7))]


def run(
    name: str,
    overrides: Iterable[str] = (),
    *,
    ranks: Sequence[int] = (1, 2, 4, 8, 16),
    samples: int = 1_092_009,
    sample_bytes: int = 240_000,
    parts: int = 4,
    node_bytes: int = 256 << 30,
) -> ReadsBench:
    """Replay the reads of a recipe.

    Args:
        name: Recipe.
        overrides: Texts `section.key=value`.
        ranks: Numbers of ranks.
        samples: Of the data set (VoxCeleb2's dev part has 1,092,009).
        sample_bytes: Bytes of a sample, on average.
        parts: Parts of a sample, one per phase of its frames, that shards may store apart.
        node_bytes: Memory of a node, which may have another size than this machine.

    Raises:
        ConfigError: The lanes cannot be shared equally among that many ranks.
    """
    config = recipe.load(name, overrides)
    data = config.data.model_copy(update={"order_version": 1})
    first = config.model_copy(update={"data": data})
    rows: list[RankReads] = []
    for count in ranks:
        if config.data.num_lanes % count:
            found = f"{count} ranks for data.num_lanes = {config.data.num_lanes}"
            do = "give divisors of data.num_lanes, or another data.num_lanes"
            raise ConfigError("Lanes cannot be shared equally", "--ranks", found, do)
        rows.append(_FirstRelease(first, _DataSet(samples, sample_bytes), count).replay())
        for number in sorted({1, parts}):
            data_set = _DataSet(samples, sample_bytes, number)
            rows.append(_Today(config, data_set, count, node_bytes).replay())
    return ReadsBench(name, sample_bytes, tuple(rows))


class _DataSet:
    """A manifest of shards that are not there, and the index that all of them have."""

    def __init__(self, samples: int, sample_bytes: int, parts: int = 1) -> None:
        stream, count = Stream(0, "sizes"), parts * _PER_SHARD
        scale = sample_bytes / parts / math.exp(_SPREAD**2 / 2)
        sizes = [int(scale * math.exp(_SPREAD * stream.normal())) for _ in range(count)]
        ends = np.cumsum(sizes).tolist()
        keys, none = tuple(map(str, range(_PER_SHARD))), ("",) * count
        offsets, frames = (0, *ends[:-1]), (0,) * _PER_SHARD
        self.index = ShardIndex(keys, offsets, tuple(sizes), none, frames)
        shards = tuple(
            ShardEntry(f"shard-{i:06d}.tar", min(_PER_SHARD, samples - first), ends[-1], "", "")
            for i, first in enumerate(range(0, samples, _PER_SHARD))
        )
        self.manifest = Manifest("voxceleb2", "train", 0, 0, "", shards, num_parts=parts)


class _Reader(SampleReader):
    """Records what would be read, and reads nothing."""

    def __init__(self, data_set: _DataSet, range_bytes: int = 1, cache_bytes: int = 1) -> None:
        super().__init__("", data_set.manifest, range_bytes=range_bytes, cache_bytes=cache_bytes)
        self.index, self.step = data_set.index, 0
        self.requests: list[tuple[int, int]] = []  # step and bytes

    def _index_of(self, entry: ShardEntry) -> ShardIndex:
        return self.index

    def read_range(self, entry: ShardEntry, start: int, stop: int) -> bytes:
        """See `SampleReader.read_range`."""
        self.requests.append((self.step, stop - start))
        return b""

    def take(self, sample: int) -> None:
        """Read a sample for itself, as `fetch` does."""
        entry, row = self.locate(sample)
        self._bytes_of(entry, self.index, row)


class _Pool(RangePool):
    """Keeps no bytes, but counts them."""

    most_kept = 0

    def _fetch(self, wanted: Any, extents: dict[int, tuple[int, int]]) -> dict[int, bytes]:
        self._fetch_range(wanted.entry, wanted.start, wanted.stop)
        self.most_kept = max(self.most_kept, self.bytes_kept)
        return dict.fromkeys(extents, b"")


class _Ranks(abc.ABC):
    """Rank 0 of some ranks."""

    rule: str
    reader: _Reader

    def __init__(self, config: Config, data_set: _DataSet, ranks: int) -> None:
        self.config, self.manifest, self.ranks = config, data_set.manifest, ranks
        self.order = RunOrder(config, data_set.manifest)

    @abc.abstractmethod
    def use(self, step: int) -> None:
        """Read the samples of a step of epoch 0."""

    @property
    @abc.abstractmethod
    def bytes_kept(self) -> tuple[int, int]:
        """Bytes kept now, and at most."""

    def replay(self) -> RankReads:
        """Use some steps and look at the requests."""
        data, order, reader = self.config.data, self.order, self.reader
        period = data.shuffle_block // order.per_lane
        start, stop = _START + period, _START + (1 + _BLOCKS) * period
        kept = 0
        for reader.step in range(_START, stop):
            if reader.step == start:
                kept = self.bytes_kept[0]
            self.use(reader.step)
        steps, sizes = np.array([pair for pair in reader.requests if pair[0] >= start]).T
        lanes, tenth = data.num_lanes // self.ranks, -(-period // 10)
        per_step = np.bincount(steps - start, minlength=_BLOCKS * period)
        in_tenth = np.convolve(per_step, np.ones(tenth), mode="valid")
        in_block = np.convolve(per_step, np.ones(period), mode="valid")
        # A tenth of a block belongs to all periods of a block's length that it is in: to the
        # first of them here, and to the last one where there is no later period.
        periods = in_block[np.minimum(np.arange(len(in_tenth)), len(in_block) - 1)]
        clips = _BLOCKS * period * lanes * order.per_lane * data.repeated_sampling
        now_kept, most_kept = self.bytes_kept
        return RankReads(
            rule=self.rule,
            ranks=self.ranks,
            smallest_range=min(size for _, size in reader.requests),
            ranges_per_block=len(sizes) / lanes / _BLOCKS,
            busiest_tenth=float((in_tenth / np.maximum(periods, 1)).max()),
            bytes_per_clip=float(sizes.sum() - now_kept + kept) / clips,
            bytes_kept=most_kept,
        )


class _Today(_Ranks):
    """Today's planning."""

    def __init__(self, config: Config, data_set: _DataSet, ranks: int, node_bytes: int) -> None:
        super().__init__(config, data_set, ranks)
        self.reader = _Reader(data_set)
        world = World(0, 0, ranks, min(ranks, _RANKS_PER_NODE))
        plan = plan_reads(config, self.manifest, world, memory=node_bytes)
        self._pool = _Pool(self.reader.read_range, plan.limit, num_threads=0)
        lanes = range(config.data.num_lanes // ranks)
        self._ahead = ReadAhead(
            config, self.manifest, self.reader, plan, self.order, lanes, self._pool
        )
        self.rule = f"{self.manifest.num_parts} parts" if self.manifest.num_parts > 1 else "whole"
        if plan.passes > 1:
            self.rule += f", {plan.passes} passes"

    def use(self, step: int) -> None:
        self._ahead.advance(step)
        self._pool.run_due()
        for slot in self.order.slots(step, 0, self.ranks):
            entry, row = self.reader.locate(slot.sample)
            self._ahead.block_of(slot).take(entry, self.reader.index, row)

    @property
    def bytes_kept(self) -> tuple[int, int]:
        return self._pool.bytes_kept, self._pool.most_kept


class _FirstRelease(_Ranks):
    """The planning of the first release."""

    rule = "first release"

    def __init__(self, config: Config, data_set: _DataSet, ranks: int) -> None:
        super().__init__(config, data_set, ranks)
        total = sum(entry.num_bytes for entry in self.manifest.shards)
        block = config.data.shuffle_block * total / self.manifest.num_samples
        needed = int(config.data.num_lanes // ranks * (1.25 * block + 2 * _GRID_BYTES))
        is_grid = needed <= _GRID_LIMIT
        self.reader = _Reader(data_set, *((_GRID_BYTES, needed) if is_grid else (1, 1)))
        self._kept = needed if is_grid else 0

    def use(self, step: int) -> None:
        for slot in self.order.slots(step, 0, self.ranks):
            self.reader.take(slot.sample)

    @property
    def bytes_kept(self) -> tuple[int, int]:
        return self._kept, self._kept
