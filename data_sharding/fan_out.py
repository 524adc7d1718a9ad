"""Many groups, made by several processes of this machine; `fan_out_ray` does it on a cluster.

Each worker is a process that makes one shard after the other; a list of videos goes to it, and a
tally comes back. A worker that dies loses the group it was at, which is tried again a few times. At
most one group per worker is in memory. Workers are spawned, not forked: a forked copy of an S3
client hangs.
"""

from __future__ import annotations

import functools
import itertools
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from data_sharding.make_shard import Order, ShardMaker
from data_sharding.markers import Tally
from data_sharding.plan import Group
from svfap_dist.errors import ClusterError, SvfapError
from svfap_dist.parallel.child import CrashedError, Isolated

ATTEMPTS = 3  # to make a group


def make_all(
    order: Order, groups: Iterable[Group], workers: int, processes: int = 1
) -> Generator[Tally]:
    """Make the shards of all groups by so many workers, each of which has so many processes that
    examine videos; the tally of each, as they get done.

    Raises: StorageError from the store; ClusterError if a group's worker dies again and again.
    """
    crew = _Crew(ShardMaker(order, processes), workers)
    rest = iter(groups)
    waiting: set[Future[Tally]] = set()
    try:
        while True:
            for group in itertools.islice(rest, workers - len(waiting)):
                waiting.add(crew.submit(group))
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        crew.close()


class _Crew:
    """Worker processes, each with a thread here that hands it its groups."""

    def __init__(self, maker: ShardMaker, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers)
        work = functools.partial(_work, maker)
        self._all = [Isolated(work, seconds=None, may_have_children=True) for _ in range(workers)]
        self._idle = list(self._all)

    def submit(self, group: Group) -> Future[Tally]:
        return self._pool.submit(self._make, group)

    def _make(self, group: Group) -> Tally:
        worker = self._idle.pop()
        try:
            return attempted(worker, group)
        finally:
            self._idle.append(worker)

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in self._all:
            worker.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.close()


def attempted(make: Callable[[Group], Tally], group: Group) -> Tally:
    """Make a group, again if the worker died or the store did not answer.

    Raises: what the last attempt raised; ClusterError if it died in that.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return make(group)
        except CrashedError:
            continue
        except SvfapError as error:
            if not error.retryable:
                raise
    try:
        return make(group)
    except CrashedError as error:
        raise died(group, str(error)) from error


def died(group: Group, found: str) -> ClusterError:
    """The error for a group whose workers die."""
    return ClusterError(
        f"A worker process died {ATTEMPTS} times over the same shard",
        where=f"{group.name}, videos {group.keys[0]} to {group.keys[-1]}",
        found=found,
        do="see whether the machine is short of memory, then run the same command again",
    )


def _work(maker: ShardMaker, group: Group) -> Tally:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that hands out
    return maker(group)
