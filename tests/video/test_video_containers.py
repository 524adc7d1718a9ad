"""Every container that a shard may hold goes the whole way from a file to a training clip."""

from __future__ import annotations

import pytest
from clips import make_video, read_frame_number
from loaders import cut_clips

from data_sharding import pipeline as sharding
from svfap_dist.config import Config, DataConfig, MaskConfig, ModelConfig
from svfap_dist.data.clips import random_window_start
from svfap_dist.rng import Stream
from svfap_dist.shards.reader import Sample, SampleReader, open_data
from svfap_dist.video.info import VIDEO_SUFFIXES

FRAMES = 20
CONTAINERS = {
    **dict.fromkeys(("ts", "mts", "m2ts"), "mpegts"),
    **dict.fromkeys(("mpg", "mpeg"), "mpeg"),
    **{"wmv": "asf", "f4v": "mp4", "qt": "mov", "ogv": "ogg"},
}
CODECS = {"webm": "libvpx-vp9", "ogg": "libvpx", "mpeg": "mpeg1video", "vob": "mpeg2video"}
CONFIG = Config(
    data=DataConfig(
        num_frames=4, sampling_rate=2, frame_size=32, region="full", crop_scales=(1.0,)
    ),
    mask=MaskConfig(ratio=0.5),
    model=ModelConfig(size="nano"),
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[dict[str, bytes], dict[str, Sample]]:
    """Videos as they were written and as they are read, by key: a key is the suffix."""
    folder = tmp_path_factory.mktemp("containers")
    videos = {}
    for suffix in VIDEO_SUFFIXES:
        path = folder / f"videos/{suffix}.{suffix}"
        container = CONTAINERS.get(suffix, suffix)
        codec = CODECS.get(container, "libx264")
        videos[suffix] = make_video(path, FRAMES, size=(48, 48), codec=codec, container=container)
    url = str(folder / "shards")
    sharding.shard("folder", str(folder / "videos"), url, min_frames=FRAMES, workers=0)
    assert sharding.verify(url).num_samples == len(videos)
    reader = SampleReader(url, open_data(CONFIG, url))
    samples = [reader.read(i) for i in range(len(videos))]
    return videos, {sample.key: sample for sample in samples if isinstance(sample, Sample)}


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_a_video_of_this_container_becomes_a_clip(packed, suffix):
    videos, samples = packed
    sample = samples[suffix]
    assert sample.video == videos[suffix]
    window, crop = ("window", suffix), ("crop", suffix)
    (clip,) = cut_clips(sample.video, sample.info, CONFIG.data, window, [crop])
    start = random_window_start(Stream("window", suffix), FRAMES, CONFIG.window)
    assert [read_frame_number(frame) for frame in clip.numpy()] == [start + 2 * k for k in range(4)]
