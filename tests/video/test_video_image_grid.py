"""Grids of pictures: every image at its place, every character of every label visible."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from svfap_dist.video import image_grid


def flat(value: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_images_are_in_rows_behind_their_labels() -> None:
    rows = [("one", [flat(10), flat(20)]), ("", []), ("two\nlines", [flat(30), flat(40, 20, 20)])]
    sheet = np.asarray(image_grid.draw_grid(rows))
    left = sheet.shape[1] - 2 * 42
    assert left > 20
    assert (sheet[:30, left : left + 40] == 10).all()
    assert (sheet[:30, left + 42 : left + 82] == 20).all()
    assert (sheet[34:64, left : left + 40] == 30).all()
    assert (sheet[34:54, left + 52 : left + 72] == 40).all()  # centered in its column
    assert (sheet[:30, :left] < 128).any()


def test_a_tall_label_makes_its_row_higher() -> None:
    sheet = np.asarray(image_grid.draw_grid([("a\nb\nc\nd\ne\nf", [flat(0)]), ("", [flat(9)])]))
    assert sheet.shape[0] > 2 * 32
    assert (sheet[-32:-2, -42:-2] == 9).all()


@pytest.mark.parametrize("width", [30, 100, 240])
def test_wrapping_loses_no_character_and_keeps_to_the_width(width: int) -> None:
    text = "id00017/a_very-long_key/" + "x" * 60 + "\nsecond line"
    wrapped = image_grid.wrap(text, width)
    assert wrapped.replace("\n", "") == text.replace("\n", "")
    assert all(image_grid._size_of(line)[0] <= width for line in wrapped.split("\n"))


def test_long_names_with_the_same_start_look_different() -> None:
    """The labels of the reconstruction picture were once cut to "synthetic-id00"."""
    sheets = [
        image_grid.draw_grid([(f"synthetic-id0000-clip0000{n} {'x' * 60}{n}", [flat(0)])])
        for n in range(2)
    ]
    assert sheets[0].tobytes() != sheets[1].tobytes()


def test_a_caption_stands_above_images_side_by_side() -> None:
    block = np.asarray(image_grid.add_caption([flat(10), flat(20)], "a caption " * 5, "black"))
    assert block.shape[1] == 80
    assert (block[-30:, :40] == 10).all()
    assert (block[-30:, 40:] == 20).all()
    assert (block[:-30] > 128).any()


def test_png(tmp_path) -> None:
    image = Image.fromarray(flat(77))
    for palette in (False, True):
        (tmp_path / "a.png").write_bytes(image_grid.png_of(image, palette=palette))
        assert (np.asarray(Image.open(tmp_path / "a.png").convert("RGB")) == 77).all()
    assert image_grid.evenly_spaced(10, 3) == [0, 4, 9]
    assert image_grid.evenly_spaced(2, 3) == [0, 1]
