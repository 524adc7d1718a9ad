"""Real servers for the tests below, started once per session, ended by their pids."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ceph import Ceph
from launched_runs import SMALL, svfap
from ray_hosts import RayHosts
from slurm import Slurm

from data_sharding.pipeline import shard


@pytest.fixture(scope="session", autouse=True)
def _no_loopback_ray() -> None:
    """What a run on its own Ray leaves in the environment keeps hosts apart."""
    os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    store = Ceph(Path(tmp_path_factory.mktemp("ceph")))
    try:
        store.start()
        yield store
    finally:
        store.stop()


@pytest.fixture
def ceph_bucket(ceph: Ceph, request, monkeypatch) -> str:
    """A fresh bucket of the real store, with the client's environment set for it."""
    import fsspec

    from svfap_dist.storage.s3 import LiteralS3

    for name, value in ceph.environment().items():
        monkeypatch.setenv(name, value)
    for kind in (LiteralS3, fsspec.get_filesystem_class("s3")):
        kind.clear_instance_cache()
    bucket = request.node.name.lower().replace("_", "-").replace("[", "-").replace("]", "")[:60]
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    cluster = Slurm()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def ray_hosts() -> Iterator[RayHosts]:
    cluster = RayHosts()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of 32 small clips, for the runs of `launched_runs`."""
    folder = str(tmp_path_factory.mktemp("data") / "shards")
    shard("synthetic", "clips=32,frames=16,size=64", folder, min_frames=8, workers=0)
    return folder


@pytest.fixture(scope="session")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `launched_runs` without a stop, on one rank of this machine."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = svfap("pretrain", "tiny_cpu", f"data.url={shards}", f"run.url={run}", *SMALL)
    assert done.returncode == 0, done.stderr
    return run
