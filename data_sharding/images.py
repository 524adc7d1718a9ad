"""Make a video of one frame of an image file: whatever reads videos then reads images too.

A baseline JPEG is muxed into an mp4 unchanged, so no pixel changes. Other images (PNG, WebP, BMP,
progressive or CMYK JPEG, those to be turned as their Exif data say) are encoded with H.264 at a
visually lossless quality, where an odd last row or column is dropped. Of 16-bit images the upper 8
bits are kept, transparent pixels are put on white, and of an animation the first frame is taken.

Every image is decoded once here: a broken one is rejected with its reason instead of costing a
sample in training. Equal images give equal bytes.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_sharding.frames import as_rgb, encode_h264, is_whole_jpeg, mux_jpegs, stated_orientation
from svfap_dist import storage
from svfap_dist.errors import DecodeError
from svfap_dist.video.orientation import UPRIGHT, turn
from svfap_dist.video.probe import Limits, Reason

IMAGE_SUFFIXES = ("bmp", "jpeg", "jpg", "png", "webp")
ENCODER = 1  # incremented when the same image gives other bytes

_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_MAX_PIXELS = Limits().pixels
_BACKGROUND = (255, 255, 255)
# What Pillow raises for files that are broken in one way or another.
_BROKEN = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError),
    *(OverflowError, struct.error, zlib.error, Image.DecompressionBombError),
)


class BrokenImageError(DecodeError):
    """A file that is not a complete image, or too large or small a one.

    Args:
        found: What is wrong.
        reason: For lists.
    """

    def __init__(self, found: str, reason: Reason = "unreadable") -> None:
        super().__init__("Unreadable image", found=found, do="copy it again, or delete it")
        self.reason = reason

    def __reduce__(self) -> Any:
        return type(self), (self.found, self.reason)


def read_image(url: str) -> bytes:
    """Return the video of an image file.

    Args:
        url: Path or URL of the image.

    Raises:
        StorageMissingError: It is gone.
        BrokenImageError: It is not a complete image.
    """
    return encode_image(storage.read_bytes(url))


def encode_image(data: bytes) -> bytes:
    """Return an mp4 of one frame.

    Args:
        data: Image file.

    Raises:
        BrokenImageError: It is not a complete image, or has too many or too few pixels.
    """
    if not data:
        raise BrokenImageError("0 bytes", "empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, odd Exif data: judged here
            return _encode(data)
    except UnidentifiedImageError as error:  # its text has an address
        raise BrokenImageError(f"no {', '.join(_FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise BrokenImageError(f"more than {_MAX_PIXELS} pixels", "too_large") from error
    except _BROKEN as error:
        found = f"{type(error).__name__}: {error}"
        is_cut = "truncated" in found.lower()
        raise BrokenImageError(found, "truncated" if is_cut else "unreadable") from error


def _encode(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > _MAX_PIXELS:
            found = f"{width}x{height} pixels, more than {_MAX_PIXELS}"
            raise BrokenImageError(found, "too_large")
        if min(width, height) < 2:
            raise BrokenImageError(f"{width}x{height} pixels", "too_small")
        orientation = UPRIGHT
        with contextlib.suppress(*_BROKEN):  # broken Exif data do not make the image unusable
            orientation = stated_orientation(image)
        is_copyable = orientation == UPRIGHT and is_whole_jpeg(image, data)
        image.load()  # all of it, to know that it can be decoded
        if is_copyable:
            return mux_jpegs([data], (width, height))
        pixels = turn(np.asarray(_opaque(image)), orientation)
    upright = Image.fromarray(np.ascontiguousarray(pixels))
    return encode_h264([upright], upright.size)


def _opaque(image: Image.Image) -> Image.Image:
    """Return an image of any mode in 8-bit RGB, transparent pixels on the background."""
    if image.mode.startswith("I") or not image.has_transparency_data:
        return as_rgb(image)
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, _BACKGROUND)
    return Image.alpha_composite(ground, layer).convert("RGB")
