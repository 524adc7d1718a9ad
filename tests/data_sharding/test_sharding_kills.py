"""Killed at any moment and started again, a sharding gives every byte of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clips import make_video

from data_sharding import pipeline

_KILLS, _PER_SHARD = 5, 2
_VIDEOS = {"source": 240, "train": 48}  # enough not to be over before the last kill
_DISTINCT = 24


def start(profile: str, videos: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["shard", "folder", str(videos), str(out), "--profile", profile, "--workers", "2"]
    words += ["--samples-per-shard", str(_PER_SHARD)]
    return subprocess.Popen([sys.executable, "-m", "svfap_dist", *words], start_new_session=True)


def contents(url: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in url.iterdir() if path.suffix != ".tmp"}


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["source", "train"])
def test_five_kills_leave_no_trace(tmp_path: Path, profile: str) -> None:
    for number in range(_VIDEOS[profile]):
        if number < _DISTINCT:
            make_video(tmp_path / f"in/{number}.mp4", 61 + number, size=(224, 224), seed=number)
        else:
            shutil.copy(tmp_path / f"in/{number % _DISTINCT}.mp4", tmp_path / f"in/{number}.mp4")
    (tmp_path / "in/broken.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    chance = random.Random(profile)
    for kill in range(_KILLS):
        job = start(profile, tmp_path / "in", out)
        # When this many more shards are finished, and then some moments later.
        wanted = len(list(out.glob("*.done.json"))) + chance.randint(0, 3)
        while len(list(out.glob("*.done.json"))) < wanted and job.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        assert job.poll() is None, f"over before kill {kill + 1}: let it have more to do"
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        assert not (out / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.done.json")}
    assert finished
    assert start(profile, tmp_path / "in", out).wait() == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not made again

    options = {"profile": profile, "max_samples_per_shard": _PER_SHARD}
    pipeline.shard(
        "folder", str(tmp_path / "in"), str(tmp_path / "undisturbed"), workers=1, **options
    )
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert pipeline.verify(str(out)).num_samples == _VIDEOS[profile]
