"""The whole way on a real object store: shards to it, training from and to it, its refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from data_sharding.pipeline import shard, verify
from svfap_dist import storage
from svfap_dist.checkpoint import store
from svfap_dist.errors import StorageError
from svfap_dist.storage.s3 import LiteralS3

pytestmark = pytest.mark.services

SMALL = [
    "model.size=nano",
    "data.num_frames=8",
    "data.sampling_rate=1",
    "data.frame_size=64",
    "train.max_steps=6",
    "train.checkpoint_every=3",
    "train.log_every=1",
]


def svfap(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "svfap_dist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_shard_and_pretrain_on_ray_by_the_command_line(ceph_bucket):
    data, run = f"{ceph_bucket}/shards", f"{ceph_bucket}/runs/a"
    clips = "clips=32,frames=16,size=64"
    sharded = svfap("shard", "synthetic", clips, data, "--min-frames", "8", "--json")
    assert sharded.returncode == 0, sharded.stderr
    assert json.loads(sharded.stdout)["num_samples"] == 32
    assert verify(data).num_samples == 32

    places = [f"data.url={data}", f"run.url={run}"]
    trained = svfap("pretrain", "tiny_cpu", *places, *SMALL, "--on", "ray", "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["step"] == 6
    assert store.committed_steps(run) == [3, 6]
    store.verify(run, 6)
    rows = storage.read_bytes(f"{run}/metrics.jsonl").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]

    again = svfap("pretrain", "tiny_cpu", *places, *SMALL, "--on", "local", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["step"] == 6


def test_wrong_credentials_and_missing_bucket_are_told(ceph, ceph_bucket, monkeypatch):
    with pytest.raises(StorageError, match="bucket"):
        shard("synthetic", "clips=2,frames=16,size=64", "s3://not-there/x", min_frames=8, workers=0)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    LiteralS3.clear_instance_cache()
    with pytest.raises(StorageError, match=r"access denied.*AWS_SECRET_ACCESS_KEY"):
        storage.write_bytes(f"{ceph_bucket}/x", b"1")
    refused = svfap("pretrain", "tiny_cpu", f"data.url={ceph_bucket}/shards", "run.url=unused")
    assert refused.returncode == StorageError.exit_code
    assert "AWS_SECRET_ACCESS_KEY" in refused.stderr


def test_gateway_that_goes_away_and_comes_back(ceph, ceph_bucket):
    storage.write_bytes(f"{ceph_bucket}/x", b"kept")
    ceph.kill_gateway()
    try:
        with pytest.raises(storage.StorageUnreachableError, match="AWS_ENDPOINT_URL"):
            storage.read_bytes(f"{ceph_bucket}/x")
    finally:
        ceph.start_gateway()
    assert storage.read_bytes(f"{ceph_bucket}/x") == b"kept"
