"""From decoded frames to the model's: colours, crop and size.

In: the frames of a clip as a decode backend hands them over, and which rectangle of them is wanted.
Out: uint8 RGB of size x size pixels. Cropping and resizing are bilinear with antialiasing, as
Pillow's. There are two ways to the same picture. On the CPU, clip by clip: FFmpeg's converter and
torch's resizing of bytes have instructions of their own, which nothing in a batch can match. On
another device the batch as one: resizing is linear, so it is two products with matrices of weights
that the crop decides; and so are colours.

Chroma samples are taken to lie in the middle of their four pixels, as FFmpeg's fast converter does.
torch is loaded only for resizing and for batches: worker processes do without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from svfap_dist.video.frames import Frames, Matrix, YuvFrames
from svfap_dist.video.region import Crop

if TYPE_CHECKING:
    import torch

_FFMPEG_MATRIX = {"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}
_RED_BLUE_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}  # ITU-R BT.601, BT.709
_MATRICES: tuple[Matrix, ...] = ("bt601", "bt709")
_KINDS: list[tuple[Matrix, bool]] = [
    (matrix, full_range) for matrix in _MATRICES for full_range in (False, True)
]
_TENSORS = ("y", "u", "v", "crops", "kinds")


def to_rgb(frames: Frames, crop: Crop, size: int) -> np.ndarray:
    """A clip's crop as uint8 RGB [F, size, size, 3], on the CPU."""
    if isinstance(frames, YuvFrames):
        pixels, crop = _pixels(frames, crop)
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
    """All pixels as uint8 RGB [F, H, W, 3], at their own size."""
    if not isinstance(frames, YuvFrames):
        return frames.pixels
    crop = Crop(0, 0, *frames.y.shape[1:])
    return _cut(_pixels(frames, crop)[0], crop)


def _cut(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    return pixels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def _pixels(frames: YuvFrames, crop: Crop) -> tuple[np.ndarray, Crop]:
    """uint8 RGB of the pixels of a crop, and of the few more that share chroma samples with it, and
    where in there the crop is."""
    top, left = crop.top & ~1, crop.left & ~1
    height = (crop.top + crop.height - top + 1) & ~1
    width = (crop.left + crop.width - left + 1) & ~1
    pixels = np.empty((len(frames.y), height, width, 3), np.uint8)
    source = av.VideoFrame(width, height, "yuv420p")  # one for all, for making one costs time
    luma, *chroma = (_array(plane)[:, : plane.width] for plane in source.planes)
    y = frames.y[:, top : top + height, left : left + width]
    rows = slice(top // 2, (top + height) // 2)
    columns = slice(left // 2, (left + width) // 2)
    converter = VideoReformatter()
    for k in range(len(pixels)):
        # Odd frames lack the last row or column: whatever is there then is not looked at.
        luma[: y.shape[1], : y.shape[2]] = y[k]
        for out, plane in zip(chroma, (frames.u, frames.v), strict=True):
            out[:] = plane[k, rows, columns]
        converted = converter.reformat(
            source,
            format="rgb24",
            src_colorspace=_FFMPEG_MATRIX[frames.matrix],
            src_color_range=ColorRange.JPEG if frames.full_range else ColorRange.MPEG,
            threads=1,
        )
        pixels[k].reshape(height, -1)[:] = _array(converted.planes[0])[:, : width * 3]
    return pixels, dataclasses.replace(crop, top=crop.top - top, left=crop.left - left)


def _array(plane: VideoPlane) -> np.ndarray:
    """The bytes of a plane, writable, [rows, bytes of a row and its padding]."""
    return np.frombuffer(cast(Any, plane), np.uint8).reshape(-1, plane.line_size)


def rgb_from_yuv(matrix: str, full_range: bool) -> np.ndarray:
    """float64 [3, 4]: RGB from 0 to 255 is this times (y, u, v, 1) of 8 bits.

    ITU-R BT.601-7 section 2.5, BT.709-6 section 3: y = kr r + kg g + kb b, and u and v are b - y
    and r - y, scaled to the range.
    """
    kr, kb = _RED_BLUE_WEIGHTS[matrix]
    luma, chroma, black = (1.0, 1.0, 0) if full_range else (255 / 219, 255 / 224, 16)
    blue, red = 2 * (1 - kb) * chroma, 2 * (1 - kr) * chroma
    linear = np.array(
        [
            [luma, 0, red],
            [luma, -blue * kb / (1 - kr - kb), -red * kr / (1 - kr - kb)],
            [luma, blue, 0],
        ]
    )
    return np.column_stack((linear, linear @ [-black, -128, -128]))


def kind_of(frames: YuvFrames) -> int:
    """Number of the matrix and range that planes have, for `YuvClips`."""
    return _KINDS.index((frames.matrix, frames.full_range))


@dataclasses.dataclass(frozen=True)
class YuvClips:
    """A batch of clips on its way to the model: planes, and what is to be made of them.

    Frames of clips that are smaller than others are padded at the bottom and on the right.
    """

    y: torch.Tensor  # uint8 [B, F, H, W]
    u: torch.Tensor  # uint8 [B, F, ceil(H/2), ceil(W/2)]
    v: torch.Tensor  # the same
    crops: torch.Tensor  # int64 [B, 4]: top, left, height, width
    kinds: torch.Tensor  # int64 [B]: which matrix and range, an entry of _KINDS
    size: int

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, part: slice) -> YuvClips:
        return dataclasses.replace(self, **{k: getattr(self, k)[part] for k in _TENSORS})

    @classmethod
    def stack(cls, clips: Sequence[YuvFrames], crops: Sequence[Crop], size: int) -> YuvClips:
        """The batch of these clips of equally many frames, each with its crop."""
        import torch

        y = torch.from_numpy(_padded([clip.y for clip in clips]))
        u = torch.from_numpy(_padded([clip.u for clip in clips]))
        v = torch.from_numpy(_padded([clip.v for clip in clips]))
        kinds = [kind_of(clip) for clip in clips]
        boxes = [dataclasses.astuple(crop) for crop in crops]
        return cls(y, u, v, torch.tensor(boxes), torch.tensor(kinds), size)

    def to_rgb(self, device: torch.device | str) -> torch.Tensor:
        """uint8 RGB [B, F, size, size, 3] on the device."""
        import torch

        if torch.device(device).type == "cpu":
            rgb = np.empty((*self.y.shape[:2], self.size, self.size, 3), np.uint8)
            for k in range(len(rgb)):
                rgb[k] = self._clip(k)
            return torch.from_numpy(rgb)
        here = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return convert_batch(dataclasses.replace(self, **here), torch.float16)

    def _clip(self, k: int) -> np.ndarray:
        y, u, v = (plane[k].numpy() for plane in (self.y, self.u, self.v))
        crop = Crop(*self.crops[k].tolist())
        return to_rgb(YuvFrames(y, u, v, *_KINDS[int(self.kinds[k])]), crop, self.size)


def _padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[F, H, W] each -> [B, F, the greatest H, the greatest W]."""
    batch = np.zeros((len(arrays), *np.max([array.shape for array in arrays], axis=0)), np.uint8)
    for k, array in enumerate(arrays):
        batch[k, :, : array.shape[1], : array.shape[2]] = array
    return batch


def convert_batch(clips: YuvClips, dtype: torch.dtype) -> torch.Tensor:
    """uint8 RGB [B, F, size, size, 3] of a batch, where its planes are; the host waits for nothing.

    dtype: of the products. float16 holds a value of 8 bits to within an eighth.
    """
    import torch

    table = torch.tensor(np.stack([rgb_from_yuv(*kind) for kind in _KINDS]), dtype=torch.float32)
    colours = table.to(clips.y.device, non_blocking=True)[clips.kinds]  # [B, 3, 4]
    boxes = clips.crops.float()
    planes = []
    for plane, scale in ((clips.y, 1), (clips.u, 2), (clips.v, 2)):
        top, left, height, width = (boxes / scale).unbind(1)
        across = _weights(left, width, plane.shape[3], clips.size).to(dtype)  # [B, S, W]
        down = _weights(top, height, plane.shape[2], clips.size).to(dtype)  # [B, S, H]
        rows = plane.to(dtype).flatten(1, 2) @ across.mT  # [B, F*H, S]
        rows = rows.unflatten(1, plane.shape[1:3])
        planes.append((down[:, None] @ rows).float())  # [B, F, S, S]
    rgb = torch.empty(*planes[0].shape, 3, dtype=torch.uint8, device=clips.y.device)
    for channel in range(3):
        a, b, c, d = colours[:, channel, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
        mixed = d.addcmul(a, planes[0]).addcmul(b, planes[1]).addcmul(c, planes[2])
        rgb[..., channel] = mixed.round_().clamp_(0, 255)
    return rgb


def _weights(start: torch.Tensor, length: torch.Tensor, size: int, out: int) -> torch.Tensor:
    """What each of `size` samples gives to each of `out` that are made from start .. start + length
    of them: [B] -> [B, out, size]. Pillow's bilinear filter, a triangle as wide as what it merges.
    """
    import torch

    start, length = start[:, None, None], length[:, None, None]
    step = length / out
    wanted = torch.arange(out, device=start.device)[:, None]
    given = torch.arange(size, device=start.device)[None] + 0.5
    distance = (given - (start + (wanted + 0.5) * step)).abs()  # [B, out, size]
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    # Nothing from outside; half a sample is inside where a crop of odd numbers meets chroma.
    weights = weights * ((given > start - 0.5) & (given < start + length + 0.5))
    return weights / weights.sum(dim=2, keepdim=True)
