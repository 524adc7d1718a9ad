"""Masks: which tokens the encoder sees and which the decoder predicts, as sorted index lists.

In: a clip's random stream, the recipe's [mask] and the token grid. Out: a `TokenSplit`. Token
t * S + s is patch s of tubelet frame t. Masks are index lists and never boolean arrays, so there is
no polarity to remember and the encoder can gather what it needs. Every kind gives all clips the
same number of visible tokens, and all tubelet frames that have any the same number of them.

To add a kind, write a function and add a row to `MASKS`.

Legend: T tubelet frames of a clip, S patches of a tubelet frame, V visible and M masked tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from svfap_dist.config import MaskConfig
from svfap_dist.rng import Stream

if TYPE_CHECKING:
    import torch

_CELL = 4  # patches of a running cell: 2 x 2


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """The tokens of a clip in two parts, each sorted, int64."""

    visible: np.ndarray  # [V]
    masked: np.ndarray  # [M]


@dataclasses.dataclass(frozen=True)
class Masking:
    """A kind of mask: a row of `MASKS`."""

    split: Callable[[Stream, int, int, float], TokenSplit]  # (stream, T, S, ratio to mask)
    whole_frames: bool = False  # masks tubelet frames as a whole; else patches
    # Masks tubes: running cells (mask.decoder_ratio < 1) choose equally many tokens in all clips.
    same_in_all_frames: bool = False


def _tube_mask(stream: Stream, num_tubelets: int, num_patches: int, ratio: float) -> TokenSplit:
    """Mask the same round(S * ratio) patches in every tubelet frame (paper, section III-B)."""
    patches = stream.permutation(num_patches)
    num_masked = round(num_patches * ratio)
    frames = np.arange(num_tubelets)[:, None] * num_patches  # [T, 1]
    return TokenSplit(
        visible=(frames + np.sort(patches[num_masked:])).reshape(-1),
        masked=(frames + np.sort(patches[:num_masked])).reshape(-1),
    )


def _random_mask(stream: Stream, num_tubelets: int, num_patches: int, ratio: float) -> TokenSplit:
    """Mask round(S * ratio) patches in every tubelet frame, drawn again for each."""
    num_masked = round(num_patches * ratio)
    frames = [stream.permutation(num_patches) + t * num_patches for t in range(num_tubelets)]
    return TokenSplit(
        visible=np.concatenate([np.sort(tokens[num_masked:]) for tokens in frames]),
        masked=np.concatenate([np.sort(tokens[:num_masked]) for tokens in frames]),
    )


def _frame_mask(stream: Stream, num_tubelets: int, num_patches: int, ratio: float) -> TokenSplit:
    """Mask all patches of round(T * ratio) tubelet frames."""
    frames = stream.permutation(num_tubelets)
    num_masked = round(num_tubelets * ratio)
    patches = np.arange(num_patches)
    return TokenSplit(
        visible=(np.sort(frames[num_masked:])[:, None] * num_patches + patches).reshape(-1),
        masked=(np.sort(frames[:num_masked])[:, None] * num_patches + patches).reshape(-1),
    )


MASKS: dict[str, Masking] = {
    "tube": Masking(_tube_mask, same_in_all_frames=True),
    "random": Masking(_random_mask),
    "frame": Masking(_frame_mask, whole_frames=True),
}


def _running_cell(
    stream: Stream, masked: np.ndarray, num_patches: int, decoder_ratio: float
) -> np.ndarray:
    """Return those of the masked tokens [M] that the decoder predicts, sorted.

    The frame is tiled by cells of 2 x 2 patches. A fraction of a cell's places, counted row by row
    from a random one, is predicted; the count starts one place later in each tubelet frame, so that
    within 4 of them each patch is predicted equally often. Source: VideoMAE V2's running cell
    masking (arXiv 2303.16727, section 3.2).
    """
    side = math.isqrt(num_patches)
    tubelet, patch = np.divmod(masked, num_patches)
    row, column = np.divmod(patch, side)
    place = row % 2 * 2 + column % 2
    turn = (place + tubelet + stream.integer(_CELL)) % _CELL
    return masked[turn < round(_CELL * decoder_ratio)]


def split_tokens(
    stream: Stream, mask: MaskConfig, num_tubelets: int, num_patches: int
) -> TokenSplit:
    """Return the visible tokens of a clip, and those of the masked that the decoder predicts.

    Args:
        stream: The clip's random numbers.
        mask: Kind, ratio, and decoder ratio; if that is 1, all masked tokens are predicted.
        num_tubelets: T, tubelet frames of the clip.
        num_patches: S, patches of a tubelet frame.
    """
    split = MASKS[mask.kind].split(stream, num_tubelets, num_patches, mask.ratio)
    if mask.decoder_ratio < 1:
        predicted = _running_cell(stream, split.masked, num_patches, mask.decoder_ratio)
        split = dataclasses.replace(split, masked=predicted)
    return split


def batch_masks(
    streams: Sequence[Stream], mask: MaskConfig, num_tubelets: int, num_patches: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `split_tokens` of a batch: visible int64 [B, V], masked int64 [B, M].

    Args:
        streams: Random numbers of each clip.
        mask: As for `split_tokens`.
        num_tubelets: T, tubelet frames of a clip.
        num_patches: S, patches of a tubelet frame.
    """
    import torch

    splits = [split_tokens(stream, mask, num_tubelets, num_patches) for stream in streams]
    visible, masked = zip(*((split.visible, split.masked) for split in splits), strict=True)
    return torch.from_numpy(np.stack(visible)), torch.from_numpy(np.stack(masked))
