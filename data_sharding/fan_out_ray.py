"""Many groups, made by the machines of a Ray cluster: the only file of this room that knows Ray.

A task makes one shard, and Ray starts it again elsewhere when its machine is lost. Videos
are read and shards are written by the tasks; through Ray go a list of videos and a tally. The
cluster's machines need this package, the input and the output under the same names, and the
store's credentials.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterable
from typing import Any

from data_sharding import fan_out
from data_sharding.make_shard import Order, ShardMaker
from data_sharding.markers import Tally
from data_sharding.plan import Group
from svfap_dist.errors import ClusterError, SvfapError
from svfap_dist.parallel.ray_address import check_answers

LOCAL = "local"  # address of a cluster that is made on this machine, for this command
_SECONDS_BETWEEN_LOOKS = 1.0  # Ctrl-C waits for the end of one


def make_all(
    order: Order, groups: Iterable[Group], address: str, workers: int | None
) -> Generator[Tally]:
    """Make the shards of all groups by Ray tasks; the tally of each, as they get done.

    workers: shards made at a time; None: one per CPU of the cluster.

    Raises: ClusterError if there is no cluster, or a group's task is lost again and again;
    StorageError from the store.
    """
    ours = _connect(address, workers)
    import ray
    from ray.exceptions import RayError

    # Ray counts attempts after the first. It starts a task again that died, or raised one of these.
    task = ray.remote(num_cpus=1, max_retries=fan_out.ATTEMPTS - 1)(_work)
    order_ref = ray.put(order)
    rest = iter(groups)
    waiting: dict[Any, Group] = {}
    try:
        while True:
            room = (workers or _num_cpus()) - len(waiting)
            for group in itertools.islice(rest, max(room, 0)):
                waiting[task.remote(order_ref, group)] = group
            if not waiting:
                return
            for done in ray.wait(list(waiting), timeout=_SECONDS_BETWEEN_LOOKS)[0]:
                group = waiting.pop(done)
                try:
                    yield ray.get(done)
                except RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, SvfapError):
                        raise cause from error
                    raise fan_out.died(group, str(error).strip().splitlines()[-1]) from error
    finally:
        for left in waiting:
            ray.cancel(left, force=True)
        if ours:
            ray.shutdown()


def _work(order: Order, group: Group) -> Tally:
    with ShardMaker(order) as maker:
        return fan_out.attempted(maker, group)


def _num_cpus() -> int:
    import ray

    return max(int(ray.cluster_resources().get("CPU", 1)), 1)  # a cluster may grow and shrink


def _connect(address: str, workers: int | None) -> bool:
    """Connect to the cluster; whether that was still to be done."""
    own = address == LOCAL
    if own:  # to be set before Ray is imported: everything listens on loopback, without a token
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's name for loopback
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    if ray.is_initialized():
        return False
    advice = "check --ray and the cluster's token, or use --workers"
    check_answers(address, advice)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if own:
            cpus = workers or len(os.sched_getaffinity(0))
            ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            "Cannot connect to Ray",
            where=address,
            found=str(error).splitlines()[0],
            do=advice,
        ) from error
    return True
