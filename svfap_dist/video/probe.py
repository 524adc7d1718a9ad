"""Probing: what the video in a file is, or why it cannot be used.

A broken video found here costs one line of a list; found in training it costs a decoder that
crashes or hangs on a GPU node. So every video is opened, all its packets are read, and its first
frame is decoded before it goes into a shard. Frames are counted by packets, which is a hundred
times cheaper than decoding and exact for the codecs of the table below; others are decoded whole.

In: the bytes of a file. Out: `VideoInfo` or `Rejected`. A file is truncated if its outermost
structure reaches beyond its end (`structure`), its last packet is incomplete, or its packets end
well before the declared duration. FFmpeg does not report the first: it plays what is there.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Literal

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from svfap_dist.errors import DecodeError
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.orientation import UPRIGHT, exchanges_sides, orientation_of
from svfap_dist.video.pyav import decode_from_key, open_video, video_stream
from svfap_dist.video.structure import impossible_table, missing_bytes
from svfap_dist.video.timeline import frame_rate, frame_times, has_pts, is_seekable, packet_times

Reason = Literal[
    "misplaced",  # not where the layout of the source has its videos
    "missing",  # listed by the source, gone when it was read
    "empty",  # no bytes
    "unreadable",  # not a video file of a known container
    "truncated",  # the file ends before the video does
    "no_video_stream",  # audio or pictures only
    "undecodable",  # no frame can be decoded
    "odd_rate",  # no frame rate, or one that no camera has
    "too_big",  # a larger file than `Limits` allow
    "too_small",  # too few pixels to store for training
    "too_large",  # more pixels per frame than `Limits` allow
    "too_long",  # a longer video than `Limits` allow
    "too_short",  # fewer frames than the training window needs
    "no_face",  # nothing to crop
    "hung",  # not read and examined in time
    "crashed",  # ended the process that examined it
    "out_of_memory",  # needed more memory than `Limits` allow
]

MIN_FRAMES = 61  # the method's window: 16 frames, 4 apart: 15 * 4 + 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a video may cost before it is left out; a few bytes can declare hours of huge frames."""

    pixels: int = 8192 * 4320  # of a frame: 8K
    duration: int = 3600  # seconds of video
    file_bytes: int = 2**30
    seconds: int = 60  # of work on one video, and more by its size:
    seconds_per_mib: int = 2
    memory_bytes: int = 8 * 2**30  # address space of the process that does the work

    @property
    def frames(self) -> int:
        """Return the most frames that a video may have."""
        return self.duration * _HIGHEST_RATE


_FIRST_PACKETS = 64  # looked at for where a stream begins
_LOWEST_RATE, _HIGHEST_RATE = 1, 240  # frames per second; what cameras of faces deliver

# Codecs whose every packet holds exactly one frame that is shown. (VP8 has packets with none.)
_ONE_FRAME_PER_PACKET = {"h264", "hevc", "vp9", "av1", "mjpeg"}
# Containers round the duration, and sound may end a little after the picture.
_DURATION_SLACK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Rejected:
    """Why a video is left out: a reason of the fixed list, and details."""

    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True)
class _Packets:
    """What all packets of a video stream show; times: of its frames, ascending, in ticks."""

    times: list[int]
    starts_with_keyframe: bool
    is_seekable: bool
    ends_corrupt: bool
    end_seconds: float  # latest end of a packet of any stream


def probe(
    data: bytes, min_frames: int = MIN_FRAMES, limits: Limits | None = None
) -> VideoInfo | Rejected:
    """Return what the video in a file is, or why it is left out; never raise for its content.

    It may hang, or need too much memory: run it in a process with `Limits`.

    Args:
        data: bytes of the file.
        min_frames: shorter videos are left out.
        limits: what a video may cost; None: the defaults.
    """
    limits = limits or Limits()
    if refused := _refuse_unopened(data, limits):
        return refused
    try:
        with open_video(data, max_pixels=limits.pixels) as container:
            try:
                video = video_stream(container)
            except DecodeError as error:
                return Rejected("no_video_stream", error.found)
            return _probe_stream(data, container, video, min_frames, limits)
    except (FFmpegError, ValueError, OverflowError) as error:
        return Rejected("unreadable", _describe(error))


def _refuse_unopened(data: bytes, limits: Limits) -> Rejected | None:
    if not data:
        return Rejected("empty", "0 bytes")
    if len(data) > limits.file_bytes:
        return Rejected("too_big", f"{len(data)} bytes, more than {limits.file_bytes}")
    if missing := missing_bytes(data):
        return Rejected("truncated", missing)
    if excess := impossible_table(data):
        return Rejected("unreadable", excess)
    return None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def _probe_stream(
    data: bytes, container: InputContainer, video: VideoStream, min_frames: int, limits: Limits
) -> VideoInfo | Rejected:
    context = video.codec_context
    if context.width * context.height > limits.pixels:
        return Rejected("too_large", f"{context.width}x{context.height} pixels")
    declared = (container.duration or 0) / av.time_base
    if declared > limits.duration:
        return Rejected("too_long", f"declares {declared:.0f} s, more than {limits.duration}")
    packets = _read_packets(container, video, limits.frames)
    if packets is None:
        return Rejected("too_long", f"more than {limits.frames} frames")
    if cut := _find_cut(container, video, packets):
        return Rejected("truncated", cut)
    countable = packets.starts_with_keyframe and packets.is_seekable
    countable = countable and context.name in _ONE_FRAME_PER_PACKET
    decoded = _decode(data, limits, packets.is_seekable, stop_after=1 if countable else None)
    if isinstance(decoded, Rejected):
        return decoded
    times = packets.times if countable else decoded.times
    fps, constant = frame_rate(
        times,
        video.time_base or Fraction(1, 1000),
        [video.base_rate, video.average_rate, video.guessed_rate],
    )
    width, height = context.width, context.height
    if exchanges_sides(decoded.orientation):
        width, height = height, width
    info = VideoInfo(
        len(times),
        fps,
        width,
        height,
        context.name,
        constant,
        orientation=decoded.orientation,
        seekable=packets.is_seekable,
    )
    return _exceeded_limit(info, min_frames, limits) or info


def _exceeded_limit(info: VideoInfo, min_frames: int, limits: Limits) -> Rejected | None:
    """Return why a video that can be decoded is left out; None: it is not."""
    if info.num_frames < min_frames:
        return Rejected("too_short", f"{info.num_frames} frames, fewer than {min_frames}")
    if not _LOWEST_RATE <= info.fps <= _HIGHEST_RATE:
        found = f"{info.fps:g} frames per second" if info.fps else "no rate and no time stamps"
        return Rejected("odd_rate", found)
    if info.num_frames > info.fps * limits.duration:
        seconds = info.num_frames / info.fps
        return Rejected("too_long", f"{seconds:.0f} s, more than {limits.duration}")
    return None


def _read_packets(
    container: InputContainer, video: VideoStream, max_frames: int
) -> _Packets | None:
    """Read all packets; None if there are more than `max_frames`."""
    shown: list[Packet] = []
    first: list[Packet] = []
    end_seconds, corrupt = 0.0, False
    for packet in container.demux():
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.size == 0 or time is None or packet.time_base is None:
            continue  # the flush at the end of each stream, or a frame that an AVI file left out
        end = float((time + (packet.duration or 0)) * packet.time_base)
        end_seconds = max(end_seconds, end)
        if packet.stream.index == video.index:
            corrupt = packet.is_corrupt
            if len(first) < _FIRST_PACKETS:
                first.append(packet)
            # An edit list hides packets that are only there to decode later ones from.
            if not packet.is_discard:
                shown.append(packet)
                if len(shown) > max_frames:
                    return None
    times = sorted(packet_times(shown, container))
    keyframe = bool(shown) and shown[0].is_keyframe
    return _Packets(times, keyframe, is_seekable(container, first), corrupt, end_seconds)


def _find_cut(container: InputContainer, video: VideoStream, packets: _Packets) -> str | None:
    if packets.ends_corrupt:
        return f"packet {len(packets.times)} is incomplete"
    declared_end = 0.0
    if container.duration is not None:
        # Matroska's duration counts from time 0, however late the first frame is.
        is_late = container.format.name != "matroska,webm"
        start = max(container.start_time or 0, 0) if is_late else 0
        declared_end = (start + container.duration) / av.time_base
    if container.format.name == "avi" and video.average_rate:
        # The duration that FFmpeg gives for a cut AVI file shrinks with the file.
        declared_end = max(declared_end, float(video.frames / video.average_rate))
    if packets.end_seconds < declared_end - _DURATION_SLACK_SECONDS:
        return f"packets end at {packets.end_seconds:.2f} s of {declared_end:.2f} s declared"
    return None


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """What the frames that can be decoded say; times: ascending, in ticks."""

    times: list[int]
    orientation: int  # of the first one


def _decode(
    data: bytes, limits: Limits, is_seekable: bool, stop_after: int | None
) -> _Decoded | Rejected:
    """Return what can be decoded, at most `stop_after` frames."""
    times: list[int] = []
    orientation = UPRIGHT
    try:
        with open_video(data, max_pixels=limits.pixels) as container:
            stream = video_stream(container)
            frames = container.decode(stream)
            if not is_seekable:
                frames = decode_from_key(container, stream)
            for time, frame in frame_times(frames, has_pts(container)):
                # A container may announce a small picture and hold a huge one.
                if frame.width * frame.height > limits.pixels:
                    return Rejected("too_large", f"{frame.width}x{frame.height} pixels")
                if len(times) == limits.frames:
                    return Rejected("too_long", f"more than {limits.frames} frames")
                if not times:
                    orientation = orientation_of(frame)
                times.append(time)
                if len(times) == stop_after:
                    break
    except FFmpegError as error:
        return Rejected("undecodable", f"after {len(times)} frames: {_describe(error)}")
    if not times:
        return Rejected("undecodable", "no frame came out of the decoder")
    return _Decoded(sorted(times), orientation)
