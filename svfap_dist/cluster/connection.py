"""A Ray cluster to train on: joined or started, and asked whether it is large enough."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from svfap_dist.config import ClusterConfig, Config
from svfap_dist.errors import ClusterError
from svfap_dist.parallel.ray_connection import connected_to_ray

_SECONDS_BETWEEN_LOOKS = 0.5


@contextlib.contextmanager
def connected(config: Config) -> Iterator[None]:
    """Connect to the Ray cluster in RAY_ADDRESS, else to one of our own on loopback.

    Args:
        config: its section `cluster` says how many CPUs a cluster of our own needs.

    Raises:
        ClusterError: There is no cluster at that address, or it refuses.
    """
    cluster = config.cluster
    cpus = max(os.cpu_count() or 1, cluster.num_workers * cluster.cpus_per_worker)
    fix = "check RAY_ADDRESS and the cluster's token, or use --on local"
    with connected_to_ray(os.environ.get("RAY_ADDRESS") or None, num_cpus=cpus, fix=fix):
        yield


def check_resources(config: Config) -> None:
    """Refuse what the cluster can never place, instead of waiting for ever.

    Nodes that are on their way have `cluster.wait_seconds` to join.
    """
    deadline = time.monotonic() + config.cluster.wait_seconds
    while lacking := shortage(config.cluster):
        if time.monotonic() >= deadline:
            raise ClusterError(
                "Cluster is too small for the recipe",
                where=f"cluster.num_workers = {config.cluster.num_workers}",
                found=lacking,
                do="add nodes, lower cluster.num_workers or cluster.cpus_per_worker, or raise "
                "cluster.wait_seconds if nodes are on their way",
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def shortage(cluster: ClusterConfig) -> str:
    """What the cluster lacks for the worker group, "" if nothing."""
    import ray

    total = ray.cluster_resources()
    needed = {"CPU": cluster.num_workers * cluster.cpus_per_worker}
    if cluster.use_gpu:
        needed["GPU"] = cluster.num_workers
    for name, amount in needed.items():
        if total.get(name, 0) < amount:
            return f"{total.get(name, 0):g} {name}s where {amount} are needed"
    return ""
