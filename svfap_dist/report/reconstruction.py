"""Draw the reconstruction picture of videos: input, masked input, prediction."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from svfap_dist import storage
from svfap_dist.checkpoint import load
from svfap_dist.config import Config
from svfap_dist.evaluate.reconstruction import grid_rows, reconstruct
from svfap_dist.evaluate.runner import view_sample
from svfap_dist.inference.videos import read_video, unusable
from svfap_dist.model import weights
from svfap_dist.model.autoencoder import MaskedAutoencoder
from svfap_dist.rng import Stream
from svfap_dist.shards.reader import BadSample
from svfap_dist.video import image_grid
from svfap_dist.video.info import middle_view


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


def load_frames(config: Config, url: str) -> torch.Tensor:
    """Return the clip of a video that pictures show: uint8 [1, F, H, W, 3].

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
    return view_sample(sample, config.data, view)


def _rows_of(model: MaskedAutoencoder, config: Config, url: str) -> np.ndarray:
    """Return the frames of the three rows, uint8 [3, F, H, W, 3]."""
    stream = Stream(config.run.seed, "picture", url.rsplit("/", 1)[-1])
    return reconstruct(model, model.size, load_frames(config, url), config.mask, stream)
