"""Which cluster a run uses, and whether it has room for the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from svfap_dist.cluster import connection
from svfap_dist.config import ClusterConfig
from svfap_dist.errors import ClusterError


@pytest.mark.parametrize(
    ("least", "cpus", "gpus", "lacking"),
    [
        (0, 8, 4, ""),
        (0, 7, 4, "7 CPUs where 8 are needed"),
        (0, 8, 3, "3 GPUs where 4 are needed"),
        (2, 4, 2, ""),
        (2, 3, 2, "3 CPUs where 4 are needed"),
        (2, 4, 1, "1 GPUs where 2 are needed"),
    ],
)
def test_there_must_be_room_for_the_smallest_group(monkeypatch, least, cpus, gpus, lacking):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})
    cluster = ClusterConfig(num_workers=4, min_workers=least, cpus_per_worker=2, use_gpu=True)
    assert connection.shortage(cluster) == lacking
    if lacking:
        key = "cluster.min_workers = 2" if least else "cluster.num_workers = 4"
        with pytest.raises(ClusterError, match=key):
            connection.check_resources(cluster)
    else:
        connection.check_resources(cluster)


def test_two_runs_without_an_address_have_a_cluster_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one Ray itself finds a cluster that runs on this machine, and refuses our CPUs."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    with connection.connected(ClusterConfig(num_workers=2)):
        assert asked[0]["address"] == "local"
        assert asked[0]["num_cpus"] >= 2
