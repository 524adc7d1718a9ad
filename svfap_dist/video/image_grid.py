"""Draw pictures in a grid with labels that are never cut: contact sheets and report pictures.

In: rows of images, each with a label. Out: one image. The label column is as wide as its text, and
long labels are wrapped, since the end of a name is often what distinguishes it. Pillow is enough: a
sheet of photographs needs no plotting library.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_GAP = 2  # pixels between images
_PADDING = 4  # pixels around text
_MAX_LABEL_WIDTH = 240  # pixels; longer labels are wrapped
_RULER = ImageDraw.Draw(Image.new("RGB", (1, 1)))  # measures text

Picture = Image.Image | np.ndarray  # an array: uint8 [H, W, 3]


def draw_grid(
    rows: Sequence[tuple[str, Sequence[Picture]]], background: str = "white"
) -> Image.Image:
    """Draw rows of images, each with its label on the left.

    Args:
        rows: label and images of each row; a row without both makes a wider gap.
        background: color; the text is black on white and white on any other.
    """
    ink = "black" if background == "white" else "white"
    labels = [wrap(label, _MAX_LABEL_WIDTH) for label, _ in rows]
    images = [[_image_of(picture) for picture in pictures] for _, pictures in rows]
    texts = [_size_of(label) for label in labels]
    left = max((width for width, _ in texts), default=0)
    column = max((image.width for row in images for image in row), default=0) + _GAP
    heights = [
        max([text_height, *(image.height for image in row)]) + _GAP
        for (_, text_height), row in zip(texts, images, strict=True)
    ]
    width = left + column * max((len(row) for row in images), default=0)
    sheet = Image.new("RGB", (max(width, 1), max(sum(heights), 1)), background)
    draw, top = ImageDraw.Draw(sheet), 0
    for label, row, height in zip(labels, images, heights, strict=True):
        draw.multiline_text((_PADDING, top + _PADDING), label, fill=ink)
        for number, image in enumerate(row):
            margin = (column - _GAP - image.width) // 2
            sheet.paste(image, (left + number * column + margin, top))
        top += height
    return sheet


def add_caption(pictures: Sequence[Picture], text: str, background: str = "white") -> Image.Image:
    """Draw images side by side with one caption above, wrapped to their width.

    Args:
        pictures: at least one.
        text: the caption.
        background: as of `draw_grid`.
    """
    images = [_image_of(picture) for picture in pictures]
    width = sum(image.width for image in images)
    caption = wrap(text, width)
    _, top = _size_of(caption)
    block = Image.new("RGB", (width, top + max(image.height for image in images)), background)
    ink = "black" if background == "white" else "white"
    ImageDraw.Draw(block).multiline_text((_PADDING, _PADDING), caption, fill=ink)
    left = 0
    for image in images:
        block.paste(image, (left, top))
        left += image.width
    return block


def wrap(text: str, width: int) -> str:
    """Break lines that are wider than allowed, after a blank, `/`, `_` or `-` where there is one.

    Args:
        text: one or more lines.
        width: pixels, padding included.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        rest = line
        while _size_of(rest)[0] > width and len(rest) > 1:
            fitting = next(
                n for n in range(len(rest) - 1, 0, -1) if n == 1 or _size_of(rest[:n])[0] <= width
            )
            at = max(rest.rfind(mark, 0, fitting) + 1 for mark in " /_-") or fitting
            lines.append(rest[:at])
            rest = rest[at:]
        lines.append(rest)
    return "\n".join(lines)


def evenly_spaced(length: int, at_most: int) -> list[int]:
    """Return some of 0 to length - 1, with both ends.

    Args:
        length: how many there are.
        at_most: how many to choose.
    """
    return np.linspace(0, length - 1, min(at_most, length)).round().astype(int).tolist()


def png_of(image: Image.Image, *, palette: bool = False) -> bytes:
    """Return the bytes of a PNG file.

    Args:
        image: the picture.
        palette: whether to reduce it to 256 colors, a third of the size for photographs.
    """
    file = io.BytesIO()
    (image.quantize(256) if palette else image).save(file, "PNG", optimize=palette)
    return file.getvalue()


def _image_of(picture: Picture) -> Image.Image:
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture


def _size_of(text: str) -> tuple[int, int]:
    """Return width and height of a text with its padding, in pixels; 0 without text."""
    if not text:
        return 0, 0
    _, _, right, bottom = _RULER.multiline_textbbox((0, 0), text)
    return round(right) + 2 * _PADDING, round(bottom) + 2 * _PADDING
