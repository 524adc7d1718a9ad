"""Decoded frames, as a decode backend hands them over.

All backends keep one contract: video bytes, what the shard says about the video, and the numbers of
the wanted frames go in; those frames come out, in the order asked for. Their type says whether
colours have been converted yet. YUV planes are what codecs store: half the bytes of RGB, and the
conversion is then done for the whole batch on the device that trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from svfap_dist.video.info import VideoInfo

Matrix = Literal["bt601", "bt709"]


@dataclasses.dataclass(frozen=True)
class RgbFrames:
    """pixels: uint8 [F, H, W, 3]."""

    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class YuvFrames:
    """Planes of 4:2:0 video: luma uint8 [F, H, W], chroma uint8 [F, ceil(H/2), ceil(W/2)] each.

    full_range: values run from 0 to 255; else luma from 16 to 235, chroma from 16 to 240.
    """

    y: np.ndarray
    u: np.ndarray
    v: np.ndarray
    matrix: Matrix = "bt601"
    full_range: bool = False


Frames = RgbFrames | YuvFrames


class Decoder(Protocol):
    """What a decode backend is."""

    def __call__(self, video: bytes, info: VideoInfo, numbers: Sequence[int], /) -> Frames:
        """The frames with these numbers (from 0, in presentation order), in the order given.

        Raises: DecodeError, or its kinds, if one cannot be had.
        """
        ...
