"""Targets, loss, and the way back from predictions to pictures.

The decoder predicts pixels that are standardised per patch and per channel, so that it must learn
texture and shape instead of brightness. Targets come from the clips themselves: only the masked
patches are gathered and standardised, in float32 whatever the model computes in; from uint8 frames
there is nothing to undo. Source: method section of the paper; the constants are those of the
released code.

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
    """Pixels of the masked patches, 0 to 255, as float32 [B, M, pt*p, p*3]."""
    if clips.dtype == torch.uint8:
        return gather_rows(clips, masked, tubelet_size, patch_size).float()
    pixels = gather_patches(clips, masked, tubelet_size, patch_size)  # [B, M, 3, pt, p, p]
    return 255 * denormalize(pixels.movedim(2, -1), -1).flatten(-2).flatten(2, 3)


def _over_patch(x: Tensor) -> Tensor:
    """Sums over the pixels of each channel: [B, M, pt*p, p*3] -> [B, M, 3].

    Rows are added up first, because that runs along the memory.
    """
    return x.sum(2).unflatten(2, (-1, 3)).sum(2)


def _to_rows(x: Tensor, patch_size: int) -> Tensor:
    """A number per channel, for each number of a row: [B, M, 3] -> [B, M, 1, p*3]."""
    return x.repeat(1, 1, patch_size).unsqueeze(2)


def _centered(
    clips: Tensor, masked: Tensor, tubelet_size: int, patch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of the masked patches less their mean [B, M, pt*p, p*3], that mean, and the deviation
    to divide by, [B, M, 1, p*3] each; all in units of 1/255, in which sums of uint8 are exact."""
    pixels = _rows(clips, masked, tubelet_size, patch_size)
    number = tubelet_size * patch_size**2
    mean = _to_rows(_over_patch(pixels) / number, patch_size)
    centered = pixels.sub_(mean)
    variance = _over_patch(centered.square()) / (number - 1)  # unbiased
    return centered, mean, _to_rows(variance.sqrt() + 255 * _EPSILON, patch_size)


def targets(
    clips: Tensor, masked: Tensor, tubelet_size: int = TUBELET_SIZE, patch_size: int = PATCH_SIZE
) -> Tensor:
    """What to predict, [B, M, P], for the patches `masked` [B, M] of clips [B, 3, F, H, W], or of
    the frames uint8 [B, F, H, W, 3] that they were made of."""
    centered, _, deviation = _centered(clips, masked, tubelet_size, patch_size)
    return centered.div_(deviation).flatten(2)


def masked_patch_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over masked patches, [B, M, P] each, as a float32 scalar."""
    return F.mse_loss(prediction.float(), target.float())


def to_pixels(
    prediction: Tensor,
    clips: Tensor,
    masked: Tensor,
    tubelet_size: int = TUBELET_SIZE,
    patch_size: int = PATCH_SIZE,
) -> Tensor:
    """Predictions [B, M, P] as pixels in [0, 1], [B, M, P].

    Each patch is given the mean and deviation of its original, for a prediction says nothing
    about them: pictures only, never a score.
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
    """Whole clips [B, 3, F, H, W] in [0, 1]: `pixels` [B, M, P] where masked, else the original."""
    patches = patchify(denormalize(clips), tubelet_size, patch_size)
    places = masked.unsqueeze(-1).expand_as(pixels)
    patches = patches.scatter(1, places, pixels.to(patches.dtype))
    return unpatchify(patches, clips.shape[2], clips.shape[3], tubelet_size, patch_size)
