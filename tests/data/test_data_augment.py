"""Augmentation: each operation against what it is by definition, and what is drawn for a clip."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from svfap_dist.config import AugmentConfig
from svfap_dist.data import augment
from svfap_dist.data.augment import OPERATIONS
from svfap_dist.model import patches
from svfap_dist.rng import Stream

OFF = AugmentConfig(flip=0, rand_augment_ops=0, erasing=0)
SIDE = 40
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def _clip(frames: int = 2, side: int = SIDE) -> np.ndarray:
    """Smooth colours between 30 and 220, none of the frames or channels like another."""
    y, x = np.mgrid[:side, :side] / side
    waves = [
        125 + 95 * np.sin(3 * x + channel + 0.3 * frame) * np.cos(4 * y - channel)
        for frame in range(frames)
        for channel in range(3)
    ]
    return np.stack(waves, -1).reshape(side, side, frames, 3).transpose(2, 0, 1, 3).astype(np.uint8)


def _applied(name: str, pixels: np.ndarray, m: float, sign: int = 1) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), m, sign))


def test_the_operations_are_the_15_of_timm() -> None:
    names = "auto_contrast equalize invert rotate posterize solarize solarize_add color contrast"
    names += " brightness sharpness shear_x shear_y translate_x translate_y"
    assert list(OPERATIONS) == names.split()


# The magnitude 7 of the recipe (m = 0.7) in numbers worked out by hand.
POINTS = {
    "invert": lambda v: 255 - v,
    "posterize": lambda v: v & 0b1100_0000,  # 4 - int(2.8) = 2 bits
    "solarize": lambda v: np.where(v < 77, v, 255 - v),  # 256 - int(179.2)
    "solarize_add": lambda v: np.where(v < 128, np.minimum(v + 77, 255), v),
}


@pytest.mark.parametrize("name", POINTS)
def test_values_become_what_the_formula_says(name: str) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    expected = POINTS[name](values.astype(int))
    assert np.array_equal(_applied(name, values, 0.7), expected)
    assert np.array_equal(_applied(name, values, 0.7, -1), expected)  # they have no sign


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Luma as Pillow computes it, ITU-R BT.601."""
    return (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]


def _smoothed(pixels: np.ndarray) -> np.ndarray:
    """Means of 3 x 3 pixels, the middle one five times; the border as it is."""
    sums = sum(np.roll(pixels, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    out = pixels.copy()
    out[1:-1, 1:-1] = ((sums + 4 * pixels) / 13)[1:-1, 1:-1]
    return out


BLENDS = {  # what factor 0 gives
    "brightness": np.zeros_like,
    "contrast": lambda pixels: np.full_like(pixels, _grey(pixels).mean()),
    "color": lambda pixels: _grey(pixels).repeat(3, 2),
    "sharpness": _smoothed,
}


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize(("sign", "factor"), [(1, 1.63), (-1, 0.37)])  # 1 ± 0.9 * 0.7
def test_enhancements_blend_away_from_or_to_the_plain_picture(
    name: str, sign: int, factor: float
) -> None:
    pixels = _clip()[0].astype(float)
    plain = BLENDS[name](pixels)
    expected = np.clip(plain + factor * (pixels - plain), 0, 255)
    assert np.abs(_applied(name, _clip()[0], 0.7, sign) - expected).max() < 2  # bytes between


def test_auto_contrast_stretches_each_channel_to_the_whole_range() -> None:
    pixels = _clip()[0]
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1))
    expected = 255 * (pixels - low) / (high - low)
    assert np.abs(_applied("auto_contrast", pixels, 0.7) - expected).max() <= 1


def test_equalize_makes_ranks_of_values() -> None:
    values = np.array([10, 20, 90, 200], np.uint8).repeat(1024).reshape(64, 64, 1).repeat(3, 2)
    equal = np.unique(_applied("equalize", values, 0.7))
    assert np.abs(equal - np.array([0, 85, 170, 255])).max() <= 1


def _bicubic_weights(t: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1 (Pillow's transforms) for offsets -1, 0, 1, 2: [..., 4]."""
    d = np.abs(t[..., None] - np.arange(-1, 3))
    near, far = d**3 - 2 * d**2 + 1, -(d**3) + 5 * d**2 - 8 * d + 4
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def _warped(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Pixel centers (x, y) taken from matrix @ (x, y, 1), bicubically; 128 outside."""
    side = len(pixels)
    y, x = np.mgrid[:side, :side] + 0.5
    u, v = np.einsum("ij,jyx->iyx", matrix, np.stack([x, y, np.ones_like(x)]))
    inside = (u >= 0) & (u < side) & (v >= 0) & (v < side)
    column, row = np.floor(u - 0.5).astype(int), np.floor(v - 0.5).astype(int)
    wx, wy = _bicubic_weights(u - 0.5 - column), _bicubic_weights(v - 0.5 - row)
    near = np.arange(-1, 3)
    rows = np.clip(row[..., None, None] + near[:, None], 0, side - 1)
    columns = np.clip(column[..., None, None] + near, 0, side - 1)
    out = np.einsum("yxi,yxj,yxijc->yxc", wy, wx, pixels[rows, columns].astype(float))
    return np.where(inside[..., None], np.clip(out, 0, 255), 128)


def _matrix(name: str, m: float, sign: int) -> np.ndarray:
    """Where pixels come from, from the list in the module's docstring."""
    if name == "rotate":
        angle, half = math.radians(sign * 30 * m), SIDE / 2
        c, s = math.cos(angle), math.sin(angle)
        there, back = np.array([[1, 0, half], [0, 1, half], [0, 0, 1]]), np.eye(3)
        back[:2, 2] = -half
        return (there @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ back)[:2]
    matrix = np.eye(2, 3)
    place = {"shear_x": (0, 1), "shear_y": (1, 0), "translate_x": (0, 2), "translate_y": (1, 2)}
    matrix[place[name]] = sign * m * (0.3 if "shear" in name else 0.45 * SIDE)
    return matrix


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize(("m", "sign"), [(0.7, 1), (0.7, -1), (0.31, 1)])
def test_geometric_operations_take_pixels_from_where_they_should(
    name: str, m: float, sign: int
) -> None:
    expected = _warped(_clip()[0], _matrix(name, m, sign))
    got = _applied(name, _clip()[0], m, sign).astype(float)
    # A pixel at the border may fall out by the last bit of a number.
    assert (np.abs(got - expected).max(2) > 1.01).mean() < 0.002
    assert (expected == 128).all(2).mean() > 0.01


def test_all_frames_of_a_clip_get_the_same() -> None:
    frame = _clip(1)
    still = frame.repeat(4, 0)
    config = AugmentConfig(erasing=0)
    changed = 0
    for sample in range(20):
        out = augment.augment(still, Stream("still", sample), config)
        assert out.shape == still.shape
        assert out.dtype == np.uint8
        assert np.array_equal(out, out[:1].repeat(4, 0))
        changed += not np.array_equal(out, still)
    assert changed > 15


def test_augmenting_is_a_function_of_the_stream_and_leaves_the_clip_alone() -> None:
    clip = _clip()
    before = clip.copy()
    config = AugmentConfig(erasing=1)
    one, same = (augment.augment(clip, Stream("key", 1), config) for _ in range(2))
    assert np.array_equal(one, same)
    assert np.array_equal(clip, before)
    assert not np.array_equal(augment.augment(clip, Stream("key", 2), config), one)


def test_with_everything_off_a_clip_stays() -> None:
    clip = _clip()
    assert np.array_equal(augment.augment(clip, Stream("off"), OFF), clip)


def test_flips_are_mirrors_as_often_as_configured() -> None:
    clip = _clip(1)
    config = OFF.model_copy(update={"flip": 0.3})
    flips = 0
    for sample in range(400):
        out = augment.augment(clip, Stream("flip", sample), config)
        flipped = np.array_equal(out, clip[:, :, ::-1])
        assert flipped or np.array_equal(out, clip)
        flips += flipped
    assert abs(flips - 120) < 40  # standard deviation 9


def test_operations_are_drawn_as_timm_draws_them() -> None:
    config = AugmentConfig()
    draws = [augment.draw_operations(Stream("draw", i), config) for i in range(3000)]
    counts = Counter(len(draw) for draw in draws)
    expected = {k: 3000 * math.comb(4, k) / 16 for k in range(5)}  # four, each with chance 1/2
    assert all(abs(counts[k] - n) < 5 * math.sqrt(n) for k, n in expected.items())
    operations = [operation for draw in draws for operation in draw]
    names = Counter(name for name, _, _ in operations)
    assert all(abs(names[name] - 400) < 100 for name in OPERATIONS)  # standard deviation 20
    assert any(len({name for name, _, _ in draw}) < len(draw) for draw in draws)  # replaced
    magnitudes = np.array([10 * m for _, m, _ in operations])
    assert abs(magnitudes.mean() - 7) < 0.05
    assert abs(magnitudes.std() - 0.5) < 0.05
    assert abs(np.mean([sign for _, _, sign in operations])) < 0.07


def test_magnitudes_are_cut_to_their_range() -> None:
    for magnitude, end in ((0.0, 0.0), (10.0, 1.0)):
        config = AugmentConfig(rand_augment_magnitude=magnitude, rand_augment_std=3.0)
        drawn = [m for i in range(60) for _, m, _ in augment.draw_operations(Stream(i), config)]
        assert min(drawn) >= 0
        assert max(drawn) <= 1
        assert 0.3 < np.mean(np.array(drawn) == end) < 0.7


def test_boxes_have_the_areas_and_aspects_of_random_erasing() -> None:
    boxes = [augment.erased_box(Stream("box", i), 160, 160) for i in range(2000)]
    areas = np.array([box.height * box.width / 160**2 for box in boxes if box])
    aspects = np.log([box.height / box.width for box in boxes if box])
    assert len(areas) == 2000
    assert 0.018 < areas.min() < 0.03
    assert 0.3 < areas.max() < 0.34
    assert abs(areas.mean() - (0.02 + 1 / 3) / 2) < 0.015  # standard error 0.002
    assert abs(aspects.mean()) < 0.1
    assert abs(aspects).max() < math.log(1 / 0.3) + 0.05
    assert all(box.top + box.height <= 160 and box.left + box.width <= 160 for box in boxes if box)
    assert {0, 160} == {min(b.top for b in boxes if b), max(b.top + b.height for b in boxes if b)}


def test_no_box_fits_into_a_frame_of_one_row() -> None:
    assert augment.erased_box(Stream("row"), 1, 100) is None
    clip = np.full((2, 1, 100, 3), 7, np.uint8)
    config = OFF.model_copy(update={"erasing": 1.0})
    assert np.array_equal(augment.augment(clip, Stream("row"), config), clip)


def test_erased_is_one_box_of_normal_noise_that_differs_from_frame_to_frame() -> None:
    clip = np.zeros((16, 64, 64, 3), np.uint8)
    config = OFF.model_copy(update={"erasing": 1.0})
    noise = []
    for sample in range(8):
        out = augment.augment(clip, Stream("erase", sample), config)
        hit = (out != 0).any((0, 3))
        rows, columns = np.flatnonzero(hit.any(1)), np.flatnonzero(hit.any(0))
        box = out[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert hit.sum() == len(rows) * len(columns)
        assert not np.array_equal(box[0], box[1])
        noise.append(box.reshape(-1, 3))
    mean, std = np.array(patches.IMAGENET_MEAN), np.array(patches.IMAGENET_STD)
    normalised = (np.concatenate(noise) / 255 - mean) / std
    quantiles = np.quantile(normalised, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    normal = np.array([-1.645, -0.674, 0, 0.674, 1.645])[:, None]
    assert np.abs(quantiles - normal).max() < 0.05


def test_clips_are_erased_as_often_as_configured() -> None:
    clip = np.zeros((1, 16, 16, 3), np.uint8)
    config = OFF.model_copy(update={"erasing": 0.25})
    erased = sum(augment.augment(clip, Stream("e", i), config).any() for i in range(400))
    assert abs(erased - 100) < 35  # standard deviation 9
