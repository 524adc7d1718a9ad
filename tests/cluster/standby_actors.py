"""Start an actor like a rank, standby processes on two nodes, and the next actors; print findings.

A script: Ray's driver may abort the process that it is in while it disconnects.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster

from svfap_dist.cluster import standby


class Rank:
    """An actor with the environment of a rank."""

    def pid(self) -> int:
        return os.getpid()

    def start_standbys(self, count: int) -> None:
        standby.start_standbys(count)

    def start_on_spare_nodes(self) -> list[str]:
        nodes = standby.nodes_with_room({"spare": 1})
        standby.start_on_spare_nodes(nodes, 1)
        return nodes

    def num_standbys(self) -> int:
        return standby._count_idle()


def main() -> None:
    loopback: Any = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=loopback)
    try:
        node = cluster.add_node(**loopback, resources={"spare": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        print(json.dumps(start_all(node)), flush=True)
        ray.shutdown()
    finally:
        cluster.shutdown()


def start_all(node: Any) -> dict[str, Any]:
    """Return the pids of all actors, and how many standby processes were idle after each step."""
    environment = {"env_vars": standby.environment(use_gpu=False)}
    rank: Any = ray.remote(num_cpus=0, runtime_env=environment)(Rank)
    here = {"node:__internal_head__": 0.001}
    first = rank.options(resources=here).remote()
    pids, idle = [ray.get(first.pid.remote())], []
    for _ in range(2):  # the second call finds what the first has started
        ray.get(first.start_standbys.remote(1))
        while ray.get(first.num_standbys.remote()) == 0:
            time.sleep(0.1)
        idle.append(ray.get(first.num_standbys.remote()))
    second = rank.options(resources=here).remote()
    pids.append(ray.get(second.pid.remote()))
    idle.append(ray.get(first.num_standbys.remote()))

    spare = ray.get(first.start_on_spare_nodes.remote())
    raylet = node.all_processes["raylet"][0].process.pid
    while standby._count_idle(raylet) == 0:
        time.sleep(0.1)
    third = rank.options(resources={"spare": 1}).remote()
    pids.append(ray.get(third.pid.remote()))
    idle.append(standby._count_idle(raylet))
    return {"pids": pids, "idle": idle, "spare": spare, "node": node.node_id}


if __name__ == "__main__":
    main()
