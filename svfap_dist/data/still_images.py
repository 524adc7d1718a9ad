"""Motion for still images: a camera that pans over a picture during its clip.

In: the size of the picture, the crop of a clip, its random stream. Out: how far the camera is from
the crop's place in each frame, along a random line, at a constant speed. Frames are made of that
one at a time, each of the size of a clip or of the ring's planes: a photo of many megapixels is
never copied once for each frame. The camera moves by even numbers of pixels, so that planes move by
whole chroma samples and RGB and planes show the same, wherever they are converted. It never leaves
the picture: nothing has to be invented, and a crop of all of it does not move.
"""

from __future__ import annotations

import math

import numpy as np

from svfap_dist.config import DataConfig
from svfap_dist.rng import Stream
from svfap_dist.video.info import Crop

Move = tuple[int, int]  # pixels down and to the right, even


def pan_moves(size: tuple[int, int], crop: Crop, stream: Stream, data: DataConfig) -> list[Move]:
    """Return how far the camera is from its place in each frame of a clip.

    Args:
        size: Height and width of the picture.
        crop: What the clip shows in the middle of the pan, if there is room on both sides.
        stream: The clip's random numbers.
        data: Number of frames; `still_motion`.
    """
    height, width = size
    length = stream.uniform() * data.still_motion * min(crop.height, crop.width)
    angle = stream.uniform() * 2 * math.pi
    down = _moves(crop.top, height - crop.height, length * math.sin(angle), data.num_frames)
    right = _moves(crop.left, width - crop.width, length * math.cos(angle), data.num_frames)
    return list(zip(down, right, strict=True))


def moved_plane(plane: np.ndarray, move: Move, scale: int = 1) -> np.ndarray:
    """Return a plane as the camera sees it: what a crop shows there, it has moved to.

    Args:
        plane: Of the picture, [H, W].
        move: Of the camera.
        scale: Pixels per sample of the plane along each side: 2 for chroma.
    """
    rows, columns = (
        (np.arange(length) + distance // scale).clip(0, length - 1)  # the last are never seen
        for length, distance in zip(plane.shape, move, strict=True)
    )
    return plane[np.ix_(rows, columns)]


def _moves(place: int, room: int, length: float, count: int) -> list[int]:
    """Return how far the crop is from its place in each frame, along one side: even pixels.

    A crop at `place` may be anywhere from 0 to `room`; `length` is that of the pan, with its sign.
    """
    half = math.copysign(min(abs(length), room) / 2, length)
    middle = min(max(place, abs(half)), room - abs(half))
    places = middle + half * np.linspace(-1, 1, count) if count > 1 else [middle]
    return [2 * int((at - place) / 2) for at in places]  # towards 0, so never outside
