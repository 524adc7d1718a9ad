"""Decoded frames: the contract of decode backends, what pixel values mean, and conversion to RGB.

Backends get the bytes of a video, its `VideoInfo` and frame numbers, and return those frames in the
order of the numbers. Their type says whether colors have been converted yet: YUV planes are what
codecs store, half the bytes of RGB, and converting them can wait until a whole batch is on the
training device.

The model's input is uint8 RGB of size x size pixels, cropped and resized bilinearly with
antialiasing, as Pillow does. There are two ways to the same picture. On the CPU, clip by clip:
FFmpeg's converter and torch's resize of bytes are vectorized as no batched expression is. On
another device, the batch at once: resizing is linear, so it is two products with matrices of
weights that the crop decides, and color conversion is a third. Chroma samples are taken to be in
the middle of their four pixels, as FFmpeg's fast converter does.

torch is imported only for resizing and for batches: data sharding and worker processes do without.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import av
import numpy as np
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from svfap_dist.errors import DecodeError
from svfap_dist.video.info import LEAVE_OUT, Crop, VideoInfo

if TYPE_CHECKING:
    import torch

PLANAR_420 = ("yuv420p", "yuvj420p")  # FFmpeg's formats of 8-bit 4:2:0 planes

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


_KINDS = [Colors(matrix, full_range) for matrix in MATRICES for full_range in (False, True)]
_TENSORS = ("y", "u", "v", "crops", "kinds")


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

    def reserve(self, videos: int, /) -> None:
        """Prepare for batches of any size up to this one, so that none of them is slow to start.

        Args:
            videos: of the largest batch.
        """
        ...

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
    width, height = info.width, info.height
    if info.orientation > 4:  # Exif's numbers of frames that are stored on their side
        width, height = height, width
    if (frame.width, frame.height) != (width, height):
        found = f"{frame.width}x{frame.height} for {width}x{height}"
        raise WrongSizeError("Frame size differs from the shard's", where, found, LEAVE_OUT)


def to_rgb(frames: Frames, crop: Crop, size: int) -> np.ndarray:
    """Return a clip's crop as uint8 RGB [F, size, size, 3], computed on the CPU.

    Args:
        frames: decoded frames of the clip.
        crop: rectangle of the frames.
        size: pixels of each side of the result.
    """
    if isinstance(frames, YuvFrames):
        pixels, crop = _convert(frames, crop)
    else:
        pixels = frames.pixels
    if (crop.height, crop.width) == (size, size):
        return np.ascontiguousarray(_cut(pixels, crop))
    import torch

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(_cut(pixels, crop)).permute(0, 3, 1, 2),  # [F, 3, h, w], a view
        size=(size, size),
        mode="bilinear",
        antialias=True,
    )
    return resized.permute(0, 2, 3, 1).contiguous().numpy()


def whole_frames(frames: Frames) -> np.ndarray:
    """Return all pixels as uint8 RGB [F, H, W, 3], at their own size.

    Args:
        frames: decoded frames.
    """
    if not isinstance(frames, YuvFrames):
        return frames.pixels
    crop = Crop(0, 0, *frames.y.shape[1:])
    return _cut(_convert(frames, crop)[0], crop)


def _cut(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    return pixels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def _convert(frames: YuvFrames, crop: Crop) -> tuple[np.ndarray, Crop]:
    """Return uint8 RGB of a crop grown to whole chroma samples, and the crop's place in it."""
    top, left = crop.top & ~1, crop.left & ~1
    height = (crop.top + crop.height - top + 1) & ~1
    width = (crop.left + crop.width - left + 1) & ~1
    pixels = np.empty((len(frames.y), height, width, 3), np.uint8)
    source = av.VideoFrame(width, height, "yuv420p")  # reused: allocating one per frame is slow
    luma, *chroma = (plane_view(plane) for plane in source.planes)
    y = frames.y[:, top : top + height, left : left + width]
    rows = slice(top // 2, (top + height) // 2)
    columns = slice(left // 2, (left + width) // 2)
    converter, colors = VideoReformatter(), frames.colors
    for k in range(len(pixels)):
        # Odd frames lack the last row or column: what remains there is never read.
        luma[: y.shape[1], : y.shape[2]] = y[k]
        for out, plane in zip(chroma, (frames.u, frames.v), strict=True):
            out[:] = plane[k, rows, columns]
        converted = converter.reformat(
            source,
            format="rgb24",
            src_colorspace=MATRICES[colors.matrix].converter,
            src_color_range=ColorRange.JPEG if colors.full_range else ColorRange.MPEG,
            threads=1,
        )
        pixels[k].reshape(height, -1)[:] = plane_view(converted.planes[0], channels=3)
    return pixels, dataclasses.replace(crop, top=crop.top - top, left=crop.left - left)


def to_planar_420(
    frame: av.VideoFrame, converter: VideoReformatter
) -> tuple[av.VideoFrame, Colors]:
    """Return a frame as 8-bit 4:2:0 planes, unchanged if it has them, and what their values mean.

    Args:
        frame: as it was decoded.
        converter: kept from frame to frame.
    """
    if frame.format.is_rgb:
        converted = converter.reformat(
            frame,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        return converted, Colors()
    matrix, full_range = stated_colors(frame)
    if matrix is None:
        converted = converter.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1
        )
        return converted, Colors("bt709", full_range)
    if frame.format.name not in PLANAR_420:
        name = "yuvj420p" if full_range else "yuv420p"
        frame = converter.reformat(frame, format=name, threads=1)
    return frame, Colors(matrix, full_range)


def crop_planar_420(frame: av.VideoFrame, crop: Crop) -> av.VideoFrame:
    """Return a crop of a frame of 8-bit 4:2:0 planes.

    Args:
        frame: the whole frame.
        crop: a rectangle at even offsets with even sides.
    """
    planes = []
    for plane, step in zip(frame.planes, (1, 2, 2), strict=True):
        rows = slice(crop.top // step, (crop.top + crop.height) // step)
        columns = slice(crop.left // step, (crop.left + crop.width) // step)
        planes.append(plane_view(plane)[rows, columns].ravel())
    packed = np.concatenate(planes).reshape(crop.height * 3 // 2, crop.width)
    return av.VideoFrame.from_ndarray(packed, format="yuv420p")


def rgb_from_yuv(colors: Colors) -> np.ndarray:
    """Return float64 [3, 4]: RGB from 0 to 255 is this times (y, u, v, 1) of 8 bits.

    ITU-R BT.601-7 section 2.5, BT.709-6 section 3: y = kr r + kg g + kb b, and u and v are b - y
    and r - y, scaled to the range.

    Args:
        colors: matrix and range of y, u and v.
    """
    kr, kb = MATRICES[colors.matrix].red, MATRICES[colors.matrix].blue
    luma, chroma, black = (1.0, 1.0, 0) if colors.full_range else (255 / 219, 255 / 224, 16)
    blue, red = 2 * (1 - kb) * chroma, 2 * (1 - kr) * chroma
    green = -blue * kb / (1 - kr - kb), -red * kr / (1 - kr - kb)
    linear = np.array([[luma, 0, red], [luma, *green], [luma, blue, 0]])
    return np.column_stack((linear, linear @ [-black, -128, -128]))


@functools.cache
def color_table(device: torch.device) -> torch.Tensor:
    """Return `rgb_from_yuv` of all kinds, float32 [kinds, 3, 4], which is copied only once.

    Args:
        device: where the table is kept.
    """
    import torch

    table = np.stack([rgb_from_yuv(colors) for colors in _KINDS])
    return torch.tensor(table, dtype=torch.float32, device=device)


def kind_of(frames: YuvFrames) -> int:
    """Return the number of the matrix and range of planes, for `YuvClips.kinds`.

    Args:
        frames: decoded planes.
    """
    return _KINDS.index(frames.colors)


@dataclasses.dataclass(frozen=True)
class YuvClips:
    """A batch of clips whose planes the training device converts.

    Clips of smaller frames than others are padded at the bottom and on the right.
    """

    y: torch.Tensor  # uint8 [B, F, H, W]
    u: torch.Tensor  # uint8 [B, F, ceil(H/2), ceil(W/2)]
    v: torch.Tensor  # the same
    crops: torch.Tensor  # int64 [B, 4]: top, left, height, width
    kinds: torch.Tensor  # int64 [B]: matrix and range, see `kind_of`
    size: int  # pixels of each side of the converted clips

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, part: slice) -> YuvClips:
        return dataclasses.replace(self, **{k: getattr(self, k)[part] for k in _TENSORS})

    @classmethod
    def stack(cls, clips: Sequence[YuvFrames], crops: Sequence[Crop], size: int) -> YuvClips:
        """Return the batch of some clips.

        Args:
            clips: planes of equally many frames each.
            crops: one per clip.
            size: pixels of each side of the converted clips.
        """
        import torch

        y, u, v = (torch.from_numpy(_padded([getattr(c, k) for c in clips])) for k in "yuv")
        kinds = [kind_of(clip) for clip in clips]
        boxes = [dataclasses.astuple(crop) for crop in crops]
        return cls(y, u, v, torch.tensor(boxes), torch.tensor(kinds), size)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> YuvClips:
        """Return the batch on a device.

        Args:
            device: where to copy it.
            non_blocking: as in `torch.Tensor.to`.
        """
        copies = {
            name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS
        }
        return dataclasses.replace(self, **copies)

    def to_rgb(self, device: torch.device | str) -> torch.Tensor:
        """Return uint8 RGB [B, F, size, size, 3] on a device.

        Args:
            device: where the clips are converted; on the CPU, one by one.
        """
        import torch

        if torch.device(device).type == "cpu":
            rgb = np.empty((*self.y.shape[:2], self.size, self.size, 3), np.uint8)
            for k in range(len(rgb)):
                rgb[k] = self._clip(k)
            return torch.from_numpy(rgb)
        return convert_batch(self.to(device, non_blocking=True), torch.float16)

    def _clip(self, k: int) -> np.ndarray:
        y, u, v = (plane[k].numpy() for plane in (self.y, self.u, self.v))
        crop = Crop(*self.crops[k].tolist())
        return to_rgb(YuvFrames(y, u, v, _KINDS[int(self.kinds[k])]), crop, self.size)


def _padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays [F, H, W], padded, as [B, F, max H, max W]."""
    batch = np.zeros((len(arrays), *np.max([array.shape for array in arrays], axis=0)), np.uint8)
    for k, array in enumerate(arrays):
        batch[k, :, : array.shape[1], : array.shape[2]] = array
    return batch


def convert_batch(clips: YuvClips, dtype: torch.dtype) -> torch.Tensor:
    """Return uint8 RGB [B, F, size, size, 3] of a batch on its device, without synchronizing.

    Args:
        clips: planes on the device.
        dtype: of the products; float16 holds 8-bit values to within an eighth.
    """
    import torch

    colors = color_table(clips.y.device)[clips.kinds]  # [B, 3, 4]
    boxes = clips.crops.float()
    planes = []
    for plane, scale in ((clips.y, 1), (clips.u, 2), (clips.v, 2)):
        top, left, height, width = (boxes / scale).unbind(1)
        across = resampling_weights(left, width, plane.shape[3], clips.size).to(dtype)  # [B, S, W]
        down = resampling_weights(top, height, plane.shape[2], clips.size).to(dtype)  # [B, S, H]
        rows = plane.to(dtype).flatten(1, 2) @ across.mT  # [B, F*H, S]
        rows = rows.unflatten(1, plane.shape[1:3])
        planes.append((down[:, None] @ rows).float())  # [B, F, S, S]
    rgb = torch.empty(*planes[0].shape, 3, dtype=torch.uint8, device=clips.y.device)
    for channel in range(3):
        a, b, c, d = colors[:, channel, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
        mixed = d.addcmul(a, planes[0]).addcmul(b, planes[1]).addcmul(c, planes[2])
        rgb[..., channel] = mixed.round_().clamp_(0, 255)
    return rgb


def resampling_weights(
    start: torch.Tensor, length: torch.Tensor, size: int, out: int
) -> torch.Tensor:
    """Return the weights [B, out, size] of Pillow's bilinear filter, a triangle as wide as a step.

    Args:
        start: of the crop along one side, in samples, [B].
        length: of the crop, [B].
        size: samples of the side.
        out: samples that the crop becomes.
    """
    import torch

    start, length = start[:, None, None], length[:, None, None]
    step = length / out
    wanted = torch.arange(out, device=start.device)[:, None]
    given = torch.arange(size, device=start.device)[None] + 0.5
    distance = (given - (start + (wanted + 0.5) * step)).abs()  # [B, out, size]
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    # Nothing from outside the crop; odd crops include half a chroma sample.
    weights = weights * ((given > start - 0.5) & (given < start + length + 0.5))
    return weights / weights.sum(dim=2, keepdim=True)
