"""The bytes of a video -> its frames as a viewer sees them: upright, with square pixels.

Phones record lying on their side and note the angle in the file; broadcast video has pixels that
are no squares. A detector finds no face that lies on its side, and a crop must not stretch one.
Frames come one by one, so that memory does not grow with the length of the video.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import av
import numpy as np
from av.error import FFmpegError

from svfap_dist.errors import DecodeError
from svfap_dist.video.probe import open_video, video_stream


@dataclasses.dataclass(frozen=True)
class Frame:
    """A decoded frame, not yet converted.

    width, height: as shown, in pixels, the same for all frames of a video.
    quarter_turns: to be made counter-clockwise.
    seconds: when it is shown; None if the file does not say.
    """

    decoded: av.VideoFrame
    width: int
    height: int
    quarter_turns: int
    seconds: float | None

    def rgb(self, longest: int | None = None) -> np.ndarray:
        """uint8 [height, width, 3], shrunk so that no side is longer than `longest`."""
        scale = min(1.0, longest / max(self.width, self.height)) if longest else 1.0
        width, height = (max(1, round(side * scale)) for side in (self.width, self.height))
        if self.quarter_turns % 2:
            width, height = height, width
        pixels = self.decoded.to_ndarray(
            format="rgb24", width=width, height=height, interpolation="AREA"
        )
        return np.ascontiguousarray(np.rot90(pixels, self.quarter_turns))


def read_frames(data: bytes) -> Iterator[Frame]:
    """All frames of a video that `probe` found good, in the order in which they are shown.

    Raises: DecodeError where it cannot be decoded further.
    """
    with open_video(data) as container:
        stream = video_stream(container)
        assert stream is not None, "the probe saw a video stream"
        stream.codec_context.thread_count = 1
        frames = container.decode(stream)
        first: Frame | None = None
        for number in itertools.count():
            try:
                decoded = next(frames)
            except StopIteration:
                return
            except FFmpegError as error:
                found = f"after {number} frames: {error.strerror or error}"
                raise DecodeError("Video cannot be decoded", found=found) from error
            if first is None:
                first = _first(decoded, float(stream.sample_aspect_ratio or 1))
            yield dataclasses.replace(first, decoded=decoded, seconds=decoded.time)


def _first(decoded: av.VideoFrame, pixel_aspect: float) -> Frame:
    width, height = max(1, round(decoded.width * pixel_aspect)), decoded.height
    quarter_turns = round(decoded.rotation / 90) % 4
    if quarter_turns % 2:
        width, height = height, width
    return Frame(decoded, width, height, quarter_turns, decoded.time)
