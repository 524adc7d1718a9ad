"""Augmentation of a labeled set's training clips: RandAugment, horizontal flip, random erasing.

In: a clip's uint8 frames and its random stream. Out: frames of the same shape. What is drawn here
is applied here, in decode workers, or by `device_augment` (augment.run_on). Everything is drawn
once per clip and applied equally to all of its frames: a face that moves from frame to frame would
show an expression that does not exist. It is the augmentation of VideoMAE's fine-tuning, as in the
released code, whose `--aa rand-m7-n4-mstd0.5-inc1` are our defaults: of timm's 15 "increasing"
operations four are drawn with replacement, each is skipped with probability 1/2, and its magnitude
is normal around 7 (standard deviation 0.5), clipped to 0..10. With m a tenth of the magnitude, and
a sign drawn evenly where there is a ±, the operations are

    auto_contrast, equalize, invert    as in ImageOps, for any m
    rotate                             ± 30 m degrees around the middle
    posterize                          keeps 4 - int(4 m) bits
    solarize                           inverts values from 256 - int(256 m) on
    solarize_add                       adds int(110 m) to values below 128, up to 255
    color, contrast, brightness,
    sharpness                          ImageEnhance with factor 1 ± 0.9 m
    shear_x, shear_y                   ± 0.3 m pixels per pixel, from the top left corner
    translate_x, translate_y           ± 0.45 m of the side

The geometric ones interpolate bicubically and fill with gray (128). Statistics (the histogram of
auto_contrast and equalize, the mean of contrast) are computed per frame.

Random erasing is timm's mode "pixel" with one box: its area is uniform over 0.02..1/3 of the
frame's, the logarithm of its aspect ratio over that of 0.3..1/0.3, its position over those that
fit. The box is the same in all frames, filled with normal noise drawn for each. That noise is
standard normal in normalized pixels; here frames are still bytes, so it is scaled to them, where
about one value in forty is outside 0..255 and is clipped.

VideoMAE crops between RandAugment and flip; here the crop comes first, while decoding. Pillow makes
the operations equal to timm's, and needs no torch in decode workers. torchvision's transforms.v2
has them too, but is not a dependency.

Sources: timm data/auto_augment.py and data/random_erasing.py, which SlowFast's
datasets/rand_augment.py and random_erasing.py carry over to clips (arXiv 1909.13719, 1708.04896);
VideoMAE (arXiv 2203.12602), kinetics.py and run_class_finetuning.py of its released code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from svfap_dist.config import AugmentConfig
from svfap_dist.rng import Stream
from svfap_dist.video.info import Crop

_GRAY = (128, 128, 128)
_MAX_MAGNITUDE = 10.0
_ERASED_AREA = (0.02, 1 / 3)  # of the frame
_ERASED_ASPECT = (0.3, 1 / 0.3)  # height to width
_ERASING_ATTEMPTS = 100  # nearly always the first one fits
# ImageNet statistics of R, G, B, with which the model normalizes its input.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

# (frame, tenth of the magnitude, 1 or -1) -> frame of the same size
Operation = Callable[[Image.Image, float, int], Image.Image]


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    """Return the image whose pixel (x, y) is (a x + b y + c, d x + e y + f) of the given one."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        resample=Image.Resampling.BICUBIC,
        fillcolor=_GRAY,
    )


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=_GRAY)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    kept = 0xFF << (8 - bits) & 0xFF  # ImageOps.posterize refuses 0 bits, the largest magnitude
    return image.point([value & kept for value in range(256)] * 3)


def _solarize_add(image: Image.Image, added: int) -> Image.Image:
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


OPERATIONS: Mapping[str, Operation] = {
    "auto_contrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, m, sign: ImageOps.equalize(image),
    "invert": lambda image, m, sign: ImageOps.invert(image),
    "rotate": lambda image, m, sign: _rotate(image, sign * 30 * m),
    "posterize": lambda image, m, sign: _posterize(image, 4 - int(4 * m)),
    "solarize": lambda image, m, sign: ImageOps.solarize(image, 256 - int(256 * m)),
    "solarize_add": lambda image, m, sign: _solarize_add(image, int(110 * m)),
    "color": lambda image, m, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * m),
    "contrast": lambda image, m, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.9 * m),
    "brightness": lambda image, m, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.9 * m),
    "sharpness": lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.9 * m),
    "shear_x": lambda image, m, sign: _affine(image, 1, sign * 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda image, m, sign: _affine(image, 1, 0, 0, sign * 0.3 * m, 1, 0),
    "translate_x": lambda image, m, sign: _affine(
        image, 1, 0, sign * 0.45 * m * image.width, 0, 1, 0
    ),
    "translate_y": lambda image, m, sign: _affine(
        image, 1, 0, 0, 0, 1, sign * 0.45 * m * image.height
    ),
}
_NAMES = tuple(OPERATIONS)


@dataclasses.dataclass(frozen=True)
class ClipAugmentation:
    """What is done to all frames of a clip, in this order."""

    operations: Sequence[tuple[str, float, int]]  # name, tenth of the magnitude, sign
    is_flipped: bool
    erased: Crop | None  # None: nothing


def draw(stream: Stream, config: AugmentConfig, height: int, width: int) -> ClipAugmentation:
    """Draw the augmentation of a clip.

    Args:
        stream: The clip's random numbers.
        config: Probabilities and magnitudes.
        height: Of the frames, in pixels.
        width: Of the frames, in pixels.
    """
    operations = draw_operations(stream, config)
    is_flipped = stream.uniform() < config.flip
    is_erased = stream.uniform() < config.erasing
    erased = erased_box(stream, height, width) if is_erased else None
    return ClipAugmentation(operations, is_flipped, erased)


def augment(clip: np.ndarray, stream: Stream, config: AugmentConfig) -> np.ndarray:
    """Return an augmented copy of a clip.

    Args:
        clip: uint8 [F, H, W, 3].
        stream: The clip's random numbers.
        config: Probabilities and magnitudes.
    """
    drawn = draw(stream, config, *clip.shape[1:3])
    frames = [Image.fromarray(frame) for frame in clip]
    for name, m, sign in drawn.operations:
        frames = [OPERATIONS[name](frame, m, sign) for frame in frames]
    if drawn.is_flipped:
        frames = [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in frames]
    pixels = np.stack([np.asarray(frame) for frame in frames])
    if drawn.erased:
        _erase(pixels, drawn.erased, stream)
    return pixels


def draw_operations(stream: Stream, config: AugmentConfig) -> Sequence[tuple[str, float, int]]:
    """Draw the operations for a clip, in order: name, tenth of the magnitude, sign.

    Args:
        stream: The clip's random numbers.
        config: Number and magnitude of operations.
    """
    drawn = [_NAMES[stream.integer(len(_NAMES))] for _ in range(config.rand_augment_ops)]
    operations = []
    for name in drawn:
        if stream.uniform() < 0.5:
            continue
        magnitude = config.rand_augment_magnitude + config.rand_augment_std * stream.normal()
        m = min(max(magnitude, 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE
        operations.append((name, m, 1 if stream.uniform() < 0.5 else -1))
    return operations


def erased_box(stream: Stream, height: int, width: int) -> Crop | None:
    """Draw the box to erase; None if none fits, as in very narrow frames.

    Args:
        stream: The clip's random numbers.
        height: Of the frames, in pixels.
        width: Of the frames, in pixels.
    """
    for _ in range(_ERASING_ATTEMPTS):
        area = _between(stream, *_ERASED_AREA) * height * width
        aspect = math.exp(_between(stream, *(math.log(end) for end in _ERASED_ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return Crop(stream.integer(height - h + 1), stream.integer(width - w + 1), h, w)
    return None


def _between(stream: Stream, low: float, high: float) -> float:
    return low + (high - low) * stream.uniform()


def _erase(clip: np.ndarray, box: Crop, stream: Stream) -> None:
    """Fill a box of the clip with noise, in place."""
    erased = clip[:, box.top : box.top + box.height, box.left : box.left + box.width]
    words = stream.words(erased.size).reshape(erased.shape)
    for channel, values in enumerate(noise_values()):
        erased[..., channel] = values[words[..., channel]]


@functools.cache
def noise_values() -> np.ndarray:
    """Return a table uint8 [3, 65536]: each channel's byte for a uniform number of 16 bits.

    They are the quantiles of noise that is standard normal once normalized, so drawing it costs a
    table lookup.
    """
    quantiles = (np.arange(2**16) + 0.5) / 2**16
    bounds = np.arange(255) + 0.5  # between one byte and the next
    values = []
    for mean, std in zip(_MEAN, _STD, strict=True):
        noise = NormalDist(255 * mean, 255 * std)
        values.append(np.searchsorted([noise.cdf(bound) for bound in bounds], quantiles))
    return np.stack(values).astype(np.uint8)
