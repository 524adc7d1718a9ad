"""Augmentation on the device that trains: what `augment` draws, applied to a batch by torch.

In: uint8 frames of a batch, RGB, on any device, and the random stream of each clip. Out: frames of
the same shape. A clip's stream and the order of draws are those of `augment`, so a clip gets the
same operations, magnitudes, mirroring and box as in a decode worker, whatever else is in the
batch and however many ranks and workers there are. The host knows what was drawn: it queues
each clip's operations one after the other and never waits for the device.

Results equal Pillow's byte for byte, in all operations but two. The geometric ones add up the
products of Pillow's bicubic filter in float32 instead of float64, so that a value which is within
1/2048 of the next whole number may be rounded up to it: one gray level, about one value in 2000.
Noise of random erasing has the same distribution, but other values: it is a hash of the clip's seed
and the position, since computing the stream's own generator on a device would take longer.

Arithmetic is one operation at a time, each rounded as IEEE 754 states, because Pillow truncates:
a fused product and sum may end at the next gray level.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svfap_dist.config import AugmentConfig
from svfap_dist.data.augment import ClipAugmentation, draw, noise_values
from svfap_dist.rng import Stream

_GRAY = 128
_LUMA = (19595, 38470, 7471)  # weights of R, G, B in 1/65536, ITU-R BT.601 as Pillow rounds it
_ROUND_UP = 2.0**-11  # more than the error of the products' sum in float32
_LOW_BITS = 2**32 - 1

# (frames uint8 [F, H, W, 3], tenth of the magnitude, 1 or -1) -> frames of the same shape
Operation = Callable[[Tensor, float, int], Tensor]


def augment_batch(frames: Tensor, streams: Sequence[Stream], config: AugmentConfig) -> Tensor:
    """Return an augmented copy of a batch.

    Args:
        frames: uint8 [B, F, H, W, 3].
        streams: Random numbers of each clip.
        config: Probabilities and magnitudes.
    """
    out = torch.empty_like(frames)
    for clip, stream, row in zip(frames, streams, out, strict=True):
        drawn = draw(stream, config, *clip.shape[1:3])
        apply(clip, drawn, stream.integer(1 << 32), row)
    return out


def apply(clip: Tensor, drawn: ClipAugmentation, noise_seed: int, out: Tensor) -> None:
    """Write an augmented copy of a clip.

    Args:
        clip: uint8 [F, H, W, 3].
        drawn: What to do.
        noise_seed: Of the noise that fills the erased box, less than 2^32.
        out: Where to write it, of the same shape.
    """
    for name, m, sign in drawn.operations:
        clip = OPERATIONS[name](clip, m, sign)
    out.copy_(clip.flip(2) if drawn.is_flipped else clip)
    if box := drawn.erased:
        erased = out[:, box.top : box.top + box.height, box.left : box.left + box.width]
        erased.copy_(_noise(noise_seed, erased.numel(), out.device).view(erased.shape))


def _solarize(clip: Tensor, threshold: int) -> Tensor:
    if threshold > 255:  # which is no uint8
        return clip
    return clip ^ (clip >= threshold).to(torch.uint8).mul_(255)


def _solarize_add(clip: Tensor, added: int) -> Tensor:
    return clip + (clip < 128).to(torch.uint8).mul_(added)  # 127 + 110 is less than 255


def _auto_contrast(clip: Tensor) -> Tensor:
    pixels = clip.flatten(1, 2)  # [F, H*W, 3]
    low, high = (end.double().unsqueeze(2) for end in (pixels.amin(1), pixels.amax(1)))  # [F, 3, 1]
    values = torch.arange(256, dtype=torch.float64, device=clip.device)
    scale = torch.tensor(255.0, dtype=torch.float64) / (high - low)  # `255 / x` is 255 * (1 / x)
    table = (values * scale - low * scale).clamp(0, 255)
    return _look_up(_index(clip), torch.where(high > low, table, values))


def _equalize(clip: Tensor) -> Tensor:
    index = _index(clip)
    counts = torch.zeros(len(clip) * 3 * 256, dtype=torch.int64, device=clip.device)
    counts.index_add_(0, index.flatten(), counts.new_ones(()).expand(index.numel()))
    counts = counts.view(-1, 3, 256)
    values = torch.arange(256, device=clip.device)
    last = torch.where(counts > 0, values, 0).amax(2, keepdim=True)  # [F, 3, 1]
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _look_up(index, torch.where(step > 0, table, values))


def _index(clip: Tensor) -> Tensor:
    """Return the place of each value in a table [F, 3, 256] that is flattened, int32 [F, H, W, 3].

    Histograms and tables are per frame and channel.
    """
    rows = torch.arange(len(clip) * 3, dtype=torch.int32, device=clip.device)
    return clip.int() + 256 * rows.view(-1, 1, 1, 3)


def _look_up(index: Tensor, table: Tensor) -> Tensor:
    """Return the values of a table [F, 3, 256] as uint8, truncated."""
    return table.to(torch.uint8).flatten().index_select(0, index.flatten()).view(index.shape)


def _luma(clip: Tensor) -> Tensor:
    """Return the luma of the pixels, int32 [F, H, W, 1]."""
    values = clip.int()
    weighted = (values[..., c : c + 1] * weight for c, weight in enumerate(_LUMA))
    return sum(weighted, torch.full((), 1 << 15, device=clip.device)) >> 16


def _blend(plain: Tensor | float, clip: Tensor, factor: float) -> Tensor:
    """Return clip + (factor - 1) (clip - plain) as uint8, truncated."""
    return clip.float().sub_(plain).mul_(factor).add_(plain).clamp_(0, 255).to(torch.uint8)


def _color(clip: Tensor, factor: float) -> Tensor:
    return _blend(_luma(clip).float(), clip, factor)


def _contrast(clip: Tensor, factor: float) -> Tensor:
    luma = _luma(clip)
    pixels = luma[0].numel()
    mean = (2 * luma.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)  # rounded
    return _blend(mean.float(), clip, factor)


def _sharpness(clip: Tensor, factor: float) -> Tensor:
    values = clip.short()
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values[:, 1:-1, 1:-1]
    plain = clip.float()  # the border stays
    plain[:, 1:-1, 1:-1] = sums.float().div_(13).add_(0.5).floor_()
    return _blend(plain, clip, factor)


def _rotate(clip: Tensor, degrees: float) -> Tensor:
    height, width = clip.shape[1:3]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2  # the middle stays
    return _affine(clip, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _affine(clip: Tensor, *coefficients: float) -> Tensor:
    """Return the clip whose pixel (x, y) is (a x + b y + c, d x + e y + f) of the given one.

    Each pixel is a weighted sum of up to 4 x 4, the same in all frames.
    """
    a, b, c, d, e, f = coefficients
    num_frames, height, width, _ = clip.shape
    y, x = (
        torch.arange(side, dtype=torch.float64, device=clip.device) + 0.5
        for side in (height, width)
    )
    y = y.unsqueeze(1)
    u, v = ((a * x + b * y) + c).flatten(), ((d * x + e * y) + f).flatten()  # [H*W]
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    # With whole numbers of rows from a pixel to its source, one row of taps has all the weight.
    column, across = _taps(u, width)
    row, down = _taps(v, height)
    if (d, e, f) == (0, 1, 0):
        row, down = row[:, 1:2], down[:, 1:2]
    elif (a, b, c) == (1, 0, 0):
        column, across = column[:, 1:2], across[:, 1:2]
    index = (row.unsqueeze(2) * width + column.unsqueeze(1)).flatten(1)  # [H*W, taps]
    index = torch.where(inside.unsqueeze(1), index, height * width)  # of the gray pixel
    weights = (down.unsqueeze(2) * across.unsqueeze(1)).flatten(1)
    pixels = torch.empty(height * width + 1, num_frames * 3, device=clip.device)
    pixels[-1] = _GRAY
    pixels[:-1].view(height, width, num_frames, 3).copy_(clip.permute(1, 2, 0, 3))
    moved = F.embedding_bag(index, pixels, mode="sum", per_sample_weights=weights)
    moved = moved.add_(_ROUND_UP).clamp_(0, 255).to(torch.uint8)
    return moved.view(height, width, num_frames, 3).permute(2, 0, 1, 3)


def _taps(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the four samples around positions on a side, and their weights: [N, 4] each.

    Keys' kernel with a = -1; beyond the ends, the last sample is repeated.
    """
    first = (position - 0.5).floor()
    t = position - 0.5 - first  # from the second sample, in [0, 1)
    offsets = torch.arange(-1, 3, dtype=torch.int32, device=position.device)
    weights = torch.stack((_far(1 + t), _near(t), _near(1 - t), _far(2 - t)), dim=1)
    samples = (first.int().unsqueeze(1) + offsets).clamp_(0, length - 1)
    return samples, weights.float()


def _near(t: Tensor) -> Tensor:
    """Return the weight of a sample at most one away."""
    return t * t * (t - 2) + 1


def _far(t: Tensor) -> Tensor:
    """Return the weight of a sample one to two away."""
    return ((5 - t) * t - 8) * t + 4


def _noise(seed: int, count: int, device: torch.device) -> Tensor:
    """Return `count` bytes of noise for R, G, B, R, ... that is normal once normalized."""
    x = torch.arange((count + 1) // 2, device=device) ^ seed
    # The hash "lowbias32" (C. Wellons, hash-prospector); each has two numbers of 16 bits.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_BITS
    x = x ^ (x >> 16)
    words = torch.stack((x & 0xFFFF, x >> 16), dim=1).flatten()[:count].view(-1, 3)
    channels = torch.arange(3, device=device) << 16
    return _noise_table(device).index_select(0, (words + channels).flatten())


@functools.cache
def _noise_table(device: torch.device) -> Tensor:
    """Return `augment.noise_values`, uint8 [3 * 65536], which is copied only once."""
    return torch.from_numpy(noise_values()).flatten().to(device)


OPERATIONS: Mapping[str, Operation] = {
    "auto_contrast": lambda clip, m, sign: _auto_contrast(clip),
    "equalize": lambda clip, m, sign: _equalize(clip),
    "invert": lambda clip, m, sign: 255 - clip,
    "rotate": lambda clip, m, sign: _rotate(clip, sign * 30 * m),
    "posterize": lambda clip, m, sign: clip & (0xFF << (4 + int(4 * m)) & 0xFF),
    "solarize": lambda clip, m, sign: _solarize(clip, 256 - int(256 * m)),
    "solarize_add": lambda clip, m, sign: _solarize_add(clip, int(110 * m)),
    "color": lambda clip, m, sign: _color(clip, 1 + sign * 0.9 * m),
    "contrast": lambda clip, m, sign: _contrast(clip, 1 + sign * 0.9 * m),
    "brightness": lambda clip, m, sign: _blend(0.0, clip, 1 + sign * 0.9 * m),
    "sharpness": lambda clip, m, sign: _sharpness(clip, 1 + sign * 0.9 * m),
    "shear_x": lambda clip, m, sign: _affine(clip, 1, sign * 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda clip, m, sign: _affine(clip, 1, 0, 0, sign * 0.3 * m, 1, 0),
    "translate_x": lambda clip, m, sign: _affine(
        clip, 1, 0, sign * 0.45 * m * clip.shape[2], 0, 1, 0
    ),
    "translate_y": lambda clip, m, sign: _affine(
        clip, 1, 0, 0, 0, 1, sign * 0.45 * m * clip.shape[1]
    ),
}
