"""Who a synthetic face is: the first step of the synthetic source.

In: a seed and an identity's number. Out: an `Identity`, the numbers and colours that tell one
person from another. Lengths are in units of 1/224 of the frame, x to the right and y down, with the
neutral head where VoxCeleb2's face tracks have it: eyes near row 78, mouth near row 116, chin near
row 141, all about column 112. Features vary around that layout by a few units only, so that the
small set this source makes can be learnt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CENTRE_X, CENTRE_Y = 112.0, 82.0  # middle of the face

Colour = tuple[float, float, float]  # red, green, blue, 0 .. 255

_SKINS: tuple[Colour, ...] = (
    (244, 208, 184),
    (236, 192, 160),
    (224, 172, 136),
    (202, 146, 108),
    (166, 112, 80),
    (126, 82, 58),
    (98, 64, 48),
)
_HAIRS: tuple[Colour, ...] = (
    (38, 30, 28),
    (66, 44, 32),
    (104, 68, 42),
    (150, 106, 62),
    (196, 156, 98),
    (138, 62, 34),
    (150, 146, 142),
)
_EYES: tuple[Colour, ...] = (
    (84, 54, 34),
    (112, 82, 44),
    (92, 112, 74),
    (84, 122, 156),
    (108, 128, 138),
)
_CLOTHES: tuple[Colour, ...] = (
    (58, 74, 112),
    (128, 54, 58),
    (64, 96, 80),
    (92, 88, 94),
    (176, 164, 144),
    (142, 108, 140),
)
_BACKDROPS: tuple[Colour, ...] = (
    (150, 172, 194),
    (190, 170, 148),
    (150, 184, 162),
    (178, 160, 186),
    (200, 188, 160),
    (160, 170, 176),
)


@dataclass(frozen=True)
class Identity:
    """One person in one setting. Lengths in 1/224 of the frame."""

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    cloth: Colour
    backdrop: Colour
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
    """The person with number `index` of the population `seed`."""
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


def _varied(rng: np.random.Generator, colour: Colour, spread: float) -> Colour:
    factors = (1 + rng.uniform(-spread, spread)) * (1 + rng.uniform(-spread, spread, 3) / 3)
    red, green, blue = np.clip(np.array(colour) * factors, 0, 255).tolist()
    return red, green, blue


def face_radius(who: Identity, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distance from the face's middle, 1 on its outline, at points (x, y) in units."""
    down = (y - CENTRE_Y) / who.half_height
    taper = 1 - who.taper * np.clip(down, 0, 1.2) ** 2
    across = (x - CENTRE_X) / (who.half_width * taper)
    return across * across + down * down
