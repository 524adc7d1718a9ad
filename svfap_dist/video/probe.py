"""The bytes of a file -> what its video is, or why it cannot be used.

A broken video found here costs one line of a list; found in training it costs a decoder that
crashes or hangs on a GPU node. So every video is opened, all its packets are read, and its first
frame is decoded before it goes into a shard. Frames are counted by packets, which is a hundred
times cheaper than decoding and exact for the codecs of the table below; others are decoded whole.

What counts as truncated: the file's outermost structure reaches beyond its end (`containers`), the
last packet is incomplete, or the packets end well before the declared duration.
"""

from __future__ import annotations

import dataclasses
import io
from fractions import Fraction
from typing import Literal, cast

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from svfap_dist.video.containers import missing_bytes
from svfap_dist.video.info import VideoInfo

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
    "hung",  # not read and examined in time
    "crashed",  # brought the process down that examined it
    "out_of_memory",  # needed more memory than `Limits` allow
]

MIN_FRAMES = 61  # the method's window: 16 frames, 4 apart: 15 * 4 + 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a video may cost before it is left out. A few bytes can ask for hours of huge frames.

    pixels: of a frame (8K). duration: seconds of video. file_bytes: size of the file.
    seconds, seconds_per_mib: of work on one video, a start and more by its size. memory_bytes:
    address space of the process that does it.
    """

    pixels: int = 8192 * 4320
    duration: int = 3600
    file_bytes: int = 2**30
    seconds: int = 60
    seconds_per_mib: int = 2
    memory_bytes: int = 8 * 2**30

    @property
    def frames(self) -> int:
        return self.duration * _HIGHEST_RATE


_LOWEST_RATE, _HIGHEST_RATE = 1, 240  # frames per second; what cameras of faces deliver

# Only these of FFmpeg's demuxers: a playlist in disguise must not make it open other files or URLs.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv"
# Codecs whose every packet holds exactly one frame that is shown. (VP8 has packets with none.)
_ONE_FRAME_PER_PACKET = {"h264", "hevc", "vp9", "av1", "mjpeg"}
# Containers round the duration, and sound may end a little after the picture.
_DURATION_SLACK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Rejected:
    """Why a video was left out: a reason of the fixed list, and what exactly was seen."""

    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True)
class _Packets:
    """What reading all packets of a video stream showed.

    times: when frames are shown, ascending, in units of the stream's time base.
    """

    count: int
    times: list[int]
    starts_with_keyframe: bool
    ends_corrupt: bool
    end_seconds: float  # latest end of a packet of any stream


def probe(
    data: bytes, min_frames: int = MIN_FRAMES, limits: Limits | None = None
) -> VideoInfo | Rejected:
    """What the video in `data` is, or why it is left out; never raises for what the bytes hold.

    It may take longer than anybody has, or more memory: `examine` sees to that.
    """
    limits = limits or Limits()
    if not data:
        return Rejected("empty", "0 bytes")
    if len(data) > limits.file_bytes:
        return Rejected("too_big", f"{len(data)} bytes, more than {limits.file_bytes}")
    if missing := missing_bytes(data):
        return Rejected("truncated", missing)
    try:
        with open_video(data) as container:
            video = video_stream(container)
            if video is None:
                kinds = sorted({stream.type for stream in container.streams})
                return Rejected("no_video_stream", f"streams: {', '.join(kinds) or 'none'}")
            return _probe_stream(data, container, video, min_frames, limits)
    except (FFmpegError, ValueError, OverflowError) as error:
        return Rejected("unreadable", _in_words(error))


def open_video(data: bytes) -> InputContainer:
    """The container in `data`, opened by no more demuxers than the project needs.

    Raises: av.error.FFmpegError, ValueError, OverflowError for bytes that are no such container.
    """
    options = {"format_whitelist": _DEMUXERS}
    container = av.open(io.BytesIO(data), options=options, metadata_errors="replace")
    return cast(InputContainer, container)


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first stream of moving pictures, if there is one."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # a cover picture is no video
            return stream
    return None


def _in_words(error: Exception) -> str:
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
    if cut := _cut_short(container, video, packets):
        return Rejected("truncated", cut)
    countable = packets.starts_with_keyframe and context.name in _ONE_FRAME_PER_PACKET
    times = _decode(data, limits, stop_after=1 if countable else None)
    if isinstance(times, Rejected):
        return times
    if countable:
        times = packets.times
    num_frames = packets.count if countable else len(times)
    fps, constant = frame_rate(
        times if len(times) == num_frames else [],
        video.time_base or Fraction(1, 1000),
        [video.base_rate, video.average_rate, video.guessed_rate],
    )
    info = VideoInfo(num_frames, fps, context.width, context.height, context.name, constant)
    return _misfit(info, min_frames, limits) or info


def _misfit(info: VideoInfo, min_frames: int, limits: Limits) -> Rejected | None:
    """Why a video that can be decoded is left out all the same."""
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
    """All packets; None if there are more than `max_frames`."""
    shown: list[Packet] = []
    end_seconds, corrupt = 0.0, False
    for packet in container.demux():
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.size == 0 or time is None or packet.time_base is None:
            continue  # the flush at the end of each stream, or a frame that an AVI file left out
        end = float((time + (packet.duration or 0)) * packet.time_base)
        end_seconds = max(end_seconds, end)
        if packet.stream.index == video.index:
            corrupt = packet.is_corrupt
            # An edit list hides packets that are only there to decode later ones from.
            if not packet.is_discard:
                shown.append(packet)
                if len(shown) > max_frames:
                    return None
    # AVI keeps no presentation times; in decoding order the times are the same set.
    with_pts = all(packet.pts is not None for packet in shown)
    times = sorted((p.pts if with_pts else p.dts) or 0 for p in shown)
    keyframe = bool(shown) and shown[0].is_keyframe
    return _Packets(len(shown), times, keyframe, corrupt, end_seconds)


def _cut_short(container: InputContainer, video: VideoStream, packets: _Packets) -> str | None:
    if packets.ends_corrupt:
        return f"packet {packets.count} is incomplete"
    declared_end = 0.0
    if container.duration is not None:
        start = max(container.start_time or 0, 0)
        declared_end = (start + container.duration) / av.time_base
    if container.format.name == "avi" and video.average_rate:
        # The duration that FFmpeg gives for a cut AVI file shrinks with the file.
        declared_end = max(declared_end, float(video.frames / video.average_rate))
    if packets.end_seconds < declared_end - _DURATION_SLACK_SECONDS:
        return f"packets end at {packets.end_seconds:.2f} s of {declared_end:.2f} s declared"
    return None


def _decode(data: bytes, limits: Limits, stop_after: int | None) -> list[int] | Rejected:
    """Times of the frames that can be decoded, ascending, at most `stop_after`."""
    times: list[int] = []
    try:
        with open_video(data) as container:
            video = video_stream(container)
            assert video is not None, "the same bytes had a video stream a moment ago"
            video.codec_context.thread_count = 1
            for frame in container.decode(video):
                # A container may announce a small picture and hold a huge one.
                if frame.width * frame.height > limits.pixels:
                    return Rejected("too_large", f"{frame.width}x{frame.height} pixels")
                if len(times) == limits.frames:
                    return Rejected("too_long", f"more than {limits.frames} frames")
                times.append(frame.pts if frame.pts is not None else len(times))
                if len(times) == stop_after:
                    break
    except FFmpegError as error:
        return Rejected("undecodable", f"after {len(times)} frames: {_in_words(error)}")
    return sorted(times) or Rejected("undecodable", "no frame came out of the decoder")


def frame_rate(
    times: list[int], time_base: Fraction, declared: list[Fraction | None]
) -> tuple[float, bool]:
    """Frames per second, and whether frame i is shown at i / fps to within one tick.

    Args:
        times: when frames are shown, ascending, in ticks; empty if unknown.
        time_base: seconds per tick.
        declared: rates that the container names, best first; tried before the measured one.
    """
    rates = [rate for rate in declared if rate]
    if len(times) < 2 or times[-1] == times[0]:
        return (float(rates[0]), True) if rates else (0.0, False)
    measured = Fraction(len(times) - 1) / ((times[-1] - times[0]) * time_base)
    for rate in [*rates, measured]:
        ticks_per_frame = 1 / (rate * time_base)
        if all(abs(t - times[0] - i * ticks_per_frame) <= 1 for i, t in enumerate(times)):
            return float(rate), True
    return float(measured), False
