"""Find, follow and cut out the faces of one video.

In: the bytes of a video and a detector. Out: the tracks of its faces with the mp4s of their crops,
or why there are none. The video is decoded twice, to find faces and to cut them out: holding its
frames would take memory, and two decodes cost less than the detector.

The center of the square follows the face; its side is the same for the whole track (from the median
face). A model of expressions should see movement within the face: the moving center removes the
head's path through the frame. A side that followed every box would make the face grow and shrink
with the detector's jitter, and would hide that a person leans in.

The default margin and lift give the look of VoxCeleb2's crops: on face clips in its format the
frontal cascade's box is 0.60 of the frame's side, and its center at 0.54 of the height. A square
that reaches beyond the picture is shifted inwards as far as the face stays inside it; the rest
repeats the picture's edge.
"""

from __future__ import annotations

import dataclasses
import io
from fractions import Fraction

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from data_sharding.faces.detect import Detections, Detector
from data_sharding.faces.track import Track, find_tracks, sides
from svfap_dist.errors import DecodeError
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import Limits, Rejected, probe
from svfap_dist.video.upright import read_upright_frames

TRACKS = ("best", "all")
MARGIN = 0.33  # on each side of the face, as a fraction of the face box
_LIFT = 0.07  # of the square's center above the box's, as a fraction of the face box
_LOOKS_PER_SECOND = 6
_LOOK_PIXELS = 640  # longest side of the pictures for the detector

# One thread, and no look-ahead tree: the same frames give the same bytes. The quality leaves room
# for another encoding (`svfap shard --profile train`).
_ENCODER = {"preset": "medium", "crf": "18", "x264-params": "mbtree=0:threads=1"}
_TICKS_PER_SECOND = 90_000

_CUT_PIXELS = 48  # longest side of the pictures for cuts: coarse enough for films' grain
_LARGE = 12.0  # mean difference of pixels, of 255
_TIMES_AROUND = 3.0
_AROUND = 2  # frames on each side


@dataclasses.dataclass(frozen=True)
class FaceOptions:
    """What decides the crops of a video."""

    size: int = 224  # pixels of a side of the crop, even
    margin: float = MARGIN  # on each side of the face, as a fraction of the face box
    detector: str = "haar"  # one of `detect.DETECTORS`, with its file if it needs one
    # "best": the face that is longest and largest in view, in one shot; "all": a crop of each face.
    tracks: str = "best"


@dataclasses.dataclass(frozen=True)
class CutTrack:
    """A face, the squares cut out around it, float64 [T, 4] in pixels, and the mp4 of the crops."""

    track: Track
    squares: np.ndarray
    mp4: bytes


@dataclasses.dataclass(frozen=True)
class Cropped:
    """The faces of a video."""

    info: VideoInfo  # the video; width and height are as shown: upright, with square pixels
    every: int  # the detector looked at every `every`-th frame
    cuts: list[int]  # first frames of all shots but the first
    tracks: list[CutTrack]  # its faces, largest weight first


def crop_faces(
    data: bytes, detector: Detector, options: FaceOptions, limits: Limits | None = None
) -> Cropped | Rejected:
    """Find, follow and cut out the faces of a video; bad bytes raise nothing.

    Args:
        data: The video's file.
        detector: Finds faces in a picture.
        options: What to crop.
        limits: Limits of the probe; None: its defaults.
    """
    info = probe(data, min_frames=1, limits=limits)
    if isinstance(info, Rejected):
        return info
    every = max(1, round(info.fps / _LOOKS_PER_SECOND))
    try:
        info, looks, cuts = _look(data, detector, info, every)
        tracks = find_tracks(looks, every, info.num_frames, info.fps, cuts)
        if not tracks:
            seen = sum(len(look.boxes) > 0 for look in looks)
            return Rejected("no_face", f"in {seen} of {len(looks)} frames looked at, none lasting")
        if options.tracks == "best":
            del tracks[1:]
        return Cropped(info, every, cuts, _cut_out(data, info, tracks, options))
    except DecodeError as error:
        return Rejected("undecodable", error.found)


def _look(
    data: bytes, detector: Detector, info: VideoInfo, every: int
) -> tuple[VideoInfo, list[Detections], list[int]]:
    """Return the video as it decoded, detections on every `every`-th frame, and its cuts."""
    looks: list[Detections] = []
    cuts = CutDetector()
    count, width, height = 0, info.width, info.height
    for count, frame in enumerate(read_upright_frames(data), start=1):
        width, height = frame.width, frame.height
        cuts.add(frame.rgb(_CUT_PIXELS))
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
    squares = [track_squares(track, options.margin, info.width, info.height) for track in tracks]
    writers = [Mp4Writer(options.size, info.fps) for _ in tracks]
    starts: list[float | None] = [None] * len(tracks)
    for number, frame in enumerate(read_upright_frames(data)):
        here = [i for i, t in enumerate(tracks) if 0 <= number - t.first < len(t.boxes)]
        if not here:
            continue
        rgb = frame.rgb()
        for i in here:
            seconds = None
            if not info.constant_frame_rate and frame.seconds is not None:
                starts[i] = frame.seconds if starts[i] is None else starts[i]
                seconds = frame.seconds - (starts[i] or 0.0)
            square = squares[i][number - tracks[i].first]
            writers[i].add(cut_square(rgb, square, options.size), seconds)
    files = [writer.close() for writer in writers]
    return [CutTrack(*parts) for parts in zip(tracks, squares, files, strict=True)]


def track_squares(track: Track, margin: float, width: int, height: int) -> np.ndarray:
    """Return the square to cut from each frame: float64 [T, 4], x0, y0, x1, y1, of one size.

    Args:
        track: The face.
        margin: On each side of the face, as a fraction of the face box.
        width: Width of the frame, in pixels.
        height: Height of the frame, in pixels.
    """
    face = float(np.median(sides(track.boxes)))
    side = face * (1 + 2 * margin)
    box_centers = (track.boxes[:, :2] + track.boxes[:, 2:]) / 2
    centers = box_centers - [0, _LIFT * face]
    limits = np.array([[side / 2, width - side / 2], [side / 2, height - side / 2]])
    inside = np.clip(centers, limits.min(axis=1), limits.max(axis=1))
    # As far as the face's box stays in the square, and never further out than it was.
    room = (side - (track.boxes[:, 2:] - track.boxes[:, :2])).clip(0) / 2
    low, high = np.minimum(box_centers - room, centers), np.maximum(box_centers + room, centers)
    shifted = np.clip(inside, low, high)
    return np.concatenate([shifted - side / 2, shifted + side / 2], axis=1)


def cut_square(rgb: np.ndarray, square: np.ndarray, size: int) -> np.ndarray:
    """Return the part of a picture in a square, resized: uint8 [size, size, 3].

    Args:
        rgb: The picture, uint8 [H, W, 3].
        square: x0, y0, x1, y1 in pixels; beyond the picture, its edge is repeated.
        size: Pixels of a side of the result.
    """
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = square
    left, top = max(0, int(np.ceil(-x0))), max(0, int(np.ceil(-y0)))
    right, bottom = max(0, int(np.ceil(x1 - width))), max(0, int(np.ceil(y1 - height)))
    if left or top or right or bottom:
        rgb = np.pad(rgb, ((top, bottom), (left, right), (0, 0)), mode="edge")
    box = (x0 + left, y0 + top, x1 + left, y1 + top)
    # To fractions of a pixel: whole pixels of a small face would make it tremble.
    picture = Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(picture)


class Mp4Writer:
    """Encodes pictures to an mp4; equal pictures give equal bytes.

    Args:
        size: Width and height of the pictures, even.
        fps: Rate at which a player shows them.
    """

    def __init__(self, size: int, fps: float) -> None:
        self._bytes = io.BytesIO()
        # Bit-exact: without it the file has the encoder's version.
        self._container = av.open(self._bytes, "w", format="mp4", options={"fflags": "+bitexact"})
        rate = Fraction(fps).limit_denominator(1001)
        stream = self._container.add_stream("libx264", rate=rate, options=_ENCODER)
        assert isinstance(stream, VideoStream)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, _TICKS_PER_SECOND)
        self._stream, self._rate, self._num_frames, self._last_tick = stream, rate, 0, -1

    def add(self, rgb: np.ndarray, seconds: float | None = None) -> None:
        """Add a picture.

        Args:
            rgb: uint8 [size, size, 3].
            seconds: When it is shown, from the first one; None: by the rate.
        """
        exact = self._num_frames / self._rate if seconds is None else seconds
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        frame.time_base = Fraction(1, _TICKS_PER_SECOND)
        frame.pts = max(round(exact * _TICKS_PER_SECOND), self._last_tick + 1)
        self._num_frames, self._last_tick = self._num_frames + 1, frame.pts
        self._container.mux(self._stream.encode(frame))

    def close(self) -> bytes:
        """Finish the file and return its bytes."""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._bytes.getvalue()


class CutDetector:
    """Finds where a video cuts to another shot, from small pictures of all its frames.

    Within a shot a frame resembles the one before it, and where a camera shakes or pans, all
    differences nearby are large. So a cut is a difference that is large in itself and several
    times the differences around it, and that lasts: after a flash the picture is what it was. (As
    PySceneDetect's AdaptiveDetector; the last condition is ours.) Slow fades are not cuts: a face
    on both sides is followed through them, and another one is distinguished by its place.
    """

    def __init__(self) -> None:
        self._last: list[np.ndarray] = []  # two pictures
        self._to_one_before: list[float] = []  # the difference of each frame
        self._to_two_before: list[float] = []

    def add(self, rgb: np.ndarray) -> None:
        """Add the next frame.

        Args:
            rgb: Small picture of it, uint8 [h, w, 3], of the same size as all others.
        """
        small = rgb.astype(np.int16)
        differences = [float(np.abs(small - other).mean()) for other in self._last[::-1]]
        one, two = [*differences, 0.0, 0.0][:2]
        self._to_one_before.append(one)
        self._to_two_before.append(two)
        self._last = [*self._last, small][-2:]

    def found(self) -> list[int]:
        """Return the numbers of the first frames of all shots but the first, ascending."""
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
