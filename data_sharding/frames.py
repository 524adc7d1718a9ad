"""Make a video of the pictures in a folder, for data sets that are distributed as frames.

Frames that are baseline JPEGs of one size (nearly all) are muxed into an mp4 unchanged: an MJPEG
video is a sequence of JPEG pictures, so no pixel changes and nothing is decoded. Anything else
(PNG, progressive or mixed JPEG, frames of several sizes, or to be turned as their Exif data say) is
encoded with H.264 at a visually lossless quality; then frames of another size are scaled to that of
the first, and an odd last row or column is dropped, which 4:2:0 requires. Of 16-bit pictures, the
upper 8 bits are kept; transparency is ignored.

Equal frames give equal bytes. The frame rate is nominal, since pictures have none.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, cast

import av
import av.video.stream
import numpy as np
from av.container import OutputContainer
from PIL import ExifTags, Image

from svfap_dist import storage
from svfap_dist.errors import DecodeError
from svfap_dist.video.orientation import UPRIGHT, exchanges_sides, turn
from svfap_dist.video.probe import Limits, Reason

FRAME_SUFFIXES = ("jpg", "jpeg", "png")
FPS = 25
ENCODER = 1  # incremented when the same frames give other bytes
SUFFIX = "mp4"

_READS_AT_ONCE = 8  # from a store, where each frame is a request
_PICTURE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_MAX_PIXELS = Limits().pixels
_END_OF_JPEG = b"\xff\xd9"
# One thread and no macroblock tree: else x264's bytes depend on threads and on the heap.
_H264 = {"crf": "17", "preset": "veryfast", "g": "16", "threads": "1", "x264-params": "mbtree=0"}


class BrokenFrameError(DecodeError):
    """A frame that is not a complete picture, or too large a one."""

    def __init__(self, index: int, found: str, reason: Reason = "unreadable") -> None:
        advice = "copy the frame again, or delete it"
        super().__init__("Unreadable frame", where=f"frame {index}", found=found, do=advice)
        self.index, self.reason = index, reason

    def __reduce__(self) -> Any:
        return type(self), (self.index, self.found, self.reason)


@dataclasses.dataclass(frozen=True)
class _Header:
    """What a picture's header says."""

    size: tuple[int, int]  # width, height, as shown
    sampling: tuple[tuple[int, int], ...]  # of each component; empty if not a JPEG
    copyable: bool  # a complete baseline JPEG, shown as it is stored


def read_frames(folder: str, names: str) -> bytes:
    """Return the video of some frames.

    Args:
        folder: Folder or prefix of the frames.
        names: Names of the frames, separated by `/`.

    Raises:
        StorageMissingError: A frame is gone.
        BrokenFrameError: A frame is not a complete picture.
    """
    urls = [storage.join(folder, name) for name in names.split("/")]
    if storage.is_remote(folder):
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            frames = list(pool.map(storage.read_bytes, urls))
    else:
        frames = [storage.read_bytes(url) for url in urls]
    return encode_frames(frames)


def natural_order(name: str) -> list[str | int]:
    """Return a sort key that puts `2.jpg` before `10.jpg`.

    Args:
        name: Name of a file.
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def encode_frames(frames: Sequence[bytes], fps: int = FPS) -> bytes:
    """Return an mp4 of constant frame rate.

    Args:
        frames: Picture files in presentation order.
        fps: Frames per second.

    Raises:
        BrokenFrameError: A frame is not a complete picture.
    """
    headers = [_read_header(frame, index) for index, frame in enumerate(frames)]
    first = headers[0]
    if all(header.copyable and header == first for header in headers):
        return mux_jpegs(frames, first.size, fps)
    return encode_h264(_pictures(frames, first.size), first.size, fps)


def _read_header(frame: bytes, index: int) -> _Header:
    try:
        with Image.open(io.BytesIO(frame), formats=("JPEG", "PNG")) as picture:
            width, height = picture.size
            if width * height > _MAX_PIXELS:
                raise BrokenFrameError(index, f"{width}x{height} pixels", "too_large")
            layers = getattr(picture, "layer", [])
            orientation = stated_orientation(picture)
            copyable = is_whole_jpeg(picture, frame)
            sampling = tuple((layer[1], layer[2]) for layer in layers)
            size = (height, width) if exchanges_sides(orientation) else (width, height)
            return _Header(size, sampling, copyable and orientation == UPRIGHT)
    except Image.DecompressionBombError as error:
        raise BrokenFrameError(index, str(error), "too_large") from error
    except _PICTURE_ERRORS as error:
        raise BrokenFrameError(index, str(error) or "no picture") from error


def is_whole_jpeg(picture: Image.Image, data: bytes) -> bool:
    """Return whether a picture is a baseline JPEG with an end, whose bytes can be a video frame.

    Args:
        picture: As Pillow opened it.
        data: Its file.
    """
    is_baseline = picture.format == "JPEG" and not picture.info.get("progressive")
    return is_baseline and picture.mode in ("RGB", "L") and _END_OF_JPEG in data[-1024:]


def stated_orientation(picture: Image.Image) -> int:
    """Return the orientation that a picture's Exif data state, by Exif's number.

    Args:
        picture: As Pillow opened it.
    """
    stated = picture.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    return stated if stated in range(1, 9) else UPRIGHT


def mux_jpegs(frames: Sequence[bytes], size: tuple[int, int], fps: int = FPS) -> bytes:
    """Return an mp4 whose packets are JPEG files, unchanged.

    Args:
        frames: Baseline JPEG files.
        size: Width and height of each.
        fps: Frames per second.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=SUFFIX, options={"fflags": "+bitexact"}) as container:
        stream = _add_stream(container, "mjpeg", size, fps, {})
        stream.pix_fmt = "yuvj420p"  # for the muxer; decoders read each picture's own header
        for number, frame in enumerate(frames):
            packet = av.Packet(frame)
            packet.stream, packet.time_base = stream, Fraction(1, fps)
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, True
            container.mux(packet)
    return file.getvalue()


def encode_h264(pictures: Iterable[Image.Image], size: tuple[int, int], fps: int = FPS) -> bytes:
    """Return an mp4 of pictures, encoded at a visually lossless quality.

    Args:
        pictures: 8-bit RGB, all of one size.
        size: Their width and height; an odd last row or column is dropped.
        fps: Frames per second.

    Raises:
        BrokenFrameError: They have a side of one pixel.
    """
    even = (size[0] - size[0] % 2, size[1] - size[1] % 2)
    if not all(even):
        raise BrokenFrameError(0, f"{size[0]}x{size[1]} pixels")
    file = io.BytesIO()
    with av.open(file, "w", format=SUFFIX, options={"fflags": "+bitexact"}) as container:
        stream = _add_stream(container, "libx264", even, fps, _H264)
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_image(picture.crop((0, 0, *even)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _pictures(frames: Sequence[bytes], size: tuple[int, int]) -> Iterator[Image.Image]:
    for index, frame in enumerate(frames):
        try:
            with Image.open(io.BytesIO(frame), formats=("JPEG", "PNG")) as opened:
                orientation = stated_orientation(opened)
                stored = np.asarray(as_rgb(opened))
        except _PICTURE_ERRORS as error:
            raise BrokenFrameError(index, str(error)) from error
        picture = Image.fromarray(np.ascontiguousarray(turn(stored, orientation)))
        yield picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def as_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode in 8-bit RGB; Pillow itself cuts 16 bits off at 255.

    Args:
        picture: Of any mode; its transparency is ignored.
    """
    if picture.mode.startswith("I"):  # I;16, or I in older versions
        values = np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8
        picture = Image.fromarray(values.astype(np.uint8))
    return picture.convert("RGB")


def _add_stream(
    container: OutputContainer, codec: str, size: tuple[int, int], fps: int, options: dict[str, str]
) -> av.video.stream.VideoStream:
    stream = cast(
        av.video.stream.VideoStream, container.add_stream(codec, rate=fps, options=options)
    )
    stream.width, stream.height = size
    stream.time_base = Fraction(1, fps)
    return stream
