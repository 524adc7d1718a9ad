"""The still pictures of a synthetic person: painted once, warped and lit in every frame.

In: an `Identity`. Out: `Pictures`: head with hair, neck and shoulders as one cut-out, the backdrop
behind it, and the creases that expressions fold into the skin. Eyes, brows and mouth are not here;
they move too much and are drawn frame by frame.

Everything has texture and shading of low frequency. The training target standardises each patch, so
a flat patch would be a target of pure compression noise; structure that position and surroundings
foretell (vignette, shaded skin, strands of hair) is what a masked autoencoder can learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from data_sharding.sources.synthetic_face.identity import CENTRE_X, CENTRE_Y, Identity, face_radius
from data_sharding.sources.synthetic_face.skin import creases, lit_skin

MARGIN = 8  # units of backdrop beyond each edge of the frame


@dataclass(frozen=True)
class Pictures:
    """What the renderer samples.

    head: premultiplied RGBA packed into one integer per texel, uint32 [448 * 448];
    backdrop: RGB, uint8 [3, 480, 480]; creases: brightness change at full weight by name of
    `CREASES`, float32 [6, 224 * 224].
    """

    head: np.ndarray
    backdrop: np.ndarray
    creases: np.ndarray


def paint(who: Identity) -> Pictures:
    """Paint the pictures of one person."""
    rng = np.random.default_rng(who.texture_seed)
    canvas = _Canvas()
    _paint_back_hair(canvas, who, rng)
    _paint_torso(canvas, who, rng)
    _paint_neck(canvas, who)
    _paint_face(canvas, who, rng)
    _paint_front_hair(canvas, who, rng)
    return Pictures(canvas.packed(), _backdrop(who, rng), creases(who))


class _Canvas:
    """A cut-out being painted, back to front: premultiplied colour, alpha, [448, 448]."""

    def __init__(self) -> None:
        side = UNITS * DENSITY
        self.x, self.y = texel_grid(side, DENSITY)
        self.colour = np.zeros((side, side, 3), np.float32)
        self.alpha = np.zeros((side, side), np.float32)

    def over(self, mask: np.ndarray, colour: np.ndarray | Sequence[float]) -> None:
        """Lay `colour` over what is there, where `mask` [448, 448] is 1."""
        self.colour += mask[..., None] * (np.asarray(colour, np.float32) - self.colour)
        self.alpha += mask * (1 - self.alpha)

    def packed(self) -> np.ndarray:
        rgba = np.concatenate([self.colour, 255 * self.alpha[..., None]], axis=2)
        return np.clip(rgba + 0.5, 0, 255).astype(np.uint8).view(np.uint32).ravel()


def _backdrop(who: Identity, rng: np.random.Generator) -> np.ndarray:
    """A wall lit from above, darker towards the sides, faintly mottled.

    The light falls off downwards everywhere, which a model can know of any patch of it, wherever
    augmentation has put the crop.
    """
    side = (UNITS + 2 * MARGIN) * DENSITY
    x, y = texel_grid(side, DENSITY)
    x, y = x - MARGIN - CENTRE_X, y - MARGIN - CENTRE_Y
    light = 0.9 - 0.0042 * y - 0.0011 * np.sqrt(x * x + 300) + 0.0005 * x * np.sign(who.light[0])
    light += 0.016 * grain(rng, x, y, 70) + 0.008 * grain(rng, x, y, 24)
    wall = np.clip(shaded(who.backdrop, light) + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(wall.transpose(2, 0, 1))


def _paint_back_hair(canvas: _Canvas, who: Identity, rng: np.random.Generator) -> None:
    """The hair that falls behind neck and shoulders."""
    if who.length < 0.3:
        return
    x, y = canvas.x - CENTRE_X, canvas.y
    end = 128 + 62 * who.length
    half = who.half_width + 2 + 11 * np.clip((y - 58) / 60, 0, 1)
    half = half - 0.3 * np.clip(y - end + 16, 0, 30)  # the tips draw in
    mask = soft(half - np.abs(x), 3) * soft(y - 50, 24) * soft(end + 0.08 * np.abs(x) - y, 9)
    light = 0.72 - 0.3 * bump(x, y - 130, 34, 60) + 0.004 * x * np.sign(who.light[0])
    light = light + 0.13 * np.sin(np.abs(x) * 1.15 + 1.5 * np.sin(y / 17) + who.parting)
    canvas.over(mask, shaded(who.hair, light + 0.08 * grain(rng, canvas.x, y, 30)))


def _paint_torso(canvas: _Canvas, who: Identity, rng: np.random.Generator) -> None:
    x, y = canvas.x - CENTRE_X, canvas.y
    shoulder = 152 + 0.16 * np.abs(x) + 0.0024 * x * x
    collar = 160 + 17 * (1 - np.clip(np.abs(x) / 25, 0, 1) ** 1.5)
    mask = soft(y - np.maximum(shoulder, collar), 2)
    light = 0.98 - 0.0055 * np.abs(x) - 0.004 * (y - 170) + 0.0025 * x * np.sign(who.light[0])
    light = light + 0.07 * np.sin((np.abs(x) - 0.6 * y) / 7) + 0.05 * grain(rng, canvas.x, y, 26)
    light = light - 0.3 * bump(0 * x, y - np.maximum(shoulder, collar), 1, 2.5)
    canvas.over(mask, shaded(who.cloth, light))


def _paint_neck(canvas: _Canvas, who: Identity) -> None:
    x, y = canvas.x - CENTRE_X, canvas.y
    half = (0.76 - 0.45 * who.taper) * who.half_width + 0.013 * np.clip(y - 138, 0, 60) ** 2
    mask = soft(half - np.abs(x), 2) * soft(y - 120, 4)
    collar = 162 + 17 * (1 - np.clip(np.abs(x) / 25, 0, 1) ** 1.5)
    mask = mask * soft(collar - y, 2)
    turn = np.clip(x / half, -1, 1)
    light = 0.86 - 0.34 * turn**2 + 0.3 * who.light[0] * turn - 0.002 * (y - 140)
    below_chin = np.clip(face_radius(who, canvas.x, y - 5) - 0.9, 0, 1)
    light = light * (1 - 0.5 * np.exp(-3.2 * below_chin))
    light = light + 0.07 * bump(np.abs(x) - 0.045 * (200 - y) * 2, y - 165, 3, 22)  # sinews
    canvas.over(mask, shaded(who.skin, light))


def _paint_face(canvas: _Canvas, who: Identity, rng: np.random.Generator) -> None:
    x, y = canvas.x - CENTRE_X, canvas.y
    for ear in (-1, 1) if who.length < 0.3 else ():  # long hair hides the ears
        dx, dy = x - ear * (who.half_width + 1.2), y - 86
        mask = soft(1 - (dx / 5.5) ** 2 - (dy / 11) ** 2, 0.35)
        light = 0.72 + 0.25 * ear * who.light[0] - 0.3 * bump(dx, dy, 2.4, 6) + 0.006 * dy
        canvas.over(mask, shaded(who.skin, light))
    outline = (1 - np.sqrt(face_radius(who, canvas.x, y))) * who.half_width
    canvas.over(soft(outline, 1.6), lit_skin(who, rng, x, y))


def _paint_front_hair(canvas: _Canvas, who: Identity, rng: np.random.Generator) -> None:
    x, y = canvas.x - CENTRE_X, canvas.y
    half = who.half_width + 5 + 3 * min(who.length, 0.5)
    rows = (y - 74) / (who.half_height - 4 + who.volume)
    cap = soft(1 - (x / half) ** 2 - np.where(y < 74, rows, 0.35 * rows) ** 2, 0.07)
    # The hairline: lifted where the hair is parted, low at the temples, down to the ears.
    from_parting = (x / who.half_width - 0.45 * who.parting) / 1.1
    sideburns = 38 * np.clip(np.abs(x / who.half_width), 0, 1.3) ** 9
    line = who.hairline + 17 * from_parting**2 + sideburns
    fringe = 1.8 * grain(rng, canvas.x, 0 * y, 11)
    end = 84 if who.length < 0.3 else 118
    mask = cap * soft(line + fringe - y, 4.5) * soft(end - y, 16)
    strand = np.arctan2(x - 22 * who.parting, y + 12) * 46 + 0.02 * x * y / 10
    light = 0.74 + 0.12 * np.sin(strand + grain(rng, canvas.x, y, 40))
    light = light + 0.34 * bump(x / 2 - 26 * who.light[0], y - 27 - 0.006 * x * x, 26, 9)
    light = light - 0.25 * soft(np.abs(x) - half + 5, 9) - 0.2 * soft(y - line + 2, 6)
    canvas.over(mask, shaded(who.hair, light + 0.05 * grain(rng, canvas.x, y, 18)))
