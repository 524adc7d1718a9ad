"""Stores that work and stores that do not: folders, and S3 as moto serves it."""

from __future__ import annotations

import os
import time
import types
import urllib.request
from pathlib import Path

import pytest
from clips import make_video

from data_sharding import pipeline as sharding
from svfap_dist import storage
from svfap_dist.config import recipe
from svfap_dist.doctor import store


def _config(**urls: str):
    small = ("train.global_batch_size=4", "data.num_frames=8", "data.sampling_rate=1")
    pairs = [f"{section}.url={url}" for section, url in urls.items()]
    return recipe.load("tiny_cpu", [*small, *pairs])


def test_a_working_folder_is_left_unchanged(tmp_path: Path) -> None:
    findings = store.examine_run(f"{tmp_path}/runs/a")
    assert [(finding.name, finding.status) for finding in findings] == [
        ("run.url", "ok"),
        ("clock", "ok"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_working_bucket_is_left_unchanged(s3_bucket: str) -> None:
    findings = store.examine_run(f"{s3_bucket}/runs/a")
    assert {finding.status for finding in findings} == {"ok"}
    assert len(findings) == 2
    assert storage.list_files(s3_bucket) == {}


def test_a_missing_bucket(s3_environment: str) -> None:
    finding = store.examine_run("s3://no-such-bucket/x")[0]
    assert finding.status == "fail"
    assert "no such bucket" in finding.found
    assert finding.do


def test_refused_credentials(s3_bucket: str, s3_endpoint: str) -> None:
    def after(requests: int) -> None:
        body, kind = str(requests).encode(), {"Content-Type": "text/plain"}
        address = f"{s3_endpoint}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(address, body, kind)).close()

    after(0)
    try:
        finding = store.examine_run(f"{s3_bucket}/runs/a")[0]
    finally:
        after(10**9)
    assert finding.status == "fail"
    assert "access denied" in finding.found


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert store.examine_run(f"{tmp_path}/file/run")[0].status == "fail"


@pytest.mark.parametrize(
    ("ahead", "status"), [(0.4, "ok"), (-20, "ok"), (40, "warn"), (-40, "warn"), (1000, "fail")]
)
def test_clocks(ahead: float, status: str) -> None:
    finding = store._check_clock(ahead)
    assert finding.status == status
    assert ("behind" in finding.found) == (ahead < 0)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_clock_that_is_off(
    kind: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shift the clock of the doctor only: signatures and the date of moto keep the right one."""
    url = s3_bucket if kind == "bucket" else str(tmp_path)
    storage.write_bytes(f"{url}/probe", b"x")
    ahead = types.SimpleNamespace(time=lambda: time.time() + 100)
    monkeypatch.setattr(store, "time", ahead)
    finding = store._compare_clocks(url)
    assert finding.status == "warn"
    assert "100." in finding.found or "99." in finding.found
    assert "ahead" in finding.found


def test_missing_urls() -> None:
    for findings in (store.examine_run(""), store.examine_data(_config())):
        (finding,) = findings
        assert finding.status == "warn"


def test_shards_good_and_bad(tmp_path: Path) -> None:
    for number in range(4):
        make_video(tmp_path / f"videos/{number}.mp4", 12, seed=number)
    url = str(tmp_path / "shards")
    sharding.shard("folder", str(tmp_path / "videos"), url, min_frames=8, workers=0)

    def found(*changes: str):
        config = recipe.load(
            "tiny_cpu",
            ["data.num_frames=8", "data.sampling_rate=1", f"data.url={url}", *changes],
        )
        (finding,) = store.examine_data(config)
        return finding.status, finding.found

    assert found("train.global_batch_size=4")[0] == "ok"
    status, text = found("train.global_batch_size=4", "data.read_ahead_bytes=1000")
    assert status == "warn"
    assert "each byte is read" in text
    assert found()[0] == "fail"  # 8 clips of a step
    assert "spans" in found("train.global_batch_size=4", "data.num_frames=16")[1]
    tar = os.path.join(url, "shard-000000.tar")
    with open(tar, "r+b") as file:
        file.seek(1000)
        file.write(b"\xff" * 8)
    assert "damaged" in found("train.global_batch_size=4")[1]
    os.truncate(tar, 1000)
    assert "cut short" in found("train.global_batch_size=4")[1]
    os.unlink(os.path.join(url, "manifest.json"))
    assert "No manifest" in found("train.global_batch_size=4")[1]
