"""Paint the still pictures of a synthetic person, which every frame warps and lights.

In: an `Identity`. Out: `Pictures`: head with hair, neck and shoulders as one cut-out, the backdrop
behind it, and the creases that expressions fold into the skin. Eyes, brows and mouth are not here:
they move too much and are drawn frame by frame (`render`).

Everything has texture and shading of low frequency. The training target standardizes each patch, so
a flat patch would be a target of pure compression noise; structure that position and surroundings
predict (vignette, shaded skin, strands of hair) is what a masked autoencoder can learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_sharding.sources.synthetic_face.identity import (
    CENTER_X,
    CENTER_Y,
    UNITS,
    Identity,
    face_radius,
)

DENSITY = 2  # texels per unit
MARGIN = 8  # units of backdrop beyond each edge of the frame
CREASES = ("forehead", "glabella", "nose_bridge", "nasolabial", "eye_corner", "dimple")
_HEAD_DEPTH = 44.0  # units from the plane of the ears to the front of the face


@dataclass(frozen=True)
class Pictures:
    """What the renderer samples."""

    head: np.ndarray  # premultiplied RGBA packed into one integer per texel, uint32 [448 * 448]
    backdrop: np.ndarray  # RGB, uint8 [3, 480, 480]
    creases: np.ndarray  # brightness change at full weight by `CREASES`, float32 [6, 224 * 224]


def paint(who: Identity) -> Pictures:
    """Paint the pictures of one person.

    Args:
        who: The person.
    """
    rng = np.random.default_rng(who.texture_seed)
    canvas = _Canvas()
    _paint_back_hair(canvas, who, rng)
    _paint_torso(canvas, who, rng)
    _paint_neck(canvas, who)
    _paint_face(canvas, who, rng)
    _paint_front_hair(canvas, who, rng)
    return Pictures(canvas.packed(), _backdrop(who, rng), _creases(who))


class _Canvas:
    """A cut-out being painted, back to front: premultiplied color, alpha, [448, 448]."""

    def __init__(self) -> None:
        side = UNITS * DENSITY
        self.x, self.y = _texel_grid(side, DENSITY)
        self.color = np.zeros((side, side, 3), np.float32)
        self.alpha = np.zeros((side, side), np.float32)

    def over(self, mask: np.ndarray, color: np.ndarray | Sequence[float]) -> None:
        """Composite a color, RGB [3] or [448, 448, 3], where `mask` [448, 448] is 1."""
        self.color += mask[..., None] * (np.asarray(color, np.float32) - self.color)
        self.alpha += mask * (1 - self.alpha)

    def packed(self) -> np.ndarray:
        rgba = np.concatenate([self.color, 255 * self.alpha[..., None]], axis=2)
        return np.clip(rgba + 0.5, 0, 255).astype(np.uint8).view(np.uint32).ravel()


def _backdrop(who: Identity, rng: np.random.Generator) -> np.ndarray:
    """Return a wall lit from above, darker towards the sides, faintly mottled.

    The light falls off downwards everywhere, so that a model can predict any patch of it, wherever
    augmentation has put the crop.
    """
    side = (UNITS + 2 * MARGIN) * DENSITY
    x, y = _texel_grid(side, DENSITY)
    x, y = x - MARGIN - CENTER_X, y - MARGIN - CENTER_Y
    light = 0.9 - 0.0042 * y - 0.0011 * np.sqrt(x * x + 300) + 0.0005 * x * np.sign(who.light[0])
    light += 0.016 * _grain(rng, x, y, 70) + 0.008 * _grain(rng, x, y, 24)
    wall = np.clip(_shaded(who.backdrop, light) + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(wall.transpose(2, 0, 1))


def _paint_back_hair(canvas: _Canvas, who: Identity, rng: np.random.Generator) -> None:
    """Paint the hair that falls behind neck and shoulders."""
    if who.length < 0.3:
        return
    x, y = canvas.x - CENTER_X, canvas.y
    end = 128 + 62 * who.length
    half = who.half_width + 2 + 11 * np.clip((y - 58) / 60, 0, 1)
    half = half - 0.3 * np.clip(y - end + 16, 0, 30)  # the tips draw in
    mask = _soft(half - np.abs(x), 3) * _soft(y - 50, 24) * _soft(end + 0.08 * np.abs(x) - y, 9)
    light = 0.72 - 0.3 * _bump(x, y - 130, 34, 60) + 0.004 * x * np.sign(who.light[0])
    light = light + 0.13 * np.sin(np.abs(x) * 1.15 + 1.5 * np.sin(y / 17) + who.parting)
    canvas.over(mask, _shaded(who.hair, light + 0.08 * _grain(rng, canvas.x, y, 30)))


def _paint_torso(canvas: _Canvas, who: Identity, rng: np.random.Generator) -> None:
    x, y = canvas.x - CENTER_X, canvas.y
    shoulder = 152 + 0.16 * np.abs(x) + 0.0024 * x * x
    collar = 160 + 17 * (1 - np.clip(np.abs(x) / 25, 0, 1) ** 1.5)
    mask = _soft(y - np.maximum(shoulder, collar), 2)
    light = 0.98 - 0.0055 * np.abs(x) - 0.004 * (y - 170) + 0.0025 * x * np.sign(who.light[0])
    light = light + 0.07 * np.sin((np.abs(x) - 0.6 * y) / 7) + 0.05 * _grain(rng, canvas.x, y, 26)
    light = light - 0.3 * _bump(0 * x, y - np.maximum(shoulder, collar), 1, 2.5)
    canvas.over(mask, _shaded(who.cloth, light))


def _paint_neck(canvas: _Canvas, who: Identity) -> None:
    x, y = canvas.x - CENTER_X, canvas.y
    half = (0.76 - 0.45 * who.taper) * who.half_width + 0.013 * np.clip(y - 138, 0, 60) ** 2
    mask = _soft(half - np.abs(x), 2) * _soft(y - 120, 4)
    collar = 162 + 17 * (1 - np.clip(np.abs(x) / 25, 0, 1) ** 1.5)
    mask = mask * _soft(collar - y, 2)
    turn = np.clip(x / half, -1, 1)
    light = 0.86 - 0.34 * turn**2 + 0.3 * who.light[0] * turn - 0.002 * (y - 140)
    below_chin = np.clip(face_radius(who, canvas.x, y - 5) - 0.9, 0, 1)
    light = light * (1 - 0.5 * np.exp(-3.2 * below_chin))
    light = light + 0.07 * _bump(np.abs(x) - 0.045 * (200 - y) * 2, y - 165, 3, 22)  # sinews
    canvas.over(mask, _shaded(who.skin, light))


def _paint_face(canvas: _Canvas, who: Identity, rng: np.random.Generator) -> None:
    x, y = canvas.x - CENTER_X, canvas.y
    for ear in (-1, 1) if who.length < 0.3 else ():  # long hair hides the ears
        dx, dy = x - ear * (who.half_width + 1.2), y - 86
        mask = _soft(1 - (dx / 5.5) ** 2 - (dy / 11) ** 2, 0.35)
        light = 0.72 + 0.25 * ear * who.light[0] - 0.3 * _bump(dx, dy, 2.4, 6) + 0.006 * dy
        canvas.over(mask, _shaded(who.skin, light))
    outline = (1 - np.sqrt(face_radius(who, canvas.x, y))) * who.half_width
    canvas.over(_soft(outline, 1.6), _lit_skin(who, rng, x, y))


def _paint_front_hair(canvas: _Canvas, who: Identity, rng: np.random.Generator) -> None:
    x, y = canvas.x - CENTER_X, canvas.y
    half = who.half_width + 5 + 3 * min(who.length, 0.5)
    rows = (y - 74) / (who.half_height - 4 + who.volume)
    cap = _soft(1 - (x / half) ** 2 - np.where(y < 74, rows, 0.35 * rows) ** 2, 0.07)
    # The hairline: lifted where the hair is parted, low at the temples, down to the ears.
    from_parting = (x / who.half_width - 0.45 * who.parting) / 1.1
    sideburns = 38 * np.clip(np.abs(x / who.half_width), 0, 1.3) ** 9
    line = who.hairline + 17 * from_parting**2 + sideburns
    fringe = 1.8 * _grain(rng, canvas.x, 0 * y, 11)
    end = 84 if who.length < 0.3 else 118
    mask = cap * _soft(line + fringe - y, 4.5) * _soft(end - y, 16)
    strand = np.arctan2(x - 22 * who.parting, y + 12) * 46 + 0.02 * x * y / 10
    light = 0.74 + 0.12 * np.sin(strand + _grain(rng, canvas.x, y, 40))
    light = light + 0.34 * _bump(x / 2 - 26 * who.light[0], y - 27 - 0.006 * x * x, 26, 9)
    light = light - 0.25 * _soft(np.abs(x) - half + 5, 9) - 0.2 * _soft(y - line + 2, 6)
    canvas.over(mask, _shaded(who.hair, light + 0.05 * _grain(rng, canvas.x, y, 18)))


def _relief(who: Identity, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the height of the face in units; x from its middle line, y in frame rows."""
    skull = np.sqrt(np.clip(1.03 - face_radius(who, x + CENTER_X, y), 0.03, 1))
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
        height += amount * _bump(side - across, y - row, width, tall)
    return height


def _lit_skin(who: Identity, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the face at rest under its light, RGB float32 [h, w, 3]; x [1, w], y [h, 1]."""
    slope_y, slope_x = np.gradient(_relief(who, x, y), 1 / DENSITY)
    normal = np.sqrt(slope_x**2 + slope_y**2 + 1)
    towards = (who.light[2] - who.light[0] * slope_x - who.light[1] * slope_y) / normal
    light = 0.5 + 0.56 * np.maximum(towards, 0)
    light *= 1 - 0.16 * _bump(np.abs(x) - who.eye_x + 2, y - who.eye_y + 1, 12, 7)
    light *= 1 - 0.22 * _bump(x, y - who.nose_y - 5.5, who.nose_width, 2.2)
    light += 0.016 * _grain(rng, x, y, 22) + 0.01 * _grain(rng, x, y, 8)
    gloss = np.clip(towards, 0, 1) ** 18
    return _shaded(_complexion(who, rng, x, y), light) + 26 * gloss[..., None]


def _complexion(
    who: Identity, rng: np.random.Generator, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Return the unlit skin [h, w, 3]: flushed cheeks and nose, nostrils, freckles, beard."""
    skin = np.broadcast_to(np.asarray(who.skin, np.float32), (y.size, x.size, 3)).copy()
    side = np.abs(x)
    flush = 0.8 * _bump(side - 25, y - who.nose_y - 3, 11, 9) + 0.6 * _bump(x, y - who.nose_y, 7, 5)
    skin *= 1 - flush[..., None] * np.array([0.02, 0.13, 0.11], np.float32)
    nostrils = _bump(side - 0.52 * who.nose_width, y - who.nose_y - 3.6, 2.1, 1.2)
    skin *= 1 - 0.62 * nostrils[..., None]
    _sprinkle_freckles(skin, who, rng, x, y)
    if who.beard:
        jaw = _soft(y - (who.mouth_y - 8) + 0.55 * np.clip(18 - side, 0, 18) - 0.12 * side, 9)
        around = 1 - 0.85 * _bump(x, y - who.mouth_y - 1, who.mouth_width + 1, 6)
        moustache = 0.8 * _bump(x, y - who.mouth_y + 6.5, 15, 3)
        cover = np.maximum(jaw * around, moustache) * (0.3 + 0.6 * who.beard)
        strands = 0.85 + 0.15 * np.sin(1.3 * side + 0.4 * y + _grain(rng, x, y, 14))
        skin += cover[..., None] * (np.asarray(who.hair) * strands[..., None] * 1.15 - skin)
    return skin


def _sprinkle_freckles(
    skin: np.ndarray, who: Identity, rng: np.random.Generator, x: np.ndarray, y: np.ndarray
) -> None:
    for _ in range(who.freckles):
        across, row = rng.normal(0, 17), who.nose_y - 5 + rng.normal(0, 5)
        left, top = int((CENTER_X + across - 3) * DENSITY), int((row - 3) * DENSITY)
        spot = np.s_[top : top + 6 * DENSITY, left : left + 6 * DENSITY]
        dot = _bump(x[:, spot[1]] - across, y[spot[0]] - row, 0.9, 0.9)
        skin[spot] *= 1 - 0.22 * dot[..., None] * np.array([0.6, 1, 1.2], np.float32)


def _creases(who: Identity) -> np.ndarray:
    """Return `Pictures.creases`: a fold is a dark line with a lit rim below or beside it."""
    x, y = _texel_grid(UNITS, 1)
    x = x - CENTER_X
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
    nasolabial = fold(path - side, _soft(y - who.nose_y + 1, 4) * _soft(who.mouth_y + 4 - y, 7))
    from_eye = side - who.eye_x - who.eye_width
    eye_corner = sum(
        fold(y - who.eye_y - tilt * from_eye, np.exp(-(((from_eye - 5) / 3.6) ** 2)))
        for tilt in (-0.3, 0.05, 0.45)
    )
    from_middle = side - who.eye_x  # of the eye
    below_eye = fold(y - who.eye_y - 7.5 + 0.02 * from_middle**2, _bump(from_middle, 0 * y, 9, 1))
    down = y - who.mouth_y
    dimple = fold(side - who.mouth_width - 5.5 + 0.03 * down**2, np.exp(-((down / 6) ** 4)))
    folds = (forehead, glabella, bridge, nasolabial, eye_corner + below_eye, dimple)
    return np.stack([np.broadcast_to(f, (UNITS, UNITS)).ravel() for f in folds]).astype(np.float32)


def _texel_grid(side: int, density: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the units of the texel centers, x [1, side] and y [side, 1]."""
    at = ((np.arange(side) + 0.5) / density).astype(np.float32)
    return at[None, :], at[:, None]


def _soft(distance: np.ndarray, width: float = 1.0) -> np.ndarray:
    """Return 0 outside and 1 inside, over an edge of `width` units; distance: units inside."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _bump(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    """Return a Gaussian hill of the given half widths around 0."""
    return np.exp(-((x / width) ** 2)) * np.exp(-((y / height) ** 2))


def _grain(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """Return a smooth random texture, about -1 .. 1: plane waves around `period` units long."""
    waves = 7
    angle, phase = rng.uniform(0, np.pi, waves), rng.uniform(0, 2 * np.pi, waves)
    number = 2 * np.pi / (period * rng.uniform(0.6, 1.6, waves))
    texture = np.zeros(np.broadcast(x, y).shape, np.float32)
    for a, p, k in zip(angle, phase, number, strict=True):
        # cos(u + v) from products of one-dimensional waves: no cosine per texel
        u, v = (k * np.cos(a) * x + p), k * np.sin(a) * y
        texture += (np.cos(u) * np.cos(v) - np.sin(u) * np.sin(v)).astype(np.float32)
    return texture / 4


def _shaded(color: Sequence[float] | np.ndarray, light: np.ndarray) -> np.ndarray:
    """Return a color under a light [h, w]: shadows turn warm, as on skin and cloth."""
    warmth = np.array([0.9, 1.03, 1.1], np.float32)
    return np.asarray(color, np.float32) * np.maximum(light, 0.02)[..., None] ** warmth
