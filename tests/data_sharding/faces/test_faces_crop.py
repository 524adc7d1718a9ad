"""From a track to squares, crops and an mp4."""

from __future__ import annotations

import numpy as np
import pytest
from face_videos import HEIGHT, WIDTH, backdrop, decoded
from hypothesis import given
from hypothesis import strategies as st

from data_sharding.faces.crop import Mp4Writer, cut_square, track_squares
from data_sharding.faces.track import Track
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import probe


def track_of(boxes: np.ndarray) -> Track:
    return Track(0, boxes, np.ones(len(boxes)))


def boxes_around(centers: np.ndarray, sides: np.ndarray) -> np.ndarray:
    return np.concatenate([centers - sides[:, None] / 2, centers + sides[:, None] / 2], axis=1)


def test_the_square_follows_the_centre_and_keeps_its_side() -> None:
    centers = np.linspace([130, 110], [180, 130], 9)
    sides = np.array([58, 60, 62, 60, 90, 60, 58, 62, 60.0])  # one look too large
    found = track_squares(track_of(boxes_around(centers, sides)), 0.25, WIDTH, HEIGHT)
    np.testing.assert_allclose(found[:, 2:] - found[:, :2], 90)  # 60 and a quarter on each side
    np.testing.assert_allclose((found[:, 0] + found[:, 2]) / 2, centers[:, 0])
    np.testing.assert_allclose((found[:, 1] + found[:, 3]) / 2, centers[:, 1] - 0.07 * 60)


@given(
    st.integers(20, 100),
    st.floats(0.1, 1.5),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.sampled_from([(320, 240), (240, 320), (130, 400)]),
)
def test_squares_stay_in_the_picture_as_far_as_the_face_stays_in_them(
    side: int, margin: float, place: tuple[float, float], frame: tuple[int, int]
) -> None:
    width, height = frame
    centre = side / 2 + np.array(place) * (np.array(frame) - side)  # the face is in the picture
    box = boxes_around(centre[None], np.array([side]))
    square = track_squares(track_of(box), margin, width, height)[0]
    slack = 1e-6
    assert square[2] - square[0] == pytest.approx(side * (1 + 2 * margin))
    assert (square[:2] <= box[0, :2] + slack).all()
    assert (square[2:] >= box[0, 2:] - slack).all()
    for low, high, length in ((square[0], square[2], width), (square[1], square[3], height)):
        if high - low <= length:
            assert low >= -slack
            assert high <= length + slack
        else:  # larger than the picture: nothing of the picture is lost
            assert low <= slack
            assert high >= length - slack


def test_a_face_half_out_of_the_picture_stays_whole_in_its_square() -> None:
    box = np.array([[-30.0, 100, 30, 160]])
    square = track_squares(track_of(box), 0.25, WIDTH, HEIGHT)[0]
    assert square[0] == pytest.approx(-30)  # shifted inwards from -45, not to 0
    assert square[2] == pytest.approx(60)


def test_a_cut_of_its_own_size_is_the_picture_itself() -> None:
    picture = backdrop(3)
    np.testing.assert_array_equal(
        cut_square(picture, np.array([40, 30, 104, 94.0]), 64), picture[30:94, 40:104]
    )


def test_beyond_the_picture_its_edge_is_repeated() -> None:
    picture = backdrop(4)
    wider = np.pad(picture, ((50, 50), (50, 50), (0, 0)), mode="edge")
    for x, y in ((-20, 100), (WIDTH - 40, 10), (100, -30), (WIDTH - 10, HEIGHT - 10)):
        crop = cut_square(picture, np.array([x, y, x + 60, y + 60.0]), 60)
        np.testing.assert_array_equal(crop, wider[y + 50 : y + 110, x + 50 : x + 110])


def test_a_cut_moves_by_fractions_of_a_pixel() -> None:
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 100, axis=0)
    ramp = np.repeat(ramp, 3, axis=2)
    here, there = (
        cut_square(ramp, np.array([x, 20, x + 40, 60]), 40).astype(float)[:, 5:-5]
        for x in (20.0, 20.5)
    )
    assert (there - here).mean() == pytest.approx(1.0, abs=0.1)  # half of two levels a pixel


def mp4_of(pictures: np.ndarray, fps: float, seconds: list[float] | None = None) -> bytes:
    writer = Mp4Writer(pictures.shape[1], fps)
    for i, picture in enumerate(pictures):
        writer.add(picture, seconds[i] if seconds else None)
    return writer.close()


def test_equal_crops_give_equal_bytes_and_come_out_as_they_went_in() -> None:
    pictures = np.stack([backdrop(seed, 80, 80) for seed in range(12)])
    data = mp4_of(pictures, 30000 / 1001)
    assert data == mp4_of(pictures, 30000 / 1001)
    assert probe(data, 1) == VideoInfo(12, 30000 / 1001, 80, 80, "h264", True)
    assert np.abs(decoded(data).astype(int) - pictures).mean() < 4


def test_times_of_a_variable_rate_are_kept() -> None:
    pictures = np.stack([backdrop(0, 80, 80)] * 6)
    info = probe(mp4_of(pictures, 20, [0, 0.04, 0.08, 0.2, 0.2, 0.28]), 1)
    assert isinstance(info, VideoInfo)
    assert (info.num_frames, info.constant_frame_rate) == (6, False)
    assert info.fps == pytest.approx(5 / 0.28)
