"""Planes -> the mp4 of the profile `train`, in the planned order, checked by reading it back.

Equal planes give equal bytes: one thread, and nothing that names the encoder or the time. No
macroblock tree: with it, x264 165 gives now and then other bytes for the same frames.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import IO, cast

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.container import OutputContainer
from av.video.frame import PictureType
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from data_sharding.transcode.planes import Colours
from data_sharding.transcode.profile import TrainProfile
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import open_video

_NAMES = 6  # H.264's units of side information: here the encoder's name and settings
_H264_MATRIX = {"bt601": 6, "bt709": 1}  # ITU-T H.264 table E-5

# Pixels are what training compares: what only pleases the eye (psy, adaptive quantisation) costs
# bytes here. mbtree: see above. keyint, scenecut: key frames only where planned.
_X264 = "psy=0:aq-mode=0:trellis=2:weightp=2:mbtree=0:keyint=infinite:scenecut=0"


def encode(
    spool: IO[bytes],
    plan: Sequence[tuple[int, bool]],
    info: VideoInfo,
    options: TrainProfile,
    size: tuple[int, int],
    colours: Colours,
) -> bytes:
    """The mp4 of the spooled frames that `plan` lists: (number, whether a key frame)."""
    height, width = size
    frame_bytes = height * width * 3 // 2
    file = io.BytesIO()
    # bitexact: no name and no time of the writer.
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = _add_stream(container, info, options, colours)
        stream.width, stream.height = width, height
        no_names = BitStreamFilterContext(f"filter_units=remove_types={_NAMES}", stream)
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
    container: OutputContainer, info: VideoInfo, options: TrainProfile, colours: Colours
) -> VideoStream:
    rate = Fraction(info.fps).limit_denominator(1_000_000)
    settings = {
        "preset": options.preset,
        "crf": str(options.crf),
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
    context.colorspace = _H264_MATRIX[colours.matrix]
    context.color_range = ColorRange.JPEG if colours.full_range else ColorRange.MPEG
    return stream


def read_back(video: bytes, plan: Sequence[tuple[int, bool]]) -> tuple[bytes, list[av.Packet]]:
    """Codec header and packets of a finished file, checked against what the format promises."""
    with open_video(video) as container:
        stream = container.streams.video[0]
        header = stream.codec_context.extradata or b""
        packets = [packet for packet in container.demux(stream) if packet.size]
    assert len(packets) == len(plan), "every packet holds one frame"
    end = packets[0].pos
    assert end is not None
    for position, (packet, (_, key)) in enumerate(zip(packets, plan, strict=True)):
        assert packet.pts == packet.dts, "frames are decoded in the order of the file"
        assert packet.pos == end, "packets lie end to end"
        assert packet.is_keyframe == key, f"frame {position} is a key frame or not as planned"
        end += packet.size
    with open_video(video) as container:
        decoded = sum(not frame.is_corrupt for frame in container.decode(video=0))
    assert decoded == len(plan), "every frame can be decoded"
    return header, packets
