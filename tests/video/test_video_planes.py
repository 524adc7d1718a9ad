"""Shards of the profile `train` in the loader: planes for the device, or RGB by the workers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from clips import make_video
from loaders import config_of, world
from numbered_shards import SIDE, write_data_set

from data_sharding.transcode import TrainProfile, transcode
from svfap_dist.config import Config
from svfap_dist.data.loader import ClipLoader
from svfap_dist.video.frames import YuvClips
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import probe

SAMPLES, FRAMES = 9, 16
LARGE = 5  # sample of a larger frame, which is not among those whose size is looked at
RANDOM = {"crop_scales": (1.0, 0.875, 0.75, 0.66), "num_lanes": 2}


def stored(sample: int, side: int = SIDE) -> tuple[bytes, VideoInfo]:
    """Of every other matrix and, of these, of every other range."""
    colors = {
        "colorspace": ("smpte170m", "bt709")[sample % 2],
        "color_range": ("tv", "pc")[sample // 2 % 2],
    }
    source = make_video(None, FRAMES, size=(side, side), seed=sample, encoder_options=colors)
    info = probe(source, 1)
    assert isinstance(info, VideoInfo)
    return transcode(source, info, TrainProfile("full"))


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    videos = {sample: stored(sample) for sample in range(SAMPLES)}
    videos[LARGE] = stored(LARGE, SIDE + 16)
    url = str(tmp_path_factory.mktemp("planes") / "shards")
    made = write_data_set(url, [5, 4], [b""] * SAMPLES, videos)
    return dataclasses.replace(made, manifest=dataclasses.replace(made.manifest, profile="train"))


def batches(data_set, config: Config) -> list[tuple]:
    loader = ClipLoader(config, data_set.url, data_set.manifest, world())
    found = []
    for batch in loader.batches(0, 4):
        assert isinstance(batch.frames, YuvClips) == (config.data.colors == "device")
        parts = [batch.frames_on(torch.device("cpu"), slice(k, k + 2)) for k in range(0, 8, 2)]
        bad = {each.index: each.reason for each in batch.bad}
        found.append((torch.cat(parts).clone(), batch.slots.samples, batch.slots.substituted, bad))
    return found


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_planes_for_the_device_are_the_pictures_that_workers_make(data_set, repeats, workers):
    """Bit for bit: frames, crops, matrix, range and place of every clip, whatever substitutes."""
    fields = {**RANDOM, "repeated_sampling": repeats}
    planes = batches(data_set, config_of(**fields, colors="device", decode_workers=workers))
    rgb = batches(data_set, config_of(**fields, colors="workers"))
    seen = set()
    for (frames, samples, substituted, bad), (expected, *other) in zip(planes, rgb, strict=True):
        assert samples == other[0]
        assert bad == ({LARGE: "wrong_size"} if LARGE in samples else {})
        for row, sample in enumerate(samples):
            assert substituted[row] == (sample == LARGE)
            if sample != LARGE:
                clips = slice(row * repeats, (row + 1) * repeats)
                assert torch.equal(frames[clips], expected[clips])
                seen.add(sample)
    assert seen >= {0, 1, 2, 3}  # both matrices, both ranges


def test_planes_are_for_a_gpu_only_unless_asked_for(data_set):
    loader = ClipLoader(config_of(num_lanes=2), data_set.url, data_set.manifest, world())
    assert isinstance(next(loader.batches(0, 1)).frames, torch.Tensor)
