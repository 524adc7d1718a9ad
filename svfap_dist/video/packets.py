"""Frames of a video of the `train` profile, straight from its packets.

In: the bytes of an mp4 whose frames lie phase by phase, what the shard says about it, and the
numbers of the wanted frames. Out: their planes as the codec has them. No container is opened: the
sample's JSON says where each packet lies, so packets are cut out of the bytes and given to a
decoder that this thread keeps for all videos with the same codec header, which is to say nearly
all of a data set. What is decoded is the wanted frames and what lies between them and the key frame
before them: a window whose stride is the number of phases is one run of neighbours. Any other list
of frames comes out right as well; it only takes longer.
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

from svfap_dist.errors import DecodeError
from svfap_dist.video.frames import YuvFrames
from svfap_dist.video.info import PhaseLayout, VideoInfo, stored_position
from svfap_dist.video.pyav import LEAVE_OUT, TooShortError, check_frame, colours_of_planes, plane

_KEPT_DECODERS = 16  # of a thread; each holds a few frames
_kept = threading.local()


def decode(video: bytes, info: VideoInfo, numbers: Sequence[int]) -> YuvFrames:
    """The frames with these numbers, in the order given: y [F, H, W], u and v [F, H/2, W/2].

    Raises: DecodeError, or its kinds TooShortError and WrongSizeError, if one cannot be had.
    """
    order = info.layout
    assert order is not None, "only videos of the train profile have their packets listed"
    for number in (min(numbers), max(numbers)):
        if not 0 <= number < info.num_frames:
            where, found = f"frame {number}", f"{info.num_frames} frames"
            raise TooShortError("Video has no such frame", where=where, found=found, do=LEAVE_OUT)
    stored = [stored_position(number, info.num_frames, order.phases) for number in numbers]
    slots: dict[int, list[int]] = collections.defaultdict(list)
    for slot, position in enumerate(stored):
        slots[position].append(slot)
    y = np.empty((len(numbers), info.height, info.width), np.uint8)
    half = (len(numbers), (info.height + 1) // 2, (info.width + 1) // 2)
    planes = y, np.empty(half, np.uint8), np.empty(half, np.uint8)
    colours = None
    for position, frame in _decoded(video, info, order, sorted(slots)):
        check_frame(frame, info, f"packet {position}")
        colours = colours_of_planes(frame)
        for number, out in enumerate(planes):
            pixels = plane(frame, number)
            for slot in slots[position]:
                out[slot] = pixels
    if colours is None:
        what = "Frames are no planes of 4:2:0 video of 8 bits in a known colour space"
        raise DecodeError(what, where=f"{info.codec} video", do=LEAVE_OUT)
    return YuvFrames(*planes, *colours)


def _decoded(
    video: bytes, info: VideoInfo, order: PhaseLayout, wanted: Sequence[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames at the wanted positions (ascending) of the stream, with their positions."""
    name = f"{info.codec} header of {len(order.codec_header)} characters"
    offsets = np.cumsum((order.first_byte, *order.packet_sizes))
    if offsets[wanted[-1] + 1] > len(video):
        found = f"{len(video)} bytes for {offsets[-1]}"
        raise TooShortError("Video ends before a wanted frame", found=found, do=LEAVE_OUT)
    try:
        codec = _decoder(info.codec, order.codec_header)
        needed = set(wanted)
        for position in _to_be_fed(wanted, info.num_frames, order):
            packet = av.Packet(video[offsets[position] : offsets[position + 1]])
            frames = codec.decode(packet)
            if len(frames) != 1:
                found = f"{len(frames)} frames"
                raise DecodeError(
                    "Packet does not hold one frame",
                    where=f"packet {position}",
                    found=found,
                    do=LEAVE_OUT,
                )
            if position in needed:
                yield position, frames[0]
    except FFmpegError as error:
        raise DecodeError(
            "Video cannot be decoded",
            where=name,
            found=f"{type(error).__name__}: {error}",
            do=LEAVE_OUT,
        ) from error


def _to_be_fed(wanted: Sequence[int], num_frames: int, order: PhaseLayout) -> Iterator[int]:
    """Positions of all packets that the wanted ones (ascending) need: from the key frame on."""
    begins = [stored_position(k, num_frames, order.phases) for k in range(order.phases)]
    fed = -1
    for position in wanted:
        begin = max(begin for begin in begins if begin <= position)
        key = position - (position - begin) % order.group
        yield from range(max(key, fed + 1), position + 1)
        fed = position


def _decoder(codec: str, header: str) -> VideoCodecContext:
    """A decoder of this thread for a codec and its header, which starts with a key frame."""
    decoders: collections.OrderedDict[tuple[str, str], VideoCodecContext]
    decoders = _kept.__dict__.setdefault("decoders", collections.OrderedDict())
    decoder = decoders.pop((codec, header), None)
    if decoder is None:
        decoder = cast(VideoCodecContext, av.CodecContext.create(codec, "r"))
        decoder.extradata = base64.b64decode(header)
        decoder.thread_count = 1
        # Damage is an error, where FFmpeg would otherwise paint over it.
        decoder.options = {"err_detect": "explode"}
    else:
        decoder.flush_buffers()
    decoders[codec, header] = decoder
    if len(decoders) > _KEPT_DECODERS:
        decoders.popitem(last=False)
    return decoder
