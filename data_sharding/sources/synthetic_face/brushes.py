"""Brushes for painting a synthetic person: grids, soft edges, hills, texture, warm shading."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNITS = 224  # side of the frame, in the units of `identity`
DENSITY = 2  # texels per unit


def texel_grid(side: int, density: int) -> tuple[np.ndarray, np.ndarray]:
    """Units of the texel centres, x [1, side] and y [side, 1]."""
    at = ((np.arange(side) + 0.5) / density).astype(np.float32)
    return at[None, :], at[:, None]


def soft(distance: np.ndarray, width: float = 1.0) -> np.ndarray:
    """0 outside, 1 inside, over an edge of `width` units; distance: units inside the edge."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def bump(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    """A Gaussian hill of the given half widths around 0."""
    return np.exp(-((x / width) ** 2)) * np.exp(-((y / height) ** 2))


def grain(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """Smooth random texture within about -1 .. 1: plane waves of lengths around `period` units."""
    waves = 7
    angle, phase = rng.uniform(0, np.pi, waves), rng.uniform(0, 2 * np.pi, waves)
    number = 2 * np.pi / (period * rng.uniform(0.6, 1.6, waves))
    texture = np.zeros(np.broadcast(x, y).shape, np.float32)
    for a, p, k in zip(angle, phase, number, strict=True):
        # cos(u + v) from products of one-dimensional waves: no cosine per texel
        u, v = (k * np.cos(a) * x + p), k * np.sin(a) * y
        texture += (np.cos(u) * np.cos(v) - np.sin(u) * np.sin(v)).astype(np.float32)
    return texture / 4


def shaded(colour: Sequence[float] | np.ndarray, light: np.ndarray) -> np.ndarray:
    """Colour under a light of strength [h, w]: shadows turn warm, as on skin and cloth."""
    warmth = np.array([0.9, 1.03, 1.1], np.float32)
    return np.asarray(colour, np.float32) * np.maximum(light, 0.02)[..., None] ** warmth
