"""The Triton kernel that makes patches and targets from YUV planes; import it only where Triton is.

In: planes of a batch as `YuvClips` has them, and indices of tokens, on a GPU. Out: what
`planes.patches_and_targets` returns. One program makes one token: it resamples the token's pixels
from the planes, converts their colors, rounds them to 8 bits, and writes them once, normalized if
the token is visible, standardized if it is masked. An RGB picture is never written.

Resampling is the filter of `frames.convert_batch`, a triangle of radius max(step, 1) for steps of
`step` source samples. A pixel adds up its few taps instead of multiplying with matrices that are
almost all zeros. For crops of at most the picture's size that is bilinear interpolation of four;
for larger ones a loop. The crop decides, which only the device reads, so the host never waits.
Neighboring pixels and tokens share taps, which the caches then hold.

Arithmetic for the paper's clip, 16 frames of 160 x 160 pixels in 800 tokens of 2 x 16 x 16. A
program has 512 pixels, 4 side by side for each of its 128 threads, which keep them in registers
until mean and deviation are known. From a crop of 160 x 160 the program reads 912 bytes of planes
(2 x 16 x 16 of luma, 2 x 10 x 10 of each chroma plane) and writes 1,536 values: the output is most
of the traffic. Sums are those of integers, so they are exact in any order. `profiling.traffic`
counts the bytes. For sm_90, ptxas needs 80 registers and spills none: a multiprocessor holds 6
programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from svfap_dist.model.patches import EPSILON, IMAGENET_MEAN, IMAGENET_STD
from svfap_dist.video.frames import YuvClips, color_table

_PIXELS_PER_THREAD = 4
# A byte times the scale plus the shift is normalized, by channel.
_SCALES = tuple(1 / (255 * std) for std in IMAGENET_STD)
_SHIFTS = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))


def patches_and_targets(
    clips: YuvClips, visible: Tensor, masked: Tensor, patch: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `planes.patches_and_targets`; does not wait for the device.

    Args:
        clips: planes on a GPU.
        visible: indices of the visible tokens, [B, V].
        masked: indices of the masked tokens, [B, M].
        patch: frames and pixels of a patch.
        dtype: of both results.
    """
    tubelet_size, patch_size = patch
    num_values = tubelet_size * patch_size**2 * 3
    seen, targets = (
        torch.empty(*tokens.shape, num_values, dtype=dtype, device=clips.y.device)
        for tokens in (visible, masked)
    )
    rows, columns = _power_of_2(tubelet_size * patch_size), _power_of_2(patch_size)
    inputs = (clips.y, clips.u, clips.v, clips.crops, clips.kinds, visible, masked)
    # Its type hides that a launch takes more than the function's arguments.
    launch: Any = _token_kernel[(visible.shape[1] + masked.shape[1], len(clips))]
    with torch.cuda.device_of(clips.y):
        launch(
            *(tensor.contiguous() for tensor in inputs),
            color_table(clips.y.device),
            seen,
            targets,
            *clips.y.shape[1:],
            *clips.u.shape[2:],
            visible.shape[1],
            masked.shape[1],
            SIZE=clips.size,
            TUBELET=tubelet_size,
            PATCH=patch_size,
            ROWS=rows,
            COLUMNS=columns,
            EPSILON=255 * EPSILON,
            SCALES=_SCALES,
            SHIFTS=_SHIFTS,
            num_warps=min(max(rows * columns // (32 * _PIXELS_PER_THREAD), 1), 8),
        )
    return seen, targets


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


@triton.jit
def _token_kernel(  # noqa: PLR0913, PLR0917  # Triton takes no structures
    y_planes,
    u_planes,
    v_planes,
    crops,
    kinds,
    visible,
    masked,
    color_table,
    seen,
    targets,
    num_frames,
    height,
    width,
    chroma_height,
    chroma_width,
    num_visible,
    num_masked,
    SIZE: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPSILON: tl.constexpr,
    SCALES: tl.constexpr,
    SHIFTS: tl.constexpr,
):
    """Make one token: program (n, b) the n-th of clip b, visible ones first."""
    number, clip = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_visible = number < num_visible
    if is_visible:
        token = tl.load(visible + clip * num_visible + number).to(tl.int32)
    else:
        token = tl.load(masked + clip * num_masked + number - num_visible).to(tl.int32)
    SIDE: tl.constexpr = SIZE // PATCH
    r = tl.arange(0, ROWS)[:, None]  # of the patch, frame by frame
    c = tl.arange(0, COLUMNS)[None, :]
    valid = (r < TUBELET * PATCH) & (c < PATCH)
    frame = token // (SIDE * SIDE) * TUBELET + tl.minimum(r // PATCH, TUBELET - 1)
    row = token // SIDE % SIDE * PATCH + r % PATCH
    column = token % SIDE * PATCH + c
    frame += clip * num_frames

    box = crops + clip * 4
    top, left = tl.load(box).to(tl.float32), tl.load(box + 1).to(tl.float32)
    tall, wide = tl.load(box + 2).to(tl.float32), tl.load(box + 3).to(tl.float32)
    luma = y_planes + frame * (height * width)
    # A type checker takes a call of a kernel's function for one from Python, which raises.
    y, _ = _resample(  # pyright: ignore[reportGeneralTypeIssues]
        luma, luma, row, column, valid, top, left, tall, wide, height, width, SIZE
    )
    # Chroma planes have half the rows and columns; a crop may begin in the middle of a sample.
    top, left, tall, wide = top / 2, left / 2, tall / 2, wide / 2
    height, width = chroma_height, chroma_width
    blue, red = u_planes + frame * (height * width), v_planes + frame * (height * width)
    u, v = _resample(blue, red, row, column, valid, top, left, tall, wide, height, width, SIZE)

    COUNT: tl.constexpr = TUBELET * PATCH * PATCH
    colors = color_table + tl.load(kinds + clip) * 12
    pixel = r * PATCH + c
    dtype = seen.dtype.element_ty
    if is_visible:
        out = seen + (clip * num_visible + number) * (3 * COUNT) + pixel
        for channel in tl.static_range(3):
            values = _mix(colors + channel * 4, y, u, v) * SCALES[channel] + SHIFTS[channel]
            tl.store(out + channel * COUNT, values.to(dtype), mask=valid)
    else:
        out = targets + (clip * num_masked + number - num_visible) * (3 * COUNT) + pixel * 3
        for channel in tl.static_range(3):
            values = _standardize(_mix(colors + channel * 4, y, u, v), valid, COUNT, EPSILON)
            tl.store(out + channel, values.to(dtype), mask=valid)


@triton.jit
def _resample(  # noqa: PLR0913, PLR0917
    one, two, row, column, valid, top, left, tall, wide, height, width, SIZE: tl.constexpr
):
    """Return values of two planes at pixels of a picture of SIZE x SIZE, [ROWS, COLUMNS] each.

    The picture shows the crop at `top`, `left` of `tall` x `wide` samples; `one` and `two` point at
    the frame of each row, of `height` x `width` samples. What is not used is not computed.
    """
    step_y, step_x = tl.div_rn(tall, SIZE * 1.0), tl.div_rn(wide, SIZE * 1.0)
    # In samples, from the middle of the first one.
    center_y, center_x = top + (row + 0.5) * step_y - 0.5, left + (column + 0.5) * step_x - 0.5
    # Samples of the crop; an odd one may include half of the first or last one. They are in the
    # frame even if the crop is not, or is empty: reading elsewhere would end the process.
    low_y, low_x = tl.floor(top), tl.floor(left)
    high_y = tl.maximum(tl.minimum(tl.ceil(top + tall), height) - 1, 0)
    high_x = tl.maximum(tl.minimum(tl.ceil(left + wide), width) - 1, 0)
    if (step_y <= 1) & (step_x <= 1):  # two taps that sum to 1, at borders twice the same one
        first_y, first_x = tl.floor(center_y), tl.floor(center_x)
        share_y, share_x = center_y - first_y, center_x - first_x
        upper = tl.minimum(tl.maximum(first_y, low_y), high_y).to(tl.int32) * width
        lower = tl.minimum(tl.maximum(first_y + 1, low_y), high_y).to(tl.int32) * width
        x0 = tl.minimum(tl.maximum(first_x, low_x), high_x).to(tl.int32)
        x1 = tl.minimum(tl.maximum(first_x + 1, low_x), high_x).to(tl.int32)
        value_one = _interpolate(one, upper, lower, x0, x1, share_y, share_x, valid)
        value_two = _interpolate(two, upper, lower, x0, x1, share_y, share_x, valid)
    else:
        value_one = (row + column) * 0.0
        value_two = value_one
        radius_y, radius_x = tl.maximum(step_y, 1.0), tl.maximum(step_x, 1.0)
        first_y = tl.maximum(tl.floor(center_y - radius_y) + 1, low_y)
        first_x = tl.maximum(tl.floor(center_x - radius_x) + 1, low_x)
        taps_y, taps_x = tl.ceil(2 * radius_y).to(tl.int32), tl.ceil(2 * radius_x).to(tl.int32)
        sum_y, sum_x = row * 0.0, column * 0.0
        for i in range(taps_x):
            sum_x += _weight(first_x + i, center_x, radius_x, high_x)
        for j in range(taps_y):
            weight_y = _weight(first_y + j, center_y, radius_y, high_y)
            sum_y += weight_y
            start = (first_y + j).to(tl.int32) * width
            line_one = value_one * 0
            line_two = line_one
            for i in range(taps_x):
                weight_x = _weight(first_x + i, center_x, radius_x, high_x)
                used = valid & (weight_y > 0) & (weight_x > 0)
                place = start + (first_x + i).to(tl.int32)
                line_one += weight_x * tl.load(one + place, mask=used, other=0)
                line_two += weight_x * tl.load(two + place, mask=used, other=0)
            value_one += weight_y * line_one
            value_two += weight_y * line_two
        scale = tl.div_rn(1.0, sum_y) * tl.div_rn(1.0, sum_x)
        value_one *= scale
        value_two *= scale
    return value_one, value_two


@triton.jit
def _interpolate(plane, upper, lower, x0, x1, share_y, share_x, valid):
    """Return a plane between two rows and two columns; taps that do not count are not read."""
    below, right = valid & (share_y > 0), valid & (share_x > 0)
    a = tl.load(plane + (upper + x0), mask=valid, other=0).to(tl.float32)
    b = tl.load(plane + (upper + x1), mask=right, other=0).to(tl.float32)
    c = tl.load(plane + (lower + x0), mask=below, other=0).to(tl.float32)
    d = tl.load(plane + (lower + x1), mask=below & right, other=0).to(tl.float32)
    above, under = a + share_x * (b - a), c + share_x * (d - c)
    return above + share_y * (under - above)


@triton.jit
def _weight(index, center, radius, high):
    """Return the weight of a sample, 0 beyond `high`; see `frames.resampling_weights`."""
    weight = tl.maximum(1.0 - tl.abs(index - center) / radius, 0.0)
    return tl.where(index <= high, weight, 0.0)


@triton.jit
def _mix(colors, y, u, v):
    """Return a channel from 0 to 255, rounded; `colors` points at the four numbers of its row."""
    value = tl.load(colors + 3) + tl.load(colors) * y
    value += tl.load(colors + 1) * u
    value += tl.load(colors + 2) * v
    # Halves to even, as torch rounds: with 1.5 * 2^23 added, a float32 has no fraction.
    return tl.minimum(tl.maximum((value + 12582912.0) - 12582912.0, 0.0), 255.0)


@triton.jit
def _standardize(pixels, valid, COUNT: tl.constexpr, EPSILON: tl.constexpr):
    """Return a channel of a patch, centered and divided by its deviation."""
    whole = tl.where(valid, pixels, 0.0).to(tl.int32)
    total = tl.sum(whole).to(tl.int64)
    squares = tl.sum(whole * whole).to(tl.int64)
    spread = (COUNT * squares - total * total).to(tl.float32)  # exact until here
    deviation = tl.sqrt_rn(spread / (COUNT * (COUNT - 1.0)))  # unbiased
    return (pixels - total.to(tl.float32) / COUNT) * tl.div_rn(1.0, deviation + EPSILON)
