"""Draw how a synthetic person looks.

In: a seed and an identity's number. Out: an `Identity`, the numbers and colors that distinguish
people. Lengths are in units of 1/224 of the frame, x to the right and y down, with the
neutral head where VoxCeleb2's face tracks have it: eyes near row 78, mouth near row 116, chin near
row 141, all about column 112. Features vary around that layout by a few units only, so that the
small set this source makes can be learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNITS = 224  # side of the frame
CENTER_X, CENTER_Y = 112.0, 82.0  # middle of the face

Color = tuple[float, float, float]  # red, green, blue, 0 .. 255


def _palette(colors: str) -> list[Color]:
    return [(code[0], code[1], code[2]) for code in map(bytes.fromhex, colors.split())]


_SKINS = _palette("f4d0b8 ecc0a0 e0ac88 ca926c a67050 7e523a 624030")
_HAIRS = _palette("261e1c 422c20 68442a 966a3e c49c62 8a3e22 96928e")
_EYES = _palette("543622 70522c 5c704a 547a9c 6c808a")
_CLOTHES = _palette("3a4a70 80363a 406050 5c585e b0a490 8e6c8c")
_BACKDROPS = _palette("96acc2 beaa94 96b8a2 b2a0ba c8bca0 a0aab0")


@dataclass(frozen=True)
class Identity:
    """One person in one setting. Lengths in 1/224 of the frame."""

    skin: Color
    hair: Color
    iris: Color
    lips: Color
    cloth: Color
    backdrop: Color
    light: tuple[float, float, float]  # unit vector towards the light; z to the viewer
    half_width: float  # of the face at the cheek bones
    half_height: float  # of the face, crown to chin
    taper: float  # how much the jaw narrows
    eye_x: float  # distance of an eye from the middle line
    eye_y: float
    eye_width: float  # half of it
    eye_open: float  # height of the resting upper lid over the eye's middle
    eye_tilt: float  # rise of the outer corner
    brow_y: float
    brow_thick: float  # half of it
    brow_arch: float
    nose_y: float  # of the tip
    nose_width: float
    mouth_y: float
    mouth_width: float  # half of it
    lip_upper: float  # heights
    lip_lower: float
    hairline: float  # row where the hair begins, at the middle
    parting: float  # -1 .. 1, to which side the hair falls
    volume: float  # height of the hair over the skull
    length: float  # 0 short .. 1 over the shoulders
    beard: float  # 0 none .. 1 full
    freckles: int
    texture_seed: int


def draw_identity(seed: int, index: int) -> Identity:
    """Return a person of a population.

    Args:
        seed: Seed of the population.
        index: Number of the person.
    """
    rng = np.random.default_rng([seed, index])
    tone = rng.integers(len(_SKINS))
    skin = _varied(rng, _SKINS[tone], 0.05)
    # Fair hair goes with fair skin, as it mostly does.
    hair = _varied(rng, _HAIRS[rng.integers(len(_HAIRS) if tone < 3 else 3)], 0.12)
    masculine = rng.random() < 0.5
    side = rng.choice((-1.0, 1.0)) * rng.uniform(0.15, 0.5)
    light = np.array([side, -0.5, 0.75])
    light /= np.sqrt((light**2).sum())
    pale = rng.uniform(0.74, 0.84) if masculine else rng.uniform(0.5, 0.72)
    lips = (skin[0] * 0.88, skin[1] * pale * 0.9, skin[2] * pale)
    return Identity(
        skin=skin,
        hair=hair,
        iris=_varied(rng, _EYES[rng.integers(len(_EYES) if tone < 4 else 2)], 0.1),
        lips=lips,
        cloth=_varied(rng, _CLOTHES[rng.integers(len(_CLOTHES))], 0.15),
        backdrop=_varied(rng, _BACKDROPS[rng.integers(len(_BACKDROPS))], 0.08),
        light=(float(light[0]), float(light[1]), float(light[2])),
        half_width=rng.uniform(40, 44) + masculine,
        half_height=rng.uniform(57.5, 60.5),
        taper=rng.uniform(0.12, 0.19) if masculine else rng.uniform(0.18, 0.26),
        eye_x=rng.uniform(18.2, 20.4),
        eye_y=rng.uniform(77, 79.5),
        eye_width=rng.uniform(9.6, 11),
        eye_open=rng.uniform(4.4, 5.6),
        eye_tilt=rng.uniform(-0.6, 1.6),
        brow_y=rng.uniform(64.5, 67),
        brow_thick=rng.uniform(1.7, 2.5) if masculine else rng.uniform(1.2, 1.8),
        brow_arch=rng.uniform(1.2, 3.2),
        nose_y=rng.uniform(99, 102),
        nose_width=rng.uniform(6.6, 9),
        mouth_y=rng.uniform(115.5, 118),
        mouth_width=rng.uniform(14.5, 17),
        lip_upper=rng.uniform(2.6, 4),
        lip_lower=rng.uniform(3.4, 5),
        hairline=rng.uniform(35, 47),
        parting=rng.uniform(-1, 1),
        volume=rng.uniform(5, 12),
        length=rng.uniform(0, 0.12) if masculine else rng.uniform(0.3, 1),
        beard=max(0.0, rng.uniform(-0.8, 0.9)) if masculine else 0.0,
        freckles=int(rng.integers(30, 70)) if tone < 3 and rng.random() < 0.35 else 0,
        texture_seed=int(rng.integers(2**31)),
    )


def _varied(rng: np.random.Generator, color: Color, spread: float) -> Color:
    factors = (1 + rng.uniform(-spread, spread)) * (1 + rng.uniform(-spread, spread, 3) / 3)
    red, green, blue = np.clip(np.array(color) * factors, 0, 255).tolist()
    return red, green, blue


def face_radius(who: Identity, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the squared distance from the face's middle, 1 on its outline.

    Args:
        who: Whose face.
        x: Columns of the points, in units.
        y: Rows of the points, in units.
    """
    down = (y - CENTER_Y) / who.half_height
    taper = 1 - who.taper * np.clip(down, 0, 1.2) ** 2
    across = (x - CENTER_X) / (who.half_width * taper)
    return across * across + down * down
