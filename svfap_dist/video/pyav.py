"""Decoding on the CPU with PyAV: the backend for everything that FFmpeg decodes.

In: a video and frame numbers. Out: those frames, as the planes that the codec stores where these
are 8-bit 4:2:0, which nearly all video is, else as RGB.

Videos whose shard states where each packet is (`VideoInfo.layout`) are decoded without opening the
container: packets are sliced from the bytes and fed to a decoder that this thread keeps for all
videos with the same codec header, which nearly all of a data set have. A window whose stride is the
number of phases is one run of adjacent packets. Other videos go through their container
(`timeline`). Either way, decoding starts at the key frame before the first wanted frame and ends
with the last wanted one.

One call uses one thread: the loader decodes many videos side by side. A single-threaded converter
per call makes the RGB, because PyAV's `to_ndarray(format=...)` sets up a threaded one for every
frame, which costs several times the conversion.
"""

from __future__ import annotations

import base64
import collections
import threading
from collections.abc import Iterator, Sequence
from typing import cast

import av
import numpy as np
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import VideoReformatter

from svfap_dist.errors import DecodeError
from svfap_dist.video.frames import (
    PLANAR_420,
    Colors,
    Decoder,
    Frames,
    RgbFrames,
    YuvFrames,
    check_frame,
    plane_view,
    stated_colors,
)
from svfap_dist.video.info import (
    LEAVE_OUT,
    PhaseLayout,
    VideoInfo,
    stored_position,
    stored_positions,
    too_short,
)
from svfap_dist.video.timeline import decoded_frames

_KEPT_DECODERS = 16  # of a thread; each holds a few frames
_kept = threading.local()


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
        decoded = zip(distinct, decoded_frames(video, info, distinct), strict=True)
        found: dict[int, av.VideoFrame] = {}
        for number, frame in decoded:
            check_frame(frame, info, f"frame {number}")
            found[number] = frame
    except FFmpegError as error:
        where = f"{info.codec} video, frames {distinct[0]} to {distinct[-1]}"
        found_error = f"{type(error).__name__}: {error}"
        raise DecodeError(
            "Video cannot be decoded", where=where, found=found_error, do=LEAVE_OUT
        ) from error
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
    slots: dict[int, list[int]] = collections.defaultdict(list)
    for slot, position in enumerate(stored_positions(info, numbers)):
        slots[position].append(slot)
    y = np.empty((len(numbers), info.height, info.width), np.uint8)
    half = (len(numbers), (info.height + 1) // 2, (info.width + 1) // 2)
    planes = y, np.empty(half, np.uint8), np.empty(half, np.uint8)
    colors = None
    for position, frame in _fed(video, info, layout, sorted(slots)):
        check_frame(frame, info, f"packet {position}")
        colors = _planar_colors(frame)
        if colors is None:
            what = "Frame does not consist of 8-bit 4:2:0 planes in a supported color space"
            raise DecodeError(what, where=f"{info.codec} video", do=LEAVE_OUT)
        for out, plane in zip(planes, frame.planes, strict=True):
            pixels = plane_view(plane)
            for slot in slots[position]:
                out[slot] = pixels
    assert colors is not None, "there is at least one number"
    return YuvFrames(*planes, colors)


def _fed(
    video: bytes, info: VideoInfo, layout: PhaseLayout, wanted: Sequence[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield the frames at the wanted positions (ascending) of the stream, with their positions."""
    offsets = np.cumsum((layout.first_byte, *layout.packet_sizes))
    if offsets[wanted[-1] + 1] > len(video):
        raise too_short(f"packet {wanted[-1]}", f"{len(video)} bytes for {offsets[-1]}")
    codec, needed = _decoder(info.codec, layout.codec_header), set(wanted)
    for position in _needed_packets(wanted, info.num_frames, layout):
        frames = codec.decode(av.Packet(video[offsets[position] : offsets[position + 1]]))
        if len(frames) != 1:
            where, found = f"packet {position}", f"{len(frames)} frames"
            raise DecodeError(
                "Packet does not hold one frame", where=where, found=found, do=LEAVE_OUT
            )
        if position in needed:
            yield position, frames[0]


def _needed_packets(wanted: Sequence[int], num_frames: int, layout: PhaseLayout) -> Iterator[int]:
    """Yield positions of the packets to feed for the wanted ones (ascending), from key frames."""
    begins = [stored_position(k, num_frames, layout.phases) for k in range(layout.phases)]
    fed = -1
    for position in wanted:
        begin = max(begin for begin in begins if begin <= position)
        key = position - (position - begin) % layout.group
        yield from range(max(key, fed + 1), position + 1)
        fed = position


def _decoder(codec: str, header: str) -> VideoCodecContext:
    """Return this thread's decoder for a codec and its header, ready for a key frame."""
    decoders: collections.OrderedDict[tuple[str, str], VideoCodecContext]
    decoders = _kept.__dict__.setdefault("decoders", collections.OrderedDict())
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
