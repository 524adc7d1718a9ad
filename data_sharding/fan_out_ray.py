"""Make many groups on the machines of a Ray cluster; the only file of this package that uses Ray.

In: a job and its groups. Out: a tally per group, in the order of completion. A task makes one
shard, and Ray starts it again elsewhere when its machine is lost. Videos are read and shards
written by the tasks; only a list of videos and a tally go through Ray. The cluster's machines need
this package, the input and the output under the same names, and the store's credentials.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from typing import Any

from data_sharding import fan_out
from data_sharding.make_shard import ShardJobSpec, ShardMaker
from data_sharding.markers import Tally
from data_sharding.plan import Group
from svfap_dist.errors import SvfapError
from svfap_dist.parallel.ordered_map import as_completed
from svfap_dist.parallel.ray_connection import connected_to_ray


def make_all(
    job: ShardJobSpec, groups: Iterable[Group], address: str, workers: int | None
) -> Generator[Tally]:
    """Make the shards of all groups by Ray tasks; yield a tally for each finished one.

    Args:
        job: what all shards have in common.
        groups: taken as the cluster gets to them.
        address: of the cluster; "local" starts one on this machine.
        workers: shards made at a time; None: one per CPU of the cluster.

    Raises:
        ClusterError: There is no cluster, or a group's task was lost again and again.
        StorageError: The store failed.
    """
    cpus = workers or len(os.sched_getaffinity(0))
    fix = "check --ray and the cluster's token, or use --workers"
    with connected_to_ray(address, num_cpus=cpus, fix=fix):
        import ray
        from ray.exceptions import RayError

        # Ray counts retries, not attempts: of tasks that died or raised one of its own errors.
        task = ray.remote(num_cpus=1, max_retries=fan_out.ATTEMPTS - 1)(_make)
        job_ref = ray.put(job)
        tasks: dict[Future[Tally], Any] = {}

        def start(group: Group) -> Future[Tally]:
            ref = task.remote(job_ref, group)
            tasks[future := ref.future()] = ref
            return future

        try:
            for group, future in as_completed(start, groups, lambda: workers or _num_cpus()):
                del tasks[future]
                try:
                    yield future.result()
                except RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, SvfapError):
                        raise cause from error
                    found = str(error).strip().splitlines()[-1]
                    raise fan_out.worker_died(group, found) from error
        finally:
            for ref in tasks.values():
                ray.cancel(ref, force=True)


def _make(job: ShardJobSpec, group: Group) -> Tally:
    with ShardMaker(job) as maker:
        return fan_out.with_retries(maker, group)


def _num_cpus() -> int:
    import ray

    return max(int(ray.cluster_resources().get("CPU", 1)), 1)  # a cluster may grow and shrink
