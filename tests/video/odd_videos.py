"""Videos as phones and cutting tools write them: turned, cut between key frames, in odd ticks."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from typing import cast

import av
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream


def with_matrix(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An mp4 whose point (x, y) is to be shown at (a x + c y, b x + d y)."""
    at = mp4.index(b"tkhd") + 4 + 40  # after version, flags, dates, number, duration, layer, volume
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return mp4[:at] + matrix + mp4[at + len(matrix) :]


def remuxed(
    data: bytes, container: str, skip: int = 0, tick: int | None = None, shift: int = 0
) -> bytes:
    """The packets of a video in another container, without the first ones.

    Args:
        tick: ticks per second of the new stream, of an AVI those of DTS; None: as it was.
        shift: added to all times, in ticks of the source.
    """
    file = io.BytesIO()
    name = {"mkv": "matroska", "ts": "mpegts"}.get(container, container)
    source = cast(InputContainer, av.open(io.BytesIO(data)))
    with source, av.open(file, "w", format=name, options={"fflags": "+bitexact"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        assert isinstance(copy, VideoStream)
        if tick is not None:
            copy.time_base = Fraction(1, tick)
        annexb = None
        if container == "avi" and stream.codec_context.name == "h264":
            annexb = BitStreamFilterContext("h264_mp4toannexb", stream)
        packets: list[Packet] = [packet for packet in source.demux(stream) if packet.size]
        for packet in packets[skip:]:
            for out in annexb.filter(packet) if annexb else [packet]:
                out.pts = None if out.pts is None else out.pts + shift
                out.dts = None if out.dts is None else out.dts + shift
                out.stream = copy
                target.mux(out)
    return file.getvalue()
