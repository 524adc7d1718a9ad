"""Heat maps over the face of what the encoder attends to.

For each video, without a mask as in fine-tuning: its frames; the attention that each position
receives in the last block of stage 1; and for each later stage the weights with which the positions
of one tubelet frame, in the middle of the clip, contribute to its bottleneck tokens, a picture per
token. A stage without bottleneck shows its last block's attention, as stage 1 does. Both are shares
that sum to 1 over the positions. The colors of a row run from 0 to its largest share, which its
label gives as a multiple of an even share.
"""

from __future__ import annotations

import dataclasses
import os
import pkgutil
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor, nn

from svfap_dist import storage
from svfap_dist.checkpoint import load
from svfap_dist.errors import ConfigError
from svfap_dist.model import patches, weights
from svfap_dist.model.sizes import ENCODERS
from svfap_dist.report.reconstruction import load_frames
from svfap_dist.video import image_grid

_COLUMNS = 8  # pictures in a row, at most
_OPACITY = 0.65  # of the heat over the picture
_COLORS = matplotlib.colormaps["inferno"]


@dataclasses.dataclass(frozen=True)
class Row:
    """Heat maps side by side.

    maps: [columns, side, side], in multiples of an even share; frames: the frame under each map.
    """

    label: str
    maps: np.ndarray
    frames: list[int]


def make(checkpoint_url: str, videos: Sequence[str], output: str) -> None:
    """Write the maps of some videos to a PNG file.

    Args:
        checkpoint_url: a run, or one of its checkpoints.
        videos: paths or URLs.
        output: path or URL of the file.

    Raises:
        CheckpointError: There is no pre-trained network.
        ConfigError: The encoder has no token maps.
        DecodeError: A video cannot be used.
        StorageError: The store fails.
    """
    weights_url, config = load.locate_weights(checkpoint_url)
    model = weights.load_autoencoder(weights_url)
    grid = []
    for url in videos:
        frames = load_frames(config, url)
        maps = rows(model.encoder, model.size.encoder, patches.normalize(frames))
        name = os.path.splitext(os.path.basename(url))[0]
        grid += grid_rows(frames[0].numpy(), maps, name)
    storage.write_bytes(output, image_grid.png_of(image_grid.draw_grid(grid)))


def rows(encoder: nn.Module, encoder_name: str, clips: Tensor) -> list[Row]:
    """Return the rows of maps for one clip.

    Args:
        encoder: a pre-trained or fine-tuned encoder.
        encoder_name: its row in `ENCODERS`.
        clips: normalized floats [1, 3, F, H, W].

    Raises:
        ConfigError: the encoder has no token maps.
    """
    place = ENCODERS[encoder_name].attention_maps
    if not place:
        able = [name for name, spec in ENCODERS.items() if spec.attention_maps]
        raise ConfigError(
            "Encoder has no token maps",
            where="model.encoder",
            found=encoder_name,
            do=f"give a checkpoint of {' or '.join(able)}",
        )
    return [_row(*found) for found in pkgutil.resolve_name(place)(encoder, clips)]


def _row(label: str, shares: Tensor, frames: list[int]) -> Row:
    """Return at most _COLUMNS rows of shares [columns, s], as squares."""
    shown = image_grid.evenly_spaced(len(shares), _COLUMNS)
    side = round(shares.shape[1] ** 0.5)
    maps = shares[shown].unflatten(1, (side, side)) * shares.shape[1]
    return Row(label, maps.float().numpy(), [frames[column] for column in shown])


def grid_rows(
    frames: np.ndarray, rows: Sequence[Row], name: str
) -> list[tuple[str, list[image_grid.Picture]]]:
    """Return the labeled rows of a video's picture: the frames of the first row, then the maps.

    Args:
        frames: uint8 [F, H, W, 3].
        rows: the maps.
        name: of the video.
    """
    found: list[tuple[str, list[image_grid.Picture]]] = [
        (name, [frames[number] for number in rows[0].frames])
    ]
    for row in rows:
        largest = float(row.maps.max())
        maps = zip(row.maps, row.frames, strict=True)
        images = [_overlay(frames[number], heat / largest) for heat, number in maps]
        found.append((f"{row.label}\nup to {largest:.1f}x even", [*images]))
    return found


def _overlay(frame: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Return heat [side, side], from 0 to 1, over a frame uint8 [H, W, 3] in gray."""
    under = Image.fromarray(frame).convert("L").convert("RGB")
    colors = (np.asarray(_COLORS(heat))[..., :3] * 255).astype(np.uint8)
    over = Image.fromarray(colors).resize(under.size, Image.Resampling.NEAREST)
    return Image.blend(under, over, _OPACITY)
