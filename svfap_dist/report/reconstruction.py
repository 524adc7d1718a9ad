"""The reconstruction picture: the model's input, and what it predicts for the masked patches.

For each video three rows of frames: the original; the encoder's input, with masked patches in gray;
and the predictions in the masked places. Predictions are standardized per patch, so each patch
takes mean and deviation from its original: the picture shows learned structure, not brightness.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from svfap_dist import storage
from svfap_dist.checkpoint import load
from svfap_dist.config import Config, MaskConfig
from svfap_dist.data import masking
from svfap_dist.evaluate.runner import view_sample
from svfap_dist.inference.videos import read_video, unusable
from svfap_dist.model import patches, weights
from svfap_dist.model.autoencoder import MaskedAutoencoder
from svfap_dist.rng import Stream
from svfap_dist.shards.reader import BadSample
from svfap_dist.video import image_grid
from svfap_dist.video.info import middle_view

_ROWS = ("original", "masked", "reconstructed")
_FRAMES_SHOWN = 6
_GRAY = 0.5


def make(checkpoint_url: str, urls: Sequence[str], output: str) -> None:
    """Write the picture of some videos to a PNG file.

    Args:
        checkpoint_url: a run, or one of its checkpoints.
        urls: paths or URLs of the videos.
        output: path or URL of the file.

    Raises:
        CheckpointError: There is no pre-trained network.
        DecodeError: A video cannot be used.
        StorageError: The store fails.
    """
    weights_url, config = load.locate_weights(checkpoint_url)
    model = weights.load_autoencoder(weights_url)
    grid = []
    for url in urls:
        name = os.path.splitext(os.path.basename(url))[0]
        grid += [*grid_rows(_rows_of(model, config, url), name), ("", [])]
    storage.write_bytes(output, image_grid.png_of(image_grid.draw_grid(grid[:-1])))


def load_clip(config: Config, url: str) -> torch.Tensor:
    """Return the clip of a video that pictures show: normalized floats [1, 3, F, H, W].

    Args:
        config: the recipe of the network.
        url: path or URL of the video.

    Raises:
        DecodeError: The video cannot be used.
        StorageError: The store fails.
    """
    sample = read_video(url, min_frames=config.window)
    if isinstance(sample, BadSample):
        raise unusable([sample])
    view = middle_view(config.data, config.data.region)
    return patches.normalize(view_sample(sample, config.data, view))


def _rows_of(model: MaskedAutoencoder, config: Config, url: str) -> np.ndarray:
    """Return the frames of the three rows, uint8 [3, F, H, W, 3]."""
    stream = Stream(config.run.seed, "picture", url.rsplit("/", 1)[-1])
    return reconstruct(model, load_clip(config, url), config.mask, stream)


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder, clips: torch.Tensor, mask: MaskConfig, stream: Stream
) -> np.ndarray:
    """Return the original, the masked and the reconstructed frames, uint8 [3, F, H, W, 3].

    Args:
        model: a pre-trained network.
        clips: one clip, normalized floats [1, 3, F, H, W], on the network's device.
        mask: the recipe's [mask]; all masked tokens are predicted.
        stream: draws the mask.
    """
    size = model.size
    whole = mask.model_copy(update={"decoder_ratio": 1.0})
    split = masking.split_tokens(stream, whole, size.num_tubelets, size.patches_per_frame)
    visible = torch.from_numpy(split.visible).unsqueeze(0).to(clips.device)
    masked = torch.from_numpy(split.masked).unsqueeze(0).to(clips.device)
    patch = size.patch
    predicted = patches.to_pixels(model(clips, visible, masked), clips, masked, patch)
    gray = torch.full_like(predicted, _GRAY)
    rows = [
        patches.denormalize(clips),
        *(patches.paste(p, clips, masked, patch) for p in (gray, predicted)),
    ]
    stacked = torch.cat(rows).permute(0, 2, 3, 4, 1)  # [3, 3, F, H, W] -> [3, F, H, W, 3]
    return (stacked.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def grid_rows(video: np.ndarray, name: str) -> list[tuple[str, list[np.ndarray]]]:
    """Return the labeled rows of a video's picture.

    Args:
        video: from `reconstruct`.
        name: of the video.
    """
    shown = image_grid.evenly_spaced(video.shape[1], _FRAMES_SHOWN)
    labels = (f"{name}\n{_ROWS[0]}", *_ROWS[1:])
    rows = zip(labels, video, strict=True)
    return [(label, [frames[number] for number in shown]) for label, frames in rows]
