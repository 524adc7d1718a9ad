"""Where the encoder looks: heat maps over the face.

For each video, seen whole as in fine-tuning: its frames; the attention that each position gets in
the last block of stage 1; and for each later stage the weights with which the positions of one
tubelet frame, in the middle of the clip, make up its bottleneck tokens, a picture per token. A
stage without bottleneck shows its last block's attention as stage 1 does. Both are shares that sum
to 1 over the positions. A row's colours run from 0 to its largest share, which its label gives as a
multiple of an even share.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pkgutil
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from svfap_dist import storage
from svfap_dist.checkpoint import load
from svfap_dist.errors import ConfigError
from svfap_dist.model import patches, weights
from svfap_dist.model.sizes import ENCODERS
from svfap_dist.report.reconstruction import clip_of

_COLUMNS = 8  # pictures in a row, at most
_LABEL_WIDTH = 130
_GAP = 2
_OPACITY = 0.65  # of the heat over the picture
_COLOURS = matplotlib.colormaps["inferno"]


@dataclasses.dataclass(frozen=True)
class Row:
    """Heat maps that stand side by side.

    maps: [columns, side, side], in multiples of an even share; frames: the frame under each map.
    """

    label: str
    maps: np.ndarray
    frames: list[int]


def make(checkpoint_url: str, videos: Sequence[str], output: str) -> None:
    """Write the maps of some videos (paths or URLs) to a PNG file.

    Raises: CheckpointError, DecodeError, StorageError.
    """
    weights_url, config = load.locate_weights(checkpoint_url)
    model = weights.load_autoencoder(weights_url)
    sheets = []
    for url in videos:
        clips = clip_of(config, url)
        pixels = (patches.denormalize(clips)[0].clamp(0, 1) * 255).round().to(torch.uint8)
        name = os.path.splitext(os.path.basename(url))[0]
        sheets.append(
            draw(
                pixels.permute(1, 2, 3, 0).numpy(),
                rows(model.encoder, model.size.encoder, clips),
                name,
            )
        )
    png = io.BytesIO()
    _stacked(sheets).save(png, "PNG")
    storage.write_bytes(output, png.getvalue())


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
    """At most so many columns of shares [columns, s], as squares."""
    shown = np.linspace(0, len(shares) - 1, min(_COLUMNS, len(shares))).round().astype(int)
    side = round(shares.shape[1] ** 0.5)
    maps = shares[shown].unflatten(1, (side, side)) * shares.shape[1]
    return Row(label, maps.float().numpy(), [frames[column] for column in shown])


def draw(frames: np.ndarray, rows: Sequence[Row], name: str) -> Image.Image:
    """One video's sheet: its frames uint8 [F, H, W, 3] that the first row shows, then the maps."""
    height, width = frames.shape[1:3]
    columns = max(len(row.frames) for row in rows)
    size = _LABEL_WIDTH + columns * (width + _GAP), (1 + len(rows)) * (height + _GAP)
    sheet = Image.new("RGB", size, "white")
    text = ImageDraw.Draw(sheet)
    text.text((4, 4), name[:18], fill="black")
    for column, frame in enumerate(rows[0].frames):
        sheet.paste(Image.fromarray(frames[frame]), (_LABEL_WIDTH + column * (width + _GAP), 0))
    for number, row in enumerate(rows, start=1):
        top, largest = number * (height + _GAP), float(row.maps.max())
        text.text((4, top + height // 2 - 12), row.label, fill="black")
        text.text((4, top + height // 2 + 2), f"up to {largest:.1f}x even", fill="black")
        for column, (heat, frame) in enumerate(zip(row.maps, row.frames, strict=True)):
            picture = _overlaid(frames[frame], heat / largest)
            sheet.paste(picture, (_LABEL_WIDTH + column * (width + _GAP), top))
    return sheet


def _overlaid(frame: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Heat [side, side] from 0 to 1 over a frame uint8 [H, W, 3], which is greyed."""
    under = Image.fromarray(frame).convert("L").convert("RGB")
    colours = (np.asarray(_COLOURS(heat))[..., :3] * 255).astype(np.uint8)
    over = Image.fromarray(colours).resize(under.size, Image.Resampling.NEAREST)
    return Image.blend(under, over, _OPACITY)


def _stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets of equal width, one below the other."""
    whole = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
    for number, sheet in enumerate(sheets):
        whole.paste(sheet, (0, number * sheet.height))
    return whole
