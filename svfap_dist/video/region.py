"""Which part of a video's frames is used: for those who make shards and those who read them."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast, get_args

Region = Literal["voxceleb2", "center", "full"]
REGIONS: tuple[Region, ...] = get_args(Region)

_VOXCELEB2_SIDE, _VOXCELEB2_LEFT, _VOXCELEB2_CUT = 224, 32, 160  # pixels; released code


@dataclasses.dataclass(frozen=True)
class Crop:
    """A rectangle of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


def region_name(name: str) -> Region:
    """Return today's name of a region.

    Args:
        name: a name, "centre" included, which shards and exports of before say for "center".
    """
    return "center" if name == "centre" else cast(Region, name)


def region(name: str, height: int, width: int) -> Crop:
    """The part of each frame that is used, before any random crop.

    voxceleb2: rows 0-160 and columns 32-192 of 224 x 224 (released code), in proportion for other
    sizes. center: the largest centered square. full: the whole frame.
    """
    if name == "voxceleb2":
        rows, columns = height / _VOXCELEB2_SIDE, width / _VOXCELEB2_SIDE
        left = round(_VOXCELEB2_LEFT * columns)
        size = max(round(_VOXCELEB2_CUT * rows), 1), max(round(_VOXCELEB2_CUT * columns), 1)
        return Crop(0, left, *size)
    if region_name(name) == "center":
        side = min(height, width)
        return Crop((height - side) // 2, (width - side) // 2, side, side)
    assert name == "full", "config knows no other"
    return Crop(0, 0, height, width)
