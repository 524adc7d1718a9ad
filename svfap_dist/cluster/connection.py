"""A Ray cluster to train on: connected to or started, and checked for its size."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator

from svfap_dist.config import ClusterConfig, Config, with_device
from svfap_dist.errors import ClusterError
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.parallel.ray_connection import LOCAL, connected_to_ray

_SECONDS_BETWEEN_POLLS = 0.5

log = logging.getLogger(__name__)


@contextlib.contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Connect to the Ray cluster in RAY_ADDRESS, else to one of our own on loopback.

    Args:
        cluster: The recipe's section, for the CPUs of a cluster of our own.

    Raises:
        ClusterError: If there is no cluster at that address, or it refuses.
    """
    cpus = max(usable_cpus(), cluster.num_workers * cluster.cpus_per_worker)
    fix = "check RAY_ADDRESS and the cluster's token, or use --on local"
    with connected_to_ray(os.environ.get("RAY_ADDRESS") or LOCAL, num_cpus=cpus, fix=fix):
        yield


def with_device_of_cluster(config: Config) -> Config:
    """Return the recipe with cluster.use_gpu decided by the GPUs of the connected cluster.

    Args:
        config: The recipe.
    """
    import ray

    fewest = config.cluster.fewest_workers
    return with_device(config, lambda: ray.cluster_resources().get("GPU", 0) >= fewest)


def check_resources(cluster: ClusterConfig) -> None:
    """Check that the connected cluster has room for the worker group, which would wait forever.

    Args:
        cluster: The recipe's section; nodes have its `wait_seconds` to join.

    Raises:
        ClusterError: If the cluster is still too small.
    """
    deadline = time.monotonic() + cluster.wait_seconds
    while lacking := shortage(cluster):
        waits = "Waiting up to %d s for nodes to join the Ray cluster, which has %s."
        log.info(waits, cluster.wait_seconds, lacking, extra={"once": True})
        if time.monotonic() >= deadline:
            where = f"{fewest_key(cluster)} = {cluster.fewest_workers}"
            advice = f"add nodes, lower {fewest_key(cluster)} or cluster.cpus_per_worker, or raise "
            advice += "cluster.wait_seconds if nodes are on their way"
            raise ClusterError("Cluster is too small for the recipe", where, lacking, advice)
        time.sleep(_SECONDS_BETWEEN_POLLS)


def fewest_key(cluster: ClusterConfig) -> str:
    """Return the key of the recipe that says how many ranks the cluster must have room for.

    Args:
        cluster: The recipe's section.
    """
    return "cluster.min_workers" if cluster.min_workers else "cluster.num_workers"


def shortage(cluster: ClusterConfig) -> str:
    """Return the resources that the connected cluster lacks for the smallest group, "" if none.

    Args:
        cluster: The recipe's section.
    """
    import ray

    total = ray.cluster_resources()
    needed = {"CPU": cluster.fewest_workers * cluster.cpus_per_worker}
    if cluster.on_gpu:
        needed["GPU"] = cluster.fewest_workers
    for name, amount in needed.items():
        if total.get(name, 0) < amount:
            return f"{total.get(name, 0):g} {name}s where {amount} are needed"
    return ""
