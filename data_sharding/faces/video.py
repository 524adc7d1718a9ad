"""One video: its bytes -> the tracks of its faces and their crops, or why it is left out.

The video is decoded twice, once to look for faces and once to cut them out: nobody has to hold its
frames, and two decodes cost less than the detector.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_sharding.faces import crop
from data_sharding.faces.cuts import PIXELS, Cuts
from data_sharding.faces.detect import Detections, Detector
from data_sharding.faces.track import Track, find_tracks
from svfap_dist.errors import DecodeError
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import Limits, Rejected, probe
from svfap_dist.video.upright import read_upright_frames

TRACKS = ("best", "all")
_LOOKS_PER_SECOND = 6
_LOOK_PIXELS = 640  # longest side of the picture that the detector gets


@dataclasses.dataclass(frozen=True)
class FaceOptions:
    """What decides the crops of a video.

    size: pixels of a side of the crop, even.
    margin: around the face on each side, in sides of the face.
    detector: name of one of `detect.DETECTORS`, with its file if it needs one.
    tracks: "best" for the face that is longest and largest in view, in one shot; or "all" faces of
    all shots, a crop for each.
    """

    size: int = 224
    margin: float = crop.MARGIN
    detector: str = "haar"
    tracks: str = "best"


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Why there are no crops of a video: a reason of `probe`, or `no_face`; and what was seen."""

    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class CutTrack:
    """A face, the squares cut out around it, float64 [T, 4] in pixels, and the crops' mp4."""

    track: Track
    squares: np.ndarray
    mp4: bytes


@dataclasses.dataclass(frozen=True)
class Cropped:
    """The faces of a video.

    info: the video; but width and height are as shown: upright, with square pixels.
    every: the detector looked at each so many-th frame.
    cuts: first frames of its shots but the first.
    """

    info: VideoInfo
    every: int
    cuts: list[int]
    tracks: list[CutTrack]


def crop_faces(
    data: bytes, detector: Detector, options: FaceOptions, limits: Limits | None = None
) -> Cropped | LeftOut:
    """Find, follow and cut out the faces of a video; never raises for what the bytes hold."""
    info = probe(data, min_frames=1, limits=limits)
    if isinstance(info, Rejected):
        return LeftOut(info.reason, info.detail)
    every = max(1, round(info.fps / _LOOKS_PER_SECOND))
    try:
        info, looks, cuts = _look(data, detector, info, every)
        tracks = find_tracks(looks, every, info.num_frames, info.fps, cuts)
        if not tracks:
            seen = sum(len(look.boxes) > 0 for look in looks)
            return LeftOut("no_face", f"in {seen} of {len(looks)} frames looked at, none lasting")
        if options.tracks == "best":
            del tracks[1:]
        return Cropped(info, every, cuts, _cut_out(data, info, tracks, options))
    except DecodeError as error:
        return LeftOut("undecodable", error.found)


def _look(
    data: bytes, detector: Detector, info: VideoInfo, every: int
) -> tuple[VideoInfo, list[Detections], list[int]]:
    """The video as it really decoded, detections on each `every`-th frame, and its cuts."""
    looks: list[Detections] = []
    cuts = Cuts()
    count, width, height = 0, info.width, info.height
    for count, frame in enumerate(read_upright_frames(data), start=1):
        width, height = frame.width, frame.height
        cuts.add(frame.rgb(PIXELS))
        if (count - 1) % every == 0:
            picture = frame.rgb(_LOOK_PIXELS)
            found = detector.detect(picture)
            scale = [width / picture.shape[1], height / picture.shape[0]] * 2
            looks.append(Detections(found.boxes * scale, found.scores))
    info = dataclasses.replace(info, num_frames=count, width=width, height=height)
    return info, looks, cuts.found()


def _cut_out(
    data: bytes, info: VideoInfo, tracks: list[Track], options: FaceOptions
) -> list[CutTrack]:
    squares = [crop.squares(track, options.margin, info.width, info.height) for track in tracks]
    writers = [crop.Mp4(options.size, info.fps) for _ in tracks]
    starts: list[float | None] = [None] * len(tracks)
    for number, frame in enumerate(read_upright_frames(data)):
        here = [i for i, t in enumerate(tracks) if 0 <= number - t.first < len(t.boxes)]
        rgb = frame.rgb() if here else None
        for i in here:
            assert rgb is not None
            seconds = None
            if not info.constant_frame_rate and frame.seconds is not None:
                starts[i] = frame.seconds if starts[i] is None else starts[i]
                seconds = frame.seconds - (starts[i] or 0.0)
            square = squares[i][number - tracks[i].first]
            writers[i].add(crop.cut(rgb, square, options.size), seconds)
    files = [writer.close() for writer in writers]
    return [CutTrack(*parts) for parts in zip(tracks, squares, files, strict=True)]
