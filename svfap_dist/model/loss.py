"""Targets and loss of pre-training, and pictures from predictions.

The decoder predicts pixels that are standardized per patch and per channel, so that it must learn
texture and shape instead of brightness. Targets are computed from the clips: only the masked
patches are gathered and standardized, always in float32. Source: method section of the paper; the
constants are those of the released code.

Legend: B clips, M masked tokens, P = pt*p*p*3 numbers of a patch, laid out (pt, p, p) then channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svfap_dist.model.patches import (
    PATCH_SIZE,
    TUBELET_SIZE,
    denormalize,
    gather_patches,
    gather_rows,
    patchify,
    unpatchify,
)

_EPSILON = 1e-6


def _rows(clips: Tensor, masked: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """Return the pixels of the masked patches, 0 to 255, as float32 [B, M, pt*p, p*3]."""
    if clips.dtype == torch.uint8:
        return gather_rows(clips, masked, tubelet_size, patch_size).float()
    pixels = gather_patches(clips, masked, tubelet_size, patch_size)  # [B, M, 3, pt, p, p]
    return 255 * denormalize(pixels.movedim(2, -1), -1).flatten(-2).flatten(2, 3)


def _over_patch(x: Tensor) -> Tensor:
    """Sum over the pixels of each channel: [B, M, pt*p, p*3] -> [B, M, 3].

    Rows are added first, because that reads memory in order.
    """
    return x.sum(2).unflatten(2, (-1, 3)).sum(2)


def _to_rows(x: Tensor, patch_size: int) -> Tensor:
    """Repeat a value per channel for each value of a row: [B, M, 3] -> [B, M, 1, p*3]."""
    return x.repeat(1, 1, patch_size).unsqueeze(2)


def _centered(
    clips: Tensor, masked: Tensor, tubelet_size: int, patch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centered pixels of the masked patches, their mean and their standard deviation.

    Shapes: [B, M, pt*p, p*3], and twice [B, M, 1, p*3]. Units: 1/255, in which sums of uint8 are
    exact.
    """
    pixels = _rows(clips, masked, tubelet_size, patch_size)
    number = tubelet_size * patch_size**2
    mean = _to_rows(_over_patch(pixels) / number, patch_size)
    centered = pixels.sub_(mean)
    variance = _over_patch(centered.square()) / (number - 1)  # unbiased
    return centered, mean, _to_rows(variance.sqrt() + 255 * _EPSILON, patch_size)


def targets(
    clips: Tensor, masked: Tensor, tubelet_size: int = TUBELET_SIZE, patch_size: int = PATCH_SIZE
) -> Tensor:
    """Return the standardized pixels to predict, [B, M, P].

    Args:
        clips: frames uint8 [B, F, H, W, 3], or normalized floats [B, 3, F, H, W].
        masked: indices of the patches, [B, M].
        tubelet_size: frames of a patch.
        patch_size: height and width of a patch, pixels.
    """
    centered, _, deviation = _centered(clips, masked, tubelet_size, patch_size)
    return centered.div_(deviation).flatten(2)


def masked_patch_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over masked patches, a float32 scalar.

    Args:
        prediction: [B, M, P].
        target: [B, M, P].
    """
    return F.mse_loss(prediction.float(), target.float())


def to_pixels(
    prediction: Tensor,
    clips: Tensor,
    masked: Tensor,
    tubelet_size: int = TUBELET_SIZE,
    patch_size: int = PATCH_SIZE,
) -> Tensor:
    """Return predictions as pixels in [0, 1], [B, M, P]; for pictures only, never for a score.

    Each patch gets the mean and deviation of its original, which the network does not predict.

    Args:
        prediction: [B, M, P].
        clips: the originals, as in `targets`.
        masked: indices of the predicted patches, [B, M].
        tubelet_size: frames of a patch.
        patch_size: height and width of a patch, pixels.
    """
    _, mean, deviation = _centered(clips, masked, tubelet_size, patch_size)
    rows = prediction.float().unflatten(2, (tubelet_size * patch_size, -1))  # [B, M, pt*p, p*3]
    return ((rows * deviation + mean) / 255).clamp(0, 1).flatten(2)


def paste(
    pixels: Tensor,
    clips: Tensor,
    masked: Tensor,
    tubelet_size: int = TUBELET_SIZE,
    patch_size: int = PATCH_SIZE,
) -> Tensor:
    """Return clips [B, 3, F, H, W] in [0, 1] whose masked patches are replaced.

    Args:
        pixels: what replaces them, [B, M, P], in [0, 1].
        clips: the originals, normalized floats [B, 3, F, H, W].
        masked: indices of the patches, [B, M].
        tubelet_size: frames of a patch.
        patch_size: height and width of a patch, pixels.
    """
    patches = patchify(denormalize(clips), tubelet_size, patch_size)
    places = masked.unsqueeze(-1).expand_as(pixels)
    patches = patches.scatter(1, places, pixels.to(patches.dtype))
    return unpatchify(patches, clips.shape[2], clips.shape[3], tubelet_size, patch_size)
