"""The detectors that the package brings, on rendered faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from face_videos import MIDDLE, PORTRAIT, WIDTH, backdrop, portrait, with_faces
from stand_in_network import one_face

from data_sharding.faces import detect
from svfap_dist.errors import ConfigError


@pytest.fixture(scope="module")
def haar() -> detect.Detector:
    return detect.load_detector("haar")


@pytest.mark.parametrize("corner", [(0, 0), (100, 60), (200, 120)])
def test_haar_finds_a_face_where_it_is(haar: detect.Detector, corner: tuple[int, int]) -> None:
    boxes, scores = haar.detect(with_faces(corner))
    assert boxes.shape == (1, 4)
    assert scores[0] >= 4
    centre = (boxes[0, :2] + boxes[0, 2:]) / 2
    np.testing.assert_allclose(centre, np.array(corner) + MIDDLE, atol=PORTRAIT * 0.08)
    assert 0.3 * PORTRAIT < boxes[0, 2] - boxes[0, 0] < 0.6 * PORTRAIT


def test_haar_finds_two_faces(haar: detect.Detector) -> None:
    boxes, _ = haar.detect(with_faces((10, 20), (180, 90)))
    assert sorted((boxes[:, 0] > 160).tolist()) == [False, True]


def test_haar_finds_half_a_face_from_either_side(haar: detect.Detector) -> None:
    picture, half = backdrop().copy(), round(PORTRAIT * 0.55)
    picture[60 : 60 + PORTRAIT, 60 : 60 + half] = portrait(2, yaw=0.4)[:, :half]
    (box,), (score,) = haar.detect(picture)
    assert 60 < (box[0] + box[2]) / 2 < 60 + half
    # The profile cascade knows one side, so one of these two is found in the mirror.
    (mirrored,), (same,) = haar.detect(np.ascontiguousarray(picture[:, ::-1]))
    assert mirrored.tolist() == [WIDTH - box[2], box[1], WIDTH - box[0], box[3]]
    assert same == score


def test_haar_finds_no_face_where_there_is_none(haar: detect.Detector) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3)).astype(np.uint8)
    for picture in (noise, backdrop(1), np.zeros((240, 320, 3), np.uint8)):
        boxes, scores = haar.detect(picture)
        assert boxes.shape == (0, 4)
        assert scores.shape == (0,)


@pytest.mark.parametrize("name", ["mtcnn", "", "haar:x.xml", "yunet", "yunet:/no/such/file.onnx"])
def test_what_cannot_be_loaded_is_told(name: str) -> None:
    with pytest.raises(ConfigError):
        detect.load_detector(name)


def test_a_file_that_is_no_network_is_told(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"this is no network" * 50)
    with pytest.raises(ConfigError, match=r"junk\.onnx"):
        detect.load_detector(f"yunet:{tmp_path / 'junk.onnx'}")


def test_of_yunets_network_boxes_and_scores_are_read(tmp_path: Path) -> None:
    def detected(probability: float) -> detect.Detections:
        (tmp_path / "net.onnx").write_bytes(one_face(probability))
        return detect.load_detector(f"yunet:{tmp_path / 'net.onnx'}").detect(backdrop(0))

    boxes, scores = detected(0.9)
    # The centre at (7.5, 5.25) cells of 16 pixels, 4 by 5 cells large.
    np.testing.assert_allclose(boxes, [[120 - 32, 84 - 40, 120 + 32, 84 + 40]], atol=1e-3)
    np.testing.assert_allclose(scores, [0.9], atol=1e-6)
    assert detected(0.5).boxes.shape == (0, 4)
