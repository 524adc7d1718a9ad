"""Eyes, brows and mouth of a synthetic face, drawn from curves into a window of the frame.

In: a window of a frame, the points of the face that its pixels show (units, pose undone) and their
light. Out: the window, painted over. Both eyes are drawn at once, folded onto each other about the
middle line; a shape is where some curve leaves a positive distance, with an edge of about a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_sharding.sources.synthetic_face.identity import CENTRE_X, Identity
from data_sharding.sources.synthetic_face.motion import Face


def _edge(distance: np.ndarray, width: float = 1.2) -> np.ndarray:
    """0 outside, 1 inside; distance: units inside the edge."""
    return np.clip(distance / width + 0.5, 0, 1)


def _over(
    image: np.ndarray, mask: np.ndarray, colour: Sequence[float] | np.ndarray, light: np.ndarray
) -> None:
    """Lay `colour`, lit, over the image [3, h, w] where `mask` [h, w] is 1."""
    image += mask * (np.asarray(colour, np.float32)[:, None, None] * light - image)


def _darken(image: np.ndarray, amount: np.ndarray) -> None:
    image *= 1 - amount


def draw_eyes(
    image: np.ndarray, who: Identity, face: Face, x: np.ndarray, y: np.ndarray, light: np.ndarray
) -> None:
    """Draw eyes and brows into `image`, float32 [3, h, w]; x, y, light: [h, w]."""
    mirror = np.sign(x - CENTRE_X)
    out, y = np.abs(x - CENTRE_X) - who.eye_x, y - who.eye_y  # outwards and down from the eye
    _eye(image, who, face, out, y, mirror, light)
    _brow(image, who, face, out, y + who.eye_y - who.brow_y, light)


def _eye(
    image: np.ndarray,
    who: Identity,
    face: Face,
    x: np.ndarray,
    y: np.ndarray,
    mirror: np.ndarray,
    light: np.ndarray,
) -> None:
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
    _darken(image, 0.35 * np.exp(-(((y - fold) / 1.1) ** 2)) * _edge(1.1 - np.abs(t), 0.3))
    gap = np.minimum(y - upper, lower - y)
    eye = _edge(gap) * _edge(1.02 - np.abs(t), 0.1)
    depth = np.clip((y - upper) / 4, 0, 1)
    white = (0.62 + 0.38 * depth) * (1 - 0.25 * t * t)
    _over(image, eye, (236, 230, 224), white * (0.45 + 0.55 * light))

    iris_x = x - 3.2 * face.gaze_x * mirror
    iris_y = y + 0.6 - 2.2 * face.gaze_y
    radius = np.sqrt(iris_x**2 + iris_y**2)
    size = 0.47 * who.eye_width
    rings = 0.62 + 0.6 * np.clip(radius / size, 0, 1) - 0.75 * _edge(radius - size + 0.9, 1.4)
    _over(image, eye * _edge(size - radius), who.iris, rings * (0.55 + 0.45 * depth))
    _over(image, eye * _edge(0.44 * size - radius), (16, 13, 13), light)
    glint = np.exp(-((iris_x * mirror - 1.5 * np.sign(who.light[0])) ** 2 + (iris_y + 1.6) ** 2))
    image += 170 * (eye * glint)

    ends = _edge(1.12 - np.abs(t), 0.25)
    lash = np.exp(-(((y - upper + 0.3) / (0.9 + 0.25 * t)) ** 2)) * ends
    _darken(image, 0.85 * lash)
    _darken(image, 0.3 * np.exp(-(((y - lower - 0.4) / 0.8) ** 2)) * ends)
    pouch = y - lower - 2.6 + 0.8 * max(0.0, face.lower_lid)
    tight = 0.08 + 0.2 * max(0.0, face.lower_lid)
    _darken(image, tight * np.exp(-((pouch / 1.2) ** 2)) * _edge(1 - np.abs(t), 0.4))


def _brow(
    image: np.ndarray, who: Identity, face: Face, x: np.ndarray, y: np.ndarray, light: np.ndarray
) -> None:
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
    colour = 0.68 * np.asarray(who.hair) + 0.08 * np.asarray(who.skin)
    _over(image, 0.88 * mask, colour, hairs * light)


def draw_mouth(
    image: np.ndarray, who: Identity, face: Face, x: np.ndarray, y: np.ndarray, light: np.ndarray
) -> None:
    """Draw the mouth into `image`, float32 [3, h, w]; x, y, light: [h, w]."""
    half = who.mouth_width * (1 + 0.26 * face.wide + 0.1 * max(0.0, face.corner))
    t = np.clip((x - CENTRE_X) / half, -1.4, 1.4)
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
    cupid = 1 - 0.28 * np.exp(-((t / 0.13) ** 2))
    top = inner_top - who.lip_upper * thin * cupid * bow**0.75
    low = inner_low + who.lip_lower * thin * bow**0.6
    ends = _edge(1.02 - np.abs(t), 0.08)

    corners = np.exp(-(((np.abs(t) - 1.04) * half / 2.2) ** 2) - ((y - line) / 2.2) ** 2)
    _darken(image, 0.3 * corners)
    _darken(image, 0.2 * np.exp(-(((y - low - 1.6) / 1.5) ** 2)) * bow)
    _over_lips(image, who, y, (top, inner_top, inner_low, low), ends, light)

    gap = np.minimum(y - inner_top, inner_low - y)
    inside = _edge(gap) * ends * _edge(inner_low - inner_top - 0.6, 0.8)
    deep = np.clip((y - inner_top) / 12, 0, 1)
    _over(image, inside, (92, 34, 34), 0.45 + 0.7 * deep)
    _teeth(image, face, x, y, (inner_top, inner_low, gap, t), inside)
    seam = np.exp(-(((y - line) / 0.8) ** 2)) * ends * (1 - inside)
    between = _edge(1.5 - (inner_low - inner_top), 1.5)
    _darken(image, 0.55 * seam * between)


def _over_lips(
    image: np.ndarray,
    who: Identity,
    y: np.ndarray,
    curves: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    ends: np.ndarray,
    light: np.ndarray,
) -> None:
    top, inner_top, inner_low, low = curves
    upper = _edge(np.minimum(y - top, inner_top - y + 0.7), 1.6) * ends
    _over(image, 0.85 * upper, who.lips, light * (0.86 - 0.02 * (y - top)))
    lower = _edge(np.minimum(y - inner_low + 0.7, low - y), 1.6) * ends
    full = (y - inner_low) / np.maximum(low - inner_low, 0.5)
    shine = 0.9 + 0.26 * np.exp(-(((full - 0.45) / 0.3) ** 2)) - 0.16 * np.clip(full, 0, 1)
    _over(image, 0.85 * lower, who.lips, light * shine)


def _teeth(
    image: np.ndarray,
    face: Face,
    x: np.ndarray,
    y: np.ndarray,
    curves: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    inside: np.ndarray,
) -> None:
    top, low, gap, t = curves
    shade = (1 - 0.45 * t * t) * (0.72 + 0.28 * np.clip(gap / 1.6, 0, 1))
    slits = 1 - 0.1 * np.exp(-((np.sin(0.72 * (x - CENTRE_X)) / 0.28) ** 2))
    shown = 2.2 + 2.6 * max(0.0, face.upper_lip, 0.8 * face.corner)
    _over(image, inside * _edge(top + shown - y), (238, 232, 220), shade * slits)
    if face.lower_lip > 0:
        bottom = inside * _edge(y - low + 3.4 * face.lower_lip)
        _over(image, bottom, (226, 218, 204), 0.94 * shade * slits)
    tongue = inside * _edge(y - low + 4.5, 3) * _edge(low - top - 7, 2) * (1 - t * t).clip(0)
    if face.lower_lip <= 0:
        _over(image, 0.8 * tongue, (188, 92, 88), 0.8 + 0.2 * shade)
