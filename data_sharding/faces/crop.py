"""A face's track -> one square per frame -> its crop as an mp4.

The centre of the square follows the face, its side is the same for the whole track (from the median
face). What a model of expressions is to see is how the face moves within itself: the head's way
through the room is taken out by the moving centre, while a side that followed every box would make
the face swell and shrink with the detector's jitter, and a person who leans in no longer would.

The default margin and lift give the look of VoxCeleb2's crops: on face clips in its format the
frontal cascade's box is 0.60 of the frame's side, and its centre at 0.54 of the height.

A square that reaches out of the picture is shifted inwards as far as the face stays inside it; what
still lies outside repeats the picture's edge.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from data_sharding.faces.track import Track, sides

MARGIN = 0.33  # around the face on each side, in sides of the face
_LIFT = 0.07  # by which the square's centre lies above the box's, in sides of the face
_TICKS_PER_SECOND = 90_000

# One thread, and no look-ahead tree: the same frames give the same bytes. The quality is such that
# another encoding (`svfap shard --profile train`) has something to start from.
_ENCODER = {"preset": "medium", "crf": "18", "x264-params": "mbtree=0:threads=1"}


def squares(track: Track, margin: float, width: int, height: int) -> np.ndarray:
    """What to cut from each frame: float64 [T, 4], x0, y0, x1, y1 in pixels, all of one side.

    Args:
        margin: around the face on each side, in sides of the face.
        width, height: of the frame.
    """
    face = float(np.median(sides(track.boxes)))
    side = face * (1 + 2 * margin)
    box_centres = (track.boxes[:, :2] + track.boxes[:, 2:]) / 2
    centres = box_centres - [0, _LIFT * face]
    limits = np.array([[side / 2, width - side / 2], [side / 2, height - side / 2]])
    inside = np.clip(centres, limits.min(axis=1), limits.max(axis=1))
    # As far as the face's box stays in the square, and never further out than it was.
    room = (side - (track.boxes[:, 2:] - track.boxes[:, :2])).clip(0) / 2
    shifted = np.clip(inside, *_between(centres, box_centres - room, box_centres + room))
    return np.concatenate([shifted - side / 2, shifted + side / 2], axis=1)


def _between(
    centres: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Limits for shifting, widened where the unshifted square lies beyond them already."""
    return np.minimum(low, centres), np.maximum(high, centres)


def cut(rgb: np.ndarray, square: np.ndarray, size: int) -> np.ndarray:
    """The part of a picture in `square` [4], resized: uint8 [H, W, 3] -> [size, size, 3]."""
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = square
    left, top = max(0, int(np.ceil(-x0))), max(0, int(np.ceil(-y0)))
    right, bottom = max(0, int(np.ceil(x1 - width))), max(0, int(np.ceil(y1 - height)))
    if left or top or right or bottom:
        rgb = np.pad(rgb, ((top, bottom), (left, right), (0, 0)), mode="edge")
    box = (x0 + left, y0 + top, x1 + left, y1 + top)
    # To fractions of a pixel: whole pixels of a small face would make it tremble.
    picture = Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(picture)


class Mp4:
    """An mp4 in the making: pictures in, bytes out."""

    def __init__(self, size: int, fps: float) -> None:
        """size: width and height of the pictures, even; fps: at which a player shows them."""
        self._bytes = io.BytesIO()
        # Bit-exact: without it the encoder's version stands in the file.
        self._container = av.open(self._bytes, "w", format="mp4", options={"fflags": "+bitexact"})
        rate = Fraction(fps).limit_denominator(1001)
        stream = self._container.add_stream("libx264", rate=rate, options=_ENCODER)
        assert isinstance(stream, VideoStream)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, _TICKS_PER_SECOND)
        self._stream, self._rate, self._num_frames, self._last_tick = stream, rate, 0, -1

    def add(self, rgb: np.ndarray, seconds: float | None = None) -> None:
        """Add a picture, uint8 [size, size, 3]; seconds: since the first, None: by the rate."""
        exact = self._num_frames / self._rate if seconds is None else seconds
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        frame.time_base = Fraction(1, _TICKS_PER_SECOND)
        frame.pts = max(round(exact * _TICKS_PER_SECOND), self._last_tick + 1)
        self._num_frames, self._last_tick = self._num_frames + 1, frame.pts
        self._container.mux(self._stream.encode(frame))

    def close(self) -> bytes:
        """Finish it, and its bytes."""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._bytes.getvalue()
