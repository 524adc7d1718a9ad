"""Draw the contact sheet of a folder of crops: some videos, before and after at a few moments.

Upper row: frames of the source with the face's box (yellow) and the square that was cut out
(white). Lower row: the crop at the same moments, decoded from its mp4, as a model will see it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from svfap_dist import storage
from svfap_dist.video import image_grid
from svfap_dist.video.upright import read_upright_frames

NUM_VIDEOS = 6
_MOMENTS = 6  # at most
_MAX_FRAMES = 750  # moments are among the first: the rest of a long video is not decoded
_CELL = 144  # pixels
_BOX_COLOR, _SQUARE_COLOR = "yellow", "white"


def draw(record_urls: Sequence[str], crops_url: str, output: str) -> None:
    """Write the sheet of a few videos; those that can no longer be read are skipped.

    Args:
        record_urls: Records of the videos.
        crops_url: Folder or prefix of the crops.
        output: Path or URL of the PNG.
    """
    rows: list[tuple[str, Sequence[image_grid.Picture]]] = []
    for url in record_urls:
        record = json.loads(storage.read_bytes(url))
        try:
            source = storage.read_bytes(record["where"])
        except storage.StorageMissingError:
            continue
        track = record["tracks"][0]
        crop = storage.read_bytes(storage.join(crops_url, track["video"]))
        rows += _rows(record["key"], track, source, crop)
    sheet = image_grid.draw_grid(rows, "black")
    storage.write_bytes(output, image_grid.png_of(sheet, palette=True))


def _rows(
    key: str, track: dict[str, Any], source: bytes, crop: bytes
) -> list[tuple[str, list[Image.Image]]]:
    """Return both rows of one video."""
    length, first = len(track["boxes"]), track["first_frame"]
    moments = image_grid.evenly_spaced(min(length, _MAX_FRAMES), _MOMENTS)
    frames = _decode(source, [first + moment for moment in moments])
    size = "x".join(map(str, frames[first].size))
    for moment in moments:
        frame = frames[first + moment]
        pen, thick = ImageDraw.Draw(frame), max(2, max(frame.size) // 160)
        pen.rectangle(track["squares"][moment], outline=_SQUARE_COLOR, width=thick)
        pen.rectangle(track["boxes"][moment], outline=_BOX_COLOR, width=thick)
    crops = _decode(crop, moments)
    return [
        (f"{os.path.basename(key)}\n{size}, {length} frames", list(map(_fit, frames.values()))),
        ("crop", list(map(_fit, crops.values()))),
    ]


def _decode(video: bytes, numbers: Sequence[int]) -> dict[int, Image.Image]:
    """Return frames by number, which ascend."""
    found: dict[int, Image.Image] = {}
    for number, frame in enumerate(read_upright_frames(video)):
        if number in numbers:
            found[number] = Image.fromarray(frame.rgb())
        if number == numbers[-1]:
            break
    return found


def _fit(picture: Image.Image) -> Image.Image:
    """Return the whole picture, as large as fits a cell."""
    scale = _CELL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
