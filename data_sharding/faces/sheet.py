"""The contact sheet of a folder of crops: some videos, each before and after at a few moments.

Upper row: frames of the source with the face's box (yellow) and what is cut out (white). Lower row:
the crop at the same moments, read back from its mp4, as a model will see it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_sharding.faces.frames import read_frames
from svfap_dist import storage

VIDEOS = 6
_MOMENTS = 6  # at most
_FRAMES_LOOKED_AT = 750  # from the first: nobody waits for the end of a film
_CELL, _GAP, _LABEL_HEIGHT = 144, 4, 16  # pixels
_FACE_COLOUR, _SQUARE_COLOUR = "yellow", "white"


def make(record_urls: Sequence[str], crops_url: str, output: str) -> None:
    """Write the sheet of the videos, a few, of which the records are given.

    Videos that cannot be read any more are passed over.

    Raises: StorageError.
    """
    blocks: list[Image.Image] = []
    for url in record_urls:
        record = json.loads(storage.read_bytes(url))
        try:
            source = storage.read_bytes(record["where"])
        except storage.StorageMissingError:
            continue
        track = record["tracks"][0]
        crop = storage.read_bytes(storage.join(crops_url, track["video"]))
        blocks.append(_block(record["key"], track, source, crop))
    png = io.BytesIO()
    # A palette: a sheet of photographs in full colour is three times as large.
    _stacked(blocks).quantize(256).save(png, "PNG", optimize=True)
    storage.write_bytes(output, png.getvalue())


def evenly(length: int, at_most: int) -> list[int]:
    """Some of 0 to length - 1, with both ends."""
    return [int(i) for i in np.linspace(0, length - 1, min(at_most, length)).round()]


def _block(key: str, track: dict[str, Any], source: bytes, crop: bytes) -> Image.Image:
    """Both rows of one video."""
    length, first = len(track["boxes"]), track["first_frame"]
    moments = evenly(min(length, _FRAMES_LOOKED_AT), _MOMENTS)
    frames = _pictures(source, [first + moment for moment in moments])
    crops = _pictures(crop, moments)
    before: list[Image.Image] = []
    for moment in moments:
        frame = frames[first + moment]
        pen, thick = ImageDraw.Draw(frame), max(2, max(frame.size) // 160)
        pen.rectangle(track["squares"][moment], outline=_SQUARE_COLOUR, width=thick)
        pen.rectangle(track["boxes"][moment], outline=_FACE_COLOUR, width=thick)
        before.append(_fitted(frame))
    after = [_fitted(crops[moment]) for moment in moments]
    heights = _LABEL_HEIGHT, before[0].height + _GAP, after[0].height + _GAP
    block = Image.new("RGB", (_MOMENTS * (_CELL + _GAP), sum(heights)), "black")
    size = "x".join(map(str, frames[first].size))
    label = f"{os.path.basename(key)}   {size}, {length} frames"
    ImageDraw.Draw(block).text((2, 2), label, fill="white")
    for row, top in ((before, heights[0]), (after, heights[0] + heights[1])):
        for column, picture in enumerate(row):
            left = column * (_CELL + _GAP) + (_CELL - picture.width) // 2
            block.paste(picture, (left, top))
    return block


def _pictures(video: bytes, wanted: Sequence[int]) -> dict[int, Image.Image]:
    found: dict[int, Image.Image] = {}
    for number, frame in enumerate(read_frames(video)):
        if number in wanted:
            found[number] = Image.fromarray(frame.rgb())
        if number == max(wanted):
            break
    return found


def _fitted(picture: Image.Image) -> Image.Image:
    """The whole picture, as large as fits a cell."""
    scale = _CELL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _stacked(blocks: Sequence[Image.Image]) -> Image.Image:
    height = sum(block.height for block in blocks) or 1
    whole = Image.new("RGB", (_MOMENTS * (_CELL + _GAP), height), "black")
    top = 0
    for block in blocks:
        whole.paste(block, (0, top))
        top += block.height
    return whole
