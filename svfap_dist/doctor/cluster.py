"""Check of the Ray cluster at RAY_ADDRESS, which `svfap pretrain --on ray` would use."""

from __future__ import annotations

import os

from svfap_dist.cluster import connection
from svfap_dist.config import Config
from svfap_dist.config.sections import ClusterConfig
from svfap_dist.doctor.finding import Finding, catch_errors, ok, warn
from svfap_dist.parallel.ray_connection import check_socket_paths

_NAME = "Ray cluster"


def examine(config: Config | None) -> list[Finding]:
    """Check that the cluster can be reached and has room for the recipe's ranks.

    Args:
        config: the recipe; None: defaults.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return [catch_errors(_NAME, _check_own)]
    cluster = (config or Config()).cluster
    return [catch_errors(_NAME, lambda: _check_room(address, cluster))]


def _check_own() -> Finding:
    check_socket_paths()
    return ok(_NAME, "no RAY_ADDRESS: --on ray starts one on this machine")


def _check_room(address: str, cluster: ClusterConfig) -> Finding:
    with connection.connected(cluster):
        lacking = connection.shortage(cluster)
    if lacking:
        key = connection.fewest_key(cluster)
        return warn(
            _NAME,
            f"{address}: {lacking} by {key} = {cluster.fewest_workers}",
            f"add nodes, lower {key} or cluster.cpus_per_worker, or set cluster.wait_seconds if "
            "nodes are on their way",
        )
    return ok(_NAME, f"{address}: has room for the recipe's ranks")
