"""What a video is, as probing finds it and as a sample's JSON member records it.

In: a sample's `.json` member. Out: `VideoInfo`, and back. The keys in the JSON are those of shard
format 1: `order` for `VideoInfo.layout`, and "centre" for the region "center".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from svfap_dist.errors import DecodeError

STORED_REGIONS = {"center": "centre"}  # names of regions that shard format 1 spells otherwise

LEAVE_OUT = "leave this video out when sharding"

# Containers that a sample's video may have; the suffix of its member in the tar is one of these.
VIDEO_SUFFIXES = ("mp4", "mkv", "webm", "avi", "mov", "flv", "m4v")


class TooShortError(DecodeError):
    """The video is shorter than a clip, or ends before a wanted frame."""

    reason = "too_short"


@dataclasses.dataclass(frozen=True)
class PhaseLayout:
    """How the frames of a video of the `train` profile are stored, so that a reader can seek to
    the packets it needs without opening the container.

    Frames are stored phase by phase: 0, P, 2P, ..., then 1, P + 1, ..., for P phases, which makes
    the frames of a window of stride P adjacent. Each phase begins with a key frame, and within it
    every `group`-th frame is one. Every packet holds one frame, and packets are contiguous.
    """

    phases: int
    group: int
    codec_header: str  # set-up of the decoder (FFmpeg's extradata), base64
    first_byte: int  # offset of the first packet in the file
    packet_sizes: tuple[int, ...]  # in stored order
    region: str  # part of the source's frames that was kept, one of `views.REGIONS`
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


def stored_positions(info: VideoInfo, numbers: Sequence[int]) -> list[int]:
    """Return where frames of a phase-ordered video are stored.

    Args:
        info: what the shard says about the video.
        numbers: frame numbers in any order.

    Raises:
        TooShortError: there is no such frame.
    """
    assert info.layout is not None
    for number in (min(numbers), max(numbers)):
        if not 0 <= number < info.num_frames:
            raise too_short(f"frame {number}", f"{info.num_frames} frames")
    return [stored_position(n, info.num_frames, info.layout.phases) for n in numbers]


def too_short(where: str, found: str) -> TooShortError:
    """Return the error for a video that ends before a wanted frame.

    Args:
        where: time or number of the frame.
        found: how long the video is.
    """
    return TooShortError("Video ends before a wanted frame", where=where, found=found, do=LEAVE_OUT)


def load_info(raw: bytes) -> VideoInfo:
    """Parse a sample's `.json` member.

    Args:
        raw: its bytes.

    Raises:
        ValueError, KeyError, TypeError: it is not one.
    """
    fields = json.loads(raw)
    layout = fields.pop("order", None)
    if layout is not None:
        names = {stored: name for name, stored in STORED_REGIONS.items()}
        layout["region"] = names.get(layout["region"], layout["region"])
        layout["packet_sizes"] = tuple(layout["packet_sizes"])
        layout = PhaseLayout(**layout)
    return VideoInfo(**fields, layout=layout)


def dump_info(info: VideoInfo) -> bytes:
    """Return a sample's `.json` member; equal values give equal bytes.

    Args:
        info: what to record.
    """
    fields = dataclasses.asdict(info)
    fields["order"] = layout = fields.pop("layout")
    if layout is not None:
        layout["region"] = STORED_REGIONS.get(layout["region"], layout["region"])
    return json.dumps(fields, sort_keys=True).encode()
