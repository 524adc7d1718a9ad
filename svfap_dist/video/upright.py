"""Frames as a viewer sees them: upright, with square pixels.

Phones record sideways and store the angle; broadcast video has pixels that are not square. A
detector finds no sideways face, and a crop must not stretch one. In: bytes of a video. Out: its
frames one by one, so that memory does not grow with its length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import av
import numpy as np
from av.error import FFmpegError

from svfap_dist.errors import DecodeError
from svfap_dist.video.orientation import exchanges_sides, orientation_of, turn
from svfap_dist.video.pyav import open_video, video_stream


@dataclasses.dataclass(frozen=True)
class UprightFrame:
    """A decoded frame, not yet converted; its size as shown is that of the first frame."""

    decoded: av.VideoFrame
    width: int  # pixels, as shown
    height: int
    orientation: int  # Exif's number
    seconds: float | None  # when it is shown; None: the file does not say

    def rgb(self, longest: int | None = None) -> np.ndarray:
        """Return uint8 [height, width, 3].

        Args:
            longest: shrink it so that no side has more pixels; None: its own size.
        """
        scale = min(1.0, longest / max(self.width, self.height)) if longest else 1.0
        width, height = (max(1, round(side * scale)) for side in (self.width, self.height))
        if exchanges_sides(self.orientation):
            width, height = height, width
        pixels = self.decoded.to_ndarray(
            format="rgb24", width=width, height=height, interpolation="AREA"
        )
        return np.ascontiguousarray(turn(pixels, self.orientation))


def read_upright_frames(data: bytes) -> Iterator[UprightFrame]:
    """Yield all frames of a video that `probe` accepted, in presentation order.

    Args:
        data: bytes of the file.

    Raises:
        DecodeError: it cannot be decoded any further.
    """
    with open_video(data) as container:
        stream = video_stream(container)
        first: UprightFrame | None = None
        count = 0
        try:
            for decoded in container.decode(stream):
                count += 1
                if first is None:
                    first = _upright(decoded, float(stream.sample_aspect_ratio or 1))
                yield dataclasses.replace(first, decoded=decoded, seconds=decoded.time)
        except FFmpegError as error:
            found = f"after {count} frames: {error.strerror or error}"
            raise DecodeError("Video cannot be decoded", found=found) from error


def _upright(decoded: av.VideoFrame, pixel_aspect: float) -> UprightFrame:
    width, height = max(1, round(decoded.width * pixel_aspect)), decoded.height
    orientation = orientation_of(decoded)
    if exchanges_sides(orientation):
        width, height = height, width
    return UprightFrame(decoded, width, height, orientation, decoded.time)
