"""Windows, regions and crops: inside the frame, even, and those of the released code."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from clips import make_video, read_frame_number
from hypothesis import given
from hypothesis import strategies as st
from loaders import cut_clips

from data_sharding.transcode import TrainProfile, transcode
from svfap_dist.config import Config, DataConfig, MaskConfig, ModelConfig, TrainConfig
from svfap_dist.data.clips import plan_clips, random_crop, random_window_start
from svfap_dist.errors import ConfigError
from svfap_dist.rng import Stream
from svfap_dist.video.frames import RgbFrames, to_rgb
from svfap_dist.video.info import Crop, TooShortError, VideoInfo, region_crop

SCALES = (1.0, 0.875, 0.75, 0.66)


def small_config(**data) -> Config:
    fields = {"num_frames": 4, "sampling_rate": 3, "frame_size": 32, "region": "full", **data}
    return Config(
        data=DataConfig(**fields),
        train=TrainConfig(global_batch_size=8),
        model=ModelConfig(size="nano"),
        mask=MaskConfig(ratio=0.5),
    )


def test_windows_start_everywhere_equally_often():
    counts = collections.Counter(random_window_start(Stream(key), 65, 61) for key in range(5000))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert max(abs(count - 1000) for count in counts.values()) < 150  # standard deviation 28


def test_windows_of_a_phase_start_everywhere_in_it_equally_often():
    starts = [random_window_start(Stream(k), 200, 61, k % 4, 4) for k in range(14_000)]
    assert all(start % 4 == k % 4 for k, start in enumerate(starts))
    counts = collections.Counter(starts)
    assert sorted(counts) == list(range(140))
    assert max(abs(count - 100) for count in counts.values()) < 50  # standard deviation 10


def test_a_video_that_lacks_a_phase_has_windows_of_others():
    found = {phase: random_window_start(Stream(0), 62, 61, phase, 4) for phase in range(4)}
    assert found == {0: 0, 1: 1, 2: 0, 3: 1}


def test_a_window_as_long_as_the_video_starts_at_its_beginning():
    assert random_window_start(Stream(0), 61, 61) == 0


def test_a_window_longer_than_the_video_is_an_error():
    with pytest.raises(TooShortError, match="60 frames for a window of 61"):
        random_window_start(Stream(0), 60, 61)


@pytest.mark.parametrize(
    ("name", "height", "width", "expected"),
    [
        ("voxceleb2", 224, 224, Crop(0, 32, 160, 160)),  # the released code's numbers
        ("voxceleb2", 112, 448, Crop(0, 64, 80, 320)),
        ("centre", 360, 640, Crop(0, 140, 360, 360)),
        ("centre", 641, 360, Crop(140, 0, 360, 360)),
        ("full", 360, 640, Crop(0, 0, 360, 640)),
    ],
)
def test_regions(name, height, width, expected):
    assert region_crop(name, height, width) == expected


@given(
    st.sampled_from(["voxceleb2", "centre", "full"]),
    st.integers(1, 500),
    st.integers(1, 500),
    st.integers(0, 10**6),
)
def test_crops_lie_in_the_region_and_regions_in_the_frame(name, height, width, key):
    outer = Crop(0, 0, height, width)
    for inner in (
        region_crop(name, height, width),
        random_crop(Stream(key), region_crop(name, height, width), SCALES),
    ):
        assert inner.height > 0
        assert inner.width > 0
        assert outer.top <= inner.top <= inner.top + inner.height <= outer.top + outer.height
        assert outer.left <= inner.left <= inner.left + inner.width <= outer.left + outer.width
        outer = inner


def test_crops_are_those_of_the_released_code():
    """Ten pairs of sizes, 13 places each, as VideoMAE's GroupMultiScaleCrop lists them for 160."""
    sides = [160, 140, 120, 105]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    expected = set()
    for height, width in pairs:
        down, right = (160 - height) // 4, (160 - width) // 4
        places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]  # (rows, columns): corners, centre
        places += [(2, 0), (2, 4), (4, 2), (0, 2)]  # middles of the edges
        places += [(1, 1), (1, 3), (3, 1), (3, 3)]  # middles of the quarters
        expected |= {Crop(r * down, 32 + c * right, height, width) for r, c in places}
    drawn = {random_crop(Stream(key), Crop(0, 32, 160, 160), SCALES) for key in range(4000)}
    assert drawn == expected


INFO = VideoInfo(40, 25.0, 64, 64, "h264")


def painted(clip: torch.Tensor) -> list[int]:
    return [read_frame_number(frame.numpy()) for frame in clip]


def test_a_random_clip_is_a_function_of_its_streams():
    video, data = make_video(None, 40, size=(64, 64)), small_config(crop_scales=(1.0,)).data
    clips = [cut_clips(video, INFO, data, (key,), [(key,)])[0] for key in (1, 1, 2)]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])
    for key, clip in zip((1, 1, 2), clips, strict=True):
        start = random_window_start(Stream(key), 40, 10)
        assert painted(clip) == [start, start + 3, start + 6, start + 9]


def test_one_crop_serves_the_whole_clip():
    """Equal frames give equal pictures, so a clip of a still video is still."""
    still = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    frames = RgbFrames(np.repeat(still, 4, axis=0))
    clip = to_rgb(frames, random_crop(Stream(5), Crop(0, 0, 64, 64), SCALES), 32)
    assert (clip == clip[0]).all()


def test_shards_cut_to_the_region_are_used_whole():
    """The same streams give the same window, and of it the same crop."""
    video = make_video(None, 80, size=(224, 224), encoder_options={"crf": "10"})
    info = VideoInfo(80, 25.0, 224, 224, "h264")
    config = small_config(region="voxceleb2", sampling_rate=4, frame_size=160)
    cut = transcode(video, info, TrainProfile(crf=10))
    for key in range(4):
        whole, stored = (
            cut_clips(*pair, config.data, (key,), [(key, "crop")])[0]
            for pair in ((video, info), cut)
        )
        assert (whole.float() - stored.float()).abs().mean() < 3


def test_shards_cut_to_another_region_are_refused():
    video, info = make_video(None, 80, size=(224, 224)), VideoInfo(80, 25.0, 224, 224, "h264")
    cut = transcode(video, info, TrainProfile(region="centre"))
    with pytest.raises(ConfigError, match=r"data\.region=center"):
        plan_clips(cut[1], small_config(region="voxceleb2").data, (0,), [(0,)])
