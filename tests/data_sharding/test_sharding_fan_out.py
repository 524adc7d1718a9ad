"""Several processes give what one gives, in the same order, and their failures are told."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from clips import make_video

from data_sharding.fan_out import probe_all
from data_sharding.probe import Rejected
from data_sharding.sources import SourceVideo
from svfap_dist import storage
from svfap_dist.errors import ShardError, StorageError


def video(key: str, data: bytes) -> SourceVideo:
    return SourceVideo(key, functools.partial(bytes, data), {}, key)


def test_processes_give_what_one_process_gives() -> None:
    lengths = [12, 9, 15, 8, 11, 10, 20]
    videos = [video(f"v{n}", make_video(None, n)) for n in lengths]
    videos.insert(3, video("empty", b""))
    alone = list(probe_all(videos, 10, workers=0))
    assert [probed.video.key for probed in alone] == [v.key for v in videos]
    assert [probed.data for probed in alone if not isinstance(probed.result, Rejected)] == [
        make_video(None, n) for n in lengths if n >= 10
    ]
    assert list(probe_all(videos, 10, workers=2)) == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_only_few_videos_are_in_flight(workers: int) -> None:
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield video(str(asked), b"")

    results = probe_all(endless(), 1, workers)
    for done in range(1, 30):
        next(results)
        assert asked - done <= 2 * workers
    results.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanished_is_left_out_and_a_failing_store_stops(
    tmp_path: Path, workers: int
) -> None:
    gone = SourceVideo("a", functools.partial(storage.read_bytes, str(tmp_path / "a")), {}, "a")
    (probed,) = probe_all([gone], 1, workers)
    assert isinstance(probed.result, Rejected)
    assert probed.result.reason == "missing"
    folder = SourceVideo("b", functools.partial(storage.read_bytes, str(tmp_path)), {}, "b")
    with pytest.raises(StorageError, match="Is a directory"):
        list(probe_all([folder], 1, workers))


def test_a_worker_that_dies_is_told() -> None:
    deadly = SourceVideo("deadly", functools.partial(os._exit, 9), {}, "x")
    with pytest.raises(ShardError, match=r"worker process died.*deadly"):
        list(probe_all([video("v", b""), deadly], 1, workers=2))
