"""Linking detections into tracks and smoothing them, without any picture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_sharding.faces.detect import Detections
from data_sharding.faces.track import find_tracks, overlaps, smooth

FPS, EVERY = 25.0, 5


def box(x: float, y: float, side: float = 40) -> list[float]:
    """A square box around a centre."""
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def looks(*per_look: list[list[float]]) -> list[Detections]:
    return [Detections(np.array(b).reshape(-1, 4), np.full(len(b), 7.0)) for b in per_look]


corner = st.integers(0, 12)
whole_box = st.tuples(corner, corner, st.integers(1, 8), st.integers(1, 8)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(st.lists(whole_box, min_size=1, max_size=3), st.lists(whole_box, min_size=1, max_size=3))
def test_overlap_is_what_counting_pixels_says(a: list[tuple], b: list[tuple]) -> None:
    def pixels(corners: tuple[int, int, int, int]) -> set[tuple[int, int]]:
        x0, y0, x1, y1 = corners
        return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}

    counted = [[len(pixels(p) & pixels(q)) / len(pixels(p) | pixels(q)) for q in b] for p in a]
    np.testing.assert_allclose(overlaps(np.array(a, float), np.array(b, float)), counted)


def test_two_faces_are_followed_apart_and_the_weightier_comes_first() -> None:
    seen = looks(*[[box(50 + 4 * i, 60), box(200 - 4 * i, 62, 60)] for i in range(12)])
    large, small = find_tracks(seen, EVERY, 60, FPS)
    assert (large.first, len(large.boxes), small.first, len(small.boxes)) == (0, 60, 0, 60)
    centers = (small.boxes[:, :2] + small.boxes[:, 2:]) / 2
    np.testing.assert_allclose(centers[:56, 0], 50 + 4 * np.arange(56) / EVERY, atol=0.01)
    assert small.detected.nonzero()[0].tolist() == list(range(0, 60, EVERY))


def test_the_longest_of_equal_faces_comes_first() -> None:
    seen = looks(*[[box(50, 60)] + ([box(200, 60)] if i < 6 else []) for i in range(12)])
    first, second = find_tracks(seen, EVERY, 60, FPS)
    assert first.boxes[0].tolist() == pytest.approx(box(50, 60))
    # Held for the four frames before the next look, which no longer saw it.
    assert (second.first, len(second.boxes)) == (0, 30)


def test_a_detection_goes_on_with_one_track_and_a_track_with_one_detection() -> None:
    # Now and then a face gives a second, shifted box.
    seen = looks(*[[box(50, 60)] + ([box(58, 64)] if i % 5 == 0 else []) for i in range(20)])
    (track,) = find_tracks(seen, EVERY, 100, FPS)
    np.testing.assert_allclose(track.boxes, [box(50, 60)] * 100, atol=1e-6)


def test_a_face_missed_for_a_moment_is_interpolated() -> None:
    # Missed at looks 4 to 7: four looks are 0.8 s.
    seen = looks(*[[] if 4 <= i < 8 else [box(50 + 3 * i, 60)] for i in range(12)])
    (track,) = find_tracks(seen, EVERY, 60, FPS)
    assert not track.detected[16:40].any()
    centers = (track.boxes[:, 0] + track.boxes[:, 2]) / 2
    np.testing.assert_allclose(centers[:56], 50 + 3 * np.arange(56) / EVERY, atol=0.01)


def test_a_face_gone_for_long_comes_back_as_another_track() -> None:
    seen = looks(*[[] if 6 <= i < 13 else [box(50, 60)] for i in range(20)])
    late, early = find_tracks(seen, EVERY, 98, FPS)
    assert (early.first, len(early.boxes)) == (0, 30)
    # Frames 61 to 64 were not examined, so they are included; and no frame beyond the video's.
    assert (late.first, len(late.boxes)) == (61, 37)


def test_what_is_seen_seldom_is_a_false_alarm() -> None:
    blinking = [[box(50, 60)] if i % 4 == 0 else [] for i in range(20)]  # one look in four
    twice = [[box(200, 60)] if i in (3, 4) else [] for i in range(20)]
    seen = looks(*[a + b for a, b in zip(blinking, twice, strict=True)])
    assert find_tracks(seen, EVERY, 100, FPS) == []


def test_of_a_very_short_video_one_look_is_enough() -> None:
    (track,) = find_tracks(looks([box(50, 60)]), EVERY, 3, FPS)
    assert track.boxes.tolist() == [box(50, 60)] * 3


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_smoothing_is_a_line_fitted_at_each_frame(every: int, seed: int) -> None:
    rng, sigma = np.random.default_rng(seed), 5.0
    values = np.full((60, 2), np.nan)
    values[::every] = rng.normal(size=values[::every].shape)
    values[20:31] = np.nan  # a gap
    at = np.flatnonzero(~np.isnan(values[:, 0]))
    slow = [
        # polyfit weighs the differences, not their squares.
        np.polyfit(at - t, values[at], 1, w=np.exp(-0.25 * ((at - t) / sigma) ** 2))[1]
        for t in range(60)
    ]
    np.testing.assert_allclose(smooth(values, sigma), slow, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 9), st.floats(-5, 5), st.floats(0.6, 3))
def test_an_even_course_is_followed_without_lag_beyond_its_very_ends(
    length: int, every: int, speed: float, width: float
) -> None:
    line = np.stack([3 + speed * np.arange(length), np.full(length, 7.0)], axis=1)
    some = np.full_like(line, np.nan)
    some[every // 2 :: every] = line[every // 2 :: every]
    some[0] = line[0]
    if np.isfinite(some).sum() > 2:
        np.testing.assert_allclose(smooth(some, width * every), line, atol=1e-6)


def test_one_detection_holds() -> None:
    values = np.full((7, 2), np.nan)
    values[3] = [5, 6]
    np.testing.assert_allclose(smooth(values, 5.0), [[5, 6]] * 7)


def test_jitter_of_the_detector_is_smoothed_away() -> None:
    noise = np.random.default_rng(1).normal(0, 3, (40, 2))
    seen = looks(*[[box(100 + 2 * i + dx, 80 + dy)] for i, (dx, dy) in enumerate(noise)])
    (track,) = find_tracks(seen, EVERY, 200, FPS)
    centers = (track.boxes[:, :2] + track.boxes[:, 2:]) / 2
    jerk = np.abs(np.diff(centers[::EVERY], 2, axis=0)).mean()
    assert jerk < np.abs(np.diff(noise, 2, axis=0)).mean() / 2
    assert np.abs(np.diff(centers, 2, axis=0)).max() < 0.5  # pixels, frame to frame


def test_no_track_goes_on_beyond_a_cut() -> None:
    seen = looks(*[[box(50, 60)] for _ in range(12)])
    long, short = find_tracks(seen, EVERY, 60, FPS, cuts=[23])
    # Looks are at frames 20 and 25: the frames between them are shared out by the cut.
    assert (long.first, len(long.boxes), short.first, len(short.boxes)) == (23, 37, 0, 23)
    assert find_tracks(seen[:4], EVERY, 20, FPS, cuts=[8, 13]) == []  # each seen twice or once
