"""Rendered faces: where they are, how they move, and whether expressions can be distinguished."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from data_sharding.sources.synthetic import parse
from data_sharding.sources.synthetic_face.identity import CENTER_X, UNITS, draw_identity
from data_sharding.sources.synthetic_face.motion import EXPRESSIONS, Face, expression_faces
from data_sharding.sources.synthetic_face.render import _finer, _undo_pose, render_frames
from svfap_dist import demo
from svfap_dist.config import recipe

FEATURES = {"brows": np.s_[52:74, 78:146], "mouth": np.s_[106:136, 86:138]}


def picture(identity: int, face: Face, size: int = 224) -> np.ndarray:
    """One frame, as floats [size, size, 3]."""
    return next(render_frames(draw_identity(0, identity), [face], size)).astype(np.float64)


def apex(expression: str) -> Face:
    return Face(**EXPRESSIONS[expression].apex)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


@pytest.mark.parametrize("pair", list(itertools.combinations(EXPRESSIONS, 2)), ids="-".join)
def test_expressions_differ_in_brows_and_mouth_at_their_apex(pair: tuple[str, str]):
    for identity in (0, 4):
        one, other = (picture(identity, apex(name)) for name in pair)
        for part, window in FEATURES.items():
            assert difference(one[window], other[window]) > 2, part


def test_expressions_begin_alike_and_then_part():
    courses = {
        name: expression_faces(np.random.default_rng(3), name, 1.0, 72) for name in EXPRESSIONS
    }
    for name, faces in courses.items():
        assert faces[0] == courses["neutral"][0]
        middle, calm = faces[36]._asdict(), courses["neutral"][36]._asdict()
        for channel, height in EXPRESSIONS[name].apex.items():
            assert middle[channel] - calm[channel] == pytest.approx(height)
        assert faces[71] == pytest.approx(courses["neutral"][71], abs=0.05)


def test_intensity_scales_the_apex():
    calm, half, full = (
        expression_faces(np.random.default_rng(1), "fear", i, 40) for i in (0, 0.5, 1)
    )
    for none, some, all_ in zip(calm, half, full, strict=True):
        assert np.subtract(some, none) == pytest.approx(0.5 * np.subtract(all_, none))


def test_a_clip_talks_blinks_and_moves_its_head():
    faces = expression_faces(np.random.default_rng(0), "neutral", 0.0, 200)
    course = {name: np.array([getattr(face, name) for face in faces]) for name in Face._fields}
    assert course["blink"].max() > 0.8
    assert np.median(course["blink"]) < 0.1
    assert np.ptp(course["jaw"]) > 0.15
    assert np.ptp(course["yaw"]) > 0.05
    assert np.abs(course["yaw"]).max() < 0.3  # about 17 degrees


def test_the_neutral_pose_leaves_every_point_where_it_is():
    at = np.arange(0, UNITS, 4, dtype=np.float32)
    x, y = _undo_pose(draw_identity(0, 0), Face(), at[None, :], at[:, None])
    np.testing.assert_allclose(x, np.broadcast_to(at[None, :], x.shape), atol=1e-4)
    np.testing.assert_allclose(y, np.broadcast_to(at[:, None], y.shape), atol=1e-4)


def test_a_turning_head_moves_the_nose_more_than_the_ear():
    who = draw_identity(0, 0)
    at = np.array([CENTER_X, CENTER_X + who.half_width], np.float32)[None, :]
    x, _ = _undo_pose(who, Face(yaw=0.1), at, np.full((1, 1), who.nose_y, np.float32))
    nose, ear = (at - x)[0]
    assert nose > ear + 2 > 2


def test_finer_is_bilinear_interpolation_at_the_pixel_centres():
    grids = np.random.default_rng(0).normal(size=(2, 6, 6)).astype(np.float32)
    finer = _finer(grids)
    assert finer.shape == (2, 20, 20)
    for k, row, column in np.ndindex(*finer.shape):
        r, c = (row + 0.5) / 4, (column + 0.5) / 4
        i, j = int(r), int(c)
        across = [(1 - (c - j)) * grids[k, n, j] + (c - j) * grids[k, n, j + 1] for n in (i, i + 1)]
        expected = (1 - (r - i)) * across[0] + (r - i) * across[1]
        assert finer[k, row, column] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("identity", range(4))
def test_what_an_expression_moves_lies_inside_the_training_region(identity: int):
    calm = picture(identity, Face())
    moved = np.zeros(calm.shape[:2], bool)
    for name in EXPRESSIONS:
        face = apex(name)._replace(pitch=0.0, zoom=0.0)
        moved |= np.abs(picture(identity, face) - calm).max(axis=2) > 24
    rows, columns = np.nonzero(moved)
    assert rows.min() > 40
    assert np.quantile(rows, 0.99) < 160  # the skin of the neck follows the jaw a little
    assert columns.min() > 56
    assert columns.max() < 168
    assert np.mean(columns) == pytest.approx(112, abs=4)


def test_a_smaller_frame_shows_the_same_picture():
    large, small = picture(1, apex("happy")), picture(1, apex("happy"), size=112)
    shrunk = large.reshape(112, 2, 112, 2, 3).mean(axis=(1, 3))
    assert difference(small, shrunk) < 4


def test_a_crop_is_that_part_of_the_frame():
    face = Face(yaw=0.1, roll=0.03, shift_x=2.0, jaw=0.5, corner=0.4, blink=0.3)
    (whole,) = render_frames(draw_identity(0, 1), [face], 224)
    (crop,) = render_frames(draw_identity(0, 1), [face], 112, crop=112)
    np.testing.assert_array_equal(crop, whole[40:152, 56:168])


@pytest.mark.parametrize("name", ["tiny_cpu", "finetune_synthetic"])
def test_a_patch_of_the_demo_and_of_the_example_is_at_most_half_a_mouth(name: str):
    # With a mouth in one patch, fine-tuning stayed at chance.
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"svfap shard synthetic (\S+)", readme)
    config = recipe.load(name)
    for text in (demo._TRAIN_CLIPS, demo._HELD_OUT_CLIPS, example):
        pixels = config.data.frame_size / parse(text).crop  # of a unit
        for identity in range(20):
            who = draw_identity(0, identity)
            assert 2 * who.mouth_width * pixels > 2 * config.model.patch_size
            assert 2 * who.half_width * pixels > 0.75 * config.data.frame_size


def test_people_look_different():
    faces = [picture(identity, Face()) for identity in range(6)]
    for one, other in itertools.combinations(faces, 2):
        assert difference(one[40:140, 70:154], other[40:140, 70:154]) > 4


def test_position_alone_foretells_much_of_a_standardised_patch():
    # Faces are aligned and shading is shared, so a short training run has something to learn.
    def standardised(identity: int) -> np.ndarray:
        region = picture(identity, Face())[:160, 32:192]
        patches = region.reshape(10, 16, 10, 16, 3).transpose(0, 2, 4, 1, 3)
        mean, deviation = patches.mean((3, 4), keepdims=True), patches.std((3, 4), keepdims=True)
        return (patches - mean) / deviation

    expected = np.mean([standardised(identity) for identity in range(12)], axis=0)
    held_out = np.stack([standardised(identity) for identity in range(1000, 1006)])
    assert ((held_out - expected) ** 2).mean() < 0.7
