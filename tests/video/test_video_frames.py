"""Colours by the standards' own formulas, crops and sizes by Pillow, batches by single clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from svfap_dist.video.frames import (
    Colors,
    RgbFrames,
    YuvClips,
    YuvFrames,
    convert_batch,
    rgb_from_yuv,
    to_rgb,
)
from svfap_dist.video.info import Crop

KINDS = [("bt601", False), ("bt601", True), ("bt709", False), ("bt709", True)]


def smooth_frames(height: int, width: int, kind=("bt601", False), seed: int = 0) -> YuvFrames:
    """Three frames of gentle slopes in all planes, within the values that both ranges allow."""
    rng = np.random.default_rng(seed)

    def plane(rows: int, columns: int, low: int, high: int) -> np.ndarray:
        coarse = rng.integers(low, high, (3, 4, 4), dtype=np.uint8)
        images = [
            Image.fromarray(c).resize((columns, rows), Image.Resampling.BICUBIC) for c in coarse
        ]
        return np.stack([np.asarray(image) for image in images])

    half = (height + 1) // 2, (width + 1) // 2
    return YuvFrames(
        plane(height, width, 60, 190), plane(*half, 100, 156), plane(*half, 100, 156), Colors(*kind)
    )


def oracle(frames: YuvFrames) -> np.ndarray:
    """RGB [F, H, W, 3] in float64 by the formulas of BT.601 and BT.709, chroma samples repeated."""
    y, u, v = (np.asarray(plane, np.float64) for plane in (frames.y, frames.u, frames.v))
    u, v = (c.repeat(2, 1).repeat(2, 2)[:, : y.shape[1], : y.shape[2]] for c in (u, v))
    if frames.colors.full_range:
        y, cb, cr = y / 255, (u - 128) / 255, (v - 128) / 255
    else:
        y, cb, cr = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    if frames.colors.matrix == "bt601":
        rgb = y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb
    else:
        rgb = y + 1.5748 * cr, y - 0.187324 * cb - 0.468124 * cr, y + 1.8556 * cb
    return np.clip(np.stack(rgb, axis=-1) * 255, 0, 255)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (31, 33), (17, 40)])
def test_colors_are_those_of_the_standards(kind, size):
    frames = smooth_frames(*size, kind)
    for top, left in ((0, 0), (1, 1), (2, 3)):
        side = 13
        got = to_rgb(frames, Crop(top, left, side, side), side).astype(np.float64)
        expected = oracle(frames)[:, top : top + side, left : left + side]
        assert np.abs(got - expected).max() <= 4  # FFmpeg's fast converter has few bits
        assert np.abs((got - expected).mean()) < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_is_that_of_the_standards(kind):
    rng = np.random.default_rng(0)
    y, u, v = (rng.integers(16, 236, (1, 2, 2), dtype=np.uint8) for _ in range(3))
    frames = YuvFrames(y, u[:, :1, :1], v[:, :1, :1], Colors(*kind))
    ones = np.ones(())
    got = [
        rgb_from_yuv(Colors(*kind)) @ [value, float(u[0, 0, 0]), float(v[0, 0, 0]), ones]
        for value in y.ravel()
    ]
    assert np.allclose(np.clip(got, 0, 255), oracle(frames).reshape(-1, 3), atol=0.01)


def test_resizing_equals_pillow():
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), dtype=np.uint8)
    resized = to_rgb(RgbFrames(frames), Crop(5, 10, 50, 40), 32)
    assert resized.dtype == np.uint8
    for frame, got in zip(frames, resized, strict=True):
        cut = Image.fromarray(frame).crop((10, 5, 50, 55))  # left, top, right, bottom
        image = cut.resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(image).astype(int) - got).max() <= 1


def test_a_crop_of_the_right_size_is_not_touched():
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), dtype=np.uint8)
    got = to_rgb(RgbFrames(frames), Crop(3, 4, 32, 32), 32)
    assert (got == frames[:, 3:35, 4:36]).all()


def mixed_batch() -> tuple[YuvClips, list[YuvFrames], list[Crop]]:
    """Enlarged, made smaller, odd places, all kinds of colors, frames of several sizes."""
    sizes = [(64, 64), (64, 64), (61, 47), (64, 80)]
    clips = [
        smooth_frames(*size, kind, k)
        for k, (size, kind) in enumerate(zip(sizes, KINDS, strict=True))
    ]
    crops = [Crop(0, 0, 64, 64), Crop(5, 7, 21, 24), Crop(13, 0, 48, 47), Crop(11, 17, 40, 53)]
    return YuvClips.stack(clips, crops, 32), clips, crops


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float16_is_a_level_off_at_most(device):
    """What a GPU computes, against float32 on the CPU."""
    batch, _, _ = mixed_batch()
    exact = convert_batch(batch, torch.float32).int()
    on_gpu = batch.to_rgb(device) if device == "cuda" else convert_batch(batch, torch.float16)
    difference = (on_gpu.cpu().int() - exact).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_equals_its_clips(dtype):
    batch, clips, crops = mixed_batch()
    got = convert_batch(batch, dtype).numpy().astype(int)
    assert got.shape == (4, 3, 32, 32, 3)
    for pixels, clip, crop in zip(got, clips, crops, strict=True):
        difference = np.abs(pixels - to_rgb(clip, crop, 32))
        assert difference.mean() < 2
        assert difference.max() < 12  # chroma is repeated on one side, interpolated on the other


def test_a_batch_on_the_cpu_is_its_clips():
    clips = [smooth_frames(48, 64, KINDS[1]), smooth_frames(40, 56, KINDS[2], seed=1)]
    crops = [Crop(1, 3, 40, 40), Crop(0, 0, 40, 56)]
    got = YuvClips.stack(clips, crops, 32).to_rgb("cpu")
    assert got.dtype == torch.uint8
    for pixels, clip, crop in zip(got, clips, crops, strict=True):
        assert (pixels.numpy() == to_rgb(clip, crop, 32)).all()
