"""Transcode a video for the profile `train`: the same frames, stored for fast training.

Decoding dominates the cost of loading clips, and most of it is wasted on usual videos: pixels
outside the region, frames between those of a strided window, and frames before it. So the region
is cut out here once, and frames are stored phase by phase (`PhaseLayout`), which makes the frames
of a window adjacent, with a key frame every `group` of them; the sample's JSON states where each
packet is. The result is nevertheless an ordinary mp4, whose frames are shown in another order.

In: bytes of a video and its `VideoInfo`. Out: an mp4 and its `VideoInfo`. Frames stay in the planes
they are decoded to, at a constant rate: no color conversion costs quality, and the source's color
description is copied. Equal bytes in give equal bytes out: one thread, and nothing that names the
encoder or the time. No macroblock tree: with it, x264 165 sometimes gives other bytes for the same
frames.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import math
import tempfile
from collections.abc import Sequence
from typing import IO, Any, Literal, cast

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.video.frames import MATRICES, Colors, check_frame, crop_planar_420, to_planar_420
from svfap_dist.video.info import (
    REGIONS,
    STORED_REGIONS,
    Crop,
    PhaseFile,
    PhaseLayout,
    Region,
    VideoInfo,
    dump_info,
    load_info,
    region_crop,
    region_name,
)
from svfap_dist.video.orientation import turn_frame
from svfap_dist.video.probe import Reason
from svfap_dist.video.pyav import decoded_frames, open_video
from svfap_dist.video.timeline import exact_rate

_IN_MEMORY_BYTES = 256 << 20  # planes of a video beyond this are spooled to a temporary file
_MAX_BYTES = 8 << 30  # of planes: two and a half hours of 160 x 160 at 25 frames per second
_SEI = 6  # H.264's units of side information: here the encoder's name and settings

# Training compares pixels: what only pleases the eye (psy, adaptive quantization) costs bytes.
# mbtree: see above. keyint, scenecut: key frames only where planned.
_X264 = "psy=0:aq-mode=0:trellis=2:weightp=2:mbtree=0:keyint=infinite:scenecut=0"


@dataclasses.dataclass(frozen=True)
class TrainProfile:
    """How videos are stored for training; recorded in the manifest, as it decides the bytes."""

    # Part of the frames that is kept; None: the source's default (`pipeline.shard`).
    region: Region | None = "voxceleb2"
    size: int | None = None  # frames are resized to size x size pixels; None: not resized
    phases: int = 4  # stride of the windows whose frames are adjacent
    group: int = 20  # minimum frames of a phase that share a key frame; all of a shorter phase
    crf: float = 25  # x264's quality; lower is better
    preset: str = "medium"  # x264's effort
    # Of a shard; phases: a section of the tar for each phase; samples: all of a video in one place.
    # None: as the data set has it already, "phases" for a new one.
    layout: Literal["phases", "samples"] | None = None

    def __post_init__(self) -> None:
        if self.region is not None and region_name(self.region) not in REGIONS:
            fix = f"use one of: {', '.join(REGIONS)}"
            raise ConfigError("Unknown region", "--region", self.region, fix)
        if self.size is not None and (self.size < 16 or self.size % 2):
            fix = "use an even size, 16 or more"
            raise ConfigError("Option out of range", "--size", str(self.size), fix)
        if not 0 <= self.crf <= 51:
            raise ConfigError("Option out of range", "--crf", str(self.crf), "use 0 to 51")

    @property
    def num_parts(self) -> int:
        """Parts of a sample in a shard."""
        return 1 if self.layout == "samples" else self.phases

    def stored(self) -> dict[str, Any]:
        """Return the fields as the manifest has them; shard format 1 has no layout."""
        assert self.region is not None
        fields = {
            **dataclasses.asdict(self),
            "region": STORED_REGIONS.get(self.region, self.region),
            "layout": "phases",
        }
        if self.num_parts == 1:
            del fields["layout"]
        return fields


class TranscodeError(DecodeError):
    """A video that cannot be stored for training: `reason` is for lists, `found` for details."""

    @property
    def reason(self) -> Reason:
        """Return why it cannot be stored."""
        return cast(Reason, self.what)


def _refused(reason: Reason, found: str) -> TranscodeError:
    return TranscodeError(reason, found=found, do="leave this video out")


def transcode(data: bytes, info: VideoInfo, profile: TrainProfile) -> tuple[bytes, VideoInfo]:
    """Return a video as a profile stores it: an mp4 and its `VideoInfo`.

    Args:
        data: Bytes of the source.
        info: What `probe` found it to be.
        profile: How to store it.

    Raises:
        TranscodeError: it cannot be decoded throughout, is too long or has too few pixels.
    """
    assert profile.region is not None
    crop = region_crop(profile.region, info.height, info.width)
    # Whole chroma samples: even offsets and sides, at most a pixel off.
    crop = Crop(crop.top & ~1, crop.left & ~1, crop.height & ~1, crop.width & ~1)
    height, width = (profile.size, profile.size) if profile.size else (crop.height, crop.width)
    if min(height, width) < 2:
        raise _refused("too_small", f"{info.width}x{info.height} pixels")
    if height * width * 3 // 2 * info.num_frames > _MAX_BYTES:
        raise _refused("too_long", f"{info.num_frames} frames of {width}x{height} pixels")
    plan, group = _plan_frames(info.num_frames, profile)
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, prefix="svfap-transcode-") as spool:
        try:
            colors = _spool_planes(data, info, crop, profile.size, spool)
        except TranscodeError:
            raise
        except (FFmpegError, DecodeError) as error:
            raise _refused("undecodable", f"{type(error).__name__}: {error}") from error
        video = _encode(spool, plan, info, profile, (height, width), colors)
    header, packets = _read_back(video, plan)
    with open_video(video) as container:
        decoded = sum(not frame.is_corrupt for frame in container.decode(video=0))
    assert decoded == len(plan), "every frame can be decoded"
    layout = PhaseLayout(
        phases=profile.phases,
        group=group,
        codec_header=base64.b64encode(header).decode(),
        files=(PhaseFile(packets[0].pos or 0, tuple(packet.size for packet in packets)),),
        region=region_name(profile.region),
        **dataclasses.asdict(crop),
        source_height=info.height,
        source_width=info.width,
    )
    return video, VideoInfo(
        info.num_frames, info.fps, width, height, "h264", labels=info.labels, layout=layout
    )


def split_phases(video: bytes, info: VideoInfo) -> list[tuple[bytes, VideoInfo]]:
    """Return each phase of a transcoded video as an mp4 of its own, at its part of the frame rate.

    Packets are copied, not encoded again. A video of fewer frames than phases has fewer files.

    Args:
        video: File with all phases.
        info: What `transcode` says about it.
    """
    layout = info.layout
    assert layout is not None
    files: list[tuple[bytes, VideoInfo]] = []
    made: list[bytes] = []
    with open_video(video, probed=True) as source:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        rest = iter(packets)
        for phase in range(min(layout.phases, info.num_frames)):
            count = len(range(phase, info.num_frames, layout.phases))
            target = io.BytesIO()
            with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
                copy = container.add_stream_from_template(stream)
                for number, packet in enumerate(itertools.islice(rest, count)):
                    packet.duration = layout.phases * (packet.duration or 0)
                    packet.pts = packet.dts = number * packet.duration
                    packet.stream = copy
                    container.mux(packet)
            plan = [(number, number % layout.group == 0) for number in range(count)]
            header, copies = _read_back(target.getvalue(), plan)
            assert base64.b64encode(header).decode() == layout.codec_header
            made += map(bytes, copies)
            file = PhaseFile(copies[0].pos or 0, tuple(packet.size for packet in copies), phase)
            own = dataclasses.replace(info, layout=dataclasses.replace(layout, files=(file,)))
            assert load_info(dump_info(own), target.getvalue()) == own, "it can be read back"
            files.append((target.getvalue(), own))
        assert made == list(map(bytes, packets)), "no byte of a packet changes"
    return files


def _plan_frames(num_frames: int, profile: TrainProfile) -> tuple[list[tuple[int, bool]], int]:
    """Return (frame number, whether a key frame) in stored order, and the frames of a group.

    Groups divide a phase evenly, because a key frame near its end would serve few windows, and key
    frames cost the most bytes and time.
    """
    longest = math.ceil(num_frames / profile.phases)
    group = math.ceil(longest / max(longest // profile.group, 1))
    numbers = sorted(range(num_frames), key=lambda number: (number % profile.phases, number))
    return [(number, number // profile.phases % group == 0) for number in numbers], group


def _spool_planes(
    data: bytes, info: VideoInfo, crop: Crop, size: int | None, spool: IO[bytes]
) -> Colors:
    """Write the planes y, u, v of all frames, cropped and resized, one after the other."""
    colors: Colors | None = None
    turner, converter, scaler = VideoReformatter(), VideoReformatter(), VideoReformatter()
    for frame in decoded_frames(data, info, range(info.num_frames), whole=True):
        check_frame(frame, info, f"time stamp {frame.pts}")
        shown = turn_frame(frame, info.orientation, turner)
        planar, seen = to_planar_420(shown, converter)
        if seen != (colors := colors or seen):
            raise _refused("undecodable", f"colors change from {colors} to {seen}")
        cut = crop_planar_420(planar, crop)
        if size is not None:
            cut = scaler.reformat(
                cut, width=size, height=size, interpolation=Interpolation.BICUBIC, threads=1
            )
        spool.write(cut.to_ndarray().tobytes())  # [H * 3 / 2, W]
    assert colors is not None, "there is at least one frame"
    return colors


def _encode(
    spool: IO[bytes],
    plan: Sequence[tuple[int, bool]],
    info: VideoInfo,
    profile: TrainProfile,
    size: tuple[int, int],
    colors: Colors,
) -> bytes:
    """Return the mp4 of the spooled frames that `plan` lists: (number, whether a key frame)."""
    height, width = size
    frame_bytes = height * width * 3 // 2
    file = io.BytesIO()
    # bitexact: no name and no time of the writer.
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = _add_stream(container, info, profile, colors)
        stream.width, stream.height = width, height
        no_names = BitStreamFilterContext(f"filter_units=remove_types={_SEI}", stream)
        for position, (number, key) in enumerate(plan):
            spool.seek(number * frame_bytes)
            packed = np.frombuffer(spool.read(frame_bytes), np.uint8).reshape(-1, width)
            frame = av.VideoFrame.from_ndarray(packed, format="yuv420p")
            frame.pts, frame.time_base = position, stream.codec_context.time_base
            frame.pict_type = PictureType.I if key else PictureType.P
            for packet in stream.encode(frame):
                container.mux(no_names.filter(packet))
        for packet in stream.encode():
            container.mux(no_names.filter(packet))
    return file.getvalue()


def _add_stream(
    container: OutputContainer, info: VideoInfo, profile: TrainProfile, colors: Colors
) -> VideoStream:
    rate = exact_rate(info.fps)
    settings = {
        "preset": profile.preset,
        "crf": str(profile.crf),
        "tune": "fastdecode",
        "bf": "0",
        "forced-idr": "1",
        "x264-params": _X264,
    }
    stream = cast(VideoStream, container.add_stream("libx264", rate=rate, options=settings))
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.thread_count = 1
    stream.time_base = context.time_base = 1 / rate
    context.colorspace = MATRICES[colors.matrix].codes[0]
    context.color_range = ColorRange.JPEG if colors.full_range else ColorRange.MPEG
    return stream


def _read_back(video: bytes, plan: Sequence[tuple[int, bool]]) -> tuple[bytes, list[av.Packet]]:
    """Return codec header and packets of a finished file, checked against the layout's promises."""
    with open_video(video) as container:
        stream = container.streams.video[0]
        header = stream.codec_context.extradata or b""
        packets = [packet for packet in container.demux(stream) if packet.size]
    assert len(packets) == len(plan), "every packet holds one frame"
    end = packets[0].pos
    assert end is not None
    for position, (packet, (_, key)) in enumerate(zip(packets, plan, strict=True)):
        assert packet.pts == packet.dts, "frames are decoded in the order of the file"
        assert packet.pos == end, "packets are contiguous"
        assert packet.is_keyframe == key, f"frame {position} is a key frame or not as planned"
        end += packet.size
    return header, packets
