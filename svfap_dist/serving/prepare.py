"""From the bytes of a stranger's video to clips of the face; runs in a child process with limits.

In: a video. Out: where its face is, the crop of the face as a video, clips over its whole length
and those of a test, or why it cannot be used. The crop is the one of `svfap faces`, and the clips
are cut from it as `svfap predict` would.

Shapes: W windows; V clips, windows * crops; F frames; S pixels on a side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from data_sharding.faces import detect
from data_sharding.faces.crop import Cropped, FaceOptions, crop_faces
from svfap_dist.errors import DecodeError
from svfap_dist.evaluate.runner import view_sample
from svfap_dist.model.weights import ModelInfo
from svfap_dist.shards.reader import Sample
from svfap_dist.video import image_grid
from svfap_dist.video.info import (
    ChooseViews,
    Crop,
    VideoInfo,
    Views,
    segment_starts,
    segment_views,
    square_crops,
    stored_region,
)
from svfap_dist.video.probe import Limits, Rejected, probe
from svfap_dist.video.upright import read_upright_frames

NO_DETECTOR = "none"  # the videos are crops of faces
_SECONDS_BETWEEN_WINDOWS, _MOST_WINDOWS = 0.5, 24
_DECODED_BYTES = 64 << 20  # frames decoded at a time, about
_FRAMES_SHOWN, _SHOWN_PIXELS = 6, 200
_BOX_COLOR = "#f5a623"


@dataclasses.dataclass(frozen=True)
class Face:
    """Where the face is.

    seen: frames of the track in which the detector saw it, of those that it looked at, as a share.
    """

    first_frame: int
    squares: list[list[float]]  # x0, y0, x1, y1 of each frame's square, in pixels
    seen: float
    picture: bytes  # PNG: frames with the square, and the crops


@dataclasses.dataclass(frozen=True)
class ViewedClips:
    """Clips uint8 [V, F, S, S, 3]; starts: first frame of each window; weights [V] sum to 1."""

    starts: list[int]
    weights: np.ndarray
    clips: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A video that can be used; without a detector it has no face and is itself the crop."""

    info: VideoInfo
    face: Face | None
    crop: bytes
    timeline: ViewedClips  # windows over the whole length
    test: ViewedClips  # the views of multi-view testing


@dataclasses.dataclass(frozen=True)
class Preparer:
    """Prepares one video after the other; picklable.

    Args:
        info: The network's clips and views.
        detector: As `detect.load_detector`, or `NO_DETECTOR`.
        limits: What a video may cost.
    """

    info: ModelInfo
    detector: str
    limits: Limits

    def __call__(self, data: bytes) -> Prepared | Rejected:
        """Return the clips of a video, or why there are none; may hang or crash.

        Args:
            data: Bytes of the file.
        """
        try:
            return self._prepare(data)
        except DecodeError as error:
            return Rejected("undecodable", error.found or error.what)
        except MemoryError:
            return Rejected("out_of_memory", f"more than {self.limits.memory_bytes >> 20} MiB")

    def _prepare(self, data: bytes) -> Prepared | Rejected:
        face, crop = None, data
        info = probe(data, min_frames=1, limits=self.limits)
        if isinstance(info, Rejected):
            return info
        if self.detector != NO_DETECTOR:
            found = crop_faces(data, _detector(self.detector), FaceOptions(), self.limits)
            if isinstance(found, Rejected):
                return found
            info, crop = found.info, found.tracks[0].mp4
            face = _describe(data, crop, found)
        cut = probe(crop, min_frames=1, limits=self.limits)
        if isinstance(cut, Rejected):
            return cut
        sample = Sample(0, "", crop, cut)
        net = self.info
        test = segment_views(net, net.region, net.test_segments, net.test_crops)
        timeline = self._clips(sample, timeline_views(net))
        return Prepared(info, face, crop, timeline, self._clips(sample, test))

    def _clips(self, sample: Sample, choose: ChooseViews) -> ViewedClips:
        views, info = choose(sample.info), sample.info
        starts, crops = list(views.starts), list(views.crops)
        most = max(_DECODED_BYTES // (info.width * info.height * 3 * self.info.num_frames), 1)
        parts = [
            view_sample(sample, self.info, _only(starts[first : first + most], crops)).numpy()
            for first in range(0, len(starts), most)
        ]
        return ViewedClips(starts, views.weights, np.concatenate(parts))


def timeline_views(info: ModelInfo) -> ChooseViews:
    """Return the rule of predictions over time: a window each half second, 24 at most.

    Args:
        info: The network's clips.
    """

    def choose(video: VideoInfo) -> Views:
        room = max(video.num_frames - info.window, 0)
        wanted = 1 + round(room / (video.fps * _SECONDS_BETWEEN_WINDOWS))
        starts = segment_starts(video.num_frames, info.window, min(wanted, _MOST_WINDOWS))
        return Views.of(starts, square_crops(stored_region(video, info.region), 1))

    return choose


def _only(starts: Sequence[int], crops: Sequence[Crop]) -> ChooseViews:
    return lambda info: Views.of(starts, crops)


_detector = functools.lru_cache(maxsize=1)(detect.load_detector)  # one per process


def _describe(data: bytes, crop: bytes, found: Cropped) -> Face:
    cut = found.tracks[0]
    first, length = cut.track.first, len(cut.track.boxes)
    looks = sum(frame % found.every == 0 for frame in range(first, first + length))
    shown = image_grid.evenly_spaced(length, _FRAMES_SHOWN)
    frames = _frames_at(data, [first + number for number in shown])
    for frame, number in zip(frames, shown, strict=False):  # fewer, if the last were not decoded
        scale = max(frame.size) / max(found.info.width, found.info.height)
        square = [side * scale for side in cut.squares[number].tolist()]
        ImageDraw.Draw(frame).rectangle(square, outline=_BOX_COLOR, width=2)
    rows = [("video", frames), ("face", _frames_at(crop, shown))]
    picture = image_grid.png_of(image_grid.draw_grid(rows))
    seen = float(cut.track.detected.sum()) / max(looks, 1)
    return Face(first, cut.squares.round(1).tolist(), min(seen, 1.0), picture)


def _frames_at(data: bytes, numbers: Sequence[int]) -> list[Image.Image]:
    """Return frames by their ascending numbers, small; those that the file has."""
    wanted, found = set(numbers), []
    for number, frame in enumerate(read_upright_frames(data)):
        if number in wanted:
            found.append(Image.fromarray(frame.rgb(_SHOWN_PIXELS)))
        if number >= numbers[-1]:
            break
    return found
