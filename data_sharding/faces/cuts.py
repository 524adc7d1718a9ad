"""Small pictures of all frames of a video, one after the other -> where it cuts to another shot.

Within a shot a frame resembles the one before it, and where a camera shakes or pans, all
differences thereabouts are large. So a cut is a difference that is large in itself and several
times the differences around it; and one that lasts, for after a flash the picture is what it was.
(As PySceneDetect's AdaptiveDetector; the last condition is ours.) Slow fades are no cuts: a face
that is there on both sides is followed through them, and another one is told by its place.
"""

from __future__ import annotations

import numpy as np

PIXELS = 48  # longest side of the pictures: coarse enough for films' grain
_LARGE = 12.0  # mean difference of pixels, of 255
_TIMES_AROUND = 3.0
_AROUND = 2  # frames on each side


class Cuts:
    """Takes a video's frames in; afterwards says where it cuts."""

    def __init__(self) -> None:
        self._last: list[np.ndarray] = []  # two pictures
        self._to_one_before: list[float] = []  # the difference of each frame
        self._to_two_before: list[float] = []

    def add(self, rgb: np.ndarray) -> None:
        """The next frame as a small picture, uint8 [h, w, 3], of the same size as all others."""
        small = rgb.astype(np.int16)
        differences = [float(np.abs(small - other).mean()) for other in self._last[::-1]]
        one, two = [*differences, 0.0, 0.0][:2]
        self._to_one_before.append(one)
        self._to_two_before.append(two)
        self._last = [*self._last, small][-2:]

    def found(self) -> list[int]:
        """The numbers of the frames with which another shot begins, ascending."""
        return [i for i in range(1, len(self._to_one_before)) if self._is_cut(i)]

    def _is_cut(self, i: int) -> bool:
        one, two = self._to_one_before, self._to_two_before
        if one[i] < _LARGE:
            return False
        # Frame 0 has no difference.
        around = one[max(1, i - _AROUND) : i] + one[i + 1 : i + 1 + _AROUND]
        if around and one[i] < _TIMES_AROUND * float(np.mean(around)):
            return False
        begins_flash = i + 1 < len(one) and two[i + 1] < _LARGE
        ends_flash = i > 1 and two[i] < _LARGE
        return not (begins_flash or ends_flash)
