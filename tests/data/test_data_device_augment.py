"""Augmentation by torch against Pillow's, which decode workers use, operation by operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from svfap_dist.config import AugmentConfig
from svfap_dist.data import augment, device_augment
from svfap_dist.data.augment import ClipAugmentation
from svfap_dist.model import patches
from svfap_dist.rng import Stream
from svfap_dist.video.info import Crop

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
EXACT = tuple(name for name in augment.OPERATIONS if name not in GEOMETRIC)
MAGNITUDES = (0.0, 0.31, 0.7, 0.77, 1.0)
# Of a geometric operation: gray levels, and the share of values that are off at all.
LEVELS, SHARE = 1, 0.005


def _clips() -> dict[str, np.ndarray]:
    """Frames of 40 x 56 pixels that differ: a picture with fine noise, and odd histograms."""
    chance = np.random.default_rng(0)
    y, x = np.mgrid[:40, :56] / 40
    waves = [
        125 + 95 * np.sin(3 * x + channel + 0.3 * frame) * np.cos(4 * y - channel)
        for frame in range(3)
        for channel in range(3)
    ]
    smooth = np.stack(waves, -1).reshape(40, 56, 3, 3).transpose(2, 0, 1, 3)
    shape = smooth.shape
    return {
        "picture": (smooth + chance.normal(0, 3, shape)).clip(0, 255).astype(np.uint8),
        "noise": chance.integers(0, 256, shape, dtype=np.uint8),
        "flat": np.full(shape, 77, np.uint8),
        "two values": chance.choice(np.array([0, 255], np.uint8), shape),
        "few values": chance.integers(10, 13, shape, dtype=np.uint8),
    }


CLIPS = _clips()


def _by_pillow(name: str, clip: np.ndarray, m: float, sign: int) -> np.ndarray:
    operation = augment.OPERATIONS[name]
    return np.stack([np.asarray(operation(Image.fromarray(f), m, sign)) for f in clip])


def _by_torch(name: str, clip: np.ndarray, m: float, sign: int) -> np.ndarray:
    return device_augment.OPERATIONS[name](torch.from_numpy(clip), m, sign).numpy()


def test_both_have_the_same_operations() -> None:
    assert list(device_augment.OPERATIONS) == list(augment.OPERATIONS)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", EXACT)
def test_an_operation_on_values_equals_pillows(name: str, sign: int) -> None:
    for what, clip in CLIPS.items():
        before = clip.copy()
        for m in MAGNITUDES:
            found = _by_torch(name, clip, m, sign)
            assert found.dtype == np.uint8
            assert np.array_equal(found, _by_pillow(name, clip, m, sign)), (what, m)
        assert np.array_equal(clip, before)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_geometric_operation_is_at_most_a_gray_level_off(name: str, sign: int) -> None:
    for m in MAGNITUDES:
        for what, clip in CLIPS.items():
            found, expected = _by_torch(name, clip, m, sign), _by_pillow(name, clip, m, sign)
            off = np.abs(found.astype(int) - expected)
            assert off.max() <= LEVELS, (what, m)
            if what in ("picture", "noise"):  # other ones have many whole numbers
                assert (off > 0).mean() < SHARE, (what, m)
            if what == "flat":
                assert not off.any(), m


def _batch(config: AugmentConfig, count: int = 40) -> tuple[np.ndarray, list[ClipAugmentation]]:
    """A batch by torch, and what was drawn for it."""
    clips = torch.from_numpy(CLIPS["picture"]).expand(count, -1, -1, -1, -1)
    streams = [Stream("clip", number) for number in range(count)]
    found = device_augment.augment_batch(clips, streams, config).numpy()
    drawn = [augment.draw(Stream("clip", number), config, 40, 56) for number in range(count)]
    return found, drawn


def test_a_clip_gets_what_a_decode_worker_would_give_it() -> None:
    config = AugmentConfig(erasing=0)
    found, drawn = _batch(config)
    exact = 0
    for number, (clip, one) in enumerate(zip(found, drawn, strict=True)):
        expected = augment.augment(CLIPS["picture"], Stream("clip", number), config)
        off = np.abs(clip.astype(int) - expected)
        if {name for name, _, _ in one.operations}.isdisjoint(GEOMETRIC):
            assert not off.any()
            exact += 1
        else:  # later operations may make more of a gray level
            assert off.mean() < 0.1
    assert 10 < exact < 40


def test_the_erased_box_is_that_of_a_decode_worker_and_its_noise_is_normal() -> None:
    config = AugmentConfig(erasing=1.0, rand_augment_ops=0)
    found, drawn = _batch(config)
    noise = []
    for number, (clip, one) in enumerate(zip(found, drawn, strict=True)):
        box = one.erased
        assert box is not None
        expected = augment.augment(CLIPS["picture"], Stream("clip", number), config)
        rows = slice(box.top, box.top + box.height)
        columns = slice(box.left, box.left + box.width)
        erased = clip[:, rows, columns].copy()
        assert not np.array_equal(erased[0], erased[1])
        noise.append(erased.reshape(-1, 3))
        clip[:, rows, columns] = expected[:, rows, columns]
        assert np.array_equal(clip, expected), "all the rest"
    assert len({values.tobytes() for values in noise}) == len(noise)
    values = np.concatenate(noise)
    mean, std = np.array(patches.IMAGENET_MEAN), np.array(patches.IMAGENET_STD)
    quantiles = np.quantile((values / 255 - mean) / std, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    normal = np.array([-1.645, -0.674, 0, 0.674, 1.645])[:, None]
    assert np.abs(quantiles - normal).max() < 0.05
    assert np.abs(np.corrcoef(values.T.astype(float))[0, 1:]).max() < 0.03, "channels differ"
    assert abs(np.corrcoef(values[1:, 0], values[:-1, 0])[0, 1]) < 0.03, "so do neighbors"


def test_a_clip_is_the_same_in_any_batch() -> None:
    config = AugmentConfig(erasing=1.0)
    whole, _ = _batch(config, 6)
    clip = torch.from_numpy(CLIPS["picture"])[None]
    for number in range(6):
        alone = device_augment.augment_batch(clip, [Stream("clip", number)], config)
        assert np.array_equal(alone[0].numpy(), whole[number])


def test_frames_without_a_draw_are_copied_and_the_given_ones_stay() -> None:
    before = torch.from_numpy(CLIPS["picture"].copy())[None]
    off = AugmentConfig(flip=0, rand_augment_ops=0, erasing=0)
    found = device_augment.augment_batch(before, [Stream("off")], off)
    assert torch.equal(found, before)
    assert found.data_ptr() != before.data_ptr()
    every = ClipAugmentation(
        [(name, 0.7, 1) for name in device_augment.OPERATIONS], True, Crop(0, 0, 9, 9)
    )
    device_augment.apply(before[0], every, 5, found[0])
    assert np.array_equal(before[0].numpy(), CLIPS["picture"])
