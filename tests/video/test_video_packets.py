"""Frames out of packets: exactly those requested, in the order requested, or an error."""

from __future__ import annotations

import dataclasses
import io

import av
import numpy as np
import pytest
from clips import make_video, read_frame_number
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.transcode import TrainProfile, transcode
from svfap_dist.errors import DecodeError
from svfap_dist.video import pyav
from svfap_dist.video.frames import WrongSizeError, YuvFrames
from svfap_dist.video.info import TooShortError, VideoInfo, stored_position
from svfap_dist.video.probe import probe


def transcoded(frames: int, **options) -> tuple[bytes, VideoInfo]:
    source = make_video(None, frames, encoder_options={"bf": "2"})
    info = probe(source, 1)
    assert isinstance(info, VideoInfo)
    return transcode(source, info, TrainProfile("full", **options))


@pytest.fixture(scope="module")
def long_video() -> tuple[bytes, VideoInfo]:
    return transcoded(131, group=6)


def painted(frames: YuvFrames) -> list[int]:
    return [read_frame_number(y[:, :, None]) for y in frames.y]


def test_every_window_of_every_stride(long_video):
    for stride in (1, 2, 3, 4, 5, 8):
        for start in range(0, 131 - 7 * stride, 3):
            numbers = range(start, start + 8 * stride, stride)[:8]
            assert painted(pyav.decode(*long_video, numbers)) == list(numbers)


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 130), min_size=1, max_size=20))
def test_any_list_of_frames(long_video, numbers):
    assert painted(pyav.decode(*long_video, numbers)) == numbers


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_videos_shorter_than_the_phases(frames):
    video, info = transcoded(frames)
    assert painted(pyav.decode(video, info, range(frames))) == list(range(frames))


def test_planes_are_those_that_a_container_gives(long_video):
    video, info = long_video
    with av.open(io.BytesIO(video)) as container:
        packed = [frame.to_ndarray() for frame in container.decode(video=0)]
    got = pyav.decode(video, info, range(info.num_frames))
    for number in range(info.num_frames):
        planes = np.concatenate([p[number].ravel() for p in (got.y, got.u, got.v)])
        assert (planes == packed[stored_position(number, 131, 4)].ravel()).all()
    assert got.colors == ("bt601", False)


@pytest.mark.parametrize(
    ("matrix", "full_range"), [("bt601", False), ("bt601", True), ("bt709", False), ("bt709", True)]
)
def test_what_the_planes_mean_is_handed_on(matrix, full_range):
    """A wrong matrix or range would train on wrong colors, unnoticed."""
    said = {"bt601": "smpte170m", "bt709": "bt709"}[matrix], "pc" if full_range else "tv"
    options = dict(zip(("colorspace", "color_range"), said, strict=True))
    source = make_video(None, 3, encoder_options=options)
    info = probe(source, 1)
    assert isinstance(info, VideoInfo)
    got = pyav.decode(*transcode(source, info, TrainProfile("full")), range(3))
    assert got.colors == (matrix, full_range)


def test_only_what_a_window_needs_is_decoded(long_video):
    """A stride-4 window is one run: damage anywhere else does not matter."""
    video, info = long_video
    order = info.layout
    assert order is not None
    (file,) = order.files
    offsets = np.cumsum((file.first_byte, *file.packet_sizes))
    numbers = range(24, 24 + 4 * 10, 4)
    begin, end = (stored_position(number, 131, 4) for number in (24, 60))
    begin -= 24 // 4 % order.group
    blank = bytearray(len(video))
    blank[offsets[begin] : offsets[end + 1]] = video[offsets[begin] : offsets[end + 1]]
    assert painted(pyav.decode(bytes(blank), info, numbers)) == list(numbers)


def test_damage_is_an_error_and_leaves_no_trace(long_video):
    video, info = long_video
    order = info.layout
    assert order is not None
    ((first_byte, (size, following, *_), *_),) = order.files
    begin = first_byte + size
    damaged = video[:begin] + bytes(following) + video[begin + following :]
    whole = pyav.decode(video, info, range(16))
    with pytest.raises(DecodeError):
        pyav.decode(damaged, info, [4, 8])
    for plane in ("y", "u", "v"):
        again = getattr(pyav.decode(video, info, range(16)), plane)
        assert (again == getattr(whole, plane)).all()


def test_what_is_not_there_is_an_error(long_video):
    video, info = long_video
    with pytest.raises(TooShortError):
        pyav.decode(video, info, [0, 131])
    with pytest.raises(TooShortError):
        pyav.decode(video[: len(video) // 2], info, range(131))
    with pytest.raises(WrongSizeError):
        pyav.decode(video, dataclasses.replace(info, width=32), [0])
