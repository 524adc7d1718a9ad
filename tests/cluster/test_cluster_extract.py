"""Workers of a Ray cluster extract what one process does."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from pyarrow import parquet
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

from data_sharding import pipeline as sharding
from svfap_dist import storage
from svfap_dist.cli.app import app
from svfap_dist.cluster import extract
from svfap_dist.errors import CheckpointError, ClusterError
from svfap_dist.inference.extract_parts import ExtractJob, PartResult
from svfap_dist.inference.parts import Part
from svfap_dist.model import autoencoder, weights
from svfap_dist.model.weights import ModelInfo

BUILD = {"size": "nano", "stage_depths": [1, 2], "num_frames": 4, "frame_size": 64}
pytestmark = pytest.mark.slow


def test_actors_give_the_rows_of_one_process(tmp_path, monkeypatch):
    from clips import make_video

    for number in range(5):
        make_video(tmp_path / "videos" / f"{number}.mp4", 20, size=(64, 64), seed=number)
    shards, network = str(tmp_path / "shards"), str(tmp_path / "network")
    sharding.shard(
        "folder", str(tmp_path / "videos"), shards, min_frames=7, workers=1, max_samples_per_shard=2
    )
    model = autoencoder.build(**BUILD)
    info = ModelInfo.of_build(BUILD, model.size)
    weights.save(storage.join(network, weights.WEIGHTS), model.state_dict(), BUILD, info)
    storage.write_bytes(storage.join(network, weights.BUILD), info.to_json(weights.WEIGHTS))
    words = ["extract", network, shards, "--threads=1", "--json", "-o"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "ray"), "--ray=local", "--workers=2"])
    assert done.exception is None
    said = json.loads(done.stdout)
    assert (said["parts"], said["videos"]) == (3, 5)
    here = CliRunner().invoke(app, [*words, str(tmp_path / "here"), "--format=parquet"])
    assert here.exception is None
    tables = [parquet.read_table(tmp_path / name).to_pylist() for name in ("ray", "here")]
    without = [[{**row, "features": None} for row in table] for table in tables]
    assert without[0] == without[1]
    for ours, theirs in zip(*tables, strict=True):
        assert ours["features"] == pytest.approx(theirs["features"], abs=1e-5)
    # An error of a worker is the user's error, with its four parts.
    from svfap_dist.inference import extract_parts

    monkeypatch.setattr(extract_parts, "digest_network", lambda network: "another")
    failed = CliRunner().invoke(app, [*words, str(tmp_path / "failed"), "--ray=local"])
    assert isinstance(failed.exception, CheckpointError)
    assert "has changed during the extraction" in str(failed.exception)


JOB = ExtractJob("network", "output", threads=1, device="cpu")
PARTS = [Part(number, number) for number in range(1, 5)]


@pytest.fixture
def light_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that load no network, and a line at once about those that have not started."""

    class Worker:
        def __init__(self, job: ExtractJob) -> None:
            del job

        def has_started(self) -> None:
            return

        def extract(self, part: Part) -> PartResult:
            return PartResult(part.num_videos, clips=len(os.environ.get("HF_TOKEN", "")))

    monkeypatch.setattr(extract, "_Worker", Worker)
    monkeypatch.setattr(extract, "_SECONDS_TO_START", 0.01)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster whose head has no CPU, to which this process is connected."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_free_workers_do_all_parts_of_a_cluster_that_is_partly_in_use(
    light_workers, cluster, caplog
):
    caplog.set_level(logging.INFO)
    cluster.add_node(num_cpus=2)
    other: Any = ray.remote(num_cpus=1)(dict).remote()
    ray.get(other.__ray_ready__.remote())
    results = list(extract.run_on_ray(JOB, PARTS, cluster.address, None, cpus=1))
    assert sorted(result.videos for result in results) == [1, 2, 3, 4]
    assert "1 of 2 workers have not started yet; each needs 1 CPUs free" in caplog.text


def test_workers_wait_for_machines_only_if_their_number_is_given(
    light_workers, cluster, monkeypatch
):
    """A cluster that grows on demand has no machine until an actor asks for one."""
    with pytest.raises(ClusterError, match="--workers if machines join on demand"):
        list(extract.run_on_ray(JOB, PARTS, cluster.address, None, cpus=1))
    monkeypatch.setattr(extract.log, "info", lambda *_: cluster.add_node(num_cpus=1))
    results = list(extract.run_on_ray(JOB, PARTS, cluster.address, 1, cpus=1))
    assert sorted(result.videos for result in results) == [1, 2, 3, 4]


def test_workers_have_the_credentials_of_the_command(light_workers, cluster, monkeypatch):
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("HF_TOKEN", "12345")  # after the cluster's processes have started
    results = list(extract.run_on_ray(JOB, PARTS[:1], cluster.address, None, cpus=1))
    assert [result.clips for result in results] == [5]
