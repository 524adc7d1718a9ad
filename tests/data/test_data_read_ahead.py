"""Reads of a rank: every sample from its block, once, from any step on, within the memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import config_of
from mixtures import mixed_manifest, mixture_of

from svfap_dist.config import recipe
from svfap_dist.data import read_ahead
from svfap_dist.data.read_ahead import ReadAhead, ReadPlan, parts_to_read, plan_reads, uses_phases
from svfap_dist.data.run_order import RunOrder
from svfap_dist.distributed import World
from svfap_dist.shards.blocks import REQUEST_COST, RangePool
from svfap_dist.shards.format import Manifest, ShardEntry, ShardIndex
from svfap_dist.shards.reader import SampleReader

MIB = 1 << 20
GIB = 1 << 30


def manifest_of(sizes: list[int], sample_bytes: int, num_parts: int = 1) -> Manifest:
    entries = [
        ShardEntry(f"shard-{i:06d}.tar", size, size * sample_bytes, "", "")
        for i, size in enumerate(sizes)
    ]
    return Manifest("folder", "train", 0, 61, "", tuple(entries), num_parts=num_parts)


class Shards(SampleReader):
    """Shards of parts of one byte, which are not there."""

    def __init__(self, sizes: list[int], parts: int, *more: list[int]) -> None:
        self.manifest, self.parts = manifest_of(sizes, parts, parts), parts
        if more:
            each = [manifest_of(sizes, parts, parts) for sizes in (sizes, *more)]
            self.manifest = mixed_manifest(each)
        super().__init__("", self.manifest)

    def _index_of(self, entry: ShardEntry) -> ShardIndex:
        count = entry.num_samples * self.parts
        keys, none = ("",) * entry.num_samples, ("",) * count
        return ShardIndex(keys, tuple(range(count)), (1,) * count, none, (61,) * len(keys))

    def read_range(self, entry: ShardEntry, start: int, stop: int) -> bytes:
        return b"x" * (stop - start)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6).filter(lambda s: sum(s) >= 8),
    version=st.sampled_from([1, 2]),
    parts=st.sampled_from([1, 2, 4]),
    block=st.integers(1, 30),
    ranks=st.sampled_from([1, 2, 4]),
    passes=st.integers(1, 3),
    data=st.data(),
)
def test_every_sample_is_read_once_with_its_block(
    sizes, version, parts, block, ranks, passes, data
):
    """Over two epochs' borders, from any step on; parts of 1 byte, so ranges have no gaps."""
    config = config_of(shuffle_block=block, order_version=version)
    shards = Shards(sizes, parts)
    order = RunOrder(config, shards.manifest)
    rank = data.draw(st.integers(0, ranks - 1))
    first = data.draw(st.integers(0, 2 * order.steps_per_epoch))
    lanes = range(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    plan = ReadPlan(0, GIB, passes, fill=False)
    pool = RangePool(shards.read_range, GIB, num_threads=0)
    ahead = ReadAhead(config, shards.manifest, shards, plan, order, lanes, pool)
    for step in range(first, first + order.steps_per_epoch + 3):
        ahead.advance(step)
        if data.draw(st.booleans(), label="in time"):
            pool.run_due()
        for slot in order.slots(step, rank, ranks):
            entry, row = shards.locate(slot.sample)
            taken = ahead.block_of(slot).take(entry, shards._index_of(entry), row)
            own = order.of_epoch(slot.source, slot.epoch)
            phase = own.window_phase(slot.lane, slot.position, 2)
            wanted = parts_to_read(config.data, shards.manifest, phase)
            assert sorted(taken) == [part * entry.num_samples + row for part in wanted]
            assert all(len(each) == 1 for each in taken.values())
    # What is kept is of the blocks in use and the next ones.
    assert pool.bytes_kept <= 2 * len(lanes) * block * parts


@settings(max_examples=25, deadline=None)
@given(
    sources=st.lists(
        st.tuples(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 5)).filter(
            lambda source: sum(source[0]) >= 4
        ),
        min_size=2,
        max_size=4,
    ),
    block=st.integers(1, 30),
    first=st.integers(0, 30),
    rank=st.integers(0, 1),
)
def test_every_sample_of_a_mixture_is_read_once_with_its_block(sources, block, first, rank):
    sizes, weights = zip(*sources, strict=True)
    config = mixture_of(weights, shuffle_block=block)
    shards = Shards(sizes[0], 4, *sizes[1:])
    order = RunOrder(config, shards.manifest)
    pool = RangePool(shards.read_range, GIB, num_threads=0)
    lanes = range(2 * rank, 2 * rank + 2)
    plan = ReadPlan(0, GIB, 1, fill=False)
    ahead = ReadAhead(config, shards.manifest, shards, plan, order, lanes, pool)
    for step in range(first, first + 12):
        ahead.advance(step)
        pool.run_due()
        for slot in order.slots(step, rank, 2):
            entry, row = shards.locate(slot.sample)
            taken = ahead.block_of(slot).take(entry, shards._index_of(entry), row)
            own = order.of_epoch(slot.source, slot.epoch)
            phase = own.window_phase(slot.lane, slot.position, 2)
            wanted = parts_to_read(config.data, shards.manifest, phase)
            assert sorted(taken) == [part * entry.num_samples + row for part in wanted]


@pytest.mark.parametrize("version", [1, 2])
def test_no_step_waits_where_requests_are_made_when_they_are_due(version, monkeypatch):
    """Over the border of two epochs, from the middle of a block on."""
    sizes, config = [50] * 8, config_of(shuffle_block=24, order_version=version)
    shards = Shards(sizes, 4)
    order = RunOrder(config, shards.manifest)
    request, ahead_of_use = RangePool.request, []

    def recorded(self, wanted, *, ahead):
        ahead_of_use.append(ahead)
        request(self, wanted, ahead=ahead)

    monkeypatch.setattr(RangePool, "request", recorded)
    pool = RangePool(shards.read_range, GIB, num_threads=0)
    plan = ReadPlan(0, GIB, 1, fill=False)
    ahead = ReadAhead(config, shards.manifest, shards, plan, order, range(4), pool)
    for step in range(5, 2 * order.steps_per_epoch):
        ahead.advance(step)
        pool.run_due()
        for slot in order.slots(step, 0, 1):
            entry, row = shards.locate(slot.sample)
            assert ahead.block_of(slot).take(entry, shards._index_of(entry), row)
    assert all(ahead_of_use)
    assert len(ahead_of_use) > 40


def test_windows_of_a_phase_have_frames_of_few_parts():
    four = manifest_of([10], 100, num_parts=4)

    def parts_of(stride: int, phase: int | None) -> list[int]:
        data = config_of(num_frames=16, sampling_rate=stride).data
        return list(parts_to_read(data, four, phase))

    assert [parts_of(4, phase) for phase in range(4)] == [[0], [1], [2], [3]]
    assert parts_of(4, None) == [0, 1, 2, 3]
    assert parts_of(2, 1) == [1, 3]
    assert parts_of(8, 6) == [2]
    assert parts_of(1, 0) == [0, 1, 2, 3]


def test_tasks_and_the_first_order_have_windows_of_all_phases():
    assert uses_phases(recipe.load("svfap_base_voxceleb2"))
    assert not uses_phases(recipe.load("svfap_base_voxceleb2", ["data.order_version=1"]))
    assert not uses_phases(recipe.load("finetune_dfew"))


def test_memory_follows_the_node_and_bounds_what_is_read_at_a_time(monkeypatch):
    config = recipe.load("svfap_base_voxceleb2")
    whole, parts = manifest_of([1000] * 1100, 240_000), manifest_of([1000] * 1100, 240_000, 4)
    of_lane = 512 * 240_000 * 3 // 4
    monkeypatch.setattr(read_ahead, "node_memory", lambda: 64 * GIB)
    one, eight = World(0, 0, 1, 1), World(0, 0, 8, 8)
    assert plan_reads(config, whole, one) == ReadPlan(64 * of_lane, 16 * GIB, 1, fill=True)
    assert plan_reads(config, parts, one) == ReadPlan(16 * of_lane, 16 * GIB, 1, fill=True)
    assert plan_reads(config, whole, eight) == ReadPlan(8 * of_lane, 2 * GIB, 1, fill=True)
    monkeypatch.setattr(read_ahead, "node_memory", lambda: 8 * GIB)
    assert plan_reads(config, whole, one) == ReadPlan(64 * of_lane, 2 * GIB, 3, fill=True)
    assert plan_reads(config, whole, one, memory=2 * GIB).fill is False  # no neighbors in a pass
    first = recipe.load("svfap_base_voxceleb2", ["data.order_version=1"])
    assert plan_reads(first, whole, one).needed == 64 * 512 * 240_000
    other = recipe.load("svfap_base_voxceleb2", [f"data.read_ahead_bytes={6 * GIB}"])
    assert plan_reads(other, whole, one).passes == 1
    # Of samples that are not all in use, and of small blocks, neighbors are not worth a request.
    assert not plan_reads(config, whole, one, (1_000_000,)).fill
    assert not plan_reads(config, manifest_of([1000] * 1100, REQUEST_COST // 600), one).fill
    # No block is longer than its lane.
    assert plan_reads(config, manifest_of([640], 240_000), one).needed == 64 * 10 * 180_000


def test_a_node_has_memory():
    assert 64 * MIB < read_ahead.node_memory() < 1 << 50
