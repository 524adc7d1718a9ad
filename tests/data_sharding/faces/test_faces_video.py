"""One video from its bytes to crops: with a detector of the test's own, and with the real one."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from clips import make_video
from face_videos import (
    HEIGHT,
    MIDDLE,
    WIDTH,
    backdrop,
    decoded,
    encode,
    straight_way,
    with_faces,
)

from data_sharding.faces import detect
from data_sharding.faces.crop import Cropped, FaceOptions, crop_faces
from data_sharding.faces.detect import Detections
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import Rejected, probe
from svfap_dist.video.upright import read_upright_frames

SQUARE = 40  # pixels of the painted square


class RedSquare:
    """Finds the reddest part of a picture: what a face detector does, for painted squares."""

    def detect(self, rgb: np.ndarray, /) -> Detections:
        red = (rgb[:, :, 0] > 180) & (rgb[:, :, 1] < 90)
        if not red.any():
            return Detections(np.zeros((0, 4)), np.zeros(0))
        rows, columns = np.nonzero(red)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        return Detections(np.array([box], float), np.ones(1))


def painted(centre: np.ndarray, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A red square with a blue mark in its middle, on the backdrop."""
    picture = backdrop(0, width, height).copy()
    for half, colour in ((SQUARE // 2, (230, 20, 20)), (4, (20, 20, 230))):
        x, y = (round(float(c)) for c in centre)
        picture[y - half : y + half, x - half : x + half] = colour
    return picture


def marks(crops: np.ndarray) -> np.ndarray:
    """Centre of the blue mark in each crop, as a share of its side: [T, 2]."""
    blue = (crops[..., 2] > 185) & (crops[..., 0] < 90)
    return np.array([np.argwhere(b).mean(axis=0)[::-1] for b in blue]) / crops.shape[1]


def cropped(data: bytes, options: FaceOptions, detector: detect.Detector | None = None) -> Cropped:
    result = crop_faces(data, detector or RedSquare(), options)
    assert isinstance(result, Cropped), result
    return result


def test_a_moving_square_stays_where_it_is_in_the_crop() -> None:
    seconds = np.arange(100) / 25
    way = np.stack([160 + 70 * np.sin(1.2 * seconds), 120 + 30 * np.sin(2 * seconds)], axis=1)
    options = FaceOptions(size=96, margin=0.5)
    result = cropped(encode(painted(c) for c in way), options)
    (found,) = result.tracks
    assert found.squares.shape == (100, 4)
    at = marks(decoded(found.mp4))
    # In the middle, lower by the lift: 0.07 of a face that is half of the crop. Within 3 pixels of
    # the source, while the square itself moves by 140; within 5 after the last look, at frame 96.
    middle = np.array([[0.5, 0.535]])
    np.testing.assert_allclose(at[:97], np.repeat(middle, 97, axis=0), atol=3 / 80)
    np.testing.assert_allclose(at[97:], np.repeat(middle, 3, axis=0), atol=5 / 80)
    scores = found.track.scores
    assert found.track.detected[:: result.every].all()
    assert np.isnan(scores).sum() == 100 - 100 / result.every


def test_small_and_large_pictures_give_the_same_framing() -> None:
    large = np.kron(painted(np.array([150, 120])), np.ones((4, 4, 1), np.uint8))  # 1280x960
    small = painted(np.array([150, 120]))
    tracks = [
        cropped(encode([p] * 30), FaceOptions(size=64)).tracks[0].track for p in (small, large)
    ]
    np.testing.assert_allclose(tracks[1].boxes, 4 * tracks[0].boxes, atol=4)


def test_a_face_that_comes_late_and_leaves_gives_a_shorter_crop() -> None:
    frames = [painted(np.array([100, 100])) if 30 <= i < 70 else backdrop() for i in range(100)]
    result = cropped(encode(frames), FaceOptions(size=64))
    (found,) = result.tracks
    assert 30 - result.every < found.track.first <= 30
    last = found.track.first + len(found.track.boxes) - 1
    assert 69 <= last < 69 + result.every
    info = probe(found.mp4, 1)
    assert isinstance(info, VideoInfo)
    assert info.num_frames == len(found.squares)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_video_that_lies_on_its_side_is_set_upright(rotation: int) -> None:
    upright = painted(np.array([60, 80]))
    upright[:20] = 250  # a bright sky
    stored = np.rot90(upright, -rotation // 90)  # a player turns it by `rotation`
    data = encode([stored] * 30, rotation=rotation)
    frame = next(read_upright_frames(data))
    assert (frame.width, frame.height) == (WIDTH, HEIGHT)
    assert np.abs(frame.rgb().astype(int) - upright).mean() < 6
    found = cropped(data, FaceOptions(size=64))
    assert (found.info.width, found.info.height) == (WIDTH, HEIGHT)
    np.testing.assert_allclose(found.tracks[0].track.boxes[0], [40, 60, 80, 100], atol=2)


def test_pixels_that_are_no_squares_are_made_square() -> None:
    narrow = painted(np.array([100, 100]))[:, ::2]  # half of the columns, to be shown twice as wide
    data = encode([narrow] * 30, pixel_aspect=Fraction(2))
    found = cropped(data, FaceOptions(size=64))
    assert found.info.width == WIDTH
    np.testing.assert_allclose(found.tracks[0].track.boxes[0], [80, 80, 120, 120], atol=2)


def test_times_of_a_variable_rate_go_into_the_crop() -> None:
    pts = [i + 10 * (i > 20) for i in range(40)]
    data = encode([painted(np.array([100, 100]))] * 40, pts=pts)
    info = probe(cropped(data, FaceOptions(size=64)).tracks[0].mp4, 1)
    assert isinstance(info, VideoInfo)
    assert not info.constant_frame_rate
    assert info.fps == pytest.approx(39 / 49 * 25)


def test_the_real_detector_keeps_a_moving_face_in_the_middle() -> None:
    way = straight_way(60)[:40]
    result = cropped(encode(map(with_faces, way)), FaceOptions(), detect.load_detector("haar"))
    (found,) = result.tracks
    centers = (found.track.boxes[:, :2] + found.track.boxes[:, 2:]) / 2
    np.testing.assert_allclose(centers, way + MIDDLE, atol=9)  # the painted head is 60 wide
    assert decoded(found.mp4).shape == (40, 224, 224, 3)


def test_of_two_faces_the_longer_seen_is_taken_or_both() -> None:
    frames = [
        with_faces((10, 20), (180, 90)) if i < 20 else with_faces((10, 20)) for i in range(32)
    ]
    data, haar = encode(frames), detect.load_detector("haar")
    both = cropped(data, FaceOptions(size=64, tracks="all"), haar)
    assert [len(found.squares) for found in both.tracks] == [32, 20]
    best = cropped(data, FaceOptions(size=64), haar)
    assert [found.mp4 for found in best.tracks] == [both.tracks[0].mp4]


def test_what_gives_no_crop_says_why() -> None:
    haar = detect.load_detector("haar")

    def reason(data: bytes) -> str:
        result = crop_faces(data, haar, FaceOptions())
        assert isinstance(result, Rejected), result
        return result.reason

    good = make_video(None, 20)
    assert reason(good) == "no_face"
    assert reason(b"junk" * 300) == "unreadable"
    assert reason(b"") == "empty"
    assert reason(good[: len(good) // 2]) == "truncated"


def test_a_video_that_breaks_in_the_middle_is_left_out_or_cropped_as_far_as_it_goes() -> None:
    data = bytearray(encode(map(with_faces, straight_way(60)[:24])))
    middle = data.index(b"mdat") + int.from_bytes(data[data.index(b"mdat") - 4 :][:4], "big") // 2
    data[middle : middle + 2000] = b"\x00" * 2000
    result = crop_faces(bytes(data), detect.load_detector("haar"), FaceOptions())
    if isinstance(result, Rejected):
        assert result.reason in {"undecodable", "truncated"}
    else:
        assert len(decoded(result.tracks[0].mp4)) == len(result.tracks[0].squares)
