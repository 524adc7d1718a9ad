"""Frames of a synthetic clip: the third step of the synthetic source.

In: an `Identity` and a `Face` per frame. Out: RGB frames. For each frame

1. where does each point of the frame lie on the face? The pose is undone on a coarse grid, with the
   depth of the head, so that the nose moves more than the ears;
2. the painted head is looked up there, after the skin's own shifts (jaw, cheeks, brows), lit anew
   for the pose, creased, and laid over the backdrop;
3. eyes, brows and mouth are drawn from curves, in two small windows.

Only the look-up and the blending touch every pixel: a 224×224 frame takes about three milliseconds.
No step goes through a BLAS, whose threads could change the last bit and with it the video's bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from data_sharding.sources.synthetic_face.brushes import DENSITY, UNITS
from data_sharding.sources.synthetic_face.features import draw_eyes, draw_mouth
from data_sharding.sources.synthetic_face.identity import CENTRE_X, CENTRE_Y, Identity
from data_sharding.sources.synthetic_face.motion import Face
from data_sharding.sources.synthetic_face.paint import MARGIN, Pictures, paint
from data_sharding.sources.synthetic_face.skin import CREASES

_CELL = 4  # pixels between the points of the coarse grid
_PIVOT_Y = 150.0  # row about which the head turns: the neck
_DEPTH = 40.0  # units from the ears to the middle of the face

# Painting takes as long as some twenty frames, and the clips of a set share few identities.
_painted = lru_cache(maxsize=32)(paint)


def render_frames(who: Identity, faces: Iterable[Face], size: int) -> Iterator[np.ndarray]:
    """Frames of `who` making `faces`, uint8 RGB [size, size, 3]; size: a multiple of 4."""
    pictures = _painted(who)
    for face in faces:
        yield _render(who, pictures, face, size)


def _render(who: Identity, pictures: Pictures, face: Face, size: int) -> np.ndarray:
    at = _coarse_units(size)
    x, y = _undo_pose(who, face, at[None, :], at[:, None])
    skin_x, skin_y = np.clip(_undo_muscles(who, face, x, y), 0.5, UNITS - 1)
    light = _relit(who, face, x, y)
    # Five grids of [size / 4 + 1, size / 4 + 1] to planes of [size, size].
    x, y, skin_x, skin_y, light = _finer(np.stack([x, y, skin_x, skin_y, light]))

    frame = _backdrop(pictures, face, size)
    # Half a texel off: at rest the pixel centres lie on the edges between texels, where the last
    # bit would decide.
    row = (skin_y * DENSITY - 0.5).astype(np.int32)
    column = (skin_x * DENSITY - 0.5).astype(np.int32)
    head = pictures.head.take(row * (UNITS * DENSITY) + column).view(np.uint8)
    red_green_blue_alpha = head.reshape(size, size, 4).transpose(2, 0, 1)
    planes = np.ascontiguousarray(red_green_blue_alpha).astype(np.float32)
    frame *= 1 - planes[3] * (1 / 255)
    light += _crease_light(pictures, face, row // DENSITY * UNITS + column // DENSITY)
    frame += planes[:3] * light

    for draw, centre_y, reach in (
        (draw_eyes, 0.5 * (who.eye_y + who.brow_y), (42, 25)),
        (draw_mouth, who.mouth_y + 5, (29, 25)),
    ):
        window = _window(face, centre_y, reach, size)
        draw(frame[:, *window], who, face, x[window], y[window], light[window])
    pixels = np.clip(frame + 0.5, 0, 255, out=frame).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _coarse_units(size: int) -> np.ndarray:
    """Units of the coarse grid's points, [size / 4 + 1]; point i lies before pixel 4 i."""
    return (np.arange(size // _CELL + 1) * (_CELL * UNITS / size)).astype(np.float32)


def _finer(grids: np.ndarray) -> np.ndarray:
    """Coarse grids [k, n + 1, n + 1] to pixels [k, 4 n, 4 n], bilinear at the pixel centres."""
    pixels = np.arange(_CELL * (grids.shape[1] - 1))
    cell, weight = pixels // _CELL, ((pixels % _CELL + 0.5) / _CELL).astype(np.float32)
    grids = grids.take(cell, axis=2) + weight * np.diff(grids, axis=2).take(cell, axis=2)
    step = np.diff(grids, axis=1).take(cell, axis=1)
    step *= weight[:, None]
    return np.add(grids.take(cell, axis=1), step, out=step)


def _undo_pose(
    who: Identity, face: Face, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points of the frame to points of the face at rest; shoulders take no part in the pose."""
    turn = np.clip((178 - y) / 44, 0, 1)
    turn = turn * turn * (3 - 2 * turn)
    x = x - CENTRE_X - face.shift_x * (0.4 + 0.6 * turn)
    y = y - _PIVOT_Y - face.shift_y * (0.4 + 0.6 * turn)
    roll, grow = face.roll * turn, 1 + face.zoom
    x, y = (x + roll * y) / grow, (y - roll * x) / grow  # small angles
    yaw, pitch = np.sin(face.yaw) * turn, np.sin(face.pitch) * turn
    rest_x, rest_y = x, y
    for _ in range(2):  # the depth is known where the point was at rest: a fixed point
        depth = _depth(who, rest_x, rest_y + _PIVOT_Y - CENTRE_Y)
        rest_x, rest_y = x - depth * yaw, y - (depth - 0.35 * _DEPTH) * pitch
    return rest_x + CENTRE_X, rest_y + _PIVOT_Y


def _depth(who: Identity, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Units before the plane of the ears; x, y: from the middle of the face."""
    r2 = (x / (1.25 * who.half_width)) ** 2 + (y / (1.2 * who.half_height)) ** 2
    nose_y = who.nose_y - CENTRE_Y
    nose = np.exp(-((x / 7) ** 2) - ((y - nose_y) / np.where(y < nose_y, 15, 6)) ** 2)
    return _DEPTH * np.clip(1 - r2, 0, 1) ** 1.2 + 9 * nose


def _undo_muscles(
    who: Identity, face: Face, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points of the moving skin to points of the skin at rest."""
    dx = x - CENTRE_X
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
    """Brightness, 1 at rest: the parts of the head that turn to the light grow brighter."""
    across = np.clip((x - CENTRE_X) / who.half_width, -1, 1)
    down = np.clip((y - CENTRE_Y) / who.half_height, -1, 1)
    near = np.clip((160 - y) / 20, 0, 1)
    yaw = face.yaw * (who.light[0] * (1 - across**2) - who.light[2] * across)
    pitch = face.pitch * (who.light[1] * (1 - down**2) - who.light[2] * down)
    return 1 + 0.7 * near * (yaw + pitch)


def _crease_light(pictures: Pictures, face: Face, texel: np.ndarray) -> np.ndarray:
    """Change of brightness by the folds that this face makes, [size, size]."""
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


def _backdrop(pictures: Pictures, face: Face, size: int) -> np.ndarray:
    """The wall behind, float32 [3, size, size]: it drifts against the head, as in a face track."""
    at = (np.arange(size) + 0.5) * (UNITS / size) + MARGIN
    limit = pictures.backdrop.shape[1] - 1
    columns = np.clip((at - 0.9 * face.shift_x) * DENSITY, 0, limit).astype(np.int32)
    rows = np.clip((at - 0.9 * face.shift_y) * DENSITY, 0, limit).astype(np.int32)
    return pictures.backdrop.take(rows, axis=1).take(columns, axis=2).astype(np.float32)


def _window(face: Face, centre_y: float, reach: Sequence[float], size: int) -> tuple[slice, slice]:
    """Rows and columns of the frame about a point of the middle line, where the pose takes it."""
    up = centre_y - _PIVOT_Y
    x = CENTRE_X + face.shift_x - face.roll * up + 0.9 * _DEPTH * np.sin(face.yaw)
    y = _PIVOT_Y + face.shift_y + up + 0.6 * _DEPTH * np.sin(face.pitch)
    scale = size / UNITS
    sides = []
    for centre, half in ((y, reach[1] + 4), (x, reach[0] + 4)):
        start, stop = int((centre - half) * scale), int((centre + half) * scale)
        sides.append(slice(max(0, start), min(size, stop)))
    return sides[0], sides[1]
