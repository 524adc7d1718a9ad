"""Move a synthetic face.

In: an expression, its intensity and a random generator. Out: one `Face` per frame: numbers for the
pose of the head and for each group of facial muscles, which `render` draws.

The channels follow the action units of the Facial Action Coding System (Ekman and Friesen, 1978),
merged where a 224-pixel frame could not show the difference. A clip is talking, blinking and slow
head motion throughout; the expression is added with an onset, an apex and an offset, and is absent
from frame 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FPS = 25


class Face(NamedTuple):
    """State of a face in one frame; all zeros is a neutral face that looks into the camera."""

    yaw: float = 0.0  # radians, to the viewer's right
    pitch: float = 0.0  # radians, down
    roll: float = 0.0  # radians, clockwise
    shift_x: float = 0.0  # 1/224 of the frame, to the right
    shift_y: float = 0.0  # 1/224 of the frame, down
    zoom: float = 0.0  # 0.02: two percent larger
    gaze_x: float = 0.0  # -1 .. 1, to the right
    gaze_y: float = 0.0  # -1 .. 1, down
    blink: float = 0.0  # 0 open .. 1 closed
    brow_inner: float = 0.0  # raise of the inner end, AU1 (below 0: lowered, AU4)
    brow_outer: float = 0.0  # raise of the outer end, AU2
    frown: float = 0.0  # brows drawn together, AU4
    upper_lid: float = 0.0  # raise, AU5 (below 0: drooping)
    lower_lid: float = 0.0  # tightened, AU7
    cheek: float = 0.0  # raise, AU6
    nose: float = 0.0  # wrinkled, AU9
    jaw: float = 0.0  # drop, AU26
    wide: float = 0.0  # mouth stretched, AU20 (below 0: rounded)
    corner: float = 0.0  # mouth corners up, AU12 (below 0: down, AU15)
    upper_lip: float = 0.0  # raise, AU10
    lower_lip: float = 0.0  # pulled down, AU16
    press: float = 0.0  # lips pressed together, AU24


@dataclass(frozen=True)
class Expression:
    """The apex of an expression, and its place on Russell's circumplex (both -1 .. 1)."""

    valence: float
    arousal: float
    apex: Mapping[str, float]


# Order of the labels: DFEW's.
EXPRESSIONS: dict[str, Expression] = {
    "happy": Expression(
        0.8,
        0.5,
        {"corner": 1.0, "wide": 0.55, "cheek": 1.0, "lower_lid": 0.75, "upper_lip": 0.45}
        | {"jaw": 0.22, "brow_outer": 0.2, "upper_lid": -0.35, "pitch": -0.04},
    ),
    "sad": Expression(
        -0.7,
        -0.4,
        {"corner": -0.9, "brow_inner": 1.0, "brow_outer": -0.45, "frown": 0.35, "wide": -0.12}
        | {"upper_lid": -0.5, "gaze_y": 0.6, "pitch": 0.1, "press": 0.2},
    ),
    "neutral": Expression(0.0, 0.0, {}),
    "angry": Expression(
        -0.6,
        0.8,
        {"brow_inner": -1.0, "brow_outer": 0.25, "frown": 1.0, "lower_lid": 0.6, "press": 0.9}
        | {"corner": -0.3, "upper_lid": 0.1, "nose": 0.25, "pitch": 0.07},
    ),
    "surprise": Expression(
        0.1,
        0.8,
        {"brow_inner": 1.0, "brow_outer": 1.0, "upper_lid": 1.0, "jaw": 1.0, "wide": -0.55}
        | {"pitch": -0.05},
    ),
    "disgust": Expression(
        -0.7,
        0.3,
        {"nose": 1.0, "upper_lip": 1.0, "brow_inner": -0.55, "brow_outer": -0.3, "frown": 0.5}
        | {"lower_lid": 0.9, "corner": -0.55, "cheek": 0.5, "upper_lid": -0.35, "pitch": -0.07},
    ),
    "fear": Expression(
        -0.6,
        0.7,
        {"brow_inner": 0.95, "brow_outer": 0.1, "frown": 0.7, "upper_lid": 0.9, "wide": 0.75}
        | {"lower_lip": 0.8, "jaw": 0.3, "corner": -0.45, "pitch": -0.08, "zoom": -0.02},
    ),
}


def expression_faces(
    rng: np.random.Generator, expression: str, intensity: float, num_frames: int
) -> list[Face]:
    """Return the faces of a talking clip in which an expression comes and goes.

    Args:
        rng: The same state gives the same talking, blinking and head motion for every expression.
        expression: A key of `EXPRESSIONS`.
        intensity: Height of the apex, 1 is full.
        num_frames: Length of the clip.
    """
    channels = {name: np.zeros(num_frames) for name in Face._fields}
    channels |= _head_motion(rng, num_frames)
    channels |= _talking(rng, num_frames)
    channels["blink"] = _blinks(rng, num_frames)
    weight = intensity * _onset_apex_offset(rng, num_frames)
    for name, height in EXPRESSIONS[expression].apex.items():
        channels[name] = channels[name] + weight * height
    return [Face(*row) for row in np.stack([channels[name] for name in Face._fields], 1).tolist()]


def _head_motion(rng: np.random.Generator, num_frames: int) -> dict[str, np.ndarray]:
    """Return a slow sway around a resting pose, small as in a face track."""
    reach = {"yaw": 0.2, "pitch": 0.08, "roll": 0.06, "shift_x": 3.0, "shift_y": 2.0, "zoom": 0.03}
    motion = {
        name: size * (0.6 * rng.uniform(-1, 1) + 0.6 * _sway(rng, num_frames, 0.15, 0.7))
        for name, size in reach.items()
    }
    # The eyes keep to the camera more than the head does, and wander a little.
    for gaze, turn in (("gaze_x", "yaw"), ("gaze_y", "pitch")):
        motion[gaze] = 0.35 * _sway(rng, num_frames, 0.2, 0.9) - 1.2 * motion[turn]
    return motion


def _talking(rng: np.random.Generator, num_frames: int) -> dict[str, np.ndarray]:
    """Return syllables, four to five a second, in phrases with rests between them."""
    seconds = np.arange(num_frames) / FPS
    rate, phase = rng.uniform(3.6, 4.8), rng.uniform(0, 2 * np.pi)
    wobble = 0.8 * _sway(rng, num_frames, 0.5, 1.5)
    syllables = 0.5 - 0.5 * np.cos(2 * np.pi * rate * seconds + phase + wobble)
    phrase = np.clip(0.75 + 0.7 * _sway(rng, num_frames, 0.3, 0.8), 0, 1)
    loudness = rng.uniform(0.28, 0.45)
    vowels = 0.3 * _sway(rng, num_frames, 1.0, 2.5)
    return {"jaw": loudness * syllables * phrase, "wide": vowels * phrase}


def _blinks(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """Return the lid closure: a blink of a quarter of a second every two to four seconds."""
    frames = np.arange(num_frames)
    closed = np.zeros(num_frames)
    at = rng.uniform(0.3, 2.0) * FPS
    while at < num_frames:
        closed = np.maximum(closed, np.exp(-(((frames - at) / 2.2) ** 2)))
        at += rng.uniform(2.0, 4.0) * FPS
    return closed


def _onset_apex_offset(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """Return an expression's course: 0 at frame 0, up in a fifth of the clip, down at its end."""
    time = np.arange(num_frames) / max(num_frames - 1, 1)
    start, stop = rng.uniform(0.06, 0.16), rng.uniform(0.78, 0.86)
    return _smooth_step((time - start) / 0.2) * (1 - _smooth_step((time - stop) / 0.14))


def _smooth_step(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _sway(rng: np.random.Generator, num_frames: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Return a smooth random curve within [-1, 1]: three sines."""
    seconds = np.arange(num_frames)[:, None] / FPS
    rates, phases = rng.uniform(low_hz, high_hz, 3), rng.uniform(0, 2 * np.pi, 3)
    return (np.sin(2 * np.pi * rates * seconds + phases) * [0.5, 0.3, 0.2]).sum(axis=1)
