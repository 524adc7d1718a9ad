"""A Ray cluster to train on: joined or started, and asked whether it is large enough."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from svfap_dist.config import ClusterConfig, Config
from svfap_dist.errors import ClusterError
from svfap_dist.parallel.ray_address import check_answers

_SECONDS_BETWEEN_LOOKS = 0.5


def _prepare_own_cluster() -> None:
    """Settings of the cluster on this machine; to be made before Ray is imported.

    It serves one user for one run: everything listens on loopback, so no token is asked for, and
    none is written to the home directory, where it would change how other Ray commands behave. The
    ranks are what this machine is to do now, so they do not run at Ray's lower priority.
    """
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's name for loopback
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_worker_niceness", "0")


@contextlib.contextmanager
def connected(config: Config) -> Iterator[None]:
    """A connection to a Ray cluster: the one in RAY_ADDRESS, else one of our own on loopback."""
    _prepare_own_cluster()
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    advice = "check RAY_ADDRESS and the cluster's token, or use --on local"
    if address:
        check_answers(address, advice)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            cluster = config.cluster
            cpus = max(os.cpu_count() or 1, cluster.num_workers * cluster.cpus_per_worker)
            ray.init(num_cpus=cpus, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            "Cannot connect to Ray",
            where=address or "this machine",
            found=str(error).splitlines()[0],
            do=advice,
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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
