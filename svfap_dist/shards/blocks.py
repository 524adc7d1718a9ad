"""Blocks of samples, read in large ranges, ahead of their use, and each byte once.

Training uses samples in blocks: neighbors in the shards, in random order (`data.sample_order`).
What a block needs is known in advance, so it is cut into a few ranges, each of which is one
request. When a range arrives its samples are separated, and each is freed when it is taken.

Requests are due at steps. `RangePool` has threads that make those that are due, and that stop while
as many bytes are kept as the limit allows. A thread that needs a sample whose range has not arrived
waits for the request in progress, or makes it.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from svfap_dist.shards.format import ShardEntry, ShardIndex

log = logging.getLogger(__name__)

RANGE_BYTES = 8 << 20  # of a request, at most
REQUEST_COST = 2 << 20  # bytes that are transferred in about the time that one more request takes

_EPSILON = 1e-3  # of a step

FetchRange = Callable[[ShardEntry, int, int], bytes | memoryview]
# Shard, its index, rows in it and their places among the requested samples, shard by shard.
Locate = Callable[[np.ndarray], Iterable[tuple[ShardEntry, ShardIndex, np.ndarray, np.ndarray]]]


@dataclasses.dataclass(eq=False)
class _Range:
    """A byte range of a shard: one request.

    extents: start and stop of each part that was not taken yet, by its place in the index. data:
    the bytes of these parts, once they have arrived. arrival: of a request under way.
    """

    entry: ShardEntry
    start: int
    stop: int
    extents: dict[int, tuple[int, int]]
    data: dict[int, bytes] | None = None
    arrival: Future[None] | None = None


def cut_ranges(starts: np.ndarray, stops: np.ndarray) -> Iterator[slice]:
    """Yield which byte ranges of a file to request together, as slices of the arguments.

    Neighbors with a gap that costs less than another request make a run. A run is cut into the
    fewest equal ranges of about `RANGE_BYTES` or less.

    Args:
        starts: First bytes, ascending.
        stops: Bytes after the last ones.
    """
    breaks = np.flatnonzero(starts[1:] - stops[:-1] > REQUEST_COST) + 1
    for first, end in itertools.pairwise([0, *breaks.tolist(), len(starts)]):
        length = int(stops[end - 1] - starts[first])
        count = -(-length // RANGE_BYTES)
        inner = starts[first] + np.arange(1, count) * length // count
        cuts = first + np.searchsorted(starts[first:end], inner)
        yield from itertools.starmap(slice, itertools.pairwise(np.unique([first, *cuts, end])))


class RangePool:
    """Makes requests when they are due, or when a part is needed, and keeps parts until then.

    Args:
        fetch: Reads a byte range of a shard.
        limit: Bytes of parts above which no more requests are made ahead.
        num_threads: Requests made ahead at a time; 0: only by `run_due`.
    """

    def __init__(self, fetch: FetchRange, limit: int, num_threads: int) -> None:
        self._fetch_range, self._limit = fetch, limit
        self._wake = threading.Condition()
        self._jobs: list[tuple[float, int, Callable[[], None]]] = []  # heap of (due, number, job)
        self._numbers = itertools.count()
        self._step, self._is_closing = -1, False
        self.bytes_kept = 0
        self._threads = [
            threading.Thread(target=self._serve, name=f"reads-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, due: float, job: Callable[[], None]) -> None:
        """Queue a job for a thread of the pool.

        Args:
            due: Step from which on it may be done; earlier ones first.
            job: Its errors are ignored: a thread that needs its result repeats it.
        """
        with self._wake:
            heapq.heappush(self._jobs, (due, next(self._numbers), job))
            self._wake.notify()

    def advance(self, step: int) -> None:
        """Note that the samples of a step are about to be used.

        Args:
            step: Counted over all epochs.
        """
        with self._wake:
            self._step = step
            if self._is_due():
                self._wake.notify_all()

    def run_due(self) -> None:
        """Do all jobs that are due, in this thread."""
        while job := self._next_job(wait=False):
            job()

    def close(self) -> None:
        """End the threads, and drop the requests that are not made yet."""
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        self._jobs.clear()

    def request(self, wanted: _Range, *, ahead: bool) -> None:
        """Request a range, unless it has been: its parts are then kept.

        Args:
            wanted: The range.
            ahead: Before a part is needed: threads that wait for it do not get the error.
        """
        with self._wake:
            if wanted.data is not None or wanted.arrival or not wanted.extents:
                return
            wanted.arrival = arrival = Future()
            extents = wanted.extents.copy()
            size = sum(stop - start for start, stop in extents.values())
            self.bytes_kept += size
        try:
            data = self._fetch(wanted, extents)
        except BaseException as error:
            with self._wake:
                self.bytes_kept -= size
                wanted.arrival = None
            if ahead:
                arrival.set_result(None)
            else:
                arrival.set_exception(error)
            raise
        with self._wake:
            wanted.data, wanted.arrival = data, None
        arrival.set_result(None)

    def _fetch(self, wanted: _Range, extents: dict[int, tuple[int, int]]) -> dict[int, bytes]:
        found = memoryview(self._fetch_range(wanted.entry, wanted.start, wanted.stop))
        first = wanted.start
        return {place: bytes(found[a - first : b - first]) for place, (a, b) in extents.items()}

    def take(self, wanted: _Range, place: int) -> bytes | None:
        """Return and forget the bytes of a part; None if it was taken before.

        Args:
            wanted: The range that it is in.
            place: Of the part, in the shard's index.
        """
        while True:
            with self._wake:
                if place not in wanted.extents:
                    return None
                if wanted.data is not None:
                    start, stop = wanted.extents.pop(place)
                    self.bytes_kept -= stop - start
                    if self._is_due():
                        self._wake.notify()
                    return wanted.data.pop(place)
                arrival = wanted.arrival
            if arrival is None:
                self.request(wanted, ahead=False)
            else:
                arrival.result()

    def _is_due(self) -> bool:
        is_due = bool(self._jobs) and self._jobs[0][0] <= self._step
        return is_due and self.bytes_kept < self._limit

    def _next_job(self, *, wait: bool) -> Callable[[], None] | None:
        with self._wake:
            while wait and not self._is_closing and not self._is_due():
                self._wake.wait()
            if self._is_closing or not self._is_due():
                return None
            return heapq.heappop(self._jobs)[2]

    def _serve(self) -> None:
        while job := self._next_job(wait=True):
            try:
                job()
            except Exception as error:  # a lack of memory must not end the thread
                log.debug("A range was not fetched ahead: %s", error)


class Block:
    """Samples that are used over some steps, and read in ranges. Thread-safe.

    Args:
        pool: Makes the requests.
        locate: Returns the shard, the index and the rows of samples, shard by shard.
        samples: Global indices, in the order of use.
        parts: Which parts of each sample to read, of those that the data set's samples have.
        steps: Step that uses the first sample; and how long before it requests may be made.
        fill: Make no request of fewer bytes than `REQUEST_COST`, but request neighbors with it.
    """

    def __init__(
        self,
        pool: RangePool,
        locate: Locate,
        samples: np.ndarray,
        parts: Sequence[int],
        steps: tuple[int, float],
        *,
        fill: bool,
    ) -> None:
        self._pool, self._locate, self._samples, self._parts = pool, locate, samples, parts
        (self._first_step, self._lead), self._fill = steps, fill
        self._lock = threading.Lock()
        self._range_of: dict[tuple[str, int], _Range] = {}  # by shard and place
        self._is_planned = False
        pool.add(self._first_step - self._lead - 1, self.plan)

    def plan(self) -> None:
        """Cut the block into ranges, once, and have them requested in the order of use.

        Raises:
            ShardError, StorageError: The index of a shard cannot be read.
        """
        with self._lock:
            if self._is_planned:
                return
            ranges = self._cut()
            self._is_planned = True
        for number, each in enumerate(ranges):
            # Of blocks without a lead, as those in use at the start, the first range comes first.
            left = 1 - number / len(ranges)
            due = self._first_step - left * max(self._lead, _EPSILON)
            self._pool.add(due, functools.partial(self._pool.request, each, ahead=True))

    def take(self, entry: ShardEntry, index: ShardIndex, row: int) -> dict[int, bytes]:
        """Return and forget what was read of a sample: bytes of its parts, by place in the index.

        Args:
            entry: The sample's shard.
            index: Of the shard.
            row: Of the sample; if it is not of this block, nothing is returned.

        Raises:
            ShardError, StorageError: The shard cannot be read.
        """
        self.plan()
        taken: dict[int, bytes] = {}
        for part in self._parts_of(index, [row]):
            place = part * len(index.keys) + row
            wanted = self._range_of.get((entry.name, place))
            data = self._pool.take(wanted, place) if wanted else None
            if data is not None:
                taken[place] = data
        return taken

    def _parts_of(self, index: ShardIndex, rows: Sequence[int]) -> Sequence[int]:
        """Return which parts to read of samples of a shard: still images have the first only."""
        return (0,) if all(index.num_frames[row] == 1 for row in rows) else self._parts

    def _cut(self) -> list[_Range]:
        """Return the ranges, ordered by the first use of each."""
        ranges: list[tuple[int, _Range]] = []
        for entry, index, rows, uses in self._locate(self._samples):
            for part in self._parts_of(index, rows.tolist()):
                places = part * len(index.keys) + rows
                starts = np.array(index.offsets)[places]
                stops = starts + np.array(index.sizes)[places]
                order = np.argsort(starts)
                order = order[stops[order] > starts[order]]  # a short video has empty parts
                for cut in cut_ranges(starts[order], stops[order]):
                    chosen = order[cut]
                    start, stop = int(starts[chosen[0]]), int(stops[chosen[-1]])
                    if self._fill:
                        stop = min(max(stop, start + REQUEST_COST), entry.num_bytes)
                        start = max(min(start, stop - REQUEST_COST), 0)
                    extents = zip(starts[chosen].tolist(), stops[chosen].tolist(), strict=True)
                    of_place = dict(zip(places[chosen].tolist(), extents, strict=True))
                    each = _Range(entry, start, stop, of_place)
                    self._range_of |= {(entry.name, place): each for place in of_place}
                    ranges.append((int(uses[chosen].min()), each))
        return [each for _, each in sorted(ranges, key=lambda pair: pair[0])]
