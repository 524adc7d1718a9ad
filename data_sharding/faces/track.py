"""Link detections on some frames to tracks with one smooth box per frame.

In: detections and the cuts of a video. Out: tracks, each one face in one shot. Detections of
consecutive looks are linked where their boxes overlap most, greedily, which is enough for a few
faces per frame; a face may be missed for a second. What was seen only once or twice, or in few of
the looks, is a false positive. Detectors jitter by several percent from look to look: a smooth
curve through the detections gives the box of each frame, without lag.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from data_sharding.faces.detect import Detections

_MIN_OVERLAP = 0.25  # IoU of the same face in two looks
_MAX_GAP_SECONDS = 1.0
_MIN_DETECTIONS = 3
_MIN_DETECTED_SHARE = 0.4  # of the looks between the first and the last
_SMOOTHING_SECONDS = 0.2  # sigma


@dataclasses.dataclass(frozen=True)
class Track:
    """One face in frames `first` to `first + T - 1` of a video."""

    first: int  # number of its first frame
    boxes: np.ndarray  # float64 [T, 4], x0, y0, x1, y1 in pixels, of the detector's proportions
    scores: np.ndarray  # float64 [T], NaN where the box is interpolated and not detected

    @property
    def detected(self) -> np.ndarray:
        """Bool [T]: whether the detector found it on this very frame."""
        return ~np.isnan(self.scores)

    @property
    def weight(self) -> float:
        """Share of the video: its length times its size, in frames times pixels."""
        return float(np.median(sides(self.boxes)) * len(self.boxes))


@dataclasses.dataclass
class _Chain:
    """Detections of one face: numbers of the looks, boxes, scores."""

    looks: list[int]
    boxes: list[np.ndarray]
    scores: list[float]


def sides(boxes: np.ndarray) -> np.ndarray:
    """Return the longer side of each box, [T].

    Args:
        boxes: [T, 4].
    """
    return (boxes[:, 2:] - boxes[:, :2]).max(axis=1)


def find_tracks(
    looks: Sequence[Detections], every: int, num_frames: int, fps: float, cuts: Sequence[int] = ()
) -> list[Track]:
    """Return the faces of a video, largest weight first; none spans two shots.

    Args:
        looks: What was detected on frames 0, every, 2 * every, ...
        every: Frames between looks; a track extends up to `every` - 1 frames beyond its first and
            last detection, where the detector did not look.
        num_frames: Frames of the whole video.
        fps: Frames per second.
        cuts: First frames of all shots but the first, ascending.
    """
    enough = min(_MIN_DETECTIONS, len(looks))
    max_gap = max(1, round(_MAX_GAP_SECONDS * fps / every))
    tracks: list[Track] = []
    for shot in itertools.pairwise([0, *cuts, num_frames]):
        of_shot = [look for look in range(len(looks)) if shot[0] <= look * every < shot[1]]
        tracks += [
            _fill(chain, every, shot, _SMOOTHING_SECONDS * fps)
            for chain in _link(looks, of_shot, max_gap)
            if len(chain.looks) >= enough
            and len(chain.looks) >= _MIN_DETECTED_SHARE * (chain.looks[-1] - chain.looks[0] + 1)
        ]
    return sorted(tracks, key=lambda track: -track.weight)


def _link(looks: Sequence[Detections], numbers: Sequence[int], max_gap: int) -> list[_Chain]:
    """Return chains of the detections in the looks of these numbers."""
    chains: list[_Chain] = []
    for look in numbers:
        boxes, scores = looks[look]
        alive = [chain for chain in chains if look - chain.looks[-1] <= max_gap]
        taken = _match(np.array([chain.boxes[-1] for chain in alive]).reshape(-1, 4), boxes)
        for i, (box, score) in enumerate(zip(boxes, scores, strict=True)):
            if i in taken:
                chain = alive[taken[i]]
            else:
                chain = _Chain([], [], [])
                chains.append(chain)
            chain.looks.append(look)
            chain.boxes.append(box)
            chain.scores.append(float(score))
    return chains


def _match(last: np.ndarray, boxes: np.ndarray) -> dict[int, int]:
    """Return which chain, ending in `last` [m, 4], each of `boxes` [n, 4] continues."""
    overlap = overlaps(last, boxes)
    taken: dict[int, int] = {}
    while overlap.size and overlap.max() >= _MIN_OVERLAP:
        chain, box = np.unravel_index(overlap.argmax(), overlap.shape)
        taken[int(box)] = int(chain)
        overlap[chain, :] = overlap[:, box] = 0
    return taken


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each pair of boxes, [m, n].

    Args:
        a: Boxes [m, 4].
        b: Boxes [n, 4].
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=-1)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(axis=1) for box in (a, b))
    return shared / (area_a[:, None] + area_b[None, :] - shared)


def _fill(chain: _Chain, every: int, shot: tuple[int, int], sigma: float) -> Track:
    """Return a box for each frame around and between a chain's looks, within its shot [a, b)."""
    detected = np.array(chain.looks) * every
    first = int(max(shot[0], detected[0] - every + 1))
    stop = int(min(shot[1], detected[-1] + every))
    boxes = np.full((stop - first, 4), np.nan)
    scores = np.full(stop - first, np.nan)
    boxes[detected - first] = chain.boxes
    scores[detected - first] = chain.scores
    return Track(first, smooth(boxes, sigma), scores)


def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """Return a smooth curve through the known rows, [T, C].

    At each frame a straight line is fitted to the known rows, weighted by a Gaussian of their
    distance, and evaluated there: a Savitzky-Golay filter that needs neither even spacing nor
    values beyond the ends. (Cleveland, J. Am. Stat. Assoc. 1979)

    Args:
        values: [T, C], NaN in unknown rows; a known row within 6 sigma of each frame.
        sigma: Width of the Gaussian, in frames.
    """
    distance = np.arange(-round(6 * sigma) - 1, round(6 * sigma) + 2)
    kernel = np.exp(-0.5 * (distance / sigma) ** 2)
    known = ~np.isnan(values[:, :1])

    def summed(rows: np.ndarray, power: int) -> np.ndarray:
        columns = [np.convolve(row, kernel * distance**power) for row in rows.T]
        reach = len(distance) // 2
        return np.stack(columns, axis=1)[reach : reach + len(rows)]

    s0, s1, s2 = (summed(known.astype(float), power) for power in (0, 1, 2))
    there = np.where(known, values, 0.0)
    y0, y1 = (summed(there, power) for power in (0, 1))
    spread = s0 * s2 - s1**2
    # One known row in reach makes no line.
    line = spread > 1e-9 * s0 * s2
    return np.where(line, (s2 * y0 - s1 * y1) / np.where(line, spread, 1), y0 / s0)
