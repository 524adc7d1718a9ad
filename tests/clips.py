"""Small real videos for tests: each frame has its own number painted in, so any frame can be named.

The number is painted as twelve large black or white blocks (bit 0 first, row by row), which survive
compression, resizing and conversion of colours. Between black and white there is seeded noise.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

_ROWS, _COLUMNS = 3, 4  # one bit of the frame number per block
_BLACK, _WHITE, _NOISE = 32, 208, 16
_OPTIONS = {"libx264": {"preset": "ultrafast", "threads": "1"}, "libvpx-vp9": {"cpu-used": "8"}}


def paint_frame(number: int, size: tuple[int, int], noise: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] with `number` (0 to 4095) painted in; size is (width, height)."""
    width, height = size
    bits = (number >> np.arange(_ROWS * _COLUMNS)) & 1
    rows = np.arange(height) * _ROWS // height
    columns = np.arange(width) * _COLUMNS // width
    grid = np.where(bits.reshape(_ROWS, _COLUMNS) == 1, _WHITE, _BLACK)
    return (grid[rows][:, columns, None] + noise).astype(np.uint8)


def read_frame_number(frame_rgb: np.ndarray) -> int:
    """The number painted into a whole frame, [height, width, 3], possibly resized."""
    grey = np.asarray(frame_rgb, dtype=np.float64).mean(axis=-1)
    number, bit = 0, 0
    for band in np.array_split(grey, _ROWS):
        for block in np.array_split(band, _COLUMNS, axis=1):
            number |= int(block.mean() > (_BLACK + _WHITE + _NOISE) / 2) << bit
            bit += 1
    return number


def make_video(
    path: str | os.PathLike[str] | None,
    num_frames: int,
    *,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    fps: int | Fraction = 25,
    gop: int = 12,
    seed: int = 0,
    container: str = "mp4",
    pts: Sequence[int] | None = None,
    painted: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    container_options: dict[str, str] | None = None,
    encoder_options: dict[str, str] | None = None,
) -> bytes:
    """Encode `num_frames` numbered frames with PyAV; write them to `path` unless None.

    Args:
        size: (width, height); even numbers, where the codec wants them.
        gop: frames from one key frame to the next.
        container: suffix that names the container: mp4, mkv, webm, avi, mov, flv.
        pts: times of the frames in units of 1 / fps, for a variable frame rate.
        painted: their numbers, if not 0, 1, 2, ...
        container_options: FFmpeg's for the container, such as {"movflags": "faststart"}.
        encoder_options: FFmpeg's for the codec, such as {"bf": "2"} for B-frames.
    """
    noise = np.random.default_rng(seed).integers(0, _NOISE, (size[1], size[0], 3))
    format_name = {"mkv": "matroska", "m4v": "mp4"}.get(container, container)
    # bitexact: no random identifiers, no encoder versions, so that equal calls give equal bytes.
    container_options = {"fflags": "+bitexact"} | (container_options or {})
    encoder_options = _OPTIONS.get(codec, {}) | (encoder_options or {})
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "video")
        with av.open(file, "w", format=format_name, options=container_options) as output:
            stream = output.add_stream(codec, rate=fps, options=encoder_options)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else pix_fmt
            stream.codec_context.gop_size = gop
            stream.codec_context.thread_count = 1
            stream.time_base = stream.codec_context.time_base = 1 / Fraction(fps)
            for number in range(num_frames):
                pixels = paint_frame(painted[number] if painted else number, size, noise)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = number if pts is None else pts[number]
                frame.time_base = stream.codec_context.time_base
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        data = Path(file).read_bytes()
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)
    return data
