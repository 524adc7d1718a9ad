"""`svfap bench augment`: what is measured, and how figures follow from rates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from clips import make_video
from numbered_shards import write_data_set

from svfap_dist.bench import augment
from svfap_dist.profiling.timing import Rate
from svfap_dist.video.info import VideoInfo

FRAMES, SIDE, SAMPLES = 9, 48, 4
SMALL = ["data.num_frames=4", "data.sampling_rate=2", "data.frame_size=32", "data.region=full"]
SMALL += ["data.num_lanes=2", "train.global_batch_size=4", "data.decode_workers=0"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    videos = [make_video(None, FRAMES, size=(SIDE, SIDE), seed=k) for k in range(SAMPLES)]
    info = VideoInfo(FRAMES, 25.0, SIDE, SIDE, "h264")
    samples = {k: (video, info) for k, video in enumerate(videos)}
    url = str(tmp_path_factory.mktemp("augment") / "shards")
    return write_data_set(url, [SAMPLES], videos, samples).url


def test_all_ways_are_measured_and_their_rates_compared(shards: str, monkeypatch) -> None:
    measured: list[tuple[str, Rate]] = []

    def here(function, argument):
        torch_threads = torch.get_num_threads()
        rate = function(argument)
        torch.set_num_threads(torch_threads)
        config = getattr(argument, "config", argument)
        measured.append((f"{function.__name__} {config.augment.run_on}", rate))
        return dataclasses.replace(rate, clips=60, seconds=len(measured), cpu_seconds=10.0)

    monkeypatch.setattr(augment, "call_in_new_process", here)
    monkeypatch.setattr(augment, "_SECONDS", 0.001)
    found = augment.run(shards, SMALL, "cpu", batches=2, rounds=1)
    names = ["_time_workers workers", "_time_device device"]
    names += ["_time_loader workers", "_time_loader device"]
    assert [name for name, _ in measured] == names
    assert all(rate.clips > 0 for _, rate in measured)
    assert [rate.clips for _, rate in measured[2:]] == [8, 8]
    assert (found.alone_workers, found.alone_device) == (60, 30)
    assert (found.loader_workers, found.loader_device) == (20, 15)
    assert found.loader_device_per_cpu_second == 6
    assert (found.device, found.workers, found.batches) == ("cpu", 0, 2)
    table = [line.split() for line in found.lines()[3:]]
    assert table[0][-3:] == ["60.0", "30.0", "0.50"]
    assert table[2][-3:] == ["20.0", "15.0", "0.75"]
