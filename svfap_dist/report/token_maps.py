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
import itertools
import os
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from svfap_dist import storage
from svfap_dist.checkpoint import load
from svfap_dist.model import patches, weights
from svfap_dist.model.encoder import Encoder, SpatialBottleneck
from svfap_dist.model.layers import Attention
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
    encoder = weights.load_autoencoder(weights_url).encoder
    sheets = []
    for url in videos:
        clips = clip_of(config, url)
        pixels = (patches.denormalize(clips)[0].clamp(0, 1) * 255).round().to(torch.uint8)
        name = os.path.splitext(os.path.basename(url))[0]
        sheets.append(draw(pixels.permute(1, 2, 3, 0).numpy(), rows(encoder, clips), name))
    png = io.BytesIO()
    _stacked(sheets).save(png, "PNG")
    storage.write_bytes(output, png.getvalue())


@torch.no_grad()
def rows(encoder: Encoder, clips: Tensor) -> list[Row]:
    """The rows of maps for one clip [1, 3, F, H, W]."""
    inputs: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[module] = arguments[0]

    ends = itertools.accumulate(encoder.stage_depths)
    first, *others = [encoder.get_submodule(f"blocks.{end - 1}.attn") for end in ends]
    watched = [first, *(encoder.spatial_downsamples or others)]
    hooks = [module.register_forward_pre_hook(remember) for module in watched]
    try:
        stages = encoder(clips)
    finally:
        for hook in hooks:
            hook.remove()
    positions = stages[0].shape[1] // encoder.num_tubelets
    found = []
    for number, (module, stage) in enumerate(zip(watched, stages, strict=True), start=1):
        frames = stage.shape[1] // positions  # of the stage, t
        spans = np.linspace(0, clips.shape[2], frames + 1)
        middles = ((spans[1:] + spans[:-1]) / 2).astype(int).tolist()  # a frame for each of them
        if isinstance(module, SpatialBottleneck):
            shares = module.weights(inputs[module])[0, frames // 2].T  # [z, s]
            found.append(_row(f"tokens {number}", shares, [middles[frames // 2]] * len(shares)))
        else:
            assert isinstance(module, Attention)
            shares = attention_received(module, inputs[module])[0].unflatten(0, (frames, -1))
            shares = shares / shares.sum(dim=1, keepdim=True)  # [t, s], of each frame's attention
            found.append(_row(f"attention {number}", shares, middles))
    return found


def attention_received(attention: Attention, x: Tensor) -> Tensor:
    """Attention that each of the tokens x [B, N, D] gets, mean over queries and heads: [B, N]."""
    query, key, _ = attention.qkv.weight.chunk(3)
    heads = (attention.num_heads, -1)
    q = F.linear(x, query, attention.q_bias).unflatten(-1, heads)  # [B, N, h, D/h]
    k = F.linear(x, key).unflatten(-1, heads)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1).mean(dim=(1, 2))


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
