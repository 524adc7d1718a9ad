"""The contract of decode backends, and the frames that they return.

In: the bytes of a video, its `VideoInfo`, and frame numbers. Out: those frames, in the order of the
numbers. Their type says whether colors have been converted yet: YUV planes are what codecs store,
half the bytes of RGB, and converting them can wait until a whole batch is on the training device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import av
import numpy as np
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from svfap_dist.errors import DecodeError
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.views import Crop

if TYPE_CHECKING:
    import torch

PLANAR_420 = ("yuv420p", "yuvj420p")  # FFmpeg's formats of 8-bit 4:2:0 planes
LEAVE_OUT = "leave this video out when sharding"

Matrix = Literal["bt601", "bt709"]


class MatrixRow(NamedTuple):
    """How a color matrix is defined and named."""

    red: float  # weight in luma (ITU-R BT.601-7, BT.709-6)
    blue: float
    codes: tuple[int, ...]  # in streams (ITU-T H.273 table 4); encoders write the first
    converter: Colorspace  # the number that FFmpeg's converter takes


MATRICES: dict[Matrix, MatrixRow] = {
    # Code 2 is "unspecified", which FFmpeg's converters also treat as BT.601.
    "bt601": MatrixRow(0.299, 0.114, (6, 5, 2), Colorspace.ITU601),
    "bt709": MatrixRow(0.2126, 0.0722, (1,), Colorspace.ITU709),
}


class Colors(NamedTuple):
    """What the values of YUV planes mean."""

    matrix: Matrix = "bt601"
    full_range: bool = False  # 0 to 255; else luma from 16 to 235, chroma from 16 to 240


class WrongSizeError(DecodeError):
    """The frames do not have the size that the shard states."""

    reason = "wrong_size"


@dataclasses.dataclass(frozen=True)
class RgbFrames:
    """RGB frames: pixels uint8 [F, H, W, 3]."""

    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class YuvFrames:
    """Planes of 4:2:0 video: luma uint8 [F, H, W], chroma uint8 [F, ceil(H/2), ceil(W/2)] each."""

    y: np.ndarray
    u: np.ndarray
    v: np.ndarray
    colors: Colors


Frames = RgbFrames | YuvFrames


class Decoder(Protocol):
    """Decodes frames of one video."""

    def __call__(self, video: bytes, info: VideoInfo, numbers: Sequence[int], /) -> Frames:
        """Return the frames with these numbers, in the order given.

        Args:
            video: bytes of the whole file.
            info: what the shard says about it.
            numbers: frame numbers from 0 in presentation order; at least one, repeats allowed.

        Raises:
            DecodeError: a frame cannot be decoded; TooShortError, WrongSizeError are its kinds.
        """
        ...


@dataclasses.dataclass(frozen=True)
class VideoRequest:
    """What a batched backend decodes of one video."""

    video: bytes
    info: VideoInfo
    numbers: Sequence[int]  # frame numbers of the clip
    crops: Sequence[Crop]  # each makes a clip
    flip: bool = False  # all clips left to right


@dataclasses.dataclass(frozen=True)
class DecodedBatch:
    """Clips of many videos, the crops of a video in a row."""

    clips: torch.Tensor  # uint8 [B * crops, F, size, size, 3] on the device; black where bad
    bad: dict[int, DecodeError]  # by position of the request in the batch


class BatchDecoder(Decoder, Protocol):
    """A `Decoder` that also decodes many videos at once on the training device."""

    def decode_batch(self, requests: Sequence[VideoRequest], size: int, /) -> DecodedBatch:
        """Return clips of many videos; one that cannot be decoded costs only its own clips.

        Args:
            requests: each of equally many frames and crops.
            size: pixels of each side of the clips.
        """
        ...


def stated_colors(frame: av.VideoFrame) -> tuple[Matrix | None, bool]:
    """Return what a frame says about its YUV values: the matrix, and whether they are full range.

    Args:
        frame: as it was decoded.

    Returns:
        As in `Colors`; None for a matrix that is not supported.
    """
    full_range = frame.format.name.startswith("yuvj") or frame.color_range == ColorRange.JPEG
    return matrix_of(int(frame.colorspace)), full_range


def matrix_of(code: int) -> Matrix | None:
    """Return the color matrix of a number in a stream; None: not supported.

    Args:
        code: ITU-T H.273 table 4.
    """
    return next((name for name, row in MATRICES.items() if code in row.codes), None)


def plane_view(plane: VideoPlane, channels: int = 1) -> np.ndarray:
    """Return a writable view uint8 [h, w * channels] of a plane without the padding of its rows.

    Args:
        plane: of 8-bit values.
        channels: values per pixel.
    """
    rows = np.frombuffer(cast(Any, plane), np.uint8)  # its type lacks the buffer protocol
    return rows.reshape(plane.height, plane.line_size)[:, : plane.width * channels]


def check_frame(frame: av.VideoFrame | VideoStream, info: VideoInfo, where: str = "") -> None:
    """Check that a frame or stream has the stated size, and a frame is intact.

    Args:
        frame: as it was decoded.
        info: what the shard says about the video.
        where: name of the frame for error messages.

    Raises:
        DecodeError: it is damaged; or, as WrongSizeError, it has another size.
    """
    if isinstance(frame, av.VideoFrame) and frame.is_corrupt:
        raise DecodeError("Frame is damaged", where=where, do=LEAVE_OUT)
    if (frame.width, frame.height) != (info.width, info.height):
        found = f"{frame.width}x{frame.height} for {info.width}x{info.height}"
        what = "Frame has another size than the shard states"
        raise WrongSizeError(what, where=where, found=found, do=LEAVE_OUT)
