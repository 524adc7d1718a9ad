"""Windows over a whole video: nothing left out, nothing twice, short videos too."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svfap_dist.video import info as windows
from svfap_dist.video.info import Crop, Views

NUMBERS = st.integers(1, 60)


@settings(max_examples=60)
@given(NUMBERS, NUMBERS, NUMBERS)
def test_windows_cover_a_video(num_frames, window, step):
    starts = windows.covering_starts(num_frames, window, step)
    assert starts == sorted(set(starts))
    if num_frames <= window:
        assert starts == [0]
        return
    assert starts[0] == 0
    assert starts[-1] + window == num_frames
    assert all(start % step == 0 for start in starts[:-1])
    assert all(after - before <= step for before, after in itertools.pairwise(starts))
    if step <= window:
        seen = {frame for start in starts for frame in range(start, start + window)}
        assert seen == set(range(num_frames))


@pytest.mark.parametrize(
    ("num_frames", "count", "starts"),
    [
        (100, 1, [19]),
        (100, 2, [0, 39]),
        (100, 3, [0, 19, 39]),
        (61, 2, [0, 0]),
        (30, 2, [0, 0]),
        (62, 3, [0, 0, 1]),
    ],
)
def test_segments_are_spread_from_end_to_end(num_frames, count, starts):
    assert windows.segment_starts(num_frames, 61, count) == starts


def test_frames_beyond_the_end_are_the_last_one():
    assert windows.clip_frames(0, 4, 2, 9) == [0, 2, 4, 6]
    assert windows.clip_frames(3, 4, 2, 10) == [3, 5, 7, 9]
    assert windows.clip_frames(0, 4, 2, 4) == [0, 2, 3, 3]
    assert windows.clip_frames(0, 4, 2, 1) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("within", "count", "expected"),
    [
        (Crop(3, 5, 40, 40), 1, [Crop(3, 5, 40, 40)]),
        (Crop(3, 5, 40, 40), 2, 2 * [Crop(3, 5, 40, 40)]),
        (Crop(0, 0, 40, 60), 1, [Crop(0, 10, 40, 40)]),
        (Crop(3, 5, 40, 60), 2, [Crop(3, 5, 40, 40), Crop(3, 25, 40, 40)]),
        (
            Crop(3, 5, 60, 40),
            3,
            [Crop(3, 5, 40, 40), Crop(13, 5, 40, 40), Crop(23, 5, 40, 40)],
        ),
    ],
)
def test_squares_are_spread_along_the_longer_side(within, count, expected):
    assert windows.square_crops(within, count) == expected


def test_what_coincides_counts_for_as_many():
    """Of three windows in a video with room for two, and of two crops."""
    crops = [Crop(0, 0, 4, 4), Crop(0, 2, 4, 4)]
    views = Views.of(windows.segment_starts(62, 61, 3), crops)
    assert list(views.starts) == [0, 1]
    assert views.weights.tolist() == pytest.approx([2 / 6, 2 / 6, 1 / 6, 1 / 6])
