"""Start an actor like a rank, then standby processes, then another actor; print what was seen.

A script: Ray's driver may abort the process that it is in while it disconnects.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import ray

from svfap_dist.cluster import standby


class Rank:
    """An actor with the environment of a rank."""

    def pid(self) -> int:
        return os.getpid()

    def start_standbys(self, count: int) -> None:
        standby.start_standbys(count)

    def num_standbys(self) -> int:
        return standby._count_idle()


def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    environment = {"env_vars": standby.environment(use_gpu=False)}
    rank: Any = ray.remote(num_cpus=0, runtime_env=environment)(Rank)
    first = rank.remote()
    pids, idle = [ray.get(first.pid.remote())], []
    for _ in range(2):  # the second call finds what the first has started
        ray.get(first.start_standbys.remote(1))
        while ray.get(first.num_standbys.remote()) == 0:
            time.sleep(0.1)
        idle.append(ray.get(first.num_standbys.remote()))
    second = rank.remote()
    pids.append(ray.get(second.pid.remote()))
    idle.append(ray.get(first.num_standbys.remote()))
    print(json.dumps({"pids": pids, "idle": idle}), flush=True)


if __name__ == "__main__":
    main()
