"""Which tokens the encoder sees, and which the decoder predicts: sorted index lists per clip.

Token t * S + s is patch s of tubelet frame t. Masks are index lists and never boolean arrays, so
there is no polarity to remember and the encoder can gather what it needs. All kinds give every clip
the same number of visible tokens, and every tubelet frame that has any the same number of them.

Legend: T tubelet frames of the clip, S patches of a tubelet frame, V visible and M masked tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from svfap_dist.config import Config
from svfap_dist.rng import Stream

if TYPE_CHECKING:
    import torch

_CELL = 4  # patches of a running cell: 2 x 2


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """The tokens of a clip in two parts, each sorted, int64."""

    visible: np.ndarray  # [V]
    masked: np.ndarray  # [M]


def tube(stream: Stream, num_tubelets: int, num_patches: int, ratio: float) -> TokenSplit:
    """Mask the same round(S * ratio) patches in every tubelet frame (paper, section III-B).

    Args:
        stream: the clip's random numbers.
        num_tubelets: T, tubelet frames of the clip.
        num_patches: S, patches of a tubelet frame.
        ratio: share of patches to mask.
    """
    patches = stream.permutation(num_patches)
    num_masked = round(num_patches * ratio)
    frames = np.arange(num_tubelets)[:, None] * num_patches  # [T, 1]
    return TokenSplit(
        visible=(frames + np.sort(patches[num_masked:])).reshape(-1),
        masked=(frames + np.sort(patches[:num_masked])).reshape(-1),
    )


def random(stream: Stream, num_tubelets: int, num_patches: int, ratio: float) -> TokenSplit:
    """Mask round(S * ratio) patches in every tubelet frame, other ones in each. As `tube`."""
    num_masked = round(num_patches * ratio)
    frames = [stream.permutation(num_patches) + t * num_patches for t in range(num_tubelets)]
    return TokenSplit(
        visible=np.concatenate([np.sort(tokens[num_masked:]) for tokens in frames]),
        masked=np.concatenate([np.sort(tokens[:num_masked]) for tokens in frames]),
    )


def frame(stream: Stream, num_tubelets: int, num_patches: int, ratio: float) -> TokenSplit:
    """Mask round(T * ratio) tubelet frames, all patches of each. As `tube`."""
    frames = stream.permutation(num_tubelets)
    num_masked = round(num_tubelets * ratio)
    patches = np.arange(num_patches)
    return TokenSplit(
        visible=(np.sort(frames[num_masked:])[:, None] * num_patches + patches).reshape(-1),
        masked=(np.sort(frames[:num_masked])[:, None] * num_patches + patches).reshape(-1),
    )


def running_cell(
    stream: Stream, masked: np.ndarray, num_patches: int, decoder_ratio: float
) -> np.ndarray:
    """Those of the masked tokens [M] that the decoder is to predict, sorted.

    The frame is tiled by cells of 2 x 2 patches. `decoder_ratio` of a cell's places, counted row by
    row from a random one on, are predicted, and with each tubelet frame the count starts one place
    further, so that within 4 of them each patch is predicted equally often. Source: VideoMAE V2's
    running cell masking (arXiv 2303.16727, section 3.2).
    """
    side = math.isqrt(num_patches)
    tubelet, patch = np.divmod(masked, num_patches)
    row, column = np.divmod(patch, side)
    place = row % 2 * 2 + column % 2
    turn = (place + tubelet + stream.integer(_CELL)) % _CELL
    return masked[turn < round(_CELL * decoder_ratio)]


MASKS = {"tube": tube, "random": random, "frame": frame}


def split(stream: Stream, config: Config) -> TokenSplit:
    """The visible and the masked tokens of a clip, all of its N, by the recipe's [mask]."""
    patches = (config.data.frame_size // config.model.patch_size) ** 2
    return MASKS[config.mask.kind](stream, config.num_tubelets, patches, config.mask.ratio)


def predicted_split(stream: Stream, config: Config) -> TokenSplit:
    """As `split`, less the masked tokens that mask.decoder_ratio spares the decoder."""
    whole = split(stream, config)
    if config.mask.decoder_ratio == 1:
        return whole
    patches = (config.data.frame_size // config.model.patch_size) ** 2
    predicted = running_cell(stream, whole.masked, patches, config.mask.decoder_ratio)
    return dataclasses.replace(whole, masked=predicted)


def batch(streams: Sequence[Stream], config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """`predicted_split` of the clips with these streams: int64 visible [B, V], masked [B, M]; of a
    task, which masks nothing, [B, 0] each."""
    import torch

    if config.task is not None:
        none = torch.empty((len(streams), 0), dtype=torch.int64)
        return none, none
    splits = [predicted_split(stream, config) for stream in streams]
    return (
        torch.stack([torch.from_numpy(split.visible) for split in splits]),
        torch.stack([torch.from_numpy(split.masked) for split in splits]),
    )
