"""How videos are stored for training, and why one cannot be.

The profile is part of what decides a data set's bytes: its fields lie in the manifest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from svfap_dist.errors import ConfigError, DecodeError


@dataclasses.dataclass(frozen=True)
class TrainProfile:
    """How videos are stored for training.

    size: frames are resized to size x size pixels; None: they stay as they are cut. phases: the
    stride for which windows lie in a row. group: at least so many frames of a phase share a key
    frame, or all where a phase has fewer. crf: x264's quality, lower is better. preset: x264's
    effort.
    """

    region: str = "voxceleb2"  # stored: "centre" for "center", as in data sets of before
    size: int | None = None
    phases: int = 4
    group: int = 20
    crf: float = 25
    preset: str = "medium"

    def __post_init__(self) -> None:
        if self.size is not None and (self.size < 2 or self.size % 2):
            raise ConfigError(
                "Frames cannot have this size",
                where="size of the train profile",
                found=str(self.size),
                do="give an even number of pixels",
            )


Reason = Literal[
    "undecodable",  # a frame cannot be decoded, is damaged, missing or of another size
    "too_long",  # more bytes of planes than there is room for
    "too_small",  # less than two pixels wide or high
]


class TranscodeError(DecodeError):
    """A video that cannot be stored for training: `reason` is a word for lists, `found` more."""

    @property
    def reason(self) -> str:
        return self.what


def refused(reason: Reason, found: str) -> TranscodeError:
    """The error for a video that is left out."""
    return TranscodeError(reason, found=found, do="leave this video out")


def plan_frames(num_frames: int, options: TrainProfile) -> tuple[list[tuple[int, bool]], int]:
    """The frames' numbers in the order of the file, each with whether it is a key frame, and how
    many frames of a phase share a key frame.

    A phase is shared out evenly, for a key frame near its end would serve few windows: key frames
    are the dearest in bytes and in time.
    """
    longest = math.ceil(num_frames / options.phases)
    group = math.ceil(longest / max(longest // options.group, 1))
    numbers = sorted(range(num_frames), key=lambda number: (number % options.phases, number))
    return [(number, number // options.phases % group == 0) for number in numbers], group
