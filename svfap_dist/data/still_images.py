"""Motion for still images: a camera that pans over a picture during its clip.

In: the only frame of a still image, the crop of a clip, its random stream. Out: frames in which the
picture moves along a random line, at a constant speed, so that a fixed crop sees a pan. It moves by
even numbers of pixels, so that planes move by whole chroma samples and one code serves RGB and
planes, wherever they are converted. The crop never leaves the picture: nothing has to be invented,
and a crop of all of it does not move.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from svfap_dist.config import DataConfig
from svfap_dist.rng import Stream
from svfap_dist.video.frames import Frames, YuvFrames
from svfap_dist.video.info import Crop


def pan(frames: Frames, crop: Crop, stream: Stream, data: DataConfig) -> Frames:
    """Return the frames of a camera that pans over a still image.

    Args:
        frames: Of one frame.
        crop: What the clip shows of it in the middle of the pan, if there is room on both sides.
        stream: The clip's random numbers.
        data: Number of frames; `still_motion`.
    """
    planes = (
        {"y": frames.y, "u": frames.u, "v": frames.v}
        if isinstance(frames, YuvFrames)
        else {"pixels": frames.pixels}
    )
    height, width = next(iter(planes.values())).shape[1:3]
    length = stream.uniform() * data.still_motion * min(crop.height, crop.width)
    angle = stream.uniform() * 2 * math.pi
    down = _moves(crop.top, height - crop.height, length * math.sin(angle), data.num_frames)
    right = _moves(crop.left, width - crop.width, length * math.cos(angle), data.num_frames)
    moved = {}
    for name, plane in planes.items():
        scale = 2 if name in ("u", "v") else 1
        rows = [_shifted(plane.shape[1], move // scale) for move in down]
        columns = [_shifted(plane.shape[2], move // scale) for move in right]
        moved[name] = np.stack([plane[0][np.ix_(*at)] for at in zip(rows, columns, strict=True)])
    return dataclasses.replace(frames, **moved)


def _moves(place: int, room: int, length: float, count: int) -> list[int]:
    """Return how far the crop is from its place in each frame, along one side: even pixels.

    A crop at `place` may be anywhere from 0 to `room`; `length` is that of the pan, with its sign.
    """
    half = math.copysign(min(abs(length), room) / 2, length)
    middle = min(max(place, abs(half)), room - abs(half))
    places = middle + half * np.linspace(-1, 1, count) if count > 1 else [middle]
    return [2 * int((at - place) / 2) for at in places]  # towards 0, so never outside


def _shifted(size: int, move: int) -> np.ndarray:
    """Return which row or column is shown in the place of each; the last ones are never seen."""
    return (np.arange(size) + move).clip(0, size - 1)
