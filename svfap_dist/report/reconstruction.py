"""The reconstruction picture: what the model saw, and what it made of it.

For each video three rows of frames: original; what the encoder sees (masked patches grey); the
prediction put in the masked places. Predictions are standardised per patch, so each patch borrows
mean and deviation from its original: the picture shows learned structure, not brightness.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from svfap_dist import storage
from svfap_dist.checkpoint import load
from svfap_dist.config import Config
from svfap_dist.data import masking
from svfap_dist.evaluate.runner import view_sample
from svfap_dist.inference.videos import read_video, unusable
from svfap_dist.model import patches, weights
from svfap_dist.rng import Stream
from svfap_dist.shards.reader import BadSample
from svfap_dist.video.views import middle_view

ROWS = ("original", "masked", "reconstructed")
_FRAMES_SHOWN = 6
_GREY = 0.5
_LABEL_WIDTH = 112
_NAME_LENGTH = 16  # the end of a name tells clips apart
_GAP = 2


def make(checkpoint_url: str, urls: Sequence[str], output: str) -> None:
    """Write the picture of some videos (paths or URLs) to a PNG file.

    Raises: CheckpointError, DecodeError, StorageError.
    """
    weights_url, config = load.locate_weights(checkpoint_url)
    model = weights.load_autoencoder(weights_url)
    frames = [_frames_of(model, config, url) for url in urls]
    png = io.BytesIO()
    draw(frames, [os.path.splitext(os.path.basename(url))[0] for url in urls]).save(png, "PNG")
    storage.write_bytes(output, png.getvalue())


def clip_of(config: Config, url: str) -> torch.Tensor:
    """The clip of a video that pictures show: normalised, [1, 3, F, H, W].

    Raises: DecodeError, StorageError.
    """
    sample = read_video(url, min_frames=config.window)
    if isinstance(sample, BadSample):
        raise unusable([sample])
    view = middle_view(config.data, config.data.region)
    return patches.normalize(view_sample(sample, config.data, view))


@torch.no_grad()
def _frames_of(model: torch.nn.Module, config: Config, url: str) -> np.ndarray:
    """Frames of the three rows, uint8 [3, F, H, W, 3]."""
    clips = clip_of(config, url)
    stream = Stream(config.run.seed, "picture", url.rsplit("/", 1)[-1])
    whole = config.mask.model_copy(update={"decoder_ratio": 1.0})
    split = masking.split_tokens(stream, whole, config.num_tubelets, config.num_patches)
    visible = torch.from_numpy(split.visible).unsqueeze(0)
    masked = torch.from_numpy(split.masked).unsqueeze(0)
    patch = config.model.patch
    predicted = patches.to_pixels(model(clips, visible, masked), clips, masked, patch)
    grey = torch.full_like(predicted, _GREY)
    rows = [
        patches.denormalize(clips),
        *(patches.paste(p, clips, masked, patch) for p in (grey, predicted)),
    ]
    stacked = torch.cat(rows).permute(0, 2, 3, 4, 1)  # [3, 3, F, H, W] -> [3, F, H, W, 3]
    return (stacked.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def draw(videos: Sequence[np.ndarray], names: Sequence[str]) -> Image.Image:
    """One sheet of labelled rows; each video is uint8 [3, F, H, W, 3]."""
    _, num_frames, height, width, _ = videos[0].shape
    shown = np.linspace(0, num_frames - 1, min(_FRAMES_SHOWN, num_frames)).round().astype(int)
    block = len(ROWS) * (height + _GAP) + 3 * _GAP
    sheet = Image.new(
        "RGB", (_LABEL_WIDTH + len(shown) * (width + _GAP), len(videos) * block), "white"
    )
    text = ImageDraw.Draw(sheet)
    for v, (rows, name) in enumerate(zip(videos, names, strict=True)):
        for r, label in enumerate(ROWS):
            top = v * block + r * (height + _GAP)
            text.text((4, top + height // 2 - 6), label, fill="black")
            if r == 0:
                text.text((4, top + 4), name[-_NAME_LENGTH:], fill="black")
            for f, frame in enumerate(shown):
                picture = Image.fromarray(rows[r, frame])
                sheet.paste(picture, (_LABEL_WIDTH + f * (width + _GAP), top))
    return sheet
