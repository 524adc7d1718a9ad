"""Positions by time stamps are those of the decoder that looks at every frame's time."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from clips import make_video, read_frame_number
from golden import GOLDEN
from hypothesis import example, given, settings
from hypothesis import strategies as st

from svfap_dist.errors import DecodeError
from svfap_dist.video import pyav
from svfap_dist.video.frames import WrongSizeError, YuvFrames
from svfap_dist.video.info import TooShortError, VideoInfo
from svfap_dist.video.pyav import FrameClock, locate_frames


def positions(video: bytes, info: VideoInfo, numbers: list[int]) -> list[int]:
    (located,) = locate_frames(video, info, numbers)
    return located.positions


GAPS = st.lists(st.integers(1, 6), min_size=24, max_size=24)


def shown(video: bytes, info: VideoInfo, numbers: list[int]) -> list[int]:
    """Numbers painted into the frames that the frame-by-frame decoder gives."""
    frames = pyav.decode(video, info, numbers)
    assert isinstance(frames, YuvFrames)
    return [read_frame_number(luma[..., None]) for luma in frames.y]


@given(GAPS, st.booleans(), st.sampled_from([20.0, 25.0, 30000 / 1001, 11.0]), st.booleans())
@example([1] * 24, True, 25.0, True)
@settings(max_examples=25)
def test_they_are_those_of_the_decoder(gaps, constant, fps, b_frames):
    """Whatever the rate that is stated: frames are counted from 0 here, as they are painted."""
    times = np.cumsum([0, *gaps[:-1]]).tolist()
    options = {"preset": "ultrafast", "threads": "1", "bf": "2" if b_frames else "0"}
    video = make_video(None, 24, fps=50, pts=times, container="mkv", gop=7, encoder_options=options)
    info = VideoInfo(24, fps, 64, 48, "h264", constant_frame_rate=constant)
    numbers = list(range(int(times[-1] / 50 * fps)))
    assert positions(video, info, numbers) == shown(video, info, numbers)


def test_a_time_on_the_border_belongs_to_the_same_frame_as_in_the_decoder():
    """Frames of 1/50 s requested at 25 per second: number k is the 2k-th, which is exactly there;
    at 100 per second every other one is halfway between two."""
    video = make_video(None, 20, fps=50)
    for fps in (25.0, 100.0):
        for constant in (True, False):
            info = VideoInfo(20, fps, 64, 48, "h264", constant_frame_rate=constant)
            numbers = list(range(int(fps * 19 / 50)))
            assert positions(video, info, numbers) == shown(video, info, numbers)


def test_the_end_is_that_of_the_decoder():
    video = make_video(None, 8, fps=25, pts=[0, 1, 2, 3, 10, 11, 12, 30], gop=3)
    info = VideoInfo(8, 7 / (30 / 25), 64, 48, "h264", constant_frame_rate=False)
    assert positions(video, info, [7]) == [7]
    for decoder in (positions, pyav.decode):
        with pytest.raises(TooShortError, match=r"last frame at 1\.200 s"):
            decoder(video, info, [0, 9])


def test_packets_before_the_beginning_are_not_counted():
    golden = GOLDEN["vp9-edit-list"]()
    count = golden.info.num_frames
    assert positions(golden.video, golden.info, list(range(count))) == list(range(count))


def test_phase_order_needs_no_look_at_the_packets():
    golden = GOLDEN["vp9-phase-ordered"]()
    wanted = [0, 4, 8, 1, 47]  # 12 frames in each of 4 phases
    assert positions(golden.video, golden.info, wanted) == [0, 1, 2, 12, 47]
    with pytest.raises(TooShortError):
        positions(golden.video, golden.info, [48])
    with pytest.raises(DecodeError, match="cut short"):
        positions(golden.video[: len(golden.video) // 3], golden.info, [0])


def test_another_size_than_stated():
    info = VideoInfo(5, 25.0, 66, 48, "h264")
    with pytest.raises(WrongSizeError, match="64x48 for 66x48"):
        positions(make_video(None, 5), info, [0])


def test_the_first_of_two_equally_near_frames():
    info = VideoInfo(3, 25.0, 64, 48, "h264")
    timed = [(time, 1, position) for position, time in enumerate([0, 1, 3, 5])]
    clock = FrameClock(info, Fraction(1, 100))
    assert list(clock.select(timed, [1])) == [2]  # at 4 of 3 and 5, which are both near enough
    late = FrameClock(dataclasses.replace(info, fps=100.0), Fraction(1, 100))
    assert list(late.select(timed, range(6))) == [0, 1, 1, 2, 2, 3]
