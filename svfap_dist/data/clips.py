"""From a video to a clip: window, region, random crop, and the batch that holds many clips.

In: a video's bytes and what the shard says about it, with a random stream of the clip's own. Out:
uint8 frames of the size that the model takes. What is cut is chosen by pure functions of the
stream, before anything is decoded.

The random crop is the one of the released code (VideoMAE's multi-scale crop, which goes back to
TSN): a width and a height from a few scales of the shorter side, at one of 13 fixed places, the
same for all frames of the clip, resized to the clip's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from svfap_dist.config import Config
from svfap_dist.data.decode_cpu import TooShortError, decode
from svfap_dist.data.stream import BadSample
from svfap_dist.rng import Stream
from svfap_dist.shard_format import VideoInfo

if TYPE_CHECKING:
    import torch

# The 13 places of a crop, in quarters of the room there is: corners, centre, edges, inner quarters.
_PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)
_VOXCELEB2_SIDE, _VOXCELEB2_LEFT, _VOXCELEB2_CUT = 224, 32, 160  # pixels; released code


@dataclasses.dataclass(frozen=True)
class Crop:
    """A rectangle of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class ClipBatch:
    """A rank's clips of one step, in slot order.

    A slot has one clip, or data.repeated_sampling clips of one sample in a row: B clips in all. The
    lists have an entry per slot. keys and samples name what the order asked for; where
    `substituted`, the frames are those of a neighbour because that sample is bad.
    """

    frames: torch.Tensor  # uint8 [B, F, H, W, 3]
    visible: torch.Tensor  # int64 [B, V]
    masked: torch.Tensor  # int64 [B, M]
    keys: list[str]
    samples: list[int]
    lanes: list[int]
    positions: list[int]
    substituted: list[bool]
    bad: list[BadSample]
    fetch_seconds: float  # summed over the clips, as spent by the threads
    decode_seconds: float  # summed over the clips, as spent by threads or workers
    bytes_fetched: int = 0  # from the store, since the batch before
    batches_ready: int = 0  # when this one was asked for, itself included


def window_start(stream: Stream, num_frames: int, window: int) -> int:
    """First frame of a clip that spans `window` frames, uniform over the video.

    Raises: TooShortError if the video has fewer frames.
    """
    _check_length(num_frames, window)
    return stream.integer(num_frames - window + 1)


def _check_length(num_frames: int, window: int) -> None:
    if num_frames < window:
        raise TooShortError(
            "Video is shorter than a clip's window",
            found=f"{num_frames} frames for a window of {window}",
            do=f"shard again with --min-frames {window}",
        )


def region(name: str, height: int, width: int) -> Crop:
    """The part of each frame that is used, before any random crop.

    voxceleb2: rows 0-160 and columns 32-192 of 224 x 224 (released code), in proportion for other
    sizes. centre: the largest centred square. full: the whole frame.
    """
    if name == "voxceleb2":
        rows, columns = height / _VOXCELEB2_SIDE, width / _VOXCELEB2_SIDE
        left = round(_VOXCELEB2_LEFT * columns)
        size = max(round(_VOXCELEB2_CUT * rows), 1), max(round(_VOXCELEB2_CUT * columns), 1)
        return Crop(0, left, *size)
    if name == "centre":
        side = min(height, width)
        return Crop((height - side) // 2, (width - side) // 2, side, side)
    assert name == "full", "config knows no other"
    return Crop(0, 0, height, width)


def random_crop(stream: Stream, within: Crop, scales: tuple[float, ...]) -> Crop:
    """A multi-scale crop inside a region: one of VideoMAE's sizes at one of its 13 places.

    Height and width are scales of the region's shorter side that are at most one step apart.
    """
    shorter = min(within.height, within.width)
    sides = [max(int(shorter * scale), 1) for scale in scales]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    height, width = pairs[stream.integer(len(pairs))]
    down, right = _PLACES[stream.integer(len(_PLACES))]
    return Crop(
        within.top + (within.height - height) // 4 * down,
        within.left + (within.width - width) // 4 * right,
        height,
        width,
    )


def resize(frames: np.ndarray, crop: Crop, size: int) -> torch.Tensor:
    """Cut a crop out of all frames and bring it to size x size: [F, H, W, 3] -> uint8, the same."""
    import torch

    rows = slice(crop.top, crop.top + crop.height)
    columns = slice(crop.left, crop.left + crop.width)
    cut = torch.from_numpy(frames[:, rows, columns]).permute(0, 3, 1, 2)  # [F, 3, h, w], a view
    if (crop.height, crop.width) != (size, size):
        cut = torch.nn.functional.interpolate(
            cut, size=(size, size), mode="bilinear", antialias=True
        )
    return cut.permute(0, 2, 3, 1).contiguous()


def random_clips(
    video: bytes, info: VideoInfo, config: Config, window: Stream, crops: Sequence[Stream]
) -> list[torch.Tensor]:
    """Training clips of one random window, each cut by a random crop of the region out of the same
    decoded frames: uint8 [F, size, size, 3] each.

    Raises: DecodeError if the video is too short or cannot be decoded.
    """
    data = config.data
    start = window_start(window, info.num_frames, config.window)
    frames = decode(video, start, data.num_frames, data.sampling_rate, info)
    within = region(data.region, info.height, info.width)
    return [
        resize(frames, random_crop(crop, within, data.crop_scales), data.frame_size)
        for crop in crops
    ]


def fixed_clip(video: bytes, info: VideoInfo, config: Config) -> torch.Tensor:
    """The clip for pictures and evaluation: middle window, region only. uint8 [F, size, size, 3].

    Raises: DecodeError if the video is too short or cannot be decoded.
    """
    data = config.data
    _check_length(info.num_frames, config.window)
    start = (info.num_frames - config.window) // 2
    frames = decode(video, start, data.num_frames, data.sampling_rate, info)
    return resize(frames, region(data.region, info.height, info.width), data.frame_size)
