"""Reading videos with PyAV: which frame is frame number i, and the backend that decodes on the CPU.

Frames are identified by time (`timeline`), so a seek changes no frame. Only containers with an
index of key frames are sought in, and no video whose first frames cannot be decoded, as where a
stream was cut between key frames. Frames come out as they are shown: turned and mirrored as
`VideoInfo.orientation` says. Decoders that count frames get their positions from `locate_frames`,
which reads packets only.

The backend returns the planes that the codec stores where these are 8-bit 4:2:0, which nearly all
video is, else RGB. Videos whose shard states where each packet is (`VideoInfo.layout`) are decoded
without opening the container: packets are sliced from the bytes and fed to a decoder that this
thread keeps for all videos with the same codec header, which nearly all of a data set have. A
window whose stride is the number of phases is one run of adjacent packets. Either way, decoding
starts at the key frame before the first wanted frame and ends with the last wanted one.

One call uses one thread: the loader decodes many videos side by side. A single-threaded converter
per call makes the RGB, because PyAV's `to_ndarray(format=...)` sets up a threaded one for every
frame, which costs several times the conversion.
"""

from __future__ import annotations

import base64
import collections
import io
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import av
import numpy as np
from av.codec import CodecContext
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from svfap_dist.errors import DecodeError
from svfap_dist.video.frames import (
    PLANAR_420,
    Colors,
    Decoder,
    Frames,
    Matrix,
    RgbFrames,
    YuvFrames,
    check_frame,
    matrix_of,
    plane_view,
    stated_colors,
)
from svfap_dist.video.info import (
    LEAVE_OUT,
    PhaseLayout,
    StoredFrame,
    VideoInfo,
    stored_frames,
    too_short,
)
from svfap_dist.video.orientation import turn_frame
from svfap_dist.video.timeline import FrameClock, Timed, frame_times, has_pts, packet_times

# Only these of FFmpeg's demuxers: a playlist in disguise must not make it open other files or URLs.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg"

_KEPT_DECODERS = 16  # of a thread; each holds a few frames
_of_thread = threading.local()
_matrices: dict[str, Matrix] = {}  # by codec header of phase-ordered videos: a handful per data set


def open_video(data: bytes, probed: bool = False, max_pixels: int = 0) -> InputContainer:
    """Open a container.

    Args:
        data: bytes of the file.
        probed: whether it is known to be a video; else only the demuxers of the supported
            containers may open it.
        max_pixels: of a frame; decoders take no memory for a larger one. 0: no limit.

    Raises:
        av.error.FFmpegError, ValueError, OverflowError: the bytes are no such container.
    """
    options = {} if probed else {"format_whitelist": _DEMUXERS}
    if max_pixels:  # also for the frames that are decoded to find out what the streams are
        options["max_pixels"] = str(max_pixels)
    container = av.open(io.BytesIO(data), "r", options=options, metadata_errors="replace")
    for stream in container.streams.video if max_pixels else ():
        codec = cast(CodecContext | None, stream.codec_context)  # its type lacks None
        if codec is not None:
            codec.options = {"max_pixels": str(max_pixels)}
    return cast(InputContainer, container)


def video_stream(container: InputContainer) -> VideoStream:
    """Return the first stream of moving pictures, set up to decode in one thread.

    Args:
        container: an open video.

    Raises:
        DecodeError: there is none, or none of a codec that this FFmpeg has.
    """
    for stream in container.streams.video:
        codec = cast(CodecContext | None, stream.codec_context)  # its type lacks None
        # Cover pictures are video streams of one frame.
        if codec is not None and not stream.disposition & Disposition.attached_pic:
            codec.thread_count = 1
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
    where = f"{container.format.name} file"
    raise DecodeError("No video stream", where=where, found=f"streams: {kinds}", do=LEAVE_OUT)


def decode_from_key(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream from its first key frame on.

    Frames before it refer to ones that are not there; decoders fail, or make up what is missing.
    All frames, where the container marks none as key frames.

    Args:
        container: a video that was just opened.
        stream: its stream.
    """
    before: list[Packet] | None = []
    for packet in container.demux(stream):
        if before is not None:
            if packet.size and not packet.is_keyframe:
                before.append(packet)
                continue
            for other in () if packet.size else before:  # at the end: there was no key frame
                yield from cast(list[av.VideoFrame], other.decode())
            before = None
        yield from cast(list[av.VideoFrame], packet.decode())


def decoded_frames(
    video: bytes, info: VideoInfo, numbers: Sequence[int], whole: bool = False
) -> Iterator[av.VideoFrame]:
    """Decode the frames with these numbers, one by one.

    Only what is between the key frame before the first and the last one is decoded.

    Args:
        video: bytes of the file, whose frames are stored in presentation order.
        info: what is known about it.
        numbers: frame numbers, ascending, without repeats.
        whole: decode from the beginning instead, count times from the first frame that can be
            decoded, and fail on any damaged frame.

    Raises:
        DecodeError: a frame is missing (TooShortError), damaged or has no time stamp.
        av.error.FFmpegError: FFmpeg cannot read or decode the file.
    """
    from_start = whole or not info.seekable
    seek = True
    while True:
        with open_video(video, probed=True) as container:
            stream = video_stream(container)
            tick, by_pts = stream.time_base, has_pts(container)
            assert tick is not None
            clock = FrameClock(info, tick)
            origin = stream.start_time if by_pts and not from_start else None
            frames = container.decode(stream)
            if not info.seekable:
                frames = decode_from_key(container, stream)
            if seek and origin is not None:
                due = origin + clock.latest(numbers[0])
                try:
                    container.seek(due, stream=stream)
                except FFmpegError:  # no key frame before it
                    from_start = True
                    continue
                first = next(frames, None)
                if first is None or (first.pts or 0) > due:
                    # Some containers can only seek by DTS, and arrive a key frame late.
                    seek = False
                    continue
                frames = itertools.chain([first], frames)
            yield from clock.select(_timed(frames, origin, by_pts, whole), numbers)
            return


def _timed(
    frames: Iterable[av.VideoFrame], origin: int | None, by_pts: bool, check: bool
) -> Iterator[Timed[av.VideoFrame]]:
    """Yield decoded frames with their times; `origin` None: that of the first one."""
    for time, frame in frame_times(frames, by_pts):
        if check and frame.is_corrupt:
            raise DecodeError("Frame is damaged", where=f"time stamp {frame.pts}", do=LEAVE_OUT)
        origin = time if origin is None else origin
        yield time - origin, frame.duration or 0, frame


class Located(NamedTuple):
    """Where wanted frames are in one file, and how their colors are stored."""

    file: bytes
    slots: list[int]  # which of the wanted frames it has
    positions: list[int]  # of these, in its presentation order
    matrix: Matrix
    pixel_format: str = "yuv420p"  # FFmpeg's name
    hides_packets: bool = False  # some are decoded but not shown: an edit list leaves them out


def locate_frames(video: bytes, info: VideoInfo, numbers: Sequence[int]) -> list[Located]:
    """Find the frames with these numbers without decoding any.

    Reading all packets also shows whether a file can be opened at all, before a library gets it
    that a broken one brings down.

    Args:
        video: bytes of the file, or of the files, of the video.
        info: what the shard says about it.
        numbers: frame numbers in any order, repeats allowed.

    Returns:
        An entry per file that has some of them.

    Raises:
        DecodeError: the files have no such frames, as far as their packets show; TooShortError and
            WrongSizeError are its kinds.
    """
    try:
        if info.layout is None:
            return [_locate_by_time(video, info, numbers)]
        return list(_locate_by_layout(video, info, info.layout, numbers))
    except FFmpegError as error:
        found = f"{type(error).__name__}: {error}"
        raise DecodeError("Video cannot be read", found=found, do=LEAVE_OUT) from error


def pixel_format_of(video: bytes, info: VideoInfo) -> str:
    """Return FFmpeg's name of a video's pixel format.

    Args:
        video: bytes of the file.
        info: what the shard says about it.

    Raises:
        DecodeError: the file cannot be read.
    """
    return locate_frames(video, info, [0])[0].pixel_format


def _locate_by_layout(
    video: bytes, info: VideoInfo, layout: PhaseLayout, numbers: Sequence[int]
) -> Iterator[Located]:
    slots: dict[int, list[int]] = collections.defaultdict(list)
    frames = stored_frames(info, numbers)
    for slot, frame in enumerate(frames):
        slots[frame.file].append(slot)
    borders = [*(file.begin for file in layout.files), len(video)]
    for index, of_file in slots.items():
        data = video[borders[index] : borders[index + 1]]
        end = layout.files[index].first_byte + sum(layout.files[index].packet_sizes)
        if end > len(data):
            found = f"packets end at byte {end} of {len(data)}"
            raise DecodeError("Video is cut short", found=found, do=LEAVE_OUT)
        if layout.codec_header not in _matrices:
            with open_video(data, probed=True) as container:
                _matrices[layout.codec_header] = _matrix(_sized_stream(container, info))
        positions = [frames[slot].position for slot in of_file]
        yield Located(data, of_file, positions, _matrices[layout.codec_header])


def _locate_by_time(video: bytes, info: VideoInfo, numbers: Sequence[int]) -> Located:
    with open_video(video, probed=True) as container:
        stream = _sized_stream(container, info)
        # Packets before the start that an edit list sets are decoded, but not shown.
        every = [packet for packet in container.demux(stream) if packet.size]
        packets = [packet for packet in every if not packet.is_discard]
        times = packet_times(packets, container)
        tick, origin = stream.time_base, stream.start_time
        if not has_pts(container) or origin is None:
            origin = min(times, default=0)
        matrix, pixel_format = _matrix(stream), stream.codec_context.pix_fmt or ""
    assert tick is not None
    durations = [packet.duration or 0 for packet in packets]
    shown = sorted(zip(times, durations, strict=True))
    timed = ((time - origin, duration, k) for k, (time, duration) in enumerate(shown))
    distinct = sorted(set(numbers))
    found = dict(zip(distinct, FrameClock(info, tick).select(timed, distinct), strict=True))
    positions = [found[number] for number in numbers]
    slots, hides_packets = list(range(len(numbers))), len(packets) < len(every)
    return Located(video, slots, positions, matrix, pixel_format, hides_packets)


def _sized_stream(container: InputContainer, info: VideoInfo) -> VideoStream:
    """Return the video stream if it has the stated size."""
    stream = video_stream(container)
    check_frame(stream, info)
    return stream


def _matrix(stream: VideoStream) -> Matrix:
    return matrix_of(int(stream.codec_context.colorspace)) or "bt601"


def open_decoder(device: str, *, threads: int, pipelines: int) -> Decoder:
    """Return the decoder, which is the same for all devices.

    Args:
        device: not used: frames are decoded on the host.
        threads: not used: a call has one thread.
        pipelines: not used.
    """
    return decode


def decode(video: bytes, info: VideoInfo, numbers: Sequence[int]) -> Frames:
    """See `Decoder.__call__`."""
    distinct = sorted(set(numbers))
    try:
        if info.layout is not None:
            return _decode_packets(video, info, info.layout, numbers)
        found: dict[int, av.VideoFrame] = {}
        converter = VideoReformatter()
        for number, frame in zip(distinct, decoded_frames(video, info, distinct), strict=True):
            check_frame(frame, info, f"frame {number}")
            found[number] = turn_frame(frame, info.orientation, converter)
    except FFmpegError as error:
        where = f"{info.codec} video, frames {distinct[0]} to {distinct[-1]}"
        what = f"{type(error).__name__}: {error}"
        raise DecodeError("Video cannot be decoded", where, what, LEAVE_OUT) from error
    return _collect([found[number] for number in numbers])


def _collect(frames: Sequence[av.VideoFrame]) -> Frames:
    """Return decoded frames as planes if these can express them, else as RGB."""
    colors = set(map(_planar_colors, frames))
    if len(colors) == 1 and (shared := colors.pop()) is not None:
        y, u, v = (np.stack([plane_view(frame.planes[k]) for frame in frames]) for k in range(3))
        return YuvFrames(y, u, v, shared)
    converter = VideoReformatter()
    rgb = [converter.reformat(frame, format="rgb24", threads=1).to_ndarray() for frame in frames]
    return RgbFrames(np.stack(rgb))


def _planar_colors(frame: av.VideoFrame) -> Colors | None:
    """Return what the values of a frame mean; None: it has no planes that `YuvFrames` can hold."""
    matrix, full_range = stated_colors(frame)
    return Colors(matrix, full_range) if matrix and frame.format.name in PLANAR_420 else None


def _decode_packets(
    video: bytes, info: VideoInfo, layout: PhaseLayout, numbers: Sequence[int]
) -> YuvFrames:
    """Decode frames of a phase-ordered video straight from its packets."""
    slots: dict[StoredFrame, list[int]] = collections.defaultdict(list)
    for slot, stored in enumerate(stored_frames(info, numbers)):
        slots[stored].append(slot)
    y = np.empty((len(numbers), info.height, info.width), np.uint8)
    half = (len(numbers), (info.height + 1) // 2, (info.width + 1) // 2)
    planes = y, np.empty(half, np.uint8), np.empty(half, np.uint8)
    colors = None
    for stored, frame in _decode_stored(video, info, layout, sorted(slots)):
        check_frame(frame, info, f"packet {stored.position}")
        colors = _planar_colors(frame)
        if colors is None:
            what = "Frame does not consist of 8-bit 4:2:0 planes in a supported color space"
            raise DecodeError(what, where=f"{info.codec} video", do=LEAVE_OUT)
        for out, plane in zip(planes, frame.planes, strict=True):
            pixels = plane_view(plane)
            for slot in slots[stored]:
                out[slot] = pixels
    assert colors is not None, "there is at least one number"
    return YuvFrames(*planes, colors)


def _decode_stored(
    video: bytes, info: VideoInfo, layout: PhaseLayout, wanted: Sequence[StoredFrame]
) -> Iterator[tuple[StoredFrame, av.VideoFrame]]:
    """Yield the wanted frames (ascending), each decoded from its key frame on."""
    codec = _decoder(info.codec, layout.codec_header)
    for index, of_file in itertools.groupby(wanted, key=lambda stored: stored.file):
        file = layout.files[index]
        offsets = np.cumsum((file.begin + file.first_byte, *file.packet_sizes)).tolist()
        fed = -1
        for stored in of_file:
            position = stored.position
            if offsets[position + 1] > len(video):
                raise too_short(f"packet {position}", f"{len(video)} bytes for {offsets[-1]}")
            frames: list[av.VideoFrame] = []
            for number in range(max(position - stored.after_key, fed + 1), position + 1):
                frames = codec.decode(av.Packet(video[offsets[number] : offsets[number + 1]]))
                if len(frames) != 1:
                    where, found = f"packet {number}", f"{len(frames)} frames"
                    raise DecodeError("Packet does not hold one frame", where, found, LEAVE_OUT)
            fed = position
            yield stored, frames[0]


def _decoder(codec: str, header: str) -> VideoCodecContext:
    """Return this thread's decoder for a codec and its header, ready for a key frame."""
    decoders: collections.OrderedDict[tuple[str, str], VideoCodecContext]
    decoders = _of_thread.__dict__.setdefault("decoders", collections.OrderedDict())
    decoder = decoders.pop((codec, header), None)
    if decoder is None:
        decoder = cast(VideoCodecContext, av.CodecContext.create(codec, "r"))
        decoder.extradata = base64.b64decode(header)
        decoder.thread_count = 1
        decoder.options = {"err_detect": "explode"}  # else FFmpeg conceals damage
    else:
        decoder.flush_buffers()
    decoders[codec, header] = decoder
    if len(decoders) > _KEPT_DECODERS:
        decoders.popitem(last=False)
    return decoder
