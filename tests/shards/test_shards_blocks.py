"""Blocks: few ranges, each byte requested once, kept until its use, in time and within a limit."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svfap_dist.errors import StorageError
from svfap_dist.shards.blocks import RANGE_BYTES, REQUEST_COST, Block, RangePool, cut_ranges
from svfap_dist.shards.format import BadSample, ShardEntry, ShardIndex
from svfap_dist.shards.reader import SampleReader

MIB = 1 << 20


@given(
    st.lists(st.tuples(st.integers(0, 3 * MIB), st.integers(1, 12 * MIB)), min_size=1, max_size=60)
)
def test_ranges_hold_everything_once_and_are_large_where_parts_are_neighbors(parts):
    """parts: gap before a part, and its size."""
    edges = np.cumsum(np.array(parts).ravel())
    starts, stops = edges[::2], edges[1::2]
    cuts = list(cut_ranges(starts, stops))
    assert [i for cut in cuts for i in range(len(starts))[cut]] == list(range(len(starts)))
    largest = max(size for _, size in parts)
    for cut in cuts:
        inside = list(range(len(starts))[cut])
        assert stops[inside[-1]] - starts[inside[0]] <= RANGE_BYTES + 2 * (largest + 3 * MIB)
        assert all(starts[b] - stops[a] <= REQUEST_COST for a, b in itertools.pairwise(inside))


def test_neighbors_make_equal_ranges_of_up_to_8_mib():
    starts = np.arange(100) * 240_000
    cuts = list(cut_ranges(starts, starts + 240_000))
    assert [cut.stop - cut.start for cut in cuts] == [34, 33, 33]


class Store:
    """Shards of one byte pattern, and what was requested of them."""

    def __init__(self, samples: int = 100, size: int = 1000, parts: int = 1) -> None:
        count = samples * parts
        none = ("",) * count
        starts = tuple(range(0, count * size, size))
        self.index = ShardIndex(
            tuple(map(str, range(samples))), starts, (size,) * count, none, (61,) * samples
        )
        self.entry = ShardEntry("shard-000000.tar", samples, count * size, "", "")
        self.requests: list[tuple[int, int]] = []
        self.errors: list[Exception] = []
        self.open = threading.Event()
        self.open.set()

    def read(self, entry: ShardEntry, start: int, stop: int) -> bytes:
        assert self.open.wait(10)
        self.requests.append((start, stop))
        if self.errors:
            raise self.errors.pop()
        return np.arange(start, stop, dtype=np.uint32).astype(np.uint8).tobytes()

    def locate(self, samples: np.ndarray):
        yield self.entry, self.index, samples, np.arange(len(samples))

    def expected(self, place: int) -> bytes:
        start, size = self.index.offsets[place], self.index.sizes[place]
        return np.arange(start, start + size, dtype=np.uint32).astype(np.uint8).tobytes()

    def block(self, pool: RangePool, samples, parts=(0,), steps=(0, 0), fill=False) -> Block:
        return Block(pool, self.locate, np.array(samples), parts, steps, fill=fill)

    def take(self, block: Block, row: int) -> dict[int, bytes]:
        return block.take(self.entry, self.index, row)


def pool_of(store: Store, limit: int = 1 << 30, num_threads: int = 0) -> RangePool:
    return RangePool(store.read, limit, num_threads)


def test_each_sample_comes_once_and_each_byte_is_requested_once():
    store = Store()
    pool = pool_of(store)
    block = store.block(pool, [7, 3, 9, 4])
    assert store.take(block, 9) == {9: store.expected(9)}
    assert store.requests == [(3000, 10_000)]
    assert pool.bytes_kept == 3000
    assert store.take(block, 9) == {}
    assert store.take(block, 50) == {}
    for row in (3, 4, 7):
        assert store.take(block, row) == {row: store.expected(row)}
    assert pool.bytes_kept == 0
    assert len(store.requests) == 1


def test_only_the_parts_of_a_block_are_read():
    store = Store(parts=4)
    block = store.block(pool_of(store), [5, 6], parts=(1, 3))
    assert store.take(block, 5) == {105: store.expected(105), 305: store.expected(305)}
    assert store.requests == [(105_000, 107_000), (305_000, 307_000)]


def test_small_ranges_are_filled_up_within_the_shard():
    store = Store(samples=30, size=200_000)  # 6 MB
    pool = pool_of(store)
    for rows, expected in (
        ([0, 1], (0, REQUEST_COST)),
        ([29], (6_000_000 - REQUEST_COST, 6_000_000)),
    ):
        store.take(store.block(pool, rows, fill=True), rows[0])
        assert store.requests.pop() == expected


def test_requests_are_due_evenly_before_the_first_use_in_the_order_of_use():
    store = Store(samples=200, size=240_000)  # 48 MB: 6 ranges
    pool = pool_of(store)
    order = [150, 20, *(i for i in range(200) if i not in (150, 20))]
    store.block(pool, order, steps=(100, 60))
    asked = []
    for step in range(30, 101):
        pool.advance(step)
        pool.run_due()
        asked += [(step, request) for request in store.requests]
        store.requests.clear()
    assert [step for step, _ in asked] == [40, 50, 60, 70, 80, 90]
    (_, (start, stop)), (_, (second, _)) = asked[:2]
    assert start <= 150 * 240_000 < stop
    assert second == 0
    assert pool.bytes_kept == 48_000_000


def test_blocks_that_are_in_use_at_the_start_take_turns():
    store = Store(samples=200, size=240_000)
    pool = pool_of(store)
    store.block(pool, range(100))
    store.block(pool, range(100, 200))
    pool.advance(0)
    pool.run_due()
    firsts = [start // 24_000_000 for start, _ in store.requests]
    assert firsts == [0, 1, 0, 1, 0, 1]


def test_no_request_is_made_ahead_beyond_the_limit_but_those_that_are_needed():
    store = Store(samples=200, size=240_000)
    pool = pool_of(store, limit=10_000_000)
    block = store.block(pool, range(200))
    pool.advance(0)
    pool.run_due()
    assert len(store.requests) == 2  # the limit was not reached before the second
    store.take(block, 199)
    assert len(store.requests) == 3
    for row in range(0, 60):
        store.take(block, row)
    pool.run_due()
    assert len(store.requests) == 4


def test_threads_make_requests_ahead_and_end():
    store = Store(samples=200, size=240_000)
    pool = pool_of(store, num_threads=2)
    block = store.block(pool, range(200), steps=(3, 2))
    pool.advance(3)
    deadline = time.monotonic() + 10
    while len(store.requests) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(store.requests) == 6
    assert store.take(block, 5) == {5: store.expected(5)}
    pool.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("reads")]


def test_those_who_need_a_sample_wait_for_the_request_under_way():
    store = Store()
    pool = pool_of(store)
    block = store.block(pool, range(100))
    store.open.clear()
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update(store.take(block, i))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    store.open.set()
    for thread in threads:
        thread.join(10)
    assert found == {i: store.expected(i) for i in range(8)}
    assert len(store.requests) == 1


@pytest.mark.parametrize("error", [StorageError("Cannot read", "x", "busy", "wait"), MemoryError()])
def test_an_error_ahead_is_left_to_those_who_need_the_sample(error):
    store = Store()
    pool = pool_of(store, num_threads=1)
    store.errors = [error]
    block = store.block(pool, range(100))
    pool.advance(0)
    deadline = time.monotonic() + 10
    while store.errors and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.take(block, 5) == {5: store.expected(5)}
    assert len(store.requests) == 2
    assert all(thread.is_alive() for thread in pool._threads)
    pool.close()
    again = store.block(pool_of(store), range(100))
    store.errors = [StorageError("Cannot read", "x", "busy", "wait")]
    with pytest.raises(StorageError):
        store.take(again, 5)
    assert store.take(again, 5) == {5: store.expected(5)}


def test_a_reader_takes_samples_from_a_block_and_others_from_the_store(make_data_set, monkeypatch):
    data_set = make_data_set([5, 4])
    reader = SampleReader(data_set.url, data_set.manifest, range_bytes=1, cache_bytes=1)
    requests, read = [], reader.read_range
    monkeypatch.setattr(reader, "read_range", lambda *a: requests.append(a[1:]) or read(*a))
    pool = RangePool(reader.read_range, 1 << 30, num_threads=0)
    block = Block(pool, reader.locate_all, np.array([6, 2, 4, 3]), [0], (0, 0), fill=False)
    for sample in (4, 6, 3, 2):
        assert reader.fetch(sample, block=block) == reader.fetch(sample)
    assert len(requests) == 2 + 4  # a range of each shard, and each alone
    assert reader.fetch(0, block=block) == reader.fetch(0)
    data_set.damage(3)
    again = Block(pool, reader.locate_all, np.array([3, 2]), [0], (0, 0), fill=False)
    bad = reader.fetch(3, block=again)
    assert isinstance(bad, BadSample)
    assert bad.reason == "damaged"
