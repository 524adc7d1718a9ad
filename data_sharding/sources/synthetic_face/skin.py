"""The skin of a synthetic face: relief, light, complexion, and the folds of expressions.

In: an `Identity`. Out: the lit skin at rest, and the creases that muscles fold into it.
"""

from __future__ import annotations

import numpy as np

from data_sharding.sources.synthetic_face.brushes import (
    DENSITY,
    UNITS,
    bump,
    grain,
    shaded,
    soft,
    texel_grid,
)
from data_sharding.sources.synthetic_face.identity import CENTRE_X, Identity, face_radius

CREASES = ("forehead", "glabella", "nose_bridge", "nasolabial", "eye_corner", "dimple")

_HEAD_DEPTH = 44.0  # units from the plane of the ears to the front of the face


def _relief(who: Identity, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Height of the face in units, at points relative to its middle line and frame rows."""
    skull = np.sqrt(np.clip(1.03 - face_radius(who, x + CENTRE_X, y), 0.03, 1))
    side = np.abs(x)
    hills = (  # height, distance from the middle line, row, half width, half height
        (7.0, 0.0, who.nose_y - 10, 4.6, 13.0),  # ridge of the nose
        (6.5, 0.0, who.nose_y, 5.4, 4.6),  # tip
        (3.6, who.nose_width - 0.5, who.nose_y + 1.8, 3.2, 2.8),  # wings
        (-5.5, who.eye_x, who.eye_y - 1, 11.0, 7.5),  # sockets
        (2.6, who.eye_x, who.eye_y, 8.0, 5.0),  # eyeballs
        (3.0, who.eye_x - 1, who.brow_y + 1, 14.0, 4.5),  # ridge of the brows
        (4.6, 25.0, who.nose_y - 1, 11.0, 10.0),  # cheek bones
        (3.0, 0.0, who.mouth_y, 17.0, 9.0),  # around the mouth
        (-1.3, 0.0, who.mouth_y - 8, 1.8, 4.0),  # philtrum
        (-3.2, 0.0, who.mouth_y + 9.5, 9.0, 3.2),  # below the lower lip
        (4.6, 0.0, who.mouth_y + 17, 10.0, 6.0),  # chin
    )
    height = _HEAD_DEPTH * skull
    for amount, across, row, width, tall in hills:
        height += amount * bump(side - across, y - row, width, tall)
    return height


def lit_skin(who: Identity, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The face at rest under its light, RGB float32 [h, w, 3].

    x [1, w], y [h, 1]: units of the texels from the middle line and from the frame's top.
    """
    slope_y, slope_x = np.gradient(_relief(who, x, y), 1 / DENSITY)
    normal = np.sqrt(slope_x**2 + slope_y**2 + 1)
    towards = (who.light[2] - who.light[0] * slope_x - who.light[1] * slope_y) / normal
    light = 0.5 + 0.56 * np.maximum(towards, 0)
    light *= 1 - 0.16 * bump(np.abs(x) - who.eye_x + 2, y - who.eye_y + 1, 12, 7)
    light *= 1 - 0.22 * bump(x, y - who.nose_y - 5.5, who.nose_width, 2.2)
    light += 0.016 * grain(rng, x, y, 22) + 0.01 * grain(rng, x, y, 8)
    gloss = np.clip(towards, 0, 1) ** 18
    return shaded(_complexion(who, rng, x, y), light) + 26 * gloss[..., None]


def _complexion(
    who: Identity, rng: np.random.Generator, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Colour of the unlit skin [h, w, 3]: flushed cheeks and nose, nostrils, freckles, beard."""
    skin = np.broadcast_to(np.asarray(who.skin, np.float32), (y.size, x.size, 3)).copy()
    side = np.abs(x)
    flush = 0.8 * bump(side - 25, y - who.nose_y - 3, 11, 9) + 0.6 * bump(x, y - who.nose_y, 7, 5)
    skin *= 1 - flush[..., None] * np.array([0.02, 0.13, 0.11], np.float32)
    nostrils = bump(side - 0.52 * who.nose_width, y - who.nose_y - 3.6, 2.1, 1.2)
    skin *= 1 - 0.62 * nostrils[..., None]
    _sprinkle_freckles(skin, who, rng, x, y)
    if who.beard:
        jaw = soft(y - (who.mouth_y - 8) + 0.55 * np.clip(18 - side, 0, 18) - 0.12 * side, 9)
        around = 1 - 0.85 * bump(x, y - who.mouth_y - 1, who.mouth_width + 1, 6)
        moustache = 0.8 * bump(x, y - who.mouth_y + 6.5, 15, 3)
        cover = np.maximum(jaw * around, moustache) * (0.3 + 0.6 * who.beard)
        strands = 0.85 + 0.15 * np.sin(1.3 * side + 0.4 * y + grain(rng, x, y, 14))
        skin += cover[..., None] * (np.asarray(who.hair) * strands[..., None] * 1.15 - skin)
    return skin


def _sprinkle_freckles(
    skin: np.ndarray, who: Identity, rng: np.random.Generator, x: np.ndarray, y: np.ndarray
) -> None:
    for _ in range(who.freckles):
        across, row = rng.normal(0, 17), who.nose_y - 5 + rng.normal(0, 5)
        left, top = int((CENTRE_X + across - 3) * DENSITY), int((row - 3) * DENSITY)
        spot = np.s_[top : top + 6 * DENSITY, left : left + 6 * DENSITY]
        dot = bump(x[:, spot[1]] - across, y[spot[0]] - row, 0.9, 0.9)
        skin[spot] *= 1 - 0.22 * dot[..., None] * np.array([0.6, 1, 1.2], np.float32)


def creases(who: Identity) -> np.ndarray:
    """Change of brightness by each of `CREASES` at full weight, float32 [6, 224 * 224].

    A fold is a dark line with a lit rim below or beside it.
    """
    x, y = texel_grid(UNITS, 1)
    x = x - CENTRE_X
    side = np.abs(x)

    def fold(across: np.ndarray, along: np.ndarray) -> np.ndarray:
        return along * (0.6 * np.exp(-((across - 1.6) ** 2) / 3) - np.exp(-(across**2) / 1.5))

    forehead = sum(
        fold(y - row + 0.004 * x * x, np.exp(-((x / 24) ** 4)))
        for row in (who.brow_y - 18, who.brow_y - 12.5, who.brow_y - 7)
    )
    glabella = fold((side - 3) * 1.2, np.exp(-(((y - who.brow_y - 1) / 6) ** 4)))
    bridge = sum(
        fold(y - row + 0.25 * side, np.exp(-((x / 7) ** 4)))
        for row in (who.eye_y + 1, who.eye_y + 5.5, who.eye_y + 10)
    )
    path = who.nose_width + 3 + 0.62 * (y - who.nose_y)
    nasolabial = fold(path - side, soft(y - who.nose_y + 1, 4) * soft(who.mouth_y + 4 - y, 7))
    from_eye = side - who.eye_x - who.eye_width
    eye_corner = sum(
        fold(y - who.eye_y - tilt * from_eye, np.exp(-(((from_eye - 5) / 3.6) ** 2)))
        for tilt in (-0.3, 0.05, 0.45)
    )
    from_middle = side - who.eye_x  # of the eye
    below_eye = fold(y - who.eye_y - 7.5 + 0.02 * from_middle**2, bump(from_middle, 0 * y, 9, 1))
    down = y - who.mouth_y
    dimple = fold(side - who.mouth_width - 5.5 + 0.03 * down**2, np.exp(-((down / 6) ** 4)))
    folds = (forehead, glabella, bridge, nasolabial, eye_corner + below_eye, dimple)
    return np.stack([np.broadcast_to(f, (UNITS, UNITS)).ravel() for f in folds]).astype(np.float32)
