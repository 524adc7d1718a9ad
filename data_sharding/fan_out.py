"""Make many groups by several processes of this machine; `fan_out_ray` does it on a cluster.

In: a job and its groups. Out: a tally per group, in the order of completion. Each worker is a
process that makes one shard after the other; a list of videos goes to it, and a tally comes back. A
worker that dies loses its group, which is tried again a few times. At most one group per worker is
in memory. Workers are spawned, not forked: a forked copy of an S3 client hangs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable

from data_sharding.make_shard import ShardJobSpec, ShardMaker
from data_sharding.markers import Tally
from data_sharding.plan import Group
from svfap_dist.errors import ClusterError, SvfapError
from svfap_dist.parallel.child import CrashedError
from svfap_dist.parallel.ordered_map import ordered_map
from svfap_dist.parallel.pool import ProcessPool

ATTEMPTS = 3  # to make a group


def make_all(
    job: ShardJobSpec, groups: Iterable[Group], workers: int, processes: int = 1
) -> Generator[Tally]:
    """Make the shards of all groups; yield a tally for each finished one.

    Args:
        job: what all shards have in common.
        groups: taken as the workers get to them.
        workers: processes that make a shard each at a time.
        processes: processes of each worker that examine videos.

    Raises:
        StorageError: The store failed.
        ClusterError: A group's worker died again and again.
    """
    pool = ProcessPool(
        ShardMaker(job, processes).__call__, workers, seconds=None, may_have_children=True
    )
    make = functools.partial(with_retries, pool)
    try:
        for _, tally in ordered_map(
            make, groups, threads=workers, limit=workers, in_order=False, stop=pool.kill
        ):
            yield tally
    finally:
        pool.kill()
        pool.close()


def with_retries(make: Callable[[Group], Tally], group: Group) -> Tally:
    """Make a group, again if the worker died or the error is retryable.

    Args:
        make: makes a group.
        group: videos of a shard.

    Raises:
        ClusterError: The worker died at the last attempt.
        Exception: What the last attempt raised.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return make(group)
        except CrashedError as error:
            if attempt == ATTEMPTS:
                raise worker_died(group, str(error)) from error
        except SvfapError as error:
            if attempt == ATTEMPTS or not error.retryable:
                raise
    raise AssertionError


def worker_died(group: Group, found: str) -> ClusterError:
    """Return the error for a group whose workers die.

    Args:
        group: the videos of the shard.
        found: how the last worker ended.
    """
    return ClusterError(
        f"A worker process died {ATTEMPTS} times over the same shard",
        where=f"{group.name}, videos {group.keys[0]} to {group.keys[-1]}",
        found=found,
        do="see whether the machine is short of memory, then run the same command again",
    )
