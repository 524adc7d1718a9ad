"""What a video is, and which part of it is used: a region of its frames, windows in time, crops.

`VideoInfo` is what probing finds and what a sample's `.json` member records. The keys in the JSON
are those of the shard format: `order` for `VideoInfo.layout`, and "centre" for the region "center".

The rest are pure functions of a video's length and size. Pre-training takes one random window of
the region. Testing a task, prediction and feature extraction take K windows times N crops
("views"), or cover the whole video. A video that is shorter than a window is one window that
repeats the last frame, as VideoMAE's released test code has it (arXiv 2203.12602). A video of one
frame is a still image, which all of these repeat.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import numpy as np

from svfap_dist.errors import ConfigError, DecodeError

STORED_REGIONS = {"center": "centre"}  # names of regions that shard format 1 spells otherwise

LEAVE_OUT = "leave this video out when sharding"

# Containers that a sample's video may have; the suffix of its member in the tar is one of these.
VIDEO_SUFFIXES = (
    *("mp4", "mkv", "webm", "avi", "mov", "flv", "m4v", "3gp", "3g2", "asf", "f4v", "m2ts"),
    *("mpeg", "mpg", "mts", "ogv", "qt", "ts", "vob", "wmv"),
)


class TooShortError(DecodeError):
    """The video is shorter than a clip, or ends before a wanted frame."""

    reason = "too_short"


class PhaseFile(NamedTuple):
    """A file with frames of a `PhaseLayout`, one per packet; the packets are contiguous."""

    first_byte: int  # offset of the first packet in the file
    packet_sizes: tuple[int, ...]  # in stored order
    phase: int | None = None  # whose frames it holds; None: those of all phases, one after another
    begin: int = 0  # offset of the file, where several follow each other


@dataclasses.dataclass(frozen=True)
class PhaseLayout:
    """How the frames of a video of the `train` profile are stored.

    With it a reader seeks to the packets it needs without opening the container.
    Frames are stored phase by phase: 0, P, 2P, ..., then 1, P + 1, ..., for P phases, which makes
    the frames of a window of stride P adjacent. Each phase begins with a key frame, and within it
    every `group`-th frame is one. All phases are in one file, or each is in a file of its own; then
    the video may consist of some of them only.
    """

    phases: int
    group: int
    codec_header: str  # set-up of the decoder (FFmpeg's extradata), base64
    files: tuple[PhaseFile, ...]
    region: str  # part of the source's frames that was kept, one of `REGIONS`
    top: int  # of that part, in pixels of the source
    left: int
    height: int
    width: int
    source_height: int
    source_width: int


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video is."""

    num_frames: int
    fps: float
    width: int
    height: int
    codec: str  # FFmpeg's name
    constant_frame_rate: bool = True  # frame i is shown at i / fps (CFR); else the rate varies
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)  # identity, expression, ...
    layout: PhaseLayout | None = None  # None: frames are stored in presentation order
    # How stored frames are turned to be shown, Exif's number (`orientation`); 1: not at all. Width
    # and height are as shown.
    orientation: int = 1
    seekable: bool = True  # False: frames are those that a decoder gives from the first packet on

    @property
    def is_plain(self) -> bool:
        """Return whether its frames are those of its packets, as they are stored."""
        return self.orientation == 1 and self.seekable


_USUAL = {"orientation": 1, "seekable": True}


def stored_position(frame: int, num_frames: int, phases: int) -> int:
    """Return the position in a phase-ordered stream of a frame.

    Args:
        frame: number of the frame in presentation order, from 0.
        num_frames: frames of the video.
        phases: phases of its layout.
    """
    phase, number = frame % phases, frame // phases
    longer = min(phase, num_frames % phases)  # phases before this one that have one frame more
    return phase * (num_frames // phases) + longer + number


class StoredFrame(NamedTuple):
    """Where a frame of a phase-ordered video is."""

    file: int  # index in `PhaseLayout.files`
    position: int  # of its packet in the file
    after_key: int  # packets from its key frame to it


def stored_frames(info: VideoInfo, numbers: Sequence[int]) -> list[StoredFrame]:
    """Return where frames of a phase-ordered video are stored.

    Args:
        info: what the shard says about the video.
        numbers: frame numbers in any order.

    Raises:
        TooShortError: there is no such frame.
        DecodeError: its phase is not among the files.
    """
    layout = info.layout
    assert layout is not None
    for number in (min(numbers), max(numbers)):
        if not 0 <= number < info.num_frames:
            raise too_short(f"frame {number}", f"{info.num_frames} frames")
    file_of = {file.phase: index for index, file in enumerate(layout.files)}
    found = []
    for number in numbers:
        row, phase = divmod(number, layout.phases)
        if None in file_of:
            file, position = 0, stored_position(number, info.num_frames, layout.phases)
        elif phase in file_of:
            file, position = file_of[phase], row
        else:
            where = f"frame {number}, phase {phase}"
            there = f"phases {[file.phase for file in layout.files]}"
            raise DecodeError("Frame was not read", where, there, "report this as a bug")
        found.append(StoredFrame(file, position, row % layout.group))
    return found


def joined_info(infos: Sequence[VideoInfo], sizes: Sequence[int]) -> VideoInfo:
    """Return the description of a video whose phases are in files of their own.

    Args:
        infos: what the shard says about each file.
        sizes: bytes of each file; they follow each other.

    Raises:
        ValueError: they are not files of one video.
    """
    layouts = [info.layout for info in infos]
    files = [layout.files[0] for layout in layouts if layout is not None]
    begins = itertools.accumulate(sizes, initial=0)
    moved = tuple(file._replace(begin=begin) for file, begin in zip(files, begins, strict=False))
    joined = [
        dataclasses.replace(info, layout=layout and dataclasses.replace(layout, files=moved))
        for info, layout in zip(infos, layouts, strict=True)
    ]
    if len(files) < len(infos) or any(info != joined[0] for info in joined):
        raise ValueError("files of different videos")
    return joined[0]


def separate_files(video: bytes, info: VideoInfo) -> list[tuple[bytes, VideoInfo]]:
    """Return the files of a video, each with its description: the inverse of `joined_info`.

    Args:
        video: bytes of all of them, one after another.
        info: what the shard says about them.
    """
    layout = info.layout
    if layout is None:
        return [(video, info)]
    borders = itertools.pairwise([*(file.begin for file in layout.files), len(video)])
    own = (dataclasses.replace(layout, files=(file._replace(begin=0),)) for file in layout.files)
    return [
        (video[start:stop], dataclasses.replace(info, layout=of_file))
        for (start, stop), of_file in zip(borders, own, strict=True)
    ]


def too_short(where: str, found: str) -> TooShortError:
    """Return the error for a video that ends before a wanted frame.

    Args:
        where: time or number of the frame.
        found: how long the video is.
    """
    return TooShortError("Video ends before a wanted frame", where=where, found=found, do=LEAVE_OUT)


def load_info(raw: bytes, video: bytes = b"") -> VideoInfo:
    """Parse a sample's `.json` member.

    Args:
        raw: its bytes.
        video: the file that it describes. Without it, the packet sizes of a single phase are
            unknown.

    Raises:
        ValueError, KeyError, TypeError: it is not valid.
    """
    fields = json.loads(raw)
    layout = fields.pop("order", None)
    if layout is not None:
        layout["region"] = region_name(layout["region"])
        first, phase = layout.pop("first_byte"), layout.pop("phase", None)
        sizes = layout.pop("packet_sizes", None) or _mp4_packet_sizes(video)
        layout = PhaseLayout(**layout, files=(PhaseFile(first, tuple(sizes), phase),))
    info = VideoInfo(**fields, layout=layout)
    if info.orientation not in range(1, 9):
        raise ValueError(f"orientation {info.orientation!r}, not 1 to 8")
    return info


def dump_info(info: VideoInfo) -> bytes:
    """Return a sample's `.json` member; equal values give equal bytes.

    Args:
        info: what to record; of a phase-ordered video, about one file.
    """
    fields = dataclasses.asdict(info)
    for name, usual in _USUAL.items():  # left out, as shards had no such fields at first
        if fields[name] == usual:
            del fields[name]
    fields["order"] = layout = fields.pop("layout")
    separators = (", ", ": ")
    if layout is not None:
        (file,) = layout.pop("files")
        layout["first_byte"] = file.first_byte
        if file.phase is None:
            layout["packet_sizes"] = file.packet_sizes
        else:  # a video has several of these: what is in the mp4 is left out, to fit in 512 bytes
            layout["phase"], separators = file.phase, (",", ":")
        layout["region"] = STORED_REGIONS.get(layout["region"], layout["region"])
    return json.dumps(fields, sort_keys=True, separators=separators).encode()


def _mp4_packet_sizes(video: bytes) -> list[int]:
    """Return the sizes of the packets of an mp4 of one stream, from its table; []: no video."""
    if not video:
        return []
    # ISO/IEC 14496-12, 8.7.3.2: name, version, size that all have or 0, count, sizes. It follows
    # the packets, and nothing after it can contain its name.
    begin = video.rindex(b"stsz")
    shared, count = np.frombuffer(video, ">u4", 2, begin + 8).tolist()
    if shared * count > len(video):
        raise ValueError(f"packets of {shared * count} bytes in a video of {len(video)}")
    return [shared] * count if shared else np.frombuffer(video, ">u4", count, begin + 16).tolist()


Region = Literal["voxceleb2", "center", "full"]
REGIONS: tuple[Region, ...] = get_args(Region)

_VOXCELEB2_SIDE, _VOXCELEB2_LEFT, _VOXCELEB2_CUT = 224, 32, 160  # pixels; released code


@dataclasses.dataclass(frozen=True)
class Crop:
    """A rectangle of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


def region_name(name: str) -> Region:
    """Return today's name of a region.

    Args:
        name: a name, "centre" included, which old recipes, shards and exports have for "center".
    """
    return "center" if name == "centre" else cast(Region, name)


def region_crop(name: str, height: int, width: int) -> Crop:
    """Return the part of each frame that is used, before any random crop.

    Args:
        name: voxceleb2: rows 0-160 and columns 32-192 of 224 x 224 (released code), in proportion
            for other sizes. center: the largest centered square. full: the whole frame.
        height: rows of a frame.
        width: pixels of a row.
    """
    if name == "voxceleb2":
        rows, columns = height / _VOXCELEB2_SIDE, width / _VOXCELEB2_SIDE
        left = round(_VOXCELEB2_LEFT * columns)
        size = max(round(_VOXCELEB2_CUT * rows), 1), max(round(_VOXCELEB2_CUT * columns), 1)
        return Crop(0, left, *size)
    if region_name(name) == "center":
        side = min(height, width)
        return Crop((height - side) // 2, (width - side) // 2, side, side)
    assert name == "full", f"unknown region {name}"
    return Crop(0, 0, height, width)


def stored_region(info: VideoInfo, name: str) -> Crop:
    """Return where a region is in the stored frames: all of them if sharding has cut it out.

    Args:
        info: what the shard says about the video.
        name: of the region.

    Raises:
        ConfigError: another region was cut out.
    """
    if info.layout is None:
        return region_crop(name, info.height, info.width)
    cut = info.layout.region
    if region_name(cut) != region_name(name):
        found = f"{name}, where the shards have {cut}"
        advice = f"set data.region={cut}, or shard again with --region {name}"
        raise ConfigError("Shards were cut to another region", "data.region", found, advice)
    return Crop(0, 0, info.height, info.width)


@dataclasses.dataclass(frozen=True)
class Views:
    """The clips of a video: each of `crops` in each window, with how many coincide in it."""

    starts: Counter[int]  # first frames of the windows
    crops: Counter[Crop]

    @classmethod
    def of(cls, starts: Iterable[int], crops: Iterable[Crop]) -> Views:
        """Return the views of windows and crops, with equal ones merged.

        Args:
            starts: first frames of the windows.
            crops: rectangles, the same in each window.
        """
        return cls(Counter(starts), Counter(crops))

    @property
    def weights(self) -> np.ndarray:
        """Weight of each view in an average, the crops of a window adjacent; they sum to 1."""
        counts = np.outer(list(self.starts.values()), list(self.crops.values())).ravel()
        return counts / counts.sum()


class ClipShape(Protocol):
    """Frames, size and stride of a network's clips: `DataConfig` and `ModelInfo` have them."""

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        ...

    @property
    def frame_size(self) -> int:
        """Height and width in pixels."""
        ...

    @property
    def sampling_rate(self) -> int:
        """Distance between frames of the clip, in frames of the video."""
        ...


ChooseViews = Callable[[VideoInfo], Views]


def segment_views(shape: ClipShape, region: str, segments: int, crops: int) -> ChooseViews:
    """Return the rule of multi-view testing: windows evenly in time, squares evenly in space.

    Args:
        shape: the network's clips.
        region: part of the frames that is used, as `data.region`.
        segments: windows per video.
        crops: squares per window.
    """

    def choose(info: VideoInfo) -> Views:
        starts = segment_starts(info.num_frames, _window(shape), segments)
        return Views.of(starts, square_crops(stored_region(info, region), crops))

    return choose


def covering_views(shape: ClipShape, region: str, step: int) -> ChooseViews:
    """Return the rule of feature extraction: windows over the whole video, the middle square.

    Args:
        shape: the network's clips.
        region: part of the frames that is used, as `data.region`.
        step: frames from one window to the next; 0: end to end.

    Raises:
        ConfigError: the step is negative.
    """
    if step < 0:
        do = "give the number of frames between the starts of two clips, 0 or more"
        raise ConfigError("Negative step", "step", str(step), do)

    def choose(info: VideoInfo) -> Views:
        stride = step or shape.num_frames * shape.sampling_rate
        starts = covering_starts(info.num_frames, _window(shape), stride)
        return Views.of(starts, square_crops(stored_region(info, region), 1))

    return choose


def middle_view(shape: ClipShape, region: str) -> ChooseViews:
    """Return the rule of validation and pictures: the middle window, the whole region.

    It raises `TooShortError` for a video that is shorter than a window; a still image is repeated.

    Args:
        shape: the network's clips.
        region: part of the frames that is used, as `data.region`.
    """

    def choose(info: VideoInfo) -> Views:
        window = _window(shape)
        if 1 < info.num_frames < window:
            raise TooShortError(
                "Video is shorter than a clip's window",
                found=f"{info.num_frames} frames for a window of {window}",
                do=f"shard again with --min-frames {window}",
            )
        starts = segment_starts(info.num_frames, window, 1)
        return Views.of(starts, [stored_region(info, region)])

    return choose


def _window(shape: ClipShape) -> int:
    return (shape.num_frames - 1) * shape.sampling_rate + 1


def covering_starts(num_frames: int, window: int, step: int) -> list[int]:
    """Return starts of windows that cover a video, the last of which ends with it.

    Args:
        num_frames: frames of the video.
        window: frames that a clip spans.
        step: frames from one window to the next.
    """
    last = num_frames - window
    if last <= 0:
        return [0]
    starts = list(range(0, last + 1, step))
    return starts if starts[-1] == last else [*starts, last]


def segment_starts(num_frames: int, window: int, count: int) -> list[int]:
    """Return starts of windows spaced evenly from the beginning to the end of a video.

    Args:
        num_frames: frames of the video.
        window: frames that a clip spans.
        count: number of windows.
    """
    return _spread(count, max(num_frames - window, 0))


def clip_frames(start: int, length: int, rate: int, num_frames: int) -> list[int]:
    """Return the frame numbers of a clip; the last frame repeats beyond the end of the video.

    Args:
        start: first frame.
        length: frames of the clip.
        rate: source frames from one to the next.
        num_frames: frames of the video.
    """
    return [min(start + number * rate, num_frames - 1) for number in range(length)]


def square_crops(within: Crop, count: int) -> list[Crop]:
    """Return squares of the shorter side, spaced evenly along the longer one.

    Args:
        within: the region that is covered.
        count: number of squares.
    """
    side = min(within.height, within.width)
    down, right = _spread(count, within.height - side), _spread(count, within.width - side)
    return [
        Crop(within.top + rows, within.left + columns, side, side)
        for rows, columns in zip(down, right, strict=True)
    ]


def _spread(count: int, room: int) -> list[int]:
    """Return equally spaced offsets from 0 to `room`; a single one is in the middle."""
    return [room // 2] if count == 1 else [k * room // (count - 1) for k in range(count)]
