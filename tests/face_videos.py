"""Videos for the tests of faces: a rendered face on its way over a busy picture, or none."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from data_sharding.sources.synthetic_face.identity import CENTER_X, CENTER_Y, draw_identity
from data_sharding.sources.synthetic_face.motion import Face
from data_sharding.sources.synthetic_face.render import render_frames

WIDTH, HEIGHT = 320, 240
PORTRAIT = 120  # pixels of the side of the pasted portrait
MIDDLE = np.array([CENTER_X, CENTER_Y]) / 224 * PORTRAIT  # of the face within the portrait


def backdrop(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 [height, width, 3]: soft noise, no face."""
    coarse = np.random.default_rng(seed).integers(80, 170, (height // 20, width // 20, 3))
    picture = Image.fromarray(coarse.astype(np.uint8))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def portrait(identity: int = 0, yaw: float = 0.0) -> np.ndarray:
    """uint8 [PORTRAIT, PORTRAIT, 3]: a face, turned by `yaw` radians."""
    face = next(render_frames(draw_identity(0, identity), [Face(yaw=yaw)], 224))
    return np.asarray(Image.fromarray(face).resize((PORTRAIT, PORTRAIT)))


def with_faces(*corners: tuple[float, float] | np.ndarray) -> np.ndarray:
    """The backdrop with the portraits of identities 0, 1, ... whose upper left corners are given,
    in whole pixels."""
    picture = backdrop().copy()
    for identity, corner in enumerate(corners):
        x, y = (round(float(c)) for c in corner)
        picture[y : y + PORTRAIT, x : x + PORTRAIT] = portrait(identity)
    return picture


def straight_way(num_frames: int) -> np.ndarray:
    """Corners of a portrait that crosses the picture, [num_frames, 2]."""
    return np.linspace([20, 30], [180, 100], num_frames).round()


def encode(
    frames: Iterable[np.ndarray],
    *,
    fps: int = 25,
    pts: Sequence[int] | None = None,
    rotation: int = 0,
    pixel_aspect: Fraction = Fraction(1),
) -> bytes:
    """An mp4 of RGB frames.

    Args:
        pts: times of the frames in units of 1 / fps, for a variable frame rate.
        rotation: degrees by which a player shall turn it counter-clockwise.
        pixel_aspect: width over height of a pixel.
    """
    buffer, stream = io.BytesIO(), None
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        for number, rgb in enumerate(frames):
            if stream is None:
                stream = output.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
                assert isinstance(stream, VideoStream)
                stream.height, stream.width = rgb.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.codec_context.thread_count = 1
                stream.codec_context.sample_aspect_ratio = pixel_aspect
                stream.time_base = stream.codec_context.time_base = Fraction(1, fps)
                if rotation:
                    stream.set_display_rotation(rotation)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = number if pts is None else pts[number], Fraction(1, fps)
            output.mux(stream.encode(frame))
        assert stream is not None
        output.mux(stream.encode())
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """All frames as they are stored, uint8 [T, H, W, 3]."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
