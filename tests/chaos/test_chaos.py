"""The short form of `make chaos`: faults that must cost time only, on real services."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_cluster import ChaosCluster
from faults import FAULTS, Stage

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    # What a run on its own Ray leaves in the environment keeps hosts apart.
    os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    with ChaosCluster(Path(tmp_path_factory.mktemp("chaos")), seed=0) as cluster:
        yield Stage(cluster)


# Kills of ranks alone: test_cluster_ray_train.py.
@pytest.mark.parametrize("name", ["host-power-cut", "storage-faults"])
def test_a_fault_costs_time_only(stage: Stage, name: str):
    row = FAULTS[name](stage)
    assert row.is_good, row
    assert row.samples > 0
    if name == "storage-faults":  # needs no restart: that it has happened is in the note
        assert row.note, row
