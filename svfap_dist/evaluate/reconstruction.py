"""Reconstruct masked clips, and arrange them as three rows of frames per clip.

The rows: the original; the encoder's input, with masked patches in gray; and the predictions at the
masked positions. Predictions are standardized per patch, so each patch takes mean and deviation
from its original: the picture shows learned structure, not brightness.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from svfap_dist.config import MaskConfig
from svfap_dist.data import masking
from svfap_dist.model import patches
from svfap_dist.model.sizes import Size
from svfap_dist.rng import Stream
from svfap_dist.video import image_grid

_ROWS = ("original", "masked", "reconstructed")
_FRAMES_SHOWN = 6
_GRAY = 0.5


@torch.no_grad()
def reconstruct(
    predict: Callable[..., Tensor], size: Size, frames: Tensor, mask: MaskConfig, stream: Stream
) -> np.ndarray:
    """Return the original, the masked and the reconstructed frames, uint8 [3, F, H, W, 3].

    Args:
        predict: The autoencoder: frames, visible and masked tokens -> pixels [1, M, P].
        size: Size of the autoencoder.
        frames: One clip, uint8 [1, F, H, W, 3], on the network's device.
        mask: The recipe's [mask]; all masked tokens are predicted.
        stream: Random stream that draws the mask.
    """
    whole = mask.model_copy(update={"decoder_ratio": 1.0})
    split = masking.split_tokens(stream, whole, size.num_tubelets, size.patches_per_frame)
    visible = torch.from_numpy(split.visible).unsqueeze(0).to(frames.device)
    masked = torch.from_numpy(split.masked).unsqueeze(0).to(frames.device)
    clips, patch = patches.normalize(frames), size.patch
    predicted = patches.to_pixels(predict(frames, visible, masked), clips, masked, patch)
    gray = torch.full_like(predicted, _GRAY)
    rows = [
        patches.denormalize(clips),
        *(patches.paste(p, clips, masked, patch) for p in (gray, predicted)),
    ]
    stacked = torch.cat(rows).permute(0, 2, 3, 4, 1)  # [3, 3, F, H, W] -> [3, F, H, W, 3]
    return (stacked.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def grid_rows(video: np.ndarray, name: str) -> list[tuple[str, list[np.ndarray]]]:
    """Return the labeled rows of a clip's picture.

    Args:
        video: Result of `reconstruct`.
        name: Name of the clip.
    """
    shown = image_grid.evenly_spaced(video.shape[1], _FRAMES_SHOWN)
    labels = (f"{name}\n{_ROWS[0]}", *_ROWS[1:])
    rows = zip(labels, video, strict=True)
    return [(label, [frames[number] for number in shown]) for label, frames in rows]
