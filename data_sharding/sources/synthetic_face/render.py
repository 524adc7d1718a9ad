"""Render the frames of a synthetic clip.

In: an `Identity` and a `Face` per frame. Out: RGB frames. For each frame

1. the pose is undone on a coarse grid, with the depth of the head, so that the nose moves more than
   the ears: each point of the frame is mapped to a point of the face at rest;
2. the painted head is sampled there, after the skin's own shifts (jaw, cheeks, brows), relit for
   the pose, creased, and composited over the backdrop;
3. eyes, brows and mouth are drawn from curves, in two small windows. A shape is where some curve
   leaves a positive distance, with an edge of about a pixel. Both eyes are drawn at once, folded
   onto each other about the middle line.

Only sampling and blending touch every pixel: a 224×224 frame takes about three milliseconds. No
step goes through a BLAS, whose threads could change the last bit and with it the video's bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data_sharding.sources.synthetic_face.identity import CENTER_X, CENTER_Y, UNITS, Identity
from data_sharding.sources.synthetic_face.motion import Face
from data_sharding.sources.synthetic_face.paint import CREASES, DENSITY, MARGIN, Pictures, paint

_CELL = 4  # pixels between the points of the coarse grid
_CROP_Y = 96.0  # row in the middle of a crop: brows and chin are as far from its edges
_PIVOT_Y = 150.0  # row about which the head turns: the neck
_DEPTH = 40.0  # units from the ears to the middle of the face

# Painting takes as long as some twenty frames, and the clips of a set share few identities.
_painted = lru_cache(maxsize=32)(paint)


class _View(NamedTuple):
    """The square of the scene that a frame shows."""

    left: float  # units
    top: float
    side: float
    size: int  # pixels of a side

    @property
    def unit(self) -> float:
        """Pixels of a unit."""
        return self.size / self.side

    def points(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return columns and rows, in units, of positions in pixels."""
        at = pixels * (self.side / self.size)
        return self.left + at, self.top + at


def render_frames(
    who: Identity, faces: Iterable[Face], size: int, crop: int = UNITS
) -> Iterator[np.ndarray]:
    """Yield frames of a person, uint8 RGB [size, size, 3].

    Args:
        who: The person.
        faces: What the face does in each frame.
        size: Pixels of a side, a multiple of 4.
        crop: Units of a side of the square around the face that the frames show; default: all.
    """
    pictures = _painted(who)
    top = min(max(_CROP_Y - crop / 2, 0), UNITS - crop)
    view = _View(CENTER_X - crop / 2, top, crop, size)
    for face in faces:
        yield _render(who, pictures, face, view)


def _render(who: Identity, pictures: Pictures, face: Face, view: _View) -> np.ndarray:
    size = view.size
    # The coarse grid's points, [size / 4 + 1]; point i is before pixel 4 i.
    columns, rows = view.points(_CELL * np.arange(size // _CELL + 1))
    x, y = _undo_pose(
        who, face, columns.astype(np.float32)[None, :], rows.astype(np.float32)[:, None]
    )
    skin_x, skin_y = np.clip(_undo_muscles(who, face, x, y), 0.5, UNITS - 1)
    light = _relit(who, face, x, y)
    # Five grids of [size / 4 + 1, size / 4 + 1] to planes of [size, size].
    x, y, skin_x, skin_y, light = _finer(np.stack([x, y, skin_x, skin_y, light]))

    frame = _backdrop(pictures, face, view)
    # Half a texel off: at rest the pixel centers are on the edges between texels, where the last
    # bit would decide.
    row = (skin_y * DENSITY - 0.5).astype(np.int32)
    column = (skin_x * DENSITY - 0.5).astype(np.int32)
    head = pictures.head.take(row * (UNITS * DENSITY) + column).view(np.uint8)
    red_green_blue_alpha = head.reshape(size, size, 4).transpose(2, 0, 1)
    planes = np.ascontiguousarray(red_green_blue_alpha).astype(np.float32)
    frame *= 1 - planes[3] * (1 / 255)
    light += _crease_light(pictures, face, row // DENSITY * UNITS + column // DENSITY)
    frame += planes[:3] * light

    for draw, center_y, reach in (
        (_FeaturePainter.eyes, 0.5 * (who.eye_y + who.brow_y), (42, 25)),
        (_FeaturePainter.mouth, who.mouth_y + 5, (29, 25)),
    ):
        window = _window(face, center_y, reach, view)
        painter = _FeaturePainter(frame[:, *window], who, face, light[window])
        draw(painter, x[window], y[window])
    pixels = np.clip(frame + 0.5, 0, 255, out=frame).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _finer(grids: np.ndarray) -> np.ndarray:
    """Return coarse grids [k, n + 1, n + 1] at the pixel centers [k, 4 n, 4 n], bilinear."""
    pixels = np.arange(_CELL * (grids.shape[1] - 1))
    cell, weight = pixels // _CELL, ((pixels % _CELL + 0.5) / _CELL).astype(np.float32)
    grids = grids.take(cell, axis=2) + weight * np.diff(grids, axis=2).take(cell, axis=2)
    step = np.diff(grids, axis=1).take(cell, axis=1)
    step *= weight[:, None]
    return np.add(grids.take(cell, axis=1), step, out=step)


def _undo_pose(
    who: Identity, face: Face, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Map points of the frame to the face at rest; shoulders take no part in the pose."""
    turn = np.clip((178 - y) / 44, 0, 1)
    turn = turn * turn * (3 - 2 * turn)
    x = x - CENTER_X - face.shift_x * (0.4 + 0.6 * turn)
    y = y - _PIVOT_Y - face.shift_y * (0.4 + 0.6 * turn)
    roll, grow = face.roll * turn, 1 + face.zoom
    x, y = (x + roll * y) / grow, (y - roll * x) / grow  # small angles
    yaw, pitch = np.sin(face.yaw) * turn, np.sin(face.pitch) * turn
    rest_x, rest_y = x, y
    for _ in range(2):  # the depth is known where the point was at rest: a fixed point
        depth = _depth(who, rest_x, rest_y + _PIVOT_Y - CENTER_Y)
        rest_x, rest_y = x - depth * yaw, y - (depth - 0.35 * _DEPTH) * pitch
    return rest_x + CENTER_X, rest_y + _PIVOT_Y


def _depth(who: Identity, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return units before the plane of the ears; x, y: from the middle of the face."""
    r2 = (x / (1.25 * who.half_width)) ** 2 + (y / (1.2 * who.half_height)) ** 2
    nose_y = who.nose_y - CENTER_Y
    nose = np.exp(-((x / 7) ** 2) - ((y - nose_y) / np.where(y < nose_y, 15, 6)) ** 2)
    return _DEPTH * np.clip(1 - r2, 0, 1) ** 1.2 + 9 * nose


def _undo_muscles(
    who: Identity, face: Face, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Map points of the moving skin to points of the skin at rest."""
    dx = x - CENTER_X
    side = np.abs(dx)

    def hill(across: float, row: float, width: float, height: float) -> np.ndarray:
        return np.exp(-(((side - across) / width) ** 2) - ((y - row) / height) ** 2)

    below = np.clip((y - who.mouth_y) / 14, 0, 1)
    chin = below * np.clip((162 - y) / 20, 0, 1) * np.exp(-((dx / 40) ** 4))
    brows = 0.5 * (face.brow_inner + face.brow_outer)
    cheek, nostrils = hill(25, who.nose_y + 4, 11, 12), hill(7, who.nose_y, 8, 8)
    up = 4.0 * face.cheek * cheek + 2.5 * face.nose * nostrils - 10.0 * face.jaw * chin
    up += 2.5 * face.corner * hill(20, who.mouth_y - 3, 9, 11)
    up += 3.0 * brows * hill(17, who.brow_y - 9, 20, 9)
    outwards = 2.0 * face.wide * hill(20, who.mouth_y, 9, 11) + 1.2 * face.nose * nostrils
    return x - outwards * np.sign(dx), y + up


def _relit(who: Identity, face: Face, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the brightness, 1 at rest: what turns to the light grows brighter."""
    across = np.clip((x - CENTER_X) / who.half_width, -1, 1)
    down = np.clip((y - CENTER_Y) / who.half_height, -1, 1)
    near = np.clip((160 - y) / 20, 0, 1)
    yaw = face.yaw * (who.light[0] * (1 - across**2) - who.light[2] * across)
    pitch = face.pitch * (who.light[1] * (1 - down**2) - who.light[2] * down)
    return 1 + 0.7 * near * (yaw + pitch)


def _crease_light(pictures: Pictures, face: Face, texel: np.ndarray) -> np.ndarray:
    """Return the change of brightness by the folds that this face makes, [size, size]."""
    raised = 0.5 * (face.brow_inner + face.brow_outer)
    depth: dict[str, float] = {
        "forehead": 0.14 * max(0.0, raised),
        "glabella": 0.3 * max(0.0, face.frown),
        "nose_bridge": 0.28 * max(0.0, face.nose),
        "nasolabial": 0.05 + 0.14 * max(0.0, face.cheek, 1.3 * face.nose),
        "eye_corner": 0.2 * max(0.0, face.cheek, face.lower_lid),
        "dimple": 0.12 * max(0.0, face.corner),
    }
    weights = np.array([depth[name] for name in CREASES], np.float32)
    total = np.zeros(pictures.creases.shape[1], np.float32)
    for weight, crease in zip(weights, pictures.creases, strict=True):
        if weight:
            total += weight * crease
    return total.take(texel)


def _backdrop(pictures: Pictures, face: Face, view: _View) -> np.ndarray:
    """Return the wall, float32 [3, size, size], which drifts against the head."""
    x, y = view.points(np.arange(view.size) + 0.5)
    limit = pictures.backdrop.shape[1] - 1
    columns = np.clip((x + MARGIN - 0.9 * face.shift_x) * DENSITY, 0, limit).astype(np.int32)
    rows = np.clip((y + MARGIN - 0.9 * face.shift_y) * DENSITY, 0, limit).astype(np.int32)
    return pictures.backdrop.take(rows, axis=1).take(columns, axis=2).astype(np.float32)


def _window(
    face: Face, center_y: float, reach: Sequence[float], view: _View
) -> tuple[slice, slice]:
    """Return rows and columns about a point of the middle line, where the pose moves it."""
    up = center_y - _PIVOT_Y
    x = CENTER_X + face.shift_x - face.roll * up + 0.9 * _DEPTH * np.sin(face.yaw)
    y = _PIVOT_Y + face.shift_y + up + 0.6 * _DEPTH * np.sin(face.pitch)
    sides = []
    for center, half in ((y - view.top, reach[1] + 4), (x - view.left, reach[0] + 4)):
        start, stop = int((center - half) * view.unit), int((center + half) * view.unit)
        sides.append(slice(max(0, start), min(view.size, stop)))
    return sides[0], sides[1]


def _edge(distance: np.ndarray, width: float = 1.2) -> np.ndarray:
    """Return 0 outside and 1 inside; distance: units inside the edge."""
    return np.clip(distance / width + 0.5, 0, 1)


def _ridge(distance: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Return a Gaussian of the distance, in units; 1 at distance 0."""
    return np.exp(-((distance / width) ** 2))


class _FeaturePainter:
    """Draws into a window of a frame [3, h, w]; x, y [h, w]: the points that its pixels show."""

    def __init__(self, image: np.ndarray, who: Identity, face: Face, light: np.ndarray) -> None:
        self._image, self._who, self._face, self._light = image, who, face, light

    def _over(self, mask: np.ndarray, color: Sequence[float] | np.ndarray, light: Any) -> None:
        """Composite a lit color where `mask` [h, w] is 1."""
        image = self._image
        image += mask * (np.asarray(color, np.float32)[:, None, None] * light - image)

    def _darken(self, amount: np.ndarray) -> None:
        self._image *= 1 - amount

    def eyes(self, x: np.ndarray, y: np.ndarray) -> None:
        """Draw eyes and brows."""
        who = self._who
        mirror = np.sign(x - CENTER_X)
        out, y = np.abs(x - CENTER_X) - who.eye_x, y - who.eye_y  # outwards and down from the eye
        self._eye(out, y, mirror)
        self._brow(out, y + who.eye_y - who.brow_y)

    def _eye(self, x: np.ndarray, y: np.ndarray, mirror: np.ndarray) -> None:
        who, face, light = self._who, self._face, self._light
        t = np.clip(x / who.eye_width, -1.3, 1.3)
        y = y + who.eye_tilt * t
        arch = 1 - t * t
        open_by = 1 + 0.42 * face.upper_lid - 0.12 * face.gaze_y
        lowest = 0.5 * who.eye_open * (1 - 0.6 * max(0.0, face.lower_lid) + 0.1 * face.upper_lid)
        shut = min(1.0, max(0.0, face.blink))
        upper = -(open_by * (1 - shut) * who.eye_open - shut * lowest) * arch
        lower = lowest * arch
        # The lid that covers the eye is skin in the light; its fold stays above.
        fold = -(who.eye_open * open_by + 3.0) * arch + 0.8
        self._darken(0.35 * _ridge(y - fold, 1.1) * _edge(1.1 - np.abs(t), 0.3))
        gap = np.minimum(y - upper, lower - y)
        eye = _edge(gap) * _edge(1.02 - np.abs(t), 0.1)
        depth = np.clip((y - upper) / 4, 0, 1)
        white = (0.62 + 0.38 * depth) * (1 - 0.25 * t * t)
        self._over(eye, (236, 230, 224), white * (0.45 + 0.55 * light))

        iris_x = x - 3.2 * face.gaze_x * mirror
        iris_y = y + 0.6 - 2.2 * face.gaze_y
        radius = np.sqrt(iris_x**2 + iris_y**2)
        size = 0.47 * who.eye_width
        rings = 0.62 + 0.6 * np.clip(radius / size, 0, 1) - 0.75 * _edge(radius - size + 0.9, 1.4)
        self._over(eye * _edge(size - radius), who.iris, rings * (0.55 + 0.45 * depth))
        self._over(eye * _edge(0.44 * size - radius), (16, 13, 13), light)
        glint_x = iris_x * mirror - 1.5 * np.sign(who.light[0])
        glint = np.exp(-(glint_x**2 + (iris_y + 1.6) ** 2))
        self._image += 170 * (eye * glint)

        ends = _edge(1.12 - np.abs(t), 0.25)
        lash = _ridge(y - upper + 0.3, (0.9 + 0.25 * t)) * ends
        self._darken(0.85 * lash)
        self._darken(0.3 * _ridge(y - lower - 0.4, 0.8) * ends)
        pouch = y - lower - 2.6 + 0.8 * max(0.0, face.lower_lid)
        tight = 0.08 + 0.2 * max(0.0, face.lower_lid)
        self._darken(tight * _ridge(pouch, 1.2) * _edge(1 - np.abs(t), 0.4))

    def _brow(self, x: np.ndarray, y: np.ndarray) -> None:
        who, face, light = self._who, self._face, self._light
        t = (x + 2.6 * face.frown - 0.6) / (1.38 * who.eye_width)  # -1 inner end, 1 outer end
        inner, outer = 5.0 * face.brow_inner, 5.0 * face.brow_outer
        if face.brow_inner < 0:  # the frown pulls the inner end down less far than it can rise
            inner *= 0.9
        bend = np.clip(t, -1.3, 1.3)
        raised = 0.5 * (inner + outer) + 0.5 * (outer - inner) * bend
        arch = who.brow_arch + 1.1 * max(0.0, face.brow_outer) - 0.8 * max(0.0, face.frown)
        middle = -raised - arch * (1 - (bend - 0.25) ** 2) + 1.0
        thick = who.brow_thick * (1.1 - 0.3 * bend - 0.45 * bend**4)
        hairs = 0.9 + 0.1 * np.sin(1.5 * x + 1.1 * y)
        mask = _edge(thick - np.abs(y - middle), 2.2) * _edge(1.02 - np.abs(t), 0.45)
        color = 0.68 * np.asarray(who.hair) + 0.08 * np.asarray(who.skin)
        self._over(0.88 * mask, color, hairs * light)

    def mouth(self, x: np.ndarray, y: np.ndarray) -> None:
        """Draw the mouth."""
        who, face = self._who, self._face
        half = who.mouth_width * (1 + 0.26 * face.wide + 0.1 * max(0.0, face.corner))
        t = np.clip((x - CENTER_X) / half, -1.4, 1.4)
        y = y - who.mouth_y
        bow = np.clip(1 - t * t, 0, 1)
        thin = 1 - 0.55 * face.press
        # The line where the lips meet, then what opens above and below it.
        line = -6.0 * face.corner * (t * t - 0.35)
        jaw = max(0.0, face.jaw) * (1 - 0.9 * max(0.0, face.press))
        rise = 1.2 * jaw + 3.2 * max(0.0, face.upper_lip)
        drop = 11.5 * jaw + 3.4 * max(0.0, face.lower_lip) + 1.2 * max(0.0, face.upper_lip)
        shape = bow**0.7
        inner_top, inner_low = line - rise * shape, line + drop * shape
        cupid = 1 - 0.28 * _ridge(t, 0.13)
        top = inner_top - who.lip_upper * thin * cupid * bow**0.75
        low = inner_low + who.lip_lower * thin * bow**0.6
        ends = _edge(1.02 - np.abs(t), 0.08)

        corners = np.exp(-(((np.abs(t) - 1.04) * half / 2.2) ** 2) - ((y - line) / 2.2) ** 2)
        self._darken(0.3 * corners)
        self._darken(0.2 * _ridge(y - low - 1.6, 1.5) * bow)
        self._lips(y, (top, inner_top, inner_low, low), ends)

        gap = np.minimum(y - inner_top, inner_low - y)
        inside = _edge(gap) * ends * _edge(inner_low - inner_top - 0.6, 0.8)
        deep = np.clip((y - inner_top) / 12, 0, 1)
        self._over(inside, (92, 34, 34), 0.45 + 0.7 * deep)
        self._teeth(x, y, (inner_top, inner_low, gap, t), inside)
        seam = _ridge(y - line, 0.8) * ends * (1 - inside)
        between = _edge(1.5 - (inner_low - inner_top), 1.5)
        self._darken(0.55 * seam * between)

    def _lips(self, y: np.ndarray, curves: tuple[np.ndarray, ...], ends: np.ndarray) -> None:
        who, light = self._who, self._light
        top, inner_top, inner_low, low = curves
        upper = _edge(np.minimum(y - top, inner_top - y + 0.7), 1.6) * ends
        self._over(0.85 * upper, who.lips, light * (0.86 - 0.02 * (y - top)))
        lower = _edge(np.minimum(y - inner_low + 0.7, low - y), 1.6) * ends
        full = (y - inner_low) / np.maximum(low - inner_low, 0.5)
        shine = 0.9 + 0.26 * _ridge(full - 0.45, 0.3) - 0.16 * np.clip(full, 0, 1)
        self._over(0.85 * lower, who.lips, light * shine)

    def _teeth(
        self, x: np.ndarray, y: np.ndarray, curves: tuple[np.ndarray, ...], inside: np.ndarray
    ) -> None:
        face = self._face
        top, low, gap, t = curves
        shade = (1 - 0.45 * t * t) * (0.72 + 0.28 * np.clip(gap / 1.6, 0, 1))
        slits = 1 - 0.1 * np.exp(-((np.sin(0.72 * (x - CENTER_X)) / 0.28) ** 2))
        shown = 2.2 + 2.6 * max(0.0, face.upper_lip, 0.8 * face.corner)
        self._over(inside * _edge(top + shown - y), (238, 232, 220), shade * slits)
        if face.lower_lip > 0:
            bottom = inside * _edge(y - low + 3.4 * face.lower_lip)
            self._over(bottom, (226, 218, 204), 0.94 * shade * slits)
        tongue = inside * _edge(y - low + 4.5, 3) * _edge(low - top - 7, 2) * (1 - t * t).clip(0)
        if face.lower_lip <= 0:
            self._over(0.8 * tongue, (188, 92, 88), 0.8 + 0.2 * shade)
