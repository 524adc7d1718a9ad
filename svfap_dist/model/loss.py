"""Targets, loss, and the way back from predictions to pictures.

The decoder predicts pixels that are standardised per patch and per channel, so that it must learn
texture and shape instead of brightness. Targets come from the clips themselves: only the masked
patches are gathered, brought back to [0, 1], and standardised, in float32 whatever the model
computes in. Source: method section of the paper; the constants are those of the released code.

Legend: B clips, M masked tokens, P = pt*p*p*3 numbers of a patch, laid out (pt, p, p) then channel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from svfap_dist.model.patches import (
    PATCH_SIZE,
    TUBELET_SIZE,
    denormalise,
    gather_patches,
    patchify,
    unpatchify,
)

_EPSILON = 1e-6


def _centred(
    clips: Tensor, masked: Tensor, tubelet_size: int, patch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels in [0, 1] of the masked patches less their mean [B, M, 3, pt*p*p], that mean, and the
    deviation to divide by, [B, M, 3, 1] each."""
    pixels = denormalise(gather_patches(clips, masked, tubelet_size, patch_size).flatten(3), 2)
    mean = pixels.mean(dim=-1, keepdim=True)
    centred = pixels - mean
    # The root of the unbiased variance; several times faster on a CPU than Tensor.var.
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return centred, mean, norm / math.sqrt(centred.shape[-1] - 1) + _EPSILON


def targets(
    clips: Tensor, masked: Tensor, tubelet_size: int = TUBELET_SIZE, patch_size: int = PATCH_SIZE
) -> Tensor:
    """What to predict, [B, M, P], for the patches `masked` [B, M] of clips [B, 3, F, H, W]."""
    centred, _, deviation = _centred(clips, masked, tubelet_size, patch_size)
    return (centred / deviation).transpose(2, 3).flatten(2)


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
    _, mean, deviation = _centred(clips, masked, tubelet_size, patch_size)
    by_channel = prediction.float().unflatten(2, (-1, 3)).transpose(2, 3)  # [B, M, 3, pt*p*p]
    return (by_channel * deviation + mean).clamp(0, 1).transpose(2, 3).flatten(2)


def paste(
    pixels: Tensor,
    clips: Tensor,
    masked: Tensor,
    tubelet_size: int = TUBELET_SIZE,
    patch_size: int = PATCH_SIZE,
) -> Tensor:
    """Whole clips [B, 3, F, H, W] in [0, 1]: `pixels` [B, M, P] where masked, else the original."""
    patches = patchify(denormalise(clips), tubelet_size, patch_size)
    places = masked.unsqueeze(-1).expand_as(pixels)
    patches = patches.scatter(1, places, pixels.to(patches.dtype))
    return unpatchify(patches, clips.shape[2], clips.shape[3], tubelet_size, patch_size)
