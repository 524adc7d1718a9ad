"""How frames are turned or mirrored to be shown, and turning them.

Phones store sideways pictures and say in a display matrix how to show them; front cameras mirror.
An orientation is one of Exif's numbers (Exif 2.32, 4.6.4), which name all eight combinations of
quarter turns and mirrors. Readers of frames turn them, so nothing else has to know.
"""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from svfap_dist.video.frames import PLANAR_420, plane_view

UPRIGHT = 1

# What to do, in this order: exchange rows and columns, reverse columns, reverse rows.
_STEPS: dict[int, tuple[bool, bool, bool]] = {
    UPRIGHT: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
_QUARTER_TURNS = (UPRIGHT, 8, 3, 6)  # counter-clockwise
_ORIENTATIONS = {steps: orientation for orientation, steps in _STEPS.items()}


def orientation_of(frame: av.VideoFrame) -> int:
    """Return the orientation that a frame's display matrix states; without one, `UPRIGHT`.

    Angles between quarter turns are rounded, offsets and scales ignored.

    Args:
        frame: as it was decoded.
    """
    try:
        stated = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV lacks some kinds of side data, such as Exif's of JPEGs
        return _QUARTER_TURNS[round(frame.rotation / 90) % 4]
    if stated is None:
        return UPRIGHT
    # ISO/IEC 14496-12, 8.3.2.3: a point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d, *_ = np.frombuffer(bytes(stated), np.int32).astype(int).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return _ORIENTATIONS[True, c < 0, b < 0]
    return _ORIENTATIONS[False, a < 0, d < 0]


def exchanges_sides(orientation: int) -> bool:
    """Return whether frames are shown as wide as they are stored high.

    Args:
        orientation: Exif's number.
    """
    return _STEPS[orientation][0]


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels as they are shown, [H', W', ...], a view.

    Args:
        pixels: as stored, [H, W, ...].
        orientation: Exif's number.
    """
    exchange, columns, rows = _STEPS[orientation]
    pixels = pixels.swapaxes(0, 1) if exchange else pixels
    pixels = pixels[:, ::-1] if columns else pixels
    return pixels[::-1] if rows else pixels


def turn_frame(
    frame: av.VideoFrame, orientation: int, converter: VideoReformatter
) -> av.VideoFrame:
    """Return a frame as it is shown: in its planes where these are 8-bit 4:2:0, else in RGB.

    Args:
        frame: as it was decoded.
        orientation: Exif's number.
        converter: kept from frame to frame.
    """
    if orientation == UPRIGHT:
        return frame
    if frame.format.name not in PLANAR_420:
        rgb = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(turn(rgb, orientation)), "rgb24")
    width, height = frame.width, frame.height
    if exchanges_sides(orientation):
        width, height = height, width
    shown = av.VideoFrame(width, height, frame.format.name)
    for out, plane in zip(shown.planes, frame.planes, strict=True):
        plane_view(out)[:] = turn(plane_view(plane), orientation)
    shown.colorspace, shown.color_range = frame.colorspace, frame.color_range
    return shown
