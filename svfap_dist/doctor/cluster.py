"""The Ray cluster of RAY_ADDRESS, as `svfap pretrain --on ray` will meet it."""

from __future__ import annotations

import os

from svfap_dist.cluster import connection
from svfap_dist.config import Config
from svfap_dist.doctor.finding import Finding, failing, ok, warn

_NAME = "Ray cluster"


def examine(config: Config | None) -> list[Finding]:
    """Whether it can be reached and has room for the recipe's ranks."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return [ok(_NAME, "no RAY_ADDRESS: --on ray starts one on this machine")]
    return [failing(_NAME, lambda: _reached(address, config or Config()))]


def _reached(address: str, config: Config) -> Finding:
    with connection.connected(config.cluster):
        lacking = connection.shortage(config.cluster)
    if lacking:
        return warn(
            _NAME,
            f"{address}: {lacking} by cluster.num_workers = {config.cluster.num_workers}",
            "add nodes, lower cluster.num_workers or cluster.cpus_per_worker, or set "
            "cluster.wait_seconds if nodes are on their way",
        )
    return ok(_NAME, f"{address}: has room for the recipe's ranks")
