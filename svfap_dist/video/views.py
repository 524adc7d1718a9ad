"""Which clips of a whole video a network looks at: windows in time, crops in space.

Pure functions of a video's length and size, for tests of a task, predictions and features. Training
takes one random window; here the whole video is covered, or as many places of it as the method's
test takes. A video that is shorter than a window is one window whose missing frames are its last
frame again, as VideoMAE's released test code has it (arXiv 2203.12602).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np

from svfap_dist.video.region import Crop


@dataclasses.dataclass(frozen=True)
class Views:
    """What is looked at: each of `crops` in each window, with how many it stands for where several
    coincide. starts: first frames of the windows."""

    starts: Counter[int]
    crops: Counter[Crop]

    @classmethod
    def of(cls, starts: Iterable[int], crops: Iterable[Crop]) -> Views:
        """The views of windows and crops, alike ones made one."""
        return cls(Counter(starts), Counter(crops))

    @property
    def shares(self) -> np.ndarray:
        """What each crop of each window counts in an average, crops of a window side by side: they
        sum to 1."""
        counts = np.outer(list(self.starts.values()), list(self.crops.values())).ravel()
        return counts / counts.sum()


def covering(num_frames: int, window: int, step: int) -> list[int]:
    """Starts of windows every `step` frames, and of one more that ends with the video, so that its
    end is not left out."""
    last = num_frames - window
    if last <= 0:
        return [0]
    starts = list(range(0, last + 1, step))
    return starts if starts[-1] == last else [*starts, last]


def segments(num_frames: int, window: int, count: int) -> list[int]:
    """Starts of `count` windows laid evenly from the beginning to the end of a video."""
    return laid_evenly(count, max(num_frames - window, 0))


def frame_numbers(start: int, clip_frames: int, rate: int, num_frames: int) -> list[int]:
    """Source frames of the clip that starts at `start`; beyond the end the last one, again."""
    return [min(start + number * rate, num_frames - 1) for number in range(clip_frames)]


def squares(within: Crop, count: int) -> list[Crop]:
    """`count` squares of the shorter side, laid evenly along the longer one."""
    side = min(within.height, within.width)
    down = laid_evenly(count, within.height - side)
    right = laid_evenly(count, within.width - side)
    return [
        Crop(within.top + rows, within.left + columns, side, side)
        for rows, columns in zip(down, right, strict=True)
    ]


def laid_evenly(count: int, room: int) -> list[int]:
    """Offsets from 0 to `room`, equally far apart; one alone is in the middle."""
    return [room // 2] if count == 1 else [k * room // (count - 1) for k in range(count)]
