"""Workers of a Ray cluster extract what one process does."""

from __future__ import annotations

import json

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from data_sharding import pipeline as sharding
from svfap_dist import storage
from svfap_dist.cli.app import app
from svfap_dist.errors import CheckpointError
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
