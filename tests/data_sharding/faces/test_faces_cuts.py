"""Cuts are found to the frame, and nothing that only looks like one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from face_videos import backdrop, encode, portrait, straight_way, with_faces

from data_sharding.faces import detect
from data_sharding.faces.crop import Cropped, CutDetector, FaceOptions, crop_faces

WIDE = backdrop(0, 480, 60)  # a scene, wider than the picture


def cuts(pictures: Iterable[np.ndarray]) -> list[int]:
    found = CutDetector()
    for picture in pictures:
        found.add(picture)
    return found.found()


def pan(start: int, speed: int, length: int, scene: np.ndarray = WIDE) -> list[np.ndarray]:
    return [scene[:, start + speed * i :][:, :80] for i in range(length)]


def noisy(pictures: Iterable[np.ndarray], spread: float) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [
        (picture + rng.normal(0, spread, picture.shape)).clip(0, 255).astype(np.uint8)
        for picture in pictures
    ]


def test_cuts_are_found_to_the_frame() -> None:
    others = [backdrop(seed, 480, 60) for seed in range(1, 4)]
    shots = [pan(0, 1, 20), pan(0, 2, 15, others[0]), pan(100, 0, 3, others[1])]
    shots.append(pan(0, 1, 10, others[2]))
    pictures = [picture for shot in shots for picture in shot]
    assert cuts(noisy(pictures, 4)) == [20, 35, 38]
    assert cuts(pictures[19:21]) == [1]


def test_what_moves_trembles_fades_or_flashes_is_no_cut() -> None:
    assert cuts(pan(0, 8, 50)) == []  # a tenth of the picture per frame
    shaken = np.random.default_rng(0).integers(0, 12, 50)
    assert cuts(WIDE[:, at:][:, :80] for at in shaken) == []
    assert cuts(noisy(pan(0, 0, 40), 25)) == []
    dark = [picture // 20 * i for i, picture in enumerate(pan(0, 0, 20))]
    assert cuts(dark + dark[::-1]) == []
    flash = [*pan(0, 1, 20), np.full_like(WIDE[:, :80], 250), *pan(20, 1, 20)]
    assert cuts(flash) == []
    assert cuts([]) == cuts(pan(0, 1, 1)) == []


def test_a_track_ends_at_a_cut_though_the_next_face_is_at_the_same_place() -> None:
    scene = np.ascontiguousarray(255 - backdrop(5)[:, ::-1])
    scene[60:180, 60:180] = portrait(3)
    first, second = [with_faces(way) for way in straight_way(60)[10:31]], [scene] * 30
    data = encode([*first, *second])
    both = crop_faces(data, detect.load_detector("haar"), FaceOptions(size=64, tracks="all"))
    assert isinstance(both, Cropped)
    assert both.cuts == [21]
    spans = {(c.track.first, c.track.first + len(c.track.boxes)) for c in both.tracks}
    assert spans == {(0, 21), (21, 51)}
    best = crop_faces(data, detect.load_detector("haar"), FaceOptions(size=64))
    assert isinstance(best, Cropped)
    assert [(cut.track.first, len(cut.track.boxes)) for cut in best.tracks] == [(21, 30)]
