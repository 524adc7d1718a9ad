"""Ray worker processes that have made a rank's imports before it starts."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import ray

from svfap_dist.cluster import standby


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_next_actor_takes_the_standby_process(cluster):
    class Rank:
        """An actor with the environment of a rank."""

        def pid(self) -> int:
            return os.getpid()

        def start_standbys(self, count: int) -> None:
            standby.start_standbys(count)

        def num_standbys(self) -> int:
            return standby._count_idle()

    environment = {"env_vars": standby.environment(use_gpu=False)}
    rank: Any = ray.remote(num_cpus=0, runtime_env=environment)(Rank)
    first = rank.remote()
    pid = ray.get(first.pid.remote())
    for _ in range(2):  # the second call finds what the first has started
        ray.get(first.start_standbys.remote(1))
        while ray.get(first.num_standbys.remote()) == 0:
            time.sleep(0.1)
    assert ray.get(first.num_standbys.remote()) == 1

    second = rank.remote()
    assert ray.get(second.pid.remote()) not in (0, pid)
    assert ray.get(first.num_standbys.remote()) == 0  # it was idle, and no other was started


def test_hook_of_the_job_is_kept(monkeypatch):
    monkeypatch.setenv("__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR", "package.set_up")
    assert standby.environment(use_gpu=False) == {}


def test_imports_are_counted_from_the_failure_on(monkeypatch):
    monkeypatch.setattr(standby, "_imports", [(100.0, 104.0)])
    assert [standby.import_seconds(since) for since in (90.0, 103.0, 110.0)] == [4.0, 1.0, 0.0]
